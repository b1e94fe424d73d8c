"""Which document comes next: several sources by weight, each shuffled anew in every pass over it.

The weights are shares of tokens and are kept exactly, to within one document: the next document is of the
source that is furthest behind its share. Nothing here depends on how many processes read.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llama2.data.pack import Piece, cut


class Mixture:
    """An endless stream of pieces. `state` is where it stands; setting it goes on from there."""

    def __init__(self, lengths: Sequence[np.ndarray], weights: Sequence[float], *, length: int, seed: int):
        """lengths: ids of each document, per source; length: positions of a row."""
        assert len(lengths) == len(weights) and all(weight > 0 for weight in weights)
        self.lengths, self.length, self.seed = lengths, length, seed
        self.shares = [weight / sum(weights) for weight in weights]
        self.state: dict[str, Any] = {
            "epochs": [0] * len(lengths),
            "positions": [0] * len(lengths),
            "n_drawn": [0] * len(lengths),
        }
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def draw(self) -> Iterator[Piece]:
        """Yield the pieces of the next document."""
        drawn = self.state["n_drawn"]
        total = sum(drawn)
        source = min(range(len(drawn)), key=lambda i: drawn[i] - self.shares[i] * total - self.shares[i])
        epoch, position = self.state["epochs"][source], self.state["positions"][source]
        order = self._order(source, epoch)
        document = int(order[position])
        last = position + 1 == len(order)
        self.state["positions"][source] = 0 if last else position + 1
        self.state["epochs"][source] = epoch + last
        n = int(self.lengths[source][document])
        drawn[source] += max(0, n - 1)
        first = None
        if n - 1 > self.length:  # another cut in every pass
            first = 1 + int(np.random.default_rng((self.seed, 1, source, epoch, document)).integers(self.length))
        yield from cut(source, document, n, self.length, first=first)

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """Return the source's documents as they come in this pass."""
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, source, epoch))
            self._orders[source] = known = (epoch, rng.permutation(len(self.lengths[source])))
        return known[1]
