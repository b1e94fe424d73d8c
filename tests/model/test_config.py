"""The arithmetic of shapes against the published numbers."""

import json
import math
import subprocess
import sys

import pytest
import torch

from llama2.errors import ConfigError
from llama2.model.config import ModelConfig, RopeScaling, ffn_width
from llama2.model.family import FAMILY, family_config
from llama2.model.transformer import Transformer

PARAMETERS = {
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-33b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-34b": 33_743_970_304,
    "llama2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b-instruct": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_910_336,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.3-70b-instruct": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "stories260k": 260_032,
    "stories15m": 15_191_712,
    "stories42m": 41_689_600,
    "stories110m": 109_529_856,
}


@pytest.mark.parametrize(("name", "n_parameters"), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name, n_parameters):
    assert FAMILY[name].n_parameters == n_parameters


@pytest.mark.parametrize("name", FAMILY)
def test_arithmetic_equals_the_model_built_on_the_meta_device(name):
    with torch.device("meta"):
        model = Transformer(FAMILY[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == FAMILY[name].n_parameters


def test_biases_are_counted():
    config = ModelConfig(32, 2, 4, 50, 48, n_kv_heads=2, head_dim=10, attention_bias=True, ffn_bias=True)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.n_parameters


@pytest.mark.parametrize(
    ("name", "n_bytes"),
    {
        "llama2-7b": 524_288,
        "llama2-13b": 819_200,
        "llama1-65b": 2_621_440,
        "llama2-70b": 327_680,
        "llama3-8b": 131_072,
        "llama3.1-405b": 516_096,
        "llama3.2-1b": 32_768,
        "llama3.2-3b": 114_688,
        "tinyllama-1.1b": 22_528,
    }.items(),
)
def test_kv_bytes_per_token(name, n_bytes):
    assert FAMILY[name].kv_bytes_per_token() == n_bytes


def test_flops_are_six_n_plus_twelve_l_d_t():
    config = FAMILY["llama2-7b"]
    n = 6_738_415_616 - 2 * 131_072_000
    assert config.flops_per_token(4096) == 6 * n + 12 * 32 * 4096 * 4096


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        ((4096, 256), 11008),
        ((5120, 256), 13824),
        ((6656, 256), 17920),
        ((8192, 256), 22016),
        ((8192, 4096, 1.3), 28672),
        ((4096, 1024, 1.3), 14336),
        ((16384, 4096, 1.2), 53248),
        ((2048, 256, 1.5), 8192),
        ((3072, 256, 1.0), 8192),
        ((64, 4), 172),
        ((288, 32), 768),
        ((512, 32), 1376),
        ((768, 32), 2048),
    ],
)
def test_ffn_widths(arguments, width):
    assert ffn_width(*arguments) == width


@pytest.mark.parametrize(
    "change",
    [
        dict(dim=0),
        dict(dim=-4),
        dict(dim=10),
        dict(dim=2.5),
        dict(dim=float("nan")),
        dict(n_layers=True),
        dict(n_heads=5),
        dict(n_kv_heads=3),
        dict(n_kv_heads=-1),
        dict(head_dim=3),
        dict(vocab_size=0),
        dict(norm_eps=float("nan")),
        dict(norm_eps=-1e-5),
        dict(rope_theta=float("inf")),
        dict(rope_theta=0.0),
        dict(context_length=1 << 60),
        dict(sliding_window=0),
    ],
)
def test_impossible_shapes_are_refused(change):
    good = dict(dim=16, n_layers=2, n_heads=4, vocab_size=8, ffn_dim=8)
    with pytest.raises(ConfigError, match=next(iter(change))):
        ModelConfig(**{**good, **change})


@pytest.mark.parametrize(
    "arguments",
    [("cubic", 2.0), ("linear", math.nan), ("linear", 0.5), ("yarn", 2.0), ("llama3", 8.0), ("dynamic", 2.0, -1)],
)
def test_impossible_rope_scalings_are_refused(arguments):
    with pytest.raises(ConfigError):
        RopeScaling(*arguments)


def test_llama3_scaling_needs_ordered_frequencies():
    with pytest.raises(ConfigError, match="high_freq_factor"):
        RopeScaling("llama3", 8.0, 8192, low_freq_factor=4.0, high_freq_factor=4.0)


def test_unknown_model_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'llama2-70b'"):
        family_config("lama2-70b")


def test_the_32_models_carry_the_factor_of_their_config_files():
    assert {FAMILY[f"llama3.2-{size}"].rope_scaling for size in ("1b", "3b")} == {RopeScaling("llama3", 32.0, 8192)}
    assert FAMILY["llama3.1-8b"].rope_scaling == RopeScaling("llama3", 8.0, 8192)


def test_the_config_file_needs_no_torch():
    code = "import sys, llama2.model.config, llama2.errors; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.lower()) is False
