"""Fields that OpenAI does not have and other servers do: their clients send them, and get what they want."""

import json
import re

import httpx2
import openai
import pytest

HI = [{"role": "user", "content": "Hi"}]
BEGUN = [*HI, {"role": "assistant", "content": "Once upon"}]
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


def ask(client, messages=HI, **extra):
    options = {"model": "pocket", "max_tokens": 16, "temperature": 0, "extra_body": extra}
    return client.chat.completions.create(messages=messages, **options)


def complete(client, prompt="One", **extra):
    options = {"model": "pocket", "max_tokens": 16, "temperature": 0, "extra_body": extra}
    return client.completions.create(prompt=prompt, **options)


def post(server, path, **body):
    return httpx2.post(server.url + path, json={"model": "pocket", **body})


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, r'\{\s*"n"\s*:\s*[12]\s*\}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r'\{\s*"n"\s*:\s*[12]\s*\}'),
        ({"structured_outputs": {"json_object": True}}, r"\{.*"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, r"[ab]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, r"yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "x" "y"'}}, r"xy"),
        ({"json_schema": SCHEMA}, r'\{\s*"n"\s*:\s*[12]\s*\}'),
        ({"grammar": 'root ::= "x" "y"'}, r"xy"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, r'\{\s*"n"\s*:\s*[12]\s*\}'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, r'\{\s*"n"\s*:\s*[12]\s*\}'),
    ],
)
def test_a_form_may_be_demanded_in_several_ways(client, extra, expected):
    found = ask(client, max_tokens=40, **extra).choices[0].message.content
    assert re.fullmatch(expected, found, re.DOTALL)


@pytest.mark.parametrize(
    "extra",
    [
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": {"1": "a"}}},
        {"structured_outputs": {"regex": "[.*"}},
        {"structured_outputs": {"choice": ["b"]}, "guided_regex": "a"},
        {"response_format": {"type": "json_object", "schema": 123}},
        {"response_format": {"type": "json_object", "schema": {"type": "hiccup"}}},
        {"response_format": {"type": "text", "schema": SCHEMA}},
    ],
)
def test_a_form_that_is_none_is_refused(client, extra):
    with pytest.raises(openai.BadRequestError):
        ask(client, **extra)


def test_the_stop_text_may_be_part_of_the_answer(client, pocket):
    whole = pocket.generate("One", max_new_tokens=16, temperature=0)
    stop = whole[4:6]
    end = whole.find(stop) + len(stop)
    found = complete(client, stop=stop, include_stop_str_in_output=True).choices[0]
    assert (found.text, found.finish_reason) == (whole[:end], "stop")
    chunks = complete(client, stop=stop, include_stop_str_in_output=True, stream=True)
    events = [json.loads(line[6:]) for line in chunks.split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == whole[:end]
    assert complete(client, stop=stop).choices[0].text == whole[: whole.find(stop)]


def test_more_stops_than_openai_takes(client):
    assert complete(client, stop=[f"no {i}" for i in range(64)]).choices
    with pytest.raises(openai.BadRequestError, match="64"):
        complete(client, stop=[f"no {i}" for i in range(65)])


def test_an_answer_goes_on_where_the_last_message_ends(client, pocket):
    ids = [*pocket.prompt_ids(HI), *pocket.tokenizer.encode("Once upon")]
    expected = pocket.continue_ids(ids, max_new_tokens=16, temperature=0)[0][len(ids) :]
    whole = ask(client, BEGUN, continue_final_message=True, return_token_ids=True)
    assert (whole.prompt_token_ids, whole.choices[0].token_ids) == (ids, expected)
    text = whole.choices[0].message.content
    again = ask(client, BEGUN, continue_final_message=True, add_generation_prompt=False, echo=True)
    assert again.choices[0].message.content == "Once upon" + text
    options = {"model": "pocket", "messages": BEGUN, "max_tokens": 16, "temperature": 0, "stream": True}
    chunks = client.chat.completions.create(**options, extra_body={"continue_final_message": True, "echo": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Once upon" + text


def test_a_turn_that_goes_on_still_ends_as_a_turn(client):
    """The model of these tests ends its sentence with <|eot_id|>."""
    begun = [*HI, {"role": "assistant", "content": "It is sunny in Paris."}]
    options = {"model": "caller", "messages": begun, "max_tokens": 40, "temperature": 0}
    found = client.chat.completions.create(**options, extra_body={"continue_final_message": True}).choices[0]
    assert (found.message.content, found.finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    ("messages", "extra"),
    [
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": True}),
        (HI, {"continue_final_message": True}),
        (BEGUN[1:], {"continue_final_message": True}),
        ([*HI, {"role": "assistant", "content": " "}], {"continue_final_message": True}),
        (HI, {"echo": True}),
    ],
)
def test_what_cannot_go_on_is_refused(client, messages, extra):
    with pytest.raises(openai.BadRequestError):
        ask(client, messages, **extra)


def test_token_ids_are_told_whole_and_streamed(client, pocket):
    chat, text = (pocket.complete(each, max_new_tokens=16, temperature=0) for each in (HI, "One"))
    whole = ask(client, return_token_ids=True)
    assert whole.prompt_token_ids == pocket.prompt_ids(HI) and whole.choices[0].token_ids == [*chat.tokens]
    found = complete(client, return_token_ids=True).choices[0]
    assert found.prompt_token_ids == pocket.prompt_ids("One") and found.token_ids == [*text.tokens]
    assert "token_ids" not in ask(client).choices[0].model_dump()
    options = {"model": "pocket", "max_tokens": 16, "temperature": 0, "stream": True}
    extra = {"return_token_ids": True}
    chunks = list(client.chat.completions.create(messages=HI, extra_body=extra, **options))
    told = [chunk.model_extra["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk.model_extra]
    assert told == [pocket.prompt_ids(HI)]
    assert [i for chunk in chunks for i in chunk.choices[0].model_extra.get("token_ids", [])] == [*chat.tokens]
    chunks = list(client.completions.create(prompt="One", extra_body=extra, **options))
    assert chunks[0].choices[0].prompt_token_ids == pocket.prompt_ids("One")
    assert [i for chunk in chunks for i in chunk.choices[0].model_extra.get("token_ids", [])] == [*text.tokens]


def test_a_prompt_is_judged_token_by_token(client, pocket):
    ids = pocket.prompt_ids("One")
    for found in (
        complete(client, ["One", "Two"], prompt_logprobs=2).choices[0].prompt_logprobs,
        complete(client, prompt_logprobs=2, echo=True, logprobs=1, n=2, temperature=1).choices[1].prompt_logprobs,
    ):
        assert found[0] is None and len(found) == len(ids)
        for token_id, expected, entry in zip(ids[1:], pocket.score("One").logprobs, found[1:], strict=True):
            ranks = sorted(each["rank"] for each in entry.values() if each["rank"])
            assert ranks == [1, 2] and 2 <= len(entry) <= 3
            assert entry[str(token_id)]["logprob"] == pytest.approx(expected, abs=1e-5)
            assert entry[str(token_id)]["decoded_token"].encode() == pocket.tokenizer.token_bytes(token_id)
    whole = ask(client, prompt_logprobs=0).prompt_logprobs
    assert [list(each) for each in whole[1:]] == [[str(i)] for i in pocket.prompt_ids(HI)[1:]]
    lists = complete(client, prompt_logprobs=3, echo=True, logprobs=1).choices[0].logprobs
    assert lists == complete(client, echo=True, logprobs=1).choices[0].logprobs
    plain = complete(client, prompt_logprobs=3, logprobs=1).choices[0].logprobs
    assert plain == complete(client, logprobs=1).choices[0].logprobs
    for wrong in ({"prompt_logprobs": -1}, {"prompt_logprobs": 21}, {"prompt_logprobs": 1, "stream": True}):
        with pytest.raises(openai.BadRequestError):
            complete(client, **wrong)


@pytest.mark.parametrize("is_chat", [True, False])
def test_usage_is_told_all_the_way_if_asked(client, is_chat):
    options = {"model": "pocket", "max_tokens": 9, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
    route = client.chat.completions if is_chat else client.completions
    asked = {"messages": HI} if is_chat else {"prompt": "One"}
    chunks = list(
        route.create(**asked, **options, stream_options={"include_usage": True, "continuous_usage_stats": True})
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and len(set(counts)) > 5 and counts[-1] == 9
    silent = route.create(**asked, **options, stream_options={"include_usage": False, "continuous_usage_stats": True})
    assert all(chunk.usage is None for chunk in silent)


def test_other_names_of_the_same(server):
    def text(**body):
        done = post(server, "/v1/completions", prompt="abcdefgh " * 9, temperature=1, seed=1, **body)
        assert done.status_code == 200 and "x-llama2-ignored" not in done.headers
        return [choice["text"] for choice in done.json()["choices"]]

    assert text(n_predict=5) == text(max_tokens=5)
    assert text(repeat_penalty=9.0) == text(repetition_penalty=9.0) != text()
    assert text(n=2, use_beam_search=True) == text(n=2, beam_width=2)


def test_v1_may_be_left_out_of_the_address(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        assert ask(client).choices[0].message.content == ask_with_v1(server)
        assert client.models.list().data and client.models.retrieve("pocket").id == "pocket"


def ask_with_v1(server):
    return post(server, "/v1/chat/completions", messages=HI, max_tokens=16, temperature=0).json()["choices"][0][
        "message"
    ]["content"]


def test_a_bias_for_what_is_no_token_is_named(client):
    with pytest.raises(openai.BadRequestError, match="'bad1', 'bad2' are none"):
        ask(client, logit_bias={"bad1": 1, "70": 1, "bad2": 2})
