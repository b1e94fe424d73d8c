"""What fine-tuning learns from: files of examples, earlier data beside them, and how many steps that makes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from llama2.data.dialogues.read import detect_samples, read_samples
from llama2.data.dialogues.render import render_sample
from llama2.data.dialogues.show import show
from llama2.data.documents import Documents
from llama2.data.examples import Examples, open_documents, read_examples, set_aside, together
from llama2.data.loader import Loader
from llama2.data.shards import INDEX
from llama2.errors import ConfigError
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.finetune_config import FinetuneConfig


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is judged by."""

    tasks: list[Examples]
    replay: list[Documents]
    held_out: dict[str, Documents]

    @property
    def sets(self) -> list[Documents]:
        return [*self.tasks, *self.replay]


def present(config: FinetuneConfig, tokenizer: Tokenizer, console: Console) -> None:
    """Print the first examples as the model will see them."""
    n_left = config.show
    for path in config.data:
        for sample in read_samples(path, format=config.data_format):
            if not n_left:
                return
            show(console, sample, render_sample(sample, tokenizer, chat_format=config.chat_format), tokenizer)
            n_left -= 1


def open_data(config: FinetuneConfig, tokenizer: Tokenizer, console: Console) -> Data:
    """Read all examples, and say what was found."""
    if not config.data:
        raise ConfigError("what to train on? name files of examples with --data")
    reading: dict[str, Any] = dict(
        length=config.sequence_length, too_long=config.too_long, chat_format=config.chat_format
    )
    tasks: list[Examples] = []
    aside: list[Examples] = []
    for path in config.data:
        kind = config.data_format or detect_samples(path)
        found = read_examples(path, tokenizer, data_format=config.data_format, **reading)
        left_out = "".join(f", {n:,} left out ({why})" for why, n in found.left_out.items())
        console.print(
            f"{path}: {len(found):,} examples ({kind}), {found.n_tokens:,} tokens, {found.n_targets:,} trained, "
            f"the longest {found.lengths.max():,}{left_out}",
            markup=False,
            soft_wrap=True,
        )
        if config.eval_data is None and config.eval_share:
            found, some = set_aside(found, config.eval_share, seed=config.seed)
            aside.append(some)
        tasks.append(found)
    held_out: dict[str, Documents] = {}
    if config.eval_data is not None:
        held_out["held-out"] = read_examples(config.eval_data, tokenizer, data_format=config.data_format, **reading)
    elif aside:
        held_out["held-out"] = together(aside)
    elif config.early_stop:
        raise ConfigError("early_stop needs something to judge by; give eval_data or eval_share")
    reading["too_long"] = "split"  # earlier data may be long documents
    replay: list[Documents] = [open_documents(path, tokenizer, **reading) for path in config.replay]
    if config.replay:
        beside = config.replay[0] / "heldout"
        place = config.replay_eval or (beside if (beside / INDEX).exists() else None)
        if place is not None:
            held_out["earlier"] = open_documents(place, tokenizer, **reading)
    return Data(tasks, replay, held_out)


@dataclass(frozen=True)
class Plan:
    """How many steps, of what."""

    n_steps: int
    weights: list[float]
    """Share of the tokens from each set."""
    tokens_per_epoch: float
    """Trained tokens in as many positions as a pass over the tasks has, replay beside them included."""
    n_rows_packed: int
    """Rows that are packed at a time: no more than one pass has."""


def plan_steps(config: FinetuneConfig, data: Data) -> Plan:
    """Return the steps of n_epochs passes over the tasks, and how replay is mixed in. Raises ConfigError."""
    share = config.replay_share if data.replay else 0.0
    positions = [positions_of(each) for each in data.tasks]
    weights = [(1 - share) * each for each in shares(config.weights or positions)]
    weights += [share * each for each in shares([positions_of(each) for each in data.replay])]
    per_pass = sum(positions) / (1 - share)
    density = [each.n_targets / positions_of(each) for each in data.sets]  # how much of what is read is trained
    tokens_per_epoch = per_pass * sum(w * d for w, d in zip(weights, density, strict=True))
    n_rows_packed = max(1, min(512, math.ceil(per_pass / config.sequence_length)))
    sample = Loader(
        data.sets,
        weights=weights,
        sequence_length=config.sequence_length,
        packing=config.packing,
        packing_buffer_rows=n_rows_packed,
        seed=config.seed,
        rows_per_step=1,
        micro_batch_size=1,
    )
    sample.step()
    n_rows = per_pass / (sample.fullness * config.sequence_length)
    n_steps = config.max_steps or math.ceil(config.n_epochs * n_rows / config.batch_size - 1e-9)
    if config.warmup_steps >= n_steps:
        raise ConfigError(f"warmup_steps={config.warmup_steps} leaves nothing of the {n_steps} steps; choose fewer")
    return Plan(n_steps, weights, tokens_per_epoch, n_rows_packed)


def positions_of(documents: Documents) -> float:
    """Return how many tokens a pass over a set reads."""
    return float(documents.n_tokens - len(documents))


def shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]
