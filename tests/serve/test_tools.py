"""Calls of tools: told from words, streamed, and carried through a conversation, with a model that surely calls."""

import json

import httpx2
import openai
import pytest

from llama2.serve.answers import chat_message
from llama2.serve.protocol import Tool
from llama2.serve.tools import ToolStream, call_schema
from tests.serve.conftest import CALL, TEXT

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How is the weather?",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HI = [{"role": "user", "content": "How is Paris?"}]
ARGUMENTS = '{"city": "Paris }\\""}'


def ask(client, **options):
    options = {"model": "caller", "messages": HI, "temperature": 0, "max_tokens": 40, "tools": [WEATHER], **options}
    return client.chat.completions.create(**options)


def parsed(text, *, size=1, names=("f", "g"), parallel=True):
    """Return the message that a text makes, fed in pieces of some characters."""
    stream = ToolStream(names, parallel)
    deltas = [delta for at in range(0, len(text), size) for delta in stream.feed(text[at : at + size])]
    return chat_message([*deltas, *stream.finish()]), deltas


def test_a_call_comes_whole_and_in_deltas(client):
    whole = ask(client).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    (call,) = whole.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", ARGUMENTS)
    assert call.id.startswith("call_") and json.loads(call.function.arguments) == {"city": 'Paris }"'}
    chunks = list(ask(client, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].id and deltas[0].function.name == "weather" and {delta.index for delta in deltas} == {0}
    assert len(deltas) > 3 and all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == ARGUMENTS
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_words_stay_words(client, server):
    start = server.models.served["caller"].worker.llm.tokenizer.vocabulary.ids['{"name":\u0120']
    spoken = ask(client, logit_bias={str(start): -100}).choices[0]
    assert spoken.message.content == "".join(TEXT) and spoken.finish_reason == "stop"
    assert spoken.message.tool_calls is None
    for options in ({"tool_choice": "none"}, {"tools": openai.omit}):
        assert ask(client, **options).choices[0].message.content == "".join(CALL)
    other = {"type": "function", "function": {"name": "other"}}
    assert ask(client, tools=[other]).choices[0].message.content == "".join(CALL)


def test_the_tools_are_offered_in_the_words_of_llama_3(server, client):
    from llama2.serve.protocol import ChatMessage, Tool
    from llama2.serve.tools import conversation

    llm = server.models.served["caller"].worker.llm
    turns = conversation([ChatMessage(**HI[0])], [Tool(**WEATHER)], llm)
    assert turns[0].role == "system" and turns[0].content == "Environment: ipython"
    assert turns[1].content.startswith("Given the following functions, please respond with a JSON for a function call")
    assert '"name": "weather"' in turns[1].content and turns[1].content.endswith("\n\nHow is Paris?")


def test_a_result_goes_back(client):
    call = ask(client).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "18 degrees"}
    again = ask(client, messages=[*HI, call.model_dump(exclude_none=True), result])
    assert again.usage.prompt_tokens > ask(client).usage.prompt_tokens and again.choices[0].message.tool_calls


def test_a_call_that_is_demanded_comes(client):
    """The model would rather speak, but the form of the answer leaves it no choice."""
    strict = {**WEATHER["function"], "parameters": {"type": "object", "additionalProperties": False}}
    tools = [{"type": "function", "function": {**strict, "name": name}} for name in ("sun", "rain")]
    named = {"type": "function", "function": {"name": "rain"}}
    for choice, names in (("required", {"sun", "rain"}), (named, {"rain"})):
        found = ask(client, tools=tools, tool_choice=choice, max_tokens=200, temperature=1.0, seed=1).choices[0]
        assert found.finish_reason == "tool_calls" and found.message.tool_calls[0].function.name in names


def test_a_demanded_call_may_refer_to_definitions(client):
    """As pydantic writes the schemas of nested models."""
    city = {"enum": ["Paris", "Rome"]}
    parameters = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"]}
    parameters = {**parameters, "additionalProperties": False, "$defs": {"City": city}}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("sun", "rain")]
    found = ask(client, tools=tools, tool_choice="required", max_tokens=200, seed=1).choices[0].message.tool_calls[0]
    assert json.loads(found.function.arguments)["city"] in ("Paris", "Rome")


def test_a_demanded_call_that_is_cut_off_is_no_text(client):
    found = ask(client, tool_choice="required", max_tokens=1)
    assert found.choices[0].finish_reason == "length" and not found.choices[0].message.content
    assert not any(
        chunk.choices[0].delta.content for chunk in ask(client, tool_choice="required", max_tokens=1, stream=True)
    )


def test_a_demanded_call_has_the_arguments_of_its_function(client):
    """One that the function does not have is not made up, unless its schema allows others."""
    for parameters, wanted in (
        ({"type": "object", "properties": {"day": {"enum": ["Monday"]}}, "required": ["day"]}, {"day": "Monday"}),
        ({"type": "object", "properties": {}}, {}),
        (None, {}),
    ):
        tool = {"type": "function", "function": {"name": "sun", "parameters": parameters}}
        (call,) = ask(client, tools=[tool], tool_choice="required", max_tokens=200).choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == wanted
    assert call_schema([Tool(**WEATHER)], "required")["properties"]["parameters"]["additionalProperties"] is False
    free = {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}}
    tool = Tool(**{**WEATHER, "function": {**WEATHER["function"], "parameters": free}})
    assert call_schema([tool], "required")["properties"]["parameters"] == free


def test_a_call_without_arguments_goes_back_as_json(server):
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "noon"}]
    body = httpx2.post(f"{server.url}/apply-template", json={"model": "caller", "messages": messages}).json()
    assert '{"name": "now", "parameters": {}}<|eot_id|>' in body["prompt"]


def test_a_model_of_another_format_refuses_tools(client):
    with pytest.raises(openai.BadRequestError, match="Llama 3"):
        ask(client, model="pocket")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        ('{"name": "f", "parameters": {"x": [1, "}"]}}', [("f", '{"x": [1, "}"]}')], None),
        ('\n {"name":"f","arguments":{}}\n', [("f", "{}")], None),
        ('{"type": "function", "name": "f", "parameters": {}}', [("f", "{}")], None),
        (
            '{"name": "f", "parameters": {"a": "\\""}}; {"name": "g", "parameters": {}}',
            [("f", '{"a": "\\""}'), ("g", "{}")],
            None,
        ),
        ('{"parameters": {"a": 1}, "name": "g"}', [("g", '{"a": 1}')], None),
        ('<function=f>{"a": 1}</function>', [("f", '{"a": 1}')], None),
        ('[f(a=1, b="x"), g()]', [("f", '{"a": 1, "b": "x"}'), ("g", "{}")], None),
        ('{"name": "unknown", "parameters": {}}', [], '{"name": "unknown", "parameters": {}}'),
        ('{"answer": 42}', [], '{"answer": 42}'),
        ("[1, 2, 3]", [], "[1, 2, 3]"),
        ("[f(a=1), h()]", [], "[f(a=1), h()]"),
        ("[f(__import__('os'))]", [], "[f(__import__('os'))]"),
        ("<functional>", [], "<functional>"),
        ("  Hello {", [], "  Hello {"),
        ("{", [], "{"),
        ("", [], ""),
        ('{"name": "f", "parameters": {"x": 1}} and more', [("f", '{"x": 1}')], "and more"),
        ('{"name": "f", "parameters": {"x": 1', [("f", '{"x": 1')], None),
    ],
)
def test_every_form_of_a_call(text, size, calls, content):
    message, _ = parsed(text, size=size)
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    assert found == calls and (message["content"] or "").strip() == (content or "").strip()
    assert len({call["id"] for call in message.get("tool_calls", ())}) == len(calls)


def test_without_parallel_calls_the_first_is_the_only_one():
    text = '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}'
    assert len(parsed(text, parallel=False)[0]["tool_calls"]) == 1
    assert len(parsed("[f(), g()]", parallel=False)[0]["tool_calls"]) == 1


def test_text_is_held_back_no_longer_than_it_may_be_a_call():
    _, deltas = parsed('{"answer": 42}')
    assert len(deltas) > 8
