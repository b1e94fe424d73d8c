"""A tiny chat model, prompts, pairs, and ways to look at runs."""

import json
import os
import subprocess
import sys

import pytest
import tomli_w
import torch

from llama2.checkpoint import hf, store
from llama2.checkpoint.resume import SavedState
from llama2.checkpoint.weights import Checkpoint
from llama2.model.config import ModelConfig
from llama2.model.transformer import build, initialise
from llama2.tokenizer.formats import save_tokenizer
from llama2.train.folder import plain
from llama2.train.metrics import read_log
from tests.plots import no_plots, report  # noqa: F401
from tests.pocket import pocket_tokenizer

SHAPE = ModelConfig(dim=16, n_layers=2, n_heads=4, vocab_size=260, ffn_dim=24, n_kv_heads=2, context_length=96)


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    """The folder of a tiny chat model, of 260 pieces, that knows nothing."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    model = initialise(build(SHAPE), seed=3, std=0.2)
    weights = {name: each.detach() for name, each in model.named_parameters()}
    tokenizer = pocket_tokenizer()
    checkpoint = Checkpoint(
        SHAPE, {name: (lambda each=each: each) for name, each in weights.items()}, "float32", folder
    )
    hf.write(folder, checkpoint, tokenizer=tokenizer, dtype="float32")
    save_tokenizer(tokenizer, folder, format="model")
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """24 short questions."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {chr(97 + i)}"}) + "\n" for i in range(24)))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """40 pairs: an answer of a's is better than one of b's, the more the clearer."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    ratings = ("significantly better", "better", "slightly better", "negligibly better / unsure")
    lines = [
        {
            "prompt": f"say {i}", "chosen": "a" * (2 + i % 3), "rejected": "b" * (1 + i % 4), "rating": ratings[i % 4],
            "kind": "safe" if i % 5 == 0 else "helpful", "chosen_is_safe": True, "rejected_is_safe": i % 2 == 0,
        }
        for i in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def steps(out):
    """The steps of a run as they were logged, without what a clock says."""
    clock = ("seconds", "tokens_per_s", "mfu", "memory_bytes")
    lines = [line for line in read_log(out / "log.jsonl") if line["kind"] == "step"]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def state(out):
    """The newest checkpoint's tensors."""
    saved = SavedState(sorted((out / "checkpoints").glob("step-*"))[-1] / "state")
    return {name: saved.read(name) for name in saved.shapes}


def assert_same(one, other):
    """The same steps and weights, bit for bit."""
    assert steps(one) == steps(other)
    first, second = state(one), state(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_near(one, other, *, bound):
    """Sums in another order."""
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=bound, abs=bound)
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=bound, atol=bound)


def launch(command, config, *flags, n=1):
    """Start a command as a user does; with n > 1 through torchrun."""
    path = config.out.with_suffix(".toml")
    path.write_text(tomli_w.dumps(plain(config)))
    many = [] if n == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m"]
    run = [sys.executable, "-m", *many, "llama2", command, "--config", str(path), *flags]
    here = os.path.dirname(__file__)
    root = os.path.dirname(os.path.dirname(here))
    paths = os.pathsep.join(filter(None, (here, root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    return subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, text=True)


def by_one_and_by_two(command, one, two):
    """Run a command in one process, and in two with other settings (their folder)."""
    for process in [launch(command, one), launch(command, two, n=2)]:
        finish(process)


def assert_same_files(one, other, names):
    """Byte for byte."""
    for name in names:
        assert (one / name).read_bytes() and (one / name).read_bytes() == (other / name).read_bytes(), name


def assert_same_weights(one, other, *, bound=1e-6):
    first, second = (dict(store.load(each).named_parameters()) for each in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=bound, atol=bound)


def finish(process, expected=0):
    _, said = process.communicate(timeout=200)
    assert process.returncode == expected, said
    return said
