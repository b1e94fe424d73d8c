"""What a model is asked: an instruction, a text, and examples of the two with their answers.

    chat     user: instruction\ntext   assistant: answer   (the examples are earlier turns)
    plain    instruction\ntext\nanswer                     (the examples stand before, a blank line after each)

A question is made as `data.dialogues` makes one of an Alpaca record {instruction, input}, and an answer is rendered
by the function that renders it for training, so what was trained is what is asked. Knows nothing of answers' worth.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypedDict

from llama2.chat import Conversation, Message, Rendered
from llama2.data.dialogues.render import PLAIN, render_sample
from llama2.data.dialogues.sample import Sample
from llama2.errors import RequestError, did_you_mean
from llama2.llm import LLM

Style = Literal["chat", "plain"]
BLANK_LINE = "\n\n"
"""What ends an answer in plain style."""


class AskOptions(TypedDict, total=False):
    """Keyword arguments of every task: how to ask."""

    language: str | None
    """Of the instruction: en, es or zh; English if not given."""
    instruction: str | None
    """Instead of the one in tasks.toml; "" for none."""
    examples: Sequence[tuple[str, ...]]
    """(text, answer) each; (passage, question, answer) for `answer`."""
    style: Style
    """chat, or plain for a model that knows no chat."""
    cue: str
    """In plain style, what stands between text and answer: a line end. "" is what `plain` fine-tuning has."""


@dataclass(frozen=True)
class Prompt:
    """A text, what is asked about it, and examples as (question, answer)."""

    instruction: str
    text: str
    examples: tuple[tuple[str, str], ...] = ()
    style: Style = "chat"
    cue: str = "\n"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise RequestError("the text is empty; give one to work on")
        if self.style not in ("chat", "plain"):
            raise RequestError(f"style={self.style!r} must be 'chat' or 'plain'")
        for i, pair in enumerate(self.examples):
            if not all(part.strip() for part in pair):
                raise RequestError(f"example {i} has an empty text or an empty answer; write it, or take it out")

    def asked(self) -> Conversation | str:
        """Return what `LLM.complete` answers: messages, or in plain style a text to continue."""
        last = question(self.instruction, self.text)
        if self.style == "plain":
            before = [asked + self.cue + answer + BLANK_LINE for asked, answer in self.examples]
            return "".join(before) + last + self.cue
        turns = [turn for pair in self.examples for turn in zip(("user", "assistant"), pair, strict=True)]
        return tuple(Message(role, content) for role, content in (*turns, ("user", last)))

    def answered(self, llm: LLM, answer: str) -> Rendered:
        """Return the ids of prompt and answer; marked are the answer's, and those that end it.

        In plain style the blank line ends it after examples, since that is what they show; else end-of-sequence.
        """
        asked = self.asked()
        if not isinstance(asked, str):
            messages = (*asked, Message("assistant", answer))
            is_wanted = tuple(i == len(asked) for i in range(len(messages)))
            return render_sample(
                Sample("the prompt", messages, None, is_wanted), llm.tokenizer, chat_format=llm.chat_format
            )
        end = BLANK_LINE if self.examples else ""
        messages = (Message("user", asked), Message("assistant", answer + end))
        whole = render_sample(Sample("the prompt", messages), llm.tokenizer, chat_format=PLAIN)
        return Rendered(whole.tokens[:-1], whole.trainable[:-1]) if end else whole


def question(instruction: str, text: str) -> str:
    """Return instruction and text as the user's words; a blank one is left out."""
    return "\n".join(part for part in (instruction, text) if part.strip())


def ask(
    task: str,
    text: str,
    *,
    target: str | None = None,
    labels: Sequence[str] = (),
    language: str | None = None,
    instruction: str | None = None,
    examples: Sequence[tuple[str, ...]] = (),
    style: Style = "chat",
    cue: str = "\n",
) -> Prompt:
    """Return the prompt of a task of tasks.toml; `target` is translate's, `labels` are classify's."""
    said = default_instruction(task, language, target=target, labels=labels) if instruction is None else instruction
    return Prompt(said, text, tuple((question(said, given), out) for given, out in _pairs(examples)), style, cue)


def _pairs(examples: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    for i, example in enumerate(examples):
        if isinstance(example, str) or len(example) != 2:
            raise RequestError(f"example {i} is {example!r}; wanted a pair of a text and its answer")
    return [(given, out) for given, out in examples]


@cache
def table() -> dict[str, Any]:
    """Return tasks.toml."""
    return tomllib.loads(files("llama2.tasks").joinpath("tasks.toml").read_text("utf-8"))


def default_instruction(
    task: str, language: str | None = None, *, target: str | None = None, labels: Sequence[str] = ()
) -> str:
    """Return the instruction of a task in a language."""
    language = instruction_language(language)
    name = ""
    if task == "translate":
        if target is None:
            raise RequestError("translate needs the language to translate into, or an instruction that names it")
        name = table()["names"][language][language_code(target)]
    listed = table()["separators"][language].join(labels)
    return table()["instructions"][task][language].replace("{target}", name).replace("{labels}", listed)


def instruction_language(language: str | None) -> str:
    """Return a language that there are instructions in, English for None."""
    language = "en" if language is None else language
    known = table()["names"]
    if language not in known:
        raise RequestError(
            f"language={language!r} has no instructions{did_you_mean(language, known)}; wanted one of "
            f"{', '.join(known)}, or an instruction of your own"
        )
    return language


def language_code(name: str) -> str:
    """Return the code of a language given by code or by name."""
    by_name = {said.lower(): code for names in table()["names"].values() for code, said in names.items()}
    codes = table()["names"]["en"]
    found = name if name in codes else by_name.get(name.lower())
    if found is None:
        hint = did_you_mean(name, codes.values())
        raise RequestError(
            f"target_language={name!r} is not known{hint}; wanted one of {', '.join(codes)}, "
            "or an instruction that names another"
        )
    return found


@cache
def translations() -> dict[str, tuple[str, str]]:
    """Return what each default instruction to translate means: (its language, the target)."""
    return {
        default_instruction("translate", language, target=code): (language, code)
        for language, names in table()["names"].items()
        for code in names
    }
