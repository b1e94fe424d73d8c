"""Documents into rows of T positions: long ones are cut in pieces, short ones share a row, best fit.

A piece of n + 1 ids fills n positions, and the next piece of the same document begins with the id that the
last one ended with: every id of a document but the first is predicted exactly once.

    document  a b c d e f g h      T = 3      pieces  a b c d | d e f g | g h
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Part of a document: `n` positions from id `start` on (n + 1 ids)."""

    source: int
    document: int
    start: int
    n: int


def cut(source: int, document: int, n_ids: int, length: int, *, first: int | None = None) -> Iterator[Piece]:
    """Yield a document of n_ids ids in pieces of `length` positions; the first may be made shorter.

    Another `first` each time lets a long document be cut in other places each time it is read.
    """
    start, end = 0, n_ids - 1
    size = min(length, first or length)
    while start < end:
        n = min(size, end - start)
        yield Piece(source, document, start, n)
        start, size = start + n, length


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices into `sizes`: the largest first, each into the fullest row that still takes it.

    Best-fit decreasing needs at most 11/9 of the fewest rows possible (Johnson et al. 1974). Every size must be
    between 1 and capacity.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (left, row), sorted
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        assert 0 < sizes[i] <= capacity
        found = bisect_left(room, (sizes[i], -1))
        if found < len(room):
            left, row = room.pop(found)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > sizes[i]:
            insort(room, (left - sizes[i], row))
    return rows
