"""Low-rank adapters beside the matrices of a finished Transformer: LoRA, rsLoRA, DoRA.

    y = W x + s B A x                                   arXiv:2106.09685 sec. 4.1, s = alpha / r
    y = m / |W + s B A| * (W + s B A) x                 DoRA, arXiv:2402.09353 eq. 5; |.| of each row, as a constant

Several adapters form a stack, each upon what those before it made. Weights keep their names and stay where they are;
an adapter's are LAYER.lora_a.NAME [r I], LAYER.lora_b.NAME [O r] and LAYER.magnitude.NAME [O]. A layer becomes an
adapted one by changing its class, so whatever base layer has `dense()` (a quantised one, too) can have adapters.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llama2.errors import ConfigError, did_you_mean
from llama2.model.arithmetic import Linear, linear
from llama2.model.lora_config import LoraConfig, check, check_name
from llama2.model.surgery import replace_linears
from llama2.model.transformer import Transformer


class Adapted(nn.Module):
    """Mixed in before a linear layer that has `dense() -> [O I]`, its weight as a matrix."""

    plain: type[nn.Module]
    """The class without adapters."""
    in_features: int
    out_features: int
    dense: Callable[[], Tensor]
    lora_a: nn.ParameterDict
    lora_b: nn.ParameterDict
    magnitude: nn.ParameterDict
    adapters: dict[str, LoraConfig]
    active: tuple[str, ...]
    known: dict[str, tuple[object, Tensor]]
    """What follows from the weights alone, kept while they stay the same."""

    def forward(self, input: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        out = super().forward(input)
        for name in self.active:
            out = self._beside(name, input, out)
        return out

    def _beside(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """Add one adapter to what the layers below it made of x, in the type of x."""
        config = self.adapters[name]
        is_dropping = self.training and config.dropout > 0
        kept = F.dropout(x, config.dropout) if is_dropping else x
        a, b = self.lora_a[name].to(x.dtype), self.lora_b[name].to(x.dtype)
        thin = linear(kept, a) * config.scale  # [*B r]
        if not config.dora:
            return _plus(out, thin, b)
        change = linear(thin, b)
        norm = self._known(f"norm of {name}", lambda: self._norm(name)).to(x.dtype)
        ratio = self.magnitude[name].to(x.dtype) / norm
        bias = getattr(self, "bias", None)
        if is_dropping:  # as PEFT has it: what W makes of x is scaled as far as it is not dropped
            below = linear(kept, self.effective(self._below(name)).to(x.dtype))
        else:
            below = out if bias is None else out - bias
        return out + ((ratio - 1) * below + ratio * change)

    def effective(self, names: Iterable[str]) -> Float[Tensor, "O I"]:
        """Return the weight with these adapters, in float32 (float64 for float64)."""
        weight = self.dense()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            weight = self._changed(weight, name)
            if name in self.magnitude:
                magnitude = self.magnitude[name]
                norm = torch.linalg.vector_norm(weight.detach(), dim=1).to(magnitude.dtype)  # rounded as its twin is
                weight = (magnitude.to(weight.dtype) / norm.to(weight.dtype))[:, None] * weight
        return weight

    def _changed(self, weight: Tensor, name: str) -> Tensor:
        a, b = self.lora_a[name].to(weight.dtype), self.lora_b[name].to(weight.dtype)
        return weight + self.adapters[name].scale * (b @ a)

    def _below(self, name: str) -> tuple[str, ...]:
        return self.active[: self.active.index(name)]

    @torch.no_grad()
    def _norm(self, name: str) -> Tensor:
        return torch.linalg.vector_norm(self._changed(self.effective(self._below(name)), name), dim=1)

    def _known(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Compute once as long as nothing is trained: a DoRA norm reads the whole matrix, as much as a token does."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        weights = [(each.data_ptr(), each.dtype, each._version) for each in self.parameters()]
        stamp = (self.active, weights)
        if key not in self.known or self.known[key][0] != stamp:
            self.known[key] = (stamp, compute())
        return self.known[key][1]

    def train(self, mode: bool = True):
        self.known.clear()
        return super().train(mode)


def _plus(out: Float[Tensor, "*B O"], thin: Float[Tensor, "*B r"], b: Float[Tensor, "O r"]) -> Float[Tensor, "*B O"]:
    """out + thin B^T; in training in place, for a pass over `out` costs as much there as a thin product."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return out + linear(thin, b)
    return out.view(-1, out.shape[-1]).addmm_(thin.flatten(0, -2), b.t()).view_as(out)


class LoRALinear(Adapted, Linear):
    """A Linear with adapters."""

    plain = Linear

    def dense(self) -> Float[Tensor, "O I"]:
        return self._parameters["weight"]  # pyright: ignore[reportReturnType]


class LoRAOutput(LoRALinear):
    """The output projection with adapters. The model and the loss read its weight, so that holds them already.

    In 16 bits the sum is therefore rounded, as merging would.
    """

    @property
    def weight(self) -> Float[Tensor, "V D"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._known("sum", lambda: self.effective(self.active).to(self.dense().dtype))

    def forward(self, input: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        return linear(input, self.weight)


@functools.cache
def _adapted_kind(kind: type[nn.Module], leaf: str) -> type[nn.Module]:
    if kind is Linear:
        return LoRAOutput if leaf == "output" else LoRALinear
    return type(f"LoRA{kind.__name__}", (Adapted, kind), {"plain": kind})


def add_adapter(model: Transformer, config: LoraConfig, *, name: str = "default", seed: int | None = 0) -> Transformer:
    """Put an adapter upon the model (and upon the adapters it has), in place, and return it.

    Everything but the new adapter and its trained_modules is frozen. It has the type of the embedding and begins with
    B = 0, so it changes nothing yet. On the meta device, or with seed None, it is unfilled: see `fresh_adapter`.
    Raises ConfigError for an adapter that cannot be made, and a name that is taken.
    """
    check(config, tied_embeddings=model.output is None)
    check_name(name)
    if name in adapter_names(model):
        raise ConfigError(f"the model has an adapter {name!r} already; give the new one another name")
    dtype = model.tok_embeddings.weight.dtype
    model.requires_grad_(False)

    def adapt(_: str, layer: nn.Module) -> nn.Module:
        return _adapt(layer, name, config, dtype, "output" if layer is model.output else "")

    replace_linears(model, adapt, lambda where: where.rpartition(".")[2] in config.target_modules)
    for module in config.trained_modules:
        model.get_submodule(module).requires_grad_(True)
    _adapters(model)[name] = config
    if seed is not None and not model.tok_embeddings.weight.is_meta:
        initialise_adapter(model, seed=seed, name=name)
    return model


def _adapt(layer: nn.Module, name: str, config: LoraConfig, dtype: torch.dtype, leaf: str) -> nn.Module:
    if not isinstance(layer, Adapted):
        layer.__class__ = _adapted_kind(type(layer), leaf)
        assert isinstance(layer, Adapted)
        layer.lora_a, layer.lora_b, layer.magnitude = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        layer.adapters, layer.active, layer.known = {}, (), {}
    device = next(iter([*layer.parameters(), *layer.buffers()])).device
    n_in, n_out = layer.in_features, layer.out_features
    layer.lora_a[name] = nn.Parameter(torch.zeros(config.r, n_in, dtype=dtype, device=device))
    layer.lora_b[name] = nn.Parameter(torch.zeros(n_out, config.r, dtype=dtype, device=device))
    if config.dora:
        layer.magnitude[name] = nn.Parameter(torch.zeros(n_out, dtype=dtype, device=device))
    layer.adapters[name] = config
    layer.active = (*layer.active, name)
    return layer


def fresh_adapter(
    model: Transformer, *, seed: int, name: str = "default", weight_of: Callable[[str], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and first value (float32, on the CPU) of an adapter's weights, the same for the same seed everywhere.

    A is uniform(-1 / sqrt(I), 1 / sqrt(I)), which is kaiming_uniform(a = sqrt 5), as in loralib and PEFT; B is zero;
    magnitudes are the lengths of the rows of the weight. weight_of: returns the weight of that name that this adapter
    is put on, earlier adapters included; for DoRA on the meta device, else the model's own.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for where, layer in _layers_with(model, name):
        bound = layer.in_features**-0.5
        uniform = torch.rand(layer.lora_a[name].shape, generator=generator, dtype=torch.float32)
        yield f"{where}.lora_a.{name}", (2 * uniform - 1) * bound
        yield f"{where}.lora_b.{name}", torch.zeros(layer.lora_b[name].shape)
        if name in layer.magnitude:
            below = layer.effective(layer._below(name)) if weight_of is None else weight_of(f"{where}.weight")
            exact = torch.promote_types(below.dtype, torch.float32)
            yield f"{where}.magnitude.{name}", torch.linalg.vector_norm(below.detach().to(exact), dim=1).cpu().float()


@torch.no_grad()
def initialise_adapter(model: Transformer, *, seed: int, name: str = "default") -> Transformer:
    """Fill an adapter with `fresh_adapter` and return the model."""
    parameters = dict(model.named_parameters())
    for where, values in fresh_adapter(model, seed=seed, name=name):
        parameters[where].copy_(values)
    return model


def adapter_names(model: Transformer) -> tuple[str, ...]:
    """Return the names of the model's adapters, the lowest of the stack first."""
    return tuple(_adapters(model))


def adapter_config(model: Transformer, name: str = "default") -> LoraConfig:
    """Return what an adapter is. Raises ConfigError if there is none of this name."""
    names = adapter_names(model)
    if name not in names:
        raise ConfigError(f"the model has no adapter {name!r}{did_you_mean(name, names)}; it has {list(names)}")
    return _adapters(model)[name]


def adapter_state(model: Transformer, name: str = "default") -> dict[str, Tensor]:
    """Return an adapter's own tensors by their names in the model, modules trained whole included."""
    config = adapter_config(model, name)
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {f"{module}.weight": parameters[f"{module}.weight"] for module in config.trained_modules}
    for where, layer in _layers_with(model, name):
        for kind in ("lora_a", "lora_b", *(["magnitude"] if name in layer.magnitude else [])):
            state[f"{where}.{kind}.{name}"] = parameters[f"{where}.{kind}.{name}"]
    return state


def set_active(model: Transformer, names: str | Iterable[str]) -> None:
    """Let these adapters take part, in the order of the stack, and no others; none at all for ().

    Raises ConfigError for unknown names. Modules trained whole are part of the model and stay as they are.
    """
    chosen = {names} if isinstance(names, str) else {*names}
    for name in chosen:
        adapter_config(model, name)
    for layer in _layers(model):
        layer.active = tuple(name for name in layer.adapters if name in chosen)


def active_adapters(model: Transformer) -> tuple[str, ...]:
    """Return the names of the adapters that take part, the lowest of the stack first."""
    names = {name for layer in _layers(model) for name in layer.active}
    return tuple(name for name in adapter_names(model) if name in names)


def detach(model: Transformer, name: str = "default") -> None:
    """Take an adapter off; with the last one the model is a plain one again, all of it trainable.

    Raises ConfigError for an adapter with trained_modules: what these replaced is gone.
    """
    whole = adapter_config(model, name).trained_modules
    if whole:
        raise ConfigError(
            f"adapter {name!r} brought {', '.join(whole)} whole, and the base's are gone; load the base anew, "
            "or set_active(model, ()) for the rest"
        )
    _take_off(model, name)


@torch.no_grad()
def delta(model: Transformer, name: str = "default") -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that an adapter changes, by name, and the change in float32, upon the active adapters below."""
    adapter_config(model, name)
    for where, layer in _layers_with(model, name):
        below = layer._below(name) if name in layer.active else ()
        yield f"{where}.weight", layer.effective((*below, name)) - layer.effective(below)


@torch.no_grad()
def merge_into(model: Transformer, name: str = "default") -> None:
    """Add an adapter to the weights, summed in float32 and rounded once to their type, and take it off.

    Raises ConfigError over quantised weights, and for an adapter that is not the lowest active one where DoRA has
    part: then the order matters.
    """
    adapter_config(model, name)
    for _, layer in _layers_with(model, name):
        if isinstance(layer._parameters.get("weight"), Tensor):
            _check_order(layer, name)
        else:
            raise ConfigError(
                f"adapter {name!r} lies on quantised weights; merge it into the original with llama2 merge"
            )
    for _, layer in _layers_with(model, name):
        weight = layer.dense()
        weight.copy_(layer.effective((name,)))
    _take_off(model, name)


def _check_order(layer: Adapted, name: str) -> None:
    below = layer._below(name) if name in layer.active else ()
    if below and any(layer.adapters[each].dora for each in (*below, name)):
        raise ConfigError(f"adapter {name!r} stands upon {below[-1]!r}; merge {below[0]!r} first")


def _take_off(model: Transformer, name: str) -> None:
    for _, layer in _layers_with(model, name):
        for tensors in (layer.lora_a, layer.lora_b, layer.magnitude):
            if name in tensors:
                del tensors[name]
        del layer.adapters[name]
        layer.active = tuple(each for each in layer.active if each != name)
        if not layer.adapters:
            for attribute in ("lora_a", "lora_b", "magnitude", "adapters", "active", "known"):
                delattr(layer, attribute)
            layer.__class__ = layer.plain  # pyright: ignore[reportAttributeAccessIssue]
    del _adapters(model)[name]
    if not adapter_names(model):
        model.requires_grad_(True)


def _adapters(model: Transformer) -> dict[str, LoraConfig]:
    return model.__dict__.setdefault("adapters", {})


def _layers(model: Transformer) -> list[Adapted]:
    return [layer for layer in model.modules() if isinstance(layer, Adapted)]


def _layers_with(model: Transformer, name: str) -> list[tuple[str, Adapted]]:
    return [
        (where, layer)
        for where, layer in model.named_modules()
        if isinstance(layer, Adapted) and name in layer.adapters
    ]
