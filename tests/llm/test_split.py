"""A model over two processes writes what it writes in one, through the real command."""

import os
import subprocess
import sys

import pytest

PROMPT = "Once upon a time"


def generate(model, *more: str, n: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    command = [sys.executable, *start, "-m", "llama2", "generate", str(model), "--prompt", PROMPT, *more]
    usual = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env={**usual, **env})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_write_the_same_text_as_one(assets, dtype):
    model = assets / "checkpoints" / "stories260K" / "stories260K.bin"
    options = ("--dtype", dtype, "--temperature", "0", "--max-new-tokens", "100")
    alone, together = generate(model, *options), generate(model, *options, n=2)
    assert together.returncode == 0, together.stderr
    if dtype == "float32":
        assert together.stdout == alone.stdout
    else:  # sums over the ranks round otherwise: the beginning is the same
        assert together.stdout[:60] == alone.stdout[:60]


@pytest.mark.slow
def test_a_split_that_does_not_go_up_is_refused(assets):
    model = assets / "checkpoints" / "stories260K" / "stories260K.bin"
    refused = generate(model, n=3)
    assert refused.returncode != 0 and "is not divisible by tensor_parallel=3" in refused.stderr
