"""Preference pairs of the current model's own answers, labelled by a judge that gives numbers, and a reward model that
is trained on with them.

The reward model of the paper was trained anew on answers of the newest model, since it judges badly what it has not
seen (arXiv:2307.09288 sec. 3.2.2). Two answers to each prompt are compared; the rating follows from the difference of
their numbers, in fractions of the spread of all differences.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llama2.align.lessons import by_first, is_there, model_of, write_lines
from llama2.align.rejection_config import RejectConfig
from llama2.align.reward import train_reward
from llama2.align.reward_config import RewardConfig
from llama2.align.rollout import Prompts, Sampled, Sampling, rewarded, sample
from llama2.align.scoring import shared
from llama2.align.task import reward_of
from llama2.checkpoint import store
from llama2.data.dialogues.prompts import AskedPrompt
from llama2.data.preferences.pair import RATINGS
from llama2.data.preferences.read import read_pairs
from llama2.errors import TrainingError
from llama2.parallel.mesh import World

TEMPERATURES = (0.8, 1.2)
"""Of the two answers: the paper compares answers of different variants at different temperatures."""
QUANTILES = (0.25, 0.5, 0.75)
"""Of the differences: beyond the last an answer is significantly better, and so on."""


def retrained(
    config: RejectConfig,
    asked: Sequence[AskedPrompt],
    model: str,
    reward: str,
    folder: Path,
    world: World,
    console: Console,
) -> str:
    """Label pairs of the current model's answers, and train the reward model on with them; return its folder."""
    pairs = folder / "pairs.jsonl"
    assert config.pairs_judge is not None
    if not is_there(pairs, world):
        number = int(folder.name.removeprefix("round-"))
        some = drawn(asked, config.n_prompts, seed=config.seed + 500 + number)
        found = label_pairs(config, some, model, world, seed=config.seed * 1_000 + 500 + number)
        by_first(world, lambda: write_lines(pairs, found))
        console.print(f"{len(found):,} pairs of {model} labelled by {config.pairs_judge}")
    run = folder / "reward"
    if not is_there(run / "model", world):
        earlier = sorted(folder.parent.glob("round-*/pairs.jsonl"))
        data = (*config.pairs, *earlier)
        settings = dict(model=reward, data=data, out=run, resume=True, too_long="drop")
        settings |= dict(learning_rate=config.pairs_learning_rate, safety_weight=safety_weight(reward, data))
        names = ("dtype", "seed", "device", "micro_batch_size", "chat_format")
        shared = {name: getattr(config, name) for name in names}
        outcome = train_reward(RewardConfig(**{**settings, **shared}))  # pyright: ignore[reportArgumentType]
        if outcome.stopped_by:
            raise TrainingError("stopped while the reward model was trained; the same command with --resume goes on")
    return str(run / "model")


def safety_weight(reward: str, data: Sequence[Path]) -> float:
    """Return 1 where a reward model has a safety head and its data says what is safe; else the head stays as it is."""
    if "safety" not in store.read(reward).heads:
        return 0.0
    pairs = (pair for path in data for pair in read_pairs(path))
    return float(any((each.chosen_is_safe, each.rejected_is_safe) != (None, None) for each in pairs))


def drawn(asked: Sequence[AskedPrompt], n: int, *, seed: int) -> list[AskedPrompt]:
    """Return n of the prompts, drawn evenly."""
    order = np.random.default_rng((seed, 7)).permutation(len(asked))[:n]
    return [asked[i] for i in order]


def label_pairs(
    config: RejectConfig, asked: Sequence[AskedPrompt], model: str, world: World, *, seed: int
) -> list[dict[str, Any]]:
    """Return pairs of a model's answers to these prompts, labelled. Equal answers and ties are left out."""
    llm = model_of(config, model, world)
    assert config.pairs_judge is not None
    judge = shared(reward_of(config.pairs_judge, None, asked, llm.tokenizer), world)
    prompts = Prompts(
        [each.messages for each in asked],
        llm.tokenizer,
        context_length=llm.config.context_length,
        max_new_tokens=config.max_new_tokens,
        chat_format=config.chat_format,
        too_long=config.too_long,
    )
    sides = []
    for number, temperature in enumerate(TEMPERATURES):
        sampling = Sampling(config.max_new_tokens, temperature)
        answers = sample(llm.model, prompts, range(len(prompts)), sampling, seed=seed + number, world=world)
        sides.append(rewarded(answers, prompts, judge))
    pairs = [
        (one, other) if one.reward > other.reward else (other, one)
        for one, other in zip(*sides, strict=True)
        if one.reward != other.reward and one.text and other.text
    ]
    gaps = [better.reward - worse.reward for better, worse in pairs]
    bounds = np.quantile(gaps, QUANTILES).tolist() if pairs else []
    return [_record(prompts, *pair, bounds) for pair in pairs]


def _record(prompts: Prompts, better: Sampled, worse: Sampled, bounds: Sequence[float]) -> dict[str, Any]:
    code = int(np.searchsorted(bounds, better.reward - worse.reward, side="right"))
    rating = next(name for name, number in RATINGS.items() if number == code)
    asked = [asdict(message) for message in prompts.conversations[better.number]]
    return {"prompt": asked, "chosen": better.text, "rejected": worse.text, "rating": rating}
