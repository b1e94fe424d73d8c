"""How many answers a second PPO learns from: sampled by the engine, or by transformers' `generate` in padded batches.

    python -m benchmarks.ppo MODEL QUESTIONS [--answers 256] [--generations 8] [--batch 256] [--rounds 3]

MODEL is a chat model's folder, QUESTIONS a file of prompts (questions.jsonl of `llama2 world`). An iteration samples
answers to some prompts, several to each, asks policy, reference and value model for every token's numbers, and takes
its steps; the peer differs in the sampling only, written as people write it: left-padded batches of equal size, each as
long as its longest answer. Both sample the same distribution, not the same answers.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Company, alternate, report, their_model
from llama2.align import learn as learning
from llama2.align.online_config import PpoConfig
from llama2.align.ppo import ppo
from llama2.align.rollout import Prompts, Sampled, Sampling, sample
from llama2.kernels.memory import keep_freed_memory
from llama2.model.transformer import Transformer


def naive(theirs, prompts: Prompts, numbers, sampling: Sampling, batch: int, seed: int) -> list[Sampled]:
    """Sample with `generate`, a padded batch after the other."""
    torch.manual_seed(seed)
    found: list[Sampled] = []
    for at in range(0, len(numbers), batch):
        some = list(numbers[at : at + batch])
        longest = max(len(prompts.ids[number]) for number in some)
        blanks = [longest - len(prompts.ids[number]) for number in some]
        ids = torch.tensor([[0] * n + list(prompts.ids[number]) for n, number in zip(blanks, some, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in blanks])
        out = theirs.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
            max_new_tokens=sampling.max_new_tokens, eos_token_id=prompts.end_id,
        )  # fmt: skip
        for number, row in zip(some, out[:, longest:].tolist(), strict=True):
            n = row.index(prompts.end_id) + 1 if prompts.end_id in row else len(row)
            text = prompts.tokenizer.decode(row[: n - (row[n - 1] == prompts.end_id)]).strip()
            found.append(Sampled(number, prompts.ids[number], tuple(row[:n]), (), text, row[n - 1] != prompts.end_id))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--answers", type=int, default=256)
    parser.add_argument("--generations", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--batch", type=int, default=256, help="answers at a time, of both sides")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()  # as our commands do
    seconds: dict[str, list[float]] = {"llama2": [], "transformers": []}
    counts: dict[str, list[int]] = {"llama2": [], "transformers": []}
    side, usual = "llama2", sample

    def timed(model: Transformer, prompts: Prompts, numbers, sampling: Sampling, **rest: Any) -> list[Sampled]:
        began = time.perf_counter()
        if side == "llama2":
            found = usual(model, prompts, numbers, dataclasses.replace(sampling, max_batch=arguments.batch), **rest)
        else:
            theirs = their_model(merged(model))
            began = time.perf_counter()  # a copy of the weights is not what is compared
            each_n_times = [number for number in numbers for _ in range(rest["n"])]
            found = naive(theirs, prompts, each_n_times, sampling, arguments.batch, rest["seed"])
        seconds[side].append(time.perf_counter() - began)
        counts[side].append(sum(len(each.ids) for each in found))
        return found

    def run(name: str) -> float:
        nonlocal side
        side = name
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            ppo(
                PpoConfig(
                    model=str(arguments.model), prompts=(arguments.questions,), reward="grade", n_iterations=1,
                    batch_size=arguments.answers, mini_batch_size=arguments.answers // 4, eval_share=0.0,
                    n_generations=arguments.generations,
                    too_long="drop", max_new_tokens=128, dtype=arguments.dtype, out=Path(folder) / "run",
                    outlier_sigma=0.0, device="cpu",
                )
            )  # fmt: skip
            return time.perf_counter() - began

    learning.sample = timed
    company = Company()
    whole = alternate({name: lambda name=name: run(name) for name in seconds}, arguments.rounds)
    ours, peers = (torch.tensor(seconds[name][1:]).median().item() for name in seconds)
    per_token = [sum(seconds[name][1:]) / sum(counts[name][1:]) for name in seconds]
    report(
        "ppo sampling",
        {
            "model": arguments.model.name, "dtype": arguments.dtype, "answers": arguments.answers,
            "generations": arguments.generations, "batch": arguments.batch, "llama2_s": round(ours, 2),
            "transformers_s": round(peers, 2),
            "answers_per_s": round(arguments.answers / ours, 2), "ratio": round(per_token[1] / per_token[0], 3),
            "whole_run_s": {name: round(value, 2) for name, value in whole.items()}, "others": company.share(),
        },
    )  # fmt: skip


def merged(model: Transformer) -> Transformer:
    """Return a plain copy of the policy in a model with adapters."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    weights = {name: each.detach().clone() for name, each in model.named_parameters() if ".lora_" not in name}
    plain.load_state_dict({name: each for name, each in weights.items() if not name.startswith("heads.")}, assign=True)
    return plain


if __name__ == "__main__":
    main()
