"""Conversations about a story: somebody asks for it, or tells it, and then asks what it was about.

Half a dozen turns or up to MAX_TURNS short ones, in one of three languages, with or without a system message, some
under a standing instruction. The right answer to each turn is known. `record` is a line of the file that people
bring themselves, `{"messages": [{"role", "content"}]}`, with what a judge needs beside it.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama2.chat import Conversation, Message
from llama2.data.storyworld.instructions import Instruction, instruction
from llama2.data.storyworld.stories import Facts, Split, Story, separator, story
from llama2.data.storyworld.turns import Turn, later_questions, request
from llama2.data.storyworld.words import LANGUAGES, Language, table
from llama2.errors import Llama2Error

MAX_TURNS = 40
SHORT = 6
"""With more turns nothing is translated and an instruction has one part, so that twenty are short.

They then take 750 tokens of a vocabulary of 2,048 on average, and 996 in 1,000 fit into 1,024.
"""


@dataclass(frozen=True)
class Dialogue:
    """Turns about one story."""

    language: Language
    """What the user speaks."""
    turns: tuple[Turn, ...]
    system: str
    standing: Instruction | None
    is_in_system: bool
    """The instruction stands in the system message, not in the first question."""

    def messages(self, *, with_instruction: bool = True) -> Conversation:
        """Return the conversation; the instruction stands only at its beginning, or nowhere."""
        said = self.standing.text if self.standing and with_instruction else ""
        gap = separator(self.language)
        system = gap.join(filter(None, (self.system, said if self.is_in_system else "")))
        found = [Message("system", system)] if system else []
        for i, turn in enumerate(self.turns):
            first = said if i == 0 and not self.is_in_system else ""
            found.append(Message("user", gap.join(filter(None, (first, turn.question)))))
            found.append(Message("assistant", turn.reply))
        return tuple(found)


def dialogue(
    seed: int, index: int, *, split: Split = "train", language: Language | None = None, n_turns: int | None = None
) -> Dialogue:
    """Return the index-th dialogue of a world; the same arguments give the same dialogue.

    `language` goes round if not given; `n_turns` is 1 to MAX_TURNS, drawn from 2 to SHORT if not given.
    """
    check_turns(n_turns)
    rng = random.Random(f"dialogue/{seed}/{split}/{index}")
    told, speaks = story(seed, index, split=split), language or LANGUAGES[index % len(LANGUAGES)]
    n = n_turns or rng.randint(2, SHORT)
    standing = instruction(rng, speaks, may_combine=n <= SHORT) if rng.random() < 0.4 else None
    system = rng.choice(table("dialogues")["systems"])[speaks] if rng.random() < 0.3 else ""
    is_in_system = standing is not None and rng.random() < 0.3
    turns = _turns(rng, told, speaks, standing, n)
    return Dialogue(speaks, tuple(turns), system, standing, is_in_system)


def check_turns(n_turns: int | None) -> None:
    """Raise Llama2Error unless a dialogue can have so many turns."""
    if n_turns is not None and not 1 <= n_turns <= MAX_TURNS:
        raise Llama2Error(f"n_turns={n_turns} must be 1 to {MAX_TURNS}: a story has no more to ask about")


def dialogues(seed: int, n: int, *, split: Split = "train", n_turns: int | None = None) -> Iterator[Dialogue]:
    """Yield the first n dialogues of a world."""
    return (dialogue(seed, index, split=split, n_turns=n_turns) for index in range(n))


def _turns(rng: random.Random, told: Story, speaks: Language, standing: Instruction | None, n: int) -> list[Turn]:
    answers_in = standing.answers_in if standing else speaks
    first = request(rng, told, speaks, answers_in, standing)
    later = later_questions(rng, told, speaks, answers_in, standing, may_translate=n <= SHORT and standing is None)
    turns, asked = [first], {first.question}
    if rng.random() < 0.3:  # the user tells the story, and asks at once
        one = next(later)
        asked.add(one.question)
        text = rng.choice(table("dialogues")["given"])[speaks] + told.text(speaks) + separator(speaks) + one.question
        turns = [replace(one, question=text)]
    while len(turns) < n:
        turn = next(later)
        if turn.question not in asked:
            asked.add(turn.question)
            turns.append(turn)
    if n > 2 and rng.random() < 0.3:
        row = table("dialogues")["thanks"]
        turns[-1] = Turn("thanks", "", answers_in, row["say"][speaks], row["answer"][answers_in], told, standing)
    return turns


def record(found: Dialogue) -> dict[str, Any]:
    """Return a dialogue as a line of JSON: what one trains on, and under "grading" what a judge needs."""
    return {
        "messages": [asdict(message) for message in found.messages()],
        "language": found.language,
        "instruction": found.standing.text if found.standing else "",
        "grading": {
            "story": asdict(found.turns[0].story),
            "standing": asdict(found.standing) if found.standing else None,
            "turns": [
                {"task": turn.task, "about": turn.about, "language": turn.language, "question": turn.question,
                 "answer": turn.answer}
                for turn in found.turns
            ],
        },
    }  # fmt: skip


def turns_of(line: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Return the turns of a record that was read back, ready for the judge."""
    grading = line["grading"]
    facts = grading["story"]["facts"]
    pairs = {name: tuple(facts[name]) for name in ("hero", "friend", "thing")}
    told = Story(Facts(**{**facts, **pairs}), tuple((beat, which) for beat, which in grading["story"]["beats"]))
    standing = grading["standing"]
    if standing is not None:
        standing = Instruction(**{**standing, "kinds": tuple(standing["kinds"])})
    return tuple(Turn(**turn, story=told, standing=standing) for turn in grading["turns"])
