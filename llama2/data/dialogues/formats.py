"""The formats of one record: how each is known, and what it means.

    messages           {"messages": [{"role", "content"}]}       oasst       {"message_tree_id", "prompt": {...}}
    prompt-completion  {"prompt", "completion" or "response"}    hh          {"chosen": "\\n\\nHuman: ..."}
    alpaca             {"instruction", "input", "output"}        preference  {"prompt", "chosen"}
    sharegpt           {"conversations": [{"from", "value"}]}    text        {"text"}

Keys that no format knows are let be. Knows nothing of files; docs/dialogues.md shows an example of each.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llama2.data.dialogues.sample import NotForTraining, Sample, Turn, dialogue
from llama2.data.dialogues.trees import tree_turns
from llama2.data.dialogues.turns import WAY_OUT, field, framed, kind, text_of, text_or_none, turns_of
from llama2.errors import DataError, did_you_mean

Record = Mapping[str, Any]

_HUMAN = "\n\nHuman:"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def detect(record: Record) -> str | None:
    """Return the name of a record's format, or None."""
    has = {key for key, value in record.items() if value is not None}
    if isinstance(record.get("prompt"), Mapping) and ("message_tree_id" in has or "replies" in record["prompt"]):
        return "oasst"
    if "chosen" in has:
        return "hh" if "prompt" not in has and _is_hh(record["chosen"]) else "preference"
    for name, keys in (("sharegpt", {"conversations"}), ("messages", {"messages"})):
        if keys <= has:
            return name
    if "prompt" in has and has & {"completion", "response"}:
        return "prompt-completion"
    if {"instruction", "output"} <= has:
        return "alpaca"
    if "text" in has:
        return "hh" if _is_hh(record["text"]) else "text"
    return None


def _is_hh(value: object) -> bool:
    return isinstance(value, str) and value.startswith(_HUMAN)


def unknown(record: Record) -> DataError:
    """Return the error for a record that no format knows."""
    keys = ", ".join(map(repr, record)) or "none"
    hint = next((did_you_mean(key, KEYS) for key in record if key not in KEYS and did_you_mean(key, KEYS)), "")
    wanted = "'messages', 'conversations', 'prompt' and 'completion', 'instruction' and 'output', 'chosen', or 'text'"
    return DataError(f"a record of no known format; its keys are {keys}{hint}; wanted {wanted}: rename them")


def parse(record: Record, format: str, where: str) -> Sample:
    """Return what a record means as `format` has it. Raises DataError without `where`, and NotForTraining."""
    if record.get("label") is False:
        raise NotForTraining("label is false: a bad answer")
    if format == "text":
        text = text_of(record, "text")
        if not text.strip():
            raise DataError(f"'text' is empty; wanted text: {WAY_OUT}")
        return Sample(where, None, text)
    return dialogue(where, READERS[format](record))


def _messages(record: Record) -> list[Turn]:
    return framed(turns_of(field(record, "messages"), "messages"), record)


def _sharegpt(record: Record) -> list[Turn]:
    return framed(turns_of(field(record, "conversations"), "conversations"), record)


def _prompt_completion(record: Record) -> list[Turn]:
    key = "completion" if record.get("completion") is not None else "response"
    if record.get(key) is None:
        key = "completion"
    answer = turns_of(field(record, key), key, speaker="assistant")
    return framed([*_asked(record, "prompt"), *answer], record)


def _asked(record: Record, key: str) -> list[Turn]:
    """Turns that lead to the answer and are not trained on."""
    return [replace(turn, is_trained=False) for turn in turns_of(field(record, key), key)]


def _alpaca(record: Record) -> list[Turn]:
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"'history' is {kind(history)}, wanted a list of pairs of question and answer; {WAY_OUT}")
    turns: list[Turn] = []
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"history[{i}] is no pair of texts, question and answer; {WAY_OUT}")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    parts = [text_of(record, "instruction"), text_or_none(record, "input")]
    question = "\n".join(part for part in parts if part.strip())
    return framed([*turns, Turn("user", question), Turn("assistant", text_of(record, "output"))], record)


def _hh(record: Record) -> list[Turn]:
    key = "chosen" if record.get("chosen") is not None else "text"
    text = text_of(record, key)
    if not _is_hh(text):
        raise DataError(f"{key!r} begins with {text[:20]!r}, wanted {_HUMAN!r}; {WAY_OUT}")
    _, *parts = _HH_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Turn(roles[name], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]


def _preference(record: Record) -> list[Turn]:
    chosen = turns_of(field(record, "chosen"), "chosen", speaker="assistant")
    if chosen[0].role in ("system", "user"):
        turns = chosen[:-1]
        return framed([*(replace(turn, is_trained=False) for turn in turns), chosen[-1]], record)
    key = "conversations" if record.get("conversations") is not None else "prompt"
    return framed([*_asked(record, key), *chosen], record)


READERS: dict[str, Callable[[Record], list[Turn]]] = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "oasst": tree_turns,
    "hh": _hh,
    "preference": _preference,
}
FORMATS = (*READERS, "text")
KEYS = (
    *("messages", "prompt", "completion", "response", "instruction", "input", "output", "history", "conversations"),
    *("chosen", "message_tree_id", "text", "system", "tools", "label"),
)
"""Every key that a format looks at."""
