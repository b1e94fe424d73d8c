"""An endless, exact stream of training steps from shard sets.

The rows of every step follow from the seed alone; ranks and micro-batches only share them out:

    step's rows   [ rank 0: micro 0 | micro 1 ][ rank 1: micro 0 | micro 1 ]

`state` is where the stream stands after the last step taken, as plain numbers for JSON: it lives in the
checkpoint, and a loader that is given it goes on with the very next row, on any number of ranks.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from llama2.data.batch import Batch, Span, collate
from llama2.data.documents import Documents
from llama2.data.mix import Mixture
from llama2.data.pack import Piece, best_fit, cut
from llama2.errors import DataError

Row = list[Piece]


class Loader:
    """Yields the micro-batches of one rank, step by step."""

    def __init__(
        self,
        sets: Sequence[Documents],
        *,
        weights: Sequence[float] | None = None,
        sequence_length: int,
        rows_per_step: int,
        micro_batch_size: int,
        rank: int = 0,
        n_ranks: int = 1,
        packing: bool = True,
        packing_buffer_rows: int = 512,
        seed: int = 0,
    ):
        """rows_per_step: of all ranks and micro-batches. packing_buffer_rows: how many rows are packed at a time.

        Without packing every piece has a row of its own.
        """
        assert rows_per_step % (n_ranks * micro_batch_size) == 0
        for each in sets:
            if not (each.lengths > 1).any():
                raise DataError(f"{each.name} holds no document of two tokens: nothing predicts anything")
        self.sets, self.length = sets, sequence_length
        self.rows_per_step, self.micro_batch_size = rows_per_step, micro_batch_size
        self.rank, self.n_ranks = rank, n_ranks
        self.packing, self.window, self.seed = packing, packing_buffer_rows, seed
        self.fullness = 1.0
        """Share of the positions of the rows that hold tokens, in the window that is being read."""
        self.n_read = 0
        """Tokens in the last step, of all ranks."""
        by_tokens = [float(each.n_tokens) for each in sets]
        lengths = [each.lengths for each in sets]
        self._mixture = Mixture(lengths, weights or by_tokens, length=sequence_length, seed=seed)
        self._rows: list[Row] = []
        self._window_state: dict[str, Any] = deepcopy(self._mixture.state)
        self._n_windows, self._n_taken = 0, 0

    @property
    def said(self) -> str:
        """What is read, as people read it."""
        return f"{sum(each.n_tokens for each in self.sets):,} tokens of data"

    @property
    def identity(self) -> list[list[Any]]:
        """What is read, as a checkpoint remembers it."""
        return [[each.tokenizer_sha256, len(each), each.n_tokens] for each in self.sets]

    @property
    def metrics(self) -> dict[str, float]:
        """What there is to say of the last step besides its loss."""
        return {}

    @property
    def is_at_rest(self) -> bool:
        """It always can be gone on from."""
        return True

    @property
    def state(self) -> dict[str, Any]:
        """Where the stream stands: the window being read, and how many of its rows were taken."""
        return {"mixture": deepcopy(self._window_state), "n_windows": self._n_windows, "n_taken": self._n_taken}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._mixture.state = deepcopy(state["mixture"])
        self._n_windows = state["n_windows"] - 1
        self._rows = []
        if state["n_windows"]:
            self._fill()
        else:
            self._n_windows, self._window_state = 0, deepcopy(self._mixture.state)
        self._n_taken = state["n_taken"]

    def step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step."""
        rows = [self._next_row() for _ in range(self.rows_per_step)]
        self.n_read = sum(piece.n for row in rows for piece in row)
        share = self.rows_per_step // self.n_ranks
        mine = rows[self.rank * share : (self.rank + 1) * share]
        size = self.micro_batch_size
        return [self._batch(mine[i : i + size]) for i in range(0, share, size)]

    def _next_row(self) -> Row:
        if self._n_taken == len(self._rows):
            self._fill()
        self._n_taken += 1
        return self._rows[self._n_taken - 1]

    def _fill(self) -> None:
        """Pack the next window of pieces into rows and shuffle them."""
        self._window_state = deepcopy(self._mixture.state)
        pieces: list[Piece] = []
        n_positions = 0
        while n_positions < self.window * self.length:
            drawn = list(self._mixture.draw())
            pieces += drawn
            n_positions += sum(piece.n for piece in drawn) if self.packing else self.length * len(drawn)
        if self.packing:
            rows = [[pieces[i] for i in row] for row in best_fit([piece.n for piece in pieces], self.length)]
        else:
            rows = [[piece] for piece in pieces]
        order = np.random.default_rng((self.seed, 2, self._n_windows)).permutation(len(rows))
        self._rows = [rows[i] for i in order]
        self._n_windows, self._n_taken = self._n_windows + 1, 0
        self.fullness = sum(piece.n for piece in pieces) / (len(rows) * self.length)

    def _batch(self, rows: Sequence[Row]) -> Batch:
        return collate([[span(self.sets[piece.source], piece) for piece in row] for row in rows], self.length)


def span(documents: Documents, piece: Piece) -> Span:
    """Return the ids of a piece, and which of them are trained."""
    part, trained = slice(piece.start, piece.start + piece.n + 1), documents.trained(piece.document)
    return Span(documents.document(piece.document)[part], None if trained is None else trained[part])


def in_order(
    documents: Documents, numbers: Sequence[int], *, sequence_length: int, micro_batch_size: int
) -> Iterator[Batch]:
    """Yield these documents, each once and in this order, packed as they come: for evaluation."""
    rows: list[list[Span]] = []
    room = 0
    for number in numbers:
        for piece in cut(0, number, int(documents.lengths[number]), sequence_length):
            if piece.n > room:
                if len(rows) == micro_batch_size:
                    yield collate(rows, sequence_length)
                    rows = []
                rows.append([])
                room = sequence_length
            rows[-1].append(span(documents, piece))
            room -= piece.n
    if rows:
        yield collate(rows, sequence_length)
