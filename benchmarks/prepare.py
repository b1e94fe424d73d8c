"""Raw text to token shards, stage by stage, beside bare tokenising of the same texts by as many processes.

    python -m benchmarks.prepare [--megabytes 40] [--workers 2] [--rounds 3]

The texts are TinyStories and web pages where LLAMA2_TEST_ASSETS names them, stories of the generated world elsewhere;
each copy has some of its words changed, so that hardly any is a duplicate. Bare tokenising is SentencePiece's own
`EncodeAsIds` over texts that are already in memory, its model already loaded: nothing is read, cleaned or written.
Our times begin before the first process is started and end after the last file is written.
"""

import argparse
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

from llama2.data.corpus.pool import run_tasks
from llama2.data.corpus.prepare import PrepareConfig, prepare
from llama2.data.storyworld.stories import stories
from llama2.tokenizer.formats import load_tokenizer, save_tokenizer
from llama2.tokenizer.train import train_tokenizer

STAGES = ("extract", "dedup", "tokenise")


def bare(path: str, vocabulary: str, share: int, n_shares: int) -> float:
    """Seconds that SentencePiece takes for this share of the texts."""
    import sentencepiece

    from llama2.tokenizer.proto import to_proto

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(to_proto(load_tokenizer(vocabulary).vocabulary))
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for number, line in enumerate(file) if number % n_shares == share]
    start = time.perf_counter()
    for text in texts:
        processor.EncodeAsIds(text)
    return time.perf_counter() - start


def theirs(path: Path, vocabulary: Path, n_workers: int) -> float:
    seconds: list[float] = []
    tasks = [(str(path), str(vocabulary), share, n_workers) for share in range(n_workers)]
    run_tasks(bare, tasks, n_workers=n_workers, on_done=lambda _, taken: seconds.append(float(str(taken))))
    return max(seconds)


def ours(path: Path, vocabulary: Path, n_workers: int) -> dict[str, float]:
    """Seconds of every stage and of the whole."""
    begun: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = PrepareConfig(raw=(path,), out=Path(folder, "out"), tokenizer=vocabulary, workers=n_workers)
        start = time.perf_counter()
        prepare(config, watch=lambda stage, done, n: begun.setdefault(stage, time.perf_counter()) and None)
        end = time.perf_counter()
    marks = [*(begun[stage] for stage in STAGES), end]
    return {"whole": end - start, **{stage: marks[i + 1] - marks[i] for i, stage in enumerate(STAGES)}}


def texts(n_bytes: int) -> Iterator[str]:
    """Yield texts of n_bytes in all, from the assets where there are some."""
    folder = os.environ.get("LLAMA2_TEST_ASSETS")
    if folder:
        told = Path(folder, "pretrain/tinystories/decoding-gpt_tinystories_10k.txt").read_text().split("<|endoftext|>")
        lines = Path(folder, "pretrain/web/c4_demo.jsonl").read_text().splitlines()
        texts = [*told, *(json.loads(line)["text"] for line in lines)]
    else:
        texts = [story.text(language) for story in stories(0, 1000) for language in ("en", "es", "zh")]
    rng = random.Random(0)
    words = sorted({word for text in texts[:500] for word in re.findall(r"\w{4,}", text)})
    while n_bytes > 0:
        text = re.sub(
            r"\w{4,}", lambda match: rng.choice(words) if rng.random() < 0.1 else match.group(), rng.choice(texts)
        )
        n_bytes -= len(text.encode())
        yield text


def tokenizer_for(folder: Path, sample: list[str]) -> Path:
    assets = os.environ.get("LLAMA2_TEST_ASSETS")
    if assets:
        return Path(assets, "tokenizers/llama2/tokenizer.model")
    return save_tokenizer(train_tokenizer(sample, vocab_size=8000), folder, format="model")


def run(n_megabytes: int, n_workers: int, n_rounds: int) -> dict[str, object]:
    from benchmarks.measure import Company, report  # here: every worker imports this file, and need not import PyTorch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "texts.jsonl")
        sample = list(texts(n_megabytes * 1_000_000))
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sample))
        vocabulary = tokenizer_for(Path(folder), sample[:2000])
        company = Company()
        rounds = [(theirs(path, vocabulary, n_workers), ours(path, vocabulary, n_workers)) for _ in range(n_rounds)]
        forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]  so that its time counts as ours
        others = company.share()
    seconds = {"bare": statistics.median(bare for bare, _ in rounds)}
    seconds |= {name: statistics.median(each[name] for _, each in rounds) for name in ("whole", *STAGES)}
    print(f"{'':10} {'seconds':>8} {'MB/s':>7} {'of bare':>8}", file=sys.stderr)
    for name, taken in seconds.items():
        speeds = f"{n_megabytes / taken:7.2f} {seconds['bare'] / taken:8.3f}"
        print(f"{name:10} {taken:8.2f} {speeds}", file=sys.stderr)
    return report(
        "prepare",
        {
            **dict(megabytes=n_megabytes, workers=n_workers, rounds=n_rounds, others_cpu=others),
            **{f"{name}_mb_per_s": round(n_megabytes / taken, 3) for name, taken in seconds.items()},
            "whole/bare": round(seconds["bare"] / seconds["whole"], 3),
            "tokenise/bare": round(seconds["bare"] / seconds["tokenise"], 3),
        },
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    run(options.megabytes, options.workers, options.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
