"""Dropout and noise: what share, where, and only in training."""

import math

import pytest
import torch

from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from llama2.train.noise import add_dropout, add_noise

SHAPE = ModelConfig(32, 2, 4, 50, 64, context_length=64)
TOKENS = torch.arange(40)[None].repeat(64, 1)


def parts(model, x, turns):
    """Yield what embeddings, attentions and feed-forwards add to the stream."""
    yield model.tok_embeddings(TOKENS)
    for layer in model.layers:
        yield layer.attention(x, turns, None, None)
        yield layer.feed_forward(x)


@torch.no_grad()
def test_dropout_zeroes_its_share_and_scales_the_rest():
    plain, dropped = build(SHAPE, seed=3), build(SHAPE, seed=3)
    add_dropout(dropped, 0.25)
    x = torch.randn(64, 40, 32, generator=torch.Generator().manual_seed(0))
    turns = plain.rotation(torch.arange(40)[None], x.dtype)
    torch.manual_seed(1)
    for before, after in zip(parts(plain, x, turns), parts(dropped.train(), x, turns), strict=True):
        gone = after == 0
        assert gone.float().mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / gone.numel()))
        torch.testing.assert_close(after[~gone], before[~gone] / 0.75)
    assert torch.equal(dropped.eval()(TOKENS), plain.eval()(TOKENS))


@torch.no_grad()
def test_noise_has_its_size_and_is_of_training_alone():
    plain, noisy = build(SHAPE, seed=3), build(SHAPE, seed=3)
    add_noise(noisy, 5.0)
    torch.manual_seed(1)
    difference = (noisy.train().tok_embeddings(TOKENS) - plain.tok_embeddings(TOKENS)).abs()
    size = 5 / math.sqrt(40 * 32)
    assert 0.99 * size < difference.max() <= size * (1 + 1e-6)
    assert difference.mean() == pytest.approx(size / 2, rel=0.02)
    assert torch.equal(noisy.eval()(TOKENS), plain.eval()(TOKENS))
