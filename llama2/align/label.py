"""Preference pairs of the current model's own answers, labelled by a judge that gives numbers.

The reward model of the paper was trained anew on answers of the newest model, since it judges badly what it has not
seen (arXiv:2307.09288 sec. 3.2.2). Two answers to each prompt are compared; the rating follows from the difference of
their numbers, in fractions of the spread of all differences.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llama2.align.lessons import model_of
from llama2.align.rejection_config import RejectConfig
from llama2.align.rollout import Prompts, Sampled, Sampling, rewarded, sample
from llama2.align.task import reward_of
from llama2.data.dialogues.prompts import AskedPrompt
from llama2.data.preferences.pair import RATINGS
from llama2.files.staging import staged_file

TEMPERATURES = (0.8, 1.2)
"""Of the two answers: the paper compares answers of different variants at different temperatures."""
QUANTILES = (0.25, 0.5, 0.75)
"""Of the differences: beyond the last an answer is significantly better, and so on."""


def label_pairs(config: RejectConfig, asked: Sequence[AskedPrompt], model: str, out: Path, *, seed: int) -> int:
    """Write pairs of a model's answers to these prompts; return how many. Equal answers and ties are left out."""
    llm = model_of(config, model)
    assert config.pairs_judge is not None
    judge = reward_of(config.pairs_judge, None, asked, llm.tokenizer)
    prompts = Prompts(
        [each.messages for each in asked],
        llm.tokenizer,
        context_length=llm.config.context_length,
        max_new_tokens=config.max_new_tokens,
        chat_format=config.chat_format,
        too_long=config.too_long,
    )
    sides = [
        rewarded(
            sample(llm.model, prompts, range(len(prompts)), Sampling(config.max_new_tokens, each), seed=seed + number),
            prompts,
            judge,
        )
        for number, each in enumerate(TEMPERATURES)
    ]
    pairs = [
        (one, other) if one.reward > other.reward else (other, one)
        for one, other in zip(*sides, strict=True)
        if one.reward != other.reward and one.text and other.text
    ]
    gaps = [better.reward - worse.reward for better, worse in pairs]
    bounds = np.quantile(gaps, QUANTILES).tolist() if pairs else []
    with staged_file(out) as temporary:
        temporary.write_text("".join(_line(prompts, *pair, bounds) for pair in pairs), encoding="utf-8")
    return len(pairs)


def _line(prompts: Prompts, better: Sampled, worse: Sampled, bounds: Sequence[float]) -> str:
    code = int(np.searchsorted(bounds, better.reward - worse.reward, side="right"))
    rating = next(name for name, number in RATINGS.items() if number == code)
    asked = [asdict(message) for message in prompts.conversations[better.number]]
    pair = {"prompt": asked, "chosen": better.text, "rejected": worse.text, "rating": rating}
    return json.dumps(pair, ensure_ascii=False) + "\n"
