"""Many clients at once: `llama2 serve` over the wire, beside naive batching with transformers.

    python -m benchmarks.serve [--model tinyllama-1.1b] [--dtype bfloat16] [--clients 1 4 8 16]

Each client asks, waits for its answer, and asks again; prompts have 32 to 160 tokens and answers 32, the same ones
on both sides. Ours is the real command in a process of its own, asked over HTTP and streaming. The peer holds the same
weights in a process of its own and answers whoever waits in one padded `generate`, which is what people write
who have no server; its answers come whole.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import httpx2
import torch

import llama2
from benchmarks.measure import Company, report, their_model
from llama2.model.config import ModelConfig
from llama2.model.family import family_config
from llama2.model.transformer import build
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, Vocabulary

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
        spread = quantiles(self.between, n=20) if len(self.between) > 1 else []
        return {
            "tokens_per_s": round(self.n_tokens / self.whole, 2),
            "first_token_ms": round(1e3 * median(self.first), 1),
            "first_token_worst_ms": round(1e3 * max(self.first), 1),
            "between_tokens_ms": round(1e3 * median(self.between), 1) if self.between else None,
            "between_tokens_p95_ms": round(1e3 * spread[-1], 1) if spread else None,
        }


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


def our_side(url: str, n_clients: int, n_vocab: int) -> Timings:
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

            return await drive(ask, n_clients, n_vocab)

    return asyncio.run(run())


def their_side(jobs, answers, n_clients: int, n_vocab: int) -> Timings:
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
        timings = await drive(ask, n_clients, n_vocab)
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
        our_side(url, 1, config.vocab_size)
        their_side(jobs, answers, 1, config.vocab_size)
        company = Company()
        found: dict[str, object] = {"model": options.model, "dtype": options.dtype, "new_tokens": N_NEW}
        speeds: dict[int, float] = {}
        for n_clients in options.clients:
            ours, theirs = [], []
            for _ in range(options.rounds):
                ours.append(our_side(url, n_clients, config.vocab_size).summary())
                theirs.append(their_side(jobs, answers, n_clients, config.vocab_size).summary())
            sides = {"ours": median_of(ours), "theirs": median_of(theirs)}
            found |= {f"{n_clients}: {side} {name}": value for side in sides for name, value in sides[side].items()}
            speeds[n_clients] = sides["ours"]["tokens_per_s"]
            found[f"{n_clients}: ours/theirs"] = round(speeds[n_clients] / sides["theirs"]["tokens_per_s"], 3)
            print(n_clients, sides, file=sys.stderr, flush=True)
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
    found = {name: [each[name] for each in rounds if each[name] is not None] for name in rounds[0]}
    return {name: round(median(values), 2) for name, values in found.items() if values}  # pyright: ignore


if __name__ == "__main__":
    print(json.dumps({"threads": torch.get_num_threads()}), file=sys.stderr)
    main()
