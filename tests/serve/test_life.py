"""Requests that end before their time, steps that fail, and the end of the server itself."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest

from llama2.errors import RequestError
from llama2.llm.grammar import TextMatcher
from llama2.serve.config import ServeConfig
from tests.serve.conftest import client_of, serving, until

HI = [{"role": "user", "content": "Hi"}]
LONG = {"model": "pocket", "messages": HI, "temperature": 0, "extra_body": {"ignore_eos": True}}
WIRE = {"messages": HI, "temperature": 0, "ignore_eos": True, "max_tokens": 200}


@pytest.fixture(scope="module")
def narrow(pocket_path):
    """A server that writes one answer at a time, and lets two wait."""
    with serving(models=(f"pocket={pocket_path}",), max_batch=1, max_waiting=2) as server:
        yield server


@pytest.fixture
def slow_steps(narrow, monkeypatch):
    """Each step of the engine takes 20 ms longer."""
    engine = worker(narrow).engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.02) or step())


def worker(server):
    return server.models.served["pocket"].worker


def is_idle(server):
    found = worker(server)
    return found.n_answers == 0 and found.engine.is_idle and server.n_running == 0


def post_raw(server, body):
    host, port = server.url.removeprefix("http://").split(":")
    client, data = socket.create_connection((host, int(port))), json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def kill(client):
    """End a connection as the end of a process does, without a farewell."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


STREAMING = """
import json, sys, urllib.request
asked = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"content-type": "application/json"})
for line in urllib.request.urlopen(asked):
    print(line, flush=True)
"""


def test_kill_9_of_a_client_disturbs_nobody(narrow, slow_steps):
    wire = json.dumps({**WIRE, "stream": True})
    asked = [sys.executable, "-c", STREAMING, f"{narrow.url}/v1/chat/completions", wire]
    with (
        subprocess.Popen(asked, stdout=subprocess.PIPE) as process,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        assert process.stdout is not None and process.stdout.readline()
        other = pool.submit(client_of(narrow).chat.completions.create, **LONG, max_tokens=5)
        until(lambda: worker(narrow).n_answers == 2)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert other.result().usage.completion_tokens == 5
    until(lambda: is_idle(narrow))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_and_disturbs_nobody(narrow, slow_steps, stream):
    running = post_raw(narrow, {**WIRE, "stream": stream})
    until(lambda: worker(narrow).engine.stats.n_running == 1)
    queued = post_raw(narrow, {**WIRE, "stream": stream})
    until(lambda: worker(narrow).n_answers == 2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = pool.submit(client_of(narrow).chat.completions.create, **LONG, max_tokens=5)
        until(lambda: worker(narrow).n_answers == 3)
        n_steps = worker(narrow).engine.stats.n_steps
        kill(queued)
        until(lambda: worker(narrow).n_answers == 2)
        assert worker(narrow).engine.stats.n_running == 1
        kill(running)
        assert other.result().usage.completion_tokens == 5
    until(lambda: is_idle(narrow))
    assert worker(narrow).engine.stats.n_steps < n_steps + 100  # the first alone had 200 to go
    assert worker(narrow).engine.stats.n_aborted >= 1


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_left(server):
    """Ten megabytes of log-probabilities, more than the system keeps for a reader, and 1.5 s of patience."""
    body = {"messages": HI, "n": 60, "ignore_eos": True, "logprobs": True, "top_logprobs": 20, "stream": True}
    client = post_raw(server, body)
    until(lambda: server.n_running == 1)
    until(lambda: server.n_running == 0 and worker(server).n_answers == 0, seconds=60)
    client.close()
    until(lambda: is_idle(server))
    assert worker(server).engine.stats.n_aborted > 1


def test_a_full_server_says_when_to_come_again(narrow, slow_steps):
    crowd = [post_raw(narrow, WIRE) for _ in range(3)]
    until(lambda: worker(narrow).n_answers == 3)
    with pytest.raises(openai.InternalServerError) as caught:
        client_of(narrow).chat.completions.create(**LONG, max_tokens=1)
    assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) > 0
    for each in crowd:
        each.close()
    until(lambda: is_idle(narrow))


def test_a_failing_step_ends_the_requests_in_flight_and_not_the_server(narrow, monkeypatch, caplog):
    client = client_of(narrow)
    expected = client.chat.completions.create(**LONG, max_tokens=5).choices[0].message.content
    stream = client.chat.completions.create(**LONG, max_tokens=200, stream=True)
    next(iter(stream))

    words = "".join(reversed("terces"))  # a trace shows lines of code, and may

    def fail():
        raise RuntimeError(words)

    monkeypatch.setattr(worker(narrow).engine, "step", fail)
    with pytest.raises(openai.APIError, match="RuntimeError") as caught:
        list(stream)
    assert words not in str(caught.value) and words not in caplog.text and "RuntimeError" in caplog.text
    until(lambda: is_idle(narrow))
    monkeypatch.setattr(worker(narrow).engine, "step", fail)  # of the new engine
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**LONG, max_tokens=5)
    assert client.chat.completions.create(**LONG, max_tokens=5).choices[0].message.content == expected


def test_an_answer_that_is_given_up_ends_its_own_request_only(narrow, monkeypatch, caplog):
    client, wire = client_of(narrow), {"model": "pocket", "prompt": "Hi", "max_tokens": 20}
    good = client.completions.create(**wire, seed=1).choices[0].text
    advance = TextMatcher.advance

    def fail(matcher, token_id):
        matcher.n_taken = getattr(matcher, "n_taken", 0) + 1  # each one's own: a grammar tries its beginning on another
        if matcher.n_taken > 3:
            raise RequestError("a dead end")
        advance(matcher, token_id)

    monkeypatch.setattr(TextMatcher, "advance", fail)
    bad = dict(wire, extra_body={"guided_regex": "[a-z]{15}"})
    with concurrent.futures.ThreadPoolExecutor() as pool:
        others = [pool.submit(client.completions.create, **wire, seed=1) for _ in range(1)]
        text = ""
        with pytest.raises(openai.APIError, match="a dead end"):
            for chunk in client.completions.create(**bad, stream=True):
                text += chunk.choices[0].text
        assert len(text) == 3
        with pytest.raises(openai.BadRequestError, match="a dead end") as caught:
            client.completions.create(**bad)
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert [each.result().choices[0].text for each in others] == [good]
    assert "gave an answer up" in caplog.text and "a dead end" not in caplog.text
    until(lambda: is_idle(narrow))


def test_a_request_has_its_time(pocket_path):
    with serving(models=(f"pocket={pocket_path}",), request_timeout_s=0.05, max_batch=1) as server:
        slow = client_of(server)
        with pytest.raises(openai.InternalServerError, match=r"0.05 s") as caught:
            slow.chat.completions.create(**LONG)
        assert caught.value.status_code == 504 and caught.value.response.headers["x-should-retry"] == "false"
        until(lambda: is_idle(server))


def test_the_log_and_the_metrics_hold_no_words(server, client, caplog):
    with caplog.at_level("INFO", "llama2.serve"):
        secret = [{"role": "user", "content": "my secret words"}]
        client.chat.completions.create(model="pocket", messages=secret, max_tokens=2, extra_body={"colour": "crimson"})
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="pocket", messages=secret * 40, max_tokens=2)
        httpx2.get(f"{server.url}/secret?secret=words")
        until(lambda: "unknown 404" in caplog.text)
    assert "secret" not in caplog.text and "words" not in caplog.text and "crimson" not in caplog.text
    assert re.search(
        r"POST /v1/chat/completions 200 \d+ms in=\d+ out=2 127.0.0.1 req_\w{24} ignored=colour", caplog.text
    )
    metrics = httpx2.get(f"{server.url}/metrics").text
    assert "secret" not in metrics
    for name in ("requests_total", "time_to_first_token_seconds_count", "time_per_token_seconds_count"):
        assert re.search(rf"^llama2_{name}{{.*}} [1-9]", metrics, re.MULTILINE), name
    for name in ("waiting_answers", "running_answers", "cache_blocks_used", "prefix_hit_tokens_total"):
        assert re.search(rf'^llama2_{name}{{model="pocket"}} \d', metrics, re.MULTILINE), name
    assert re.search(r'^llama2_tokens_total{kind="completion",model="pocket"} [1-9]', metrics, re.MULTILINE)
    for name in ("preemptions_total", "aborts_total"):
        assert f"llama2_{name}" in metrics


def test_what_is_refused_is_not_cancelled(server):
    def cancelled():
        metrics = httpx2.get(f"{server.url}/metrics").text
        return re.findall(r"^llama2_cancelled_requests_total{.*} (.*)$", metrics, re.MULTILINE)

    before = cancelled()
    wire = {"model": "pocket", "prompt": [999_999, 1], "max_tokens": 2}
    assert httpx2.post(f"{server.url}/v1/completions", json=wire).status_code == 400
    assert cancelled() == before


def test_health_while_loading_and_a_model_that_cannot_be_loaded(pocket_path, monkeypatch):
    from llama2.serve.models import Models
    from llama2.serve.run import run
    from llama2.serve.server import Server

    go, config = threading.Event(), ServeConfig(port=0, models=(f"pocket={pocket_path}",))
    monkeypatch.setattr("llama2.serve.models.load", lambda *_, **__: go.wait(10) and 1 / 0)
    server, errors = Server(config, Models(config)), []

    def target():
        try:
            run(server)
        except ZeroDivisionError as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    until(lambda: server.url)
    until(lambda: httpx2.get(server.url + "/health").status_code == 503)
    assert int(httpx2.get(server.url + "/health").headers["retry-after"]) > 0
    done = httpx2.post(server.url + "/v1/chat/completions", json={"messages": HI})
    assert done.status_code == 503 and done.headers["retry-after"] and done.json()["error"]["code"] == "model_loading"
    go.set()
    thread.join(10)
    assert errors


def start(pocket_path, *flags):
    """Start the command itself; return the process and its address."""
    command = [
        sys.executable,
        "-m",
        "llama2",
        "serve",
        f"pocket={pocket_path}",
        "--port",
        "0",
        "--device",
        "cpu",
        *flags,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = ""
    for line in process.stderr:
        url = url or "".join(re.findall(r"http://\S+:\d+", line))
        if "is ready" in line:
            return process, url
    raise AssertionError("it did not start")


def test_sigterm_lets_running_answers_end_within_the_limit(pocket_path):
    process, url = start(pocket_path, "--drain-timeout-s", "20")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**LONG, stream=True, max_tokens=150)
        iterator = iter(stream)
        next(iterator)
        process.send_signal(signal.SIGTERM)
        chunks = list(iterator)
        assert chunks[-1].choices[0].finish_reason == "length"
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in log


def test_what_is_not_finished_in_time_ends_with_an_error(pocket_path, monkeypatch):
    with serving(models=(f"pocket={pocket_path}",), drain_timeout_s=0.5) as server:
        engine = worker(server).engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: time.sleep(0.02) or step())
        stream = iter(client_of(server).chat.completions.create(**LONG, stream=True))
        next(stream)
        server.stop()
        until(lambda: server.is_draining)
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            client_of(server).models.list()
        assert caught.value.response.headers["retry-after"]
        assert httpx2.get(server.url + "/health").status_code == 503
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
