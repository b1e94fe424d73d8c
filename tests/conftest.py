"""Shared fixtures: where the real checkpoints are."""

import os
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


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real checkpoints, tokenizers and data; tests that need it skip without it."""
    folder = os.environ.get("LLAMA2_TEST_ASSETS")
    if not folder:
        pytest.skip("LLAMA2_TEST_ASSETS is not set: no real checkpoints to test with")
    return Path(folder)
