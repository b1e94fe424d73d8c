"""Keys and values of what was read so far, in blocks; and the attention over them.

    pool       [blocks, BLOCK, K, Dh] for each layer; block b holds 16 positions of some sequence
    place      says before a forward pass which tokens come, flattened to one row [1 N], and where they belong
    attend     writes their keys and values, then attends sequence by sequence

Where the blocks of a sequence follow each other in the pool, its keys are a view of the pool; else they are gathered.

With `is_invariant` the numbers of a position depend on nothing but the tokens up to it: neither on the other sequences
nor on how many positions of its own are computed at once. Each query is then a problem of its own, over the keys up to
the end of its tile of 16 positions, those after the query masked; problems of the same size are computed together,
which changes no bit of them (`tests/infer/test_invariant.py`).
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama2.infer.blocks import BLOCK
from llama2.infer.paged import PagedQueries, has_kernel, slots_of
from llama2.infer.sequence import Span
from llama2.model.attention import attend, visible
from llama2.model.config import ModelConfig

GATHER_BYTES = 1 << 20
"""Longer keys than this are attended to one sequence at a time, where they lie; shorter ones in one batch."""
KERNEL_BYTES = 1 << 18
"""Up to so long keys the kernel is quicker than a batch (`paged.py`)."""


@dataclass(frozen=True)
class _Job:
    """Some queries, and the keys that all of them look at."""

    queries: slice | Int[Tensor, " Q"]
    """Which of the N new tokens."""
    keys: slice | Int[Tensor, "R S"]
    """Positions in the flattened pool: of one sequence in one piece, or a row for each sequence."""
    mask: Float[Tensor, "Q T S"] | None
    """None: causal if there are as many keys as queries, else everything is seen."""
    is_single: bool
    """Each query is a problem of its own, T = 1; else they are one problem of T queries."""


class PagedCache:
    """Blocks of keys and values for any number of sequences (`model.attention.Cache`)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        is_invariant: bool,
        n_kv_heads: int | None = None,
    ):
        """n_kv_heads: those that are kept here, where the model is split over processes."""
        self.config, self.is_invariant = config, is_invariant
        self.n_kv_heads = n_kv_heads or config.n_kv_heads
        shape = (0, self.n_kv_heads, config.head_dim)
        self.k = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)
        ]  # [blocks * BLOCK K Dh]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.device = device
        self.jobs: list[_Job] = []
        self.one_by_one: PagedQueries | None = None

    @property
    def bytes_per_block(self) -> int:
        return 2 * self.config.n_layers * BLOCK * self.n_kv_heads * self.config.head_dim * self.k[0].itemsize

    def grow(self, n_blocks: int) -> None:
        """Make room for this many blocks in all, keeping what is there."""
        for store in (self.k, self.v):
            for layer, old in enumerate(store):
                new = old.new_zeros(n_blocks * BLOCK, *old.shape[1:])
                new[: len(old)] = old
                store[layer] = new

    def clear(self) -> None:
        """Overwrite everything with zeros."""
        for store in (*self.k, *self.v):
            store.zero_()

    def copy_block(self, source: int, target: int) -> None:
        for store in (*self.k, *self.v):
            blocks = store.view(-1, BLOCK, *store.shape[1:])
            blocks[target] = blocks[source]

    def place(self, spans: Many[Span]) -> None:
        """The next forward pass brings the tokens of these spans, one after the other in a single row."""
        self.slots = slots_of(spans).to(self.device)
        starts = accumulate((len(span.tokens) for span in spans), initial=0)
        self.jobs, self.one_by_one, others = [], None, list(zip(spans, starts, strict=False))
        if has_kernel(self.k[0]) and not self.is_invariant:
            mine, others = self._for_kernel(others)
            self.one_by_one = PagedQueries.of(mine, self.config.sliding_window) if mine else None
        placed = [(torch.tensor(span.sequence.blocks), span, at) for span, at in others]
        if self.is_invariant:
            self._plan_invariant(placed)
        else:
            self._plan_fast(placed)

    def _for_kernel(self, placed: list[tuple[Span, int]]) -> tuple[list[tuple[Span, int]], list[tuple[Span, int]]]:
        """Return which spans the kernel computes, several of one token and few keys, and the others."""
        longest = KERNEL_BYTES // (self.n_kv_heads * self.config.head_dim * self.k[0].itemsize)
        mine = [len(span.tokens) == 1 and span.end <= longest for span, _ in placed]
        if sum(mine) < 2:  # the keys of one lie in one piece, mostly
            return [], placed
        return (
            [each for each, is_mine in zip(placed, mine, strict=True) if is_mine],
            [each for each, is_mine in zip(placed, mine, strict=True) if not is_mine],
        )

    def _plan_invariant(self, placed: list[tuple[Tensor, Span, int]]) -> None:
        alone: dict[int, list[tuple[Tensor, int, int, int]]] = {}
        for table, span, at in placed:
            position = span.start
            while position < span.end:
                start = position // BLOCK * BLOCK
                last, end = start + BLOCK, min(span.end, start + BLOCK)
                first = 0 if self.config.sliding_window is None else self._first_seen(start)
                if end - position == 1:
                    alone.setdefault(last - first, []).append((table, first, position, at + position - span.start))
                else:
                    queries = slice(at + position - span.start, at + end - span.start)
                    mask = self._mask(torch.arange(position, end)[:, None], torch.arange(first, last)[None])  # [Q 1 S]
                    self.jobs.append(_Job(queries, self._keys(table, first, last), mask, is_single=True))
                position = end
        for length, members in alone.items():
            tables, firsts, positions, rows = zip(*members, strict=True)
            keys = [torch.arange(first, first + length) for first in firsts]
            mask = self._mask(torch.tensor(positions)[:, None], torch.stack(keys))
            if len(members) == 1:
                where = self._keys(tables[0], firsts[0], firsts[0] + length)
                self.jobs.append(_Job(slice(rows[0], rows[0] + 1), where, mask, is_single=True))
                continue
            each = zip(tables, firsts, strict=True)
            slots = torch.stack([_slots(table, first, first + length) for table, first in each])
            self.jobs.append(_Job(torch.tensor(rows).to(self.device), slots.to(self.device), mask, is_single=True))

    def _mask(self, queries: Int[Tensor, "#Q T"], keys: Int[Tensor, "#Q S"]) -> Float[Tensor, "Q T S"]:
        """Return what is added to the scores: 0 where a query may see a key, -inf where not."""
        seen = visible(queries, keys, window=self.config.sliding_window)
        bias = torch.zeros(seen.shape, dtype=self.k[0].dtype).masked_fill_(~seen, float("-inf"))
        return bias.to(self.device)

    def _plan_fast(self, placed: list[tuple[Tensor, Span, int]]) -> None:
        width = self.n_kv_heads * self.config.head_dim * self.k[0].itemsize
        alike: dict[int, list[tuple[Tensor, Span, int]]] = {}
        for each in placed:
            if len(each[1].tokens) == 1 and each[1].end * width <= GATHER_BYTES:
                alike.setdefault(each[1].end.bit_length(), []).append(each)
        together = [some for some in alike.values() if len(some) > 1]
        self.jobs += [self._gathered(some) for some in together]
        done = {at for some in together for *_, at in some}
        placed = [each for each in placed if each[2] not in done]
        for table, span, at in placed:
            n, window = len(span.tokens), self.config.sliding_window
            first = 0 if window is None else self._first_seen(span.start)
            is_fresh, is_one = span.start == 0 and window is None, n == 1
            mask = None
            if not is_fresh and not (is_one and window is None):
                mask = self._mask(torch.arange(span.start, span.end)[None], torch.arange(first, span.end)[None])
            self.jobs.append(_Job(slice(at, at + n), self._keys(table, first, span.end), mask, is_single=is_one))

    def _gathered(self, singles: list[tuple[Tensor, Span, int]]) -> _Job:
        """One problem for each of many sequences of about one length, all as long as the longest."""
        longest = max(span.end for _, span, _ in singles)
        positions = torch.tensor([[span.start] for _, span, _ in singles])
        keys = torch.zeros(len(singles), longest, dtype=torch.long)
        for row, (table, span, _) in enumerate(singles):
            keys[row, : span.end] = _slots(table, 0, span.end)
        queries = torch.tensor([at for *_, at in singles])
        mask = self._mask(positions, torch.arange(longest)[None])
        return _Job(queries.to(self.device), keys.to(self.device), mask, is_single=True)

    def _first_seen(self, position: int) -> int:
        """Return the first position that a query there may see, rounded down to a tile."""
        assert self.config.sliding_window is not None
        return max(0, position - self.config.sliding_window + 1) // BLOCK * BLOCK

    def _keys(self, table: Int[Tensor, " n"], first: int, last: int) -> slice | Tensor:
        """Return where the keys of positions first..last-1 lie."""
        used = table[first // BLOCK : -(-last // BLOCK)]
        if len(used) == 1 or bool((used.diff() == 1).all()):
            start = int(used[0]) * BLOCK + first % BLOCK
            return slice(start, start + last - first)
        return _slots(table, first, last)[None].to(self.device)

    def attend(
        self, layer: int, q: Float[Tensor, "1 N H Dh"], k: Float[Tensor, "1 N K Dh"], v: Float[Tensor, "1 N K Dh"]
    ) -> Float[Tensor, "1 N H Dh"]:
        """Keep k and v, and attend over all that each query may see; rows beyond those placed are nobody's."""
        keys, values, n = self.k[layer], self.v[layer], len(self.slots)
        keys[self.slots], values[self.slots] = k[0, :n], v[0, :n]
        outs = [self._attend(job, q[0, job.queries], keys[job.keys], values[job.keys]) for job in self.jobs]
        if len(outs) == 1 and n == q.shape[1] and self.one_by_one is None:
            return outs[0][None]
        out = torch.zeros_like(q[0])
        for job, each in zip(self.jobs, outs, strict=True):
            out[job.queries] = each
        if self.one_by_one is not None:
            self.one_by_one.attend(q[0].contiguous(), keys, values, out)
        return out[None]

    def _attend(self, job: _Job, q: Float[Tensor, "Q H Dh"], k: Tensor, v: Tensor) -> Float[Tensor, "Q H Dh"]:
        k, v = (each if each.ndim == 4 else each[None] for each in (k, v))  # [R S K Dh], R = 1 or Q
        if not job.is_single:
            return attend(q[None], k, v, job.mask)[0]
        k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
        return attend(q[:, None], k, v, job.mask)[:, 0]


def _slots(table: Int[Tensor, " n"], start: int, end: int) -> Int[Tensor, " T"]:
    """Return where positions start..end-1 of a sequence lie in the flattened pool."""
    positions = torch.arange(start, end)
    return table[positions // BLOCK] * BLOCK + positions % BLOCK
