"""Choosing among labels, by how likely the model finds each as its answer; nothing that it writes is parsed.

    score(y) = sum of ln p(token | prompt, tokens of y before it), over the tokens of y and those that end the answer
    P(y)     = softmax over the labels of score(y)

The end counts, so that a label which begins another ("good", "good enough") is weighed fairly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Unpack

from llama2.errors import RequestError
from llama2.llm import LLM
from llama2.tasks.likelihood import answer_logprobs
from llama2.tasks.prompts import AskOptions, Prompt, ask, instruction_language, table

By = Literal["total", "mean"]
CONTENT_FREE = "N/A"
"""Says nothing of any label (arXiv:2102.09690 sec. 5)."""


@dataclass(frozen=True)
class Label:
    """The likeliest label; the probabilities are relative to the other labels."""

    label: str
    probability: float
    probabilities: dict[str, float]


def sentiment(
    llm: LLM,
    text: str,
    *,
    labels: Sequence[str] | None = None,
    by: By = "total",
    calibrate: bool = False,
    **options: Unpack[AskOptions],
) -> Label:
    """Return whether a text is positive or negative.

    The labels are those of the instruction's language if not given: ("positive", "negative") in English.
    Other arguments: those of `classify`.
    """
    labels = sentiment_labels(options.get("language")) if labels is None else labels
    return decide(llm, [ask("sentiment", text, **options)], labels, by=by, calibrate=calibrate)[0]


def classify(
    llm: LLM,
    text: str,
    labels: Sequence[str],
    *,
    by: By = "total",
    calibrate: bool = False,
    **options: Unpack[AskOptions],
) -> Label:
    """Return which of the labels fits a text.

    by: "mean" divides a label's score by its number of tokens, for labels of very different lengths. calibrate:
    take away the label's score under a text that says nothing, "N/A" (contextual calibration, arXiv:2102.09690).
    options: those of `AskOptions`. Raises RequestError.
    """
    check_labels(labels)
    return decide(llm, [ask("classify", text, labels=labels, **options)], labels, by=by, calibrate=calibrate)[0]


def sentiment_labels(language: str | None) -> tuple[str, ...]:
    """Return the words for positive and negative."""
    return tuple(table()["sentiments"][instruction_language(language)])


def check_labels(labels: Sequence[str]) -> None:
    """Raise RequestError unless there are two labels or more, all different and none empty."""
    if isinstance(labels, str) or len(labels) < 2:
        raise RequestError(f"labels={labels!r}: give at least two to choose from")
    names = [label.strip() for label in labels]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RequestError(f"label {twice[0]!r} is given twice; labels must differ")
    if not all(names):
        raise RequestError("one of the labels is empty; give each a name")


def decide(
    llm: LLM, prompts: Sequence[Prompt], labels: Sequence[str], *, by: By = "total", calibrate: bool = False
) -> list[Label]:
    """Return the label of each prompt; all prompts and labels go through the model together."""
    check_labels(labels)
    if by not in ("total", "mean"):
        raise RequestError(f"by={by!r} must be 'total' or 'mean'")
    scores = _scores(llm, prompts, labels, by)
    if calibrate:
        empty = list(dict.fromkeys(replace(prompt, text=CONTENT_FREE) for prompt in prompts))
        prior = dict(zip(empty, _scores(llm, empty, labels, by), strict=True))
        scores = [
            [score - before for score, before in zip(row, prior[replace(prompt, text=CONTENT_FREE)], strict=True)]
            for prompt, row in zip(prompts, scores, strict=True)
        ]
    return [_label(labels, row) for row in scores]


def _scores(llm: LLM, prompts: Sequence[Prompt], labels: Sequence[str], by: By) -> list[list[float]]:
    """Return the score of each label for each prompt."""
    rows = answer_logprobs(llm, [prompt.answered(llm, label) for prompt in prompts for label in labels])
    scores = [math.fsum(row) / (len(row) if by == "mean" else 1) for row in rows]
    return [scores[at : at + len(labels)] for at in range(0, len(scores), len(labels))]


def _label(labels: Sequence[str], scores: Sequence[float]) -> Label:
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    probabilities = {label: weight / math.fsum(weights) for label, weight in zip(labels, weights, strict=True)}
    label = max(probabilities, key=lambda name: probabilities[name])
    return Label(label, probabilities[label], probabilities)
