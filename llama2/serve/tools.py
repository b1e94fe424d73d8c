"""Calls of functions in the words of Llama 3, and back: offered in a prompt, told from text as it streams.

    {"name": "f", "parameters": {"x": 1}}          Llama 3.1, zero-shot; several joined by ;
    <function=f>{"x": 1}</function>                Llama 3.1, custom
    [f(x=1), g()]                                  Llama 3.2, pythonic

Source: meta-llama/llama-models, models/llama3_1/prompt_format.md and models/llama3_2/text_prompt_format.md.
The first form is streamed argument by argument; the others are known when they end.
"""

import ast
import json
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama2.chat import Message, detect_format
from llama2.llm import LLM
from llama2.serve.protocol import ChatMessage, NamedTool, Tool
from llama2.serve.refusal import Refusal

_OFFER = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}. Do not use variables.\n\n"
)
_NAME = re.compile(r'\s*;?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*')
_ARGUMENTS = re.compile(_NAME.pattern + r'"(?:parameters|arguments)"\s*:\s*(?=\{)')
_FIRST_KEY = re.compile(r'\{\s*"([^"]*)"?')
_KEYS = ("name", "type", "parameters", "arguments", "function")
_TAGGED = re.compile(r"\s*<function=([^>]+)>(.*?)</function>\s*", re.DOTALL)

Delta = dict[str, Any]


def conversation(messages: Sequence[ChatMessage], tools: Sequence[Tool], llm: LLM) -> list[Message]:
    """Return the messages with the tools offered and earlier calls written out. Raises Refusal."""
    turns = [Message("system" if each.role == "developer" else each.role, _content(each)) for each in messages]
    if not tools:
        return turns
    format = llm.chat_format or detect_format(llm.tokenizer)
    if format != "llama3":
        raise Refusal(400, f"tools need the Llama 3 chat format; this model speaks {format}", param="tools")
    offer = _OFFER + "".join(json.dumps(_described(tool), indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    asked = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if asked is None:
        raise Refusal(400, "tools are offered in the first message of the user, and there is none", param="messages")
    turns[asked] = Message("user", offer + turns[asked].content)
    if turns[0].role == "system":
        return [Message("system", f"Environment: ipython\n\n{turns[0].content}"), *turns[1:]]
    return [Message("system", "Environment: ipython"), *turns]


def _content(message: ChatMessage) -> str:
    calls = [
        f'{{"name": {json.dumps(call.function.name)}, "parameters": {call.function.arguments or "{}"}}}'
        for call in message.tool_calls or ()
    ]
    return message.text + "; ".join(calls)


def _described(tool: Tool) -> dict[str, Any]:
    function = tool.function
    described = {"name": function.name, "description": function.description, "parameters": function.parameters or {}}
    return {"type": "function", "function": {key: each for key, each in described.items() if each is not None}}


def call_schema(tools: Sequence[Tool], choice: object) -> dict[str, Any] | None:
    """Return the JSON schema of the calls that tool_choice demands; None where none is demanded."""
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    elif choice != "required":
        return None
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for tool in tools:
        parameters, own = _lifted(_closed(tool.function.parameters), prefix=f"{tool.function.name}.")
        definitions |= own
        properties = {"name": {"const": tool.function.name}, "parameters": parameters}
        required = ["name", "parameters"]
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def _closed(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Return a function's parameters so that no others are named, unless its schema speaks of others."""
    if not parameters:
        parameters = {"type": "object", "properties": {}}
    speaks = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref"}
    if "properties" not in parameters or speaks & parameters.keys():
        return parameters
    return {**parameters, "additionalProperties": False}


def _lifted(schema: dict[str, Any], *, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take a schema's definitions out, to stand under names of their own at the root of another, where $ref looks."""
    text = re.sub(r'"#/(?:\$defs|definitions)/', lambda _: f'"#/$defs/{prefix}', json.dumps(schema))
    moved = json.loads(text)
    found = {**moved.pop("$defs", {}), **moved.pop("definitions", {})}
    return moved, {f"{prefix}{name}": each for name, each in found.items()}


@dataclass
class ToolStream:
    """One answer's text, told apart: `feed` and `finish` return deltas of content and of tool_calls."""

    names: Collection[str]
    """Functions that may be called; a call of another is text."""
    is_parallel: bool = True
    """Without it, calls after the first are dropped, as the client asked."""
    must_call: bool = False
    """A call is demanded: what looks like the beginning of one is, though it was cut off, no text."""
    n_calls: int = 0
    _held: str = ""
    _state: str = "undecided"  # then: text | arguments | between
    _value: "_Value" = field(default_factory=lambda: _Value())

    def feed(self, text: str) -> list[Delta]:
        """Return what this text makes certain."""
        self._held += text
        deltas: list[Delta] = []
        while self._held:
            state, n_held = self._state, len(self._held)
            deltas += getattr(self, f"_while_{state}")()
            if (self._state, len(self._held)) == (state, n_held):
                break
        return deltas

    def finish(self) -> list[Delta]:
        """Return what was held back."""
        held, self._held = self._held, ""
        if self._state == "undecided":
            calls = list(_whole_calls(held))
            if calls and all(name in self.names for name, _ in calls):
                return [delta for name, arguments in calls for delta in [*self._open(name), *self._more(arguments)]]
        if self.must_call:
            return []
        is_rest = self._state == "between" and not held.strip(" \t\r\n;}")
        return [{"content": held}] if held and not is_rest else []

    def _while_undecided(self) -> list[Delta]:
        start = self._held.lstrip()
        if start and not _may_be_call(start):
            self._state = "text"
            return []
        return self._begin_arguments()

    def _begin_arguments(self) -> list[Delta]:
        match = _ARGUMENTS.match(self._held)
        if match is None:
            return []
        if match[1] not in self.names:
            self._state = "text"
            return []
        self._held = self._held[match.end() :]
        self._state, self._value = "arguments", _Value()
        return self._open(match[1])

    def _while_text(self) -> list[Delta]:
        text, self._held = self._held, ""
        return [{"content": text}]

    def _while_arguments(self) -> list[Delta]:
        n_taken = self._value.take(self._held)
        piece, self._held = self._held[:n_taken], self._held[n_taken:]
        if self._value.is_whole:
            self._state = "between"
        return self._more(piece)

    def _while_between(self) -> list[Delta]:
        """After a call only the brace that ends it, and another call, are expected."""
        rest = self._held.lstrip()
        if rest.startswith("}"):
            self._held = rest[1:]
            return []
        start = rest.lstrip("; \t\r\n")
        if start and not start.startswith("{"):
            self._state = "text"
            return []
        return self._begin_arguments()

    def _open(self, name: str) -> list[Delta]:
        self.n_calls += 1
        if self.n_calls > 1 and not self.is_parallel:
            return []
        function = {"name": name, "arguments": ""}
        return [{"tool_calls": [{"index": self.n_calls - 1, "id": new_id(), "type": "function", "function": function}]}]

    def _more(self, arguments: str) -> list[Delta]:
        if not arguments or (self.n_calls > 1 and not self.is_parallel):
            return []
        return [{"tool_calls": [{"index": self.n_calls - 1, "function": {"arguments": arguments}}]}]


@dataclass
class _Value:
    """Finds the end of a JSON object that comes in pieces."""

    depth: int = 0
    in_text: bool = False
    is_escaped: bool = False
    is_whole: bool = False

    def take(self, piece: str) -> int:
        """Return how many characters belong to the object."""
        for i, char in enumerate(piece):
            if self.in_text:
                self.in_text = self.is_escaped or char != '"'
                self.is_escaped = char == "\\" and not self.is_escaped
            elif char == '"':
                self.in_text = True
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                if not self.depth:
                    self.is_whole = True
                    return i + 1
        return len(piece)


def _may_be_call(start: str) -> bool:
    """Tell whether a text that begins so may yet become a call."""
    tag = "<function="
    if start[0] == "{":
        key = _FIRST_KEY.match(start)
        return key is None or any(name.startswith(key[1]) for name in _KEYS)
    return start[0] == "[" or start.startswith(tag) or tag.startswith(start)


def _whole_calls(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and arguments of each call, where the text is nothing but calls in one of the three forms."""
    tagged = _TAGGED.findall(text)
    if tagged and not _TAGGED.sub("", text):
        yield from tagged
        return
    try:
        values = json.loads(text if text.lstrip().startswith("[") else f"[{text.strip().rstrip(';')}]")
    except (ValueError, RecursionError):
        yield from _pythonic(text)
        return
    for value in values:
        name = value.get("name") if isinstance(value, dict) else None
        arguments = value.get("parameters", value.get("arguments")) if isinstance(value, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            yield "", ""  # no function's name: all of it is text
        else:
            yield name, json.dumps(arguments, ensure_ascii=False)


def _pythonic(text: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        assert isinstance(tree, ast.List) and tree.elts
        for call in tree.elts:
            assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
            arguments = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
            yield call.func.id, json.dumps(arguments, ensure_ascii=False)
    except (AssertionError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        yield "", ""


def new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
