"""AdamW whose two averages take one byte per weight (arXiv:2110.02861): 2 bytes of state in place of 8."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama2.model.blockwise import dequantise, dynamic_table, quantise

BLOCK = 256
SMALLEST = 4096
"""Weights of fewer numbers keep float32 averages, as in bitsandbytes."""


class AdamW8bit(torch.optim.Optimizer):
    """As torch.optim.AdamW; the mean and the mean square are kept in dynamic 8-bit blocks of 256."""

    def __init__(self, params, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the weights by their gradients."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad.float(), group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = Average(weight, signed=True)
            state["exp_avg_sq"] = Average(weight, signed=False)
        state["step"] += 1
        n = float(state["step"])
        mean = state["exp_avg"].read().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].read().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].write(mean)
        state["exp_avg_sq"].write(square)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        root = square.sqrt_().div_((1 - beta2**n) ** 0.5).add_(group["eps"])
        weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**n))


class Average:
    """One running average, in 8 bits if it is long enough to matter.

    A mean square is never rounded to 0, as it would be below 1.6e-7 of its block's largest while the mean beside it is
    not: the step would be a mean over next to nothing. Steps there are too short in place of several times too long.
    """

    def __init__(self, like: Tensor, *, signed: bool):
        self.shape, self.signed = like.shape, signed
        self.is_small = like.numel() < SMALLEST
        self.write(torch.zeros_like(like, dtype=torch.float32))

    def read(self) -> Tensor:
        """Return the numbers, in float32."""
        if self.is_small:
            return self.values.clone()
        flat = dequantise(self.codes, self.scales, self._table()).flatten()
        return flat[: self.shape.numel()].view(self.shape)

    def write(self, values: Tensor) -> None:
        """Keep these numbers, rounded; what was read and not changed is written as it was."""
        if self.is_small:
            self.values = values.clone()
        else:
            self.codes, self.scales = quantise(values, self._table(values.device), BLOCK, signed_scales=True)

    def _table(self, device: torch.device | None = None) -> Tensor:
        table = dynamic_table(self.signed)
        return (table if self.signed else table[1:]).to(device or self.codes.device)
