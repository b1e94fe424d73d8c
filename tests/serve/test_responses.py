"""OpenAI's newer route, by its own client."""

import openai
import pytest

from tests.serve.conftest import TEXT
from tests.serve.test_tools import ARGUMENTS

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}


def ask(client, **options):
    return client.responses.create(
        **{"model": "pocket", "input": "Hi", "temperature": 0, "max_output_tokens": 24, **options}
    )


def test_an_answer_is_that_of_the_chat_route(client, pocket):
    expected = pocket.chat([{"role": "user", "content": "Hi"}], max_new_tokens=24, temperature=0)
    whole = ask(client)
    assert whole.output_text == expected
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in whole.output] == ["incomplete"]
    assert whole.usage.output_tokens == 24 and whole.usage.total_tokens == 24 + whole.usage.input_tokens
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    assert ask(client, input=items).output_text == expected


def test_instructions_are_the_system_message(client, pocket):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ask(client, instructions="Be brief.").output_text == pocket.chat(messages, max_new_tokens=24, temperature=0)


def test_the_events_tell_of_the_same_answer(client):
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == ask(client).output_text


def test_tools(client):
    options = {"model": "caller", "tools": [WEATHER], "max_output_tokens": 60}
    (call,) = ask(client, **options).output
    assert (call.type, call.name, call.arguments, call.status) == ("function_call", "weather", ARGUMENTS, "completed")
    events = list(ask(client, stream=True, **options))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == ARGUMENTS and events[-1].type == "response.completed"
    history = [
        {"role": "user", "content": "How is Paris?"},
        {"type": "function_call", "call_id": call.call_id, "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"},
    ]
    assert ask(client, **{**options, "input": history}).output[0].name == "weather"
    spoken = ask(client, **{**options, "tool_choice": "none", "tools": [WEATHER]})
    assert spoken.output[0].type == "message" and TEXT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"previous_response_id": "resp_1"}, "send the whole conversation"),
        ({"background": True}, "ask for a stream"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"text": {"format": {"type": "json_schema"}}}, "schema"),
        ({"tool_choice": "required"}, "no tools"),
    ],
)
def test_what_cannot_be_asked_is_a_bad_request(client, wrong, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **wrong)
