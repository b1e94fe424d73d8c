"""llama2.c's .bin files: version 0 (no magic), 1 (float32) and 2 (int8 in groups), read and written.

    v0  7 x i32 | embedding, norms and matrices kind by kind | rotary tables, ignored | [output]
    v1  "ak42" 1 7 x i32, u8 tied, zeros to 256 | norms | embedding, matrices | [output]
    v2  as v1 with 2 and i32 group size at byte 37 | float32 norms | int8 numbers, float32 scales, per tensor

Sizes follow from the header exactly, which is how version 0 is told from any other file. The program
that reads these files fixes eps at 1e-5 and theta at 10000. Source: karpathy/llama2.c export.py, run.c, runq.c.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from llama2.checkpoint.weights import Checkpoint, LazyTensor, described_by, each_shape, expected_shapes
from llama2.errors import CheckpointError, Llama2Error
from llama2.files.staging import staged_file
from llama2.model.config import ModelConfig

NAME = "llama2c"
MAGIC = 0x616B3432
_HEADER_BYTES = {0: 28, 1: 256, 2: 256}
_MATRICES = (
    "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip
_FIXED = {
    "norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": None,
    "attention_bias": False, "ffn_bias": False,
}  # fmt: skip


@dataclass(frozen=True)
class _File:
    path: Path
    version: int
    config: ModelConfig
    group_size: int = 1


def matches(path: Path) -> bool:
    """Tell whether the file is llama2.c's: by its magic, or by a size that fits a version 0 header."""
    if not path.is_file():
        return False
    try:
        _open(path)
    except Llama2Error:
        return _starts_with_magic(path)
    return True


def _starts_with_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<I", MAGIC)


def read_config(path: Path) -> ModelConfig:
    """Read the shape only."""
    return _open(path).config


def read(path: Path) -> Checkpoint:
    """Find every tensor in the file; no numbers are read yet."""
    file = _open(path)
    tensors, at = {}, _HEADER_BYTES[file.version]
    shapes = expected_shapes(file.config)
    for name in _order(file.config, file.version):
        if name is None:
            at += 4 * file.config.context_length * file.config.head_dim
            continue
        n = math.prod(shapes[name])
        is_grouped = file.version == 2 and len(shapes[name]) == 2
        tensors[name] = _reader(path, at, shapes[name], file.group_size if is_grouped else 0)
        at += n + 4 * (n // file.group_size) if is_grouped else 4 * n
    return Checkpoint(file.config, tensors, dtype="float32", path=path, quantised=file.version == 2)


def _order(config: ModelConfig, version: int) -> Iterator[str | None]:
    """Yield tensor names as they follow each other; None stands for version 0's rotary tables."""
    layers = range(config.n_layers)
    attention_norms = (f"layers.{i}.attention_norm.weight" for i in layers)
    ffn_norms = (f"layers.{i}.ffn_norm.weight" for i in layers)
    if version == 0:
        yield "tok_embeddings.weight"
        yield from attention_norms
    else:
        yield from attention_norms
        yield from ffn_norms
        yield from ("norm.weight", "tok_embeddings.weight")
    for matrix in _MATRICES:
        if version == 0 and matrix == "feed_forward.w1":
            yield from ffn_norms
        yield from (f"layers.{i}.{matrix}.weight" for i in layers)
    if version == 0:
        yield "norm.weight"
        yield None
    if not config.tied_embeddings:
        yield "output.weight"


def _open(path: Path) -> _File:
    """Read the header. Raises CheckpointError unless the file has exactly the size that follows from it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(256)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if len(header) < 28:
        raise CheckpointError(f"{path}: {size} bytes are too few for a llama2.c file; fetch it again")
    with described_by(path):
        found = _parse(path, header)
    wanted = _file_bytes(found)
    if size != wanted:
        raise CheckpointError(
            f"{path}: has {size} bytes; as a llama2.c file of version {found.version} its header asks for {wanted}: "
            "it is damaged or of another format"
        )
    return found


def _parse(path: Path, header: bytes) -> _File:
    if struct.unpack_from("<I", header)[0] != MAGIC:
        numbers = struct.unpack_from("<7i", header)
        return _File(path, 0, _config(path, numbers, is_tied=numbers[5] > 0))
    version = struct.unpack_from("<i", header, 4)[0]
    if len(header) < 256 or version not in (1, 2):
        raise CheckpointError(f"{path}: llama2.c version {version} of {len(header)} bytes; 0, 1 and 2 are read")
    config = _config(path, struct.unpack_from("<7i", header, 8), is_tied=header[36] != 0)
    group_size = struct.unpack_from("<i", header, 37)[0] if version == 2 else 1
    if group_size < 1 or any(math.prod(shape) % group_size for shape in _matrix_shapes(config)):
        raise CheckpointError(f"{path}: group size {group_size} does not divide the matrices; fetch the file again")
    return _File(path, version, config, group_size)


def _config(path: Path, numbers: tuple[int, ...], *, is_tied: bool) -> ModelConfig:
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, context_length = numbers
    if n_heads < 1 or dim % n_heads or n_kv_heads < 1:
        raise CheckpointError(f"{path}: dim={dim}, n_heads={n_heads}, n_kv_heads={n_kv_heads} fit no llama2.c file")
    return ModelConfig(
        dim, n_layers, n_heads, abs(vocab_size), ffn_dim, n_kv_heads=n_kv_heads, context_length=context_length,
        tied_embeddings=is_tied,
    )  # fmt: skip


def _matrix_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """The shapes of one layer and of the embedding; all layers are alike."""
    one_layer = replace(config, n_layers=1)
    return [shape for _, shape in each_shape(one_layer) if len(shape) == 2]


def _file_bytes(file: _File) -> int:
    config = file.config
    if file.version == 0:
        return 28 + 4 * config.n_parameters + 4 * config.context_length * config.head_dim
    if file.version == 1:
        return 256 + 4 * config.n_parameters
    norms = config.dim * (2 * config.n_layers + 1)
    grouped = config.n_parameters - norms
    return 256 + 4 * norms + grouped + 4 * (grouped // file.group_size)


def _reader(path: Path, start: int, shape: tuple[int, ...], group_size: int) -> LazyTensor:
    """Return a reader of float32 numbers, or of int8 groups where group_size is not 0."""

    def read() -> Any:
        import numpy as np
        import torch

        from llama2.checkpoint.tensors import map_bytes, map_tensor

        if not group_size:
            return map_tensor(path, start, shape, torch.float32)
        n = math.prod(shape)
        groups = map_bytes(path, start, n).view(np.int8).reshape(-1, group_size)
        scales = map_tensor(path, start + n, (n // group_size, 1), torch.float32).numpy()
        numbers = np.empty(groups.shape, np.float32)
        with np.errstate(all="ignore"):  # a NaN or infinite scale is the file's business
            np.multiply(groups, scales, out=numbers, dtype=np.float32)  # torch would copy the int8 to float32 first
        return torch.from_numpy(numbers.reshape(shape))

    return read


def write(
    path: Path, checkpoint: Checkpoint, *, tokenizer: Any = None, dtype: str = "float32", version: int = 1,
    group_size: int = 64,
) -> list[str]:  # fmt: skip
    """Write one file, and tokenizer.bin beside it; version 2 is int8 in groups of at most group_size."""
    _check_expressible(checkpoint.config, dtype, version)
    if version == 2:
        group_size = _fitting_group_size(checkpoint.config, group_size)
    with staged_file(path) as temporary, temporary.open("wb") as file:
        file.write(_header(checkpoint.config, version, group_size))
        for name in _order(checkpoint.config, version):
            if name is None:
                file.write(_rotary_tables(checkpoint.config))
            else:
                _write_tensor(file, checkpoint.tensors[name](), version, group_size)
        if tokenizer is not None:
            _write_tokenizer(path, tokenizer)
    return []


def _write_tokenizer(path: Path, tokenizer: Any) -> None:
    from llama2.tokenizer.formats import save_tokenizer

    existing = path.parent / "tokenizer.bin"
    if not existing.exists():
        save_tokenizer(tokenizer, path.parent, format="bin")
        return
    with TemporaryDirectory() as folder:
        if save_tokenizer(tokenizer, folder, format="bin").read_bytes() != existing.read_bytes():
            raise CheckpointError(f"{existing} is another model's tokenizer; write into a folder of its own")


def _check_expressible(config: ModelConfig, dtype: str, version: int) -> None:
    for name, fixed in _FIXED.items():
        if getattr(config, name) != fixed:
            raise CheckpointError(
                f"{name}={getattr(config, name)} cannot be written: llama2.c fixes it at {fixed}; use hf or gguf"
            )
    if config.head_dim * config.n_heads != config.dim:
        raise CheckpointError(
            f"head_dim={config.head_dim} cannot be written: llama2.c has dim / n_heads = {config.dim}/{config.n_heads}"
        )
    if version not in _HEADER_BYTES:
        raise CheckpointError(f"version={version!r} is not a llama2.c version; 0, 1 (float32) and 2 (int8) are written")
    if dtype != "float32":
        raise CheckpointError(f"dtype={dtype!r} cannot be written: llama2.c holds float32, or int8 with version=2")
    for name in ("dim", "ffn_dim", "n_layers", "vocab_size", "context_length"):
        if getattr(config, name) >= 1 << 31:
            raise CheckpointError(f"{name}={getattr(config, name)} does not fit llama2.c's 32 bits")


def _fitting_group_size(config: ModelConfig, group_size: int) -> int:
    """Halve until it divides every row: runq.c reads groups row by row (export.py looks at dim only)."""
    if not isinstance(group_size, int) or group_size < 1:
        raise CheckpointError(f"group_size={group_size!r} must be a whole number from 1 up; 64 is usual")
    while config.dim % group_size or config.ffn_dim % group_size:
        group_size //= 2
    return group_size


def _header(config: ModelConfig, version: int, group_size: int) -> bytes:
    numbers = [
        config.dim, config.ffn_dim, config.n_layers, config.n_heads, config.n_kv_heads, config.vocab_size,
        config.context_length,
    ]  # fmt: skip
    if version == 0:
        numbers[5] *= 1 if config.tied_embeddings else -1
        return struct.pack("<7i", *numbers)
    header = struct.pack("<Ii7iB", MAGIC, version, *numbers, config.tied_embeddings)
    return (header + (struct.pack("<i", group_size) if version == 2 else b"")).ljust(256, b"\0")


def _rotary_tables(config: ModelConfig) -> bytes:
    """Return cos and then sin of every angle; readers skip them, older ones do not."""
    import torch

    from llama2.checkpoint.tensors import raw_bytes
    from llama2.model.rope import inverse_frequencies

    angles = torch.arange(config.context_length, dtype=torch.float64)[:, None] * inverse_frequencies(config)
    return raw_bytes(torch.stack((angles.cos(), angles.sin())).float()).tobytes()


def _write_tensor(file: BinaryIO, tensor: Any, version: int, group_size: int) -> None:
    import torch

    from llama2.checkpoint.tensors import raw_bytes

    tensor = tensor.detach().cpu().float()
    if version < 2 or tensor.ndim == 1:
        file.write(raw_bytes(tensor).data)
        return
    groups = tensor.reshape(-1, group_size)
    scales = groups.abs().amax(dim=1, keepdim=True) / 127
    codes = torch.where(scales > 0, groups / scales, 0).round().clamp(-127, 127).to(torch.int8)
    file.write(raw_bytes(codes).data)
    file.write(raw_bytes(scales).data)
