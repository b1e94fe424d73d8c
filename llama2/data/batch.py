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
class Shared:
    """The same tokens with what several rows have in common laid out once: answers to one prompt, side by side.

    tokens      p p p p  a a a  b b      p: the prompt up to its last token; a, b: that token, and an answer
    branches    0 0 0 0  1 1 1  2 2      a token sees those before it of branch 0 and of its own
    positions   0 1 2 3  4 5 6  4 5
    """

    tokens: Int[Tensor, "G L"]
    positions: Int[Tensor, "G L"]
    branches: Int[Tensor, "G L"]
    where: Int[Tensor, "B T"]
    """Where each token of the rows lies among these, counted through all of them; 0 for padding."""

    def to(self, device: torch.device | str) -> "Shared":
        all_four = (self.tokens, self.positions, self.branches, self.where)
        return Shared(*(each.to(device, non_blocking=True) for each in all_four))


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
    shared: Shared | None = None
    """The same rows, to be read with less work (`model.losses.hidden_states`)."""

    @property
    def n_targets(self) -> int:
        """Tokens that are trained."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        documents = None if self.documents is None else move(self.documents)
        shared = None if self.shared is None else self.shared.to(device)
        return Batch(move(self.tokens), move(self.targets), move(self.positions), documents, shared)


def share(rows: Sequence[Sequence[int]], n_common: Sequence[int], shape: tuple[int, int]) -> Shared | None:
    """Lay rows that begin alike out together; None if that saves nothing.

    n_common: up to where each row may be like others. Shared rows are up to SHARED_TOKENS long, or as long as one row;
    their lengths are multiples of 32, so that few shapes occur. shape: of the rows, [B T].
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (row, n) in enumerate(zip(rows, n_common, strict=True)):
        groups.setdefault(tuple(row[:n]), []).append(number)
    laid: list[tuple[tuple[int, ...], list[int]]] = []
    for common, members in groups.items():
        room = 0
        for number in members:
            n = len(rows[number]) - len(common)
            if n > room:
                laid.append((common, []))
                room = max(SHARED_TOKENS - len(common), n)
            laid[-1][1].append(number)
            room -= n
    lengths = [len(common) + sum(len(rows[i]) - len(common) for i in members) for common, members in laid]
    length = -(-max(lengths) // 32) * 32
    if len(laid) * length > 0.8 * shape[0] * shape[1]:
        return None
    tokens, positions, branches = (np.zeros((len(laid), length), np.int64) for _ in range(3))
    where = np.zeros(shape, np.int64)
    for g, (common, members) in enumerate(laid):
        at = len(common)
        tokens[g, :at], positions[g, :at], branches[g, at:] = common, np.arange(at), len(members) + 1
        for branch, number in enumerate(members, 1):
            own = rows[number][len(common) :]
            end = at + len(own)
            tokens[g, at:end], branches[g, at:end] = own, branch
            positions[g, at:end] = np.arange(len(common), len(rows[number]))
            where[number, : len(common)] = g * length + np.arange(len(common))
            where[number, len(common) : len(rows[number])] = g * length + np.arange(at, end)
            at = end
    return Shared(*(torch.from_numpy(each) for each in (tokens, positions, branches, where)))


SHARED_TOKENS = 512


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
