"""Dialogues under a standing instruction: who says what, and whether an answer obeys.

    dialogues      {"messages", "language"?}                of which the user's turns are taken
    instructions   {"text", "language"?, ...}               what else they say is for the judge

An instruction stands over a dialogue of its own language, where both say one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llama2.align.lessons import read_records
from llama2.data.dialogues.formats import Record
from llama2.data.dialogues.prompts import read_prompts
from llama2.data.storyworld.instructions import obeys, read_instruction
from llama2.errors import ConfigError, DataError

Check = Callable[[Mapping[str, Any], str], bool]
"""Says of an instruction's record and an answer whether it obeys."""
WORLD = "world"
UNSPACED = ("zh", "ja", "th")
"""Languages that put no blank between sentences."""


@dataclass(frozen=True)
class Dialogue:
    """What a user asks, turn by turn."""

    questions: tuple[str, ...]
    system: str
    language: str | None


@dataclass(frozen=True)
class Instructed:
    """A dialogue, and what stands over it."""

    questions: tuple[str, ...]
    system: str
    instruction: Record

    @property
    def in_every(self) -> tuple[str, ...]:
        """The questions, the instruction before each."""
        return tuple(self._under(question) for question in self.questions)

    @property
    def in_first(self) -> tuple[str, ...]:
        """The questions, the instruction before the first."""
        return (self._under(self.questions[0]), *self.questions[1:])

    def _under(self, question: str) -> str:
        gap = "" if self.instruction.get("language") in UNSPACED else " "
        return self.instruction["text"].strip() + gap + question


def read_dialogues(paths: Sequence[Path], console: Console) -> list[Dialogue]:
    """Return the dialogues of files, without those of one question and those that have an instruction already."""
    found, n_single, n_own = [], 0, 0
    for asked in (each for path in paths for each in read_prompts(path)):
        questions = tuple(message.content for message in asked.messages if message.role == "user")
        if asked.record.get("instruction") and "output" not in asked.record:
            n_own += 1
        elif len(questions) < 2:
            n_single += 1
        else:
            system = asked.messages[0].content if asked.messages[0].role == "system" else ""
            found.append(Dialogue(questions, system, asked.record.get("language")))
    names = ", ".join(map(str, paths))
    if not found:
        raise DataError(
            f"{names} holds no dialogue to carry on: {n_single} have no second turn, {n_own} have an instruction of "
            "their own; an instruction can be forgotten from the second question on, so give dialogues of two and more"
        )
    console.print(
        f"{names}: {len(found):,} dialogues, {n_own:,} left out (an instruction of their own), {n_single:,} left out "
        "(no second turn)",
        markup=False,
    )
    return found


def read_instructions(path: Path) -> list[Record]:
    """Return the records of a file of instructions. Raises DataError for one without a text."""
    found = []
    for where, record in read_records(path):
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: 'text' is {text!r}, wanted an instruction: write it, or take the record out")
        found.append(record)
    return found


def instructed(dialogues: Sequence[Dialogue], instructions: Sequence[Record], *, seed: int) -> list[Instructed]:
    """Return each dialogue under an instruction of its language, drawn evenly. Raises DataError where there is none."""
    fitting = {
        language: [each for each in instructions if language is None or each.get("language") in (None, language)]
        for language in {each.language for each in dialogues}
    }
    missing = next((language for language, some in fitting.items() if not some), None)
    if missing is not None:
        n = sum(each.language == missing for each in dialogues)
        raise DataError(
            f"no instruction is in the language {missing!r}, which {n} dialogues are in; add some, or leave these out"
        )
    draws = np.random.default_rng((seed, 5)).random(len(dialogues))
    return [
        Instructed(each.questions, each.system, fitting[each.language][int(draw * len(fitting[each.language]))])
        for each, draw in zip(dialogues, draws, strict=True)
    ]


def check_of(spec: str | None, instructions: Sequence[Record]) -> Check | None:
    """Return the judge that a setting names; without one the story world's where it can judge, or None.

    Raises ConfigError.
    """
    is_known = all("kinds" in each and "answers_in" in each for each in instructions)
    if spec is None and not is_known:
        return None
    if spec in (None, WORLD):
        if not is_known:
            raise ConfigError(f"judge={WORLD} judges instructions of the story world (instructions.jsonl) only")
        return lambda instruction, answer: obeys(answer, read_instruction(instruction))
    module, _, name = spec.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"judge={spec} cannot be imported: {error}; wanted {WORLD}, or MODULE:FUNCTION on the Python path"
        ) from None
    if not callable(found):
        raise ConfigError(f"judge={spec} is a {type(found).__name__}, not a function")
    return lambda instruction, answer: bool(found(instruction, answer))
