"""Pages of readers: a first line that says what they are, sentences that belong together, right answers."""

import pytest

from llama2.data.storyworld.readers import (
    ITEM,
    N_PHRASES,
    ORDERS,
    QUICK,
    arrival,
    exercise,
    page,
    phrase_book,
    quick_exercises,
    retold,
    vocabulary,
)
from llama2.data.storyworld.stories import cast, phrases, split_of, stories
from llama2.data.storyworld.tasks import outcome
from llama2.data.storyworld.turns import questions_about
from llama2.data.storyworld.words import LANGUAGES, table

STORIES = list(stories(0, 80))


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_exercise_has_every_question_with_its_answer(language):
    told = STORIES[0]
    everything = {question: answer for _, question, answer in questions_about(told, language)} | {
        table("tasks")["instructions"][task][language]: outcome(told, language, task) for task in ("title", "sentiment")
    }
    above = []
    assert len(everything) == 12
    for which in range(len(everything)):
        first, question, text, *rest = exercise(told, language, which).split(ITEM)
        assert text == told.text(language) and first not in text
        assert dict(zip([question, *rest[1::2]], rest[::2], strict=True)) == everything
        above.append(question)
    assert set(above) == set(everything)


@pytest.mark.parametrize("language", LANGUAGES)
def test_quick_exercises_ask_what_three_sentences_answer(language):
    asked = set()
    for which, each in enumerate(STORIES[:20]):
        lines = quick_exercises(each, language, which).split(ITEM)[1:]
        for told, question, text, answer in zip(retold(each), lines[::3], lines[1::3], lines[2::3], strict=False):
            assert text.startswith(told.opening(language)) and text.endswith(arrival(told, language))
            names = {(question, answer): about for about, question, answer in questions_about(told, language)}
            asked.add(names.get((question, answer), "title"))
            assert (question, answer) in names or answer == told.title(language)
            assert all(str(cast(told.facts, language)[slot]) in text for slot in "hf")
    assert asked == set(QUICK)


def test_a_page_tells_of_others_and_of_nobody_held_out():
    for split in ("train", "heldout"):
        for each in stories(0, 20, split=split):
            told = [other for other, _ in zip(retold(each), range(10), strict=False)]
            assert {split_of(other.facts) for other in told} == {split}
            assert len({other.facts for other in told}) == 10


def lines_of(page: str) -> list[str]:
    """The lines of a phrase book or vocabulary; of each three the second and the third begin with a dash."""
    rest = page.split("\n")[1:]
    assert [line.startswith(ITEM[1:]) for line in rest] == [False, True, True] * (len(rest) // 3)
    return [line.removeprefix(ITEM[1:]) for line in rest]


@pytest.mark.parametrize("order", ORDERS)
def test_a_phrase_book_says_the_same_three_times(order):
    for each in STORIES[:20]:
        lines = lines_of(phrase_book(each, order))
        assert len(lines) == 3 * N_PHRASES
        for n, told in zip(range(N_PHRASES), retold(each), strict=False):
            said = list(zip(*(phrases(told, language) for language in order), strict=True))
            assert tuple(lines[3 * n : 3 * n + 3]) in said
        backwards = lines_of(vocabulary(each, order[::-1]))
        assert lines_of(vocabulary(each, order))[::3] == backwards[2::3]


def test_a_phrase_book_has_titles_summaries_and_sentences():
    places = set()
    for each in STORIES:
        first, *_ = lines_of(phrase_book(each, LANGUAGES))
        places.add(min(2, phrases(next(retold(each)), "en").index(first)))
    assert places == {0, 1, 2}


def test_no_page_begins_as_a_story():
    openings = {each.text(language).split(" ")[0] for each in STORIES for language in LANGUAGES}
    pages = [page(each, index) for index, each in enumerate(STORIES)]
    assert not openings & {text.split("\n")[0] for text in pages}
    assert all("\n\n" not in text for text in pages)


def test_kinds_and_pairs_take_turns():
    pages = [page(each, index) for index, each in enumerate(stories(0, 144))]
    firsts = [text.split("\n")[0] for text in pages]
    assert {firsts[::2].count(first) for first in set(firsts[::2])} == {72 // len(ORDERS)}
    assert {firsts[1::2].count(first) for first in set(firsts[1::2])} == {72 // len(LANGUAGES)}
    assert sum(text.count("\n") == 48 for text in pages[::2]) == 36  # half are vocabularies
    asked = {text.split(ITEM)[1] for text in pages[1::6]}
    assert len(asked) >= 9  # every question stands above a story in its turn
