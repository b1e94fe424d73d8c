"""NF4: blocks by hand, the gradient of the dense matrix, half a byte a weight, a LoRA upon it."""

import pytest
import torch

from llama2.errors import ConfigError
from llama2.model.arithmetic import Linear
from llama2.model.blockwise import NF4, blocks, dequantise, dynamic_table, nearest, quantise
from llama2.model.config import ModelConfig
from llama2.model.lora import add_adapter, delta, initialise_adapter, merge_into
from llama2.model.lora_config import LoraConfig
from llama2.model.quantized import NF4Linear, nf4_like
from llama2.model.surgery import replace_linears
from llama2.model.transformer import build

SHAPES = [(64, 64), (48, 40), (3, 50), (7, 10), (1, 2), (300, 128)]
"""Rows and columns; of some the number of weights is no multiple of 64, of one no multiple of 64 x 256 blocks."""


def filled(n_out, n_in, *, bias=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = NF4Linear(n_in, n_out, bias=bias, dtype=dtype)
    weight = torch.randn(n_out, n_in, generator=generator) * 0.02
    layer.quantise(weight)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, generator=generator)
    return layer, weight


def test_the_table_is_the_published_one():
    """arXiv:2305.14314 appendix E, to its seven digits."""
    published = [
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ]  # fmt: skip
    assert pytest.approx(published, abs=6e-8) == list(NF4)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_table_has_twice_the_steps_in_each_decade(signed):
    table = dynamic_table(signed)
    assert len(table) == 256 and table.equal(table.sort().values) and table[-1] == 1 and 0 in table
    positive = table[(table > 0) & (table < 1)]
    assert [int(((positive >= 10.0 ** (d - 7)) & (positive < 10.0 ** (d - 6))).sum()) for d in range(7)] == [
        (1 if signed else 2) * 2**d for d in range(7)
    ]
    if signed:
        assert torch.equal(-table[table < 0].flip(0), positive)  # -1 alone is missing


def test_a_block_by_hand():
    table = torch.tensor(NF4)
    codes, scales = quantise(torch.tensor([0.0, 2.0, -1.4, 0.3, -2.0, 0.05]), table, 8)
    assert scales.tolist() == [2.0]
    assert codes.tolist() == [[7, 15, 1, 9, 0, 7, 7, 7]]  # 0, 1, -0.7, 0.15, -1, 0.025, and the padding
    expected = [0.0, 2.0, -2 * 0.6961928, 2 * 0.1609302, -2.0, 0.0, 0.0, 0.0]
    assert dequantise(codes, scales, table)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_nearest_is_nearest():
    table, values = dynamic_table(True), torch.linspace(-1.2, 1.2, 5000)
    found = (table[nearest(values, table).long()] - values).abs()
    assert torch.equal(found, (table - values[:, None]).abs().min(dim=1).values)


def test_a_block_of_zeros_stays_zero():
    codes, scales = quantise(torch.zeros(64), torch.tensor(NF4), 64)
    assert scales.tolist() == [0.0] and not dequantise(codes, scales, torch.tensor(NF4)).any()
    layer = NF4Linear(64, 2, dtype=torch.float32)
    layer.quantise(torch.zeros(2, 64))
    assert not layer.dense().any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_off_by_half_a_step_at_most(shape):
    """Half of NF4's widest step, 0.1519, of the block's largest number; its scale is off by 0.7 % of the widest one."""
    layer, weight = filled(*shape)
    largest = blocks(weight, 64).abs().amax(dim=1)
    off = (layer.scales() - largest).abs()
    assert off.max() <= 0.008 * (largest - largest.mean()).abs().max() + 1e-9
    bound = (0.152 * largest + off)[:, None].expand(-1, 64).flatten()[: weight.numel()].view(weight.shape)
    assert ((layer.dense() - weight).abs() <= bound + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradient_are_those_of_the_dense_matrix(dtype, bias):
    layer, _ = filled(48, 40, bias=bias, dtype=dtype)
    dense = Linear(40, 48, bias=bias, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(layer.dense())
        if bias:
            dense.bias.copy_(layer.bias)
    x = torch.randn(2, 5, 40, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    (layer(x) ** 2).sum().backward()
    (dense(twin) ** 2).sum().backward()
    close = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-6, atol=1e-6)  # its eight bits
    torch.testing.assert_close(layer(x), dense(twin), **close)
    torch.testing.assert_close(x.grad, twin.grad, **close)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, **close)


def test_the_product_is_differentiated_rightly():
    layer, _ = filled(6, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


def test_it_takes_half_a_byte_and_a_bit():
    layer, weight = filled(1024, 512)
    n_bytes = sum(each.numel() * each.element_size() for each in layer.buffers())
    assert n_bytes / weight.numel() == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-4)
    assert not list(layer.parameters())


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ConfigError, match="3 x 5 has an odd number of weights"):
        NF4Linear(5, 3, dtype=torch.float32)


def test_a_type_to_compute_in_apart_from_the_type_of_the_bias():
    layer = nf4_like(Linear(64, 8, bias=True), dtype=torch.bfloat16)
    assert layer.dense().dtype == torch.bfloat16 and layer.bias is not None and layer.bias.dtype == torch.float32


@pytest.fixture
def model():
    return build(ModelConfig(32, 2, 4, 40, 48, n_kv_heads=2, context_length=32, attention_bias=True), seed=1)


def quantised(model):
    """Put NF4 in the place of every matrix of the blocks, and return what the matrices became."""
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}
    replace_linears(model, lambda _, layer: nf4_like(layer), lambda name: name.startswith("layers."))
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            layer.quantise(weights[f"{name}.weight"])
            if layer.bias is not None:
                torch.nn.init.constant_(layer.bias, 0.1)
    return {name: layer.dense() for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_upon_it_is_that_upon_the_dense_matrices(model, dora):
    dense = build(model.config, seed=1)
    became = quantised(model)
    for name, weight in became.items():
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(weight)
            if getattr(dense.get_submodule(name), "bias", None) is not None:
                torch.nn.init.constant_(dense.get_submodule(name).bias, 0.1)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens), dense(tokens), rtol=1e-5, atol=1e-6)
    for each in (model, dense):
        add_adapter(each, LoraConfig(r=4, dora=dora), seed=None)
        initialise_adapter(each, seed=3)
        with torch.no_grad():
            for name, weight in each.named_parameters():
                if ".lora_b." in name:
                    torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        (each(tokens) ** 2).mean().backward()
    theirs = dict(dense.named_parameters())
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * 7 * (3 if dora else 2) and not any(name.endswith(".weight") for name in trained)
    for name, weight in trained.items():
        torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-4, atol=1e-8, msg=name)
    torch.testing.assert_close(model(tokens), dense(tokens), rtol=1e-5, atol=1e-6)
    changes = dict(delta(dense))
    for name, change in delta(model):
        torch.testing.assert_close(change, changes[name], rtol=1e-4, atol=1e-7)
    with pytest.raises(ConfigError, match="lies on quantised weights; merge it into the original with llama2 merge"):
        merge_into(model)
