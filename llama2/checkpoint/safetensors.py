"""The safetensors container: a JSON table, then numbers. Knows no names of a Llama.

    u64 n | n bytes of JSON {name: {dtype, shape, data_offsets}} | data

Written here by hand because the library's writer wants every tensor of a file in memory at once, and
its reader maps whole files, whose touched pages then count until the last tensor of the file is gone.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama2.checkpoint.weights import LazyTensor, Stored
from llama2.errors import CheckpointError

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {value: key for key, value in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> dict[str, Stored]:
    """List the tensors of one file. Raises CheckpointError unless every one lies inside it and is floating point."""
    header, data_start, data_bytes = _header(path)
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, dtype, first, last = _entry(path, name, entry)
        if last > data_bytes:
            raise _damaged(path, f"tensor {name!r} ends at {last} of {data_bytes} bytes of data")
        found[name] = Stored(shape, dtype, _reader(path, data_start + first, shape, dtype))
    return found


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            n = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if n > min(_MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"its table would take {n} of the file's {size} bytes")
            header = json.loads(file.read(n))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path, str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "its table is not a JSON object")
    return header, 8 + n, size - 8 - n


def _entry(path: Path, name: str, entry: object) -> tuple[tuple[int, ...], str, int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise _damaged(path, f"tensor {name!r} is described as {str(entry)[:80]}")
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype}; {', '.join(_DTYPES)} are read: quantised weights are "
            "read from GGUF files, or take the original repository"
        )
    sizes = [size for size in shape if isinstance(size, int) and 0 <= size < 1 << 48]
    n_bytes = math.prod(sizes) * (8 if dtype == "F64" else 4 if dtype == "F32" else 2)
    if len(sizes) != len(shape) or len(sizes) > 8 or first < 0 or last - first != n_bytes:
        raise _damaged(path, f"tensor {name!r} of shape {str(shape)[:80]} cannot lie at bytes {first} to {last}")
    return tuple(sizes), _DTYPES[dtype], first, last


def _reader(path: Path, start: int, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    def read() -> Any:
        import torch

        from llama2.checkpoint.tensors import map_tensor

        return map_tensor(path, start, shape, getattr(torch, dtype))

    return read


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: is not a whole safetensors file: {problem}; fetch it again")


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, tuple[int, ...], Callable[[], Any]]], *, dtype: str
) -> int:
    """Write tensors (name, shape, function that returns it) one at a time; return the bytes of data."""
    from llama2.checkpoint.tensors import raw_bytes

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, _ in tensors:
        n_bytes = math.prod(shape) * (4 if dtype == "float32" else 2)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((56 - len(text)) % 64)  # so that data begins at a multiple of 64, with the 8 bytes before
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, tensor in tensors:
            file.write(raw_bytes(tensor()).data)
    return at
