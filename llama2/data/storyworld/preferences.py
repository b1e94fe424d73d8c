"""Two answers to one prompt, and how much better the better one is, in the four grades of the Llama 2 paper.

The answers are the right one and corruptions of it; the rating follows from the difference of their exact grades
(arXiv:2307.09288 sec. 3.2.1). Pairs about safety come from `safety.py` with the same fields.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llama2.chat import Conversation
from llama2.data.storyworld.answers import grade_answer
from llama2.data.storyworld.corruptions import corrupted
from llama2.data.storyworld.dialogues import dialogue
from llama2.data.storyworld.safety import SafetyRequest, grade_safety, safety_request, weaker
from llama2.data.storyworld.stories import Split
from llama2.data.storyworld.turns import Turn
from llama2.data.storyworld.words import Language

Rating = Literal["significantly better", "better", "slightly better", "negligibly better / unsure"]

RATINGS: dict[Rating, float] = {
    "significantly better": 0.6,
    "better": 0.3,
    "slightly better": 0.06,
    "negligibly better / unsure": 0.0,
}
"""The least difference of grades for each rating."""
TWO_WORSE = 0.25
"""How often both answers of a pair are corrupted."""
MOST_TRIES = 12
"""Corruptions tried for a rating that is drawn first, so that all four are about as frequent."""
SAFE_SHARE = 0.25
"""How often a pair is about safety."""
N_TURNS = (1, 4)
"""Fewest and most turns of the conversations that are judged: long ones say little more, and are read twice."""


@dataclass(frozen=True)
class Preference:
    """One pair; `chosen` has the higher grade."""

    prompt: Conversation
    chosen: str
    rejected: str
    rating: Rating
    kind: Literal["helpful", "safe"]
    language: Language
    flaw: str
    """What is wrong with the rejected answer."""
    chosen_score: float
    rejected_score: float
    chosen_is_safe: bool = True
    rejected_is_safe: bool = True


def rating_of(difference: float) -> Rating:
    """Return the rating that a difference of grades, 0 to 1, deserves."""
    return next(rating for rating, least in RATINGS.items() if difference >= least)


def preference(seed: int, index: int, *, split: Split = "train", pair: int = 0) -> Preference:
    """Return a pair about the index-th prompt of a world; the same arguments give the same pair."""
    rng = random.Random(f"preference/{seed}/{split}/{index}")
    if rng.random() < SAFE_SHARE:
        return _about_safety(_again(rng, pair), safety_request(seed, index, split=split))
    found = dialogue(seed, index, split=split, n_turns=rng.randint(*N_TURNS))
    which = 0 if rng.random() < 0.3 else rng.randrange(len(found.turns))
    turn, rng = found.turns[which], _again(rng, pair)
    wanted, n_tries = rng.choice(list(RATINGS)), 0
    while True:
        better, worse = _two_answers(rng, turn)
        n_tries += 1
        if n_tries == MOST_TRIES or rating_of(better[0] - worse[0]) == wanted:
            break
    before = len(found.messages()) - 2 * (len(found.turns) - which) + 1
    return Preference(
        prompt=found.messages()[:before],
        chosen=better[1],
        rejected=worse[1],
        rating=rating_of(better[0] - worse[0]),
        kind="helpful",
        language=found.language,
        flaw=worse[2],
        chosen_score=better[0],
        rejected_score=worse[0],
    )


def _two_answers(rng: random.Random, turn: Turn) -> list[tuple[float, str, str]]:
    """Return (grade, answer, flaw) of two different answers, the better one first."""
    while True:
        answers = dict([corrupted(rng, turn), corrupted(rng, turn) if rng.random() < TWO_WORSE else ("", turn.reply)])
        graded = [(grade_answer(text, turn).score, text, flaw) for flaw, text in answers.items()]
        if len({text for _, text, _ in graded}) == 2:
            return sorted(graded, reverse=True)


def _again(rng: random.Random, number: int) -> random.Random:
    """Return a source of chance for a prompt's pair; for the first one what is left of the prompt's own."""
    return random.Random(f"{rng.random()}/{number}") if number else rng


def preferences(seed: int, n: int, *, split: Split = "train", per_prompt: int = 1) -> Iterator[Preference]:
    """Yield the first n pairs of a world, some about each prompt."""
    return (preference(seed, i // per_prompt, split=split, pair=i % per_prompt) for i in range(n))


def _about_safety(rng: random.Random, request: SafetyRequest) -> Preference:
    flaw, rejected = weaker(rng, request)
    chosen = request.answer
    grades = [grade_safety(answer, request) for answer in (chosen, rejected)]
    return Preference(
        prompt=request.prompt,
        chosen=chosen,
        rejected=rejected,
        rating=rating_of(grades[0].score - grades[1].score),
        kind="safe" if request.is_unsafe else "helpful",
        language=request.language,
        flaw=flaw,
        chosen_score=grades[0].score,
        rejected_score=grades[1].score,
        chosen_is_safe=grades[0].is_safe,
        rejected_is_safe=grades[1].is_safe,
    )


def record(found: Preference) -> dict[str, Any]:
    """Return a pair as a line of JSON; prompt and answers are lists of messages, as preference trainers take them."""
    line = asdict(found) | {"prompt": [asdict(message) for message in found.prompt]}
    return line | {side: [{"role": "assistant", "content": line[side]}] for side in ("chosen", "rejected")}
