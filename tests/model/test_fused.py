"""Training kernels: at least as near to the truth as the plain bfloat16 operations, whatever the shape."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from llama2.model import fused
from llama2.model.attention import attend_plain, visible
from llama2.model.config import ModelConfig
from llama2.model.losses import IGNORE, cross_entropy_plain, logprobs_plain
from llama2.model.rope import Rotation, rotate
from llama2.model.transformer import build

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


def numbers(*shapes, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).bfloat16().requires_grad_() for shape in shapes]


def with_gradients(function, inputs, seed=1):
    """Return the value of the function and the gradients of its inputs for a random direction."""
    out = function(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction)]


def compare(kernel, plain, inputs, slack=1.05):
    """The kernel's distance from float64 is at most that of the plain operations, but for chance."""
    truth = with_gradients(plain, [each.detach().double().requires_grad_() for each in inputs])
    for true, ours, other in zip(truth, with_gradients(kernel, inputs), with_gradients(plain, inputs), strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == true.shape
        theirs = (other.double() - true).norm()
        assert (ours.double() - true).norm() <= slack * theirs + 1e-3 * true.norm()
        assert theirs <= 0.02 * true.norm()  # the plain operations say the same, so this is no comparison of noise


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 50, 160), (2, 65, 33), (1, 3, 2048)])
def test_rms_norm(shape):
    x, weight = numbers(shape, shape[-1:])
    compare(
        lambda x, w: fused.rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, shape[-1:], eps=1e-5) * w,
        (x, weight),
    )


@pytest.mark.parametrize("shape", [(1,), (2, 3, 448), (7, 77)])
def test_swiglu(shape):
    compare(fused.swiglu, lambda a, b: F.silu(a) * b, numbers(shape, shape, scale=3.0))


def test_swiglu_of_what_is_far_out():
    a = torch.tensor([-3e38, -1e3, -88.0, 88.0, 1e3, float("nan"), float("inf")]).bfloat16()
    out = fused.swiglu(a, torch.ones_like(a))
    assert torch.equal(out[:2], torch.zeros(2).bfloat16()) and torch.equal(out[3:5], a[3:5])
    assert out[2].abs() < 1e-35 and out[5].isnan() and out[6] == float("inf")


CASES = {
    "one token after another": (2, 7, 4, 4, 8, None),
    "grouped heads": (2, 130, 6, 2, 16, None),
    "documents in the rows": (3, 300, 4, 4, 40, "documents"),
    "a window": (1, 200, 4, 1, 32, "window"),
    "whole vectors": (1, 128, 2, 2, 64, "documents"),
    "heads of many vectors": (1, 70, 2, 1, 80, None),
    "texts that begin alike": (2, 90, 2, 1, 16, "branches"),
}


@pytest.mark.parametrize("case", CASES)
def test_attention(case):
    batch, time, n_heads, n_kv, dim, kind = CASES[case]
    q, k, v = numbers(*((batch, time, heads, dim) for heads in (n_heads, n_kv, n_kv)))
    config = ModelConfig(dim=n_heads * dim, n_layers=1, n_heads=n_heads, n_kv_heads=n_kv, vocab_size=4, ffn_dim=4)
    order = torch.arange(time)[None]
    documents = order.expand(batch, -1) // 37 if kind == "documents" else None
    branches = (order.expand(batch, -1) - 20).clamp(min=-1) // 30 + 1 if kind == "branches" else None
    mask = (
        visible(order, order, window=29 if kind == "window" else None, documents=documents, branches=branches)
        if kind
        else None
    )
    rotation = Rotation(config)

    def plain(q, k, v):
        turns = rotation(order, q.dtype)
        seen = visible(order, order) if mask is None else mask
        return attend_plain(rotate(q, turns), rotate(k, turns), v, seen)

    compare(lambda q, k, v: fused.attend(q, k, v, rotation(order, q.dtype), mask), plain, (q, k, v), slack=1.2)


def test_positions_of_their_own_in_every_row():
    q, k, v = numbers(*[(2, 20, 2, 8)] * 3)
    rotation = Rotation(ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=4, ffn_dim=4))
    positions = torch.stack([torch.arange(20), torch.arange(20) % 7])
    together = fused.attend(q, k, v, rotation(positions, q.dtype), None)
    for row in range(2):
        part = slice(row, row + 1)
        alone = fused.attend(q[part], k[part], v[part], rotation(positions[part], q.dtype), None)
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_slope(temperature):
    (logits,) = numbers((40, 333), scale=4.0)
    targets = torch.randint(0, 333, (40,), generator=torch.Generator().manual_seed(2))
    targets[[3, 17]] = IGNORE
    hidden = logits.detach().double()
    true_logprobs, true_entropy = logprobs_plain(hidden, torch.eye(333).double(), targets, temperature)
    logprobs, entropy = fused.target_logprobs(logits.detach(), targets, temperature=temperature)
    torch.testing.assert_close(logprobs.double(), true_logprobs, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), true_entropy, atol=1e-5, rtol=1e-5)
    weights = torch.rand(40)
    slope = logits.detach().clone()
    torch.testing.assert_close(fused.slope_(slope, targets, weights, temperature=temperature), logprobs)
    onehot = F.one_hot(targets.clamp(min=0), 333)
    true = ((hidden / temperature).softmax(-1) - onehot) * (weights * (targets >= 0))[:, None]
    torch.testing.assert_close(slope.double(), true, atol=1e-6, rtol=2**-8)
    assert not slope[[3, 17]].any()


def test_a_number_that_is_none_is_never_lost():
    (x,) = numbers((4, 8))
    bad = x.detach().clone()
    bad[2, 3] = float("nan")
    assert fused.rms_norm(bad, torch.ones(8).bfloat16(), 1e-5)[2].isnan().all()
    logprobs, _ = fused.target_logprobs(bad, torch.zeros(4, dtype=torch.long))
    assert logprobs.isnan().tolist() == [False, False, True, False]


def model_gradients(dtype, documents):
    config = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=101, tied_embeddings=True)
    model = build(config, seed=3, dtype=dtype)
    tokens = torch.randint(0, 101, (3, 150), generator=torch.Generator().manual_seed(4))
    hidden = model.hidden(tokens, documents=documents)
    cross_entropy_plain(hidden.flatten(0, 1), model.tok_embeddings.weight, tokens.roll(-1, 1).flatten()).backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradients_of_a_model(packed, monkeypatch):
    documents = torch.arange(150)[None].expand(3, -1) // 60 if packed else None
    truth = model_gradients(torch.float64, documents)
    quick = model_gradients(torch.bfloat16, documents)
    monkeypatch.setattr(fused, "library", lambda: None)
    plain = model_gradients(torch.bfloat16, documents)
    assert any(not torch.equal(quick[name], plain[name]) for name in quick)  # the kernels were at work
    for name, true in truth.items():
        ours, theirs = ((each[name].double() - true).norm() / true.norm() for each in (quick, plain))
        assert ours <= 1.15 * theirs and ours < 0.03, name


def test_the_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            x, weight = numbers((200, 48), (48,))
            found.append(with_gradients(lambda x, w: fused.rms_norm(x, w, 1e-5), (x, weight)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_who_takes_them():
    (x,) = numbers((2, 8))
    assert fused.applies(x, x)
    assert not fused.applies(x, x.float()) and not fused.applies(x.double())
    with torch.no_grad():
        assert not fused.applies(x) and fused.fits(x)
