"""C kernels: the same bits as their twins, built once, and never missed."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from llama2.kernels.build import library, status
from llama2.model import quantized
from llama2.model.quantized import NF4Linear

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
CHECK = "from llama2.kernels.build import library, status; print(library() is None, status())"


def check(tmp_path, **env: str) -> str:
    usual = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env={**usual, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 48), (3, 6), (129, 130), (2048, 300)])
def test_decoding_nf4_gives_the_same_bits(dtype, shape, monkeypatch):
    layer = NF4Linear(*reversed(shape), dtype=dtype)
    layer.quantise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    quick = layer.dense()
    monkeypatch.setattr(quantized, "library", lambda: None)
    assert torch.equal(quick.view(torch.uint8), layer.dense().view(torch.uint8))


@needs_compiler
def test_what_is_no_number_stays_none():
    layer = NF4Linear(64, 64, dtype=torch.bfloat16)
    layer.scale_mean.fill_(float("nan"))
    assert layer.dense().isnan().all()


@needs_compiler
def test_it_is_built_once_and_leaves_nothing_else_behind(tmp_path):
    assert check(tmp_path).startswith("False C kernels: ")
    (made,) = (tmp_path / "llama2" / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    check(tmp_path)
    assert made.stat().st_mtime_ns == before


def test_without_a_compiler_or_with_a_broken_one_or_turned_off_it_says_so(tmp_path):
    assert check(tmp_path, LLAMA2_KERNELS="0").startswith("True C kernels are turned off")
    assert check(tmp_path, CC="no-such-compiler").startswith("True no C compiler was found")
    assert check(tmp_path, CC="false").startswith("True the C kernels could not be built")
    assert not list((tmp_path / "llama2" / "kernels").glob("*"))  # nothing half-written


@needs_compiler
def test_this_process_has_them():
    assert library() is not None and status().startswith("C kernels")
