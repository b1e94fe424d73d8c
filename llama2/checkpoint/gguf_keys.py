"""GGUF's `llama.*` keys and `rope_freqs` to ModelConfig and back. Knows nothing of blocks and bytes.

Source: ggml docs/gguf.md; llama.cpp llama-model.cpp, ggml.c (rope_yarn), convert_hf_to_gguf.py.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llama2.errors import CheckpointError
from llama2.model.config import ModelConfig, RopeScaling, require_count, require_number

_MAX_U32 = 2**32 - 1
_ORIGINAL_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 1024, 512, 256)
_DIVISOR_TOLERANCE = 1e-4
_OWN = "llama2.rope_scaling."
"""Keys of our own, which other readers pass over."""


def config_from_keys(
    name: str, keys: Mapping[str, object], *, n_rows: int, is_tied: bool, biases: tuple[bool, bool], divisors: Any
) -> ModelConfig:
    """Build the config from the file's keys and what its tensors show.

    `divisors` is rope_freqs.weight or None. Raises CheckpointError on what is not a plain Llama.
    """
    _refuse_other_models(name, keys)
    n_heads = _count(name, keys, "attention.head_count")
    n_kv_heads = _count(name, keys, "attention.head_count_kv", n_heads)
    dim = _count(name, keys, "embedding_length")
    context_length = _count(name, keys, "context_length")
    head_dim = _head_dim(name, keys, dim, n_heads)
    theta = _number(keys, "rope.freq_base", 10000.0)
    scaling = _scaling(name, keys, context_length)
    if divisors is not None and not np.all(divisors == 1):
        if scaling is not None:
            raise CheckpointError(f"{name}: has both rope_freqs.weight and rope.scaling.type; only one is read")
        require_number("rope.freq_base", theta, above=0)
        scaling = _told(keys) or scaling_from_divisors(name, np.asarray(divisors, np.float64), theta, head_dim)
        if not _agree(divisors, llama3_divisors(scaling, theta, head_dim)):
            raise CheckpointError(f"{name}: rope_freqs.weight does not follow from the keys {_OWN}*; convert it anew")
    return ModelConfig(
        dim=dim, n_layers=_count(name, keys, "block_count"), n_heads=n_heads, vocab_size=n_rows,
        ffn_dim=_count(name, keys, "feed_forward_length"), n_kv_heads=n_kv_heads, head_dim=head_dim,
        context_length=context_length, norm_eps=_number(keys, "attention.layer_norm_rms_epsilon", None, name),
        rope_theta=theta, rope_scaling=scaling, tied_embeddings=is_tied,
        attention_bias=biases[0], ffn_bias=biases[1],
    )  # fmt: skip


def _refuse_other_models(name: str, keys: Mapping[str, object]) -> None:
    architecture = keys.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{name}: architecture {architecture!r} is not read; this package runs 'llama' only")
    if keys.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{name}: is one of {keys['split.count']} parts; join them first: llama-gguf-split --merge FIRST WHOLE"
        )
    for key, what in (("expert_count", "a mixture of experts"), ("attention.sliding_window", "windowed attention")):
        if keys.get(f"llama.{key}", 0):
            raise CheckpointError(f"{name}: llama.{key}={keys[f'llama.{key}']!r}: {what} is not read from GGUF")
    for key, usual in (("rope.scaling.yarn_ext_factor", 1), ("rope.scaling.yarn_log_multiplier", 0)):
        if keys.get(f"llama.{key}", usual) not in (usual, -1):
            raise CheckpointError(f"{name}: llama.{key}={keys[f'llama.{key}']!r} is not read; {usual} is usual")


def _count(name: str, keys: Mapping[str, object], key: str, default: int | None = None) -> int:
    value: Any = keys.get(f"llama.{key}", default)
    if value is None:
        raise CheckpointError(f"{name}: has no key llama.{key}; it does not describe a Llama: convert it anew")
    require_count(f"llama.{key}", value)
    return value


def _number(keys: Mapping[str, object], key: str, default: float | None, name: str = "") -> Any:
    """Return a float as the short decimal that gives the stored 32 bits, e.g. 1e-05 for 9.999999747e-06."""
    value = keys.get(f"llama.{key}", default)
    if value is None:
        raise CheckpointError(f"{name}: has no key llama.{key}; it does not describe a Llama: convert it anew")
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(name: str, keys: Mapping[str, object], dim: int, n_heads: int) -> int:
    default = dim // n_heads or 1
    head_dim = _count(name, keys, "attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := _count(name, keys, key, head_dim)) != head_dim:
            raise CheckpointError(
                f"{name}: llama.{key}={other} is not the head width {head_dim}; both are one in a Llama"
            )
    return head_dim


def _scaling(name: str, keys: Mapping[str, object], context_length: int) -> RopeScaling | None:
    kind = keys.get("llama.rope.scaling.type", "none")
    factor = _number(keys, "rope.scaling.factor", _number(keys, "rope.scale_linear", 1.0))
    if kind == "none" and "llama.rope.scale_linear" in keys:
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind == "linear":
        original: Any = keys.get("llama.rope.scaling.original_context_length")
        return RopeScaling("linear", factor, original)
    if kind != "yarn":
        raise CheckpointError(f"{name}: llama.rope.scaling.type {kind!r} is not read; none, linear and yarn are")
    require_number("llama.rope.scaling.factor", factor, above=0)
    scale = _number(keys, "rope.scaling.attn_factor", _number(keys, "rope.scaling.yarn_attn_factor", 1.0))
    return RopeScaling(
        "yarn", factor, _count(name, keys, "rope.scaling.original_context_length", context_length),
        beta_fast=_number(keys, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(keys, "rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=None if scale == 1 else _times_usual(scale, factor),
    )  # fmt: skip


def _times_usual(scale: Any, factor: float) -> float:
    """llama.cpp multiplies its attn_factor by YaRN's own 0.1 ln(factor) + 1; our attention_factor is the product."""
    require_number("llama.rope.scaling.attn_factor", scale, above=0)
    return scale * (0.1 * math.log(factor) + 1.0)


def _told(keys: Mapping[str, object]) -> RopeScaling | None:
    """Return the llama3 scaling that this package noted in the file, if it wrote it."""
    if f"{_OWN}factor" not in keys:
        return None
    numbers: dict[str, Any] = {
        name: keys.get(_OWN + name) for name in ("factor", "original_context", "low_freq_factor", "high_freq_factor")
    }
    return RopeScaling("llama3", **numbers)


def _agree(divisors: Any, wanted: np.ndarray) -> bool:
    found = np.asarray(divisors, np.float64)
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=_DIVISOR_TOLERANCE, atol=0)


def scaling_from_divisors(name: str, divisors: np.ndarray, theta: float, head_dim: int) -> RopeScaling:
    """Find the llama3 scaling that divides the frequencies so. Raises CheckpointError where none does.

    Only the divisors are stored. For each plausible original context the factor follows from the
    largest divisor, and then all others must agree.
    """
    if divisors.shape != (head_dim // 2,) or not np.all(np.isfinite(divisors)):
        raise CheckpointError(f"{name}: rope_freqs.weight has shape {divisors.shape}, wanted ({head_dim // 2},)")
    for scaling in _candidates(divisors, theta, head_dim):
        wanted = llama3_divisors(scaling, theta, head_dim)
        if _agree(divisors, wanted):
            return scaling
    raise CheckpointError(
        f"{name}: rope_freqs.weight (largest {divisors.max():.6g}) is not Llama 3.1's scaling of positions for any "
        "original context tried; convert the original repository instead"
    )


def _candidates(divisors: np.ndarray, theta: float, head_dim: int) -> Iterator[RopeScaling]:
    largest = float(divisors.max())
    for original in _ORIGINAL_CONTEXTS:
        smooth = _smooth(RopeScaling("llama3", 1.0, original), theta, head_dim)[int(divisors.argmax())]
        below = 1 / largest - smooth if largest > 0 else 0.0
        if smooth < 1 and below > 0:
            factor = (1 - smooth) / below
            factor = round(factor) if abs(factor - round(factor)) < 1e-3 * factor else factor
            if 1 <= factor < 1e6:
                yield RopeScaling("llama3", float(factor), original)


def _smooth(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Return 1 for pairs that keep their frequency, 0 for those divided by the factor."""
    assert scaling.original_context is not None
    with np.errstate(all="ignore"):  # an absurd theta of a damaged file
        frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0, 1)


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Return what rope_freqs.weight holds: each pair's frequency divided by its stretched one."""
    smooth = _smooth(scaling, theta, head_dim)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def keys_from_config(config: ModelConfig, *, name: str, file_type: int) -> dict[str, object]:
    """Return the keys that llama.cpp reads. Raises CheckpointError for what architecture llama cannot hold."""
    if config.sliding_window is not None:
        raise CheckpointError(
            f"sliding_window={config.sliding_window} cannot be written: GGUF's llama has no such thing; "
            "the Meta format keeps it"
        )
    keys: dict[str, object] = {
        "general.architecture": "llama", "general.name": name, "general.file_type": file_type,
        "general.quantization_version": 2,
        "llama.vocab_size": config.vocab_size, "llama.context_length": config.context_length,
        "llama.embedding_length": config.dim, "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.ffn_dim, "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim, "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim, "llama.rope.freq_base": float(config.rope_theta),
    }  # fmt: skip
    if config.rope_scaling is not None:
        keys |= _scaling_keys(config.rope_scaling)
    for key, value in keys.items():
        if isinstance(value, int) and value > _MAX_U32:
            raise CheckpointError(f"{key}={value} does not fit GGUF's 32 bits")
    return keys


def _scaling_keys(scaling: RopeScaling) -> dict[str, object]:
    if scaling.kind == "llama3":
        # Readers go by the tensor rope_freqs.weight, from which these numbers cannot always be told.
        return {
            f"{_OWN}factor": float(scaling.factor),
            f"{_OWN}original_context": scaling.original_context,
            f"{_OWN}low_freq_factor": float(scaling.low_freq_factor),
            f"{_OWN}high_freq_factor": float(scaling.high_freq_factor),
        }
    if scaling.kind == "dynamic":
        raise CheckpointError(
            "rope scaling 'dynamic' cannot be written: GGUF has none, linear and yarn; the hf format keeps it"
        )
    assert scaling.kind != "ntk", "folded into rope_theta by the writer"
    prefix = "llama.rope.scaling."
    keys: dict[str, object] = {prefix + "type": scaling.kind, prefix + "factor": float(scaling.factor)}
    if scaling.original_context is not None:
        keys[prefix + "original_context_length"] = scaling.original_context
    if scaling.kind == "yarn":
        for key, value, usual in (("beta_fast", scaling.beta_fast, 32), ("beta_slow", scaling.beta_slow, 1)):
            if value != usual:
                keys[f"{prefix}yarn_{key}"] = float(value)
        if scaling.attention_factor is not None:
            usual = 0.1 * math.log(scaling.factor) + 1.0
            keys[prefix + "attn_factor"] = scaling.attention_factor / usual
    return keys
