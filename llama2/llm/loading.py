"""From a name or a path to the parts of an LLM: weights, tokenizer, sampling defaults."""

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llama2.checkpoint import hub, store
from llama2.errors import RequestError, TokenizerError, TokenizerMissing
from llama2.infer.split import Leader, follow
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import leave, start
from llama2.parallel.region import fill
from llama2.parallel.shard import parallelize
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds."""

    model: Transformer
    tokenizer: Tokenizer | TokenizerMissing
    generation: Mapping[str, object] | None
    """As its generation_config.json has it."""


def read_parts(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    tokenizer: str | Path | None,
    revision: str | None,
    split: bool = False,
) -> Parts:
    """Read a checkpoint, or an adapter upon its base; arguments as in `load`."""
    path = hub.resolve(model, revision=revision)
    checkpoint, n_rows = store.read(store.layers(path)[0]), store.read_config(path).vocab_size
    try:
        vocabulary = tokenizer_of(path) if tokenizer is None else load_tokenizer(Path(tokenizer))
    except TokenizerMissing as error:
        if tokenizer is not None:
            raise
        vocabulary = error
    if isinstance(vocabulary, Tokenizer) and vocabulary.n_vocab > n_rows:
        raise TokenizerError(
            f"the tokenizer of {path} has ids up to {vocabulary.n_vocab - 1}, the model only "
            f"{n_rows} rows: they do not belong together; name the right one with --tokenizer"
        )
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    if split:
        transformer = _load_split(path, name, "auto" if device is None else str(device))
    else:
        transformer = store.load(path, dtype=name, device=usable_device(device)).eval()
    return Parts(transformer, vocabulary, checkpoint.generation)


def _load_split(path: Path, dtype: str | None, device: str) -> Transformer:
    """Read this process's part of every matrix; only the first process returns, the others follow it to the end."""
    base, *adapters = store.layers(path)
    if adapters:
        raise RequestError(f"{path} is an adapter, which cannot be split over processes; merge it first (llama2 merge)")
    world = start(device=device, tensor_parallel=int(os.environ["WORLD_SIZE"]), timeout_s=A_YEAR)
    checkpoint = store.read(base)
    with torch.device("meta"):
        model = Transformer(checkpoint.config).to(getattr(torch, dtype or store.default_dtype(checkpoint)))
    parallelize(model, world).to_empty(device=world.device).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        fill(weight, checkpoint.tensors[name]())
    if world.is_first:
        atexit.register(Leader(model, world).dismiss)
        return model
    follow(model, world)
    leave(0)
    raise AssertionError("unreachable")


A_YEAR = 365 * 86_400.0
"""How long the other processes wait for something to do, in seconds."""


def tokenizer_of(path: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint, or of an adapter: its own before its base's. Raises TokenizerMissing."""
    base, *adapters = store.layers(path)
    *others, last = [*reversed(adapters), base] if adapters else [path]
    for place in others:
        try:
            return load_tokenizer(place)
        except TokenizerMissing:
            continue
    return load_tokenizer(last)


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def usable_device(device: str | torch.device | None) -> str:
    """Return the device's name; raise RequestError if there is no such device here."""
    name = str(device or default_device())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"device {name!r} cannot be used here ({reason}); cpu always can") from None
    return name
