"""Arithmetic whose result for one row does not depend on how many other rows there are.

A matrix product changes its last bits with the number of rows, because libraries choose another kernel
for another shape; over thousands of sampled tokens that is enough to change a text. Under `RowInvariant`
every row of a linear layer is computed alike whatever its company, bit for bit:

    tiled_linear    the definition: always the same shape, TILE rows at a time; any device, any dtype
    onednn_linear   the fast way in float32 on x86: its kernels add in one order for any number of rows from 2

and SiLU is composed of operations that treat the last elements of a vector like the others. That rounds
several times where the usual kernel rounds once, so in bfloat16 the numbers differ a little from those
outside this context; within it they are always the same.
"""

import platform
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


def _linear_for(x: Tensor) -> Callable[..., Tensor]:
    has_onednn = IS_X86 and torch.backends.mkldnn.is_available()
    return onednn_linear if has_onednn and x.device.type == "cpu" and x.dtype == torch.float32 else tiled_linear


class RowInvariant(TorchFunctionMode):
    """Within this context linear layers and SiLU give each row the same bits in any company."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.linear:
            x, *rest = args
            return _linear_for(x)(x.flatten(0, -2), *rest, **kwargs).unflatten(0, x.shape[:-1])
        if func is torch.mv:  # a linear layer of one row (model.transformer.linear)
            weight, row = args
            return _linear_for(row)(row[None], weight)[0]
        if func is F.silu:
            return args[0] / (1 + torch.exp(-args[0]))
        return func(*args, **kwargs)
