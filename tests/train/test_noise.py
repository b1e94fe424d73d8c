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
def test_noise_is_of_its_size_and_only_in_training():
    model = build(SHAPE)
    add_noise(model, 5.0)
    plain, noisy = model.tok_embeddings.eval()(TOKENS), model.tok_embeddings.train()(TOKENS)
    size, off = 5 / (40 * 32) ** 0.5, noisy - plain
    assert size * 0.99 < off.abs().max() <= size * 1.0001 and float(off.std()) == pytest.approx(size / 3**0.5, rel=0.05)
    assert torch.equal(model.tok_embeddings.eval()(TOKENS), plain)
