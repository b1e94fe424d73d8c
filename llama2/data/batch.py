"""What a training step eats: rows of tokens, with what each token should predict and whom it may see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llama2.model.losses import IGNORE


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. Targets are already shifted: targets[b, t] is what should follow tokens[b, t]."""

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    """Where each token stands in its own document."""
    documents: Int[Tensor, "B T"] | None
    """Which document of the row each token is of; tokens of different documents do not see each other.

    None where no row holds more than one: then it is enough that no token sees a later one.
    """

    @property
    def n_targets(self) -> int:
        """Tokens that are trained."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        documents = None if self.documents is None else move(self.documents)
        return Batch(move(self.tokens), move(self.targets), move(self.positions), documents)


class Span(NamedTuple):
    """A piece of a document: n + 1 ids, and which of them are trained (None: all)."""

    ids: np.ndarray
    trained: np.ndarray | None = None


def collate(rows: Sequence[Sequence[Span]], length: int) -> Batch:
    """Lay pieces of documents out in rows of `length`; what is left of a row is padding that trains nothing.

    A piece of n + 1 ids gives n positions: each of the first n ids predicts the next. Padding is token 0 in a
    document of its own.
    """
    shape = (len(rows), length)
    tokens, positions, documents = (np.zeros(shape, np.int64) for _ in range(3))
    targets = np.full(shape, IGNORE, np.int64)
    for r, pieces in enumerate(rows):
        at = 0
        for document, (ids, trained) in enumerate(pieces):
            end = at + len(ids) - 1
            tokens[r, at:end], targets[r, at:end] = ids[:-1], ids[1:]
            if trained is not None:
                targets[r, at:end][~trained[1:]] = IGNORE
            positions[r, at:end], documents[r, at:end] = np.arange(end - at), document
            at = end
        positions[r, at:], documents[r, at:] = np.arange(length - at), len(pieces)
    alone = all(len(pieces) < 2 for pieces in rows)
    kept = (torch.from_numpy(each) for each in (tokens, targets, positions))
    return Batch(*kept, documents=None if alone else torch.from_numpy(documents))
