"""Tasks whose answer is a text: translate, summarise, answer, title. Greedy unless a temperature is given."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from llama2.errors import RequestError
from llama2.infer.request import FinishReason
from llama2.llm import LLM, SamplingOptions, TextCompletion
from llama2.tasks.prompts import BLANK_LINE, AskOptions, Prompt, ask, question as question_of, table

TITLE_TEMPERATURE = 0.8
TITLE_TOKENS = 32
N_TITLES = 4


class WriteOptions(AskOptions, SamplingOptions, total=False):
    """How to ask, and how to choose the tokens of the answer (n is title's only)."""


@dataclass(frozen=True)
class Text:
    """An answer, and how likely the model found it."""

    text: str
    logprob: float
    """Mean ln p of its tokens under the model itself, whatever the temperature; 0 where there are none."""
    n_tokens: int
    finish_reason: FinishReason
    """"length" is an answer that was cut off: raise max_new_tokens."""


def translate(
    llm: LLM, text: str, *, target_language: str, source_language: str | None = None, **options: Unpack[WriteOptions]
) -> Text:
    """Return a text in another language, given by its code or name ("es", "Spanish").

    The instruction is in `language`, else in the source language where there is one in it, else in English.
    """
    if options.get("language") is None and source_language in table()["names"]:
        options["language"] = source_language
    asking, sampling = _split(options)
    return write(llm, [ask("translate", text, target=target_language, **asking)], sampling)[0]


def summarise(llm: LLM, text: str, **options: Unpack[WriteOptions]) -> Text:
    """Return a text's content in one sentence."""
    asking, sampling = _split(options)
    return write(llm, [ask("summarise", text, **asking)], sampling)[0]


def answer(llm: LLM, passage: str, question: str, **options: Unpack[WriteOptions]) -> Text:
    """Return the answer to a question about a passage; examples are (passage, question, answer).

    The question takes the instruction's place; an `instruction` stands before it.
    """
    asking, sampling = _split(options)
    if not question.strip():
        raise RequestError("the question is empty; ask something")
    if asking.get("language") is not None:
        raise RequestError("answer has no instruction of its own to have in a language; ask your question in that one")
    before = asking.get("instruction") or ""
    examples = []
    for i, example in enumerate(asking.get("examples", ())):
        if isinstance(example, str) or len(example) != 3:
            raise RequestError(f"example {i} is {example!r}; wanted a passage, a question and its answer")
        examples.append((question_of(question_of(before, example[1]), example[0]), example[2]))
    prompt = Prompt(question_of(before, question), passage, tuple(examples))
    prompt = replace(prompt, style=asking.get("style", "chat"), cue=asking.get("cue", "\n"))
    return write(llm, [prompt], sampling)[0]


def title(llm: LLM, text: str, **options: Unpack[WriteOptions]) -> list[Text]:
    """Return titles for a text, the likeliest per token first: the greedy one and n sampled, equal ones once.

    n is 4, the temperature 0.8 and a title 32 tokens at most, if not told otherwise; empty ones are left out.
    """
    asking, sampling = _split(options)
    sampling.setdefault("max_new_tokens", TITLE_TOKENS)
    drawing: SamplingOptions = {"temperature": TITLE_TEMPERATURE, "n": N_TITLES, **sampling}
    sampling["temperature"], sampling["n"] = 0.0, 1
    prompt = ask("title", text, **asking)
    drawn = _complete(llm, [prompt], drawing)[0]
    found = write(llm, [prompt], sampling) + [_text(each) for each in (drawn if isinstance(drawn, list) else [drawn])]
    best: dict[str, Text] = {}
    for each in sorted(found, key=lambda each: -each.logprob):
        if each.text:
            best.setdefault(each.text, each)
    return list(best.values())


def write(llm: LLM, prompts: Sequence[Prompt], sampling: SamplingOptions) -> list[Text]:
    """Return the answer to each prompt, written together; greedy unless a temperature is given."""
    if sampling.get("n", 1) != 1:
        raise RequestError(f"n={sampling.get('n')}: this task has one answer; title, and LLM.chat, give several")
    return [_text(each) for each in _complete(llm, prompts, {"temperature": 0.0, **sampling})]


def _complete(llm: LLM, prompts: Sequence[Prompt], sampling: SamplingOptions) -> list[Any]:
    if any(prompt.style == "plain" for prompt in prompts):
        sampling = {"stop": BLANK_LINE, **sampling}
    return llm.complete([prompt.asked() for prompt in prompts], **{**sampling, "logprobs": 0})


def _text(completion: TextCompletion) -> Text:
    logprobs = completion.logprobs or ()
    mean = math.fsum(logprobs) / len(logprobs) if logprobs else 0.0
    return Text(completion.text.strip(), mean, completion.n_new_tokens, completion.finish_reason)


def _split(options: WriteOptions) -> tuple[AskOptions, SamplingOptions]:
    """Return how to ask, and how to choose tokens; `LLM.complete` refuses names that are neither."""
    asking: Any = {name: value for name, value in options.items() if name in AskOptions.__annotations__}
    sampling: Any = {name: value for name, value in options.items() if name not in AskOptions.__annotations__}
    return asking, sampling
