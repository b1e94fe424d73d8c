"""config.json and generation_config.json to ModelConfig and back. Knows nothing of tensors.

Reads what transformers 2 to 5 write; what is written, transformers 4 and 5 read alike: rope_theta and
rope_scaling stand at the top, which version 5 folds into its own `rope_parameters`.
"""

from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

from llama2.checkpoint.weights import described_by, flag, read_json
from llama2.errors import CheckpointError
from llama2.model.config import ModelConfig, RopeScaling, require_count, require_number

_SHAPE = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "ffn_dim": "intermediate_size",
}
_DTYPE_KEYS = ("dtype", "torch_dtype")


def read_config(path: Path) -> ModelConfig:
    """Read config.json. Raises CheckpointError or ConfigError on whatever is not a plain Llama."""
    values = read_json(path)
    _refuse_other_models(path, values)
    for key in _SHAPE.values():
        if values.get(key) is None:
            raise CheckpointError(f"{path}: has no {key}; it does not describe a Llama completely: fetch it again")
    with described_by(path):
        theta, scaling, context_length = _rope(path, values)
        return ModelConfig(
            **{ours: values[theirs] for ours, theirs in _SHAPE.items()},
            n_kv_heads=_count(values, "num_key_value_heads"),
            head_dim=_count(values, "head_dim"),
            context_length=context_length,
            norm_eps=_or(values.get("rms_norm_eps"), 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=flag(path, values, "tie_word_embeddings"),
            attention_bias=flag(path, values, "attention_bias"),
            ffn_bias=flag(path, values, "mlp_bias"),
        )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _count(values: Mapping[str, Any], key: str) -> int:
    """Return a count, or 0 where it is left to follow from the others; a written 0 is a mistake."""
    value = values.get(key)
    if value is not None:
        require_count(key, value)
    return value or 0


def _refuse_other_models(path: Path, values: Mapping[str, Any]) -> None:
    model_type = values.get("model_type")
    if model_type != "llama":
        raise CheckpointError(f"{path}: model_type {model_type!r} is not read; this package runs 'llama' only")
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{path}: hidden_act {activation!r} is not read; every Llama uses 'silu'")
    quantisation = values.get("quantization_config") or values.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise CheckpointError(
            f"{path}: the weights are quantised by {method or 'bitsandbytes'!r}, which is not read; "
            "take the original repository, or a GGUF file"
        )


def _rope(path: Path, values: Mapping[str, Any]) -> tuple[float, RopeScaling | None, int]:
    """Return theta, scaling and context length."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: rope_scaling={given!r} must be null or an object with rope_type and factor")
    longest = _or(values.get("max_position_embeddings"), 2048)
    require_count("max_position_embeddings", longest)
    theta = _or(given.get("rope_theta"), _or(values.get("rope_theta"), 10000.0))
    partial = _or(given.get("partial_rotary_factor"), _or(values.get("partial_rotary_factor"), 1.0))
    if partial != 1:
        raise CheckpointError(f"{path}: partial_rotary_factor={partial!r} is not read; a Llama rotates whole heads")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None, longest
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise CheckpointError(f"{path}: rope_type {kind!r} is not read; default, linear, dynamic, yarn and llama3 are")
    scaling = _scaling(path, kind, given, values.get("original_max_position_embeddings"), longest)
    if kind == "dynamic":
        # transformers counts the growth from max_position_embeddings and sets no limit of its own;
        # factor times as much is what the makers of such models mean. Ours is kept beside where it differs.
        return theta, scaling, _or(values.get("context_length"), int(longest * scaling.factor))
    return theta, scaling, longest


def _scaling(path: Path, kind: Any, given: Mapping[str, Any], original: int | None, longest: int) -> RopeScaling:
    trained: int = _or(original, _or(given.get("original_max_position_embeddings"), longest))
    factor = given.get("factor")
    if kind == "yarn":
        require_count("original_max_position_embeddings", trained)
        return _yarn(path, given, longest / trained if factor is None else factor, trained)
    if factor is None:
        raise CheckpointError(f"{path}: rope_scaling of type {kind!r} has no factor; it says how many times longer")
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "dynamic":
        return RopeScaling("dynamic", factor, longest)
    for key in ("low_freq_factor", "high_freq_factor"):
        if given.get(key) is None:
            raise CheckpointError(f"{path}: rope_scaling of type 'llama3' has no {key}; Llama 3.1 uses 1 and 4")
    return RopeScaling("llama3", factor, trained, given["low_freq_factor"], given["high_freq_factor"])


def _yarn(path: Path, given: Mapping[str, Any], factor: float, original: int) -> RopeScaling:
    if given.get("truncate") is False:
        raise CheckpointError(f"{path}: YaRN with truncate=false is not read; only whole pairs bound the ramp")
    require_number("rope_scaling.factor", factor, above=0)
    attention = given.get("attention_factor")
    first, second = given.get("mscale"), given.get("mscale_all_dim")
    if attention is None and first and second:
        require_number("rope_scaling.mscale", first, above=0)
        require_number("rope_scaling.mscale_all_dim", second, above=0)
        attention = (0.1 * first * log(factor) + 1) / (0.1 * second * log(factor) + 1) if factor > 1 else 1.0
    return RopeScaling(
        "yarn", factor, original, attention_factor=attention,
        beta_fast=_or(given.get("beta_fast"), 32.0), beta_slow=_or(given.get("beta_slow"), 1.0),
    )  # fmt: skip


def stored_dtype(path: Path) -> str | None:
    """Return the type that config.json announces (`bfloat16`), if it does."""
    values = read_json(path)
    return next((values[key] for key in _DTYPE_KEYS if isinstance(values.get(key), str)), None)


def read_generation(folder: Path) -> dict[str, object]:
    """Return generation_config.json, or the eos ids of config.json, or nothing."""
    path = folder / "generation_config.json"
    if path.exists():
        return read_json(path)
    values = read_json(folder / "config.json")
    return {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(key) is not None}


def config_json(config: ModelConfig, *, dtype: str, generation: Mapping[str, object]) -> dict[str, object]:
    """Return what config.json says about this model. Raises CheckpointError for what model_type llama cannot be."""
    if config.sliding_window is not None:
        raise CheckpointError(
            f"sliding_window={config.sliding_window} cannot be written: config.json of model_type llama has no such "
            "thing; the Meta format keeps it"
        )
    values: dict[str, object] = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}
    values |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "rope_scaling": None,
        "max_position_embeddings": config.context_length, "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.attention_bias, "mlp_bias": config.ffn_bias, "attention_dropout": 0.0,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True, "torch_dtype": dtype,
    }  # fmt: skip
    values |= {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation}
    if config.rope_scaling is not None:
        values |= _rope_json(config, config.rope_scaling)
    return values


def _rope_json(config: ModelConfig, scaling: RopeScaling) -> dict[str, object]:
    assert scaling.kind != "ntk", "folded into rope_theta by the writer"
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind in ("yarn", "llama3"):
        values["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            values["attention_factor"] = float(scaling.attention_factor)
    if scaling.kind != "dynamic":
        return {"rope_scaling": values}
    assert scaling.original_context is not None
    outside: dict[str, object] = {"rope_scaling": values, "max_position_embeddings": scaling.original_context}
    if config.context_length != int(scaling.original_context * scaling.factor):
        outside["context_length"] = config.context_length
    return outside
