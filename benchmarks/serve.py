"""Many clients at once: `llama2 serve` over the wire, beside naive batching with transformers.

    python -m benchmarks.serve [--model tinyllama-1.1b] [--dtype bfloat16] [--clients 1 4 8 16] [--arrivals 24]

Each client asks, waits for its answer, and asks again; prompts have 32 to 160 tokens and answers 32, the same ones
on both sides. Then so many requests arrive by themselves, in a fixed pattern drawn once (Poisson, at four fifths of
what eight clients got), whatever has been answered. Ours is the real command in a process of its own, asked over HTTP
and streaming. The peer holds the same weights in a process of its own and answers whoever waits in one padded
`generate`, which is what people write who have no server; its answers come whole.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2
import torch

import llama2
from benchmarks.measure import Company, report, their_model
from llama2.model.config import ModelConfig
from llama2.model.family import family_config
from llama2.model.transformer import build
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

Load = Callable[[Any], Awaitable["Timings"]]
"""Asks by the function that it is given, and returns what was seen."""
N_NEW = 32
PER_CLIENT = 3
"""Requests of each client."""


def prompt(number: int, n_vocab: int) -> list[int]:
    """Return the ids of the number-th request: no two begin alike."""
    length = 32 + (number * 37) % 129
    return [3 + (number * 7919 + i * 104_729) % (n_vocab - 3) for i in range(length)]


@dataclass
class Timings:
    """What a round of clients saw, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: float = 0.0
    n_tokens: int = 0

    def summary(self) -> dict[str, object]:
        return {
            "tokens_per_s": round(self.n_tokens / self.whole, 2),
            **percentiles("first_token", self.first),
            **percentiles("between_tokens", self.between),
        }


def percentiles(name: str, seconds: list[float]) -> dict[str, object]:
    """Return the median, the 95th and the 99th percentile in milliseconds; nothing of less than two."""
    if len(seconds) < 2:
        return {}
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {f"{name}{of}_ms": round(1e3 * cuts[at - 1], 1) for of, at in {"": 50, "_p95": 95, "_p99": 99}.items()}


async def drive(ask, n_clients: int, n_vocab: int) -> Timings:
    """Let clients ask one after the other, each as soon as it has its answer."""
    timings = Timings()

    async def client(which: int) -> None:
        for turn in range(PER_CLIENT):
            await ask(prompt(which * PER_CLIENT + turn, n_vocab), timings)

    start = time.perf_counter()
    await asyncio.gather(*(client(which) for which in range(n_clients)))
    timings.whole = time.perf_counter() - start
    return timings


def pattern(n: int, per_s: float) -> list[float]:
    """Return when each of n requests arrives, in seconds: the same ones each time."""
    draw = random.Random(0)
    return list(accumulate(draw.expovariate(per_s) for _ in range(n)))


async def arrive(ask, times: list[float], n_vocab: int) -> Timings:
    """Let requests arrive at these times, whatever is still being answered."""
    timings = Timings()

    async def one(number: int, at: float) -> None:
        await asyncio.sleep(at)
        await ask(prompt(number, n_vocab), timings)

    start = time.perf_counter()
    await asyncio.gather(*(one(number, at) for number, at in enumerate(times)))
    timings.whole = time.perf_counter() - start
    return timings


def our_side(url: str, load: Load) -> Timings:
    async def run() -> Timings:
        async with httpx2.AsyncClient(base_url=url, timeout=600) as http:

            async def ask(ids: list[int], timings: Timings) -> None:
                body = dict(model="m", prompt=ids, max_tokens=N_NEW, temperature=0, ignore_eos=True, stream=True)
                start = last = time.perf_counter()
                is_first = True
                async with http.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200, await response.aread()
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        now = time.perf_counter()
                        (timings.first if is_first else timings.between).append(now - (start if is_first else last))
                        last, is_first = now, False
                timings.n_tokens += N_NEW

            return await load(ask)

    return asyncio.run(run())


def their_side(jobs, answers, load: Load) -> Timings:
    async def run() -> Timings:
        waiting: dict[int, asyncio.Future[None]] = {}

        async def hear() -> None:
            while True:
                for number in await asyncio.to_thread(answers.get):
                    waiting.pop(number).set_result(None)

        async def ask(ids: list[int], timings: Timings) -> None:
            number, start = len(timings.first) + 1000 * len(waiting) + id(ids), time.perf_counter()
            waiting[number] = asyncio.get_running_loop().create_future()
            done = waiting[number]
            jobs.put((number, ids))
            await done
            timings.first.append(time.perf_counter() - start)
            timings.n_tokens += N_NEW

        listener = asyncio.create_task(hear())
        timings = await load(ask)
        listener.cancel()
        answers.put([])  # lets the thread that listens go
        return timings

    return asyncio.run(run())


def peer(path: str, dtype: str, jobs, answers) -> None:
    """Answer whoever waits, all together, until None comes."""
    model = their_model(llama2.load(path, dtype=dtype, device="cpu").model)
    answers.put("ready")
    while (job := jobs.get()) is not None:
        batch = [job]
        time.sleep(0.005)  # whoever asks at the same moment
        while not jobs.empty():
            batch.append(jobs.get())
        longest = max(len(ids) for _, ids in batch)
        tokens = torch.tensor([[0] * (longest - len(ids)) + ids for _, ids in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in batch])
        with torch.no_grad():
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False, pad_token_id=0
            )
        answers.put([number for number, _ in batch])


def vocabulary_of(n: int) -> Tokenizer:
    """Return a vocabulary of n pieces, most of which mean nothing."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"x{i}" for i in range(n - len(pieces))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (n - 259)]
    scores = tuple(-float(i) for i in range(n))
    return Tokenizer(Vocabulary("spm", tuple(pieces), tuple(types), scores=scores, bos_id=1, eos_id=2, unk_id=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tinyllama-1.1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--arrivals", type=int, default=24, help="requests of the fixed pattern; 0: none")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    config = family_config(options.model)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model")
        llama2.save(
            build(config, dtype=getattr(torch, options.dtype)), path, tokenizer=vocabulary_of(config.vocab_size)
        )
        measure(path, config, options)


def measure(path: str, config: ModelConfig, options: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    jobs, answers = context.Queue(), context.Queue()
    other = context.Process(target=peer, args=(path, options.dtype, jobs, answers), daemon=True)
    other.start()
    command = [sys.executable, "-m", "llama2", "serve", f"m={path}", "--port", "0", "--dtype", options.dtype]
    log = Path(path).with_name("log")
    with log.open("w") as file:
        server = subprocess.Popen(command, stderr=file)
    try:
        assert answers.get() == "ready"
        while (found := re.search(r"http://[\d.:]+", log.read_text())) is None:
            time.sleep(0.2)
        url = found[0]
        while httpx2.get(f"{url}/health").status_code != 200:
            time.sleep(0.2)
        our_side(url, partial(drive, n_clients=1, n_vocab=config.vocab_size))
        their_side(jobs, answers, partial(drive, n_clients=1, n_vocab=config.vocab_size))
        company = Company()
        found: dict[str, object] = {"model": options.model, "dtype": options.dtype, "new_tokens": N_NEW}
        speeds: dict[int, float] = {}

        def both(name: str, load: Load) -> float:
            """Alternate the two sides under a load; return our tokens per second."""
            rounds: dict[str, list[dict[str, object]]] = {"ours": [], "theirs": []}
            for _ in range(options.rounds):
                rounds["ours"].append(our_side(url, load).summary())
                rounds["theirs"].append(their_side(jobs, answers, load).summary())
            sides = {side: median_of(each) for side, each in rounds.items()}
            found.update({f"{name}: {side} {key}": value for side in sides for key, value in sides[side].items()})
            first = "first_token_ms"
            found[f"{name}: first token, theirs/ours"] = round(sides["theirs"][first] / sides["ours"][first], 3)
            found[f"{name}: ours/theirs"] = round(sides["ours"]["tokens_per_s"] / sides["theirs"]["tokens_per_s"], 3)
            print(name, sides, file=sys.stderr, flush=True)
            return sides["ours"]["tokens_per_s"]

        for n_clients in options.clients:
            speeds[n_clients] = both(str(n_clients), partial(drive, n_clients=n_clients, n_vocab=config.vocab_size))
        if options.arrivals:
            per_s = 0.8 * speeds.get(8, max(speeds.values())) / N_NEW
            found["arrivals per s"] = round(per_s, 3)
            times = pattern(options.arrivals, per_s)
            both("arrivals", partial(arrive, times=times, n_vocab=config.vocab_size))
        first = speeds[options.clients[0]]
        found |= {f"{n}/{options.clients[0]} clients": round(speed / first, 3) for n, speed in speeds.items()}
        report("serve", {**found, "others_cpu": company.share()})
    finally:
        server.terminate()
        jobs.put(None)
        other.join(timeout=60)
        server.wait(timeout=60)


def median_of(rounds: list[dict[str, object]]) -> dict[str, float]:
    """Return the median of every figure over the rounds."""
    return {name: round(median(each[name] for each in rounds), 2) for name in rounds[0]}  # pyright: ignore


if __name__ == "__main__":
    print(json.dumps({"threads": torch.get_num_threads()}), file=sys.stderr)
    main()
