"""Do the models learn? Three claims, each through the real commands; one JSON line each.

    python -m benchmarks.learning storyworld             the demo's model, 500 held-out stories per language
    python -m benchmarks.learning shakespeare            examples/shakespeare.sh, three seeds
    python -m benchmarks.learning tinystories            a model of stories260K's shape beside an n-gram model

shakespeare and tinystories read the files that LLAMA2_TEST_ASSETS names.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.measure import report
from llama2.data.corpus.prepare import PrepareConfig, prepare
from llama2.data.interval import wilson
from llama2.data.shards import Shards, open_shards
from llama2.data.storyworld.words import LANGUAGES
from llama2.demo.judge import tell
from llama2.kernels.memory import keep_freed_memory
from llama2.llm import load
from llama2.model.family import family_config
from llama2.tokenizer.formats import save_tokenizer
from llama2.tokenizer.train import train_tokenizer
from llama2.train.config import PretrainConfig
from llama2.train.metrics import read_log
from llama2.train.pretrain import pretrain

ROOT = Path(__file__).parent.parent
N_GRADED = 500
SEEDS = (0, 1, 2)


def storyworld(folder: Path) -> None:
    """Run the demo, and judge 500 stories of each language at temperature 0.8."""
    log = folder / "demo.log"
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "llama2", "demo", "--out", str(folder / "demo")], check=True, capture_output=True
        )
        log.write_bytes(done.stdout)
    began = {int(n): int(at) for at, n in re.findall(r"^\[ *(\d+) s\] (\d+)\.", log.read_text(), re.MULTILINE)}
    values: dict[str, object] = {"stories": N_GRADED, "until_stories_s": began[6]}
    values |= {"finetuning_s": began[7] - began[6], "alignment_s": began[11] - began[9]}
    llm = load(str(folder / "demo" / "run" / "model"), device="cpu", max_batch=64)
    for language in LANGUAGES:
        grades = [found for _, found in tell(llm, language, N_GRADED, seed=7)]
        for name in ("is_well_formed", "is_consistent"):
            k = sum(getattr(each, name) for each in grades)
            low, high = wilson(k, N_GRADED)
            values[f"{language} {name.removeprefix('is_')}"] = round(k / N_GRADED, 4)
            values[f"{language} {name.removeprefix('is_')} interval"] = [round(low, 4), round(high, 4)]
    report("storyworld", {"model": "demo", "dtype": "bfloat16", **values})


def shakespeare(folder: Path) -> None:
    """Run the example for three seeds; the loss is nats per character over all of the validation part."""
    source = assets() / "pretrain" / "tinyshakespeare" / "input.txt"
    losses = []
    for seed in SEEDS:
        command = [str(ROOT / "examples" / "shakespeare.sh"), str(source), str(folder / f"s{seed}"), str(seed)]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)
        log = read_log(folder / f"s{seed}" / f"run-{seed}" / "log.jsonl")
        losses.append([line["loss"] for line in log if line["kind"] == "evaluation"][-1])
        n_tokens = sum(line["n_tokens"] for line in log if line["kind"] == "step")
    config = json.loads((folder / "s0" / "run-0" / "model" / "config.json").read_text())
    n_parameters = load(str(folder / "s0" / "run-0" / "model"), device="cpu").config.n_parameters
    report(
        "shakespeare",
        {
            "model": f"{n_parameters:,} parameters",
            "dtype": config.get("dtype") or config.get("torch_dtype"),
            "loss": round(statistics.mean(losses), 4),
            "losses": [round(loss, 4) for loss in losses],
            "tokens": n_tokens,
            "1.68/loss": round(1.68 / statistics.mean(losses), 4),
        },
    )


def tinystories(folder: Path) -> None:
    """Train stories260K's shape on 90 % of the stories, and count n-grams of the same tokens."""
    texts = sorted((assets() / "pretrain" / "tinystories").glob("*.txt"))
    stories = [story for path in texts for story in split(path.read_text(encoding="utf-8")) if len(story) > 200]
    train, held = stories[: len(stories) * 9 // 10], stories[len(stories) * 9 // 10 :]
    vocabulary = train_tokenizer(train, vocab_size=512)
    save_tokenizer(vocabulary, folder / "tokenizer", format="model")
    for name, part in (("train", train), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in part))
        raw = PrepareConfig(
            raw=(folder / f"{name}.jsonl",), out=folder / name, tokenizer=folder / "tokenizer", verbatim=True
        )
        prepare(raw)
    shape = family_config("stories260k")
    outcome = pretrain(
        PretrainConfig(
            data=(folder / "train",), eval_data=folder / "held", eval_tokens=10**9, out=folder / "run",
            dim=shape.dim, n_layers=shape.n_layers, n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads,
            ffn_dim=shape.ffn_dim, tied_embeddings=True, sequence_length=256, batch_size=16, n_epochs=5,
            optimizer="muon", learning_rate=1e-2, lr_scheduler="wsd", decay_share=0.5, min_lr_share=0.02,
            warmup_steps=20, eval_every=100, dtype="bfloat16",
        )
    )  # fmt: skip
    assert outcome.evaluation is not None
    log = read_log(folder / "run" / "log.jsonl")
    curve = {str(line["step"]): round(line["loss"], 4) for line in log if line["kind"] == "evaluation"}
    grams = {n: ngram_loss(open_shards(folder / "train"), open_shards(folder / "held"), n) for n in (2, 3, 4, 5)}
    best = min(grams.values())
    report(
        "tinystories",
        {
            "model": "stories260k",
            "dtype": "bfloat16",
            "loss": round(outcome.evaluation.loss, 4),
            "bits_per_byte": round(outcome.evaluation.values["bits_per_byte"], 4),
            **{f"{n}-gram loss": round(loss, 4) for n, loss in grams.items()},
            "n-gram/loss": round(best / outcome.evaluation.loss, 4),
            "curve": curve,
        },
    )


def split(text: str) -> list[str]:
    """Return the stories of a file: separated by a mark, or by blank lines."""
    parts = text.split("<|endoftext|>" if "<|endoftext|>" in text else "\n\n")
    return [part.strip() for part in parts]


def ngram_loss(train: Shards, held: Shards, n: int) -> float:
    """Return nats per token of an interpolated Kneser-Ney model (Chen and Goodman 1998), discount 0.75."""
    counts = [Counter[tuple[int, ...]]() for _ in range(n + 1)]
    for number in range(len(train)):
        ids = tuple(train.document(number).tolist())
        counts[n].update(ids[max(0, i - n + 1) : i + 1] for i in range(1, len(ids)))
    for order in range(n, 1, -1):  # below the highest order, a run counts once for each token it follows
        counts[order - 1].update(run[1:] for run in counts[order] if len(run) == order)
        counts[order - 1].update({run: c for run, c in counts[n].items() if len(run) == order - 1 and order - 1 > 1})
    totals: list[defaultdict] = [defaultdict(lambda: [0, 0]) for _ in range(n + 1)]
    for order in range(1, n + 1):
        for run, count in counts[order].items():
            if len(run) == order:
                entry = totals[order][run[:-1]]
                entry[0], entry[1] = entry[0] + count, entry[1] + 1

    def probability(run: tuple[int, ...]) -> float:
        result = 1 / train.n_vocab
        for order in range(1, len(run) + 1):
            part = run[-order:]
            total, kinds = totals[order].get(part[:-1], (0, 0))
            if total:
                seen = max(counts[order].get(part, 0) - 0.75, 0.0)
                result = (seen + 0.75 * kinds * result) / total
        return result

    loss = n_tokens = 0.0
    for number in range(len(held)):
        ids = tuple(held.document(number).tolist())
        for i in range(1, len(ids)):
            loss -= math.log(probability(ids[max(0, i - n + 1) : i + 1]))
            n_tokens += 1
    return loss / n_tokens


def assets() -> Path:
    folder = os.environ.get("LLAMA2_TEST_ASSETS")
    if not folder:
        raise SystemExit("LLAMA2_TEST_ASSETS is not set: it names the folder with pretrain/tinyshakespeare")
    return Path(folder)


CLAIMS = {"storyworld": storyworld, "shakespeare": shakespeare, "tinystories": tinystories}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--out", type=Path, help="keep the files here")
    options = parser.parse_args(arguments)
    keep_freed_memory()  # as our commands do
    if options.out:
        CLAIMS[options.claim](options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        CLAIMS[options.claim](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
