"""Conversations over the wire, by OpenAI's own client."""

import concurrent.futures
import json
import math
import re

import httpx2
import openai
import pytest

HI = [{"role": "user", "content": "Hi"}]


def ask(client, **options):
    options = {"model": "pocket", "messages": HI, "max_tokens": 24, "temperature": 0, **options}
    return client.chat.completions.create(**options)


def streamed(client, n=1, **options):
    """Return the text of each answer, its finish reason, and all chunks."""
    chunks = list(ask(client, stream=True, n=n, **options))
    texts, reasons = [""] * n, [None] * n
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return texts, reasons, chunks


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.5, "seed": 7},
        {"temperature": 1.0, "seed": 3, "top_p": 0.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 3, "stop": ["a", "\ufffd"]},
        {"temperature": 1.0, "seed": 5, "logit_bias": {70: 5.0}},
    ],
)
def test_an_answer_is_the_models_own_whole_and_streamed(client, pocket, options):
    expected = pocket.complete(HI, max_new_tokens=24, **options)
    wire = {**options, "logit_bias": {str(key): bias for key, bias in options.get("logit_bias", {}).items()}}
    whole = ask(client, **wire)
    texts, reasons, _ = streamed(client, **wire)
    assert whole.choices[0].message.content == texts[0] == expected.text
    assert whole.choices[0].finish_reason == reasons[0] == expected.finish_reason
    assert whole.usage.completion_tokens == expected.n_new_tokens
    assert whole.usage.prompt_tokens == expected.n_prompt_tokens


def test_extra_sampling_fields_reach_the_engine(client, pocket):
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "typical_p": 0.9, "ignore_eos": True}
    sampling = {"temperature": 1.2, "seed": 4}
    expected = pocket.chat(HI, max_new_tokens=24, **sampling, **extra)
    assert ask(client, **sampling, extra_body=extra).choices[0].message.content == expected
    assert ask(client, extra_body={"top_k": -1}).choices[0].message.content == pocket.chat(
        HI, max_new_tokens=24, temperature=0
    )


def test_several_answers_stream_beside_each_other(client, pocket):
    expected = pocket.chat(HI, max_new_tokens=24, temperature=1.5, seed=7, n=3)
    assert len(set(expected)) == 3
    assert streamed(client, n=3, temperature=1.5, seed=7)[0] == expected
    whole = ask(client, n=3, temperature=1.5, seed=7)
    assert [choice.message.content for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == [0, 1, 2]


def test_the_chunks_have_openais_shape(client):
    _, _, chunks = streamed(client, stream_options={"include_usage": True})
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    first, last, usage = chunks[0].choices[0], chunks[-2].choices[0], chunks[-1]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert last.delta.model_dump(exclude_none=True) == {} and last.finish_reason == "length"
    assert usage.choices == [] and usage.usage.completion_tokens == 24
    assert usage.usage.total_tokens == 24 + usage.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_is_server_sent_events_that_end_with_done(server):
    body = {"messages": HI, "max_tokens": 2, "stream": True}
    done = httpx2.post(f"{server.url}/v1/chat/completions", json=body)
    assert done.headers["content-type"].startswith("text/event-stream")
    events = done.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(client):
    options = {"temperature": 1.5, "seed": 11, "max_tokens": 40}
    alone = ask(client, **options).choices[0].message.content
    crowd = [
        {"messages": [{"role": "user", "content": "x" * i}], "temperature": 1.3, "max_tokens": 30} for i in range(9)
    ]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        others = [pool.submit(ask, client, **each) for each in crowd]
        again = pool.submit(ask, client, **options).result().choices[0].message.content
        assert all(other.result().choices for other in others)
    assert again == alone


def test_logprobs_are_the_models_own_whole_and_streamed(client, pocket):
    expected = pocket.complete(HI, max_new_tokens=6, temperature=0, logprobs=2)
    whole = ask(client, max_tokens=6, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    _, _, chunks = streamed(client, max_tokens=6, logprobs=True, top_logprobs=2)
    pieces = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
    assert [each.logprob for each in whole] == list(expected.logprobs)
    assert pieces == whole
    for entry, token_id, top in zip(whole, expected.tokens, expected.top_logprobs, strict=True):
        assert bytes(entry.bytes) == pocket.tokenizer.token_bytes(token_id)
        assert [each.logprob for each in entry.top_logprobs] == [value for _, value in top]
    assert ask(client, max_tokens=2, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_a_length_is_bounded_by_either_name_and_by_the_context(client, pocket):
    assert ask(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    whole = ask(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert whole.usage.total_tokens == pocket.config.context_length
    assert whole.choices[0].finish_reason == "length"


def test_content_comes_as_text_or_as_parts(client):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert ask(client, messages=[{"role": "user", "content": parts}]).choices == ask(client).choices


def test_a_known_prefix_is_found_in_the_cache(client):
    long = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 3}]
    ask(client, messages=long, max_tokens=1)
    again = ask(client, messages=long, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens > 100


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, None),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_cannot_be_asked_is_a_bad_request(client, wrong, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **wrong)
    assert caught.value.body["type"] == "invalid_request_error" and caught.value.body["message"]
    assert caught.value.param == param


def test_too_long_a_prompt_names_both_numbers(client):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"\b31\d tokens .*\b256\b") as caught:
            ask(client, messages=[{"role": "user", "content": "x" * 300}], stream=stream)
        assert caught.value.code == "context_length_exceeded"


def test_a_long_prompt_is_counted_and_a_huge_one_is_not(client):
    for n, said in ((20_000, r"\b200\d\d tokens"), (2_000_000, "more than")):
        with pytest.raises(openai.BadRequestError, match=rf"{said}.*\b256\b") as caught:
            ask(client, messages=[{"role": "user", "content": "x" * n}])
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="256") as caught:
            client.embeddings.create(model="pocket", input="x" * n)
        assert caught.value.code == "context_length_exceeded"


def test_unknown_fields_are_named_and_let_be(server):
    body = {"messages": [{"role": "user", "content": "Hi", "mood": 1}], "max_tokens": 1, "colour": "red", "b\r\nad": 1}
    done = httpx2.post(f"{server.url}/v1/chat/completions", json=body)
    assert done.status_code == 200
    assert done.headers["x-llama2-ignored"] == "b??ad,colour,messages[0].mood"


def test_infinite_bias_and_probabilities_stay_json(client):
    whole = ask(client, max_tokens=2, logprobs=True, top_logprobs=20, logit_bias={"70": -100})
    assert all(math.isfinite(top.logprob) for e in whole.choices[0].logprobs.content for top in e.top_logprobs)


SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "n": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["mood", "n"],
    "additionalProperties": False,
}


def test_an_answer_has_the_form_that_is_demanded(client):
    options = {"temperature": 1.5, "max_tokens": 120}
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA}}
    for seed in range(3):
        found = ask(client, response_format=form, seed=seed, **options).choices[0]
        value = json.loads(found.message.content)
        assert value["mood"] in ("good", "bad") and 0 <= value["n"] <= 99 and found.finish_reason == "stop"
        assert streamed(client, response_format=form, seed=seed, **options)[0] == [found.message.content]
    for extra, expected in (
        ({"guided_choice": ["yes", "no"]}, r"yes|no"),
        ({"guided_regex": "[ab]{3}"}, r"[ab]{3}"),
        ({"guided_json": SCHEMA}, r"\{.*\}"),
        ({"guided_grammar": 'root ::= "x" "y"'}, r"xy"),
    ):
        assert re.fullmatch(expected, ask(client, extra_body=extra, **options).choices[0].message.content, re.DOTALL)
    whole = client.completions.create(model="pocket", prompt="One", max_tokens=9, extra_body={"guided_choice": ["yes"]})
    assert whole.choices[0].text == "yes"


@pytest.mark.parametrize(
    "wrong",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wizard"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        {"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}},
        {"extra_body": {"guided_regex": "("}},
        {"extra_body": {"guided_choice": []}},
        {"extra_body": {"guided_grammar": "root :== x"}},
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(client, wrong):
    with pytest.raises(openai.BadRequestError):
        ask(client, **wrong)
