"""The fused attention against the plain definition, for every mask."""

import pytest
import torch

from llama2.model.attention import attend, attend_plain, visible


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
    torch.testing.assert_close(attend(q, k, v, mask), attend_plain(q, k, v, mask), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_no_mask_is_causal(n_heads, n_kv_heads):
    q, k, v = qkv(n_heads, n_kv_heads)
    order = torch.arange(9)[None]
    torch.testing.assert_close(attend(q, k, v), attend_plain(q, k, v, visible(order, order)), atol=1e-12, rtol=0)


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
