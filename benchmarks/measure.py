"""What every benchmark shares: rounds that alternate, medians, the machine's facts, and a peer with our weights."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from llama2.checkpoint.hf import hf_name
from llama2.checkpoint.hf_config import config_json
from llama2.checkpoint.tensors import pairs_to_halves
from llama2.model.transformer import Transformer


def machine() -> dict[str, object]:
    """Return what a reader needs to judge the numbers, the load of other processes included."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


BUSY = 0.05
"""A line during which other processes took more than this share of the cores decides nothing."""


def cpu_seconds() -> tuple[float, float]:
    """Return the seconds that all cores were busy, and those of this process and its children, finished or not."""
    own = sum(os.times()[:4]) + sum(map(seconds_of, running_children()))
    stat = Path("/proc/stat")
    if not stat.exists():
        return own, own
    fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"), own


def running_children() -> list[int]:
    """Return the ids of this process's children that still run."""
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(number) for task in tasks for number in task.read_text().split()]


def seconds_of(process: int) -> float:
    """Return the seconds of processor time of a process and of its finished children; 0 where it has just ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Company:
    """How much of the machine others used, from now until asked; 0 where there is no /proc/stat."""

    def __init__(self) -> None:
        self.start, self.busy_own = time.perf_counter(), cpu_seconds()

    def share(self) -> float:
        busy, own = (now - then for now, then in zip(cpu_seconds(), self.busy_own, strict=True))
        return round(max(0.0, busy - own) / ((time.perf_counter() - self.start) * (os.cpu_count() or 1)), 3)


def wait_for_quiet(timeout_s: float = 600) -> None:
    """Return when others have left the cores alone for four seconds, or after the timeout."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        company = Company()
        time.sleep(4)
        if company.share() < BUSY:
            return


def alternate(sides: Mapping[str, Callable[[], float]], n_rounds: int) -> dict[str, float]:
    """Run every side once per round, in turn, and return each one's median; a first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(n_rounds + 1):
        for name, side in sides.items():
            value = side()
            if number:
                taken[name].append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def report(claim: str, values: Mapping[str, object]) -> dict[str, object]:
    """Print a result as one line of JSON and return it."""
    line = {"claim": claim, **values, "machine": machine()}
    print(json.dumps(line), flush=True)
    return line


def their_model(model: Transformer):
    """Return transformers' model with the same weights: the same memory, but for the reordered wq and wk."""
    import transformers

    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
    config = transformers.LlamaConfig(**config_json(model.config, dtype=dtype, generation={}))
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    weights = {}
    for name, weight in model.state_dict().items():
        n_heads = {"wq": model.config.n_heads, "wk": model.config.n_kv_heads}.get(name.split(".")[-2], 0)
        weights[hf_name(name)] = pairs_to_halves(weight, n_heads) if n_heads else weight
    theirs.load_state_dict(weights, assign=True, strict=False)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its tables are not in a state dict
    return theirs.eval()
