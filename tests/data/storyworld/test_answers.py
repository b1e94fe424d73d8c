"""The judge of answers, by hand-worked cases."""

from dataclasses import replace

import pytest

from llama2.data.storyworld.answers import FLAWED, TIDY, WEIGHTS, grade_answer
from llama2.data.storyworld.instructions import Instruction
from llama2.data.storyworld.stories import Facts, Story, stories
from llama2.data.storyworld.tasks import tasks
from llama2.data.storyworld.turns import Turn, turn_of
from llama2.data.storyworld.words import LANGUAGES

# Mia the rabbit, Tom the bear, the red kite, the lake: found again
FACTS = Facts(hero=(0, 0), friend=(16, 1), thing=(0, 0), place=8, plot=0, is_good=True)
BEATS = ("opening", "have", "problem", "arrive", "help", "good", "feel_good", "close_good")
STORY = Story(FACTS, tuple((beat, 0) for beat in BEATS))
HALF = 1 / 2


def ask(task, about="", answer="", language="en", standing=None):
    return Turn(task, about, language, "?", answer, STORY, standing)


TITLE = ask("title", answer="Mia and the red kite")


def test_the_weights_add_up():
    assert sum(WEIGHTS.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("Mia and the red kite", (1, 1, 1, 1)),
        ("Mia and the red kite.", (1, 1, 1, 1)),
        ("mia and the red kite", (1, 1, TIDY, 1)),
        ("Mia and the blue kite", (1, HALF, 0, 1)),
        ("Leo and the blue kite", (1, 0, 0, 1)),
        ("Mia and the red kite in the forest", (0, 1, HALF, 1)),
        ("the red kite", (0, 0, 0, 1)),
        ("Leo y el barco rojo", (0, 0, 0, 1 / 5)),
        ("\u7c73\u5a05", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_a_title(answer, parts):
    found = grade_answer(answer, TITLE)
    assert (found.form, found.facts, found.right, found.language) == parts
    assert found.score == pytest.approx(sum(w * p for w, p in zip(WEIGHTS.values(), parts, strict=True)))


def test_yes_and_no():
    turn = ask("check", "kind", "yes")
    assert grade_answer("yes", turn).score == 1
    assert grade_answer("no", turn).score == pytest.approx(WEIGHTS["form"] + WEIGHTS["language"])
    assert grade_answer("perhaps", turn).score == 0


def test_a_summary_of_another_end_names_the_right_ones_but_is_wrong():
    turn = ask("summarise", answer=STORY.summary("en"))
    found = grade_answer(replace(STORY, facts=replace(FACTS, is_good=False)).summary("en"), turn)
    assert (found.form, found.facts, found.right) == (1, 1, 0)


def test_a_story_may_be_any_that_keeps_to_what_was_asked():
    other = Story(replace(FACTS, friend=(20, 3), thing=(4, 4), place=2), STORY.beats)
    assert grade_answer(other.text("en"), ask("story", "h", STORY.text("en"))).score == 1
    assert grade_answer(other.text("en"), ask("story", "", STORY.text("en"))).score == 1
    found = grade_answer(other.text("en"), ask("story", "ht", STORY.text("en")))
    assert found.form == 1 and found.facts == 5 / 8 and found.right < 0.3


def test_one_slip_in_a_story_of_eight_sentences():
    slip = STORY.text("en").replace("Now Mia", "Now Leo").replace("Mia was so happy", "Leo was so happy")
    assert slip != STORY.text("en")
    found = grade_answer(slip, ask("story", "h", STORY.text("en")))
    assert (found.form, found.facts) == (1, 7 / 8)
    assert found.right == pytest.approx(FLAWED * (7 / 8) ** 2)


def test_half_a_story():
    half = " ".join(STORY.sentences("en")[:4])
    found = grade_answer(half, ask("story", "", STORY.text("en")))
    assert (found.form, found.facts, found.right) == (0.8 * HALF, HALF, FLAWED / 4)


def test_a_translation_must_be_of_this_story():
    turn = ask("translate", answer=STORY.text("zh"), language="zh")
    assert grade_answer(STORY.text("zh"), turn).score == 1
    told_otherwise = Story(FACTS, tuple((beat, 1) for beat in BEATS))
    found = grade_answer(told_otherwise.text("zh"), turn)
    assert found.form == 1 and found.facts == 1 and found.right == 0
    assert grade_answer(STORY.text("en"), turn).score == 0


def test_a_translated_title_is_judged_as_a_title():
    for text in (STORY.title("es"), STORY.summary("es")):
        turn = ask("translate", answer=text, language="es")
        assert grade_answer(text, turn).score == 1
        assert grade_answer(STORY.sentences("es")[0], turn).form == 0
    other = Story(replace(FACTS, thing=(FACTS.thing[0], FACTS.thing[1] + 1)), STORY.beats)
    found = grade_answer(other.title("es"), ask("translate", answer=STORY.title("es"), language="es"))
    assert (found.form, found.facts, found.right) == (1, HALF, 0)


def test_a_passage_is_judged_by_what_is_in_it():
    first, second, third, *_ = STORY.sentences("en")
    turn = ask("translate", answer=f"{first} {second}")
    assert grade_answer(f"{first} {second}", turn).score == 1
    found = grade_answer(first, turn)  # half of it
    assert (found.form, found.facts, found.right) == (1, HALF, FLAWED / 4)
    found = grade_answer(f"{first} {third}", turn)  # of these people and this thing, but another sentence
    assert (found.form, found.facts, found.right) == (1, 1, FLAWED / 4)
    found = grade_answer(f"{first} {second.replace('red', 'blue')}", turn)
    assert (found.form, found.facts, found.right) == (1, HALF, FLAWED / 4)
    found = grade_answer(f"{first} {second[:10]}", turn)  # broken off
    assert (found.form, found.facts, found.right) == (0.8 * HALF, HALF, FLAWED / 4)
    for nothing in ("", "Hello.", STORY.sentences("es")[0]):
        assert grade_answer(nothing, turn).score < 0.1


def test_every_task_can_be_judged():
    for told in stories(3, 40, split="heldout"):
        for language in LANGUAGES:
            for task in tasks(told, language):
                turn = turn_of(task, told)
                assert grade_answer(task.output, turn).score == 1, task
                assert grade_answer(task.input, turn).score < 0.7, task


def test_forgetting_the_instruction_halves_the_score():
    captain = Instruction("Call me Captain.", ("address",), "en", front="For you, Captain: ", address="Captain")
    turn = replace(TITLE, standing=captain)
    assert grade_answer("For you, Captain: Mia and the red kite", turn).score == 1
    forgotten = grade_answer("Mia and the red kite", turn)
    assert forgotten.score == HALF and not forgotten.obeys
