"""The model that is aligned: frozen weights, an adapter that learns to answer, and what else stands upon them.

    base weights  ------------------------------ the reference
    base weights + adapter "policy" ------------ what answers
    base weights + adapter "value" + a head ---- what an answer is worth so far (PPO)

So one set of base weights serves all three.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llama2.align.online_config import OnlineConfig
from llama2.checkpoint.adapter import write_adapter
from llama2.checkpoint.resume import SavedState
from llama2.model.config import ModelConfig
from llama2.model.heads import add_heads
from llama2.model.lora import active_adapters, add_adapter, fresh_adapter, set_active
from llama2.model.lora_config import LoraConfig
from llama2.model.transformer import Transformer
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.adapt import first_weights as base_weights

POLICY, VALUE = "policy", "value"


def with_adapters(lora: LoraConfig, names: Sequence[str], model: Transformer) -> None:
    """Put adapters upon an empty model, all trained, the first one active; and for VALUE a head."""
    for name in names:
        add_adapter(model, lora, name=name, seed=None)
    if VALUE in names:
        add_heads(model, VALUE)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name or ".magnitude." in name or name.startswith("heads."))
    set_active(model, names[0])


def first_weights(
    config: OnlineConfig, base: Path, names: Sequence[str], model: Transformer
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's weights, those of fresh adapters, and zeros for a head."""
    yield from base_weights(config, base, None, model)
    for number, name in enumerate(names):
        yield from fresh_adapter(model, seed=config.seed + number, name=name)
    if VALUE in names:
        yield f"heads.{VALUE}.weight", torch.zeros(1, model.config.dim)


@contextmanager
def speaking_as(model: Transformer, *names: str) -> Iterator[None]:
    """Within this only these adapters take part; none: the reference."""
    before = active_adapters(model)
    set_active(model, names)
    try:
        yield
    finally:
        set_active(model, before)


def export_policy(
    saved: SavedState, kind: str, to: Path, *, lora: LoraConfig, base: str, shape: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Write the policy's adapter as PEFT does, in float32."""
    ours = [name.removeprefix("weights/") for name in saved.shapes if name.startswith("weights/")]
    tensors = {
        f"{name.removesuffix(POLICY)}default": partial(saved.read, f"{kind}/{name}")
        for name in ours
        if name.endswith(f".{POLICY}")
    }
    write_adapter(to, tensors, lora, base=base, model=shape, tokenizer=tokenizer)
