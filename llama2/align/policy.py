"""The model that is aligned: frozen weights, an adapter that learns to answer, and what else stands upon them.

    base weights  ------------------------------ the reference
    base weights + adapter "policy" ------------ what answers
    base weights + adapter "value" + a head ---- what an answer is worth so far (PPO)

So one set of base weights serves all three. With method=full all weights are trained, as in the paper: then the
reference is a second model, and the value's head stands upon the policy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llama2.align.online_config import OnlineConfig
from llama2.checkpoint.adapter import write_adapter
from llama2.checkpoint.resume import SavedState
from llama2.data.batch import Batch
from llama2.model.config import ModelConfig
from llama2.model.heads import add_heads, read_head
from llama2.model.lora import active_adapters, adapter_names, add_adapter, fresh_adapter, set_active
from llama2.model.lora_config import LoraConfig
from llama2.model.losses import hidden_states
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.adapt import base_name, first_weights as base_weights
from llama2.train.folder import export_model
from llama2.train.place import place_model

POLICY, VALUE = "policy", "value"


def make_learnable(lora: LoraConfig | None, names: Sequence[str], model: Transformer) -> None:
    """Put adapters upon an empty model, which alone are trained, the first one active; without lora all of it is.

    VALUE has a head, too.
    """
    if VALUE in names:
        add_heads(model, VALUE)
    if lora is None:
        return
    for name in names:
        add_adapter(model, lora, name=name, seed=None)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name or ".magnitude." in name or name.startswith("heads."))
    set_active(model, names[0])


def first_weights(
    config: OnlineConfig, base: Path, names: Sequence[str], model: Transformer
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's weights, those of fresh adapters, and zeros for a head."""
    yield from base_weights(config, base, None, model)
    for number, name in enumerate(names if config.is_adapter else ()):
        yield from fresh_adapter(model, seed=config.seed + number, name=name)
    if VALUE in names:
        yield f"heads.{VALUE}.weight", torch.zeros(1, model.config.dim)


def reference_of(config: OnlineConfig, shape: ModelConfig, world: World, base: Path, model: Transformer) -> Transformer:
    """Return what the policy is kept near to: the model without its adapters, or where there are none a second one."""
    if config.is_adapter:
        return model
    frozen = place_model(config, shape, world, partial(base_weights, config, base, None))
    return frozen.requires_grad_(False).eval()


def values_of(model: Transformer, rows: Batch, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
    """Return what the value model thinks of each position; hidden: the policy's, upon which its head may stand."""
    if not adapter_names(model):
        return read_head(model, VALUE, hidden)
    with speaking_as(model, VALUE):
        return read_head(model, VALUE, hidden_states(model, rows))


@contextmanager
def speaking_as(model: Transformer, *names: str) -> Iterator[None]:
    """Within this only these adapters take part; none: the reference. A model without any always speaks as itself."""
    if not adapter_names(model):
        yield
        return
    before = active_adapters(model)
    set_active(model, names)
    try:
        yield
    finally:
        set_active(model, before)


def export_policy(
    saved: SavedState,
    kind: str,
    to: Path,
    *,
    config: OnlineConfig,
    lora: LoraConfig | None,
    shape: ModelConfig,
    tokenizer: Tokenizer,
) -> None:
    """Write the policy: a whole model, or its adapter as PEFT does, in float32."""
    if lora is None:
        export_model(saved, kind, to, config=shape, tokenizer=tokenizer, dtype=config.dtype)
        return
    ours = [name.removeprefix("weights/") for name in saved.shapes if name.startswith("weights/")]
    tensors = {
        f"{name.removesuffix(POLICY)}default": partial(saved.read, f"{kind}/{name}")
        for name in ours
        if name.endswith(f".{POLICY}")
    }
    write_adapter(to, tensors, lora, base=base_name(config), model=shape, tokenizer=tokenizer)
