"""Tensors from bytes and bytes from tensors, without copies where none is needed. Knows no format.

A tensor that needs no change stays a private map of its file: pages come from the disk when first
touched and belong to the page cache. Measured on 600 MB of weights, two cores: matrix-vector products
over mapped weights that begin 8 bytes off a page take 0.98 (float32) and 0.95 (bfloat16) of the time
over fresh allocations, so nothing is won by copying. Each tensor has a map of its own, which goes
with the tensor: after a conversion the pages that were read no longer count.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llama2.errors import CheckpointError


def map_bytes(path: Path, start: int, n_bytes: int) -> np.ndarray:
    """Map a stretch of a file, copy on write. Raises CheckpointError where the file is shorter."""
    try:
        return np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=(n_bytes,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {n_bytes} bytes at {start} cannot be read: {error}") from error


def map_tensor(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map one tensor, given the byte at which it begins."""
    n_bytes = dtype.itemsize
    for size in shape:
        n_bytes *= size
    if not n_bytes:
        return torch.empty(shape, dtype=dtype)
    raw = torch.from_numpy(map_bytes(path, start, n_bytes))
    if start % dtype.itemsize:
        raw = raw.clone()  # numbers must begin at a multiple of their size
    return raw.view(dtype).reshape(shape)


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """Return a tensor's numbers as they lie in a little-endian file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to another type. Raises CheckpointError where float16 would turn a finite number into infinity."""
    converted = tensor.to(dtype)
    can_overflow = dtype == torch.float16 and tensor.dtype != dtype
    if can_overflow and bool((converted.isinf() & tensor.isfinite()).any()):
        raise CheckpointError(
            f"tensor {name!r} holds {tensor.abs().max().item():.6g}, above 65504, the largest float16; "
            "use bfloat16 or float32"
        )
    return converted


def halves_to_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of wq or wk (or their biases) from Hugging Face's order to Meta's.

    Hugging Face turns x[i] with x[i + Dh/2], Meta x[2i] with x[2i + 1]; the same weights in another order.
    """
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def pairs_to_halves(rows: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of wq or wk (or their biases) from Meta's order to Hugging Face's."""
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def in_row_chunks(rows: np.ndarray, convert: Callable[[np.ndarray], np.ndarray], out: np.ndarray) -> np.ndarray:
    """Fill `out` from `rows` a few megabytes at a time, so that what `convert` makes on the way stays small."""
    step = max(1, (4 << 20) // max(rows.shape[-1] * rows.itemsize, 1))
    for first in range(0, len(rows), step):
        out[first : first + step] = convert(rows[first : first + step])
    return out


class Unfilled(TorchFunctionMode):
    """Skips torch.nn.init while a model is built whose weights are read next.

    On the meta device those functions do nothing, but import 800 modules (3 s, 77 MB) to find that out.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
