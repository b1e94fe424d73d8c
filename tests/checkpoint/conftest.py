"""Small models to write and read back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.checkpoint import store
from llama2.checkpoint.weights import Checkpoint, expected_shapes
from llama2.model.config import ModelConfig
from llama2.model.transformer import Transformer, build

CONFIG = ModelConfig(32, 2, 4, 64, 96, n_kv_heads=2, context_length=128)


@pytest.fixture
def model() -> Callable[..., Transformer]:
    """Makes a small random model; fields of its config may be given."""
    return lambda **changes: build(replace(CONFIG, **changes), seed=3)


@pytest.fixture
def written(model: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small model in a format and returns where."""

    def write(format: str, name: str = "written", dtype: str | None = None, **changes: Any) -> Path:
        path = tmp_path / (name + {"gguf": ".gguf", "llama2c": ".bin"}.get(format, ""))
        store.save(model(**changes), path, format=format, dtype=dtype)
        return path

    return write


@pytest.fixture
def assert_same() -> Callable[[Checkpoint, Any], None]:
    """Compares every tensor of a checkpoint, bit for bit, with a model or another checkpoint."""

    def check(found: Checkpoint, wanted: Any) -> None:
        weights = wanted.state_dict() if isinstance(wanted, Transformer) else None
        assert list(expected_shapes(found.config)) == list(expected_shapes(wanted.config))
        for name in expected_shapes(found.config):
            value = weights[name] if weights is not None else wanted.tensors[name]()
            assert torch.equal(found.tensors[name](), value), name

    return check
