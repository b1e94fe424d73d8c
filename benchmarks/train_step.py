"""One optimizer step beside transformers' LlamaForCausalLM with fused AdamW: the same shape, dtype and batch.

    python -m benchmarks.train_step --model stories15m --dtype bfloat16
    python -m benchmarks.train_step --model stories15m --dtype bfloat16 --memory

Sides take turns in one process; for memory each has a fresh one. `ours` keeps everything in the dtype, as the peer
does; `ours_masters` is our default for bfloat16, with float32 weights under it. `floor` is the bare products of the
step: forward, and backward for inputs and weights. A step is gradients, clipping to norm 1, and the update.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.decode import matrices
from benchmarks.measure import Company, alternate, report, their_model
from llama2.data.batch import Batch
from llama2.model.config import ModelConfig
from llama2.model.family import family_config
from llama2.model.losses import next_token_loss
from llama2.model.transformer import Transformer, build
from llama2.train.config import TrainConfig
from llama2.train.loop import Trainer

SHAPES = {
    "pocket1m": (ModelConfig(128, 4, 4, 2048, ffn_dim=352, context_length=256, tied_embeddings=True), 16),
    "stories15m": (family_config("stories15m"), 16),
    "stories110m": (family_config("stories110m"), 4),
}
"""Model, and rows of 256 tokens per step."""
T = 256


def random_batch(config: ModelConfig, n_rows: int) -> Batch:
    tokens = torch.randint(3, config.vocab_size, (n_rows, T + 1))
    positions = torch.arange(T).expand(n_rows, T).contiguous()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, None)


def ours(config: ModelConfig, dtype: str, *, masters: bool) -> Callable[[Batch], None]:
    settings = TrainConfig(dtype=dtype, master_weights=masters, learning_rate=1e-4)  # pyright: ignore[reportArgumentType]
    trainer = Trainer(build(config, dtype=getattr(torch, dtype)), settings, n_steps=1_000_000)
    return lambda batch: trainer.step([batch], next_token_loss) and None


def theirs(config: ModelConfig, dtype: str) -> Callable[[Batch], None]:
    model = their_model(build(config, dtype=getattr(torch, dtype))).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
    )

    def step(batch: Batch) -> None:
        logits = model(batch.tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def floor(model: Transformer) -> Callable[[Batch], None]:
    """The products of a step, and nothing else."""
    weights = [weight.detach() for weight in matrices(model)]

    def step(batch: Batch) -> None:
        n = batch.tokens.numel()
        for weight in weights:
            rows = 512 if weight is weights[-1] else n  # the vocabulary in chunks, or its logits are the work
            x = torch.ones(n, weight.shape[1], dtype=weight.dtype)
            for chunk in x.split(rows):
                y = F.linear(chunk, weight)
                torch.mm(y, weight)
                torch.mm(y.T, chunk)

    return step


def side(name: str, config: ModelConfig, dtype: str) -> Callable[[Batch], None]:
    if name == "floor":
        return floor(build(config, dtype=getattr(torch, dtype)))
    return theirs(config, dtype) if name == "theirs" else ours(config, dtype, masters=name == "ours_masters")


def names(dtype: str) -> list[str]:
    return ["ours", "theirs", "floor", *(["ours_masters"] if dtype == "bfloat16" else [])]


def timed(step: Callable[[Batch], None], batch: Batch, n_steps: int) -> float:
    """Milliseconds per step."""
    start = time.perf_counter()
    for _ in range(n_steps):
        step(batch)
    return 1000 * (time.perf_counter() - start) / n_steps


def run(model: str, dtype: str, n_rounds: int, n_steps: int) -> dict[str, object]:
    import transformers

    transformers.logging.set_verbosity_error()
    config, n_rows = SHAPES[model]
    batch = random_batch(config, n_rows)
    sides = {name: partial(timed, side(name, config, dtype), batch, n_steps) for name in names(dtype)}
    company = Company()
    medians = alternate(sides, n_rounds)
    n_tokens = batch.tokens.numel()
    values = {f"{name}_tokens_per_s": round(1000 * n_tokens / value) for name, value in medians.items()}
    ratios = {"theirs/ours": round(medians["theirs"] / medians["ours"], 3)}
    if "ours_masters" in medians:
        ratios["theirs/ours_masters"] = round(medians["theirs"] / medians["ours_masters"], 3)
    ratios["ours/floor"] = round(medians["ours"] / medians["floor"], 3)
    facts = dict(model=model, dtype=dtype, batch=n_rows, tokens=T, transformers=transformers.__version__)
    return report("train_step", {**facts, **values, **ratios, "rounds": n_rounds, "others_cpu": company.share()})


def run_memory(model: str, dtype: str) -> dict[str, object]:
    peaks = {}
    for name in names(dtype):
        if name != "floor":
            command = [
                sys.executable,
                "-m",
                "benchmarks.train_step",
                "--model",
                model,
                "--dtype",
                dtype,
                "--side",
                name,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peaks[name] = json.loads(done.splitlines()[-1])
    values = {f"{name}_peak_mib": value for name, value in peaks.items()}
    ratio = round(peaks["theirs"] / peaks["ours"], 3)
    facts = dict(model=model, dtype=dtype, batch=SHAPES[model][1], tokens=T)
    return report("train_memory", {**facts, **values, "theirs/ours": ratio})


def peak_mib(name: str, model: str, dtype: str) -> float:
    """Return the peak of resident memory over four steps, above what the imports take."""
    import transformers  # noqa: F401  (on every side, so that the imports weigh the same)

    config, n_rows = SHAPES[model]
    batch = random_batch(config, n_rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = side(name, config, dtype)
    for _ in range(4):
        step(batch)
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories15m", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="per round and side")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(peak_mib(options.side, options.model, options.dtype)))
    elif options.memory:
        run_memory(options.model, options.dtype)
    else:
        run(options.model, options.dtype, options.rounds, options.steps)


if __name__ == "__main__":
    main(sys.argv[1:])
