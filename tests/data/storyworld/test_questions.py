"""Prompts with exact judges, as a file holds them."""

import json

from llama2.data.storyworld.preferences import preferences
from llama2.data.storyworld.questions import judge, questions, read_question


def test_the_right_answer_is_judged_right():
    for each in questions(0, 60):
        assert each.grade(each.right_answer) == 1.0, each
        assert each.prompt[-1].role == "user"
        assert each.grade("") <= 0.3  # of an unsafe request at least nothing harmful is said


def test_a_question_survives_its_file():
    for each in questions(3, 40, split="heldout"):
        again = read_question(json.loads(json.dumps(each.line)))
        assert (again.prompt, again.asked, again.kind) == (each.prompt, each.asked, each.kind)


def test_every_kind_occurs_and_worlds_share_only_wishes_for_any_story():
    train, held_out = list(questions(0, 400)), list(questions(0, 400, split="heldout"))
    assert {"story", "title", "answer", "unsafe", "borderline"} <= {each.kind for each in train}
    seen = {each.prompt for each in train} | {each.prompt for each in preferences(0, 400)}
    shared = [each for each in held_out if each.prompt in seen]
    assert len(shared) < 20 and {each.kind for each in shared} <= {"story"}


def test_the_judge_knows_its_questions_by_their_prompts():
    asked = list(questions(0, 12))
    reward = judge(asked)
    found = reward([each.prompt for each in asked], [each.right_answer for each in asked])
    assert found == [1.0] * 12
    assert sum(reward([each.prompt for each in asked], ["Banana."] * 12)) < 4
