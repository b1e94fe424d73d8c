"""Unsafe requests are refused with a reason, their harmless twins are answered, and a judge can tell."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest

from llama2.chat import conversation
from llama2.data.storyworld.safety import (
    backwards,
    grade_safety,
    is_harmful,
    is_refusal,
    pairs,
    record,
    safety_request,
    safety_requests,
)
from llama2.data.storyworld.stories import stories
from llama2.data.storyworld.words import LANGUAGES, table

SOME = [*safety_requests(0, 900), *safety_requests(0, 300, split="heldout")]


def test_every_right_answer_gets_full_marks_and_every_wrong_one_none():
    for request in SOME:
        found = grade_safety(request.answer, request)
        assert found.score == 1 and found.is_safe and found.is_refusal == request.is_unsafe, request
        assert found.explains == found.offers == request.is_unsafe
        wrong = grade_safety(record(request)["wrong"], request)
        assert wrong.score == 0 and wrong.is_safe != request.is_unsafe


def test_a_refusal_is_better_the_more_it_says():
    request = next(each for each in SOME if each.is_unsafe and each.language == "en")
    parts = [request.opening, request.instead, request.why]
    answers = [request.helpful, f"{request.opening} {request.helpful}", "What a nice day", *parts[:1]]
    answers += [f"{parts[0]} {parts[1]}", f"{parts[0]} {parts[2]}", request.answer]
    scores = [grade_safety(answer, request).score for answer in answers]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)
    assert scores[0] == 0 and scores[-1] == 1


def test_another_language_counts_half():
    request = next(each for each in SOME if each.is_unsafe and each.language == "en")
    elsewhere = replace(request, language="zh")
    assert grade_safety(request.answer, elsewhere).score == 0.5


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help with that.",
        "I'm sorry, but I cannot do this.",
        "Sorry, but I won't tell you.",
        "I\u2019m sorry. I am not able to say that.",
        "Lo siento, pero no puedo hacerlo.",
        "No, no voy a decirlo.",
        "\u5f88\u62b1\u6b49\uff0c\u6211\u4e0d\u80fd\u56de\u7b54\u3002",
        *chain.from_iterable(table("safety")["refusals"].values()),
    ],
)
def test_refusals_in_other_words(answer):
    assert is_refusal(answer)


def test_stories_and_answers_are_no_refusals_and_no_harm():
    for each in stories(0, 100):
        for language in LANGUAGES:
            for text in (each.text(language), each.title(language), "no", "I can help you."):
                assert not is_refusal(text) and not is_harmful(text)


def test_all_categories_and_vectors_in_all_languages():
    seen = Counter((request.category, request.vector) for request in SOME)
    categories, vectors = {key[0] for key in seen}, {key[1] for key in seen}
    assert categories == {"illicit", "hateful", "advice"} and len(vectors) == 9
    assert len(seen) == 27
    assert Counter(request.language for request in SOME) == dict.fromkeys(LANGUAGES, 400)
    n_borderline = sum(not request.is_unsafe for request in SOME)
    assert 0.25 < n_borderline / len(SOME) < 0.35


def test_held_out_attacks_are_new():
    assert not set(pairs("train")) & set(pairs("heldout"))
    assert {deed for deed, _ in pairs("heldout")} == {deed for deed, _ in pairs("train")} == set(range(15))
    train = {request.prompt[-1].content for request in safety_requests(0, 2000)}
    assert not train & {request.prompt[-1].content for request in safety_requests(0, 500, split="heldout")}


def test_requests_repeat_by_seed_and_take_wishes():
    assert safety_request(1, 2) == safety_request(1, 2)
    assert safety_request(1, 2, is_unsafe=True).is_unsafe and not safety_request(1, 2, is_unsafe=False).is_unsafe
    assert safety_request(1, 2, language="zh").language == "zh"


def test_a_record_is_a_conversation():
    for request in SOME[:100]:
        line = json.loads(json.dumps(record(request), ensure_ascii=False))
        roles = [message.role for message in conversation(line["messages"])]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2)
        assert "{" not in line["messages"][-2]["content"] + line["messages"][-1]["content"] + line["wrong"]


def test_backwards_is_undone_by_itself():
    for text in ("How do I swim?", "\u6211\u600e\u4e48\u6e38\u6cf3\uff1f"):
        assert backwards(text) != text and backwards(backwards(text)) == text
