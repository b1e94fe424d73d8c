"""Attention that reads keys and values where they lie in the pool, by C kernels (`kernels/paged.c`), query by query.

Nothing is gathered and no problem is padded to the size of another: the quick way for single new tokens of short
sequences. Long ones, prompts, and the row-invariant way are PyTorch's (`cache.py`), whose products are faster for many
queries at a time; so is everything on a machine without kernels, or in another type.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama2.infer.blocks import BLOCK
from llama2.infer.sequence import Span
from llama2.kernels.build import call, library

KERNELS = {torch.bfloat16: "paged_attention_bfloat16", torch.float32: "paged_attention_float32"}


def has_kernel(pool: Tensor) -> bool:
    """Whether there is a kernel for keys as these."""
    return pool.device.type == "cpu" and pool.dtype in KERNELS and library() is not None


@dataclass(frozen=True)
class PagedQueries:
    """Queries that are computed one by one."""

    tables: Int[Tensor, "S W"]
    """The blocks of each sequence."""
    which: Int[Tensor, " N"]
    """Each query's sequence."""
    rows: Int[Tensor, " N"]
    """Where it stands among the new tokens."""
    firsts: Int[Tensor, " N"]
    ends: Int[Tensor, " N"]
    """It sees the positions from first up to end."""

    @classmethod
    def of(cls, placed: Many[tuple[Span, int]], window: int | None) -> "PagedQueries":
        """All tokens of these spans; with each goes where its first token stands."""
        width = max(len(span.sequence.blocks) for span, _ in placed)
        tables = [span.sequence.blocks + [0] * (width - len(span.sequence.blocks)) for span, _ in placed]
        which = [at for at, (span, _) in enumerate(placed) for _ in span.tokens]
        rows = [row + n for span, row in placed for n in range(len(span.tokens))]
        ends = torch.tensor([span.start + n + 1 for span, _ in placed for n in range(len(span.tokens))])
        firsts = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
        return cls(torch.tensor(tables), torch.tensor(which), torch.tensor(rows), firsts, ends)

    def attend(
        self, q: Float[Tensor, "N H Dh"], keys: Float[Tensor, "P K Dh"], values: Float[Tensor, "P K Dh"], out: Tensor
    ) -> None:
        """Write the attention of these queries to their rows of out, which is shaped as q."""
        n_heads, dim = q.shape[1:]
        where = (self.tables, self.which, self.rows, self.firsts, self.ends)
        sizes = (len(self.rows), self.tables.shape[1], n_heads, keys.shape[1], dim)
        call(KERNELS[q.dtype], q, keys, values, out, *where, *sizes, dim**-0.5)


def slots_of(spans: Many[Span]) -> Int[Tensor, " N"]:
    """Return where the tokens of spans lie in the flattened pool."""
    return torch.tensor(
        [span.sequence.blocks[at // BLOCK] * BLOCK + at % BLOCK for span in spans for at in range(span.start, span.end)]
    )
