"""What a server meets in the street: every one of these is refused, while others are served."""

import contextlib
import json
import resource
import socket

import httpx2
import pytest

CHAT = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def post(server, content, path=CHAT, **headers):
    return httpx2.post(server.url + path, content=content, headers={"content-type": "application/json", **headers})


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_served(server):
    return httpx2.post(server.url + CHAT, json=GOOD).status_code == 200


def error_of(done, status):
    assert done.status_code == status, done.text
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "JSON list"),
        (b'"x"', "JSON str"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": 1e999}', "temperature"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "too long"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 50_000, "nested"),
        (b"null", "NoneType"),
        (json.dumps({"messages": [{"role": "user", "content": "\udcff"}]}).encode(), "surrogate"),
        (json.dumps({"messages": [{"role": "\udcff", "content": "x"}]}).encode(), "role"),
        (json.dumps({"model": "\udcff", **GOOD}).encode(), "does not exist"),
        (json.dumps({**GOOD, "tools": [{"type": "function", "function": {"name": "a b"}}]}).encode(), "tools"),
    ],
)
def test_bodies_that_are_none(server, content, message):
    done = post(server, content)
    error = error_of(done, 404 if message == "does not exist" else 400)
    assert message in error["message"] + str(error["param"])


def test_a_body_of_fifty_megabytes_is_refused_before_it_is_read(server):
    with connect(server) as client:
        client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50000000\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 413")  # nothing of it was sent

    def endless():
        while True:
            yield b"x" * 100_000

    with contextlib.suppress(httpx2.HTTPError):  # the connection is closed upon it
        assert post(server, endless()).status_code == 413
    assert is_served(server)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", *[1] * 900_000]}),
        ("/v1/completions", {"prompt": [1] * 1_200_000}),
        ("/v1/completions", {"prompt": [[1]] * 600_000}),
        ("/v1/completions", {"prompt": "a" * 9_000_000}),
        (CHAT, {"messages": [{}] * 900_000}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 9_000_000}]}),
        (CHAT, {**GOOD, "logit_bias": {str(i): "x" for i in range(100_000)}}),
        (CHAT, {**GOOD, **{f"field{i}": 1 for i in range(100_000)}}),
        ("/v1/embeddings", {"input": "a" * 9_000_000}),
        ("/tokenize", {"prompt": "a" * 9_000_000}),
    ],
)
def test_large_bodies_cost_little(server, path, body):
    """Six megabytes once took 70 seconds and 6 GB to refuse, in which nobody else was heard."""
    data = json.dumps(body, separators=(",", ":")).encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert post(server, data, path).status_code in (400, 413)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_slow_client_is_left_and_holds_up_nobody(server):
    """The server of these tests waits 1.5 seconds."""
    with connect(server) as headers, connect(server) as body, connect(server) as silent:
        headers.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        body.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert is_served(server)
        assert body.recv(1000).startswith(b"HTTP/1.1 408")
        assert headers.recv(1000) == b"" and silent.recv(1000) == b""
    assert is_served(server)


@pytest.mark.parametrize(
    "request_line",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"a" * 100_000,
    ],
)
def test_what_is_no_http(server, request_line):
    with connect(server) as client:
        try:
            client.sendall(request_line + b"\r\n\r\n")
            assert client.recv(1000).startswith((b"HTTP/1.1 400", b""))
        except ConnectionError:
            pass
    assert is_served(server)


def test_wrong_routes_and_methods(server):
    assert error_of(httpx2.get(server.url + "/v1/nothing"), 404)["code"] == "unknown_url"
    done = httpx2.get(server.url + CHAT)
    assert error_of(done, 405) and done.headers["allow"] == "POST"
    error_of(httpx2.post(server.url + "/health", json={}), 405)
    error_of(httpx2.get(server.url + "/v1/models/" + "x" * 5000), 404)


def test_pages_of_other_origins_are_refused(server):
    error_of(httpx2.post(server.url + CHAT, json=GOOD, headers={"origin": "http://evil.example"}), 403)
    error_of(httpx2.post(server.url + CHAT, json=GOOD, headers={"host": "evil.example"}), 403)
    same = httpx2.post(server.url + CHAT, json=GOOD, headers={"origin": server.url})
    assert same.status_code == 200 and "access-control-allow-origin" not in same.headers


def test_more_answers_than_there_is_room_for(server):
    many = {"prompt": ["x"] * 20, "n": 5, "max_tokens": 1}
    assert "at most 96" in error_of(post(server, json.dumps(many).encode(), "/v1/completions"), 400)["message"]


@pytest.mark.slow
def test_whatever_its_own_description_allows_is_answered_or_refused(server):
    """Schemathesis makes requests of /openapi.json, valid ones and broken ones; none may be a mistake of the server."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode, openapi

    schema = openapi.from_dict(httpx2.get(server.url + "/openapi.json").json())
    statuses = set()
    for operation in schema.get_all_operations():
        for mode in GenerationMode:

            @seed(1)
            @settings(max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
            @given(operation.ok().as_strategy(generation_mode=mode))
            def run(case):
                response = case.call(base_url=server.url)
                statuses.add(response.status_code)
                assert response.status_code < 500, response.text

            with contextlib.suppress(Unsatisfiable):  # some routes take nothing that could be wrong
                run()
    assert {200, 400} <= statuses
