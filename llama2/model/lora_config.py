"""What a low-rank adapter is, as names and numbers (arXiv:2106.09685). Nothing here imports PyTorch."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from llama2.errors import ConfigError, did_you_mean
from llama2.model.config import require_count, require_number

ALL_LINEAR = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
"""The seven matrices of a block, by Meta's names."""
WHOLE = ("tok_embeddings", "output")
"""What can be trained whole beside an adapter."""
HF_NAMES = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w1": "gate_proj", "w2": "down_proj",
    "w3": "up_proj", "tok_embeddings": "embed_tokens", "output": "lm_head",
}  # fmt: skip
"""Meta's name of a layer -> Hugging Face's."""

_OURS = {theirs: ours for ours, theirs in HF_NAMES.items()}


@dataclass(frozen=True)
class LoraConfig:
    """One adapter: y = W x + scale * B(A(x)), on every layer of a kind."""

    r: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    dropout: float = 0.0
    """Share of A's inputs that is left out while training."""
    target_modules: tuple[str, ...] = ALL_LINEAR
    """Of wq, wk, wv, wo, w1, w2, w3 and output."""
    rslora: bool = False
    """The scale is alpha / sqrt(r) and not alpha / r (arXiv:2312.03732)."""
    dora: bool = False
    """Each row has a trained length of its own (arXiv:2402.09353)."""
    trained_modules: tuple[str, ...] = ()
    """Of tok_embeddings and output: trained whole (PEFT's modules_to_save)."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def targets(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return layers by Meta's names, in the order of ALL_LINEAR; `all-linear` and Hugging Face's names will do.

    Raises ConfigError for a name of neither.
    """
    given = [names] if isinstance(names, str) else list(names)
    return _named(given, "target_modules", (*ALL_LINEAR, "output"))


def whole_modules(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return modules to be trained whole by Meta's names; Hugging Face's will do. Raises ConfigError for others."""
    return _named([names] if isinstance(names, str) else list(names), "trained_modules", WHOLE)


def _named(given: list[str], setting: str, known: tuple[str, ...]) -> tuple[str, ...]:
    found: set[str] = set()
    for name in given:
        if name == "all-linear" and "wq" in known:
            found |= {*ALL_LINEAR}
            continue
        ours = _OURS.get(name, name)
        if ours not in known:
            spelled = [*known, *(HF_NAMES[each] for each in known)]
            raise ConfigError(
                f"{setting} names {name!r}{did_you_mean(str(name), spelled)}; wanted some of {', '.join(known)}"
            )
        found.add(ours)
    return tuple(name for name in known if name in found)


def check(config: LoraConfig, *, tied_embeddings: bool = False) -> None:
    """Raise ConfigError unless this adapter can be made, over a model whose embeddings are tied or not."""
    require_count("r", config.r)
    require_number("alpha", config.alpha, above=0)
    if isinstance(config.dropout, bool) or not isinstance(config.dropout, int | float) or not 0 <= config.dropout < 1:
        raise ConfigError(f"dropout={config.dropout!r} must be a share, from 0 to less than 1")
    if not config.target_modules:
        raise ConfigError(f"target_modules is empty; name some of {', '.join((*ALL_LINEAR, 'output'))}")
    for name in config.target_modules:
        if targets(name) != (name,):
            raise ConfigError(f"target_modules={config.target_modules} must be Meta's names; see lora_config.targets")
    for name in config.trained_modules:
        if whole_modules(name) != (name,):
            raise ConfigError(f"trained_modules={config.trained_modules} must be of {', '.join(WHOLE)}")
    if "output" in config.target_modules and config.dropout:
        raise ConfigError(
            f"dropout={config.dropout:g} cannot be had on 'output', which the loss reads as one matrix; leave it out "
            "of target_modules, or set dropout to 0"
        )
    if "output" in config.target_modules and "output" in config.trained_modules:
        raise ConfigError("'output' is both in target_modules and in trained_modules; take one")
    if tied_embeddings and "output" in (*config.target_modules, *config.trained_modules):
        raise ConfigError(
            "'output' is the embedding in this model (tied_embeddings); name 'tok_embeddings', or neither"
        )


def check_name(name: str) -> None:
    """Raise ConfigError unless an adapter can be called so: the name becomes part of its tensors' names."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name in ("weight", "bias"):
        raise ConfigError(f"adapter name {name!r} must be a letter, then letters, digits, - and _, and not 'weight'")
