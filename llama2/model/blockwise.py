"""Numbers in a few bits, block by block: each block is divided by its largest magnitude and looked up in a table.

    x ~ table[code] * scale        scale = max |x| of the block

NF4 holds weights (arXiv:2305.14314 sec. 3); the dynamic 8-bit tables hold optimizer state and NF4's own scales
(arXiv:2110.02861 sec. 2.1, after arXiv:1511.04561). Codes and tables are those of bitsandbytes.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, with an exact zero."""


@cache
def dynamic_table(signed: bool) -> Tensor:
    """Return 256 sorted numbers in [-1, 1] or [0, 1]: seven powers of ten, each with twice the steps of the last.

    In every decade they are the middles of equal parts of [0.1, 1]; 0 and 1 are added.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += middles + ([-each for each in middles] if signed else [])
    return torch.tensor(sorted(found), dtype=torch.float32)


def blocks(values: Tensor, size: int) -> Float[Tensor, "N S"]:
    """Return all numbers in rows of `size`, the last one filled up with zeros."""
    flat = values.flatten().float()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def nearest(values: Float[Tensor, "*B"], table: Float[Tensor, " K"]) -> UInt8[Tensor, "*B"]:
    """Return for each value which number of a sorted table is nearest."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def quantise(
    values: Tensor, table: Float[Tensor, " K"], size: int, *, signed_scales: bool = False
) -> tuple[UInt8[Tensor, "N S"], Float[Tensor, " N"]]:
    """Return codes and scale of each block; a block of zeros has scale 0.

    With signed_scales the scale has the sign of the number of largest magnitude, which then is exactly 1 in units
    of it: dequantised numbers are quantised to the same codes again, though the table ends before -1.
    """
    rows = blocks(values, size)
    largest = rows.abs()
    scales = rows.gather(1, largest.argmax(dim=1, keepdim=True))[:, 0] if signed_scales else largest.amax(dim=1)
    safe = torch.where(scales == 0, 1.0, scales)
    return nearest(rows / safe[:, None], table), scales


def dequantise(codes: UInt8[Tensor, "N S"], scales: Float[Tensor, " N"], table: Float[Tensor, " K"]) -> Tensor:
    """Return the numbers, in rows as `quantise` made them."""
    return table[codes.int()] * scales[:, None]
