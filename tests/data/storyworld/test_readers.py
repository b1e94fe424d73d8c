"""Pages of readers: a first line that says what they are, sentences that belong together, right answers."""

from llama2.data.storyworld.readers import PAIRS, exercise, page, side_by_side, translation
from llama2.data.storyworld.stories import stories
from llama2.data.storyworld.tasks import outcome, questions
from llama2.data.storyworld.words import LANGUAGES

STORIES = list(stories(0, 80))


def test_an_exercise_has_every_question_with_its_answer():
    for language in LANGUAGES:
        first, text, *rest = exercise(STORIES[0], language).split("\n")
        assert text == STORIES[0].text(language) and first not in text
        asked = dict(zip(rest[::2], rest[1::2], strict=True))
        assert asked.items() >= dict(questions(STORIES[0], language)).items()
        assert outcome(STORIES[0], language, "title") in asked.values()


def test_a_translation_is_the_same_story():
    assert translation(STORIES[1], "en", "zh").split("\n")[1:] == [STORIES[1].text("en"), STORIES[1].text("zh")]
    lines = side_by_side(STORIES[1], "es", "en").split("\n")
    assert lines[1::2] == STORIES[1].sentences("es") and lines[2::2] == STORIES[1].sentences("en")


def test_no_page_begins_as_a_story():
    openings = {each.text(language).split(" ")[0] for each in STORIES for language in LANGUAGES}
    pages = [page(each, index) for index, each in enumerate(STORIES)]
    assert not openings & {text.split("\n")[0] for text in pages}
    assert all("\n\n" not in text for text in pages)


def test_kinds_and_pairs_take_turns():
    firsts = [page(each, index).split("\n")[0] for index, each in enumerate(STORIES)]
    assert len(set(firsts[::2])) == len(PAIRS) and len(set(firsts[1::2])) == len(LANGUAGES)
    two = [page(STORIES[i], i).count("\n") for i in range(0, 72, 2)]
    assert two.count(2) == 24  # a third of the pages in two languages are sentence by sentence
