"""How a run is judged by what is held out; of text, how well it is predicted, whatever the split over processes."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from llama2.data.batch import IGNORE, Batch
from llama2.data.documents import Documents
from llama2.data.loader import in_order
from llama2.parallel.mesh import World
from llama2.train.config import TrainConfig
from llama2.train.loop import LossFn, Trainer


@dataclass(frozen=True)
class Evaluation:
    """How a model does on what is held out."""

    loss: float
    """What decides which checkpoint is best; of text, nats per trained token."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Other measures by name; of text, perplexity per token of this vocabulary and bits per byte."""

    def said(self) -> str:
        """Return all of it as people read it."""
        parts = {"loss": self.loss, **self.values}
        return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in parts.items())


Judge = Callable[[], Evaluation]


def judges_of(
    config: TrainConfig, trainer: Trainer, loss_fn: LossFn, held_out: Mapping[str, Documents], *, micro_batch_size: int
) -> dict[str, Judge]:
    """Return what judges a model by each of these sets."""
    settings = dict(n_tokens=config.eval_tokens, sequence_length=config.sequence_length)

    def judge(documents: Documents) -> Judge:
        return lambda: evaluate(trainer, loss_fn, documents, micro_batch_size=micro_batch_size, **settings)

    return {name: judge(documents) for name, documents in held_out.items()}


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
        loss_sum, count, _ = trainer.evaluate(_shared_out(batches, trainer.world), loss_fn)
    loss = loss_sum / count
    bits = loss_sum / math.log(2) / max(1, int(held_out.n_bytes[:n].sum()))
    return Evaluation(loss, {"perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits})


def _shared_out(batches: Iterator[Batch], world: World) -> Iterator[Batch]:
    """Yield this rank's share; every rank gets equally many, the last ones with nothing to count."""
    while group := list(islice(batches, world.dp)):
        spare = replace(group[0], targets=torch.full_like(group[0].targets, IGNORE))
        yield group[world.dp_rank] if world.dp_rank < len(group) else spare
