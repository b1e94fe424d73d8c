"""What a story can teach besides itself: titles, summaries, questions, moods, and phrases to translate.

Every record is the instruction format that people bring themselves, `{instruction, input, output, history}`, with the
task and the language beside it. Answers follow from the facts, so they can be graded exactly.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama2.data.storyworld.stories import Story, cast, phrases
from llama2.data.storyworld.words import LANGUAGES, Language, table

TASKS = ("title", "summarise", "answer", "sentiment", "translate")
SHARES = (1, 1, 5, 2, 40)
"""How often each task is drawn to learn from: there are seven questions to one title, six pairs of languages, and
answers and moods are a word or two, of which there is little to learn at a time. All but translations then come in
threes."""
N_BEFORE = 2
"""Other tasks asked about a story before the one that is drawn: most of what is read is then read once for three."""
FROM_ENGLISH: dict[Language, float] = {"en": 0.0, "es": 0.2, "zh": 0.8}
"""How often a translation of a story is one from English into its language: to Chinese is learnt last of all
(docs/log.md)."""


@dataclass(frozen=True)
class Task:
    """One thing to do with a story, and the right outcome."""

    task: str
    language: Language
    """Of the instruction; a translation's output is in another."""
    instruction: str
    input: str
    """The story or the phrase; empty where the story stands in the history."""
    output: str
    history: tuple[tuple[str, str], ...] = ()
    """What was asked about the same story before, and answered."""


def tasks(story: Story, language: Language) -> Iterator[Task]:
    """Yield everything that can be asked about a story in a language, and a phrase to put into each other language.

    A quarter of the phrases are titles, a quarter summaries, and the others sentences.
    """
    said = table("tasks")["instructions"]
    text = story.text(language)
    for task in ("title", "summarise", "sentiment"):
        yield Task(task, language, said[task][language], text, outcome(story, language, task))
    for question, answer in questions(story, language):
        yield Task("answer", language, question, text, answer)
    for target in LANGUAGES:
        if target != language:
            rng = random.Random(f"phrase/{story}/{language}/{target}")
            pairs = list(zip(phrases(story, language), phrases(story, target), strict=True))
            source, result = rng.choice([*pairs[:2], *rng.sample(pairs[2:], 2)])
            yield Task("translate", language, said["translate"][language][target], source, result)


def outcome(story: Story, language: Language, task: str) -> str:
    """Return the right title, summary or sentiment of a story."""
    if task == "title":
        return story.title(language)
    if task == "summarise":
        return story.summary(language)
    return table("tasks")["sentiments"]["good" if story.facts.is_good else "bad"][language]


def questions(story: Story, language: Language) -> Iterator[tuple[str, str]]:
    """Yield questions about a story with their answers."""
    words = cast(story.facts, language)
    plot = table("sentences")["plots"][story.facts.plot]["name"]
    for row in table("tasks")["questions"]:
        keys = ("answer", f"answer_{'good' if story.facts.is_good else 'bad'}", f"answer_{plot}")
        answer = next(row[key] for key in keys if key in row)
        yield row["ask"][language].format_map(words), answer[language].format_map(words)


def a_task(story: Story, language: Language, *, seed: int) -> Task:
    """Return one task to be judged by, of each kind as often."""
    rng = random.Random(f"task/{seed}/{language}")
    kind = rng.choice(TASKS)
    return rng.choice([task for task in tasks(story, language) if task.task == kind])


def lesson(story: Story, language: Language, *, seed: int) -> Task:
    """Return one task to learn from, of the kinds as often as `SHARES` says.

    Of translations some are from English; the others are asked after `N_BEFORE` tasks about the same story.
    """
    rng = random.Random(f"task/{seed}/{language}")
    kind = rng.choices(TASKS, SHARES)[0]
    if kind == "translate" and rng.random() < FROM_ENGLISH[language]:
        said = table("tasks")["instructions"]["translate"]["en"][language]
        return next(task for task in tasks(story, "en") if task.instruction == said)
    every = list(tasks(story, language))
    drawn = rng.choice([task for task in every if task.task == kind])
    if kind == "translate":
        return drawn
    others = [task for task in every if task.task != "translate" and task != drawn]
    share = dict(zip(TASKS, SHARES, strict=True))
    before: list[Task] = []
    while len(before) < N_BEFORE:
        kind = rng.choices(TASKS[:-1], [share[each] for each in TASKS[:-1]])[0]
        found = [task for task in others if task.task == kind and task not in before]
        before += [rng.choice(found)] if found else []
    return after(before, drawn)


def after(before: list[Task], task: Task) -> Task:
    """Return a task that is asked after others about the same story, whose text stands in the first question alone."""
    asked = [f"{before[0].instruction}\n{before[0].input}", *(each.instruction for each in before[1:])]
    return replace(task, input="", history=tuple(zip(asked, (each.output for each in before), strict=True)))


def record(task: Task) -> dict[str, Any]:
    """Return a task as a line of JSON; without a history where there is none."""
    line = asdict(task)
    return line if task.history else {key: value for key, value in line.items() if key != "history"}
