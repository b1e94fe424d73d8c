"""The GGUF container, version 3: a header of typed keys, a table of tensors, aligned data.

Knows bytes and types, not Llamas: what keys and tensors mean is said in `checkpoint/gguf.py`
and `tokenizer/formats.py`. Files come from strangers, so every count and offset is checked
against the size of the file before anything is allocated. Source: ggml docs/gguf.md.

    "GGUF" | u32 version | u64 n_tensors | u64 n_keys | keys | tensor infos | padding | data
"""

import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama2.errors import CheckpointError
from llama2.files.staging import staged_file

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32

_NUMBERS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

BLOCKS: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "BF16": (30, 1, 2),
}  # fmt: skip
"""Name -> (type id, numbers per block, bytes per block) of the types that are read."""

_TYPE_NAMES = {type_id: name for name, (type_id, _, _) in BLOCKS.items()}
_REFUSED = {
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in PyTorch's order: the last axis is contiguous."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    start: int
    """Byte offset from the start of the file."""
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """All of a GGUF file but its numbers."""

    path: Path
    metadata: dict[str, object]
    """Plain values; arrays of strings are lists, arrays of numbers NumPy arrays."""
    tensors: dict[str, TensorInfo]


class _Reader:
    """A cursor over the file that refuses to leave it."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem} (at byte {self.at}); the file is damaged, fetch it again")

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.data) - self.at:
            raise self.fail(f"{n_bytes} bytes wanted, {len(self.data) - self.at} left")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def number(self, kind: str) -> int:
        return struct.unpack("<" + kind, self.take(struct.calcsize(kind)))[0]

    def count(self, what: str, at_least_bytes: int) -> int:
        n = self.number("Q")
        if n * at_least_bytes > len(self.data) - self.at:
            raise self.fail(f"{n} {what} announced, more than the file can hold")
        return n

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a text is not UTF-8") from None

    def value(self, type_id: int) -> object:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self.array()
        return self.numbers(type_id, 1)[0].item()

    def numbers(self, type_id: int, n: int) -> np.ndarray:
        if type_id not in _NUMBERS:
            raise self.fail(f"value type {type_id} is not one of GGUF's")
        dtype = np.dtype(_NUMBERS[type_id])
        return np.frombuffer(self.take(n * dtype.itemsize), dtype)

    def array(self) -> object:
        element = self.number("I")
        if element == _STRING:
            return [self.string() for _ in range(self.count("strings", 8))]
        return self.numbers(element, self.count("numbers", 1))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.number("I")
        if not 1 <= n_dims <= 4:
            raise self.fail(f"tensor {name!r} has {n_dims} axes")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.number("I"), self.number("Q")


def read_header(path: Path) -> Header:
    """Read keys and tensor table. Raises CheckpointError on anything but a whole, sane GGUF v3 (or v2) file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Reader(path, data))
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as GGUF: {error}") from error


def _parse(reader: _Reader) -> Header:
    if reader.take(4) != MAGIC:
        raise reader.fail("does not begin with GGUF")
    version = reader.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{reader.path}: GGUF version {version}; 2 and 3 are read: convert it with a newer tool")
    n_tensors = reader.count("tensors", 24)
    metadata: dict[str, object] = {}
    for _ in range(reader.count("keys", 12)):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    infos = [reader.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise reader.fail(f"general.alignment={alignment!r} makes no sense")
    data_start = -(-reader.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_id, offset in infos:
        if name in tensors:
            raise reader.fail(f"tensor {name!r} is listed twice")
        tensors[name] = _tensor_info(reader, name, shape, type_id, data_start + offset)
    return Header(reader.path, metadata, tensors)


def _tensor_info(reader: _Reader, name: str, shape: tuple[int, ...], type_id: int, start: int) -> TensorInfo:
    if type_id not in _TYPE_NAMES:
        known = _REFUSED.get(type_id, f"number {type_id}")
        raise CheckpointError(
            f"{reader.path}: tensor {name!r} has type {known}, which is not read; "
            f"read are {', '.join(BLOCKS)}: take a file quantised to one of those, e.g. Q4_K_M or Q8_0"
        )
    type_name = _TYPE_NAMES[type_id]
    n_bytes = tensor_bytes(shape, type_name)
    if n_bytes is None:
        raise reader.fail(f"tensor {name!r}: rows of {shape[-1]} numbers do not fill whole {type_name} blocks")
    if start + n_bytes > len(reader.data):
        raise reader.fail(f"tensor {name!r} lies outside the file ({start + n_bytes} > {len(reader.data)} bytes)")
    return TensorInfo(name, shape, type_name, start, n_bytes)


def tensor_bytes(shape: tuple[int, ...], type_name: str) -> int | None:
    """Return the bytes a tensor takes in this type, or None where its rows do not fill whole blocks."""
    _, per_block, block_bytes = BLOCKS[type_name]
    if shape[-1] % per_block:
        return None
    n = 1
    for size in shape:
        n *= size
    return n // per_block * block_bytes


def write(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Iterable[tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]],
) -> None:
    """Write a GGUF v3 file; each tensor is (name, shape, type name, function that returns its raw bytes).

    Integers become u32, floats f32, lists arrays of the same (signed for integers). Data is asked for one
    tensor at a time, so memory holds one.
    """
    tensors = list(tensors)
    with staged_file(path) as temporary, temporary.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _typed(key, value))
        offset = 0
        for name, shape, type_name, _ in tensors:
            n_bytes = tensor_bytes(shape, type_name)
            assert n_bytes is not None, (name, shape, type_name)
            dims = shape[::-1]
            file.write(_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", BLOCKS[type_name][0], offset))
            offset += -(-n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
        for _, _, _, raw in tensors:
            _pad(file)
            file.write(np.ascontiguousarray(raw()).data)
        _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: object) -> bytes:
    """Return type id and bytes of one value."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", _STRING) + _text(value)
        case list():
            return struct.pack("<I", _ARRAY) + _typed_array(key, value)
    raise AssertionError(f"{key}: no GGUF type for {type(value)}")


def _typed_array(key: str, values: list[object]) -> bytes:
    if all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(_text(str(value)) for value in values)
    type_id = 5 if all(isinstance(value, int) for value in values) else 6
    return struct.pack("<IQ", type_id, len(values)) + np.array(values, _NUMBERS[type_id]).tobytes()
