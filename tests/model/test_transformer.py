"""The model against a float64 oracle worked out by hand, and its own invariants."""

import math

import pytest
import torch
import torch.nn.functional as F

from llama2.model.config import ModelConfig
from llama2.model.transformer import RMSNorm, Transformer, build

TINY = ModelConfig(16, 2, 4, 16, 24, n_kv_heads=2)
LOGITS_AT_4 = [
    1.098513044, 1.201999513, 1.148673068, 0.94549068, 0.618959533, 0.211678895, -0.223217382, -0.628992708,
    -0.952709616, -1.152135981, -1.201254631, -1.093657544, -0.843381842, -0.483078504, -0.059752722, 0.371368404,
]  # fmt: skip


@pytest.fixture
def oracle():
    """Every tensor t = 1, 2... in checkpoint order is 0.3 sin(t + 0.37 i), or 1 + 0.1 sin(t + 0.37 i) if 1-D."""
    block = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo")
    block += ("ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    names = ["tok_embeddings", *(f"layers.{i}.{name}" for i in range(2) for name in block), "norm", "output"]
    model = Transformer(TINY).double()
    state = model.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 4432
    for t, name in enumerate(names, 1):
        tensor = state[f"{name}.weight"]
        wave = torch.sin(t + 0.37 * torch.arange(tensor.numel(), dtype=torch.float64)).view_as(tensor)
        tensor.copy_(1 + 0.1 * wave if tensor.ndim == 1 else 0.3 * wave)
    return model


def test_the_oracles_logits(oracle):
    tokens = torch.tensor([[1, 5, 2, 9, 3]])
    logits = oracle(tokens)[0]
    assert logits.dtype == torch.float64
    first = torch.tensor([0.309474631, -0.05172164, -0.406170304, -0.70762997], dtype=torch.float64)
    torch.testing.assert_close(logits[0, :4], first, atol=1e-9, rtol=0)
    torch.testing.assert_close(logits[4], torch.tensor(LOGITS_AT_4, dtype=torch.float64), atol=1e-9, rtol=0)
    assert logits.sum().item() == pytest.approx(-4.937374596, abs=1e-8)
    losses = F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
    assert losses.tolist() == pytest.approx([3.973730265, 3.497621699, 3.20112314, 3.671763312], abs=1e-9)


def test_the_oracles_greedy_continuation(oracle):
    tokens = [1, 5, 2, 9, 3]
    for _ in range(6):
        tokens.append(int(oracle(torch.tensor([tokens]))[0, -1].argmax()))
    assert tokens[5:] == [1, 2, 2, 2, 3, 7]


@pytest.mark.parametrize(
    ("eps", "expected"),
    [
        (1e-5, [0.365148128, 0.730296256, 1.095444385, 1.460592513]),
        (1e-6, [0.365148347, 0.730296695, 1.095445042, 1.460593389]),
    ],
)
def test_rms_norm(eps, expected):
    norm = RMSNorm(4, eps).double()
    out = norm(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_rms_norm_rounds_before_the_weight():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(32, 1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 32))
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), exact.bfloat16() * norm.weight)


def test_a_document_does_not_move_the_logits_of_another():
    model = build(TINY, seed=1, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    one = model(torch.tensor([[3, 1, 4, 9, 2, 6, 5]]), positions, documents)
    other = model(torch.tensor([[8, 8, 8, 9, 2, 6, 5]]), positions, documents)
    alone = model(torch.tensor([[9, 2, 6, 5]]))
    assert torch.equal(one[:, 3:], other[:, 3:])
    assert not torch.equal(one[:, :3], other[:, :3])
    torch.testing.assert_close(one[:, 3:], alone, atol=1e-12, rtol=0)


def test_later_tokens_do_not_move_earlier_logits():
    model = build(TINY, seed=1, dtype=torch.float64)
    one, other = model(torch.tensor([[3, 1, 4, 1]])), model(torch.tensor([[3, 1, 4, 9]]))
    torch.testing.assert_close(one[:, :3], other[:, :3], atol=1e-12, rtol=0)


def test_a_sliding_window_forgets():
    config = ModelConfig(16, 1, 4, 16, 24, sliding_window=2)
    model = build(config, seed=1, dtype=torch.float64)
    one, other = model(torch.tensor([[3, 1, 4, 1]])), model(torch.tensor([[9, 1, 4, 1]]))
    torch.testing.assert_close(one[:, 2:], other[:, 2:], atol=1e-12, rtol=0)
    assert (one[:, 1] - other[:, 1]).abs().max() > 1e-6


def test_tied_embeddings_share_their_weight():
    model = build(ModelConfig(16, 1, 4, 16, 24, tied_embeddings=True), seed=0)
    assert "output.weight" not in model.state_dict()
    hidden = torch.randn(1, 3, 16)
    assert torch.equal(model.project(hidden), F.linear(hidden, model.tok_embeddings.weight))


def test_logits_are_float32_in_half_precision():
    assert build(TINY, dtype=torch.bfloat16)(torch.tensor([[1, 2]])).dtype == torch.float32


def test_initialisation_is_seeded_and_as_documented():
    config = ModelConfig(256, 8, 4, 1000, 512)
    model, same, other = build(config, seed=3), build(config, seed=3), build(config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.tok_embeddings.weight, other.tok_embeddings.weight)
    block = model.layers[0]
    assert block.attention.wq.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for residual in (block.attention.wo, block.feed_forward.w2):
        assert residual.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert torch.equal(block.ffn_norm.weight, torch.ones(256))


def test_a_fresh_model_predicts_uniformly():
    model = build(ModelConfig(64, 2, 4, 512, 128), seed=0)
    tokens = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)
