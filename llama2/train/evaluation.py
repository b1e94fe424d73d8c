"""How well held-out text is predicted: the same number whatever the split over processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from llama2.data.batch import IGNORE, Batch
from llama2.data.documents import Documents
from llama2.data.loader import in_order
from llama2.parallel.mesh import World
from llama2.train.loop import LossFn, Trainer


@dataclass(frozen=True)
class Evaluation:
    """How well held-out text is predicted."""

    loss: float
    """Nats per trained token."""
    bits_per_byte: float
    """The same per UTF-8 byte of text, comparable between tokenizers."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this vocabulary."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    trainer: Trainer,
    loss_fn: LossFn,
    held_out: Documents,
    *,
    n_tokens: int,
    sequence_length: int,
    micro_batch_size: int,
) -> Evaluation:
    """Return how well the first n_tokens of a set are predicted, in whole documents, by what would be published."""
    totals = held_out.lengths.cumsum(dtype="int64")
    n = min(len(held_out), int((totals < n_tokens).sum()) + 1)
    batches = in_order(held_out, range(n), sequence_length=sequence_length, micro_batch_size=micro_batch_size)
    with trainer.as_published():
        loss_sum, count = trainer.evaluate(_shared_out(batches, trainer.world), loss_fn)
    return Evaluation(loss_sum / count, loss_sum / math.log(2) / max(1, int(held_out.n_bytes[:n].sum())))


def _shared_out(batches: Iterator[Batch], world: World) -> Iterator[Batch]:
    """Yield this rank's share; every rank gets equally many, the last ones with nothing to count."""
    while group := list(islice(batches, world.dp)):
        spare = replace(group[0], targets=torch.full_like(group[0].targets, IGNORE))
        yield group[world.dp_rank] if world.dp_rank < len(group) else spare
