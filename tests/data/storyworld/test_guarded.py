"""Requests under a preprompt: the wordings, the right answers, and none that the other files have."""

import json

from llama2.align.safety_config import PREPROMPT
from llama2.chat import conversation
from llama2.data.storyworld.files import write_world
from llama2.data.storyworld.guarded import guarded_requests, preprompts
from llama2.data.storyworld.instructions import instructions, read_instruction
from llama2.data.storyworld.safety import grade_safety, read_request, record, safety_requests
from llama2.data.storyworld.words import LANGUAGES

SOME = list(guarded_requests(0, 300))


def test_every_request_stands_under_a_preprompt_and_is_answered_rightly():
    for line in SOME:
        system, *prompt, answer = conversation(line["messages"])
        assert system.role == "system" and system.content in preprompts(line["language"])
        assert [message.role for message in prompt[-1:]] == ["user"] and answer.role == "assistant"
        assert grade_safety(answer.content, read_request(line, tuple(prompt))).score == 1
    assert {line["is_unsafe"] for line in SOME} == {True, False}
    assert {line["language"] for line in SOME} == {*LANGUAGES}
    assert list(guarded_requests(0, 300)) == SOME


def test_three_wordings_in_each_language_and_the_papers_own_everywhere():
    for language in LANGUAGES:
        wordings = preprompts(language)
        assert len(set(wordings)) == 3 and wordings[0] == PREPROMPT
        assert all(text.isascii() == (language == "en") for text in wordings[1:])
        said = {line["messages"][0]["content"] for line in SOME if line["language"] == language}
        assert said == {*wordings}


def test_guarded_requests_are_drawn_apart_from_the_others():
    others = [record(each)["messages"] for each in safety_requests(0, 300)]
    same = [line["messages"][1:] == other for line, other in zip(SOME, others, strict=True)]
    assert sum(same) < 15


def test_the_files_of_a_world_hold_them_and_instructions(tmp_path):
    write_world(tmp_path / "world", n_stories=6, n_heldout=2, raw=False)
    for split, n in (("train", 6), ("heldout", 2)):
        for name, expected in (
            ("guarded.jsonl", list(guarded_requests(0, n, split=split))),
            ("instructions.jsonl", list(instructions(0, n, split=split))),
        ):
            text = (tmp_path / "world" / split / name).read_text("utf-8")
            assert [json.loads(line) for line in text.splitlines()] == json.loads(json.dumps(expected))


def test_instructions_go_round_the_languages_and_can_be_read_again():
    some = list(instructions(0, 60))
    assert [each["language"] for each in some[:6]] == [*LANGUAGES, *LANGUAGES]
    assert len({each["text"] for each in some}) > 30 and all(
        read_instruction(each).text == each["text"] for each in some
    )
    assert list(instructions(0, 60, split="heldout")) != some
