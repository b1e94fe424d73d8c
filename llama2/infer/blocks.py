"""Who holds which block of keys and values: reference counts, and blocks found again by what was read into them.

A block holds BLOCK positions of one sequence, in every layer. Sequences that begin alike share blocks; a block that
nobody holds keeps its content, and can be found by the hash of all tokens up to its end, until its place is needed
(PagedAttention, arXiv:2309.06180). This file counts; the numbers themselves are in `cache.py`.
"""

import hashlib
from array import array
from collections.abc import Sequence

BLOCK = 16
"""Positions in a block, as in vLLM."""


def block_hash(before: bytes, tokens: Sequence[int], adapter: str | None = None) -> bytes:
    """Return the name of a block: its tokens after all those before it, read through an adapter."""
    if not before:
        before = (adapter or "").encode()
    return hashlib.blake2b(before + b"|" + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out block numbers 0..n_blocks-1."""

    def __init__(self, n_blocks: int = 0):
        self.refs: list[int] = []
        self.cached: dict[int, bytes] = {}
        """Blocks that can be found again, held or not, and their hashes."""
        self._by_hash: dict[bytes, int] = {}
        self._empty: set[int] = set()
        """Held by nobody, with nothing worth finding."""
        self._idle: dict[int, None] = {}
        """Held by nobody, but can be found; the longest unused first."""
        self.grow(n_blocks)

    @property
    def n_blocks(self) -> int:
        return len(self.refs)

    @property
    def n_empty(self) -> int:
        return len(self._empty)

    @property
    def n_free(self) -> int:
        """Blocks that can be handed out, those that could still be found included."""
        return len(self._empty) + len(self._idle)

    @property
    def n_held(self) -> int:
        return self.n_blocks - self.n_free

    def grow(self, n_more: int) -> None:
        self._empty.update(range(self.n_blocks, self.n_blocks + n_more))
        self.refs += [0] * n_more

    def take(self, after: int | None = None) -> int:
        """Hand out a block, if possible the one after `after`: then a sequence lies in one piece. One must be free."""
        if after is not None and after + 1 in self._empty:
            block = after + 1
        elif self._empty:
            block = self._middle_of_longest_gap() if after is None else min(self._empty)
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._by_hash[self.cached.pop(block)]
        self._empty.discard(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder."""
        if not self.refs[block]:
            self._idle.pop(block)
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """One holder less."""
        assert self.refs[block] > 0, block
        self.refs[block] -= 1
        if not self.refs[block]:
            if block in self.cached:
                self._idle[block] = None
            else:
                self._empty.add(block)

    def remember(self, block: int, name: bytes) -> None:
        """Let a full block be found by its hash, unless another with the same content is found already."""
        if name not in self._by_hash and block not in self.cached:
            self._by_hash[name] = block
            self.cached[block] = name

    def find(self, name: bytes) -> int | None:
        return self._by_hash.get(name)

    def forget(self) -> None:
        """No block can be found any more: the weights have changed. Held ones stay held."""
        self._empty.update(self._idle)
        self._idle.clear()
        self._by_hash.clear()
        self.cached.clear()

    def _middle_of_longest_gap(self) -> int:
        """Where a new sequence has most room to grow, and the one before the gap has too."""
        best, best_start, start, previous = 0, 0, -1, -2
        for block in sorted(self._empty):
            if block != previous + 1:
                start = block
            if block - start + 1 > best:
                best, best_start = block - start + 1, start
            previous = block
        return best_start if best_start == 0 else best_start + best // 2
