"""`llama2 bench`: how fast a model reads and writes here, and how near that is to what the memory allows."""

import json
import sys
from functools import partial
from statistics import median
from typing import Annotated, Any

from cyclopts import Parameter

from llama2.cli.options import DType


def bench(
    model: str,
    /,
    *,
    batch: tuple[int, ...] = (1, 4, 16),
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    rounds: int = 3,
    dtype: DType | None = None,
    device: str | None = None,
    batch_invariant: bool | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure tokens per second of reading prompts and of writing answers.

    One token of each answer needs all weights and its own keys and values once: so many bytes a step. Divided by the
    memory bandwidth, which is measured in the same run, that is the shortest time a step can take on one answer.

    Parameters
    ----------
    model
        Folder, file or hub name; or the name of a family member, as llama2-7b, for random weights of its shape.
    batch
        How many answers are written at once; give it several times.
    prompt_tokens
        Length of each prompt, in tokens.
    new_tokens
        Length of each answer, in tokens.
    rounds
        Every figure is the median of this many.
    dtype
        float32, bfloat16 or float16; the stored one if not given.
    device
        The accelerator if there is one, else the CPU.
    batch_invariant
        The same text alone and among others, bit for bit; on by default in float32.
    as_json
        Print JSON.
    """
    transformer = _load(model, dtype, device)
    prompt_tokens = min(prompt_tokens, transformer.config.context_length - new_tokens - 1)
    if prompt_tokens < 1:
        raise _no_room(new_tokens, transformer.config.context_length)
    bandwidth = median(_bandwidth(transformer) for _ in range(rounds))
    rows = [_measure(transformer, n, prompt_tokens, new_tokens, rounds, batch_invariant) for n in batch]
    for row in rows:
        row["bandwidth_share"] = row["bytes_per_step"] / row["seconds_per_step"] / bandwidth
    if as_json:
        print(json.dumps({"model": model, "bandwidth_gb_s": bandwidth / 1e9, "rows": rows}))
        return
    _show(model, transformer, bandwidth, rows, prompt_tokens, new_tokens)


def _load(model: str, dtype: DType | None, device: str | None):
    from llama2.llm.loading import usable_device
    from llama2.model.family import FAMILY, family_config

    if model in FAMILY:
        import torch

        from llama2.model.transformer import build

        print(f"{model}: random weights", file=sys.stderr)
        kind = getattr(torch, dtype or "bfloat16")
        return build(family_config(model), dtype=kind, device=usable_device(device)).eval()
    from llama2.llm.llm import load

    return load(model, dtype=dtype, device=device).model


def _no_room(new_tokens: int, context_length: int) -> Exception:
    from llama2.errors import RequestError

    return RequestError(f"new_tokens={new_tokens} leaves no room for a prompt in a context of {context_length}")


def _bandwidth(transformer) -> float:
    """Return bytes per second of reading memory: the sum of a large tensor."""
    import torch

    large = torch.ones(1 << 27, device=transformer.tok_embeddings.weight.device)  # 512 MB
    large.sum()
    return large.nbytes / min(_seconds(large.sum, large.device) for _ in range(5))


def _seconds(run, device) -> float:
    import time

    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _measure(transformer, n: int, n_prompt: int, n_new: int, rounds: int, invariant: bool | None) -> dict[str, Any]:
    from llama2.infer.engine import Engine
    from llama2.infer.request import Request, SamplingParams

    device, n_vocab = transformer.tok_embeddings.weight.device, transformer.config.vocab_size
    reading, writing = [], []
    for round_number in range(rounds + 1):  # the first one warms up
        engine = Engine(transformer, max_batch=n, batch_invariant=invariant, prefix_cache=False)
        params = SamplingParams(max_new_tokens=n_new, temperature=0.0)
        for i in range(n):
            prompt = tuple((i * 7919 + j * 104729 + round_number) % n_vocab for j in range(n_prompt))
            engine.add(Request(str(i), prompt, params))

        reading.append(_seconds(partial(_read, engine, n), device))
        before = engine.n_steps
        writing.append(_seconds(partial(_write, engine), device) / (engine.n_steps - before))
    per_step = median(writing[1:])
    return {
        "batch": n,
        "prefill_tokens_per_s": n * n_prompt / median(reading[1:]),
        "decode_tokens_per_s": n / per_step,
        "seconds_per_step": per_step,
        "bytes_per_step": _weight_bytes(transformer) + n * _cache_bytes(transformer, n_prompt + n_new // 2),
    }


def _read(engine, n: int) -> None:
    while engine.n_new_tokens < n:
        engine.step()


def _write(engine) -> None:
    while not engine.is_idle:
        engine.step()


def _weight_bytes(transformer) -> int:
    """Return the bytes of all weights that every token needs: of the embeddings only a row."""
    embeddings = transformer.tok_embeddings.weight
    whole = sum(weight.nbytes for weight in (*transformer.parameters(), *transformer.buffers()))
    return whole - (0 if transformer.output is None else embeddings.nbytes)


def _cache_bytes(transformer, n_tokens: int) -> int:
    return transformer.config.kv_bytes_per_token(transformer.tok_embeddings.weight.itemsize) * n_tokens


def _show(model: str, transformer, bandwidth: float, rows: list[dict[str, Any]], n_prompt: int, n_new: int) -> None:
    from rich.console import Console
    from rich.table import Table

    weight = transformer.tok_embeddings.weight
    heads = ("answers at once", "read, tokens/s", "written, tokens/s", "ms per step", "GB per step", "of bandwidth")
    table = Table(*heads, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(
            str(row["batch"]),
            f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s']:,.1f}",
            f"{row['seconds_per_step'] * 1e3:,.2f}",
            f"{row['bytes_per_step'] / 1e9:.3f}",
            f"{row['bandwidth_share']:.0%}",
        )
    console = Console(highlight=False)
    console.print(
        f"{model}: {str(weight.dtype).removeprefix('torch.')} on {weight.device}, prompts of {n_prompt} tokens,"
    )
    console.print(f"answers of {n_new}; memory is read at {bandwidth / 1e9:.1f} GB/s here\n")
    console.print(table)
