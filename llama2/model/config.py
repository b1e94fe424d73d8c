"""What a Llama is, as numbers: its shape, and what follows from the shape by arithmetic.

This file imports neither PyTorch nor anything that it configures, so that a question
about a model ("how many parameters?") is answered without building one.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from llama2.errors import ConfigError, did_you_mean

RopeKind = Literal["linear", "ntk", "dynamic", "yarn", "llama3"]
ROPE_KINDS: tuple[str, ...] = ("linear", "ntk", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the trained context (see `model/rope.py`)."""

    kind: RopeKind
    factor: float
    """How many times the original context; 1.0 changes nothing (for `linear` and `ntk`)."""
    original_context: int | None = None
    """Context length the model was trained at, in tokens; `linear` and `ntk` do not need it."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this are left alone."""
    beta_fast: float = 32.0
    """YaRN: dimensions that turn more often than this within the original context stay as they are."""
    beta_slow: float = 1.0
    """YaRN: dimensions that turn less often than this are interpolated."""
    attention_factor: float | None = None
    """YaRN: multiplies cos and sin; None means 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(
                f"rope scaling kind {self.kind!r} is not known{did_you_mean(str(self.kind), ROPE_KINDS)}; "
                f"known are {', '.join(ROPE_KINDS)}"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            require_number(f"rope_scaling.{name}", getattr(self, name), above=0)
        if self.attention_factor is not None:
            require_number("rope_scaling.attention_factor", self.attention_factor, above=0)
        if self.factor < 1:
            raise ConfigError(f"rope_scaling.factor={self.factor} must be at least 1; it says how many times longer")
        if self.kind in ("dynamic", "yarn", "llama3"):
            if self.original_context is None:
                raise ConfigError(f"rope scaling {self.kind!r} needs original_context, the trained length in tokens")
            require_count("rope_scaling.original_context", self.original_context)
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}; Llama 3.1 uses 4 and 1"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one Llama. Every field is checked; derived numbers are properties."""

    dim: int
    """Width of the residual stream (D)."""
    n_layers: int
    """Number of blocks (L)."""
    n_heads: int
    """Number of query heads (H)."""
    vocab_size: int
    """Number of rows in the embedding (V)."""
    ffn_dim: int
    """Inner width of the feed-forward layers (F)."""
    n_kv_heads: int = 0
    """Number of key and value heads (K); 0 means n_heads, i.e. plain multi-head attention."""
    head_dim: int = 0
    """Width of one head (Dh); 0 means dim / n_heads."""
    context_length: int = 4096
    """Longest sequence, in tokens."""
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    """The output projection is the embedding, transposed."""
    attention_bias: bool = False
    """wq, wk, wv and wo have biases."""
    ffn_bias: bool = False
    """w1, w2 and w3 have biases."""
    sliding_window: int | None = field(default=None)
    """A token sees this many positions, itself included; None means all before it."""

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "ffn_dim", "context_length"):
            require_count(name, getattr(self, name))
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        require_count("n_kv_heads", self.n_kv_heads)
        if not self.head_dim and self.dim % self.n_heads:
            raise ConfigError(
                f"dim={self.dim} is not divisible by n_heads={self.n_heads}; change one, or give head_dim"
            )
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.n_heads)
        require_count("head_dim", self.head_dim)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                "each key head serves a whole number of query heads (Llama 2 70B: 64 and 8)"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs of numbers")
        require_number("norm_eps", self.norm_eps, above=0)
        require_number("rope_theta", self.rope_theta, above=0)
        if self.sliding_window is not None:
            require_count("sliding_window", self.sliding_window)

    @property
    def n_parameters(self) -> int:
        """Trained numbers in all; exact, biases included (rotary embeddings have none)."""
        return self.n_embedding_parameters + self._n_block_parameters + self.dim

    @property
    def n_embedding_parameters(self) -> int:
        """The embedding, and the output projection where it is a matrix of its own."""
        return self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)

    @property
    def _n_block_parameters(self) -> int:
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * q + 2 * self.dim * kv
        feed_forward = 3 * self.dim * self.ffn_dim
        biases = self.attention_bias * (q + 2 * kv + self.dim) + self.ffn_bias * (2 * self.ffn_dim + self.dim)
        return self.n_layers * (attention + feed_forward + biases + 2 * self.dim)

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations to train on one token of a sequence of this many tokens.

        6 N + 12 L D T, where N = n_parameters - n_embedding_parameters, L = n_layers,
        D = n_heads * head_dim (dim, in every released Llama) and T = sequence_length:
        each weight is used once forward and twice backward, two operations each time;
        attention adds q.k and p.v, 2 * 2 * D * T forward and twice that backward, not
        halved for causality (PaLM, arXiv:2204.02311 appendix B).
        """
        n = self.n_parameters - self.n_embedding_parameters
        return 6 * n + 12 * self.n_layers * self.n_heads * self.head_dim * sequence_length

    def kv_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        """Bytes of key-value cache per token of context: 2 L K Dh numbers (16-bit unless said)."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_number


def require_count(name: str, value: object) -> None:
    """Raise ConfigError unless value is a whole number of at least 1 (and of sane size)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 40:
        raise ConfigError(f"{name}={value!r} must be a whole number from 1 up")


def require_number(name: str, value: object, *, above: float) -> None:
    """Raise ConfigError unless value is a finite number above the bound."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        raise ConfigError(f"{name}={value!r} must be a finite number above {above}")


def ffn_width(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Return the feed-forward width that Meta's params.json leaves to be computed.

    2/3 of 4 dim, times the multiplier if any, rounded up to multiple_of (facebookresearch/llama model.py).
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def config_fields(config: ModelConfig) -> dict[str, object]:
    """Return the config as plain values, nested ones included, for JSON and tables."""
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        values["rope_scaling"] = {item.name: getattr(scaling, item.name) for item in fields(scaling)}
    return values
