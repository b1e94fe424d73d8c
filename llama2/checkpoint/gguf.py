"""GGUF files of architecture llama: every common block type is read; F32, F16, BF16, Q8_0 and Q4_0 are written.

Rows of wq and wk lie in Meta's order there. Blocks are decoded by the `gguf` package into float32.
Q4_0 follows llama.cpp but for the output matrix (the embedding, where tied), which llama.cpp makes Q6_K:
nothing here writes K-quants, so it is Q8_0, larger and closer. One-axis tensors are always F32.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama2.checkpoint.gguf_keys import config_from_keys, keys_from_config, llama3_divisors
from llama2.checkpoint.weights import Checkpoint, LazyTensor, check_shapes, described_by, each_shape
from llama2.errors import CheckpointError
from llama2.files.gguf import MAGIC, Header, TensorInfo, read_header, write as write_file
from llama2.model.config import ModelConfig

NAME = "gguf"
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
TYPE_OF = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMPARE_BYTES = 1 << 20
_UNUSED = 5

_LAYER_NAMES = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
_OUTER_NAMES = {
    "tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "output.weight": "output.weight",
}  # fmt: skip


def matches(path: Path) -> bool:
    """Tell whether the file is GGUF, by its first four bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_config(path: Path) -> ModelConfig:
    """Read the shape only."""
    return _config(_read_header(path))


def read(path: Path) -> Checkpoint:
    """List the tensors and check them against the keys; no numbers are read yet."""
    header = _read_header(path)
    config = _config(header)
    infos = {_canonical_name(info.name): info for info in header.tensors.values()}
    infos.pop("rope_freqs.weight", None)
    if config.tied_embeddings:
        infos.pop("output.weight", None)
    check_shapes(path, config, {name: info.shape for name, info in infos.items()}, spelled=gguf_name)
    n_bytes: dict[str, int] = {}
    for info in infos.values():
        n_bytes[info.type_name] = n_bytes.get(info.type_name, 0) + info.n_bytes
    commonest = max(n_bytes, key=lambda type_name: n_bytes[type_name])
    return Checkpoint(
        config,
        {name: _reader(path, info) for name, info in infos.items()},
        dtype=_PLAIN.get(commonest, "float32"),
        path=path,
        quantised=commonest not in _PLAIN,
    )


def _read_header(path: Path) -> Header:
    if (part := re.search(r"-\d{5}-of-(\d{5})\.gguf$", path.name)) and part[1] != "00001":
        raise CheckpointError(
            f"{path}: is one of {int(part[1])} parts; join them first: llama-gguf-split --merge FIRST WHOLE"
        )
    return read_header(path)


def _config(header: Header) -> ModelConfig:
    with described_by(header.path):
        embedding = header.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            architecture = header.metadata.get("general.architecture")
            raise CheckpointError(
                f"{header.path}: has no tensor token_embd.weight of two axes (architecture {architecture!r}); "
                "a vocabulary or an adapter alone is not a model"
            )
        return config_from_keys(
            str(header.path),
            header.metadata,
            n_rows=embedding.shape[0],
            is_tied=_is_tied(header),
            biases=("blk.0.attn_q.bias" in header.tensors, "blk.0.ffn_gate.bias" in header.tensors),
            divisors=_rope_divisors(header),
        )


def _is_tied(header: Header) -> bool:
    """Tell whether the output matrix is absent or, byte for byte, the embedding (some converters write it twice)."""
    output, embedding = header.tensors.get("output.weight"), header.tensors["token_embd.weight"]
    if output is None:
        return True
    if (output.type_name, output.shape) != (embedding.type_name, embedding.shape):
        return False
    with header.path.open("rb") as first, header.path.open("rb") as second:
        first.seek(output.start)
        second.seek(embedding.start)
        for at in range(0, output.n_bytes, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, output.n_bytes - at)
            if first.read(size) != second.read(size):
                return False
    return True


def _rope_divisors(header: Header) -> np.ndarray | None:
    info = header.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    if info.type_name != "F32" or len(info.shape) != 1:
        raise CheckpointError(
            f"{header.path}: rope_freqs.weight is {info.type_name}{info.shape}; one F32 axis is wanted"
        )
    with header.path.open("rb") as file:
        file.seek(info.start)
        return np.frombuffer(file.read(info.n_bytes), "<f4")


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor, given Meta's."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, inner, kind = match.groups()
        return f"blk.{layer}.{_LAYER_NAMES[inner]}.{kind}" if inner in _LAYER_NAMES else name
    return _OUTER_NAMES.get(name, name)


def _canonical_name(name: str) -> str:
    if match := re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, inner, kind = match.groups()
        for ours, theirs in _LAYER_NAMES.items():
            if inner == theirs:
                return f"layers.{layer}.{ours}.{kind}"
    return next((ours for ours, theirs in _OUTER_NAMES.items() if name == theirs), name)


def _reader(path: Path, info: TensorInfo) -> LazyTensor:
    def read() -> Any:
        import torch

        from llama2.checkpoint.tensors import map_bytes, map_tensor

        if info.type_name in _PLAIN:
            return map_tensor(path, info.start, info.shape, getattr(torch, _PLAIN[info.type_name]))
        rows = map_bytes(path, info.start, info.n_bytes).reshape(*info.shape[:-1], -1)
        return torch.from_numpy(dequantise(rows, info.type_name))

    return read


def dequantise(rows: np.ndarray, type_name: str) -> np.ndarray:
    """Decode rows of blocks into float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    from llama2.checkpoint.tensors import in_row_chunks

    kind = GGMLQuantizationType[type_name]
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    out = np.empty((*rows.shape[:-1], rows.shape[-1] // block_bytes * per_block), np.float32)
    with np.errstate(all="ignore"):  # a NaN or infinite scale is the file's business
        return in_row_chunks(np.asarray(rows), lambda chunk: dequantize(chunk, kind), out)


def quantise(rows: np.ndarray, type_name: str) -> np.ndarray:
    """Encode float32 rows into Q8_0 or Q4_0 blocks, as raw bytes per row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    from llama2.checkpoint.tensors import in_row_chunks

    kind = GGMLQuantizationType[type_name]
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    out = np.empty((*rows.shape[:-1], rows.shape[-1] // per_block * block_bytes), np.uint8)
    return in_row_chunks(rows, lambda chunk: quantize(chunk, kind), out)


def write(path: Path, checkpoint: Checkpoint, *, tokenizer: Any = None, dtype: str) -> list[str]:
    """Write one file; dtype may also be q8_0 or q4_0. Returns notes on what could not be kept."""
    file_type = TYPE_OF[dtype]
    config = checkpoint.config
    keys = keys_from_config(config, name=path.stem, file_type=FILE_TYPES[file_type])
    notes = []
    if tokenizer is not None:
        from llama2.tokenizer.gguf import to_gguf_metadata

        keys |= _padded(to_gguf_metadata(tokenizer.vocabulary), config.vocab_size)
    else:
        notes.append(f"{path.name} holds no tokenizer, which llama.cpp needs: give one")
    tensors: list[tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]] = []
    for name, shape in each_shape(config):
        type_name = _written_type(name, shape, file_type, config)
        tensors.append((gguf_name(name), shape, type_name, _raw(name, checkpoint.tensors[name], type_name)))
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        divisors = llama3_divisors(config.rope_scaling, config.rope_theta, config.head_dim).astype("<f4")
        tensors.append(("rope_freqs.weight", divisors.shape, "F32", lambda: divisors.view(np.uint8)))
    write_file(path, keys, tensors)
    return notes


def _padded(keys: dict[str, object], n_rows: int) -> dict[str, object]:
    """Name the rows of the embedding that no piece uses: llama.cpp counts the pieces to know the rows."""
    fillers = {"tokens": lambda i: f"[PAD{i}]", "scores": lambda i: -1000.0, "token_type": lambda i: _UNUSED}
    for key, filler in fillers.items():
        values = keys.get(f"tokenizer.ggml.{key}")
        if isinstance(values, list):
            keys[f"tokenizer.ggml.{key}"] = values + [filler(i) for i in range(len(values), n_rows)]
    return keys


def _written_type(name: str, shape: tuple[int, ...], file_type: str, config: ModelConfig) -> str:
    """Return the type of one tensor in such a file; rows that do not fill blocks become F16, as in llama.cpp."""
    if len(shape) == 1:
        return "F32"
    if file_type in ("Q8_0", "Q4_0") and shape[-1] % 32:
        return "F16"
    is_output = name == ("tok_embeddings.weight" if config.tied_embeddings else "output.weight")
    return "Q8_0" if file_type == "Q4_0" and is_output else file_type


def _raw(name: str, source: LazyTensor, type_name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        import torch

        from llama2.checkpoint.tensors import cast, raw_bytes

        tensor = cast(name, source(), getattr(torch, _PLAIN.get(type_name, "float32")))
        if type_name in _PLAIN:
            return raw_bytes(tensor)
        return quantise(tensor.detach().cpu().contiguous().numpy(), type_name)

    return read
