"""An endless, exact stream of steps from one set of pairs, or of labelled answers.

    epoch 0   [ 3 0 4 1 2 ]  epoch 1   [ 1 4 2 0 3 ]        each a permutation that follows from seed and lengths
    steps       0 0 1 1 2                2 3 3 4 4          two pairs in each: they run over the ends
    ranks       0 1 0 1 0                1 0 1 0 1

Pairs about one prompt come one after another, so that it is read once for them, and since one step learns from all of
them none is learnt by heart before the others (arXiv:2203.02155 sec. 3.5).

`state` is where the stream stands, as plain numbers for JSON: a loader that is given it goes on with the very next
pair, on any number of ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from llama2.data.preferences.batch import LabelledBatch, PairBatch

WINDOW = 16
"""Steps whose pairs are drawn together and then sorted by length."""

BatchT = TypeVar("BatchT", PairBatch, LabelledBatch)
BatchOut = TypeVar("BatchOut", PairBatch, LabelledBatch, covariant=True)


class Judged(Protocol[BatchOut]):
    """A `sets.PairSet` or a `sets.LabelledSet`."""

    @property
    def what(self) -> str:
        """What it is a set of, for messages."""
        ...

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def n_tokens(self) -> int: ...

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, of its longest side."""
        ...

    @property
    def groups(self) -> np.ndarray:
        """Which prompt each is about, counted from 0."""
        ...

    def tokens_in(self, numbers: Sequence[int]) -> int: ...

    def batch(self, numbers: Sequence[int]) -> BatchOut: ...


class PairLoader(Generic[BatchT]):
    """Yields the micro-batches of one rank, step by step; of a set of labelled answers as well."""

    def __init__(
        self,
        found: Judged[BatchT],
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        n_ranks: int = 1,
        seed: int = 0,
    ):
        """batch_size: pairs per step, of all ranks and micro-batches."""
        assert len(found) and batch_size % (n_ranks * micro_batch_size) == 0
        self.set, self.batch_size, self.micro_batch_size = found, batch_size, micro_batch_size
        self.rank, self.n_ranks, self.seed = rank, n_ranks, seed
        self.n_read = 0
        """Tokens in the last step, of all ranks, without padding."""
        self.state = {"epoch": 0, "taken": 0}

    @property
    def state(self) -> dict[str, int]:
        """Where the stream stands: the epoch, and how many of its pairs were taken."""
        return {"epoch": self._epoch, "taken": self._taken}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._order = self._shuffled()

    @property
    def said(self) -> str:
        """What is read, as people read it."""
        return f"{len(self.set):,} {self.set.what}, {self.set.n_tokens:,} tokens"

    @property
    def identity(self) -> list[list[Any]]:
        """What is read, as a checkpoint remembers it."""
        return [[self.set.tokenizer_sha256, len(self.set), self.set.n_tokens]]

    @property
    def metrics(self) -> dict[str, float]:
        """What there is to say of the last step besides its loss."""
        return {}

    @property
    def is_at_rest(self) -> bool:
        """It always can be gone on from."""
        return True

    def step(self) -> list[BatchT]:
        """Return this rank's micro-batches of the next step."""
        numbers = [self._next() for _ in range(self.batch_size)]
        self.n_read = self.set.tokens_in(numbers)
        share, size = self.batch_size // self.n_ranks, self.micro_batch_size
        mine = numbers[self.rank * share : (self.rank + 1) * share]
        return [self.set.batch(mine[i : i + size]) for i in range(0, share, size)]

    def _next(self) -> int:
        if self._taken == len(self.set):
            self._epoch, self._taken = self._epoch + 1, 0
            self._order = self._shuffled()
        self._taken += 1
        return int(self._order[self._taken - 1])

    def _shuffled(self) -> np.ndarray:
        """Return the order of an epoch: at random, but those of a step are of about one length, to pad little."""
        rng, groups = np.random.default_rng((self.seed, 4, self._epoch)), self.set.groups
        place = rng.permutation(groups.max() + 1)[groups]
        longest = np.zeros(groups.max() + 1, np.int64)
        np.maximum.at(longest, groups, self.set.lengths)
        order = np.argsort(place, kind="stable")
        steps: list[np.ndarray] = []
        for start in range(0, len(order), WINDOW * self.batch_size):
            window = order[start : start + WINDOW * self.batch_size]
            window = window[np.lexsort((place[window], longest[groups[window]]))]
            steps += np.split(window, range(self.batch_size, len(window), self.batch_size))
        # The last step may be short: it stays the last, so that every other one is of one length.
        whole = [step for step in steps if len(step) == self.batch_size]
        rest = [step for step in steps if len(step) < self.batch_size]
        return np.concatenate([*(whole[i] for i in rng.permutation(len(whole))), *rest])


def in_order(found: Judged[BatchT], micro_batch_size: int) -> Iterator[BatchT]:
    """Yield a set's pairs, or answers, each once and in order: for evaluation."""
    for start in range(0, len(found), micro_batch_size):
        yield found.batch(range(start, min(start + micro_batch_size, len(found))))
