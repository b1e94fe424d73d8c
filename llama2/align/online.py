"""A stream of training steps that a model samples for itself: what PPO and GRPO learn from.

    iteration   prompts -> answers of the live model -> rewards -> advantages -> mini-batches, one step each

The answers of an iteration follow from the weights at its beginning, the seed and the prompts alone, so a checkpoint
between two iterations is enough to go on exactly; within one the stream is not at rest. Every rank samples and scores
its own share of each mini-batch, so that together they do what one process would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama2.align.rollout import Prompts, Sampled
from llama2.errors import TrainingError
from llama2.parallel.mesh import World

Collect = Callable[[int, Sequence[int]], "Collected"]
"""Given the iteration and the prompts of this rank, in order, returns what is to be learnt from them."""


@dataclass(frozen=True)
class Collected:
    """An iteration's worth, of this rank."""

    answers: Sequence[Sampled]
    """n for each prompt, in order."""
    batch: Callable[[Sequence[int]], Any]
    """Returns a micro-batch of these answers."""
    metrics: Mapping[str, float]
    """What there is to say, over all ranks."""


class Online:
    """Yields the micro-batches of one rank, step by step; `train.run.Source`."""

    def __init__(
        self,
        prompts: Prompts,
        collect: Collect,
        *,
        n_prompts: int,
        n_answers: int,
        n_steps: int,
        micro_batch_size: int | None,
        world: World,
        seed: int,
    ):
        """n_prompts: per iteration, over all ranks. n_answers: to each. n_steps: mini-batches of an iteration."""
        if len(prompts) < n_prompts:
            raise TrainingError(
                f"{prompts.name} holds {len(prompts)} prompts and an iteration takes {n_prompts}; "
                "choose a smaller batch_size, or give more prompts"
            )
        self.prompts, self.collect, self.world, self.seed = prompts, collect, world, seed
        self.n_prompts, self.n_answers, self.n_steps = n_prompts, n_answers, n_steps
        self.micro_batch_size = micro_batch_size
        self.n_read, self.iteration = 0, 0
        self._collected: Collected | None = None
        self._taken = 0

    @property
    def said(self) -> str:
        return f"{len(self.prompts):,} prompts"

    @property
    def identity(self) -> list[list[Any]]:
        return [[len(self.prompts), self.prompts.n_tokens]]

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self._collected.metrics) if self._collected else {}

    @property
    def is_at_rest(self) -> bool:
        """Whether all that was sampled is learnt."""
        return self._taken in (0, self.n_steps)

    @property
    def state(self) -> dict[str, int]:
        assert self.is_at_rest
        return {"iteration": self.iteration}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        self.iteration, self._collected, self._taken = state["iteration"], None, 0

    def step(self) -> list[Any]:
        """Return this rank's micro-batches of the next mini-batch."""
        if self._collected is None or self._taken == self.n_steps:
            self._collected, self._taken = self.collect(self.iteration, self._mine()), 0
            self.iteration += 1
        size = len(self._collected.answers) // self.n_steps
        mine = range(self._taken * size, (self._taken + 1) * size)
        self._taken += 1
        lengths = {i: len(self._collected.answers[i].prompt) + len(self._collected.answers[i].ids) for i in mine}
        self.n_read = round(self.world.sum([sum(lengths.values())])[0])
        # Answers of about one length go together, to pad little; those to one prompt, to read it once.
        ordered = sorted(mine, key=lengths.__getitem__) if self.n_answers == 1 else [*mine]
        micro = self.micro_batch_size or size
        return [self._collected.batch(ordered[i : i + micro]) for i in range(0, size, micro)]

    def _mine(self) -> list[int]:
        """Return this rank's prompts of the iteration: its share of each mini-batch."""
        at = self.iteration * self.n_prompts
        numbers = [self._number(at + i) for i in range(self.n_prompts)]
        per_step = self.n_prompts // self.n_steps
        share = per_step // self.world.dp
        begin = self.world.dp_rank * share
        return [
            number for step in range(0, self.n_prompts, per_step) for number in numbers[step:][begin : begin + share]
        ]

    def _number(self, at: int) -> int:
        """Return which prompt is the at-th ever: each pass over all has an order of its own."""
        epoch, place = divmod(at, len(self.prompts))
        return int(np.random.default_rng((self.seed, 6, epoch)).permutation(len(self.prompts))[place])


def told_of(answers: Sequence[Sampled], world: World) -> dict[str, float]:
    """Return what sampled answers are like, over all ranks: rewards, lengths, and signs that something goes wrong."""
    everything = world.gather([(each.reward, len(each.ids), each.is_cut, each.text) for each in answers])
    rewards, lengths, cut, texts = zip(*everything, strict=True)
    return {
        "reward": float(np.mean(rewards)),
        "reward_std": float(np.std(rewards)),
        "answer_tokens": float(np.mean(lengths)),
        "cut": float(np.mean(cut)),
        "distinct": len(set(texts)) / len(texts),
    }
