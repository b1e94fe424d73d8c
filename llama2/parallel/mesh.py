"""Who runs with whom: one process alone, or several that torchrun started.

    rank   0  1  2  3  4  5  6  7        tp = 2 ranks share every matrix (they see the same data),
    tp    |0  1|0  1|0  1|0  1|          dp = 4 such pairs split data and optimizer state (FSDP2)
    dp     0     1     2     3

The rest of the program asks a `World` and never torch.distributed.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama2.errors import TrainingError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process's place among all of them."""

    rank: int = 0
    size: int = 1
    tp: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None
    """Dimensions dp and tp; None for a process alone."""

    @property
    def dp(self) -> int:
        """How many ways the data is split."""
        return self.size // self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: prints, writes the log and the model."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """Return which of n things, in order, are this data rank's; none where there are too few for all."""
        return range(self.dp_rank * n // self.dp, (self.dp_rank + 1) * n // self.dp)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all data ranks, in float64; every rank gets the same."""
        if self.mesh is None or self.dp == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=self.mesh.get_group("dp"))
        return tensor.tolist()

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """Return the values of all data ranks, those of rank 0 first; every rank gets the same."""
        if self.mesh is None or self.dp == 1:
            return list(values)
        parts: list[Any] = [None] * self.dp
        dist.all_gather_object(parts, list(values), group=self.mesh.get_group("dp"))
        return [value for part in parts for value in part]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up on any rank."""
        if self.mesh is None:
            return flag
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            self.any(False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within this, what a broken connection or a silent process makes PyTorch say becomes one TrainingError."""
        try:
            yield
        except RuntimeError as error:
            signs = ("gloo", "NCCL", "Connection", "timed out", "Timed out", "Watchdog")
            if self.mesh is None or not any(sign in str(error) for sign in signs):
                raise
            raise TrainingError(
                f"rank {self.rank} lost the other processes: one died or was silent for too long (its own message "
                "says why); start all again with --resume"
            ) from error


def start(*, device: str = "auto", tensor_parallel: int = 1, timeout_s: float = 600.0) -> World:
    """Join the processes that torchrun started; alone without it.

    device: cpu, cuda, or auto for a GPU where there is one. timeout_s: how long the others are waited for before
    they are given up. Raises TrainingError for a split that does not go up.
    """
    size, rank, local = (
        int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda") and (size > 1 or not kind.startswith("cuda:")):
        raise TrainingError(f"device={device!r} is none to train on; wanted auto, cpu, cuda, or cuda:N for one process")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise TrainingError(f"device={device!r}, but PyTorch sees no GPU; use --device cpu or auto")
    if size % tensor_parallel:
        raise TrainingError(
            f"tensor_parallel={tensor_parallel} does not divide the {size} processes; start a multiple of it with "
            "torchrun --nproc-per-node"
        )
    if size == 1:
        return World(device=torch.device(kind))
    place = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        atexit.register(stop)
    mesh = init_device_mesh(place.type, (size // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp"))
    return World(rank, size, tensor_parallel, place, mesh)


def leave(code: int) -> None:
    """End this process with an exit code, if it is not 0 or there are others.

    Of several processes each ends at once: at the interpreter's own end gloo's threads are taken down in no fixed
    order, and in 2 of 30 runs on a busy machine that aborted a process whose work was done.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def stop() -> None:
    """Leave the other processes in order."""
    if dist.is_initialized():
        dist.destroy_process_group()
