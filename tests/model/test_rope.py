"""Rotary embeddings against worked numbers."""

import pytest
import torch

from llama2.model.config import ModelConfig, RopeScaling
from llama2.model.rope import Rotation, attention_factor, inverse_frequencies, ntk_theta, rotate, yarn_range


def config(head_dim=128, theta=1e4, scaling=None, context=4096):
    return ModelConfig(
        head_dim * 2, 1, 2, 8, 8, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling, context_length=context
    )


@pytest.mark.parametrize(
    ("head_dim", "theta", "expected"),
    [
        (128, 1e4, {0: 1.0, 1: 0.865964323, 2: 0.749894209, 32: 0.01, 63: 0.000115478198}),
        (128, 5e5, {1: 0.814617234, 63: 2.45514079e-06}),
        (128, 1e6, {1: 0.805842188}),
        (64, 5e5, {1: 0.663601238, 31: 3.01385815e-06}),
    ],
)
def test_inverse_frequencies(head_dim, theta, expected):
    frequencies = inverse_frequencies(config(head_dim, theta))
    for i, value in expected.items():
        assert frequencies[i].item() == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0, [1, 2, 3, 4]),
        (1, [-1.142639664, 1.922075597, 2.959850668, 4.029799502]),
        (10, [0.248970693, -2.222164169, 2.585678829, 4.279516911]),
    ],
)
def test_rotation_is_interleaved(position, expected):
    rotation = Rotation(config(head_dim=4))
    turns = rotation(torch.tensor([[position]]), torch.float64)
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], dtype=torch.float64)
    torch.testing.assert_close(
        rotate(x, turns)[0, 0, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0
    )


@pytest.mark.parametrize(
    ("head_dim", "factor", "first", "middle"),
    [
        (128, 8.0, 29, [1.20748387, 1.55341463, 2.02631321, 2.69452969, 3.68425253, 5.25732659]),
        (64, 32.0, 15, [1.65132925, 3.2922621, 9.66672898]),
        (128, 32.0, 29, [1.23493703, 1.65132925, 2.27665954, 3.2922621, 5.17159558, 9.66672898]),
    ],
)
def test_llama3_scaling(head_dim, factor, first, middle):
    plain = inverse_frequencies(config(head_dim, 5e5))
    scaled = inverse_frequencies(config(head_dim, 5e5, RopeScaling("llama3", factor, 8192)))
    ratio = plain / scaled
    expected = [1.0] * first + middle
    expected += [factor] * (head_dim // 2 - len(expected))
    torch.testing.assert_close(ratio, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_yarn():
    scaling = RopeScaling("yarn", 8.0, 4096)
    assert yarn_range(1e4, 128, scaling) == (20, 46)
    assert attention_factor(scaling) == pytest.approx(1.207944154, abs=1e-9)
    plain, scaled = inverse_frequencies(config()), inverse_frequencies(config(scaling=scaling))
    assert torch.equal(scaled[:21], plain[:21])
    torch.testing.assert_close(scaled[46:], plain[46:] / 8)
    turns = Rotation(config(scaling=scaling))(torch.tensor([[0]]), torch.float32)
    assert turns.abs().max().item() == pytest.approx(1.207944154)


def test_ntk_bases():
    assert ntk_theta(1e4, 2.0, 128) == pytest.approx(20221.2617, rel=1e-8)
    assert ntk_theta(1e4, 4.0, 128) == pytest.approx(40889.9424, rel=1e-8)


def test_linear_scaling_divides_positions():
    scaled = Rotation(config(scaling=RopeScaling("linear", 4.0)))
    plain = Rotation(config())
    assert torch.equal(scaled(torch.tensor([[8]]), torch.float64), plain(torch.tensor([[2]]), torch.float64))


def test_dynamic_scaling_depends_on_each_rows_own_length():
    rotation = Rotation(config(scaling=RopeScaling("dynamic", 2.0, 8), context=64))
    plain = Rotation(config())
    short, long = torch.arange(8)[None], torch.arange(16)[None]
    assert torch.equal(rotation(short, torch.float64), plain(short, torch.float64))
    # at 16 of 8 tokens the base has grown by (2 * 16 / 8 - 1) ^ (d / (d - 2))
    grown = Rotation(config(theta=1e4 * 3 ** (128 / 126)))
    torch.testing.assert_close(rotation(long, torch.float64), grown(long, torch.float64))
    both = torch.stack((torch.arange(16), torch.cat((torch.arange(8), torch.zeros(8, dtype=torch.long)))))
    assert torch.equal(rotation(both, torch.float64)[:1], rotation(long, torch.float64))
    torch.testing.assert_close(rotation(both, torch.float64)[1:, :8], plain(short, torch.float64))


def test_angles_are_exact_in_bfloat16_models():
    rotation = Rotation(config())
    turn = rotation(torch.tensor([[257]]), torch.bfloat16)[0, 0, 0, 0]
    assert turn.dtype == torch.complex64
    assert turn.real.item() == pytest.approx(torch.tensor(257.0, dtype=torch.float64).cos().item(), abs=1e-6)
    assert turn.imag.item() == pytest.approx(torch.tensor(257.0, dtype=torch.float64).sin().item(), abs=1e-6)
