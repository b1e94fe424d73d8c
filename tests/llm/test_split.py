"""A model over two processes writes what it writes in one, through the real command."""

import os
import re
import subprocess
import sys

import httpx2
import pytest

import llama2
from tests.serve.conftest import until

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


@pytest.mark.slow
def test_two_processes_serve_one_model_and_leave_in_order(assets, tmp_path):
    model, log = assets / "checkpoints" / "stories260K" / "stories260K.bin", tmp_path / "log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llama2"]
    with log.open("w") as file:
        command = [*launch, "serve", f"stories={model}", "--port", "0", "--device", "cpu"]
        server = subprocess.Popen(command, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until(lambda: re.search(r"http://[\d.:]+", log.read_text()), seconds=90)
        url = re.search(r"http://[\d.:]+", log.read_text())[0]
        until(lambda: httpx2.get(f"{url}/health").status_code == 200, seconds=60)
        asked = dict(model="stories", prompt=PROMPT, max_tokens=40, temperature=0)
        text = httpx2.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]
        alone = llama2.load(model, device="cpu").generate(PROMPT, max_new_tokens=40, temperature=0)
        assert text == alone
        vector = httpx2.post(f"{url}/v1/embeddings", json=dict(model="stories", input="Lily"), timeout=60)
        assert len(vector.json()["data"][0]["embedding"]) == 64
    finally:
        server.terminate()
        server.wait(timeout=90)
    said = log.read_text()
    assert "shutting down" in said and "/llama2/" not in said, said  # the traceback in it is torchrun's own
