"""Pages of school readers: what a web crawl holds besides stories, as plain text to pretrain on.

    exercise      a question, a story, the answer, and then more questions with their answers
    quick ones    a question, the beginning of a story and the answer, a few times
    phrase book   sentences in one language, and below each pair of them the same in another
    vocabulary    names, things and places in one language, and below each the same in another

The first line says which it is, so that a text that begins as a story is nothing but a story. No two phrases of a book
are about the same people and things: in a story told twice nearly everything can be known from what came before in the
same language, and nobody learns to translate from it.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

from llama2.data.storyworld.stories import Story, cast, other_facts, passages, split_of
from llama2.data.storyworld.tasks import PASSAGE, outcome, questions
from llama2.data.storyworld.words import LANGUAGES, Language, table

PAIRS = tuple(itertools.permutations(LANGUAGES, 2))
IN_THE_OPENING = 4
"""Questions, the first of `tasks.toml`, that the first two sentences answer."""
N_QUICK = 4
N_WORDS = 16


def page(story: Story, index: int) -> str:
    """Return the page of a story; kinds, languages and pairs take turns."""
    turn = index // 2
    if index % 2:
        which, is_quick = divmod(turn // len(LANGUAGES), 2)
        asked = quick_exercises if is_quick else exercise
        return asked(story, LANGUAGES[turn % len(LANGUAGES)], which)
    first, second = PAIRS[turn % len(PAIRS)]
    written = vocabulary if turn // len(PAIRS) % 3 == 2 else phrase_book
    return written(story, first, second)


def exercise(story: Story, language: Language, which: int) -> str:
    """Return a story with everything that can be asked about it, and the answers.

    One question stands above the story, as it will in a task: to read with a question in mind is another skill than to
    look back.
    """
    rows = table("tasks")
    pairs = [*questions(story, language)]
    pairs += [(rows["instructions"][task][language], outcome(story, language, task)) for task in ("title", "sentiment")]
    question, answer = pairs.pop(which % len(pairs))
    head = [rows["readers"]["exercise"][language], question, story.text(language), answer]
    return "\n".join([*head, *itertools.chain.from_iterable(pairs)])


def quick_exercises(story: Story, language: Language, which: int) -> str:
    """Return what the first two sentences answer: each time a question, the sentences about others, and the answer."""
    rows = table("tasks")
    lines = [rows["readers"]["exercise"][language]]
    for n, other in enumerate(itertools.islice(retold(story), N_QUICK), which):
        pairs = [*questions(other, language)][:IN_THE_OPENING]
        pairs.append((rows["instructions"]["title"][language], other.title(language)))
        question, answer = pairs[n % len(pairs)]
        lines += [question, other.opening(language), answer]
    return "\n".join(lines)


def phrase_book(story: Story, first: Language, second: Language) -> str:
    """Return the passages of a story, each as if it were told of others, in two languages."""
    told = list(itertools.islice(retold(story), len(passages(story, first, PASSAGE))))
    sides = [[passages(each, language, PASSAGE)[n] for n, each in enumerate(told)] for language in (first, second)]
    return _page(first, second, zip(*sides, strict=True))


def vocabulary(story: Story, first: Language, second: Language) -> str:
    """Return words in two languages, about as many of each kind."""
    entries = itertools.cycle([*table("tasks")["readers"]["words"], table("sentences")["title"]])
    told = itertools.islice(zip(entries, retold(story), strict=False), N_WORDS)
    pairs = ([entry[each].format_map(cast(other.facts, each)) for each in (first, second)] for entry, other in told)
    return _page(first, second, pairs)


def retold(story: Story) -> Iterator[Story]:
    """Yield the story without end, each time about others, and never about a cast of the other split."""
    rng = random.Random(f"readers/{story}")
    while True:
        facts = other_facts(rng, story.facts)
        if split_of(facts) == split_of(story.facts):
            yield replace(story, facts=facts)


def _page(first: Language, second: Language, pairs: Iterator) -> str:
    names = table("tasks")["readers"]["languages"]
    return "\n".join([f"{names[first]} - {names[second]}", *itertools.chain.from_iterable(pairs)])
