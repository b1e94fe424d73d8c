"""Muon: the update of a matrix is its momentum with all singular values brought to about one.

    M = lerp(M, G, 1 - mu),   O = NewtonSchulz(lerp(G, M, mu)),   W = (1 - lr decay) W - lr 0.2 sqrt(max(m, n)) O

Keller Jordan's method (https://kellerjordan.github.io/posts/muon) with the size of arXiv:2502.16982 eq. 4, as
torch.optim.Muon has it; matrices of one shape are computed together, which for a small model takes a third of the time.
Where processes hold parts of a matrix, each makes the whole update and keeps its part of it.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
N_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For matrices only."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        eps: float = 1e-7,
        split_as: Mapping[Tensor, DTensor] = MappingProxyType({}),
    ):
        """split_as: of each weight that is a part, the split matrix whose part it is."""
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps))
        self.split_as = split_as

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            weights = [each for each in group["params"] if each.grad is not None]
            if not weights:
                continue
            for each in weights:
                if "momentum_buffer" not in self.state[each]:
                    self.state[each]["momentum_buffer"] = torch.zeros_like(each.grad)
            momenta, gradients = [self.state[each]["momentum_buffer"] for each in weights], [w.grad for w in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            parts = torch._foreach_lerp(gradients, momenta, group["momentum"])
            split = [self.split_as.get(each) for each in weights]
            updates = orthogonal(map(whole, parts, split), eps=group["eps"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            sizes = [-group["lr"] * 0.2 * max(each.shape) ** 0.5 for each in updates]
            wide = [each if each.dtype == torch.float64 else each.float() for each in updates]
            torch._foreach_add_(weights, list(map(part, torch._foreach_mul(wide, sizes), split)))


def whole(mine: Tensor, like: DTensor | None) -> Tensor:
    """Return the matrix of which each process has a part, as `like` is split; what is not split is whole."""
    if like is None:
        return mine
    parts = DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return parts.full_tensor()


def part(matrix: Tensor, like: DTensor | None) -> Tensor:
    """Return this process's part of a matrix that all of them know."""
    if like is None:
        return matrix
    return distribute_tensor(matrix, like.device_mesh, like.placements, src_data_rank=None).to_local()


def orthogonal(matrices: Iterable[Float[Tensor, "M N"]], *, eps: float = 1e-7) -> list[Float[Tensor, "M N"]]:
    """Return U V^T, about, of each matrix U S V^T: its singular values are between 0.7 and 1.2.

    In bfloat16, or in float64 where a matrix is of it: what is next to nothing in a gradient is brought to one as well,
    so that in bfloat16 sums in another order, of several processes, can give another update.
    """
    matrices = list(matrices)
    exact = [each if each.dtype == torch.float64 else each.bfloat16() for each in matrices]
    wide = [each if len(each) <= each.shape[1] else each.T for each in exact]
    alike: dict[torch.Size, list[int]] = {}
    for number, each in enumerate(wide):
        alike.setdefault(each.shape, []).append(number)
    found = list(wide)
    for numbers in alike.values():
        for number, each in zip(numbers, _newton_schulz(torch.stack([wide[n] for n in numbers]), eps), strict=True):
            found[number] = each
    return [each if len(matrix) <= matrix.shape[1] else each.T for matrix, each in zip(matrices, found, strict=True)]


def _newton_schulz(x: Float[Tensor, "B M N"], eps: float) -> Float[Tensor, "B M N"]:
    """Iterate x = a x + (b x x^T + c (x x^T)^2) x, which draws singular values in (0, 1] to about one."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(N_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
