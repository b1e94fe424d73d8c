"""Two models answer the same prompts; which answers are better, a reward says, or a person (`ratings`).

    prompts -> the first n of a seeded order -> A answers all, B answers all, with the same seed for the same prompt

An answer that is empty loses, two that are the same are a tie; neither is worth a question.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama2.align.scoring import Reward
from llama2.chat import Conversation
from llama2.data.dialogues.prompts import AskedPrompt, read_prompts
from llama2.data.interval import wilson
from llama2.errors import ConfigError, RequestError
from llama2.files.staging import staged_file
from llama2.llm import LLM

ABOUT_SAFETY = ("kind", "is_safety", "is_unsafe")
"""What a prompt's record says of it, and a pair is to say too."""


@dataclass(frozen=True)
class Duel:
    """A prompt and the answers of both models."""

    number: int
    """Of the prompt among all that were read; seeds and sides follow from it."""
    prompt: AskedPrompt
    a: str
    b: str

    @property
    def foregone(self) -> float | None:
        """1 if A wins without a question, 0.5 for a tie, 0 if B wins, None if it is worth one."""
        a, b = (bool(each.strip()) for each in (self.a, self.b))
        if self.a.strip() == self.b.strip():
            return 0.5
        return None if a and b else float(a)


def pick(path: Path, *, n: int, seed: int) -> list[tuple[int, AskedPrompt]]:
    """Return n prompts of a file, all different, drawn by the seed, with their numbers; all where there are fewer.

    More of them begin with the same ones.
    """
    if n < 1:
        raise RequestError(f"n={n}: wanted at least 1 prompt")
    seen = {each.messages: each for each in reversed(list(read_prompts(path)))}
    prompts = list(reversed(seen.values()))
    order = np.random.default_rng((seed, 7)).permutation(len(prompts))
    return [(int(i), prompts[i]) for i in order[:n]]


def answers_of(
    llm: LLM, prompts: Sequence[tuple[int, AskedPrompt]], *, seed: int, options: Mapping[str, Any]
) -> list[str]:
    """Return a model's answers, each of a seed of its own. Raises RequestError for a prompt that leaves no room."""
    for _, prompt in prompts:
        n_tokens, room = len(llm.prompt_ids(prompt.messages)), llm.config.context_length
        if n_tokens >= room:
            raise RequestError(
                f"{prompt.where} has {n_tokens} tokens and the model's context holds {room}, which leaves no room for "
                "an answer; shorten it, or take it out"
            )
    seeds = [seed * 1_000_003 + number for number, _ in prompts]
    found = llm.complete([prompt.messages for _, prompt in prompts], seed=seeds, **options) if prompts else []
    return [each.text for each in found]


# Who wins


@dataclass(frozen=True)
class Tally:
    """How often A won."""

    n: int
    wins: int
    ties: int
    """Each counts half."""

    @property
    def rate(self) -> float:
        return (self.wins + 0.5 * self.ties) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, Wilson's; of half a success the wider one."""
        k = self.wins + 0.5 * self.ties
        return wilson(math.floor(k), self.n)[0], wilson(math.ceil(k), self.n)[1]

    def said(self, a: str, b: str) -> str:
        """Return it as people read it."""
        if not self.n:
            return f"{a} against {b}: nothing was compared"
        low, high = self.interval
        return (
            f"{a} wins {100 * self.rate:.1f} % ({100 * low:.1f} to {100 * high:.1f}) against {b}: {self.wins:,} won, "
            f"{self.ties:,} tied, {self.n - self.wins - self.ties:,} lost"
        )


def tally(outcomes: Iterable[float]) -> Tally:
    """Return the tally of outcomes: 1 where A won, 0.5 for a tie, 0 where B won."""
    outcomes = list(outcomes)
    return Tally(len(outcomes), sum(each == 1 for each in outcomes), sum(each == 0.5 for each in outcomes))


@dataclass(frozen=True)
class Scored:
    """What a reward makes of both models' answers."""

    tally: Tally
    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def means(self) -> tuple[float, float]:
        return math.fsum(self.a) / len(self.a), math.fsum(self.b) / len(self.b)


def by_reward(duels: Sequence[Duel], reward: Reward) -> Scored:
    """Return who wins by the higher reward; equal ones tie. The reward decides of empty answers too."""
    asked = [each.prompt.messages for each in duels]
    a = rewards_of(reward, asked, [each.a for each in duels])
    b = rewards_of(reward, asked, [each.b for each in duels])
    outcomes = (0.5 if one == other else float(one > other) for one, other in zip(a, b, strict=True))
    return Scored(tally(outcomes), a, b)


def rewards_of(reward: Reward, conversations: Sequence[Conversation], answers: Sequence[str]) -> tuple[float, ...]:
    """Return a number for each answer. Raises ConfigError for a reward that gives something else."""
    found = reward(conversations, answers)
    if len(found) != len(answers):
        raise ConfigError(f"the reward gave {len(found)} numbers for {len(answers)} answers; wanted one for each")
    try:
        values = tuple(float(value) for value in found)
    except (TypeError, ValueError):
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise ConfigError(f"the reward gave {list(found)[:3]}...; wanted a finite number for each answer")
    return values


# What is learnt from it


def pair_record(duel: Duel, *, a_wins: bool, models: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Return a line of preference data, with who won: `llama2 reward` and `llama2 dpo` read it as it is."""
    chosen, rejected = (duel.a, duel.b) if a_wins else (duel.b, duel.a)
    told = {key: duel.prompt.record[key] for key in ABOUT_SAFETY if duel.prompt.record.get(key) is not None}
    return {
        "prompt": [asdict(message) for message in duel.prompt.messages],
        "chosen": chosen,
        "rejected": rejected,
        **more,
        **told,
        "models": dict(models),
        "winner": "a" if a_wins else "b",
    }


def write_pairs(out: Path, duels: Sequence[Duel], scored: Scored, models: Mapping[str, str]) -> int:
    """Write what the reward prefers as preference data, but for ties and empty answers; return how many pairs."""
    n = 0
    with staged_file(out) as partial, partial.open("w", encoding="utf-8") as file:
        for duel, a, b in zip(duels, scored.a, scored.b, strict=True):
            if duel.foregone is None and a != b:
                record = pair_record(duel, a_wins=a > b, models=models, rewards={"a": a, "b": b})
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                n += 1
    return n
