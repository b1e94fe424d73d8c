"""Muon beside PyTorch's, and what its update is."""

import pytest
import torch

from llama2.train.muon import Muon, orthogonal

SHAPES = [(16, 16), (40, 16), (16, 40), (16, 16), (40, 16), (1, 5)]


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_singular_values_become_about_one():
    for matrix, made in zip(matrices(), orthogonal(matrices()), strict=True):
        assert made.shape == matrix.shape
        values = torch.linalg.svdvals(made.float())
        assert float(values.min()) > 0.6 and float(values.max()) < 1.25
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(
            (u.T @ made.float() @ v.T).diagonal(), values.new_ones(len(values)), atol=0.4, rtol=0
        )


def test_a_matrix_does_not_depend_on_its_company():
    together = orthogonal(matrices())
    for alone, made in zip(matrices(), together, strict=True):
        torch.testing.assert_close(orthogonal([alone])[0], made, atol=2e-2, rtol=0)


def test_ten_steps_are_those_of_pytorch():
    ours, theirs = ([torch.nn.Parameter(each) for each in matrices()] for _ in range(2))
    settings = dict(lr=2e-2, weight_decay=0.1, momentum=0.95)
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            for weight, gradient in zip(weights, matrices(step + 1), strict=True):
                weight.grad = gradient
            optimizer.step()
    for mine, other, first in zip(ours, theirs, matrices(), strict=True):
        moved = (other - first).norm()
        assert (mine - other).norm() < 0.01 * moved  # products in bfloat16, added in another order


def test_a_weight_without_a_gradient_stays():
    weights = [torch.nn.Parameter(each) for each in matrices()]
    optimizer = Muon(weights, lr=0.1)
    optimizer.step()
    assert all(torch.equal(weight, first) for weight, first in zip(weights, matrices(), strict=True))
    with pytest.raises(TypeError):
        Muon(weights)  # pyright: ignore[reportCallIssue]
