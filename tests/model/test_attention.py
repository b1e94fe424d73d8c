"""The fused attention against the plain definition, for every mask."""

import pytest
import torch

from llama2.model.attention import attend, attend_by_products, attend_plain, visible


def qkv(n_heads, n_kv_heads, t=9, s=None, head_dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(n, length):
        return torch.randn(2, length, n, head_dim, generator=generator, dtype=dtype)

    return random(n_heads, t), random(n_kv_heads, s or t), random(n_kv_heads, s or t)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (6, 3), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("with_documents", [False, True])
def test_fused_equals_plain(n_heads, n_kv_heads, window, with_documents):
    q, k, v = qkv(n_heads, n_kv_heads)
    order = torch.arange(9)[None]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5] * 9]) if with_documents else None
    mask = visible(order, order, window=window, documents=documents)
    expected = attend_plain(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(attend_by_products(q, k, v, mask), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("with_mask", [False, True])
def test_training_in_bfloat16_is_as_near_to_the_truth_as_the_definition(with_mask):
    """Output and gradients; the two round at other places."""
    exact = [each.requires_grad_() for each in qkv(4, 2, t=64)]
    order = torch.arange(64)[None]
    mask = visible(order, order, documents=torch.arange(64)[None] // 20 if with_mask else None)
    truth = attend_plain(*exact, mask)
    truths = [truth, *torch.autograd.grad(truth.square().sum(), exact)]
    errors = []
    for attention in (attend, attend_plain):
        inputs = [each.detach().bfloat16().requires_grad_() for each in exact]
        out = attention(*inputs, mask if with_mask or attention is attend_plain else None)
        found = [out, *torch.autograd.grad(out.float().square().sum(), inputs)]
        errors.append([float((a.detach().double() - b.detach()).norm()) for a, b in zip(found, truths, strict=True)])
    assert all(ours < 1.5 * plain for ours, plain in zip(*errors, strict=True)), errors


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_no_mask_is_causal(n_heads, n_kv_heads):
    q, k, v = qkv(n_heads, n_kv_heads)
    order = torch.arange(9)[None]
    expected = attend_plain(q, k, v, visible(order, order))
    torch.testing.assert_close(attend(q, k, v), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(attend_by_products(q, k, v, None), expected, atol=1e-12, rtol=0)


def test_one_query_without_a_mask_sees_all_keys():
    q, k, v = qkv(4, 2, t=1, s=7)
    everything = torch.ones(1, 1, 7, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v), attend_plain(q, k, v, everything), atol=1e-12, rtol=0)


def test_a_query_head_reads_its_own_group():
    q, k, v = qkv(4, 2)
    v[:, :, 1] = 0  # the second key head carries nothing, so query heads 2 and 3 must give zero
    out = attend(q, k, v)
    assert out[:, :, :2].abs().min() > 0
    assert torch.equal(out[:, :, 2:], torch.zeros_like(out[:, :, 2:]))


def test_visible_draws_the_expected_picture():
    order = torch.arange(5)[None]
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    picture = visible(order, order, window=2, documents=documents)[0].int().tolist()
    assert picture == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
