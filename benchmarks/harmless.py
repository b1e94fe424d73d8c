"""Does a small reward model learn what people find harmless? Beside words and their pairs; one JSON line.

    python -m benchmarks.harmless [--out FOLDER]

Of the 2,312 pairs of Anthropic's harmless test set (arXiv:2204.05862), which LLAMA2_TEST_ASSETS holds, four fifths are
learnt from and the others judged. A fresh model reads the dialogues first, both sides of every pair, and then becomes a
reward model. The peer is the Bradley-Terry model that is linear in the words of an answer and their pairs; its penalty
is chosen on a tenth of the training pairs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.learning import assets
from benchmarks.measure import report
from benchmarks.tasks import grams, in_a_folder, write
from llama2.align.reward import train_reward
from llama2.align.reward_config import RewardConfig
from llama2.align.scoring import load_reward
from llama2.checkpoint.store import save
from llama2.data.interval import wilson
from llama2.data.preferences.pair import Pair
from llama2.data.preferences.read import read_pairs
from llama2.model.config import ModelConfig, ffn_width
from llama2.model.transformer import build
from llama2.tokenizer.train import train_tokenizer
from llama2.train.finetune import finetune
from llama2.train.finetune_config import FinetuneConfig

CONTEXT = 1024
DIM = 128
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
TRAINING: dict[str, Any] = dict(
    dtype="bfloat16", device="cpu", too_long="drop", optimizer="muon", sequence_length=CONTEXT
)


def reward_model(folder: Path, train: Sequence[Pair]):
    """Return the reward model of these pairs."""
    sides = ("chosen", "rejected")
    texts = [message.content for pair in train for message in pair.prompt]
    texts += [getattr(pair, side) for pair in train for side in sides]
    tokenizer = train_tokenizer(texts, vocab_size=4000, n_threads=1)
    config = ModelConfig(
        dim=DIM, n_layers=2, n_heads=4, ffn_dim=ffn_width(DIM, multiple_of=32), vocab_size=tokenizer.n_vocab,
        context_length=CONTEXT, rope_theta=1e4, tied_embeddings=True,
    )  # fmt: skip
    save(build(config), folder / "fresh", tokenizer=tokenizer)
    asked = [[asdict(message) for message in pair.prompt] for pair in train]

    def said(pair: Pair, side: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": getattr(pair, side)}]

    talks = ({"messages": [*a, *said(pair, side)]} for a, pair in zip(asked, train, strict=True) for side in sides)
    dialogues = write(folder / "dialogues.jsonl", talks)
    records = ({"prompt": a} | {side: said(pair, side) for side in sides} for a, pair in zip(asked, train, strict=True))
    pairs = write(folder / "pairs.jsonl", records)
    read = FinetuneConfig(
        model=str(folder / "fresh"), data=(dialogues,), out=folder / "read", method="full", batch_size=8, n_epochs=3.0,
        learning_rate=5e-3, warmup_steps=20, dropout=0.1, eval_share=0.01, **TRAINING,
    )  # fmt: skip
    finetune(read)
    judge = RewardConfig(
        model=str(folder / "read" / "model"), data=(pairs,), out=folder / "reward", batch_size=32, n_epochs=2.0,
        learning_rate=5e-4, eval_share=0.0, **TRAINING,
    )  # fmt: skip
    train_reward(judge)
    return load_reward(folder / "reward" / "model")


def words_model(train: Sequence[Pair], penalty: float):
    """Return what scores an answer by its words and their pairs, fitted with penalty |w|^2."""
    numbers: dict[str, int] = {}
    for pair in train:
        for side in (pair.chosen, pair.rejected):
            for word in grams(side.lower()):
                numbers.setdefault(word, len(numbers))
    weights = torch.zeros(len(numbers), 1, requires_grad=True)

    def scores(answers: Sequence[str]) -> Tensor:
        known = [[numbers[word] for word in grams(text.lower()) if word in numbers] for text in answers]
        starts = torch.from_numpy(np.cumsum([0, *map(len, known)])[:-1])
        flat = torch.tensor([i for bag in known for i in bag], dtype=torch.int64)
        return F.embedding_bag(flat, weights, starts, mode="sum")[:, 0]

    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        gaps = scores([pair.chosen for pair in train]) - scores([pair.rejected for pair in train])
        value = F.softplus(-gaps).sum() + penalty * weights.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return scores


def right(chosen: Sequence[float] | Tensor, rejected: Sequence[float] | Tensor) -> list[float]:
    """Return the share of pairs in the right order, percent, and its 95 % interval; a tie counts a half."""
    gaps = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    n = float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
    return [round(100 * each, 2) for each in (n / len(gaps), *wilson(round(n), len(gaps)))]


def harmless(folder: Path) -> None:
    start = time.perf_counter()
    found = list(read_pairs(assets() / "preference" / "harmless-base-test.jsonl.gz"))
    order = np.random.default_rng(0).permutation(len(found)).tolist()
    n = len(found) // 5
    judged, train = [found[i] for i in order[:n]], [found[i] for i in order[n:]]
    model = reward_model(folder, train)
    asked = [pair.prompt for pair in judged]
    ours = right(*(model(asked, [getattr(pair, side) for pair in judged]) for side in ("chosen", "rejected")))

    def by_words(learnt: Sequence[Pair], tried: Sequence[Pair], penalty: float) -> list[float]:
        scores = words_model(learnt, penalty)
        with torch.no_grad():
            return right(*(scores([getattr(pair, side) for pair in tried]) for side in ("chosen", "rejected")))

    tenth = len(train) // 10
    penalty = max(PENALTIES, key=lambda each: by_words(train[tenth:], train[:tenth], each)[0])
    theirs = by_words(train, judged, penalty)
    report(
        "harmless",
        {
            "model": f"{model.model.config.n_parameters:,} parameters",
            "dtype": TRAINING["dtype"],
            "seconds": round(time.perf_counter() - start),
            "accuracy": ours[0],
            "interval": ours[1:],
            "baseline": theirs[0],
            "baseline interval": theirs[1:],
            "pairs": len(judged),
        },
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    in_a_folder(parser, arguments, lambda options: harmless)


if __name__ == "__main__":
    main(sys.argv[1:])
