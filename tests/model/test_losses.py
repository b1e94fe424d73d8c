"""The chunked loss is the plain one, in value and gradient, and never holds the logits whole."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama2.data.batch import Span, collate
from llama2.model.config import ModelConfig
from llama2.model.losses import (
    IGNORE,
    cross_entropy,
    cross_entropy_plain,
    logprobs_and_entropy,
    next_token_loss,
    token_logprobs,
)  # fmt: skip
from llama2.model.transformer import build


def case(n=37, dim=12, n_vocab=50, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(n_vocab, dim, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, n_vocab, (n,), generator=generator)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
@pytest.mark.parametrize("masked", [0, 10, 36])
def test_chunked_equals_plain(rows, masked):
    hidden, weight, targets = case()
    targets[:masked] = IGNORE
    ours, theirs = (
        cross_entropy(hidden, weight, targets, chunk_rows=rows) * 0.3,
        cross_entropy_plain(hidden, weight, targets) * 0.3,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_bfloat16_is_as_near_to_the_truth_as_the_plain_loss():
    hidden, weight, targets = case(n=512, dtype=torch.bfloat16)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    truth = gradients(cross_entropy_plain(*exact, targets), *exact)
    ours = gradients(cross_entropy(hidden, weight, targets, chunk_rows=64), hidden, weight)
    plain = gradients(cross_entropy_plain(hidden, weight, targets), hidden, weight)
    for true, mine, other in zip(truth, ours, plain, strict=True):
        # Each of the 8 chunks' products is rounded to bfloat16, where the whole one is rounded once.
        assert (mine.double() - true).norm() <= 1.25 * (other.double() - true).norm()


def test_a_worked_number():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert cross_entropy(hidden, weight, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))


def test_nothing_trained_is_zero_with_zero_gradients():
    hidden, weight, targets = case()
    loss = cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, hidden, weight))


def test_logits_never_exist_whole():
    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else (out,):
                if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                    self.n = max(self.n, each.numel())
            return out

    hidden, weight, targets = case(n=600, n_vocab=900)
    with Largest() as largest:
        cross_entropy(hidden, weight, targets, chunk_rows=50).backward()
    assert largest.n == 50 * 900


def test_the_loss_of_a_batch_is_that_of_the_models_logits():
    model = build(ModelConfig(16, 2, 4, 40, 24, n_kv_heads=2), dtype=torch.float64)
    batch = collate([[Span(np.arange(9)), Span(np.arange(5, 15))], [Span(np.arange(12))]], 20)
    loss, count, _ = next_token_loss(model, batch)
    logits = model(batch.tokens, batch.positions, batch.documents).log_softmax(-1)
    trained = batch.targets != IGNORE
    expected = -logits[trained].gather(-1, batch.targets[trained][:, None]).sum()
    assert count == 8 + 9 + 11
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_evaluation_computes_no_gradients():
    hidden, weight, targets = case()
    with torch.no_grad():
        assert not cross_entropy(hidden, weight, targets).requires_grad


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_are_those_of_whole_logits(tied, temperature):
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=50, ffn_dim=24, n_kv_heads=2, tied_embeddings=tied)
    model = build(config, dtype=torch.float64)
    rows = [[Span(np.arange(3, 3 + n), np.arange(n) > 2)] for n in (9, 6, 12)]
    batch = collate(rows, 12)
    found, entropy = logprobs_and_entropy(model, batch, temperature=temperature)
    full = (model(batch.tokens, batch.positions) / temperature).log_softmax(-1)
    is_trained = batch.targets != IGNORE
    wanted = full.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0].masked_fill(~is_trained, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    own = -(full.exp() * full).sum(-1).masked_fill(~is_trained, 0)
    torch.testing.assert_close(entropy, own.detach(), rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64)
    ours = gradients((found * weights).sum(), *model.parameters())
    theirs = gradients((wanted * weights).sum(), *model.parameters())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_log_probabilities_add_up_to_the_loss():
    model = build(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=50, ffn_dim=24, n_kv_heads=2))
    batch = collate([[Span(np.arange(2, 12))], [Span(np.arange(5, 12))]], 12)
    loss, _, _ = next_token_loss(model, batch)
    torch.testing.assert_close(-token_logprobs(model, batch).sum(), loss)
