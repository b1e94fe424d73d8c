"""Rows that begin alike, read once: the same hidden states, log-probabilities and gradients as rows apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llama2.data.batch import SHARED_TOKENS, share
from llama2.data.examples import Examples
from llama2.data.preferences.batch import lay_out
from llama2.model.config import RopeScaling
from llama2.model.losses import hidden_states, next_token_loss, token_logprobs
from llama2.model.transformer import build
from tests.pocket import POCKET

PROMPTS = [[1, *range(20, 60)], [1, *range(60, 75)]]
ANSWERS = [[5], [6, 7, 8], [9, 2], [5], [6, 7, 8, 9, 10, 2]]


def examples(pairs):
    """Examples of (prompt, answer); an answer's tokens are trained."""
    ids = [np.array([*prompt, *answer]) for prompt, answer in pairs]
    marks = [np.array([False] * len(prompt) + [True] * len(answer)) for prompt, answer in pairs]
    lengths = np.array([len(each) for each in ids])
    return Examples("pairs", "", np.concatenate(ids), np.concatenate(marks), lengths, np.ones_like(lengths))


@pytest.fixture
def answered():
    return examples([(prompt, answer) for prompt in PROMPTS for answer in ANSWERS])


def test_answers_to_one_prompt_are_laid_out_side_by_side():
    rows = [[1, 2, 3, 4, 50], [1, 2, 3, 4, 60, 61], [1, 2, 9, 70]]
    found = share(rows, [3, 3, 2], (3, 64))
    assert found is not None
    first, second = found.tokens.tolist()
    assert first[:8] == [1, 2, 3, 4, 50, 4, 60, 61] and not any(first[8:]) and second[:4] == [1, 2, 9, 70]
    assert found.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert found.branches[0, :9].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3]
    for row, ids in enumerate(rows):
        assert found.tokens.flatten()[found.where[row, : len(ids)]].tolist() == ids


def test_a_shared_row_is_no_longer_than_it_may_be_or_than_one_row_is():
    long = [[1] * 300 + [n] * 100 for n in range(5)]
    found = share(long, [300] * 5, (5, 416))
    assert found is not None and found.tokens.shape == (3, 512) and SHARED_TOKENS == 512
    assert share([[1] * 600 + [n] * 100 for n in range(3)], [600] * 3, (3, 704)) is None  # one row each: nothing saved
    assert share([[1, 2], [3, 4]], [1, 1], (2, 32)) is None


@pytest.mark.parametrize("order", [range(10), [9, 0, 4, 3, 7, 7, 2]])
def test_everything_is_as_of_rows_apart(answered, order):
    model = build(replace(POCKET, vocab_size=100), seed=0, dtype=torch.float64)
    batch, ends = lay_out(answered, [*order])
    apart = replace(batch, shared=None)
    assert batch.shared is not None and batch.shared.tokens.numel() < batch.tokens.numel()
    inside = torch.arange(batch.tokens.shape[1]) <= ends[:, None]
    torch.testing.assert_close(
        hidden_states(model, batch)[inside], hidden_states(model, apart)[inside], atol=1e-12, rtol=0
    )
    torch.testing.assert_close(token_logprobs(model, batch), token_logprobs(model, apart), atol=1e-12, rtol=0)
    gradients = [
        torch.autograd.grad(next_token_loss(model, each)[0], list(model.parameters())) for each in (batch, apart)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    "change", [{"sliding_window": 8}, {"rope_scaling": RopeScaling("dynamic", 2.0, original_context=16)}]
)
def test_a_model_that_counts_along_the_row_reads_rows_apart(answered, change):
    model = build(replace(POCKET, vocab_size=100, **change), seed=0, dtype=torch.float64)
    batch, _ = lay_out(answered, range(10))
    assert batch.shared is not None
    torch.testing.assert_close(
        token_logprobs(model, batch), token_logprobs(model, replace(batch, shared=None)), atol=0, rtol=0
    )


def test_a_batch_moves_with_what_it_shares(answered):
    moved = lay_out(answered, range(10))[0].to("meta").shared
    assert moved is not None
    assert all(each.is_meta for each in (moved.tokens, moved.positions, moved.branches, moved.where))
