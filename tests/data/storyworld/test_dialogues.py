"""Dialogues: alternating, parallel, about one story, under instructions that hold to the end."""

import json
import random
import re

import pytest

from llama2.chat import conversation
from llama2.data.storyworld.answers import grade_answer
from llama2.data.storyworld.dialogues import MAX_TURNS, dialogue, dialogues, record, turns_of
from llama2.data.storyworld.instructions import dressed, instruction, obeys, undressed
from llama2.data.storyworld.lexicon import is_in, share_in
from llama2.data.storyworld.stories import stories
from llama2.data.storyworld.words import LANGUAGES
from llama2.errors import Llama2Error

SOME = [dialogue(0, index, split=split) for split in ("train", "heldout") for index in range(300)]


def test_roles_take_turns_and_the_last_word_is_the_assistants():
    for each in SOME:
        roles = [message.role for message in conversation(each.messages()) if message.role != "system"]
        assert roles == ["user", "assistant"] * len(each.turns)
    assert any(each.messages()[0].role == "system" for each in SOME)
    assert all(not re.search(r"[{}]|  ", m.content) and m.content.strip() for each in SOME for m in each.messages())


def test_every_right_answer_gets_full_marks():
    for each in SOME:
        for turn in each.turns:
            found = grade_answer(turn.reply, turn)
            assert found.score == 1 and found.obeys, (turn, found)


def test_a_seed_gives_the_same_dialogue_and_worlds_differ():
    assert dialogue(3, 5) == dialogue(3, 5)
    assert dialogue(3, 5) != dialogue(4, 5) and dialogue(3, 5) != dialogue(3, 5, split="heldout")
    assert [each.language for each in dialogues(0, 6)] == [*LANGUAGES, *LANGUAGES]


def test_held_out_dialogues_tell_held_out_stories():
    told = {each.turns[0].story for each in SOME}
    train = {each.turns[0].story for each in dialogues(0, 300)}
    assert len(told) == 600 and len(train & told) == 300


@pytest.mark.parametrize("n_turns", [1, 2, 20, MAX_TURNS])
@pytest.mark.parametrize("language", LANGUAGES)
def test_as_many_turns_as_wanted_and_no_question_twice(language, n_turns):
    for index in range(20):
        found = dialogue(1, index, language=language, n_turns=n_turns)
        assert len(found.turns) == n_turns and found.language == language
        assert len({turn.question for turn in found.turns}) == n_turns


def test_twenty_turns_are_short():
    for index in range(30):
        found = dialogue(1, index, n_turns=20)
        assert not any(turn.task == "translate" for turn in found.turns)
        assert all(len(turn.question) + len(turn.reply) < 200 for turn in found.turns[1:])


def test_too_many_turns_are_refused():
    for n_turns in (0, MAX_TURNS + 1):
        with pytest.raises(Llama2Error, match=f"n_turns={n_turns}"):
            dialogue(0, 0, n_turns=n_turns)


def test_a_record_is_json_and_can_be_graded_after_reading():
    for each in SOME[:100]:
        line = json.loads(json.dumps(record(each), ensure_ascii=False))
        assert set(line) == {"messages", "language", "instruction", "grading"}
        assert turns_of(line) == each.turns
        answers = [message["content"] for message in line["messages"] if message["role"] == "assistant"]
        assert all(grade_answer(*pair).score == 1 for pair in zip(answers, turns_of(line), strict=True))


def test_an_instruction_stands_only_at_the_beginning_and_holds_to_the_end():
    seen = 0
    for each in SOME:
        if each.standing is None:
            assert record(each)["instruction"] == ""
            continue
        seen += 1
        asked = [message for message in each.messages() if message.role != "assistant"]
        first, *later = asked if each.is_in_system else asked[-len(each.turns) :]
        assert each.standing.text in first.content
        assert not any(each.standing.text in message.content for message in later)
        without = each.messages(with_instruction=False)
        assert not any(each.standing.text in message.content for message in without)
        assert all(obeys(turn.reply, each.standing) for turn in each.turns)
    assert 150 < seen < 330


def test_instructions_are_of_every_kind_and_many():
    rng = random.Random(0)
    found = [instruction(rng, language) for language in LANGUAGES for _ in range(500)]
    kinds = [kind for each in found for kind in each.kinds]
    assert all(kinds.count(kind) > 150 for kind in ("language", "address", "beginning", "role", "ending"))
    assert len({each.text for each in found}) > 300
    assert any(len(each.kinds) == 2 for each in found)


def test_forgetting_an_instruction_is_noticed():
    rng = random.Random(1)
    told = next(stories(0, 1))
    for _ in range(300):
        standing = instruction(rng, "en")
        answer = told.title(standing.answers_in)
        obedient = dressed(answer, standing)
        assert obeys(obedient, standing)
        assert undressed(obedient, standing).rstrip(".\u3002") == answer
        other = next(language for language in LANGUAGES if language != standing.answers_in)
        assert not obeys(told.title(other) if standing.kinds == ("language",) else answer, standing) or (
            standing.kinds == ("language",) and is_in(told.title(other), standing.answers_in)
        )


def test_languages_are_told_apart():
    for each in stories(0, 100):
        for language in LANGUAGES:
            text = each.text(language)
            assert share_in(text, language) == 1
            assert [other for other in LANGUAGES if is_in(text, other)] == [language]
    assert is_in("no", "en") and is_in("no", "es") and not is_in("no", "zh")
    assert not any(is_in(text, language) for text in ("", "123", "...") for language in LANGUAGES)


def test_dialogues_are_parallel():
    """The same facts are asked about in every language."""
    for index in range(50):
        found = [dialogue(2, index, language=language, n_turns=4) for language in LANGUAGES]
        assert len({each.turns[0].story for each in found}) == 1
        assert len({tuple(turn.task for turn in each.turns) for each in found}) == 1


def test_the_words_come_in_thousands_of_contexts():
    found = set()
    for each in dialogues(0, 2000):
        for message in each.messages():
            words = message.content.split()
            found |= set(zip(words, words[1:], words[2:], strict=False))
    assert len(found) > 10_000
    assert len({turn.question for each in SOME for turn in each.turns}) > 1000
