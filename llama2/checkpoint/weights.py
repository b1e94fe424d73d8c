"""What a checkpoint is once its format is forgotten: a config and named tensors that are read when asked for.

Names and row order are Meta's. This file knows no format and does not import PyTorch, so that a
config can be read in milliseconds.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama2.errors import CheckpointError, ConfigError, did_you_mean
from llama2.model.config import ModelConfig

LazyTensor = Callable[[], Any]
"""Returns a torch.Tensor (not named here: naming it would import PyTorch)."""

_DTYPES = {
    "float32": "float32", "f32": "float32", "fp32": "float32", "float": "float32",
    "float16": "float16", "f16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
}  # fmt: skip

_MAX_JSON_BYTES = 256 << 20
_MAX_JSON_DIGITS = 40


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: known shape and type, numbers not yet read."""

    shape: tuple[int, ...]
    dtype: str
    """PyTorch's name, e.g. `bfloat16`."""
    read: LazyTensor


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest. `tensors` is keyed by Meta's names; each call reads one tensor anew."""

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    dtype: str
    """float32, bfloat16 or float16: what most of the numbers are stored as."""
    path: Path
    quantised: bool = False
    """The file holds fewer bits per number than `dtype`."""
    generation: Mapping[str, object] = field(default_factory=dict)
    """generation_config.json (temperature, top_p, eos_token_id, ...); empty where there is none."""
    heads: Mapping[str, LazyTensor] = field(default_factory=dict)
    """Of a reward model: the scalar heads [1 D] that stand in place of the next-token projection, by name."""


def dtype_name(name: str) -> str:
    """Return PyTorch's name of a floating-point type given as `bf16`, `fp16`, `float32` and the like."""
    if str(name).lower() not in _DTYPES:
        raise CheckpointError(f"dtype {name!r} is not float32, bfloat16 or float16{did_you_mean(str(name), _DTYPES)}")
    return _DTYPES[str(name).lower()]


def default_dtype(checkpoint: Checkpoint) -> str:
    """Return the type to compute in when the user names none: the stored one.

    Quantised weights below a billion become float32, larger ones bfloat16: the file is small, and
    four bytes per number would surprise.
    """
    if not checkpoint.quantised:
        return checkpoint.dtype
    return "float32" if checkpoint.config.n_parameters < 1_000_000_000 else "bfloat16"


def fold_ntk(config: ModelConfig) -> ModelConfig:
    """Return the same model with static NTK scaling said as a larger rope_theta, which every format can hold."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "ntk":
        return config
    from llama2.model.rope import ntk_theta

    theta = ntk_theta(config.rope_theta, scaling.factor, config.head_dim)
    return replace(config, rope_theta=theta, rope_scaling=None)


def each_shape(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor's name and shape in canonical order, one by one: a hostile n_layers costs nothing."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    matrices = {
        "attention.wq": (q, config.dim),
        "attention.wk": (kv, config.dim),
        "attention.wv": (kv, config.dim),
        "attention.wo": (config.dim, q),
        "feed_forward.w1": (config.ffn_dim, config.dim),
        "feed_forward.w2": (config.dim, config.ffn_dim),
        "feed_forward.w3": (config.ffn_dim, config.dim),
    }
    yield "tok_embeddings.weight", (config.vocab_size, config.dim)
    for layer in range(config.n_layers):
        yield f"layers.{layer}.attention_norm.weight", (config.dim,)
        yield f"layers.{layer}.ffn_norm.weight", (config.dim,)
        for name, shape in matrices.items():
            yield f"layers.{layer}.{name}.weight", shape
            if config.attention_bias if name.startswith("attention") else config.ffn_bias:
                yield f"layers.{layer}.{name}.bias", shape[:1]
    yield "norm.weight", (config.dim,)
    if not config.tied_embeddings:
        yield "output.weight", (config.vocab_size, config.dim)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that a model of this shape has, in canonical order."""
    return dict(each_shape(config))


def check_shapes(
    path: Path, config: ModelConfig, found: Mapping[str, tuple[int, ...]], *, spelled: Callable[[str], str] = str
) -> None:
    """Raise CheckpointError unless `found` (canonical names) is exactly what the config wants.

    `spelled` turns a canonical name into the file's own, for the message.
    """
    n_wanted = 0
    for name, shape in each_shape(config):
        n_wanted += 1
        if name not in found:
            hint = "; if the model ties it to the embedding, its config must say so" if name == "output.weight" else ""
            raise CheckpointError(
                f"{path}: tensor {spelled(name)!r} of shape {shape} is missing{hint}; the config wants "
                f"{config.n_layers} layers: the file is incomplete or belongs to another config"
            )
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{path}: tensor {spelled(name)!r} has shape {tuple(found[name])}, the config wants {shape}: "
                "the file and the config belong to different models"
            )
    if len(found) > n_wanted:
        extra = sorted(set(found) - {name for name, _ in each_shape(config)})
        raise CheckpointError(
            f"{path}: tensor {spelled(extra[0])!r} is not one of a Llama of this config "
            f"({len(extra)} such); adapters are merged and biases announced in the config before loading"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError on anything else, absurdly long numbers included."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for a description of a model")
        values = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}; fetch the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a JSON object; fetch the file again")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_JSON_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a JSON object as people read it: indented, keys sorted, a line end at the end."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Name the file in the ConfigError that its numbers cause."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def flag(path: Path, values: Mapping[str, object], key: str, *, default: bool = False) -> bool:
    """Return a true-or-false entry; null counts as absent."""
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key}={value!r} must be true or false")
    return value
