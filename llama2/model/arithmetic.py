"""Linear layers, SiLU and rotation: the operations whose last bits depend on how many rows are computed at once.

Every layer with weights calls them here, so that for the time of one forward pass an engine can put others
in their place (`infer/invariant.py`). A TorchFunctionMode would do that too, but
looks at every operation of the model: with it a token of stories15M took 9.3 ms, without it 7.6.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Arithmetic:
    """One way to compute them."""

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    silu: Callable[[Tensor], Tensor]
    turn: Callable[[Tensor, Tensor], Tensor]


def fast_linear(
    x: Float[Tensor, "*B I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*B O"]:
    """x W^T + b; a single bfloat16 row on the CPU as a matrix-vector product.

    PyTorch's kernel for that reads weights at 26 GB/s where F.linear reads them at 21, on two cores, and adds
    in float32 as well. In float32 the two are one; in float16 F.linear is the faster.
    """
    if bias is None and x.numel() == x.shape[-1] and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


FAST = Arithmetic(fast_linear, F.silu, torch.mul)
_chosen: ContextVar[Arithmetic] = ContextVar("arithmetic", default=FAST)


@contextmanager
def computing(arithmetic: Arithmetic) -> Iterator[None]:
    """Within this context, and this thread, these are computed this way."""
    token = _chosen.set(arithmetic)
    try:
        yield
    finally:
        _chosen.reset(token)


def linear(
    x: Float[Tensor, "*B I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*B O"]:
    """x W^T + b."""
    # torch.compile cannot look into a ContextVar, and needs no other arithmetic.
    return F.linear(x, weight, bias) if torch.compiler.is_compiling() else _chosen.get().linear(x, weight, bias)


def silu(x: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
    """x / (1 + e^-x)."""
    return F.silu(x) if torch.compiler.is_compiling() else _chosen.get().silu(x)


def turn(pairs: Complex[Tensor, "B T N P"], turns: Complex[Tensor, "#B T 1 P"]) -> Complex[Tensor, "B T N P"]:
    """The product of complex numbers."""
    return pairs * turns if torch.compiler.is_compiling() else _chosen.get().turn(pairs, turns)


class Linear(nn.Linear):
    """torch.nn.Linear through `linear`."""

    def forward(self, input: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return linear(input, self.weight, self.bias)
