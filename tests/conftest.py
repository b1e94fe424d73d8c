"""Shared fixtures: where the real checkpoints are, and the command without a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

WITH_SHAPES = [
    *("llama2.model.rope", "llama2.model.attention", "llama2.model.transformer", "llama2.model.surgery"),
    *("llama2.model.lora", "llama2.model.blockwise", "llama2.model.quantized"),
    *("llama2.infer.sampling", "llama2.infer.cache", "llama2.infer.invariant"),
]
install_import_hook(WITH_SHAPES, "beartype.beartype")  # every annotated shape and type is checked in the tests
torch.set_num_threads(1)  # tiny models: more threads would only wait for each other, and for other workers
# The tests start a hundred processes. Where compiled modules are not to be kept, as in many containers, each of them
# would compile PyTorch anew: 5 s of work before it begins instead of 2 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real checkpoints, tokenizers and data; tests that need it skip without it."""
    folder = os.environ.get("LLAMA2_TEST_ASSETS")
    if not folder:
        pytest.skip("LLAMA2_TEST_ASSETS is not set: no real checkpoints to test with")
    return Path(folder)


@pytest.fixture
def here(monkeypatch, capsys):
    """Return a function that runs `llama2 ...` in this process, without the seconds that a new one takes to begin.

    It returns what subprocess.run would.
    """
    from llama2.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llama2", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run
