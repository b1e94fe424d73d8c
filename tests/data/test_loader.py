"""The order of the data is exact: by seed, whatever the ranks and micro-batches, and across a resume."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from llama2.data.batch import IGNORE, Span, collate
from llama2.data.loader import Loader, in_order
from llama2.data.mix import Mixture
from llama2.model.config import ModelConfig
from llama2.model.losses import next_token_loss
from llama2.model.transformer import build


def make_loader(sets, *, rank=0, n_ranks=1, micro=8, **options):
    settings = dict(sequence_length=32, rows_per_step=8, packing_buffer_rows=16, seed=3) | options
    return Loader(sets, micro_batch_size=micro, rank=rank, n_ranks=n_ranks, **settings)


def tokens_of(batches):
    return torch.cat([batch.tokens for batch in batches])


@pytest.mark.parametrize(("n_ranks", "micro"), [(1, 1), (2, 4), (4, 2), (2, 2)])
def test_the_order_does_not_depend_on_ranks_or_micro_batches(make_set, n_ranks, micro):
    sets = [make_set(50)]
    whole = make_loader(sets)
    parts = [make_loader(sets, rank=rank, n_ranks=n_ranks, micro=micro) for rank in range(n_ranks)]
    for _ in range(20):
        expected = tokens_of(whole.step())
        assert torch.equal(torch.cat([tokens_of(part.step()) for part in parts]), expected)


@pytest.mark.parametrize("n_before", [0, 1, 5, 17, 40])
@pytest.mark.parametrize("packing", [True, False])
def test_a_state_through_json_goes_on_exactly(make_set, n_before, packing):
    sets = [make_set(30), make_set(20, name="other", seed=1)]
    first = make_loader(sets, weights=[1, 2], packing=packing)
    for _ in range(n_before):
        first.step()
    second = make_loader(sets, weights=[1, 2], packing=packing)
    second.state = json.loads(json.dumps(first.state))
    assert second.state == first.state
    for _ in range(12):
        assert torch.equal(tokens_of(first.step()), tokens_of(second.step()))
        assert first.state == second.state


def test_a_pass_predicts_every_token_once(make_set):
    shards = make_set(40, longest=100)
    mixture = Mixture([shards.lengths], [1.0], length=32, seed=0)
    for _ in range(2):  # two passes, cut differently
        seen = Counter()
        for _ in range(len(shards)):
            for piece in mixture.draw():
                seen.update((piece.document, i) for i in range(piece.start + 1, piece.start + piece.n + 1))
        assert seen == {(d, i): 1 for d in range(len(shards)) for i in range(1, shards.lengths[d])}


def test_long_documents_are_cut_elsewhere_in_each_pass():
    mixture = Mixture([np.array([1000])], [1.0], length=32, seed=0)
    assert len({next(mixture.draw()).n for _ in range(20)}) > 5


def test_weights_are_kept_to_within_a_document(make_set):
    sets = [make_set(60), make_set(15, name="other", seed=1)]
    mixture = Mixture([each.lengths for each in sets], [0.75, 0.25], length=32, seed=0)
    longest = max(int(each.lengths.max()) for each in sets)
    for _ in range(500):
        list(mixture.draw())
        drawn = mixture.state["n_drawn"]
        assert abs(drawn[0] - 0.75 * sum(drawn)) <= longest
    assert min(mixture.state["epochs"]) > 2


def test_other_seeds_other_orders(make_set):
    sets = [make_set(50)]
    one, two = make_loader(sets, seed=1), make_loader(sets, seed=2)
    assert not torch.equal(tokens_of(one.step()), tokens_of(two.step()))


def test_rows_are_nearly_full(make_set):
    loader = make_loader([make_set(400, longest=30)], packing_buffer_rows=128)
    batches = [batch for _ in range(30) for batch in loader.step()]
    filled = sum(batch.n_targets for batch in batches) / sum(batch.tokens.numel() for batch in batches)
    assert filled > 0.97


@pytest.mark.parametrize("window", [None, 7])
def test_packed_equals_unpacked(make_set, window):
    """The loss of each document, and its gradient, are those it has alone in a row."""
    shards = make_set(24, longest=20)
    config = ModelConfig(16, 2, 4, 260, 24, n_kv_heads=2, context_length=64, sliding_window=window)
    model = build(config, dtype=torch.float64)
    (packed,) = in_order(shards, range(len(shards)), sequence_length=64, micro_batch_size=99)
    assert packed.documents is not None and len(packed.tokens) < len(shards)
    together, count, _ = next_token_loss(model, packed)
    alone = [next_token_loss(model, collate([[Span(shards.document(i))]], 64)) for i in range(len(shards))]
    assert count == sum(n for _, n, _ in alone)
    total = sum(loss for loss, _, _ in alone)
    torch.testing.assert_close(together, total, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(together, list(model.parameters())),
        torch.autograd.grad(total, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_changing_one_document_leaves_the_others_logits(make_set):
    model = build(ModelConfig(16, 2, 4, 260, 24, n_kv_heads=2, context_length=64))
    first, second = np.arange(3, 20), np.arange(40, 70)
    logits = []
    for opening in (first, first[::-1].copy()):
        batch = collate([[Span(opening), Span(second)]], 64)
        logits.append(model(batch.tokens, batch.positions, batch.documents)[0, len(first) - 1 :])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_evaluation_reads_every_document_once_in_order(make_set):
    shards = make_set(30, longest=100)
    batches = list(in_order(shards, range(30), sequence_length=32, micro_batch_size=4))
    targets = torch.cat([batch.targets[batch.targets != IGNORE] for batch in batches]).tolist()
    assert targets == [int(i) for d in range(30) for i in shards.document(d)[1:]]
