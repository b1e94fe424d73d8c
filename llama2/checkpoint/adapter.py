"""Adapters in PEFT's format: a folder of adapter_config.json and adapter_model.safetensors.

Names and the order of query and key rows are Hugging Face's there: the rows of B, and DoRA's magnitudes, of wq and wk
change order with them (see `tensors.py`). The settings are read by `adapter_config.py`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama2.checkpoint.adapter_config import CONFIG, lora_config, peft_json, refuse
from llama2.checkpoint.hf import hf_name
from llama2.checkpoint.safetensors import read_safetensors, write_safetensors
from llama2.checkpoint.weights import LazyTensor, Stored, expected_shapes, flag, read_json, write_json
from llama2.errors import CheckpointError, ConfigError, did_you_mean
from llama2.files.staging import staged_folder
from llama2.model.config import ModelConfig
from llama2.model.lora_config import HF_NAMES, WHOLE, LoraConfig, check, check_name

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<layer>.+)\.(?:(?P<kind>lora_A|lora_B)\.weight|(?P<magnitude>lora_magnitude_vector)(\.weight)?)"
)
_KINDS = {"lora_A": "lora_a", "lora_B": "lora_b", None: "magnitude"}


@dataclass(frozen=True)
class Adapter:
    """An adapter at rest. `tensors` is keyed by the names in a model that has it; each call reads one anew."""

    config: LoraConfig
    base: str
    """The base model, as the file names it: a path or a hub name."""
    tensors: Mapping[str, LazyTensor]
    path: Path
    vocab_size: int
    """Rows of the embedding with this adapter: the base's, or more."""


def is_adapter(path: str | Path) -> bool:
    """Tell whether a folder is an adapter's."""
    return (Path(path) / CONFIG).is_file()


def with_vocabulary(path: Path, model: ModelConfig) -> ModelConfig:
    """Return the shape of the model with this adapter: its vocabulary may be larger."""
    found = _stored(path)
    rows = {found[key].shape[:1] for key in (_whole_key(name) for name in WHOLE) if key in found}
    sizes = {row[0] for row in rows if row}
    if not sizes or sizes == {model.vocab_size}:
        return model
    if len(sizes) > 1 or min(sizes) < model.vocab_size or (not model.tied_embeddings and len(_whole_in(found)) < 2):
        raise CheckpointError(
            f"{path / WEIGHTS}: {' and '.join(_whole_in(found))} of {', '.join(map(str, sorted(sizes)))} rows do not "
            f"fit a model of vocab_size={model.vocab_size}: adapter of another base, or embedding and output disagree"
        )
    return replace(model, vocab_size=sizes.pop())


def read_adapter(path: str | Path, *, model: ModelConfig, name: str = "default") -> Adapter:
    """Open an adapter's folder: settings, names and shapes are checked against the base; no numbers are read yet.

    model: the base's shape. name: what the adapter is called in the tensors' names. Raises CheckpointError for what
    is not a LoRA adapter of this base, or uses what is not read.
    """
    path = Path(path)
    check_name(name)
    values = read_json(path / CONFIG)
    refuse(path / CONFIG, values)
    stored = _stored(path)
    grown = with_vocabulary(path, model)
    adapted = {match["layer"].rpartition(".")[2] for key in stored if (match := _PART.fullmatch(key))}
    tied = model.tied_embeddings
    config = lora_config(path / CONFIG, values, adapted=adapted, whole=_whole_in(stored), tied_embeddings=tied)
    _refuse_untied(path, values, stored, model)
    base = values.get("base_model_name_or_path")
    tensors = {}
    layers = {hf_name(key): key.removesuffix(".weight") for key in expected_shapes(grown) if key.endswith(".weight")}
    by_name = {ours: tensor for key, tensor in stored.items() if (ours := _our_name(path, key, layers, name))}
    for wanted, shape in adapter_shapes(config, grown, name=name).items():
        _check_tensor(path, wanted, shape, by_name, name)
        tensors[wanted] = _in_meta_order(wanted, by_name.pop(wanted), grown)
    if by_name and not (model.tied_embeddings and {*by_name} == {"output.weight"}):
        spelled = _their_name(next(iter(by_name)), name)
        raise CheckpointError(
            f"{path / WEIGHTS}: tensor {spelled!r} belongs to nothing that {CONFIG} names; fetch both anew"
        )
    return Adapter(config, base if isinstance(base, str) else "", tensors, path, grown.vocab_size)


def adapter_shapes(config: LoraConfig, model: ModelConfig, *, name: str = "default") -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of an adapter over a model of this shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for where, shape in expected_shapes(model).items():
        layer, _, kind = where.rpartition(".")
        leaf = layer.rpartition(".")[2]
        if leaf in config.trained_modules:
            shapes[where] = shape
        if leaf in config.target_modules and kind == "weight":
            shapes[f"{layer}.lora_a.{name}"] = (config.r, shape[1])
            shapes[f"{layer}.lora_b.{name}"] = (shape[0], config.r)
            if config.dora:
                shapes[f"{layer}.magnitude.{name}"] = shape[:1]
    return shapes


def put_on(model: Any, adapter: Adapter, *, name: str = "default") -> Any:
    """Put an adapter, opened under this name, upon a loaded Transformer, in place, and return it.

    Its numbers take the type and the device of the model, and its vocabulary the adapter's size.
    """
    import torch
    from torch import nn

    from llama2.checkpoint.tensors import cast
    from llama2.model.lora import adapter_state, add_adapter

    like = model.tok_embeddings.weight
    for module in adapter.config.trained_modules:
        weight = cast(module, adapter.tensors[f"{module}.weight"](), like.dtype).contiguous().to(like.device)
        model.get_submodule(module).weight = nn.Parameter(weight)
    _resize(model, adapter.vocab_size)
    add_adapter(model, adapter.config, name=name, seed=None)
    with torch.no_grad():
        for where, parameter in adapter_state(model, name).items():
            if not where.endswith(".weight"):
                parameter.copy_(cast(where, adapter.tensors[where](), parameter.dtype))
    return model


def _resize(model: Any, vocab_size: int) -> None:
    model.config = replace(model.config, vocab_size=vocab_size)
    model.tok_embeddings.num_embeddings = vocab_size
    if model.output is not None:
        model.output.out_features = vocab_size


def write_adapter(
    folder: str | Path,
    tensors: Mapping[str, LazyTensor],
    config: LoraConfig,
    *,
    base: str,
    model: ModelConfig,
    dtype: str = "float32",
    name: str = "default",
    tokenizer: Any = None,
) -> None:
    """Write an adapter's folder, whole or not at all; PEFT reads it.

    tensors: name in the model -> function that returns it, as in `adapter_state`. base: path or hub name of the model
    it is for. model: the shape of the model with the adapter. name: what the adapter is called in the names.
    """
    check(config, tied_embeddings=model.tied_embeddings)
    shapes = adapter_shapes(config, model, name=name)
    if set(shapes) != set(tensors):
        odd = sorted(set(shapes) ^ set(tensors))[0]
        raise CheckpointError(f"tensor {odd!r} is {'missing' if odd in shapes else 'not one of this adapter'}")
    entries = []
    for where in sorted(shapes, key=lambda where: _their_name(where, name)):
        read = _in_hf_order(where, tensors[where], shapes[where], model, dtype)
        entries.append((_their_name(where, name), shapes[where], read))
    if model.tied_embeddings and config.trained_modules:  # PEFT wants both names of the one matrix
        entries.append((_whole_key("output"), *entries[[each[0] for each in entries].index(_whole_key(WHOLE[0]))][1:]))
    with staged_folder(Path(folder)) as staged:
        write_json(staged / CONFIG, peft_json(config, base, tied_embeddings=model.tied_embeddings))
        if tokenizer is not None:
            from llama2.tokenizer.formats import save_tokenizer

            save_tokenizer(tokenizer, staged, format="json")
        write_safetensors(staged / WEIGHTS, entries, dtype=dtype)


def _stored(path: Path) -> dict[str, Stored]:
    if (path / WEIGHTS).is_file():
        return read_safetensors(path / WEIGHTS)
    if (path / PICKLE).is_file():
        raise CheckpointError(
            f"{path / PICKLE} is a pickle, which could run code, and is not read; convert it: load it with PEFT "
            f"(PeftModel.from_pretrained) and save_pretrained anew, which writes {WEIGHTS}"
        )
    raise CheckpointError(f"{path}: has a {CONFIG} but no {WEIGHTS}; fetch the adapter again")


def _refuse_untied(path: Path, values: Mapping[str, Any], stored: Mapping[str, Stored], model: ModelConfig) -> None:
    """A tied model of which PEFT trained one end alone, or both apart, is no longer tied."""
    whole = _whole_in(stored)
    if not model.tied_embeddings or not whole or flag(path / CONFIG, values, "ensure_weight_tying"):
        return
    both = [stored[_whole_key(name)] for name in whole]
    if len(both) < 2 or both[0].shape != both[1].shape or not both[0].read().equal(both[1].read()):
        raise CheckpointError(
            f"{path}: {', '.join(HF_NAMES[name] for name in whole)} was trained apart from the matrix that it is tied "
            "to (ensure_weight_tying is not set), which a tied model cannot hold; untie the base, or train it anew"
        )


def _whole_key(name: str) -> str:
    return _PREFIX + hf_name(f"{name}.weight")


def _whole_in(stored: Mapping[str, Stored]) -> list[str]:
    return [name for name in WHOLE if _whole_key(name) in stored]


def _our_name(path: Path, key: str, layers: Mapping[str, str], name: str) -> str | None:
    """Return a tensor's name here, given PEFT's; None for a copy of a weight of the base."""
    if key.endswith(".base_layer.weight"):
        return None
    match = _PART.fullmatch(key)
    theirs = f"{match['layer']}.weight" if match else key
    layer = layers.get(theirs.removeprefix(_PREFIX), "output" if key == _whole_key("output") else None)
    if layer is None or not key.startswith(_PREFIX):
        n_layers = sum(each.endswith(".wq") for each in layers.values())
        raise CheckpointError(
            f"{path / WEIGHTS}: tensor {key!r} has no place in this base, a Llama of {n_layers} layers: "
            f"adapter of another base{did_you_mean(theirs, [_PREFIX + each for each in layers])}"
        )
    return f"{layer}.{_KINDS[match['kind']]}.{name}" if match else f"{layer}.weight"


def _their_name(where: str, name: str) -> str:
    """Return PEFT's name of a tensor, given ours."""
    layer, _, kind = where.removesuffix(f".{name}").rpartition(".")
    theirs = _PREFIX + hf_name(f"{layer}.weight").removesuffix(".weight")
    return {
        "lora_a": f"{theirs}.lora_A.weight",
        "lora_b": f"{theirs}.lora_B.weight",
        "magnitude": f"{theirs}.lora_magnitude_vector",
    }.get(kind, f"{theirs}.weight")


def _check_tensor(path: Path, where: str, shape: tuple[int, ...], found: Mapping[str, Stored], name: str) -> None:
    spelled = _their_name(where, name)
    if where not in found:
        raise CheckpointError(
            f"{path / WEIGHTS}: tensor {spelled!r} of shape {shape} is missing; adapters of all layers are read"
        )
    if found[where].shape != shape:
        raise CheckpointError(
            f"{path / WEIGHTS}: tensor {spelled!r} has shape {found[where].shape}, this base and r want {shape}: "
            "adapter of another base, or of another r"
        )


def _heads(where: str, config: ModelConfig) -> int:
    """Return the number of heads whose rows change order, 0 where none do."""
    if not (".lora_b." in where or ".magnitude." in where):
        return 0
    return config.n_heads if ".wq." in where else config.n_kv_heads if ".wk." in where else 0


def _in_meta_order(where: str, stored: Stored, config: ModelConfig) -> LazyTensor:
    def read() -> Any:
        from llama2.checkpoint.tensors import halves_to_pairs

        return halves_to_pairs(stored.read(), heads) if heads else stored.read()

    heads = _heads(where, config)
    return read


def _in_hf_order(
    where: str, read: LazyTensor, shape: Iterable[int], config: ModelConfig, dtype: str
) -> Callable[[], Any]:
    def ordered() -> Any:
        import torch

        from llama2.checkpoint.tensors import cast, pairs_to_halves

        tensor = cast(where, read(), getattr(torch, dtype))
        if tuple(tensor.shape) != tuple(shape):
            raise ConfigError(f"tensor {where!r} has shape {tuple(tensor.shape)}, this adapter wants {tuple(shape)}")
        heads = _heads(where, config)
        return pairs_to_halves(tensor, heads) if heads else tensor

    return ordered
