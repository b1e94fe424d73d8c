"""A step is divided once: no split of a batch changes it, and a bad one changes nothing."""

import numpy as np
import pytest
import torch

from llama2.data.batch import IGNORE, Batch, Span, collate
from llama2.errors import ConfigError
from llama2.model.config import ModelConfig
from llama2.model.losses import next_token_loss
from llama2.model.transformer import build
from llama2.parallel.mesh import World
from llama2.train.config import TrainConfig
from llama2.train.loop import Trainer

CONFIG = ModelConfig(16, 2, 4, 40, 24, n_kv_heads=2)


def batch(n_rows, seed=0):
    rng = np.random.default_rng(seed)
    return collate([[Span(rng.integers(0, 40, rng.integers(2, 20)))] for _ in range(n_rows)], 20)


def rows(whole, start, stop):
    parts = (whole.tokens, whole.targets, whole.positions)
    return Batch(*(part[start:stop] for part in parts), documents=None)


def masked(whole):
    return Batch(whole.tokens, torch.full_like(whole.targets, IGNORE), whole.positions, None)


def trainer(dtype="float64", **settings):
    model = build(CONFIG, dtype=getattr(torch, dtype))
    return Trainer(model, TrainConfig(dtype=dtype, learning_rate=1e-2, **settings), n_steps=20)


def weights(of):
    return torch.cat([weight.detach().flatten() for weight in of.masters.weights.values()])


def test_muon_does_not_take_part_of_a_gradient_for_the_whole():
    config = TrainConfig(dtype="float64", optimizer="muon")
    with pytest.raises(ConfigError, match="tensor_parallel=2; use adamw"):
        Trainer(build(CONFIG, dtype=torch.float64), config, n_steps=1, world=World(size=2, tp=2))


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}, {"max_grad_norm": 0.0}, {"ema_decay": 0.5}])
def test_accumulation_changes_nothing(settings):
    once, eight = trainer(**settings), trainer(**settings)
    for step in range(5):
        whole = batch(8, step)
        a = once.step([whole], next_token_loss)
        b = eight.step([rows(whole, i, i + 1) for i in range(8)], next_token_loss)
        assert a.loss == pytest.approx(b.loss, rel=1e-12) and a.count == b.count == whole.n_targets
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-12)
    # Muon's Newton-Schulz iteration runs in bfloat16, so that the last bits of a gradient can tip a rounding.
    torch.testing.assert_close(
        weights(once), weights(eight), rtol=0, atol=1e-9 if not settings.get("optimizer") else 1e-4
    )


def test_the_mean_is_over_tokens_not_over_micro_batches():
    long, short = batch(4, 1), collate([[Span(np.arange(3))]], 20)
    step = trainer().step([long, short], next_token_loss)
    total = sum(next_token_loss(trainer().model, each)[0].item() for each in (long, short))
    assert step.loss == pytest.approx(total / (long.n_targets + 2), rel=1e-12)


def test_an_all_masked_micro_batch_changes_nothing():
    without, among = trainer(), trainer()
    whole = batch(4)
    without.step([whole], next_token_loss)
    among.step([masked(whole), whole, masked(whole)], next_token_loss)
    assert torch.equal(weights(without), weights(among))


def test_a_step_with_nothing_to_train_leaves_everything():
    one = trainer(weight_decay=0.5)
    one.step([batch(4)], next_token_loss)
    before = weights(one)
    step = one.step([masked(batch(4))], next_token_loss)
    assert step.skipped and step.loss == 0 and torch.equal(weights(one), before)


def broken(model, each):
    loss, count, metrics = next_token_loss(model, each)
    return loss * float("nan"), count, metrics


def test_a_step_that_is_no_number_leaves_everything():
    one = trainer(weight_decay=0.5)
    one.step([batch(4)], next_token_loss)
    before = {name: each.values.clone() for name, each in one.tensors().items()}
    step = one.step([batch(4)], broken)
    assert step.skipped == "loss is nan" and one.guard.n_bad == 1 and step.step == 2
    assert all(torch.equal(each.values, before[name]) for name, each in one.tensors().items())
    assert one.step([batch(4)], next_token_loss).skipped == ""


def test_a_worked_adamw_step():
    """One weight, gradient 2, AdamW's first step: w - lr decay w - lr g / (|g| + eps)."""
    one = trainer(weight_decay=0.1, max_grad_norm=0.0)
    before = {name: weight.detach().clone() for name, weight in one.masters.weights.items()}
    whole = batch(4)
    reference = build(CONFIG, dtype=torch.float64)
    loss, count, _ = next_token_loss(reference, whole)
    (loss / count).backward()
    step = one.step([whole], next_token_loss)
    for name, parameter in reference.named_parameters():
        decay = 0.1 if parameter.ndim > 1 else 0.0
        g, w = parameter.grad, before[name]
        assert g is not None
        expected = w - step.learning_rate * (decay * w + g / (g.abs() + 1e-5))
        torch.testing.assert_close(one.masters.weights[name].detach(), expected, rtol=1e-9, atol=1e-12)


def test_clipping_scales_to_the_norm():
    clipped, free = trainer(max_grad_norm=1e-3), trainer(max_grad_norm=0.0)
    norms = []
    for each in (clipped, free):
        step = each.step([batch(4)], next_token_loss)
        momentum = [o.values for name, o in each.tensors().items() if "exp_avg/" in name]
        norms.append(float(torch.cat([m.flatten() for m in momentum]).norm()) / 0.1)
    assert norms[1] == pytest.approx(step.grad_norm) and norms[0] == pytest.approx(1e-3, rel=1e-2)


def test_the_averaged_weights_lag_behind():
    one = trainer(ema_decay=0.9)
    for step in range(10):
        one.step([batch(4, step)], next_token_loss)
    start = torch.cat([p.detach().flatten() for p in build(CONFIG, dtype=torch.float64).parameters()])
    averaged = torch.cat([each.flatten() for each in one.averaged.values()])
    assert 0 < (averaged - start).norm() < (weights(one) - start).norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_training_learns_a_batch_by_heart(dtype):
    one = trainer(dtype, warmup_steps=2)
    losses = [one.step([batch(4)], next_token_loss).loss for _ in range(20)]
    assert losses[-1] < 0.6 * losses[0]
