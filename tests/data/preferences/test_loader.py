"""The order of pairs is exact: by seed, whatever the ranks and micro-batches, and across a resume."""

import json
from collections import Counter

import pytest
import torch

from llama2.data.preferences.loader import PairLoader


def make(found, *, rank=0, n_ranks=1, micro=4, batch_size=4, seed=3):
    return PairLoader(found, batch_size=batch_size, micro_batch_size=micro, rank=rank, n_ranks=n_ranks, seed=seed)


def numbers(batches):
    return [number for batch in batches for number in batch.numbers.tolist()]


def sides(batch):
    return batch.rows.tokens[batch.sides]


@pytest.mark.parametrize(("n_ranks", "micro"), [(1, 1), (2, 2), (2, 1), (4, 1)])
def test_ranks_together_see_what_one_process_sees(pairs, n_ranks, micro):
    whole, parts = make(pairs), [make(pairs, rank=rank, n_ranks=n_ranks, micro=micro) for rank in range(n_ranks)]
    for _ in range(15):  # two and a half epochs
        (expected,) = whole.step()
        steps = [part.step() for part in parts]
        assert [number for step in steps for number in numbers(step)] == expected.numbers.tolist()
        assert {part.n_read for part in parts} == {whole.n_read}
        assert [part.state for part in parts] == [whole.state] * n_ranks
        chosen = [row for step in steps for batch in step for row in sides(batch)[: batch.n_pairs]]
        for row, other in zip(chosen, sides(expected)[: expected.n_pairs], strict=True):
            n = min(len(row), len(other))
            assert torch.equal(row[:n], other[:n]) and not row[n:].any() and not other[n:].any()


@pytest.mark.parametrize("n_before", [0, 1, 5, 6, 23, 30])
def test_a_state_through_json_goes_on_exactly(pairs, n_before):
    first = make(pairs)
    for _ in range(n_before):
        first.step()
    second = make(pairs, micro=2)
    second.state = json.loads(json.dumps(first.state))
    for _ in range(12):
        assert numbers(first.step()) == numbers(second.step())
        assert first.state == second.state


def test_every_epoch_takes_each_once_in_another_order(pairs):
    loader = make(pairs)
    seen = [number for _ in range(23) for number in numbers(loader.step())]  # four epochs of 23
    epochs = [seen[i : i + 23] for i in range(0, 92, 23)]
    assert all(Counter(epoch) == Counter(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert numbers(make(pairs).step()) == seen[:4] != numbers(make(pairs, seed=4).step())
    assert loader.state == {"epoch": 3, "taken": 23}


def test_pairs_about_one_prompt_come_one_after_another(crowded):
    loader = make(crowded, batch_size=4)
    for _ in range(2 * len(crowded) // 4):
        (batch,) = loader.step()
        assert len({number // 4 for number in batch.numbers.tolist()}) == 1


def test_a_step_may_be_larger_than_the_set(pairs):
    small = pairs.part([0, 1, 2])
    assert Counter(numbers(make(small, batch_size=8).step())) in (
        Counter({0: 3, 1: 3, 2: 2}),
        Counter({0: 3, 1: 2, 2: 3}),
        Counter({0: 2, 1: 3, 2: 3}),
    )


def test_tokens_are_counted_without_padding(pairs):
    loader = make(pairs)
    (batch,) = loader.step()
    assert loader.n_read == int((batch.ends + 1).sum()) < batch.rows.tokens.numel()


def test_a_loader_says_what_it_reads(pairs, answers):
    loader = make(pairs)
    assert loader.said == f"23 pairs, {pairs.n_tokens:,} tokens"
    assert loader.identity == json.loads(json.dumps([[pairs.tokenizer_sha256, 23, pairs.n_tokens]]))
    assert make(answers).said == f"23 answers, {answers.n_tokens:,} tokens"


def test_labelled_answers_are_read_alike(answers):
    loader = make(answers, micro=2)
    batches = loader.step()
    assert [batch.n_answers for batch in batches] == [2, 2] and loader.n_read == answers.tokens_in(numbers(batches))
    for batch in batches:
        assert batch.is_good.tolist() == [number % 2 == 0 for number in batch.numbers.tolist()]
