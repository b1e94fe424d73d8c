"""Claims that take too long for every day: run by `make evidence`."""

import json
import subprocess
import sys

import pytest
import torch

import llama2
from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.model.config import ModelConfig
from llama2.model.transformer import build

pytestmark = [pytest.mark.evidence, pytest.mark.timeout(1800)]  # shape checks make the engine slow in tests

BIG = ModelConfig(1024, 12, 16, 32000, 2816, n_kv_heads=4, context_length=512)
"""206 million parameters: 826 MB in float32, 413 MB in bfloat16."""

MEASURE = """
import json, re, sys, threading, time
import torch, llama2.llm, numpy, gguf.quants
def private():
    text = open("/proc/self/smaps_rollup").read()
    return sum(int(n) for n in re.findall(r"Private_(?:Clean|Dirty): +(\\d+) kB", text)) * 1024
before, peak, done = private(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
llm = llama2.load(sys.argv[1], dtype=sys.argv[2], device="cpu")
llm.model(torch.tensor([[1, 2, 3]]))
done = True
watcher.join()
weights = sum(p.numel() * p.element_size() for p in llm.model.parameters())
print(json.dumps({"ratio": (max(peak, private()) - before) / weights, "weights_bytes": weights}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    llama2.save(build(BIG), folder / "hf")
    for to, dtype in (("meta", None), ("gguf", None), ("gguf", "q8_0"), ("llama2c", None)):
        llama2.convert(folder / "hf", folder / f"{to}-{dtype}", to=to, dtype=dtype)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["hf", "meta-None", "gguf-None", "gguf-q8_0", "llama2c-None"])
def test_loading_needs_little_more_memory_than_the_weights(big, name):
    """Private memory, at its peak while loading and running once, above that of the imports."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big / name), "float32"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights_bytes"] > 500e6
    assert found["ratio"] <= 1.15, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_ten_thousand_tokens_of_a_real_model_alone_and_in_a_crowd(assets, dtype, n_threads):
    """Bit for bit: tokens and log-probabilities, whatever the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        llm = llama2.load(assets / "checkpoints/stories260K/stories260K.bin", dtype=dtype, device="cpu")
        params = [SamplingParams(max_new_tokens=320, temperature=1.0, top_p=1.0, seed=i, logprobs=1) for i in range(32)]
        requests = [Request(str(i), tuple(range(1, 2 + i % 7)), params[i]) for i in range(32)]
        together = Engine(llm.model, batch_invariant=True).generate(requests)
        assert sum(each[0].n_new_tokens for each in together) == 10_240
        assert together == Engine(llm.model, batch_invariant=True, max_batch=1).generate(requests)
        assert together == Engine(llm.model, batch_invariant=True, max_batch=5).generate(requests)
    finally:
        torch.set_num_threads(before)
