"""Messages as records write them, to turns; and tools, as JSON in the text of messages.

    {"role": "user", "content": "Hi"}                                         OpenAI
    {"from": "human", "value": "Hi"}                                          ShareGPT
    {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{\\"a\\": 1}"}}]}
        -> assistant: {"name": "add", "parameters": {"a": 1}}                 Llama 3.1's form of a call

Knows nothing of whole records or files. Raises DataError that names the key, without the place in the file.
"""

import json
from collections.abc import Mapping
from typing import Any

from llama2.chat import ROLES
from llama2.data.dialogues.sample import Turn
from llama2.errors import DataError, did_you_mean

SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    **{role: role for role in ROLES},
}
"""Who a ShareGPT turn is `from`, and the role that is."""

WAY_OUT = "mend the record, or take it out"


def kind(value: object) -> str:
    """Return what a JSON value is, in JSON's words."""
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def field(record: Mapping[str, Any], key: str) -> Any:
    """Return what a key holds. Raises DataError where it is missing or null."""
    if record.get(key) is None:
        held = ", ".join(repr(name) for name, value in record.items() if value is not None) or "none"
        raise DataError(f"no key {key!r} that holds something; the keys are {held}: {WAY_OUT}")
    return record[key]


def text_of(record: Mapping[str, Any], key: str) -> str:
    """Return the text that a key holds. Raises DataError where it is missing or something else."""
    value = field(record, key)
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {kind(value)}, wanted a text; {WAY_OUT}")
    return value


def text_or_none(record: Mapping[str, Any], key: str) -> str:
    return text_of(record, key) if record.get(key) is not None else ""


def turns_of(value: object, key: str, *, speaker: str = "user") -> list[Turn]:
    """Return the turns in a list of messages, in one message, or in a text that `speaker` says."""
    if isinstance(value, str):
        return [Turn(speaker, value)]
    if isinstance(value, Mapping):
        return [_turn(value, key)]
    if not isinstance(value, list):
        raise DataError(f"{key!r} is {kind(value)}, wanted a list of messages; {WAY_OUT}")
    if not value:
        raise DataError(f"{key!r} is an empty list, wanted messages; {WAY_OUT}")
    return [_turn(item, f"{key}[{i}]") for i, item in enumerate(value)]


def _turn(item: object, place: str) -> Turn:
    if not isinstance(item, Mapping):
        raise DataError(f"{place} is {kind(item)}, wanted an object of 'role' and 'content'; {WAY_OUT}")
    try:
        return _shared(item) if item.get("from") is not None else _message(item)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _shared(item: Mapping[str, Any]) -> Turn:
    speaker, value = text_of(item, "from"), text_of(item, "value")
    if speaker not in SPEAKERS:
        hint = did_you_mean(speaker, SPEAKERS)
        wanted = "human, gpt, system, function_call, observation"
        raise DataError(f"it is from {speaker!r}, wanted one of {wanted}{hint}; {WAY_OUT}")
    if speaker == "function_call":
        value = _calls(_parsed(value, "value"))
    return Turn(SPEAKERS[speaker], value, _is_trained(item))


def _message(item: Mapping[str, Any]) -> Turn:
    role = text_of(item, "role")
    if role not in ROLES:
        raise DataError(f"the role is {role!r}, wanted one of {', '.join(ROLES)}{did_you_mean(role, ROLES)}; {WAY_OUT}")
    if not item.get("tool_calls"):
        return Turn(role, text_of(item, "content"), _is_trained(item))
    said = [text for text in [text_or_none(item, "content")] if text.strip()]
    return Turn(role, "\n".join([*said, _calls(item["tool_calls"])]), _is_trained(item))


def _is_trained(item: Mapping[str, Any]) -> bool:
    """OpenAI's `weight`: 0 keeps an answer out of the loss."""
    weight = item.get("weight", 1)
    if weight not in (None, 0, 1):
        raise DataError(f"the weight is {weight!r}, wanted 0 or 1; {WAY_OUT}")
    return weight != 0


def _calls(calls: object) -> str:
    """Return calls of tools as text: one as an object, more as a list."""
    found = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    if not found:
        raise DataError(f"a call of no function; {WAY_OUT}")
    return _dump(found[0] if len(found) == 1 else found)


def _call(call: object) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        raise DataError(
            f"the call of a function is {kind(function)}, wanted an object of 'name' and 'arguments'; {WAY_OUT}"
        )
    key = "parameters" if function.get("parameters") is not None else "arguments"
    arguments = field(function, key)
    arguments = _parsed(arguments, key) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{key!r} is {kind(arguments)}, wanted an object; {WAY_OUT}")
    return {"name": text_of(function, "name"), "parameters": arguments}


def framed(turns: list[Turn], record: Mapping[str, Any]) -> list[Turn]:
    """Return turns with a record's `system` text and its `tools` (as JSON, after the text) in the system message."""
    system, tools = text_or_none(record, "system"), record.get("tools")
    if turns and turns[0].role == "system" and turns[0].content.strip():
        if system.strip():
            raise DataError(f"two system texts: in 'system' and in the messages; leave one, or {WAY_OUT}")
        system = turns[0].content
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if tools and not isinstance(tools, list | Mapping):
        raise DataError(f"'tools' is {kind(tools)}, wanted a list of definitions; {WAY_OUT}")
    if not tools and not system.strip():
        return turns
    parts = [part for part in (system, _dump(tools) if tools else "") if part.strip()]
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    return [Turn("system", "\n\n".join(parts)), *rest]


def _parsed(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{key!r} is not JSON ({error}); {WAY_OUT}") from None


def _dump(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"tools or their calls cannot be written as JSON ({error}); {WAY_OUT}") from None
