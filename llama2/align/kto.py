"""KTO: good and bad answers, one at a time, against what answers to other prompts gain (arXiv:2402.01306 sec. 4.1).

    gain  g = ln p(y | x) - ln p_ref(y | x)
    z = max(0, mean of g over mismatched answers)       how far the policy went from the reference, about
    loss  1 - sigmoid(beta (g - z)) of a good answer, 1 - sigmoid(beta (z - g)) of a bad one

A mismatched answer is a row's prompt with the answer to another prompt. The paper takes the next one of the batch;
here each row has a fixed one, the next in the set that answers another prompt and fits, so that the reference's
log-probabilities of them can be computed beforehand too. z is the mean over the whole step, of all micro-batches and
ranks, so that no split of a batch changes it; no gradient flows through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from rich.console import Console
from torch import Tensor

from llama2.align.dpo_config import DpoConfig
from llama2.align.losses import Numbers, kto_loss, per_row
from llama2.align.pair_data import divided, left_out_of, read_all, reading_of
from llama2.data.dialogues.files import find, records
from llama2.data.examples import Examples, concatenated
from llama2.data.preferences.batch import LabelledBatch, lay_out
from llama2.data.preferences.formats import KEYS, SIDES
from llama2.data.preferences.loader import PairLoader
from llama2.data.preferences.sets import LabelledSet, PairSet, read_labelled_set, read_pair_set
from llama2.model.config import ModelConfig
from llama2.model.losses import token_logprobs
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.loop import LossFn

N_TRIED = 100
"""So many answers are tried for one that fits a prompt."""

# Answers


def open_answers(
    config: DpoConfig, shape: ModelConfig, tokenizer: Tokenizer, console: Console
) -> tuple[LabelledSet, LabelledSet | None]:
    """Read labelled answers, and pairs as a good and a bad one; return those to learn from and those to judge by.

    Both sides of a pair are on the same side of that.
    """
    reading = reading_of(config, shape)

    def read(path: Path, share: float) -> tuple[LabelledSet, LabelledSet | None]:
        if holds_pairs(path):
            pairs = read_pair_set(path, tokenizer, **reading)
            found = one_by_one(pairs)
            kept, some = (
                None if each is None else one_by_one(each) for each in divided(pairs, share, seed=config.seed)
            )
        else:
            found = read_labelled_set(path, tokenizer, **reading)
            kept, some = divided(found, share, seed=config.seed)
        n_good = int(found.is_good.sum())
        console.print(
            f"{path}: {len(found):,} answers, {found.n_tokens:,} tokens; {n_good:,} good, {len(found) - n_good:,} bad"
            f"{left_out_of(found)}",
            markup=False,
            soft_wrap=True,
        )
        assert kept is not None
        return kept, some

    kept, aside = read_all(config, read)
    return all_of(kept), all_of(aside) if aside else None


def holds_pairs(path: Path) -> bool:
    """Return whether a file, or the first file of a folder, begins with a pair of answers."""
    file, name = find(path)[0][0]
    _, record = next(records(file, name, KEYS))
    return isinstance(record, dict) and any(record.get(side) is not None for side in SIDES)


def one_by_one(pairs: PairSet) -> LabelledSet:
    """Return pairs as answers: the chosen one good, the rejected one bad."""
    return LabelledSet(pairs.rows, np.tile([True, False], len(pairs)), pairs.left_out)


def all_of(sets: Sequence[LabelledSet]) -> LabelledSet:
    return LabelledSet(concatenated([each.rows for each in sets]), np.concatenate([each.is_good for each in sets]))


# Mismatched answers


@dataclass(frozen=True)
class Mismatched:
    """For each row of a set its prompt with the answer to another one."""

    rows: Examples
    counts: Bool[Tensor, " N"]
    """False where there is none; the row itself then stands there."""


def mismatched(rows: Examples, length: int) -> Mismatched:
    """Return each row's prompt with the answer of the next row that has another prompt and fits `length` tokens.

    Ids are put together, not texts: prompt and answer are the very ones of their rows.
    """
    begins = np.array([int(rows.trained(i).argmax()) for i in range(len(rows))])
    prompts = [rows.document(i)[: begins[i]].tobytes() for i in range(len(rows))]
    answer_lengths = rows.lengths - begins
    ids, marks, counts = [], [], []
    for i, begin in enumerate(begins):
        after = (j % len(rows) for j in range(i + 1, i + len(rows)))
        others = islice((j for j in after if prompts[j] != prompts[i]), N_TRIED)
        j = next((j for j in others if begin + answer_lengths[j] <= length), None)
        counts.append(j is not None)
        j = i if j is None else j
        ids += [rows.document(i)[:begin], rows.document(j)[begins[j] :]]
        marks += [rows.trained(i)[:begin], rows.trained(j)[begins[j] :]]
    spliced = Examples(
        f"{rows.name} (mismatched)",
        rows.tokenizer_sha256,
        np.concatenate(ids),
        np.concatenate(marks),
        np.array([len(one) + len(other) for one, other in zip(ids[::2], ids[1::2], strict=True)], np.int64),
        np.zeros(len(rows), np.int64),  # nothing is measured per byte here
    )
    return Mismatched(spliced, torch.tensor(counts))


# The step


@dataclass(frozen=True)
class AnswerBatch:
    """Labelled answers, and z of the step that they are part of."""

    answers: LabelledBatch
    kl: Float[Tensor, ""]

    def to(self, device: torch.device | str) -> "AnswerBatch":
        return AnswerBatch(self.answers.to(device), self.kl.to(device))


class AnswerSource:
    """A loader's micro-batches, each with z, which the model as it is before the step gives."""

    def __init__(
        self,
        loader: PairLoader[LabelledBatch],
        model: Transformer,
        others: Mismatched,
        reference: Float[Tensor, " N"],
        world: World,
    ):
        """reference: ln p_ref of the mismatched answers."""
        self.loader, self.model, self.others, self.reference, self.world = loader, model, others, reference, world
        self.kl = 0.0

    @property
    def n_read(self) -> int:
        return self.loader.n_read

    @property
    def said(self) -> str:
        return self.loader.said

    @property
    def identity(self) -> list[list[Any]]:
        return self.loader.identity

    @property
    def metrics(self) -> dict[str, float]:
        return {"kl": self.kl}

    @property
    def is_at_rest(self) -> bool:
        return self.loader.is_at_rest

    @property
    def state(self) -> dict[str, int]:
        return self.loader.state

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        self.loader.state = state

    @torch.no_grad()
    def step(self) -> list[AnswerBatch]:
        batches = self.loader.step()
        self.model.eval()
        total, n = 0.0, 0
        for batch in batches:
            rows = lay_out(self.others.rows, batch.numbers.numpy())[0].to(self.world.device)
            sums, _ = per_row(token_logprobs(self.model, rows), rows.targets)
            gain = (sums.cpu() - self.reference[batch.numbers])[self.others.counts[batch.numbers]]
            total, n = total + float(gain.double().sum()), n + len(gain)
        total, count = self.world.sum([total, n])
        self.kl = estimated(total, count)
        return [AnswerBatch(batch, torch.tensor(self.kl, dtype=self.reference.dtype)) for batch in batches]


def estimated(total: float, count: float) -> float:
    """Return z of the sum of what so many mismatched answers gain; 0 for none."""
    return max(0.0, total / count) if count else 0.0


def answer_loss(config: DpoConfig, reference: Float[Tensor, " N"]) -> LossFn:
    """Return the loss of a batch of answers; reference: ln p_ref of all answers of their set."""

    def loss_fn(model: Transformer, batch: AnswerBatch) -> tuple[Tensor, int, dict[str, float]]:
        answers = batch.answers
        p, _ = per_row(token_logprobs(model, answers.rows), answers.rows.targets)
        gain = p - reference.to(p.device)[answers.numbers]
        losses, margins = judged_answers(config, gain, answers.is_good, batch.kl)
        return losses.sum(), answers.n_answers, {"accuracy": right(margins), "margin": float(margins.sum())}

    return loss_fn


def judged_answers(
    config: DpoConfig, gain: Numbers, is_good: Bool[Tensor, " N"], kl: Float[Tensor, ""]
) -> tuple[Numbers, Numbers]:
    """Return the loss of each answer, and by how much it is on its side of z: beta (g - z), or beta (z - g)."""
    assert config.beta is not None
    weights = torch.where(is_good, config.desirable_weight, config.undesirable_weight).to(gain.dtype)
    margins = config.beta * (is_good.to(gain.dtype) * 2 - 1) * (gain - kl).detach()
    return weights * kto_loss(gain, is_good, kl, beta=config.beta), margins


def right(margins: Numbers) -> float:
    """Return how many margins are above 0; a tie is half right."""
    return float((margins > 0).sum()) + 0.5 * float((margins == 0).sum())
