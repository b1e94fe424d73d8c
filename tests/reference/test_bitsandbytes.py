"""NF4 beside bitsandbytes: the same codes, scales, second scales and offset of the same matrix."""

import contextlib
import io
import warnings

import pytest
import torch
import torch.nn.functional as F

from llama2.model.blockwise import NF4, blocks, dynamic_table
from llama2.model.quantized import NF4Linear

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")  # it looks for kernels that it does not need here, and says so
    reference = pytest.importorskip("bitsandbytes.functional")
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPES = [(256, 256), (1000, 512), (64, 70), (3, 50), (33, 34), (1024, 2048)]
"""(64, 70) is no whole number of blocks, (33, 34) and (3, 50) are less than one block of scales."""


def pair(shape, seed=0):
    """Return a matrix as both have it."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    ours = NF4Linear(shape[1], shape[0], dtype=torch.float32)
    ours.quantise(weight)
    codes, state = reference.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return weight, ours, codes.flatten(), state


def test_the_tables_are_the_same():
    assert torch.equal(reference.get_4bit_type("nf4", device="cpu"), torch.tensor(NF4))
    for signed in (True, False):
        assert torch.equal(reference.create_dynamic_map(signed=signed), dynamic_table(signed))


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_second_scales_and_offset_are_the_same(shape):
    _, ours, codes, state = pair(shape)
    assert torch.equal(ours.codes, codes[: len(ours.codes)])
    assert torch.equal(ours.scale_mean, state.offset)
    assert torch.equal(ours.scale_scales, state.state2.absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_of_scales_differ_only_where_two_levels_are_as_near(shape):
    """Ours is the nearest of the 256 levels, by definition; the CPU kernel of bitsandbytes 0.50 takes the second
    nearest where the two are within 1e-4 as near (of a block's largest): 0.1 to 0.3 % of the codes.
    """
    weight, ours, _, state = pair(shape)
    table, n = dynamic_table(True), len(ours.scale_codes)
    differs = ours.scale_codes != state.absmax
    assert differs.sum() <= 0.005 * n
    assert ((ours.scale_codes.int() - state.absmax.int()).abs() <= 1).all()
    centred = blocks(weight, 64).abs().amax(dim=1) - ours.scale_mean
    units = F.pad(centred, (0, -n % 256)).view(-1, 256) / ours.scale_scales[:, None]
    mine, theirs = ((table[codes.int()] - units.flatten()[:n]).abs() for codes in (ours.scale_codes, state.absmax))
    assert (mine <= theirs + 1e-7).all() and (theirs - mine).max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_the_same(shape):
    """To float32 rounding, and exactly one level of a scale apart where its code differs."""
    weight, ours, codes, state = pair(shape)
    n = weight.numel()
    off = blocks(ours.dense() - reference.dequantize_4bit(codes.view(-1, 1), state), 64).abs().amax(dim=1)
    same = ours.scale_codes == state.absmax
    largest = blocks(weight, 64).abs().amax(dim=1)
    assert n == ours.dense().numel() and (off[same] <= 1e-6 * largest[same]).all()
    assert (off <= 0.015 * ours.scale_scales.max() + 1e-6).all()


def test_what_they_packed_is_read_as_ours():
    weight, _, codes, state = pair((96, 64))
    taken = NF4Linear(64, 96, dtype=torch.float32)
    values = (codes, state.absmax, state.state2.absmax, state.offset)
    for name, each in zip(("codes", "scale_codes", "scale_scales", "scale_mean"), values, strict=True):
        getattr(taken, name).copy_(each)
    theirs = reference.dequantize_4bit(codes.view(-1, 1), state)
    torch.testing.assert_close(taken.dense(), theirs, rtol=1e-6, atol=1e-9)
    assert (taken.dense() - weight).norm() < 0.1 * weight.norm()
