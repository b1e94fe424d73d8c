"""Which part of a whole tensor lies on this rank, and how to fill it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llama2.parallel.mesh import World


class Region(NamedTuple):
    """A box in a whole tensor."""

    whole: tuple[int, ...]
    """Shape of the whole."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))


def region_of(tensor: Tensor) -> Region:
    """Return the part of the whole that this rank holds: all of it, unless the tensor is sharded."""
    whole = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Region(whole, (0,) * len(whole), whole)
    shape, offset = compute_local_shape_and_global_offset(whole, tensor.device_mesh, tensor.placements)
    return Region(whole, tuple(offset), tuple(shape))


class Held(NamedTuple):
    """Numbers of this rank, where in the whole they belong, and whether it is this rank that saves them."""

    values: Tensor
    region: Region
    is_owner: bool


def held(values: Tensor, like: Tensor, world: World) -> Held:
    """Return plain numbers as part of a whole that is split as `like` is; a scalar is the same on every rank."""
    if values.ndim == 0:
        return Held(values, Region((), (), ()), world.is_first)
    return Held(values, region_of(like), _is_owner(like, world))


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's numbers, which share memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_names(tensor: Tensor) -> tuple[str, ...]:
    """Return the dimensions of the mesh over which a tensor is split."""
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    return tuple(name for name, place in zip(names, tensor.placements, strict=True) if not place.is_replicate())


def _is_owner(tensor: Tensor, world: World) -> bool:
    """Of replicas only the first is saved."""
    if not isinstance(tensor, DTensor):
        return world.is_first
    mesh = tensor.device_mesh
    names, where = mesh.mesh_dim_names or (), mesh.get_coordinate() or ()
    if "tp" not in names and world.rank % world.tp:  # split by data alone: the same on every rank of a group
        return False
    return all(at == 0 for at, place in zip(where, tensor.placements, strict=True) if place.is_replicate())


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of a whole tensor."""
    local_part(tensor).copy_(whole[region_of(tensor).slices] if tensor.ndim else whole)
