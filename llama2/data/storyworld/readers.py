"""Pages of school readers: what a web crawl holds besides stories, as plain text to pretrain on.

    exercise      a story, and below it questions with their answers
    translation   a story in one language, then all of it in another
    side by side  a story in two languages, each sentence in the one and below it in the other

The first line says which it is, so that a text that begins as a story is nothing but a story.
"""

import itertools

from llama2.data.storyworld.stories import Story
from llama2.data.storyworld.tasks import outcome, questions
from llama2.data.storyworld.words import LANGUAGES, Language, table

PAIRS = tuple(itertools.permutations(LANGUAGES, 2))


def page(story: Story, index: int) -> str:
    """Return the page of a story; kinds, languages and pairs take turns."""
    turn = index // 2
    if index % 2:
        return exercise(story, LANGUAGES[turn % len(LANGUAGES)])
    first, second = PAIRS[turn % len(PAIRS)]
    written = side_by_side if turn // len(PAIRS) % 3 == 2 else translation
    return written(story, first, second)


def exercise(story: Story, language: Language) -> str:
    """Return a story with everything that can be asked about it, and the answers."""
    rows = table("tasks")
    asked = [(rows["instructions"][task][language], outcome(story, language, task)) for task in ("title", "sentiment")]
    lines = [f"{question}\n{answer}" for question, answer in (*questions(story, language), *asked)]
    return "\n".join([rows["readers"]["exercise"][language], story.text(language), *lines])


def translation(story: Story, first: Language, second: Language) -> str:
    return "\n".join([_header(first, second), story.text(first), story.text(second)])


def side_by_side(story: Story, first: Language, second: Language) -> str:
    """Return a story in two languages, sentence under sentence."""
    pairs = zip(*map(story.sentences, (first, second)), strict=True)
    return "\n".join([_header(first, second), *(f"{one}\n{other}" for one, other in pairs)])


def _header(first: Language, second: Language) -> str:
    names = table("tasks")["readers"]["languages"]
    return f"{names[first]} - {names[second]}"
