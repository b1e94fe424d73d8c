"""Schedules by hand, masters in float32, and what counts as a bad step."""

import math

import pytest
import torch

from llama2.model.config import ModelConfig
from llama2.model.lora import add_adapter
from llama2.model.lora_config import LoraConfig
from llama2.model.transformer import build
from llama2.train.config import TrainConfig
from llama2.train.guard import N_NEEDED, Guard
from llama2.train.optim import MasterWeights, learning_rate, make_optimizers


def rates(n, **settings):
    return [learning_rate(step, n, TrainConfig(learning_rate=1.0, **settings)) for step in range(n)]


def test_cosine_rises_linearly_and_falls_to_its_share():
    found = rates(110, warmup_steps=10, min_lr_share=0.1)
    assert found[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert found[59] == pytest.approx(0.1 + 0.9 / 2)
    assert found[-1] == pytest.approx(0.1)
    assert found[9:] == sorted(found[9:], reverse=True)


def test_wsd_stays_and_then_falls_linearly():
    found = rates(100, lr_scheduler="wsd", warmup_steps=5, decay_share=0.2, min_lr_share=0.0)
    assert found[4:80] == [1.0] * 76
    assert found[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])


def test_constant_stays():
    assert rates(10, lr_scheduler="constant", warmup_steps=2) == [0.5] + [1.0] * 9


def test_matrices_are_decayed_and_vectors_are_not():
    model = build(ModelConfig(16, 1, 4, 20, 24, attention_bias=True))
    (adam,) = make_optimizers(dict(model.named_parameters()), TrainConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in adam.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0.3 if p.ndim > 1 else 0.0 for name, p in model.named_parameters()
    }


def test_muon_takes_the_matrices_of_the_blocks():
    model = build(ModelConfig(16, 1, 4, 20, 24))
    adam, muon = make_optimizers(dict(model.named_parameters()), TrainConfig(optimizer="muon"))
    assert sum(len(group["params"]) for group in muon.param_groups) == 7
    assert sum(len(group["params"]) for group in adam.param_groups) == len(list(model.parameters())) - 7


def test_muon_takes_the_factors_of_an_adapter_but_not_its_lengths():
    model = build(ModelConfig(16, 1, 4, 20, 24))
    add_adapter(model, LoraConfig(r=2, dora=True))
    weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
    adam, muon = make_optimizers(weights, TrainConfig(optimizer="muon"))
    by_optimizer = [{id(w) for group in each.param_groups for w in group["params"]} for each in (adam, muon)]
    for name, weight in weights.items():
        assert id(weight) in by_optimizer["lora_" in name], name


def test_masters_remember_what_bfloat16_forgets():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    masters = MasterWeights(model, separate=True)
    for _ in range(100):
        masters.weights["weight"].add_(-1e-4)
        masters.publish()
    assert model.weight.item() == pytest.approx(0.99, abs=0.004)  # in bfloat16 alone it would still be 1


def test_gradients_add_up_in_float32():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    masters = MasterWeights(model, separate=True)
    for value in (256.0, *[0.5] * 8):
        model.weight.grad = torch.full_like(model.weight, value)
        masters.gather_gradients()
    assert masters.weights["weight"].grad == 260.0  # bfloat16 would stay at 256
    assert masters.gradient_norm() == 260.0


def test_the_guard_finds_what_is_no_number_and_what_is_far_off():
    guard = Guard(sigma=4)
    assert "loss is nan" in guard.judge(math.nan, 1.0) and "gradient norm is inf" in guard.judge(1.0, math.inf)
    assert guard.n_bad == 2
    for i in range(N_NEEDED):
        assert guard.judge(2 + 0.1 * (i % 3), 1.0) == ""
    assert "standard deviations above" in guard.judge(5.0, 1.0) and guard.judge(2.2, 1.0) == "" and guard.n_bad == 0
    assert guard.judge(2.0, 2.5) == "" and "gradient norm" in guard.judge(2.0, 50.0)
    assert Guard(sigma=0).judge(1e9, 1e9) == ""
