"""Pages of school readers: what a web crawl holds besides stories, as plain text to pretrain on.

    exercise      a question, a story, the answer, and then more questions with their answers
    quick ones    a question, the beginning of a story and who comes then, and the answer, a few times
    phrase book   titles, summaries and sentences in one language, and below each the same in the others
    vocabulary    names, things and places in one language, and below each the same in the others

The first line says which it is, so that a text that begins as a story is nothing but a story. No two phrases of a book
are about the same people and things: in a story told twice nearly everything can be known from what came before in the
same language, and nobody learns to translate from it.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from llama2.data.storyworld.stories import Story, cast, other_facts, phrases, separator, split_of
from llama2.data.storyworld.tasks import outcome
from llama2.data.storyworld.turns import questions_about
from llama2.data.storyworld.words import LANGUAGES, Language, table

ORDERS = tuple(itertools.permutations(LANGUAGES))
"""In which the languages of a phrase book stand; each follows each other in two of them."""
QUICK = ("kind", "place", "friend_kind", "thing", "title", "friend_kind", "kind", "quality", "hero", "owner")
"""What three sentences answer; whose kind is whose is the hardest to learn, and asked more often."""
ITEM = "\n- "
"""Before a line, so that its first word is spelled as words are within a text, and as in an answer.

What a phrase book puts into other languages has none, as what is to be translated in a task has none."""
N_QUICK = 5
N_PHRASES = 7
N_WORDS = 16


def page(story: Story, index: int) -> str:
    """Return the page of a story; kinds, languages and their orders take turns."""
    turn = index // 2
    if index % 2:
        which, is_quick = divmod(turn // len(LANGUAGES), 2)
        asked = quick_exercises if is_quick else exercise
        return asked(story, LANGUAGES[turn % len(LANGUAGES)], which)
    written = vocabulary if turn // len(ORDERS) % 2 else phrase_book
    return written(story, ORDERS[turn % len(ORDERS)])


def exercise(story: Story, language: Language, which: int) -> str:
    """Return a story with everything that can be asked about it, and the answers.

    One question stands above the story, as it will in a task: to read with a question in mind is another skill than to
    look back.
    """
    rows = table("tasks")
    pairs = [(question, answer) for _, question, answer in questions_about(story, language)]
    pairs += [(rows["instructions"][task][language], outcome(story, language, task)) for task in ("title", "sentiment")]
    question, answer = pairs.pop(which % len(pairs))
    head = [rows["readers"]["exercise"][language], question, story.text(language), answer]
    return ITEM.join([*head, *itertools.chain.from_iterable(pairs)])


def quick_exercises(story: Story, language: Language, which: int) -> str:
    """Return what three sentences answer: each time a question, the sentences about others, and the answer."""
    rows = table("tasks")
    lines = [rows["readers"]["exercise"][language]]
    for n, other in enumerate(itertools.islice(retold(story), N_QUICK), N_QUICK * which):
        answers = {about: pair for about, *pair in questions_about(other, language)}
        answers["title"] = [rows["instructions"]["title"][language], other.title(language)]
        question, answer = answers[QUICK[n % len(QUICK)]]
        lines += [question, separator(language).join([other.opening(language), arrival(other, language)]), answer]
    return ITEM.join(lines)


def arrival(story: Story, language: Language) -> str:
    """Return the sentence in which the friend comes."""
    return story.sentences(language)[[beat for beat, _ in story.beats].index("arrive")]


def phrase_book(story: Story, order: Sequence[Language]) -> str:
    """Return phrases of a story, each as if it were told of others, in one language after the other."""
    n_all = len(phrases(story, order[0]))
    shuffled = random.Random(f"phrases/{story}").sample(range(n_all), n_all)
    chosen = itertools.islice(itertools.cycle(shuffled), N_PHRASES)
    told = zip(chosen, retold(story), strict=False)
    return _page(order, ([phrases(each, language)[n] for language in order] for n, each in told))


def vocabulary(story: Story, order: Sequence[Language]) -> str:
    """Return words in one language after the other, about as many of each kind."""
    entries = itertools.cycle([*table("tasks")["readers"]["words"], table("sentences")["title"]])
    told = itertools.islice(zip(entries, retold(story), strict=False), N_WORDS)
    return _page(order, ([entry[each].format_map(cast(other.facts, each)) for each in order] for entry, other in told))


def retold(story: Story) -> Iterator[Story]:
    """Yield the story without end, each time about others, and never about a cast of the other split."""
    rng = random.Random(f"readers/{story}")
    while True:
        facts = other_facts(rng, story.facts)
        if split_of(facts) == split_of(story.facts):
            yield replace(story, facts=facts)


def _page(order: Sequence[Language], phrases_in_all: Iterator[list[str]]) -> str:
    names = table("tasks")["readers"]["languages"]
    head = " - ".join(names[language] for language in order)
    return "\n".join([head, *(ITEM.join(entry) for entry in phrases_in_all)])
