"""Who may ask and how much, on servers of their own."""

import re

import httpx2
import openai
import pytest

from llama2.errors import RequestError
from llama2.serve.config import ServeConfig
from llama2.serve.keys import Bucket, caller, read_keys
from llama2.serve.refusal import Refusal
from llama2.serve.run import serve
from tests.serve.conftest import client_of, serving

HI = [{"role": "user", "content": "Hi"}]


def ask(client):
    return client.chat.completions.create(model="pocket", messages=HI, max_tokens=4)


@pytest.fixture(scope="module")
def locked(pocket_path):
    keys = ("first-secret", "second-secret")
    settings = dict(requests_per_minute=6, tokens_per_minute=120, allow_origin=("https://page.example",))
    with serving(keys, models=(f"pocket={pocket_path}",), **settings) as server:
        yield server


def test_a_key_is_needed_and_any_of_them_will_do(locked):
    for wrong in ("third-secret", "first-secre", "\u00e9"):
        with pytest.raises(openai.AuthenticationError) as caught:
            httpx2_post(locked, wrong)
        assert caught.value.body["type"] == "authentication_error"
    assert ask(client_of(locked, "second-secret")).choices
    assert httpx2.get(locked.url + "/health").status_code == 200
    for path in ("/metrics", "/v1/models", "/openapi.json", "/tokenize"):
        assert httpx2.get(locked.url + path).status_code == 401
    key = {"authorization": "Bearer second-secret"}
    metrics = httpx2.get(locked.url + "/metrics", headers=key).text  # also who is refused is counted by route
    assert re.search(r'^llama2_requests_total{path="/v1/models",status="401"} [1-9]', metrics, re.MULTILINE)


def httpx2_post(server, key):
    """Ask with a key that the client's own library may refuse to send."""
    done = httpx2.get(server.url + "/v1/models", headers={b"authorization": b"Bearer " + key.encode()})
    assert done.status_code == 401 and done.headers["www-authenticate"] == "Bearer"
    raise openai.AuthenticationError("", response=done, body=done.json()["error"])


def test_each_key_has_its_own_limit(locked):
    first = client_of(locked, "first-secret")
    answered = 0
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(10):
            ask(first)
            answered += 1
    assert 3 <= answered <= 7  # 6 requests, or 120 tokens
    assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "rate_limit_exceeded"
    assert ask(client_of(locked, "second-secret")).choices


def test_pages_of_allowed_origins_may_ask(locked):
    allowed = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert httpx2.options(locked.url + "/v1/models", headers=allowed).headers["access-control-allow-origin"]
    other = {**allowed, "origin": "https://evil.example"}
    assert "access-control-allow-origin" not in httpx2.options(locked.url + "/v1/models", headers=other).headers


def test_every_key_is_compared(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(a) or a == b)
    assert caller(["one", "two", "three"], "Bearer one") == "key 1"
    with pytest.raises(Refusal):
        caller(["one", "two", "three"], "Bearer four")
    assert len(compared) == 6


def test_a_bucket_refills_and_may_go_into_debt():
    bucket = Bucket(60)
    assert bucket.wait_s(60) == 0
    bucket.take(90)
    assert 30 < bucket.wait_s(1) < 32
    bucket.at -= 40
    assert bucket.wait_s(1) == 0
    assert 49 < bucket.wait_s(1000) < 51  # more than a full bucket is never waited for


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nabcdefgh # Anna\n\n  ijklmnop\n")
    assert read_keys(path) == ("abcdefgh", "ijklmnop")
    for text, message in (("# none\n", "no key"), ("short\n", "8 or more"), ("two words\n", "without spaces")):
        path.write_text(text)
        with pytest.raises(RequestError, match=message):
            read_keys(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_server_that_cannot_begin_says_why(pocket_path, server):
    port = int(server.url.rpartition(":")[2])
    for settings, message in (
        ({}, "needs a model"),
        ({"models": ("a=x", "a=y")}, "two models"),
        ({"models": ("x",), "host": "0.0.0.0"}, "--api-keys FILE, or --no-auth"),
        ({"models": ("x",), "port": port}, "choose another --port"),
        ({"models": ("x",), "adapter": ("y",)}, "NAME=FOLDER"),
    ):
        with pytest.raises(RequestError, match=message):
            serve(ServeConfig(**settings))
