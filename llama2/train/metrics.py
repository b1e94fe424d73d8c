"""What a run tells while it runs: a bar or lines on standard error, log.jsonl always, TensorBoard on request.

Throughput is tokens of the step over the seconds of the step. MFU is the model's arithmetic
(`ModelConfig.flops_per_token`) over what the hardware could do in that time: the card's published peak, on a CPU
the speed of a large product measured here; where neither is known there is none, not 0 %.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llama2.errors import TrainingError
from llama2.files.staging import staged_file
from llama2.parallel.mesh import World

PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A800": 312, "L40S": 362, "L4": 121,
    "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "B200": 2250, "GH200": 989,
}  # fmt: skip
"""bfloat16 without sparsity, from NVIDIA's data sheets; float32 accumulation on the RTX cards."""

SECONDS_BETWEEN_LINES = 10.0


def peak_flops(world: World, dtype: torch.dtype) -> float | None:
    """Return the operations per second that all processes together could reach, None if unknown."""
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
        known = next((value for card, value in PEAK_TFLOPS.items() if card in name), None)
        return None if known is None or dtype != torch.bfloat16 else known * 1e12 * world.size
    if world.device.type != "cpu" or world.size > 1:  # processes on one machine share its cores
        return None
    return _measured_peak(dtype)


def _measured_peak(dtype: torch.dtype, n: int = 1024, repeats: int = 5) -> float:
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)  # nothing random: a run's state is not touched
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory_bytes(world: World) -> int:
    """Return the most memory that this process has held so far: the GPU's, or the process's on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Log:
    """Writes log.jsonl and the screen; on other ranks than the first it does nothing."""

    def __init__(self, out: Path, world: World, *, n_steps: int, n_done: int = 0, tensorboard: bool = False):
        """n_done: steps that a checkpoint holds; lines of later ones, from before a kill, are dropped."""
        self.is_on, self.n_steps = world.is_first, n_steps
        self._last_line = 0.0
        self._tensorboard = _tensorboard(out) if tensorboard and self.is_on else None
        if not self.is_on:
            return
        path = out / "log.jsonl"
        kept = [line for line in read_log(path) if line["step"] <= n_done] if n_done else []
        try:
            with staged_file(path) as temporary:  # the lines there are until the shorter log is whole
                temporary.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in kept), "utf-8")
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise TrainingError(f"{path} cannot be written: {error.strerror}") from error
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(24), TextColumn("{task.description}"))
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal
        )
        self._task = self._bar.add_task("", total=n_steps, completed=n_done)
        self._bar.start()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to log.jsonl."""
        if not self.is_on:
            return
        plain = {name: value if _is_json(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **plain}, ensure_ascii=False) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def step(self, step: int, **values: Any) -> None:
        """Log one optimizer step and show it."""
        self.write("step", step, **values)
        if not self.is_on:
            return
        text = summary(values)
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line > SECONDS_BETWEEN_LINES or step in (1, self.n_steps)):
            self._last_line = now
            self.console.print(f"step {step}/{self.n_steps}  {text}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.is_on:
            self.console.print(text, markup=False)

    def close(self) -> None:
        if self.is_on:
            self._bar.stop()
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()


def _is_json(value: object) -> bool:
    """NaN and infinities are no JSON; they are written as text."""
    return not isinstance(value, float) or math.isfinite(value)


def summary(values: Mapping[str, Any]) -> str:
    """Return the line of a step as people read it."""
    mfu = "n/a" if values["mfu"] is None else f"{values['mfu']:.0%}"
    return (
        f"loss {values['loss']:.4f}  norm {values['grad_norm']:.2f}  lr {values['learning_rate']:.1e}  "
        f"{values['tokens_per_s']:,.0f} tok/s  MFU {mfu}  {values['memory_bytes'] / 1e9:.1f} GB"
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("tensorboard is not installed: pip install 'llama2[train]', or leave it out") from None
    return SummaryWriter(str(out / "tensorboard"))
