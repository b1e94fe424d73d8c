"""params.json to ModelConfig and back. Knows nothing of tensors but the rows of the embedding.

Meta's file says neither the context length nor how positions are stretched, and its loader refuses keys
that it does not know. What it cannot say stands in `llama2.json` beside it, written only where needed.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llama2.checkpoint.weights import described_by, flag, read_json
from llama2.errors import CheckpointError, did_you_mean
from llama2.model.config import ModelConfig, RopeScaling, config_fields, ffn_width, require_count
from llama2.model.family import FAMILY

EXTRA_FILE = "llama2.json"
_KNOWN = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len",
)  # fmt: skip


def read_params(path: Path, *, count_rows: Callable[[int], int]) -> ModelConfig:
    """Read params.json, and llama2.json where there is one.

    `count_rows` is given dim and returns the rows of the embedding; it is asked only where vocab_size is
    -1, which is what Meta wrote for Llama 1 and 2.
    """
    values = read_json(path)
    values = values.get("model", values)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: model={values!r} must be an object with dim, n_layers and n_heads")
    for key in values:
        if key not in _KNOWN:
            raise CheckpointError(
                f"{path}: {key} is not a parameter of Llama 1 to 3{did_you_mean(key, _KNOWN)}; "
                "other models are not read"
            )
    extra_path = path.parent / EXTRA_FILE
    extras = _read_extras(extra_path) if extra_path.exists() else {}
    with described_by(path):
        config = _config(path, values, count_rows, head_dim=extras.get("head_dim", 0))
    with described_by(extra_path):
        return replace(config, **extras)


def _config(path: Path, values: dict[str, Any], count_rows: Callable[[int], int], *, head_dim: int = 0) -> ModelConfig:
    for key in ("dim", "n_layers", "n_heads"):
        if key not in values:
            raise CheckpointError(f"{path}: has no {key}; it does not describe a Llama: fetch it again")
        require_count(key, values[key])
    multiple_of = values.get("multiple_of", 256)
    require_count("multiple_of", multiple_of)
    multiplier = values.get("ffn_dim_multiplier")
    if multiplier is not None and not (isinstance(multiplier, int | float) and 0 < multiplier < 1000):
        raise CheckpointError(
            f"{path}: ffn_dim_multiplier={multiplier!r} must be a number above 0; Llama 2 70B has 1.3"
        )
    dim, vocab_size = values["dim"], values.get("vocab_size", -1)
    return _stretched(
        flag(path, values, "use_scaled_rope"),
        ModelConfig(
            dim, values["n_layers"], values["n_heads"],
            count_rows(dim) if vocab_size == -1 else vocab_size,
            ffn_width(dim, multiple_of, multiplier),
            n_kv_heads=values.get("n_kv_heads") or 0, head_dim=head_dim,
            norm_eps=values.get("norm_eps", 1e-5), rope_theta=values.get("rope_theta", 10000.0),
        ),
    )  # fmt: skip


def _stretched(is_scaled: bool, config: ModelConfig) -> ModelConfig:
    """Add what params.json does not say, from what tells the releases apart.

    Llama 1 has eps 1e-6 and 2048 positions; Code Llama theta 1e6 and 16384; Llama 3 theta 5e5 and 8192;
    use_scaled_rope came with 3.1. The factor is 8, but 32 for the shapes of 3.2 1B and 3B: their config.json
    files say so, while Meta's own code has 8 for all.
    """
    if is_scaled:
        small = (FAMILY["llama3.2-1b"], FAMILY["llama3.2-3b"])
        is_small = any((config.dim, config.n_layers) == (other.dim, other.n_layers) for other in small)
        scaling = RopeScaling("llama3", 32.0 if is_small else 8.0, 8192)
        return replace(config, context_length=131072, rope_scaling=scaling)
    by_theta = {5e5: 8192, 1e6: 16384}
    length = by_theta.get(config.rope_theta, 2048 if config.norm_eps == 1e-6 else 4096)
    return replace(config, context_length=length)


def _read_extras(path: Path) -> dict[str, Any]:
    values = read_json(path)
    known = [item.name for item in fields(ModelConfig)]
    for key in values:
        if key not in known:
            raise CheckpointError(f"{path}: {key} is not a field of a model's config{did_you_mean(key, known)}")
    for key in ("tied_embeddings", "attention_bias", "ffn_bias"):
        flag(path, values, key)
    if isinstance(scaling := values.get("rope_scaling"), dict):
        try:
            with described_by(path):
                values["rope_scaling"] = RopeScaling(**scaling)
        except TypeError as error:
            raise CheckpointError(f"{path}: rope_scaling={scaling!r}: {error}") from error
    elif scaling is not None:
        raise CheckpointError(f"{path}: rope_scaling={scaling!r} must be null or an object")
    return values


def params_json(config: ModelConfig) -> tuple[dict[str, object], dict[str, object]]:
    """Return what goes into params.json, and into llama2.json (empty where params.json says it all)."""
    scaling = config.rope_scaling
    params: dict[str, object] = {
        "dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
    }  # fmt: skip
    multiple_of, multiplier = _width_rule(config.dim, config.ffn_dim)
    params["multiple_of"] = multiple_of
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    if scaling is not None and scaling.kind == "llama3":
        params["use_scaled_rope"] = True
    is_usual = config.dim == config.n_heads * config.head_dim
    head_dim = 0 if is_usual else config.head_dim
    said = config_fields(_config(Path("params.json"), params, lambda dim: config.vocab_size, head_dim=head_dim))
    extra = {key: value for key, value in config_fields(config).items() if value != said[key]}
    return params, extra if is_usual else {**extra, "head_dim": config.head_dim}


def _width_rule(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """Return multiple_of and multiplier that give this width: those of the releases if any do."""
    for multiplier in (None, 1.3, 1.2, 1.5, 1.0):
        for multiple_of in (256, 4096, 1024, 128, 64, 32, 16, 8, 4, 2, 1):
            if ffn_width(dim, multiple_of, multiplier) == ffn_dim:
                return multiple_of, multiplier
    return 1, (ffn_dim + 0.5) / int(2 * (4 * dim) / 3)
