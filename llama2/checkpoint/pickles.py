"""PyTorch's pickled files (.pth, .bin), read without running them and written without holding them.

A pickle is a program. Only `torch.load(weights_only=True)` reads one here: it knows tensors and plain
containers and refuses everything else.
"""

import math
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from llama2.checkpoint.tensors import raw_bytes
from llama2.checkpoint.weights import LazyTensor, Stored
from llama2.errors import CheckpointError

_PARTS = 64
_ALIGNMENT = 64


class _Pickled:
    """A mapped file of named tensors. Maps it anew after each 64th of it: that lets go of the pages read so far."""

    def __init__(self, path: Path):
        self.path, self.n_bytes_read = path, 0
        self.tensors = _load(path)
        self.n_bytes_at_once = path.stat().st_size // _PARTS

    def tensor(self, name: str) -> Tensor:
        if self.n_bytes_read > self.n_bytes_at_once:
            self.tensors, self.n_bytes_read = _load(self.path), 0
        tensor = self.tensors[name].detach()
        self.n_bytes_read += tensor.nbytes
        return tensor


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what it then refuses
            values = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # torch reports damage as RuntimeError, UnpicklingError, EOFError, KeyError, UnicodeError and others
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(
            f"{path}: cannot be read as plain tensors: it is damaged, older than PyTorch 1.6, or wants to run code "
            f"while loading, which is never allowed ({reason}); fetch it again or take a safetensors file"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not tensors by name")
    return {name: tensor for name, tensor in values.items() if _is_plain(path, name, tensor)}


def _is_plain(path: Path, name: object, tensor: object) -> bool:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{path}: entry {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor; only weights are read"
        )
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(
            f"{path}: tensor {name!r} is {tensor.layout} on {tensor.device}; save it dense, on the CPU"
        )
    return True


def read_pickle(path: Path) -> dict[str, Stored]:
    """List the tensors of one file. Raises CheckpointError on a file that is broken or holds more than tensors."""
    file = _Pickled(path)
    return {
        name: Stored(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), _reader(file, name))
        for name, tensor in file.tensors.items()
    }


def _reader(file: _Pickled, name: str) -> LazyTensor:
    return lambda: file.tensor(name)


_STORAGES = {
    "float32": torch.FloatStorage,
    "float16": torch.HalfStorage,
    "bfloat16": torch.BFloat16Storage,
}


class _Storage:
    """Stands for the numbers of one tensor, which lie in the archive beside the pickle."""

    def __init__(self, key: str, dtype: str, n: int):
        self.id = ("storage", _STORAGES[dtype], key, "cpu", n)


class _Promise:
    """Pickles as the tensor that will be written later."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[object, ...]:
        strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.id if isinstance(obj, _Storage) else None


def write_pickle(path: Path, tensors: Sequence[tuple[str, tuple[int, ...], Callable[[], Any]]], *, dtype: str) -> None:
    """Write what torch.load reads as a dict of tensors, one tensor in memory at a time.

    torch.save would want all of them. The layout is its own: a zip archive, nothing compressed, with a
    pickle that names records data/0, data/1, ...
    """
    n_numbers = {name: math.prod(shape) for name, shape, _ in tensors}
    promises = {
        name: _Promise(_Storage(str(i), dtype, n_numbers[name]), shape) for i, (name, shape, _) in enumerate(tensors)
    }
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("archive/data.pkl", "w") as record:
            _Pickler(record, protocol=2).dump(promises)
        archive.writestr("archive/byteorder", "little")
        for i, (name, _, tensor) in enumerate(tensors):
            n_bytes = n_numbers[name] * (4 if dtype == "float32" else 2)
            with archive.open(_aligned(file, f"archive/data/{i}", n_bytes), "w", force_zip64=True) as record:
                record.write(raw_bytes(tensor()).data)
        archive.writestr("archive/version", "3\n")


def _aligned(file: BinaryIO, name: str, n_bytes: int) -> zipfile.ZipInfo:
    """Describe a record whose data begins at a multiple of 64 bytes, so that it can be mapped."""
    record = zipfile.ZipInfo(name)
    record.file_size = n_bytes
    zip64_bytes, local_header_bytes = 20, 30
    start = file.tell() + local_header_bytes + len(name) + zip64_bytes + 4
    padding = -start % _ALIGNMENT
    record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return record
