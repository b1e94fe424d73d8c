"""Preference pairs for a run: read, mixed as the Llama 2 paper mixes them, some set aside to judge by.

helpfulness   all pairs about helpfulness, and as many others, drawn evenly      arXiv:2307.09288 sec. 3.2.2
safety        all pairs about safety, and a ninth as many others: 90 to 10
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.console import Console

from llama2.align.dpo_config import DpoConfig
from llama2.align.reward_config import RewardConfig
from llama2.data.preferences.pair import RATINGS
from llama2.data.preferences.sets import JudgedSet, PairSet, TooLong, joined, read_pair_set, set_aside
from llama2.errors import ConfigError, DataError
from llama2.model.config import ModelConfig
from llama2.tokenizer.tokenizer import Tokenizer

OTHERS = {"helpfulness": 1.0, "safety": 1 / 9}
"""At most so many other pairs for each of the model's own kind."""


class PairSettings(Protocol):
    """What a command that learns from pairs is told about them."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> tuple[Path, ...]: ...
    @property
    def eval_data(self) -> Path | None: ...
    @property
    def eval_share(self) -> float: ...
    @property
    def chat_format(self) -> str | None: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def too_long(self) -> TooLong: ...
    @property
    def early_stop(self) -> int: ...
    @property
    def seed(self) -> int: ...


def open_pairs(
    config: PairSettings, shape: ModelConfig, tokenizer: Tokenizer, console: Console, *, mix: str = "all"
) -> tuple[PairSet, PairSet | None]:
    """Read all pairs, say what was found, and return those to learn from and those to judge by."""
    reading = reading_of(config, shape)

    def read(path: Path, share: float) -> tuple[PairSet, PairSet | None]:
        found = read_pair_set(path, tokenizer, **reading)
        console.print(f"{path}: {told(found)}", markup=False, soft_wrap=True)
        return divided(found, share, seed=config.seed)

    kept, aside = read_all(config, read)
    return mixed(joined(kept), mix, seed=config.seed), joined(aside) if aside else None


def reading_of(config: PairSettings, shape: ModelConfig) -> dict[str, Any]:
    """Return how files are read. Raises ConfigError if the model cannot read so long answers."""
    length = config.sequence_length or shape.context_length
    if length > shape.context_length:
        raise ConfigError(
            f"sequence_length={length} is beyond the context of {config.model}, {shape.context_length}; choose less"
        )
    return dict(length=length, too_long=config.too_long, chat_format=config.chat_format)


def divided(found: JudgedSet, share: float, *, seed: int) -> tuple[JudgedSet, JudgedSet | None]:
    """Return what is left of a set, and a share of it that is set aside, None for a share of 0."""
    return set_aside(found, share, seed=seed) if share else (found, None)


def read_all(
    config: PairSettings, read: Callable[[Path, float], tuple[JudgedSet, JudgedSet | None]]
) -> tuple[list[JudgedSet], list[JudgedSet]]:
    """Return the sets of all files to learn from, and those to judge by.

    read: returns what a file holds, and the given share of it that is set aside.
    """
    is_apart = config.eval_data is not None
    found = [read(path, 0.0 if is_apart else config.eval_share) for path in config.data]
    aside = [some for _, some in found if some is not None]
    if config.eval_data is not None:
        aside = [read(config.eval_data, 0.0)[0]]
    if config.early_stop and not aside:
        raise ConfigError("early_stop needs something to judge by; give eval_data or eval_share")
    return [kept for kept, _ in found], aside


def told(found: PairSet) -> str:
    """Return what a set holds, as people read it."""
    rated = {name: int((found.ratings == code).sum()) for name, code in RATINGS.items()}
    ratings = ", ".join(f"{n:,} {name}" for name, n in rated.items() if n) or "no ratings"
    return f"{len(found):,} pairs, {found.n_tokens:,} tokens; {ratings}{left_out_of(found)}"


def left_out_of(found: JudgedSet) -> str:
    return "".join(f", {n:,} left out ({why})" for why, n in found.left_out.items())


def mixed(pairs: PairSet, mix: str, *, seed: int) -> PairSet:
    """Return the pairs that a helpfulness or a safety model learns from; all of them for any other name."""
    if mix not in OTHERS:
        return pairs
    is_own = (pairs.flags[:, 0] == 1) if mix == "safety" else (pairs.flags[:, 0] != 1)
    own, others = np.flatnonzero(is_own), np.flatnonzero(~is_own)
    if not len(own):
        raise DataError(
            f"{pairs.name} holds no pair about {mix}, which mix={mix} asks for; pairs say so by "
            "'kind': 'safe' or 'helpful', or 'is_safety'"
        )
    drawn = np.random.default_rng((seed, 5)).permutation(others)[: round(OTHERS[mix] * len(own))]
    return pairs.part(sorted([*own.tolist(), *drawn.tolist()]))


Warmed = TypeVar("Warmed", RewardConfig, DpoConfig)
LEAST_WARMUP = 5


def steps_of(config: Warmed, n_pairs: int) -> tuple[Warmed, int]:
    """Return how many steps there are, and the settings with a warm-up of the right length."""
    n_steps = config.max_steps or max(1, round(config.n_epochs * n_pairs / config.batch_size))
    warmup = config.warmup_steps or min(n_steps - 1, max(LEAST_WARMUP, round(config.warmup_share * n_steps)))
    if warmup >= n_steps:
        raise ConfigError(f"warmup_steps={warmup} leaves nothing of the {n_steps} steps; choose fewer")
    return config.model_copy(update={"warmup_steps": warmup}), n_steps
