"""Scalar heads on the trunk: a number per position, for rewards, their kin, and values.

    Transformer -> hidden [B T D] -> heads.NAME [1 D] -> numbers [B T]

A head is added to a finished model, as adapters are; the model itself never learns of it. A reward model does without
the next-token projection: arXiv:2307.09288 sec. 3.2.2 replaces it by the scalar head.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama2.model.arithmetic import Linear, linear
from llama2.model.config import ModelConfig
from llama2.model.transformer import Transformer


def trunk_only(config: ModelConfig) -> ModelConfig:
    """Return the shape of the same model without a next-token projection of its own."""
    return replace(config, tied_embeddings=True)


def add_heads(model: Transformer, *names: str) -> Transformer:
    """Put heads upon the model, in place, each of the type and on the device of its norm, unfilled; return it."""
    like = model.norm.weight
    heads = {name: Linear(model.config.dim, 1, bias=False, dtype=like.dtype, device=like.device) for name in names}
    model.heads = nn.ModuleDict(heads)
    return model


def head_names(model: Transformer) -> tuple[str, ...]:
    """Return the names of the model's heads."""
    heads = getattr(model, "heads", None)
    return tuple(name for name, _ in heads.named_children()) if isinstance(heads, nn.ModuleDict) else ()


def read_head(model: Transformer, name: str, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
    """Return a head's numbers for hidden states, in float32 (float64 for a float64 model)."""
    heads = model.heads
    assert isinstance(heads, nn.ModuleDict)
    weight = heads[name].weight
    assert isinstance(weight, Tensor)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    return linear(hidden.to(exact), weight.to(exact))[..., 0]


def at_ends(hidden: Float[Tensor, "B T D"], ends: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """Return the hidden state at one position of each row."""
    return hidden[torch.arange(len(hidden), device=hidden.device), ends]
