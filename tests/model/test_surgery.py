"""A larger vocabulary: new rows are exact means, old logits stay."""

import pytest
import torch

from llama2.errors import ConfigError
from llama2.model.config import ModelConfig
from llama2.model.surgery import resize_vocabulary
from llama2.model.transformer import build

PARTS = [[3], [5, 6, 7], [1, 1, 2]]


def a_model(dtype=torch.float32, **changes):
    return build(ModelConfig(16, 2, 2, 30, 24, context_length=32, **changes), seed=1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_means_and_old_ones_untouched(tied, dtype):
    model = a_model(dtype, tied_embeddings=tied)
    larger = resize_vocabulary(model, PARTS)
    assert larger.config.vocab_size == 33 and model.config.vocab_size == 30
    assert (larger.output is None) == tied
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ["tok_embeddings.weight"] + ["output.weight"] * (not tied):
        rows, before = larger.state_dict()[name], model.state_dict()[name]
        assert rows.dtype == dtype and torch.equal(rows[:30], before)
        for row, ids in zip(rows[30:], PARTS, strict=True):
            assert torch.equal(row, before[ids].to(exact).mean(dim=0).to(dtype))


def test_means_by_hand():
    model = a_model()
    with torch.no_grad():
        model.tok_embeddings.weight.copy_(torch.arange(30.0)[:, None].expand(30, 16))
    larger = resize_vocabulary(model, PARTS)
    assert larger.tok_embeddings.weight[30:, 0].tolist() == pytest.approx([3, 6, 4 / 3])


@pytest.mark.parametrize("tied", [False, True])
def test_old_inputs_have_old_logits(tied):
    model = a_model(tied_embeddings=tied)
    larger = resize_vocabulary(model, PARTS)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        before, after = model(tokens), larger(tokens)
    assert after.shape[-1] == 33 and torch.equal(after[..., :30], before)
    # a mean of output rows gives the mean of their logits
    assert torch.allclose(after[..., 31], before[..., [5, 6, 7]].mean(-1), atol=1e-6)


def test_everything_else_is_shared():
    model = a_model()
    larger = resize_vocabulary(model, PARTS)
    assert larger.layers[0].attention.wq.weight.data_ptr() == model.layers[0].attention.wq.weight.data_ptr()
    assert all(parameter.requires_grad for parameter in larger.parameters())


def test_rows_without_a_token_are_used_first():
    model = a_model()
    larger = resize_vocabulary(model, [[1, 2]] * 2, n_old=29)
    assert larger.config.vocab_size == 31
    assert torch.equal(larger.tok_embeddings.weight[29], model.tok_embeddings.weight[[1, 2]].mean(0))
    same = resize_vocabulary(model, [[1, 2]], n_old=20)
    assert same.config.vocab_size == 30
    assert torch.equal(same.tok_embeddings.weight[21:], model.tok_embeddings.weight[21:])


def test_tokens_that_do_not_exist_are_refused():
    for parts in ([[30]], [[-1]], [[]]):
        with pytest.raises(ConfigError, match="new token 0"):
            resize_vocabulary(a_model(), parts)
    with pytest.raises(ConfigError, match="n_old=31"):
        resize_vocabulary(a_model(), [[1]], n_old=31)
