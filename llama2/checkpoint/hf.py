"""The Hugging Face folder: config.json, safetensors (or old .bin) weights, one file or many with an index.

Rows of wq and wk lie in another order there (rotate-half, see `tensors.py`); everything else differs in
name only. A reward model is a LlamaForSequenceClassification with one label: its head is `score.weight`; further heads
lie in heads.safetensors, which only this package looks at.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.checkpoint import hf_config
from llama2.checkpoint.safetensors import read_safetensors, write_safetensors
from llama2.checkpoint.weights import (
    Checkpoint,
    LazyTensor,
    Stored,
    check_shapes,
    expected_shapes,
    read_json,
    write_json,
)  # fmt: skip
from llama2.errors import CheckpointError, ConfigError
from llama2.files.staging import staged_folder
from llama2.model.config import ModelConfig

NAME = "hf"
SHARD_BYTES = 5_000_000_000

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""In the order in which they are looked for."""

SCORED = "LlamaForSequenceClassification"
SCORE = "score.weight"
FURTHER_HEADS = "heads.safetensors"

_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTER_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
_QUANTISED = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ", "SCB": "bitsandbytes",
    "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_inv": "FP8", "weight_packed": "compressed-tensors",
}  # fmt: skip


def matches(path: Path) -> bool:
    """Tell whether the folder holds weights in this format."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in WEIGHT_FILES)


def read_config(path: Path) -> ModelConfig:
    """Read the shape only."""
    return hf_config.read_config(path / "config.json")


def read(path: Path) -> Checkpoint:
    """List the weights and check names and shapes against config.json; no numbers are read yet."""
    config = read_config(path)
    found = _all_stored(path)
    heads = {"score": found.pop(SCORE)} if SCORE in found else {}
    if heads and (path / FURTHER_HEADS).is_file():
        heads |= read_safetensors(path / FURTHER_HEADS)
    for name, head in heads.items():
        if head.shape != (1, config.dim):
            raise CheckpointError(
                f"{path}: tensor {SCORE if name == 'score' else name!r} has shape {head.shape}, not "
                f"{(1, config.dim)}: a reward is one number; other heads are left out before loading"
            )
    stored = _by_canonical_name(path, config, found)
    check_shapes(path, config, {name: tensor.shape for name, tensor in stored.items()}, spelled=hf_name)
    return Checkpoint(
        config,
        {name: _canonical(name, tensor.read, config) for name, tensor in stored.items()},
        dtype=commonest_dtype(path, stored),
        path=path,
        generation=hf_config.read_generation(path),
        heads={name: head.read for name, head in heads.items()},
    )


def hf_name(name: str) -> str:
    """Return Hugging Face's name of a tensor, given Meta's."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, inner, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES[inner]}.{kind}" if inner in _LAYER_NAMES else name
    return _OUTER_NAMES.get(name, name)


def _canonical_name(path: Path, name: str) -> str:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, inner, kind = match.groups()
        for ours, theirs in _LAYER_NAMES.items():
            if inner == theirs:
                return f"layers.{layer}.{ours}.{kind}"
    for ours, theirs in _OUTER_NAMES.items():
        if name == theirs:
            return ours
    raise CheckpointError(
        f"{path}: tensor {name!r} is not one of a Llama language model (such as 'model.embed_tokens.weight'); "
        "adapters are merged, and heads left out, before loading"
    )


def commonest_dtype(path: Path, stored: Mapping[str, Stored]) -> str:
    """Return the type of most numbers; float64 counts as float32. Raises CheckpointError on other types."""
    n_numbers: dict[str, int] = {}
    for name, tensor in stored.items():
        if tensor.dtype not in ("float64", "float32", "float16", "bfloat16"):
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {tensor.dtype}; only floating point is read")
        size = 1
        for axis in tensor.shape:
            size *= axis
        n_numbers[tensor.dtype] = n_numbers.get(tensor.dtype, 0) + size
    return max(n_numbers, key=lambda dtype: n_numbers[dtype]).replace("float64", "float32")


def weight_paths(path: Path) -> list[Path]:
    """Return the files that hold the weights. Raises CheckpointError where one that the index names is missing."""
    name = next((name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if name is None:
        raise CheckpointError(f"{path}: has a config.json but none of {', '.join(WEIGHT_FILES)}; fetch the weights")
    if not name.endswith(".index.json"):
        return [path / name]
    weight_map = read_json(path / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / name}: has no weight_map that says which file holds what; fetch it again")
    shards = [_shard(path, path / name, shard) for shard in weight_map.values()]
    return list(dict.fromkeys(shards))


def _shard(folder: Path, index: Path, name: object) -> Path:
    """Return the file that an index names, which must stand in its own folder (as a link, in the hub's cache)."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{index}: names the file {str(name)[:200]!r}, which is not a file of its own folder")
    shard = folder / name
    if not shard.is_file():
        raise CheckpointError(f"{shard}: is missing, though {index.name} names it; fetch the repository again")
    return shard


def _all_stored(path: Path) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for file in weight_paths(path):
        if file.suffix == ".safetensors":
            stored |= read_safetensors(file)
        else:
            from llama2.checkpoint.pickles import read_pickle

            stored |= read_pickle(file)
    return stored


def _by_canonical_name(path: Path, config: ModelConfig, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    kept = {}
    has_embedding = _OUTER_NAMES["tok_embeddings.weight"] in stored
    for name, tensor in stored.items():
        method = _QUANTISED.get(name.rpartition(".")[2])
        if method:
            raise CheckpointError(
                f"{path}: tensor {name!r} belongs to weights quantised by {method}, which are not read; "
                "take the original repository, or a GGUF file"
            )
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and config.tied_embeddings:
            if not has_embedding:  # of two names for one matrix, some writers keep this one
                kept["tok_embeddings.weight"] = tensor
            elif not _is_same(tensor, stored[_OUTER_NAMES["tok_embeddings.weight"]]):
                raise CheckpointError(
                    f"{path}: config.json says tie_word_embeddings, but lm_head.weight is another matrix than the "
                    "embedding; set it to false to use lm_head.weight, or remove that tensor"
                )
            continue
        kept[_canonical_name(path, name)] = tensor
    return kept


def _is_same(one: Stored, other: Stored) -> bool:
    """Compare two matrices a piece at a time, up to the first difference."""
    if one.shape != other.shape:
        return False
    pieces = zip(one.read().split(1024), other.read().split(1024), strict=True)
    return all(a.equal(b) for a, b in pieces)


def _canonical(name: str, read_stored: LazyTensor, config: ModelConfig) -> LazyTensor:
    n_heads = _n_rotated_heads(name, config)
    if not n_heads:
        return read_stored

    def read_permuted() -> Any:
        from llama2.checkpoint.tensors import halves_to_pairs

        return halves_to_pairs(read_stored(), n_heads)

    return read_permuted


def _n_rotated_heads(name: str, config: ModelConfig) -> int:
    """Return the number of heads whose rows change order, 0 where none do."""
    inner = name.rpartition(".")[0]
    return config.n_heads if inner.endswith(".wq") else config.n_kv_heads if inner.endswith(".wk") else 0


def write(
    path: Path, checkpoint: Checkpoint, *, tokenizer: Any = None, dtype: str, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write a new folder, in files of at most shard_bytes; return notes on what could not be kept (none)."""
    ids = _special_ids(tokenizer) | dict(checkpoint.generation)
    config_values = hf_config.config_json(checkpoint.config, dtype=dtype, generation=ids)
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes={shard_bytes} must be at least 1; the default is {SHARD_BYTES}")
    with staged_folder(path) as folder:
        write_json(folder / "config.json", config_values)
        if checkpoint.heads:
            config_values |= {"architectures": [SCORED], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
            config_values |= _padding(tokenizer)
            write_json(folder / "config.json", config_values)
            further = [_head(checkpoint, name, dtype) for name in checkpoint.heads if name != "score"]
            if further:
                write_safetensors(folder / FURTHER_HEADS, further, dtype=dtype)
        if checkpoint.generation:
            write_json(folder / "generation_config.json", checkpoint.generation)
        if tokenizer is not None:
            from llama2.tokenizer.formats import save_tokenizer

            save_tokenizer(tokenizer, folder, format="json")
        _write_weights(folder, checkpoint, dtype, shard_bytes)
    return []


def _special_ids(tokenizer: Any) -> dict[str, object]:
    if tokenizer is None:
        return {}
    vocabulary = tokenizer.vocabulary
    ids = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id, "pad_token_id": vocabulary.pad_id}
    return {key: value for key, value in ids.items() if value is not None}


def _padding(tokenizer: Any) -> dict[str, object]:
    """Return the padding id of a reward model; transformers reads the score before it, so it must not end texts."""
    if tokenizer is None:
        return {}
    vocabulary = tokenizer.vocabulary
    usable = (vocabulary.pad_id, vocabulary.unk_id, tokenizer.n_vocab - 1)
    return {"pad_token_id": next(each for each in usable if each is not None and each != vocabulary.eos_id)}


def _write_weights(folder: Path, checkpoint: Checkpoint, dtype: str, shard_bytes: int) -> None:
    shards = _shards(checkpoint.config, 4 if dtype == "float32" else 2, shard_bytes)
    weight_map, total = {}, 0
    for i, shapes in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        entries = [(hf_name(key), shape, _hf_tensor(key, checkpoint, dtype)) for key, shape in shapes.items()]
        if i == len(shards) and checkpoint.heads:
            entries.append((SCORE, *_head(checkpoint, "score", dtype)[1:]))
        total += write_safetensors(folder / name, entries, dtype=dtype)
        weight_map |= {entry[0]: name for entry in entries}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(config: ModelConfig, number_bytes: int, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    n_bytes = 0
    for name, shape in expected_shapes(config).items():
        size = number_bytes
        for axis in shape:
            size *= axis
        if shards[-1] and n_bytes + size > shard_bytes:
            shards.append({})
            n_bytes = 0
        shards[-1][name] = shape
        n_bytes += size
    return shards


def _head(checkpoint: Checkpoint, name: str, dtype: str) -> tuple[str, tuple[int, ...], LazyTensor]:
    def read() -> Any:
        import torch

        from llama2.checkpoint.tensors import cast

        return cast(name, checkpoint.heads[name](), getattr(torch, dtype))

    return name, (1, checkpoint.config.dim), read


def _hf_tensor(name: str, checkpoint: Checkpoint, dtype: str) -> LazyTensor:
    def read() -> Any:
        import torch

        from llama2.checkpoint.tensors import cast, pairs_to_halves

        tensor = cast(name, checkpoint.tensors[name](), getattr(torch, dtype))
        n_heads = _n_rotated_heads(name, checkpoint.config)
        return pairs_to_halves(tensor, n_heads) if n_heads else tensor

    return read
