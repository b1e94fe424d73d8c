"""Pages of readers: a first line that says what they are, sentences that belong together, right answers."""

import pytest

from llama2.data.storyworld.readers import PAIRS, exercise, page, phrase_book, quick_exercises, retold, vocabulary
from llama2.data.storyworld.stories import cast, passages, split_of, stories
from llama2.data.storyworld.tasks import outcome, questions
from llama2.data.storyworld.words import LANGUAGES, table

STORIES = list(stories(0, 80))


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_exercise_has_every_question_with_its_answer(language):
    told = STORIES[0]
    everything = dict(questions(told, language)) | {
        table("tasks")["instructions"][task][language]: outcome(told, language, task) for task in ("title", "sentiment")
    }
    above = []
    for which in range(len(everything)):
        first, question, text, *rest = exercise(told, language, which).split("\n")
        assert text == told.text(language) and first not in text
        assert dict(zip([question, *rest[1::2]], rest[::2], strict=True)) == everything
        above.append(question)
    assert set(above) == set(everything)


@pytest.mark.parametrize("language", LANGUAGES)
def test_quick_exercises_ask_what_two_sentences_answer(language):
    for each in STORIES[:20]:
        lines = quick_exercises(each, language, 0).split("\n")[1:]
        for told, question, text, answer in zip(retold(each), lines[::3], lines[1::3], lines[2::3], strict=False):
            assert text == told.opening(language)
            assert (question, answer) in questions(told, language) or answer == told.title(language)
            assert str(cast(told.facts, language)["h"]) in text


def test_a_page_tells_of_others_and_of_nobody_held_out():
    for split in ("train", "heldout"):
        for each in stories(0, 20, split=split):
            told = [other for other, _ in zip(retold(each), range(10), strict=False)]
            assert {split_of(other.facts) for other in told} == {split}
            assert len({other.facts for other in told}) == 10


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_phrase_book_says_the_same_twice(first, second):
    for each in STORIES[:20]:
        lines = phrase_book(each, first, second).split("\n")[1:]
        assert len(lines) == 2 * len(passages(each, first, 2))
        for n, told in zip(range(len(lines) // 2), retold(each), strict=False):
            assert lines[2 * n : 2 * n + 2] == [passages(told, language, 2)[n] for language in (first, second)]
        assert vocabulary(each, first, second).split("\n")[1::2] == vocabulary(each, second, first).split("\n")[2::2]


def test_no_page_begins_as_a_story():
    openings = {each.text(language).split(" ")[0] for each in STORIES for language in LANGUAGES}
    pages = [page(each, index) for index, each in enumerate(STORIES)]
    assert not openings & {text.split("\n")[0] for text in pages}
    assert all("\n\n" not in text for text in pages)


def test_kinds_and_pairs_take_turns():
    pages = [page(each, index) for index, each in enumerate(stories(0, 144))]
    firsts = [text.split("\n")[0] for text in pages]
    assert {firsts[::2].count(first) for first in set(firsts[::2])} == {72 // len(PAIRS)}
    assert {firsts[1::2].count(first) for first in set(firsts[1::2])} == {72 // len(LANGUAGES)}
    assert sum(text.count("\n") == 32 for text in pages[::2]) == 24  # a third are vocabularies
    asked = {text.split("\n")[1] for text in pages[1::6]}
    assert len(asked) >= 9  # every question stands above a story in its turn
