"""Prompts to answer, each with an exact judge: what a model that is being aligned is asked.

Of the conversations of `dialogues.py` one turn is to be answered, after what was said before it; a quarter of the
prompts are requests of `safety.py`, unsafe and borderline ones. Preference pairs are about the same kind of prompts,
never about the same ones.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama2.chat import Conversation, Message
from llama2.data.storyworld.answers import grade_answer
from llama2.data.storyworld.dialogues import dialogue, record as dialogue_record, turns_of
from llama2.data.storyworld.preferences import N_TURNS, SAFE_SHARE
from llama2.data.storyworld.safety import SafetyRequest, grade_safety, safety_request
from llama2.data.storyworld.stories import Split
from llama2.data.storyworld.turns import Turn
from llama2.data.storyworld.words import Language

APART = 1_000_000
"""Questions begin so many stories after those of the other files of a world."""


@dataclass(frozen=True)
class Question:
    """A prompt, and by what an answer to it is judged."""

    prompt: Conversation
    asked: Turn | SafetyRequest
    line: dict[str, Any]
    """As a record of JSON."""

    @property
    def language(self) -> Language:
        return self.asked.language

    @property
    def kind(self) -> str:
        """story, title, answer and so on; unsafe or borderline."""
        if isinstance(self.asked, Turn):
            return self.asked.task
        return "unsafe" if self.asked.is_unsafe else "borderline"

    @property
    def right_answer(self) -> str:
        return self.asked.reply if isinstance(self.asked, Turn) else self.asked.answer

    def grade(self, answer: str) -> float:
        """Return how good an answer is, from 0 to 1; blanks around it do not count."""
        text = answer.strip()
        return (
            grade_answer(text, self.asked).score
            if isinstance(self.asked, Turn)
            else grade_safety(text, self.asked).score
        )


def question(seed: int, index: int, *, split: Split = "train") -> Question:
    """Return the index-th prompt of a world; the same arguments give the same prompt."""
    rng = random.Random(f"question/{seed}/{split}/{index}")
    if rng.random() < SAFE_SHARE:
        found = safety_request(seed, APART + index, split=split)
        return _about_safety(found)
    talk = dialogue(seed, APART + index, split=split, n_turns=rng.randint(*N_TURNS))
    which = 0 if rng.random() < 0.3 else rng.randrange(len(talk.turns))
    messages = talk.messages()
    before = len(messages) - 2 * (len(talk.turns) - which) + 1
    grading = dialogue_record(talk)["grading"]
    line = {
        "prompt": [asdict(message) for message in messages[:before]],
        "kind": "helpful",
        "language": talk.language,
        "grading": {**grading, "turns": [grading["turns"][which]]},
    }
    return Question(messages[:before], talk.turns[which], line)


def _about_safety(found: SafetyRequest) -> Question:
    line = {
        "prompt": [asdict(message) for message in found.prompt],
        "kind": "safe" if found.is_unsafe else "helpful",
        "language": found.language,
        "is_unsafe": found.is_unsafe,
        "grading": {"request": asdict(replace(found, prompt=()))},
    }
    return Question(found.prompt, found, line)


def questions(seed: int, n: int, *, split: Split = "train") -> Iterator[Question]:
    """Yield the first n prompts of a world."""
    return (question(seed, index, split=split) for index in range(n))


def read_question(line: Mapping[str, Any]) -> Question:
    """Return a question from its record. Raises KeyError or TypeError for a record that is none."""
    prompt = tuple(Message(**message) for message in line["prompt"])
    request = line["grading"].get("request")
    if request is not None:
        return Question(prompt, SafetyRequest(**{**request, "prompt": prompt}), dict(line))
    return Question(prompt, turns_of(line)[0], dict(line))


def judge(questions: Sequence[Question]) -> Callable[[Sequence[Conversation], Sequence[str]], list[float]]:
    """Return the exact reward of answers to these questions, 0 to 1."""
    known = {each.prompt: each for each in questions}

    def reward(conversations: Sequence[Conversation], answers: Sequence[str]) -> list[float]:
        return [known[asked].grade(answer) for asked, answer in zip(conversations, answers, strict=True)]

    return reward
