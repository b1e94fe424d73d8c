"""Meta's own folder: params.json and consolidated.NN.pth, one file per tensor-parallel rank.

Names and row order are the canonical ones; the work is to put split matrices together and apart.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2.checkpoint.meta_params import EXTRA_FILE, params_json, read_params
from llama2.checkpoint.weights import (
    Checkpoint,
    LazyTensor,
    Stored,
    check_shapes,
    expected_shapes,
    read_json,
    write_json,
)  # fmt: skip
from llama2.errors import CheckpointError
from llama2.files.staging import staged_folder
from llama2.model.config import ModelConfig

NAME = "meta"
GENERATION_FILE = "generation_config.json"  # not Meta's: kept when it comes from elsewhere
_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
_WHOLE = ("attention.wo.bias", "feed_forward.w2.bias")


def matches(path: Path) -> bool:
    """Tell whether the folder holds weights in this format."""
    return (path / "params.json").is_file() and any(path.glob("consolidated.*.pth"))


def read_config(path: Path) -> ModelConfig:
    """Read the shape; opens the weights too where vocab_size is -1, to count the rows of the embedding."""
    return read_params(path / "params.json", count_rows=lambda dim: _count_rows(_open_shards(path), path, dim))


def read(path: Path) -> Checkpoint:
    """List the weights of all shards and check them against params.json; no numbers are read yet."""
    shards = _open_shards(path)
    config = read_params(path / "params.json", count_rows=lambda dim: _count_rows(shards, path, dim))
    merged = {}
    for name, first in shards[0].items():
        if name.endswith("rope.freqs") or (name == "output.weight" and config.tied_embeddings):
            continue
        merged[name] = _merge(path, name, [_piece(path, shard, name) for shard in shards], config.dim)
        if first.dtype not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {first.dtype}; only floating point is read")
    check_shapes(path, config, {name: tensor.shape for name, tensor in merged.items()})
    return Checkpoint(
        config,
        {name: tensor.read for name, tensor in merged.items()},
        dtype=merged["tok_embeddings.weight"].dtype,
        path=path,
        generation=read_json(generation) if (generation := path / GENERATION_FILE).exists() else {},
    )


def _open_shards(path: Path) -> list[dict[str, Stored]]:
    from llama2.checkpoint.pickles import read_pickle

    files = sorted(path.glob("consolidated.*.pth"))
    for i, file in enumerate(files):
        if not re.fullmatch(rf"consolidated\.0*{i}\.pth", file.name):
            raise CheckpointError(f"{path}: holds {file.name} but shard {i} is missing; fetch the folder again")
    if not files:
        raise CheckpointError(f"{path}: has a params.json but no consolidated.00.pth; fetch the weights")
    return [read_pickle(file) for file in files]


def _piece(path: Path, shard: dict[str, Stored], name: str) -> Stored:
    if name not in shard:
        raise CheckpointError(f"{path}: tensor {name!r} is in shard 0 but not in all; fetch the folder again")
    return shard[name]


def _count_rows(shards: Sequence[dict[str, Stored]], path: Path, dim: int) -> int:
    pieces = [_piece(path, shard, "tok_embeddings.weight") for shard in shards if shard]
    if not pieces:
        raise CheckpointError(f"{path}: the weights hold no tensors; fetch them again")
    return _merge(path, "tok_embeddings.weight", pieces, dim).shape[0]


def _split_axis(name: str, n_axes: int, is_split_by_rows: bool) -> int | None:
    """Return the axis along which ranks hold parts of a tensor; None where each holds all of it.

    The embedding is split by columns in Llama 1 and 2 and by rows in Llama 3.
    """
    if name == "tok_embeddings.weight":
        return 0 if is_split_by_rows else 1
    if name.endswith("norm.weight") or name.endswith(_WHOLE):
        return None
    return 1 if name.endswith(_BY_COLUMNS) and n_axes == 2 else 0


def _merge(path: Path, name: str, pieces: list[Stored], dim: int) -> Stored:
    first = pieces[0]
    if not first.shape:
        raise CheckpointError(f"{path}: tensor {name!r} is a single number; fetch the file again")
    axis = _split_axis(name, len(first.shape), is_split_by_rows=first.shape[-1] == dim)
    if len(pieces) == 1 or axis is None:
        return first
    for piece in pieces:
        if piece.shape != first.shape or piece.dtype != first.dtype or len(piece.shape) <= axis:
            raise CheckpointError(f"{path}: tensor {name!r} is {first.shape} in one shard and {piece.shape} in another")
    shape = list(first.shape)
    shape[axis] *= len(pieces)
    return Stored(tuple(shape), first.dtype, _joined(pieces, axis))


def _joined(pieces: list[Stored], axis: int) -> LazyTensor:
    def read() -> Any:
        import torch

        return torch.cat([piece.read() for piece in pieces], dim=axis)

    return read


def write(path: Path, checkpoint: Checkpoint, *, tokenizer: Any = None, dtype: str, shards: int = 1) -> list[str]:
    """Write a new folder of so many shards; return notes on what Meta's own loader cannot know."""
    params, extra = params_json(checkpoint.config)
    shapes = expected_shapes(checkpoint.config)
    sources = dict(checkpoint.tensors)
    if checkpoint.config.tied_embeddings:  # Meta's loader always wants an output matrix
        shapes["output.weight"] = shapes["tok_embeddings.weight"]
        sources["output.weight"] = sources["tok_embeddings.weight"]
    _check_divisible(checkpoint.config, shards)
    by_rows = checkpoint.config.rope_theta == 5e5
    with staged_folder(path) as folder:
        write_json(folder / "params.json", params)
        if extra:
            write_json(folder / EXTRA_FILE, extra)
        if checkpoint.generation:
            write_json(folder / GENERATION_FILE, checkpoint.generation)
        if tokenizer is not None:
            from llama2.tokenizer.formats import save_tokenizer

            save_tokenizer(tokenizer, folder, format="model")
        for rank in range(shards):
            _write_shard(folder, sources, shapes, dtype, rank, shards, by_rows)
    return [f"params.json cannot hold {', '.join(extra)}: kept in {EXTRA_FILE}"] if extra else []


def _check_divisible(config: ModelConfig, shards: int) -> None:
    for name in ("n_heads", "n_kv_heads", "ffn_dim", "dim", "vocab_size"):
        if not isinstance(shards, int) or shards < 1 or getattr(config, name) % shards:
            raise CheckpointError(
                f"shards={shards} does not divide {name}={getattr(config, name)}; every shard holds whole heads and "
                "equal parts of each matrix"
            )


def _write_shard(
    folder: Path, sources: dict[str, LazyTensor], shapes: dict[str, tuple[int, ...]], dtype: str, rank: int,
    shards: int, by_rows: bool,
) -> None:  # fmt: skip
    from llama2.checkpoint.pickles import write_pickle

    entries = []
    for name, shape in shapes.items():
        axis = None if shards == 1 else _split_axis(name, len(shape), by_rows)
        part = shape if axis is None else (*shape[:axis], shape[axis] // shards, *shape[axis + 1 :])
        entries.append((name, part, _slice(name, sources[name], dtype, axis, rank, shards)))
    write_pickle(folder / f"consolidated.{rank:02}.pth", entries, dtype=dtype)


def _slice(name: str, source: LazyTensor, dtype: str, axis: int | None, rank: int, shards: int) -> LazyTensor:
    def read() -> Any:
        import torch

        from llama2.checkpoint.tensors import cast

        tensor = source()
        part = tensor if axis is None else tensor.chunk(shards, dim=axis)[rank]
        return cast(name, part, getattr(torch, dtype))

    return read
