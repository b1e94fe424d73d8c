"""Weights of a model that is split over processes, whole again to answer with."""

import os
import subprocess
import sys

import pytest

from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from llama2.parallel.gather import whole
from llama2.parallel.mesh import World

SCRIPT = """
import torch
from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from llama2.parallel.gather import whole
from llama2.parallel.mesh import leave, start
from llama2.parallel.shard import parallelize

shape = ModelConfig(32, 2, 4, 40, 48, n_kv_heads=2, context_length=64)
request = Request("a", (1, 2, 3), SamplingParams(max_new_tokens=20, temperature=1.0, seed=4))
expected = Engine(build(shape)).generate([request])
world = start(device="cpu", tensor_parallel=TP)
split = parallelize(build(shape), world)
with whole(split, world) as model:
    assert Engine(model).generate([request]) == expected
print("the same")
leave(0)
"""


def test_in_one_process_the_model_itself_answers():
    model = build(ModelConfig(16, 1, 2, 10, 16))
    with whole(model, World()) as found:
        assert found is model


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_of_two_processes_each_has_all_weights_and_answers_alike(tmp_path, tp):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("TP", str(tp)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 2
