"""What a step of learning from judgements eats: rows that hold every token, the last one too, and the judgements.

    tokens    <s>  [INST]  Hi  [/INST]  Hello!  </s>  pad     every token is an input, so that a reward
    targets    .     .     .   Hello!   </s>     .     .      can be read at the last one
    ends                                         ^

Knows nothing of sets or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama2.data.batch import Batch, Span, collate, share
from llama2.data.examples import Examples

MULTIPLE = 32
"""Rows are this many tokens long, or twice, three times as many, so that few shapes occur."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs as R rows of T tokens. An answer that stands in several pairs about its prompt is one row."""

    rows: Batch
    ends: Int[Tensor, " R"]
    """Where the last token of each row stands."""
    sides: Int[Tensor, " S"]
    """Which row is each of the S = 2B sides: the chosen ones, then the rejected ones in the same order."""
    ratings: Int[Tensor, " B"]
    """3 significantly better ... 0 negligibly, -1 unknown."""
    margins: Float[Tensor, " B"]
    flags: Int[Tensor, "B 3"]
    """As FLAGS has them: 1 true, 0 false, -1 unknown."""
    numbers: Int[Tensor, " B"]
    """Which pair of its set each is."""

    @property
    def n_pairs(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device | str) -> "PairBatch":
        rest = (self.ends, self.sides, self.ratings, self.margins, self.flags, self.numbers)
        return PairBatch(self.rows.to(device), *(each.to(device, non_blocking=True) for each in rest))


@dataclass(frozen=True)
class LabelledBatch:
    """B single answers as rows of T tokens, each good or bad."""

    rows: Batch
    ends: Int[Tensor, " B"]
    is_good: Bool[Tensor, " B"]
    numbers: Int[Tensor, " B"]

    @property
    def n_answers(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device | str) -> "LabelledBatch":
        rest = (self.ends, self.is_good, self.numbers)
        return LabelledBatch(self.rows.to(device), *(each.to(device, non_blocking=True) for each in rest))


def lay_out(examples: Examples, numbers: Sequence[int] | np.ndarray) -> tuple[Batch, Int[Tensor, " B"]]:
    """Return examples as rows, each whole and alone, and where the last token of each stands.

    What comes before the first trained token may be alike in several rows, and is then read once (`Batch.shared`).
    Padding is token 0 at position 0: so a row turns as it would alone, with a rotation that goes by its length too.
    """
    ends = torch.from_numpy(examples.lengths[numbers] - 1)
    length = -(-(int(ends.max()) + 1) // MULTIPLE) * MULTIPLE
    # with one id more than it has, the last token becomes an input, which nothing follows
    spans = [Span(np.append(examples.document(i), 0), np.append(examples.trained(i), False)) for i in numbers]
    rows = collate([[span] for span in spans], length)
    is_padding = torch.arange(length) > ends[:, None]
    # the last token before those that are trained predicts the first of them, in each row another: it is not shared
    n_common = [max(0, int(np.argmax(np.append(examples.trained(i), True))) - 1) for i in numbers]
    together = share([examples.document(i).tolist() for i in numbers], n_common, (len(ends), length))
    return replace(rows, positions=rows.positions.masked_fill(is_padding, 0), shared=together), ends
