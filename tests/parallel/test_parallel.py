"""What can be said of one process; several are tested through the real command in tests/train."""

import numpy as np
import pytest
import torch

from llama2.data.batch import Span, collate
from llama2.errors import TrainingError
from llama2.model.config import ModelConfig
from llama2.model.losses import next_token_loss
from llama2.model.transformer import build
from llama2.parallel.mesh import World, start
from llama2.parallel.region import fill, held, region_of
from llama2.parallel.shard import parallelize


def test_alone_is_a_world_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = start(device="cpu")
    assert (world.size, world.dp, world.rank, world.is_first) == (1, 1, 0, True)
    assert world.sum([1.5, 2]) == [1.5, 2.0] and world.any(True) and not world.any(False)


def test_every_thing_is_in_the_share_of_one_data_rank():
    for n in (0, 1, 5, 12):
        shares = [World(rank, 8, tp=2).share(n) for rank in range(8)]
        assert shares[::2] == shares[1::2] and [i for each in shares[::2] for i in each] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_split_that_does_not_go_up_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="tensor_parallel=2 does not divide the 3 processes"):
        start(device="cpu", tensor_parallel=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(TrainingError, match="sees no GPU"):
        start(device="cuda")


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_changes_no_gradient_and_no_name(kind):
    config = ModelConfig(16, 3, 4, 40, 24, n_kv_heads=2)
    batch = collate([[Span(np.arange(9)), Span(np.arange(5, 15))]], 20)
    plain, checked = build(config), parallelize(build(config), World(), activation_checkpointing=kind)
    for model in (plain, checked):
        next_token_loss(model, batch)[0].backward()
    ours = dict(checked.named_parameters())
    assert list(ours) == [name for name, _ in plain.named_parameters()]
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, weight.grad, rtol=0, atol=0)


def test_full_checkpointing_keeps_fewer_activations():
    config = ModelConfig(32, 6, 4, 40, 96)
    batch = collate([[Span(np.arange(33) % 40)]], 32)
    kept = {}
    for kind in ("none", "selective", "full"):
        model = parallelize(build(config), World(), activation_checkpointing=kind)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            loss, _, _ = next_token_loss(model, batch)
        kept[kind] = sum(sizes)
        loss.backward()
    assert kept["full"] < kept["none"] / 3


def test_a_plain_tensor_is_all_of_itself():
    tensor = torch.zeros(3, 4)
    fill(tensor, torch.ones(3, 4))
    assert region_of(tensor).slices == (slice(0, 3), slice(0, 4)) and tensor.min() == 1
    assert held(tensor, tensor, World()).is_owner and not held(tensor, tensor, World(rank=1, size=2)).is_owner
