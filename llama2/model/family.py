"""Every public dense Llama by name, and its shape.

Sources: arXiv:2302.13971 table 2, 2307.09288 table 1, 2407.21783 table 3, the models' config.json files,
karpathy/llama2.c and jzhang38/TinyLlama.
"""

from dataclasses import replace

from llama2.errors import ConfigError, did_you_mean
from llama2.model.config import ModelConfig, RopeScaling


def _released_llamas() -> dict[str, ModelConfig]:
    llama1 = {
        "7b": ModelConfig(4096, 32, 32, 32000, 11008, context_length=2048, norm_eps=1e-6),
        "13b": ModelConfig(5120, 40, 40, 32000, 13824, context_length=2048, norm_eps=1e-6),
        "33b": ModelConfig(6656, 60, 52, 32000, 17920, context_length=2048, norm_eps=1e-6),
        "65b": ModelConfig(8192, 80, 64, 32000, 22016, context_length=2048, norm_eps=1e-6),
    }
    llama2 = {
        "7b": ModelConfig(4096, 32, 32, 32000, 11008),
        "13b": ModelConfig(5120, 40, 40, 32000, 13824),
        "34b": ModelConfig(8192, 48, 64, 32000, 22016, n_kv_heads=8),
        "70b": ModelConfig(8192, 80, 64, 32000, 28672, n_kv_heads=8),
    }
    llama3 = {
        "8b": ModelConfig(4096, 32, 32, 128256, 14336, n_kv_heads=8, context_length=8192, rope_theta=5e5),
        "70b": ModelConfig(8192, 80, 64, 128256, 28672, n_kv_heads=8, context_length=8192, rope_theta=5e5),
        "405b": ModelConfig(16384, 126, 128, 128256, 53248, n_kv_heads=8, context_length=8192, rope_theta=5e5),
        "1b": ModelConfig(
            2048, 16, 32, 128256, 8192, n_kv_heads=8, context_length=8192, rope_theta=5e5, tied_embeddings=True
        ),
        "3b": ModelConfig(
            3072, 28, 24, 128256, 8192, n_kv_heads=8, context_length=8192, rope_theta=5e5, tied_embeddings=True
        ),
    }

    def code(base: ModelConfig, vocab_size: int) -> ModelConfig:
        return replace(base, vocab_size=vocab_size, context_length=16384, rope_theta=1e6)

    def long(base: ModelConfig, factor: float) -> ModelConfig:
        return replace(base, context_length=131072, rope_scaling=RopeScaling("llama3", factor, 8192))

    family = {f"llama1-{size}": config for size, config in llama1.items()}
    for size in ("7b", "13b", "34b", "70b"):  # llama2-34b was never released; Code Llama 34B has its shape
        family[f"llama2-{size}"] = llama2[size]
        if size != "34b":
            family[f"llama2-{size}-chat"] = llama2[size]
    for size, vocab_size in (("7b", 32016), ("13b", 32016), ("34b", 32000), ("70b", 32016)):
        family[f"codellama-{size}"] = code(llama2[size], vocab_size)
        family[f"codellama-{size}-python"] = code(llama2[size], 32016 if size == "70b" else 32000)
        family[f"codellama-{size}-instruct"] = code(llama2[size], vocab_size)
    for kind in ("python", "instruct"):  # not tuned for long context, their config.json files say
        family[f"codellama-70b-{kind}"] = replace(llama2["70b"], vocab_size=32016)
    for size in ("8b", "70b"):
        family[f"llama3-{size}"] = family[f"llama3-{size}-instruct"] = llama3[size]
    for size in ("8b", "70b", "405b"):
        family[f"llama3.1-{size}"] = family[f"llama3.1-{size}-instruct"] = long(llama3[size], 8.0)
    for size in ("1b", "3b"):  # the config.json files say 32 where Meta's own code has 8
        family[f"llama3.2-{size}"] = family[f"llama3.2-{size}-instruct"] = long(llama3[size], 32.0)
    family["llama3.3-70b-instruct"] = long(llama3["70b"], 8.0)
    family["tinyllama-1.1b"] = ModelConfig(2048, 22, 32, 32000, 5632, n_kv_heads=4, context_length=2048)
    family["tinyllama-1.1b-chat"] = family["tinyllama-1.1b"]
    family["stories260k"] = ModelConfig(64, 5, 8, 512, 172, n_kv_heads=4, context_length=512, tied_embeddings=True)
    family["stories15m"] = ModelConfig(288, 6, 6, 32000, 768, context_length=256, tied_embeddings=True)
    family["stories42m"] = ModelConfig(512, 8, 8, 32000, 1376, context_length=1024, tied_embeddings=True)
    family["stories110m"] = ModelConfig(768, 12, 12, 32000, 2048, context_length=1024, tied_embeddings=True)
    return family


FAMILY: dict[str, ModelConfig] = _released_llamas()
"""Every public dense Llama by name; see `llama2 info NAME`."""


def family_config(name: str) -> ModelConfig:
    """Return the shape of a released Llama, e.g. `llama2-7b`.

    Raises ConfigError naming the nearest known model.
    """
    key = name.lower()
    if key not in FAMILY:
        raise ConfigError(f"{name!r} is not a model of the Llama family{did_you_mean(name, FAMILY)}")
    return FAMILY[key]
