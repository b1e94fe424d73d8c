"""Training state on disk: named tensors, each rank's part in a file of its own, readable by any other split.

    state/00000.safetensors   what rank 0 holds: numbers, and for each name the whole shape and the offset
    state/00001.safetensors   ...

No pickle, no collective: a reader opens all files and takes the parts that overlap with what it needs.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama2.errors import CheckpointError
from llama2.parallel.region import Held, Region


class Part(NamedTuple):
    """Numbers on the CPU, and where in the whole they belong."""

    region: Region
    values: Tensor


def snapshot(tensors: Mapping[str, Held]) -> dict[str, Part]:
    """Copy what this rank must save, so that training may go on while it is written."""
    return {
        name: Part(each.region, each.values.detach().to("cpu", copy=True).contiguous())
        for name, each in tensors.items()
        if each.is_owner
    }


def write_parts(folder: Path, parts: Mapping[str, Part], rank: int) -> None:
    """Write this rank's file; it has its name only once it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: {"whole": part.region.whole, "offset": part.region.offset} for name, part in parts.items()}
    path, partial = folder / f"{rank:05}.safetensors", folder / f".{rank:05}.partial"
    try:
        save_file({name: part.values for name, part in parts.items()}, partial, {"places": json.dumps(places)})
    except SafetensorError as error:  # its writer says so of a full disk
        raise OSError(str(error)) from error
    flush(partial)
    os.replace(partial, path)


def flush(path: Path) -> None:
    """Return when a file is on the disk, not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class SavedState:
    """All ranks' files of one state, as whole tensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._parts: dict[str, list[tuple[Path, tuple[int, ...]]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, safe_open] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._open[path] = safe_open(path, "pt")
                places = json.loads((self._open[path].metadata() or {})["places"])
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is broken: {error}; remove this checkpoint, an older one is used"
                ) from None
            for name, place in places.items():
                self._parts.setdefault(name, []).append((path, tuple(place["offset"])))
                self.shapes[name] = tuple(place["whole"])
        if not self._parts:
            raise CheckpointError(f"{folder} holds no training state; remove this checkpoint, an older one is used")

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Return a tensor, or the part of it in a region. Raises CheckpointError if any of it is missing."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder} lacks {name!r}: it was saved with other settings; use those")
        whole = self.shapes[name]
        region = region or Region(whole, (0,) * len(whole), whole)
        if region.whole != whole:
            raise CheckpointError(f"{self.folder} has {name!r} as {whole}, wanted {region.whole}: another model's")
        result, n_found = None, 0
        for path, offset in self._parts[name]:
            piece = self._open[path].get_slice(name)
            shape = tuple(piece.get_shape())
            if not whole:
                return self._open[path].get_tensor(name)
            there, here = _overlap(offset, shape, region)
            if there is None:
                continue
            values = piece[there]
            result = torch.empty(region.shape, dtype=values.dtype) if result is None else result
            result[here] = values
            n_found += values.numel()
        if result is None or n_found != result.numel():
            raise CheckpointError(f"{self.folder} lacks part of {name!r}: a rank's file is missing")
        return result

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Held]) -> None:
        """Fill tensors by name, each with the part that this rank holds."""
        for name, each in tensors.items():
            if all(each.region.shape):
                each.values.copy_(self.read(name, each.region))


def _overlap(offset: tuple[int, ...], shape: tuple[int, ...], region: Region):
    """Return slices of a saved part and of the wanted region where the two meet; None if they do not."""
    there, here = [], []
    for start, size, at, wanted in zip(offset, shape, region.offset, region.shape, strict=True):
        first, last = max(start, at), min(start + size, at + wanted)
        if first >= last:
            return None, None
        there.append(slice(first - start, last - start))
        here.append(slice(first - at, last - at))
    return tuple(there), tuple(here)
