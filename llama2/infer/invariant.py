"""Arithmetic whose result for one row does not depend on how many other rows there are.

A matrix product changes its last bits with the number of rows, because libraries choose another kernel
for another shape; over thousands of sampled tokens that is enough to change a text. `ROW_INVARIANT`
computes every row of a linear layer alike whatever its company, bit for bit:

    tiled_linear    the definition: always the same shape, TILE rows at a time; any device, any dtype
    onednn_linear   the fast way in float32 on x86: its kernels add in one order for any number of rows from 2

and SiLU and complex products are composed of operations that treat the last elements of a vector like the others.
That rounds several times where the usual kernel rounds once, so in bfloat16 the numbers differ a little from
those outside this context; within it they are always the same. Attention has its own way (`cache.py`).
"""

import platform

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama2.model.arithmetic import Arithmetic

TILE = 16
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def tiled_linear(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "N O"]:
    """x W^T + b in tiles of exactly TILE rows; the last one is filled up with zeros."""
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % TILE))
    return torch.cat([F.linear(tile, weight, bias) for tile in padded.split(TILE)])[: x.shape[0]]


def onednn_linear(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "N O"]:
    """The same through oneDNN, which has another kernel for a single row: that one is given company."""
    company = x.expand(2, -1) if x.shape[0] == 1 else x
    return torch.ops.mkldnn._linear_pointwise(company, weight, bias, "none", [], "")[: x.shape[0]]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    has_onednn = IS_X86 and x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    rows = (onednn_linear if has_onednn else tiled_linear)(x.view(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], -1)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _turn(pairs: Tensor, turns: Tensor) -> Tensor:
    """Products and sums one by one: fused in a vector's body but not at its end, they differ in the last bit."""
    a, b, c, s = pairs.real, pairs.imag, turns.real, turns.imag
    return torch.complex(a * c - b * s, a * s + b * c)


ROW_INVARIANT = Arithmetic(_linear, _silu, _turn)
