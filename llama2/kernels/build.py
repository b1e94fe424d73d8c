"""C for the few loops that PyTorch has no operation for: compiled when first needed, and never missed.

The compiler of this machine makes one library of all `*.c` here, for this very processor, into the user's cache.
Without a compiler, or with LLAMA2_KERNELS=0, callers take their plain twin in PyTorch: slower, and the same numbers.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
WISHES = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())
"""Flags that not every compiler knows, best first. OpenMP's threads are PyTorch's: both load one libgomp."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there are none; `status` says why."""
    found, _ = _found()
    return found


def call(name: str, *arguments: "torch.Tensor | int | float | None") -> None:
    """Call a kernel: tensors as pointers, which must be contiguous; whole numbers in 64 bits, others in float32."""
    kernels, _ = _found()
    assert kernels is not None
    getattr(kernels, name)(*map(_argument, arguments))


def _argument(value: "torch.Tensor | int | float | None"):
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def status() -> str:
    """Return one line about the kernels."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    found, said = _looked_for()
    if found is None and os.environ.get("LLAMA2_KERNELS", "1") != "0":
        logging.getLogger(__name__).warning(said)
    return found, said


def _looked_for() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("LLAMA2_KERNELS", "1") == "0":
        return None, "C kernels are turned off by LLAMA2_KERNELS=0; plain PyTorch is used"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None, "no C compiler was found; plain PyTorch is used, which is slower"
    try:
        path = _built(compiler)
        return ctypes.CDLL(str(path)), f"C kernels: {path}"
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = said[0] if said else "no reason given"
        return None, f"the C kernels could not be built ({reason}); plain PyTorch is used, which is slower"


def _built(compiler: str) -> Path:
    """Return the library, compiled if this source was not yet, for this processor and compiler."""
    sources = sorted(
        (each for each in files("llama2.kernels").iterdir() if each.name.endswith((".c", ".h"))), key=lambda e: e.name
    )
    texts = [each.read_bytes() for each in sources]
    name = hashlib.sha256(
        b"\0".join([*texts, compiler.encode(), repr((FLAGS, WISHES)).encode(), _processor()])
    ).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama2" / "kernels"
    path = folder / f"{name[:20]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for source, text in zip(sources, texts, strict=True):
            (Path(work) / source.name).write_bytes(text)
        made, names = Path(work) / "kernels.so", [source.name for source in sources if source.name.endswith(".c")]
        _compile(compiler, names, made)
        made.replace(path)  # complete or not there at all
    return path


def _compile(compiler: str, names: list[str], made: Path) -> None:
    """Make a library of the sources beside it, with the best flags that this compiler knows."""
    for number, wishes in enumerate(WISHES, 1):
        command = [compiler, *FLAGS, *wishes, "-o", str(made), *names, "-lm"]
        done = subprocess.run(command, cwd=made.parent, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            return
        if number == len(WISHES):
            done.check_returncode()


def _processor() -> bytes:
    """Return what tells this processor's abilities from another's: a home folder may be shared."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}".encode()
