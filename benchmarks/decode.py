"""Reading a prompt and writing token after token, beside transformers and beside the bare matrix products.

    python -m benchmarks.decode [--model tinyllama-1.1b] [--dtype bfloat16] [--rounds 7]
    python -m benchmarks.decode --invariance      what it costs that an answer's bits do not depend on its company
    python -m benchmarks.decode --overhead        what a step of eight answers costs outside the model, and sampling

Both sides hold the same random weights in the same memory of one process and take turns. Ours runs through
the Engine; theirs as bare forward calls with a DynamicCache and, a second line, through `generate`. The floor
is F.linear over the same weights and nothing else. Every side gives one token per forward pass.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.measure import Company, alternate, milliseconds, report, their_model
from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.model.config import ModelConfig
from llama2.model.family import family_config
from llama2.model.transformer import Transformer, build

N_PROMPT = 64
N_STEPS = 24


def our_decode(model: Transformer, prompt: torch.Tensor, *, n_rows: int = 1, invariant: bool | None = None) -> float:
    """Milliseconds per step of n_rows answers, greedy, after the prompt was read."""
    engine = Engine(model, batch_invariant=invariant)
    params = SamplingParams(max_new_tokens=N_STEPS + 2, temperature=0.0)
    for row in range(n_rows):
        engine.add(Request(str(row), tuple(prompt[0].tolist()), params))
    engine.step()
    return milliseconds(lambda: [engine.step() for _ in range(N_STEPS)]) / N_STEPS


def our_prefill(model: Transformer, prompt: torch.Tensor) -> float:
    """Milliseconds to the first token of a prompt."""
    engine = Engine(model)
    engine.add(Request("r", tuple(prompt[0].tolist()), SamplingParams(max_new_tokens=2, temperature=0.0)))
    return milliseconds(engine.step)


@torch.no_grad()
def their_decode(model, prompt: torch.Tensor) -> float:
    cache = _their_cache(model)
    token = _their_step(model, prompt, cache)

    def run() -> None:
        nonlocal token
        for _ in range(N_STEPS):
            token = _their_step(model, token, cache)

    return milliseconds(run) / N_STEPS


@torch.no_grad()
def their_prefill(model, prompt: torch.Tensor) -> float:
    cache = _their_cache(model)
    return milliseconds(lambda: _their_step(model, prompt, cache))


def _their_cache(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _their_step(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


@torch.no_grad()
def their_generate(model, prompt: torch.Tensor) -> float:
    """Milliseconds per step of `generate`: the time of N_STEPS + 1 tokens less that of the first."""
    from transformers import GenerationConfig

    def run(n_tokens: int) -> None:
        config = GenerationConfig(max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
        model.generate(prompt, generation_config=config)

    return (milliseconds(partial(run, N_STEPS + 1)) - milliseconds(partial(run, 1))) / N_STEPS


@torch.no_grad()
def floor(model: Transformer, n_tokens: int, n_steps: int, *, n_rows: int = 1) -> float:
    """Milliseconds per step of the products alone; the vocabulary's for the last token of each row only."""
    *weights, output = matrices(model)
    dtype = output.dtype
    inputs = {w.shape[1]: torch.randn(n_rows, n_tokens, w.shape[1], dtype=dtype) for w in (*weights, output)}

    def run() -> None:
        for _ in range(n_steps):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)
            F.linear(inputs[output.shape[1]][:, -1:], output)

    return milliseconds(run) / n_steps


def matrices(model: Transformer) -> list[torch.Tensor]:
    """Every weight that multiplies, the vocabulary projection last."""
    inner = [weight for name, weight in model.named_parameters() if name.startswith("layers.") and weight.ndim == 2]
    return [*inner, model.tok_embeddings.weight if model.output is None else model.output.weight]


def compare(claim: str, sides: dict[str, Callable[[], float]], n_rounds: int, **facts: object) -> dict[str, object]:
    company = Company()
    medians = alternate(sides, n_rounds)
    facts["others_cpu"] = company.share()
    values = {f"{name}_ms": round(value, 3) for name, value in medians.items()}
    ratios = {"theirs/ours": round(medians["theirs"] / medians["ours"], 3)} if "theirs" in medians else {}
    ratios["ours/floor"] = round(medians["ours"] / medians["floor"], 3)
    return report(claim, {**facts, **values, **ratios, "rounds": n_rounds})


def run(name: str, dtype: str, n_rounds: int, n_prefill: int = 512) -> list[dict[str, object]]:
    """Measure decoding and prefill beside transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = family_config(name)
    model = build(config, dtype=getattr(torch, dtype))
    theirs = their_model(model)
    n_prefill = min(n_prefill, config.context_length - 2)
    short, long = (torch.randint(3, config.vocab_size, (1, n)) for n in (N_PROMPT, n_prefill))
    facts = dict(model=name, dtype=dtype, transformers=transformers.__version__)
    decode = {
        "ours": partial(our_decode, model, short),
        "theirs": partial(their_decode, theirs, short),
        "floor": partial(floor, model, 1, N_STEPS),
        "their_generate": partial(their_generate, theirs, short),
    }
    if model.tok_embeddings.weight.dtype.itemsize >= 4:
        decode["ours_not_invariant"] = partial(our_decode, model, short, invariant=False)
    prefill = {
        "ours": partial(our_prefill, model, long),
        "theirs": partial(their_prefill, theirs, long),
        "floor": partial(floor, model, n_prefill, 1),
    }
    return [
        compare("decode", decode, n_rounds, **facts, prompt_tokens=N_PROMPT, steps=N_STEPS),
        compare("prefill", prefill, n_rounds, **facts, prompt_tokens=n_prefill),
    ]


def flips(model: Transformer, *, invariant: bool, n_answers: int = 16, n_new: int = 64) -> float:
    """Return how often, in 1,000 sampled tokens, one is another in a batch than alone; up to each answer's first."""
    params = [SamplingParams(max_new_tokens=n_new, temperature=1.0, top_p=1.0, seed=i) for i in range(n_answers)]
    prompts = [tuple(3 + (i * 7919 + j * 31) % 500 for j in range(8 + 5 * i)) for i in range(n_answers)]
    requests = [Request(str(i), *each) for i, each in enumerate(zip(prompts, params, strict=True))]
    together = Engine(model, batch_invariant=invariant).generate(requests)
    n_flipped = n_tokens = 0
    for request, (crowded,) in zip(requests, together, strict=True):
        alone = Engine(model, batch_invariant=invariant).generate([request])[0][0].tokens
        same = [a == b for a, b in zip(alone, crowded.tokens, strict=True)]
        n_flipped += not all(same)
        n_tokens += n_new if all(same) else same.index(False) + 1
    return 1000 * n_flipped / n_tokens


def run_invariance(name: str, n_rounds: int, dtype: str) -> list[dict[str, object]]:
    """Measure what it costs that an answer's bits do not depend on the others in its batch, and what it spares."""
    model = build(family_config(name), dtype=getattr(torch, dtype))
    flipped = {
        "flips_free_per_1000": round(flips(model, invariant=False), 3),
        "flips_invariant_per_1000": round(flips(model, invariant=True), 3),
    }
    prompt = torch.randint(3, model.config.vocab_size, (1, N_PROMPT))
    lines = []
    for n_rows in (1, 16):
        sides = {
            "invariant": partial(our_decode, model, prompt, n_rows=n_rows, invariant=True),
            "free": partial(our_decode, model, prompt, n_rows=n_rows, invariant=False),
            "floor": partial(floor, model, 1, N_STEPS, n_rows=n_rows),
        }
        company = Company()
        medians = alternate(sides, n_rounds)
        values = {f"{side}_ms": round(value, 3) for side, value in medians.items()}
        ratio = round(medians["invariant"] / medians["free"], 3)
        facts = dict(model=name, dtype=dtype, batch=n_rows, rounds=n_rounds, others_cpu=company.share())
        lines.append(report("invariance", {**facts, **values, "invariant/free": ratio, **flipped}))
    return lines


OVERHEAD = {
    "greedy": dict(temperature=0.0),
    "temperature": dict(temperature=0.8, top_p=1.0),
    "top_p": dict(temperature=0.8, top_p=0.9),
    "top_k": dict(temperature=0.8, top_p=1.0, top_k=40),
}


def run_overhead(n_rounds: int, n_rows: int = 8) -> dict[str, object]:
    """Measure a step of the engine less the model's part in it, with a pocket model, by way of sampling."""
    model = build(ModelConfig(160, 3, 4, 2048, 448, context_length=512, tied_embeddings=True), dtype=torch.bfloat16)
    within = [0.0]

    def timed(method):
        def call(*args, **kwargs):
            start = time.perf_counter()
            found = method(*args, **kwargs)
            within[0] += time.perf_counter() - start
            return found

        return call

    model.hidden, model.project = timed(model.hidden), timed(model.project)

    def outside(params: SamplingParams) -> float:
        engine = Engine(model)
        for row in range(n_rows):
            engine.add(Request(str(row), tuple(range(3, 3 + N_PROMPT)), params))
        engine.step()
        found = []
        for _ in range(4 * N_STEPS):
            within[0] = 0.0
            found.append(milliseconds(engine.step) - 1e3 * within[0])
        return median(found)

    sides = {
        name: partial(outside, SamplingParams(max_new_tokens=4 * N_STEPS + 2, **how))  # pyright: ignore
        for name, how in OVERHEAD.items()
    }
    company = Company()
    medians = alternate(sides, n_rounds)
    values: dict[str, object] = {f"{name}_ms": round(value, 3) for name, value in medians.items()}
    ratio = {"1/greedy_ms": round(1 / medians["greedy"], 3)}
    facts = dict(model="pocket1m", dtype="bfloat16", batch=n_rows, rounds=n_rounds, others_cpu=company.share())
    return report("overhead", {**facts, **values, **ratio})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyllama-1.1b", help="a name of llama2's FAMILY")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--invariance", action="store_true", help="the cost of batch invariance instead")
    parser.add_argument("--overhead", action="store_true", help="what a step costs outside of a pocket model instead")
    options = parser.parse_args(arguments)
    if options.overhead:
        torch.set_num_threads(1)
        run_overhead(options.rounds)
    elif options.invariance:
        run_invariance(options.model, options.rounds, options.dtype)
    else:
        run(options.model, options.dtype, options.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
