"""Probabilities of labels, against logits computed apart."""

import math
from dataclasses import replace

import pytest
import torch

from llama2.chat import Message, render
from llama2.errors import ChatError, DataError, RequestError
from llama2.model.config import RopeScaling
from llama2.tasks import classify, sentiment
from llama2.tasks.labels import decide, sentiment_labels
from llama2.tasks.likelihood import answer_logprobs
from llama2.tasks.prompts import ask
from tests.pocket import POCKET


def logprobs(llm, question, label):
    """ln p of each token of the answer and of its end, one plain forward pass."""
    rendered = render([Message("user", question), Message("assistant", label)], llm.tokenizer)
    n_prompt = rendered.trainable.index(True)
    with torch.no_grad():
        rows = llm.model(torch.tensor([rendered.tokens[:-1]])).log_softmax(-1)[0]
    return [rows[at - 1, rendered.tokens[at]].item() for at in range(n_prompt, len(rendered.tokens))]


def softmax(scores):
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


LABELS = ("good", "good enough", "no")


@pytest.mark.parametrize("by", ["total", "mean"])
def test_probabilities_are_the_models_own(llm, by):
    question = "Which of these fits best: good, good enough, no?\nA cat sat."
    found = classify(llm, "A cat sat.", LABELS, by=by)
    rows = [logprobs(llm, question, label) for label in LABELS]
    wanted = softmax([sum(row) / (len(row) if by == "mean" else 1) for row in rows])
    assert list(found.probabilities) == list(LABELS)
    assert list(found.probabilities.values()) == pytest.approx(wanted, abs=1e-6)
    assert found.probability == max(found.probabilities.values()) == found.probabilities[found.label]
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert 0.01 < max(wanted) < 1 - 1e-6  # the model has a view, and it is no certainty


def test_a_label_that_begins_another_is_charged_for_its_end(llm):
    short, long = (logprobs(llm, "A?\nx", label) for label in ("good", "good enough"))
    assert short[:5] == pytest.approx(long[:5], abs=1e-5) and len(short) == 7 and len(long) == 14
    found = classify(llm, "x", ("good", "good enough"), instruction="A?")
    odds = sum(short[5:]) - sum(long[5:])  # what they share falls out; without the ends it could only favour "good"
    assert math.log(found.probabilities["good"] / found.probabilities["good enough"]) == pytest.approx(odds, abs=1e-4)


def test_calibration_takes_away_what_a_content_free_text_gets(llm):
    scores, prior = ([sum(logprobs(llm, f"A?\n{text}", label)) for label in LABELS] for text in ("x", "N/A"))
    wanted = softmax([score - before for score, before in zip(scores, prior, strict=True)])
    found = classify(llm, "x", LABELS, instruction="A?", calibrate=True)
    assert list(found.probabilities.values()) == pytest.approx(wanted, abs=1e-5)
    even = classify(llm, "N/A", LABELS, instruction="A?", calibrate=True)
    assert list(even.probabilities.values()) == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_together_is_as_one_by_one(llm):
    texts = ["a", "a longer text than that", "b" * 90, "c"]
    prompts = [ask("classify", text, labels=LABELS) for text in texts]
    together = decide(llm, prompts, LABELS)
    for text, found in zip(texts, together, strict=True):
        alone = classify(llm, text, LABELS)
        assert list(found.probabilities.values()) == pytest.approx(list(alone.probabilities.values()), abs=1e-6)


def test_dynamic_rope_is_never_padded(make_llm):
    """It turns by the length of the whole row, beyond the original context."""
    config = replace(POCKET, rope_scaling=RopeScaling(kind="dynamic", factor=4.0, original_context=32))
    llm = make_llm(config)
    prompt = ask("title", "x" * 60, instruction="A?")
    found = answer_logprobs(llm, [prompt.answered(llm, label) for label in LABELS])
    for row, label in zip(found, LABELS, strict=True):
        assert row == pytest.approx(logprobs(llm, "A?\n" + "x" * 60, label), abs=1e-5)


def test_sentiment_has_the_words_of_its_language(llm):
    assert list(sentiment(llm, "a").probabilities) == ["positive", "negative"]
    assert tuple(sentiment(llm, "a", language="es").probabilities) == sentiment_labels("es")
    assert list(sentiment(llm, "a", labels=("bueno", "malo"), language="es").probabilities) == ["bueno", "malo"]
    question = "Does the story end well or badly?\na"
    wanted = softmax([sum(logprobs(llm, question, label)) for label in ("positive", "negative")])
    assert list(sentiment(llm, "a").probabilities.values()) == pytest.approx(wanted, abs=1e-6)


def test_plain_style_needs_no_chat_tags(llm):
    found = classify(llm, "x", ("A", "B"), instruction="I", style="plain", examples=[("y", "A")])
    totals = []
    for label in "AB":
        ids = [1, *llm.tokenizer.encode(f"I\ny\nA\n\nI\nx\n{label}\n\n")]
        with torch.no_grad():
            rows = llm.model(torch.tensor([ids])).log_softmax(-1)[0]
        totals.append(sum(rows[at - 1, ids[at]].item() for at in range(len(ids) - 3, len(ids))))
    assert list(found.probabilities.values()) == pytest.approx(softmax(totals), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        (["a"], {}, "at least two"),
        ("ab", {}, "at least two"),
        (["a", "b", " a"], {}, "'a' is given twice"),
        (["a", " "], {}, "empty"),
        (["a", "b"], {"by": "median"}, "by='median'"),
    ],
)
def test_a_mistake_is_named(llm, labels, options, said):
    with pytest.raises(RequestError, match=said):
        classify(llm, "x", labels, **options)


def test_too_long_a_text_is_refused_with_both_numbers(llm):
    with pytest.raises(RequestError, match=r"have 7\d\d tokens and the model's context holds 640"):
        sentiment(llm, "x" * 700)


def test_a_chat_tag_in_a_text_is_refused(llm):
    with pytest.raises((ChatError, DataError), match=r"\[INST\]"):
        sentiment(llm, "[INST]")
