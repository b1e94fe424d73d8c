"""One run of learning from sampled answers; PPO and GRPO say what is learnt and by which loss. `learn` reads from top
to bottom.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from llama2.align.losses import kl_estimates
from llama2.align.online import Collected, Online, told_of
from llama2.align.online_config import OnlineConfig
from llama2.align.policy import (
    POLICY,
    export_policy,
    first_weights,
    make_learnable,
    reference_of,
    speaking_as,
    values_of,
)  # fmt: skip
from llama2.align.rollout import Prompts, Sampled, Sampling, rewarded, rows_of, sample
from llama2.align.task import Task, open_task
from llama2.checkpoint import hub, store
from llama2.data.batch import Batch
from llama2.data.examples import Examples
from llama2.data.preferences.batch import lay_out
from llama2.errors import TrainingError
from llama2.llm import tokenizer_of
from llama2.model.losses import hidden_states, logprobs_and_entropy, token_logprobs
from llama2.model.transformer import Transformer
from llama2.parallel.gather import whole
from llama2.parallel.mesh import start
from llama2.train.adapt import adapter_of, check_vocabulary
from llama2.train.evaluation import Evaluation, Judge
from llama2.train.folder import RunFolder
from llama2.train.loop import Trainer
from llama2.train.place import place_model
from llama2.train.pretrain import out_of
from llama2.train.run import Outcome, Run

Config = TypeVar("Config", bound=OnlineConfig)
LARGEST_GAP = 0.05
"""ln p of a token as sampled and as trained may differ so much on average; more means that the two disagree."""
EVALUATION = 1 << 20
"""Rounds of sampling from here on are evaluations."""


@dataclass(frozen=True)
class Known:
    """What was known of an answer's tokens when it was sampled, each [n]."""

    old: Tensor
    reference: Tensor
    values: Tensor


class Learner(ABC, Generic[Config]):
    """A model, and what a method makes of the answers that it samples."""

    def __init__(self, config: Config, trainer: Trainer, reference: Transformer, task: Task, n_answers: int):
        self.reference = reference
        self.config, self.trainer, self.prompts, self.reward = config, trainer, task.prompts, task.reward
        self.n_answers, self.model, self.world = n_answers, trainer.model, trainer.world
        self.sampling = Sampling(config.max_new_tokens, config.temperature)

    @abstractmethod
    def prepare(self, answers: Sequence[Sampled]) -> Collected:
        """Return what is to be learnt from this rank's answers of an iteration."""

    @abstractmethod
    def loss(self, model: Transformer, batch) -> tuple[Tensor, int, dict[str, float]]:
        """Return the loss of a micro-batch, as `train.loop.LossFn`."""

    def collect(self, iteration: int, numbers: Sequence[int]) -> Collected:
        """Sample answers to these prompts, and prepare them."""
        return self.prepare(self.answer(self.prompts, numbers, self.n_answers, iteration))

    def answer(self, prompts: Prompts, numbers: Sequence[int], n: int, round: int) -> list[Sampled]:
        """Return n rewarded answers of the live model to each prompt."""
        seed = self.config.seed * 1_000_003 + round
        with whole(self.model, self.world) as model:
            answers = sample(model, prompts, numbers, self.sampling, n=n, seed=seed, adapter=POLICY)
        return rewarded(answers, prompts, self.reward)

    @torch.no_grad()
    def known(self, answers: Sequence[Sampled], *, with_values: bool = False) -> tuple[Examples, list[Known]]:
        """Return the answers as rows, and what policy, reference and value model think of their tokens."""
        rows = rows_of(answers, self.prompts.tokenizer, length=self.model.config.context_length)
        was_training = self.model.training
        self.model.eval()
        found: list[Known | None] = [None] * len(answers)
        size = self.config.micro_batch_size or min(32, len(answers))
        is_free = self.world.dp == 1 and self.n_answers == 1  # answers to one prompt stay together: it is read once
        order = np.argsort(rows.lengths, kind="stable") if is_free else np.arange(len(answers))
        for at in range(0, len(order), size):
            numbers = order[at : at + size].tolist()
            batch, _ = lay_out(rows, numbers)
            batch = batch.to(self.world.device)
            temperature = self.config.temperature
            with speaking_as(self.model, POLICY):
                hidden = hidden_states(self.model, batch)
                old, _ = logprobs_and_entropy(self.model, batch, temperature=temperature, hidden=hidden)
            with speaking_as(self.reference):
                reference = token_logprobs(self.reference, batch, temperature=temperature)
            values = values_of(self.model, batch, hidden) if with_values else torch.zeros_like(old)
            is_answer = batch.targets != -100
            for row, number in enumerate(numbers):
                parts = (each[row][is_answer[row]].float().cpu() for each in (old, reference, values))
                found[number] = Known(*parts)
        self.model.train(was_training)
        return rows, [each for each in found if each is not None]

    def spread(self, rows: Batch, values: Sequence[Tensor]) -> Tensor:
        """Return values of answers' tokens where these are predicted, [B T]."""
        whole_rows = torch.zeros(rows.targets.shape)
        whole_rows[rows.targets != -100] = torch.cat(list(values))
        return whole_rows

    def diagnosed(self, answers: Sequence[Sampled], known: Sequence[Known]) -> dict[str, float]:
        """Return the divergence per answer, and how well sampling and training agree. Raises TrainingError."""
        divergence = [float(kl_estimates(each.old, each.reference)[0].sum()) for each in known]
        gaps = []
        if self.config.temperature == 1.0:  # the engine reports probabilities at temperature 1
            for answer, each in zip(answers, known, strict=True):
                n = len(answer.logprobs)
                gaps += (each.old[:n] - torch.tensor(answer.logprobs)).abs().tolist()
        divergence, gaps = self.world.gather(divergence), self.world.gather(gaps)
        gap = float(np.mean(gaps)) if gaps else 0.0
        if gap > LARGEST_GAP:
            raise TrainingError(
                f"tokens are sampled with other probabilities than they are trained with: ln p differs by {gap:.3f} on "
                "average; a reduced dtype may be too coarse: try float32"
            )
        return {"kl": float(np.mean(divergence)), "sampling_gap": gap}

    @staticmethod
    def lr_scale(config, name: str) -> float:
        """Return by how much the learning rate of a weight differs from learning_rate."""
        return config.lora_b_lr_ratio if ".lora_b." in name else 1.0


def learn(
    config: Config, method: type[Learner[Config]], *, adapters: Sequence[str], n_answers: int, plots: Mapping[str, str]
) -> Outcome:
    """Sample, reward, learn, for all iterations. Raises Llama2Error before any long work for what cannot work."""
    config = config.settled()
    config.check()
    world = start(device=config.device, timeout_s=config.timeout_s)
    config = config.on(world.dp, n_answers)
    base = hub.resolve(config.model)
    shape, tokenizer = store.read_config(base), tokenizer_of(base)
    check_vocabulary(config, shape, tokenizer)
    console = Console(stderr=True, highlight=False, quiet=not world.is_first)
    task = open_task(config, shape.context_length, tokenizer, console)
    lora = adapter_of(config, shape)
    export = partial(export_policy, config=config, lora=lora, shape=shape, tokenizer=tokenizer)
    folder = RunFolder(out_of(config), config, world, tokenizer, export)
    folder.open()
    weights = partial(first_weights, config, base, adapters)
    model = place_model(config, shape, world, weights, adapt=partial(make_learnable, lora, adapters))
    reference = reference_of(config, shape, world, base, model)
    n_steps = config.n_iterations * config.n_mini_batches
    trainer = Trainer(model, config, n_steps=n_steps, world=world, lr_scale=partial(method.lr_scale, config))
    learner = method(config, trainer, reference, task, n_answers)
    source = Online(
        task.prompts,
        learner.collect,
        n_prompts=config.batch_size // n_answers,
        n_answers=n_answers,
        n_steps=config.n_mini_batches,
        micro_batch_size=config.micro_batch_size,
        world=world,
        seed=config.seed,
    )
    run = Run(
        config.as_steps(),
        world,
        folder,
        trainer,
        source,
        {"held-out": judge_answers(learner, task.held_out)} if task.held_out else {},
        learner.loss,
        row_tokens=task.prompts.n_tokens / len(task.prompts) + config.max_new_tokens / 2,
        per_epoch=len(task.prompts) * n_answers,
        unit="answers",
        compares=task.held_out is not None,
        plots=plots,
    )
    run.resume()
    return run.to_the_end()


def judge_answers(learner: Learner, held_out: Prompts) -> Judge:
    """Return what judges the model by the rewards of its answers to held-out prompts; the loss is less their mean."""

    def judge() -> Evaluation:
        world = learner.world
        with learner.trainer.as_published():
            answers = learner.answer(held_out, world.share(len(held_out)), 1, EVALUATION)
        told = told_of(answers, world)
        return Evaluation(-told["reward"], {name: told[name] for name in ("reward", "answer_tokens", "cut")})

    return judge
