"""One question about a story, and its right answer: what conversations are made of.

The questions are those of `tasks.py` in several wordings, some more, and without end such as are answered by yes or
no. The user may speak one language and be answered in another.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from llama2.data.storyworld.instructions import Instruction, dressed
from llama2.data.storyworld.stories import Story, cast, character, other_facts, phrases, spot, thing
from llama2.data.storyworld.tasks import Task, outcome, questions
from llama2.data.storyworld.words import LANGUAGES, Language, others, table


@dataclass(frozen=True)
class Turn:
    """One question about a story, and its right answer before any instruction changes its looks."""

    task: str
    """story, one of TASKS, check (yes or no) or thanks."""
    about: str
    """Of a story: what the question fixes, as slots ("ht": hero and thing); of an answer: the name of the question."""
    language: Language
    """Of the answer."""
    question: str
    answer: str
    story: Story
    standing: Instruction | None = None

    @property
    def reply(self) -> str:
        """The right answer as the standing instruction wants it."""
        return dressed(self.answer, self.standing)


def request(
    rng: random.Random, told: Story, speaks: Language, answers_in: Language, standing: Instruction | None
) -> Turn:
    """Return the wish for a story, which may fix who, what or where."""
    about, rows = rng.choice(list(table("dialogues")["requests"].items()))
    question = rng.choice(rows)[speaks].format_map(cast(told.facts, speaks))
    return Turn("story", about, answers_in, question, told.text(answers_in), told, standing)


def later_questions(
    rng: random.Random,
    told: Story,
    speaks: Language,
    answers_in: Language,
    standing: Instruction | None,
    *,
    may_translate: bool,
) -> Iterator[Turn]:
    """Yield what can be asked about a story in random order, then without end what is answered by yes or no."""

    def turn(task: str, about: str, question: str, answer: str, language: Language = answers_in) -> Turn:
        return Turn(task, about, language, question, answer, told, standing)

    pool = []
    for task in ("title", "summarise", "sentiment"):
        wording = [table("tasks")["instructions"][task], *table("dialogues")["wording"][task]]
        pool.append(turn(task, "", rng.choice(wording)[speaks], outcome(told, answers_in, task)))
    answers = {about: answer for about, _, answer in questions_about(told, answers_in)}
    pool += [turn("answer", about, question, answers[about]) for about, question, _ in questions_about(told, speaks)]
    pool += [turn("check", *each) for each in [_check(rng, told, speaks, answers_in) for _ in range(4)]]
    if may_translate:
        target = rng.choice(others(speaks))
        said = table("tasks")["instructions"]["translate"][speaks][target]
        pool.append(turn("translate", "", said, told.text(target), target))
    rng.shuffle(pool)
    yield from pool
    while True:
        yield turn("check", *_check(rng, told, speaks, answers_in))


def turn_of(task: Task, told: Story) -> Turn:
    """Return a task about a story as a turn, so that an answer to it can be judged."""
    names = {question: name for name, question, _ in questions_about(told, task.language)}
    targets: list[Language] = [each for each in LANGUAGES if task.output in phrases(told, each)]
    language = targets[0] if task.task == "translate" else task.language
    return Turn(task.task, names.get(task.instruction, ""), language, task.instruction, task.output, told)


def questions_about(told: Story, language: Language) -> Iterator[tuple[str, str, str]]:
    """Yield (name, question, answer) of all that can be asked about a story, that of `tasks.toml` first."""
    rows = table("tasks")["questions"]
    yield from ((row["about"], *pair) for row, pair in zip(rows, questions(told, language), strict=True))
    words = cast(told.facts, language)
    for row in table("dialogues")["questions"]:
        yield row["about"], row["ask"][language].format_map(words), row["answer"][language].format_map(words)


def _check(rng: random.Random, told: Story, speaks: Language, answers_in: Language) -> tuple[str, str, str]:
    """Return (name, question, answer) of something to be answered by yes or no, each as often."""
    about = rng.choice(list(table("dialogues")["checks"]))
    shown = told.facts if rng.random() < 0.5 else other_facts(rng, told.facts)
    facts = told.facts
    name, kind = {
        "kind": (facts.hero[0], shown.hero[1]),
        "friend_kind": (facts.friend[0], shown.friend[1]),
        "hero": (shown.hero[0], shown.hero[1]),
    }.get(about, shown.friend)
    filled = cast(facts, speaks) | {
        "x": character(name, kind, speaks),
        "u": thing(*shown.thing, speaks),
        "q": spot(shown.place, speaks),
    }
    answer = table("dialogues")["yes_no"]["yes" if shown == facts else "no"][answers_in]
    return about, table("dialogues")["checks"][about][speaks].format_map(filled), answer
