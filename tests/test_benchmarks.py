"""The benchmarks run, on the smallest shapes, and say what they should; how fast is not a test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE = {"claim": "decode", "model": "tinyllama-1.1b", "dtype": "bfloat16", "ours_ms": 90.0, "theirs_ms": 108.0}


def run(*words: str) -> list[dict]:
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_decode_compares_both_sides_with_the_floor():
    pytest.importorskip("transformers")
    decode, prefill = run("benchmarks.decode", "--model", "stories260k", "--dtype", "bfloat16", "--rounds", "1")
    for line in (decode, prefill):
        assert min(line["ours_ms"], line["theirs_ms"], line["floor_ms"], line["theirs/ours"]) > 0
        assert line["rounds"] == 1 and line["machine"]["threads"] > 0
    lines = run("benchmarks.decode", "--model", "stories260k", "--rounds", "1", "--invariance")
    assert [line["batch"] for line in lines] == [1, 16]


@pytest.mark.slow
def test_load_compares_both_sides():
    pytest.importorskip("transformers")
    (line,) = run("benchmarks.load", "--model", "stories260k", "--rounds", "1")
    assert line["ours"].keys() == line["theirs"].keys()
    assert line["ours"]["load_s"] > 0 and line["theirs"]["load_and_first_token_s"] > 0


@pytest.mark.slow
def test_prepare_is_compared_with_bare_tokenising():
    (line,) = run("benchmarks.prepare", "--megabytes", "1", "--rounds", "1", "--workers", "2")
    assert line["claim"] == "prepare" and line["workers"] == 2
    assert min(line["whole/bare"], line["tokenise/bare"], line["extract_mb_per_s"], line["dedup_mb_per_s"]) > 0


def test_both_models_of_the_comparison_are_the_same_model():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from benchmarks.measure import their_model
    from llama2.model.family import FAMILY
    from llama2.model.transformer import build

    transformers.logging.set_verbosity_error()
    ours = build(FAMILY["stories260k"], seed=1)
    theirs = their_model(ours)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-5, rtol=1e-4)
    assert theirs.model.embed_tokens.weight.data_ptr() == ours.tok_embeddings.weight.data_ptr()


def test_a_busy_machine_decides_nothing():
    from benchmarks.evidence import page

    line = {**LINE, "theirs/ours": 1.3, "others_cpu": 0.4, "machine": {"cpu": "a", "cores": 2}}
    text = page([line], date="2000-01-01", version="abc")
    assert "1.3" in text.split("## Not judged")[1].split("## ")[0]
    assert "1.3" not in text.split("## Reached")[1].split("## ")[0]


@pytest.mark.parametrize("ratio, heading", [(1.2, "## Reached"), (0.9, "## Not reached")])
def test_the_numbers_decide_what_is_reached(ratio, heading):
    from benchmarks.evidence import page

    line = {**LINE, "theirs/ours": ratio, "machine": {"cpu": "a", "cores": 2}}
    text = page([line], date="2000-01-01", version="abc")
    section = text.split(heading)[1].split("## ")[0]
    assert f"theirs/ours is {ratio}" in section
    assert "abc" in text and "2000-01-01" in text
