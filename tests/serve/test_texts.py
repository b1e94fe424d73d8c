"""Vectors, ids, templates and the list of models over the wire."""

import base64
import struct

import httpx2
import openai
import pytest
from torch.nn.functional import normalize


def post(server, path, **body):
    done = httpx2.post(server.url + path, json=body)
    assert done.status_code == 200, done.text
    return done.json()


def test_embeddings_are_the_models_own(client, pocket):
    vectors = pocket.embed(["a", "longer text"])
    expected = normalize(vectors, dim=1).tolist()
    found = client.embeddings.create(model="pocket", input=["a", "longer text"], encoding_format="float")
    assert [each.embedding for each in found.data] == expected
    assert [each.index for each in found.data] == [0, 1] and found.usage.total_tokens == found.usage.prompt_tokens > 0
    ids = pocket.prompt_ids("a")
    for given in ("a", ids, [ids]):
        assert (
            client.embeddings.create(model="pocket", input=given, encoding_format="float").data[0].embedding
            == expected[0]
        )
    last = client.embeddings.create(
        model="pocket", input="a", encoding_format="float", dimensions=64, extra_body={"pooling": "last"}
    )
    assert last.data[0].embedding == normalize(pocket.embed("a", pooling="last"), dim=0).tolist()
    extra = {"normalize": False}
    found = client.embeddings.create(model="pocket", input="a", encoding_format="float", extra_body=extra)
    assert found.data[0].embedding == vectors[0].tolist()


def test_embeddings_as_base64(server, client, pocket):
    expected = normalize(pocket.embed("a"), dim=0).tolist()
    body = post(server, "/v1/embeddings", input="a", encoding_format="base64")
    raw = base64.b64decode(body["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == expected
    assert client.embeddings.create(model="pocket", input="a").data[0].embedding == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [{"dimensions": 32}, {"input": []}, {"input": "x" * 300}, {"pooling": "max"}])
def test_embeddings_that_cannot_be_made(client, wrong):
    options = {"model": "pocket", "input": "a", **wrong}
    extra = {"pooling": options.pop("pooling")} if "pooling" in options else {}
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(**options, extra_body=extra)


def test_tokenize_and_back(server, pocket):
    ids = pocket.prompt_ids("Hello")
    assert post(server, "/tokenize", prompt="Hello") == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    assert post(server, "/tokenize", content="Hello")["tokens"] == ids[1:]  # llama.cpp's name and way
    assert post(server, "/tokenize", content="Hello", add_special=True)["tokens"] == ids
    assert post(server, "/tokenize", prompt="Hello", add_special_tokens=False)["tokens"] == ids[1:]
    pieces = post(server, "/tokenize", prompt="Hi", with_pieces=True)["tokens"]
    assert pieces[0] == {"id": 1, "piece": "<s>"} and pieces[-1]["piece"] == "i"
    told = post(server, "/tokenize", prompt="Hi", return_token_strs=True)
    assert told["token_strs"] == [each["piece"] for each in pieces] and told["count"] == len(told["tokens"])
    messages = [{"role": "user", "content": "Hi"}]
    assert post(server, "/tokenize", messages=messages)["tokens"] == pocket.prompt_ids(messages)
    assert post(server, "/detokenize", tokens=ids)["prompt"] == "Hello"


def test_apply_template(server, pocket):
    body = post(server, "/apply-template", messages=[{"role": "user", "content": "Hi"}])
    assert body["prompt"].startswith("<s>") and "[INST] Hi [/INST]" in body["prompt"]
    assert body["tokens"] == pocket.prompt_ids([{"role": "user", "content": "Hi"}])


def test_a_conversation_is_rendered_up_to_where_it_is_wanted(server):
    """By the model of these tests that speaks Llama 3."""
    asked, begun = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure,"}
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def prompt(*messages, **options):
        body = post(server, "/apply-template", model="caller", messages=messages, **options)
        assert post(server, "/tokenize", model="caller", messages=messages, **options)["tokens"] == body["tokens"]
        return body["prompt"]

    whole = prompt(asked)
    assert whole.endswith(header)
    assert prompt(asked, add_generation_prompt=False) + header == whole
    assert prompt(asked, begun, continue_final_message=True) == whole + "Sure,"
    assert prompt(asked, begun, add_generation_prompt=False) == whole + "Sure,<|eot_id|>"
    assert '"name": "weather"' in prompt(asked, tools=[{"type": "function", "function": {"name": "weather"}}])


def test_models(client):
    assert [model.id for model in client.models.list()] == ["pocket", "caller"]
    assert client.models.retrieve("caller").owned_by == "llama2"
    with pytest.raises(openai.NotFoundError, match="did you mean 'pocket'") as caught:
        client.models.retrieve("pocke")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
