"""Frozen linear layers in 4 bits: the base model of QLoRA (arXiv:2305.14314 sec. 3).

    y = x dequantise(dequantise(c1, c2), codes)^T        codes NF4 in blocks of 64, their scales in 8 bits

0.516 bytes per weight. The weight exists only while its product is computed, in the backward pass once more.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from llama2.errors import ConfigError
from llama2.kernels.build import call, library
from llama2.model.arithmetic import linear
from llama2.model.blockwise import NF4, dequantise, dynamic_table, quantise

BLOCK, SCALE_BLOCK = 64, 256
CHUNK = 2048
"""Blocks that are looked up at a time on a CPU, so that they stay in its cache: 9 ms for 5632 x 2048, whole 32 ms."""


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return for each byte the two numbers it stands for, as one int64."""
    first, second = (torch.tensor(NF4, device=device)[code] for code in (_BYTES // 16, _BYTES % 16))
    return torch.stack([first, second], dim=1).view(torch.int64).flatten()


_BYTES = torch.arange(256)


def decode(codes: UInt8[Tensor, " C"], scales: Float[Tensor, " N"], out: Float[Tensor, "N S"]) -> None:
    """Write the numbers that codes stand for."""
    pairs, step = _pairs(codes.device), CHUNK if codes.device.type == "cpu" else len(scales)
    for at in range(0, len(scales), step):
        some = codes[at * BLOCK // 2 : (at + step) * BLOCK // 2]
        values = pairs.index_select(0, some.int()).view(torch.float32).view(-1, BLOCK)
        torch.mul(values, scales[at : at + step, None], out=out[at : at + step])


@cache
def _table() -> Tensor:
    return torch.tensor(NF4)


class NF4Linear(nn.Module):
    """A linear layer whose weight is kept in NF4 with double quantisation and never trained."""

    codes: Tensor
    scale_codes: Tensor
    scale_scales: Tensor
    scale_mean: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        """dtype: of inputs and outputs, and of the weight while it is used."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        n = in_features * out_features
        if n % 2:
            raise ConfigError(f"a matrix of {out_features} x {in_features} has an odd number of weights; NF4 packs two")
        n_blocks = -(-n // BLOCK)
        for name, shape, kind in (
            ("codes", n // 2, torch.uint8),
            ("scale_codes", n_blocks, torch.uint8),
            ("scale_scales", -(-n_blocks // SCALE_BLOCK), torch.float32),
            ("scale_mean", (), torch.float32),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))

    @torch.no_grad()
    def quantise(self, weight: Float[Tensor, "O I"]) -> None:
        """Take over a weight, rounded to NF4."""
        codes, scales = quantise(weight, torch.tensor(NF4, device=weight.device), BLOCK)
        flat = codes.flatten()[: weight.numel()]
        self.codes.copy_((flat[0::2] << 4) | flat[1::2])
        mean = scales.mean()
        scale_codes, scale_scales = quantise(scales - mean, dynamic_table(True).to(weight.device), SCALE_BLOCK)
        self.scale_codes.copy_(scale_codes.flatten()[: len(scales)])
        self.scale_scales.copy_(scale_scales)
        self.scale_mean.copy_(mean)

    def scales(self) -> Float[Tensor, " N"]:
        """Return the scale of each block of 64 weights."""
        table, n = dynamic_table(True).to(self.codes.device), len(self.scale_codes)
        rows = F.pad(self.scale_codes, (0, -n % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        return dequantise(rows, self.scale_scales, table).flatten()[:n] + self.scale_mean

    def dense(self) -> Float[Tensor, "O I"]:
        """Return the weight as it is used, in `dtype`."""
        missing = len(self.scale_codes) * BLOCK // 2 - len(self.codes)
        codes = F.pad(self.codes, (0, missing)) if missing else self.codes
        weight = torch.empty(len(self.scale_codes), BLOCK, dtype=self.dtype, device=self.codes.device)
        if not self._decode_by_kernel(codes, weight):
            decode(codes, self.scales(), weight)
        n = self.out_features * self.in_features
        return weight.flatten()[:n].view(self.out_features, self.in_features)

    def _decode_by_kernel(self, codes: UInt8[Tensor, " C"], out: Float[Tensor, "N S"]) -> bool:
        """Do what `decode` does in C, bit for bit, if there is a kernel for this machine, type and device."""
        name = {torch.bfloat16: "nf4_to_bfloat16", torch.float32: "nf4_to_float32"}.get(out.dtype)
        if name is None or out.device.type != "cpu" or library() is None:
            return False
        scales = (self.scale_codes, self.scale_scales, dynamic_table(True), self.scale_mean)
        call(name, codes.contiguous(), *scales, _table(), out, len(out))
        return True

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        out: Tensor = _Product.apply(x, self)  # pyright: ignore[reportAssignmentType]
        return out if self.bias is None else out + self.bias


def nf4_like(linear: nn.Module, *, dtype: torch.dtype | None = None) -> NF4Linear:
    """Return an unfilled NF4Linear to stand in the place of a Linear.

    dtype: of inputs and outputs, where it is not that of the Linear's weight, which the bias always keeps: FSDP holds
    float32 and computes in bfloat16.
    """
    assert isinstance(linear, nn.Linear)
    has_bias, like = linear.bias is not None, linear.weight
    made = NF4Linear(linear.in_features, linear.out_features, bias=has_bias, dtype=like.dtype, device=like.device)
    made.dtype = dtype or made.dtype
    return made


class _Product(torch.autograd.Function):
    """x W^T for a weight that is not kept between the forward and the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dense())

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0] @ ctx.layer.dense(), None
