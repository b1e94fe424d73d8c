"""Two thousand requests of all sorts, clients that leave or mean harm; afterwards all is as it was."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time

import httpx2
import pytest

from tests.serve.conftest import until

N_REQUESTS, N_CLIENTS = 2000, 32
HOSTILE = [
    b"{",
    b"[" * 5000,
    b"\xff\xfe{}",
    json.dumps({"model": "pocket", "prompt": [10**9]}).encode(),
    json.dumps({"model": "pocket", "prompt": "a" * 5000}).encode(),
    json.dumps({"model": "pocket", "prompt": "a", "temperature": "hot"}).encode(),
    json.dumps({"model": "nobody", "prompt": "a"}).encode(),
    json.dumps({"model": "pocket", "prompt": "a", "max_tokens": -1}).encode(),
    json.dumps({"model": "pocket", "prompt": "a", "n": 10**6}).encode(),
]


def start(path, log):
    """Start the real command; return its process and address. It speaks to a file: a full pipe would stop it."""
    command = [sys.executable, "-m", "llama2", "serve", f"pocket={path}", "--port", "0", "--max-batch", "8"]
    command += ["--cache-tokens", "1024"]  # so that answers are preempted
    with log.open("w") as file:
        server = subprocess.Popen(command, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until(lambda: re.search(r"http://[\d.:]+", log.read_text()), seconds=60)
    return server, re.search(r"http://[\d.:]+", log.read_text())[0]


def resident(pid: int) -> int:
    """Return the resident memory of a process, in MiB."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmRSS"))


def measure(http, name: str) -> float:
    text = http.get("/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


async def soak(url: str, rng: random.Random) -> dict[str, int]:
    """Let clients ask at random; count what became of it."""
    counts: dict[str, int] = {}
    numbers = iter(range(N_REQUESTS))

    async def one(http: httpx2.AsyncClient, kind: float, body: dict) -> str:
        if kind < 0.1:
            answer = await http.post("/v1/completions", content=rng.choice(HOSTILE))
            assert 400 <= answer.status_code < 500 and "error" in answer.json(), answer.text
            return "refused"
        if kind < 0.1 + 1 / 3:
            with_patience = rng.choice([0.0, 0.01, 0.05, 0.2])
            try:
                async with asyncio.timeout(with_patience):
                    await http.post("/v1/completions", json=body)
            except TimeoutError:
                return "left"
            return "answered before it left"
        if body["stream"]:
            text = ""
            async with http.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        assert "error" not in event, event
                        text += "".join(each["text"] for each in event["choices"])
            return "streamed"
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return "answered"

    async def client() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=300) as http:
            for number in numbers:
                prompt = [rng.randrange(3, 200) for _ in range(rng.randint(1, 150))]
                body = dict(model="pocket", prompt=prompt, max_tokens=rng.randint(1, 80), seed=number)
                body |= dict(stream=rng.random() < 0.5, n=rng.choice([1, 1, 1, 2, 3]), temperature=rng.choice([0, 1]))
                what = await one(http, rng.random(), body)
                counts[what] = counts.get(what, 0) + 1

    await asyncio.gather(*(client() for _ in range(N_CLIENTS)))
    return counts


@pytest.mark.evidence
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_nothing_is_left_of_two_thousand_requests(pocket_path, tmp_path):
    server, url = start(pocket_path, tmp_path / "log")
    try:
        with httpx2.Client(base_url=url, timeout=300) as http:
            while http.get("/health").status_code != 200:
                time.sleep(0.1)
            asked = dict(model="pocket", prompt="Hello", max_tokens=40, temperature=0, ignore_eos=True)
            before = http.post("/v1/completions", json=asked).json()["choices"]
            asyncio.run(soak(url, random.Random(1)))  # after this the memory has found its size
            first = resident(server.pid)
            counts = asyncio.run(soak(url, random.Random(2)))
            for _ in range(100):
                if not measure(http, "llama2_running_answers") and not measure(http, "llama2_waiting_answers"):
                    break
                time.sleep(0.1)
            assert sum(counts.values()) == N_REQUESTS
            assert counts["left"] > N_REQUESTS / 6 and counts["refused"] > 100 and counts["streamed"] > 300, counts
            assert measure(http, "llama2_cache_blocks_used") == 0
            assert measure(http, "llama2_running_answers") == measure(http, "llama2_waiting_answers") == 0
            assert measure(http, "llama2_preemptions_total") > 0 and measure(http, "llama2_aborts_total") > 0
            assert resident(server.pid) <= first + 20
            assert http.post("/v1/completions", json=asked).json()["choices"] == before
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0
