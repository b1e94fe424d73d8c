"""Batches of pairs: every token is an input, the last one is where `ends` points, and only answers are trained."""

from dataclasses import replace

import pytest
import torch

from llama2.data.preferences.batch import MULTIPLE
from llama2.data.preferences.loader import in_order
from llama2.model.config import RopeScaling
from llama2.model.losses import IGNORE
from llama2.model.transformer import build
from tests.pocket import POCKET, pocket_tokenizer

EOS = 2


def check_rows(rows, ends, examples, numbers):
    """Each row is its example, whole, with shifted targets; the rest is padding."""
    assert rows.documents is None and rows.tokens.shape[1] % MULTIPLE == 0
    assert rows.tokens.shape[1] - MULTIPLE < max(examples.lengths[i] for i in numbers) <= rows.tokens.shape[1]
    for row, i in enumerate(numbers):
        ids, marks, n = examples.document(i).tolist(), examples.trained(i).tolist(), int(examples.lengths[i])
        assert ends[row] == n - 1 and rows.tokens[row, ends[row]] == ids[-1] == EOS
        assert rows.tokens[row].tolist() == ids + [0] * (rows.tokens.shape[1] - n)
        expected = [following if mark else IGNORE for following, mark in zip(ids[1:], marks[1:], strict=True)]
        assert rows.targets[row].tolist() == expected + [IGNORE] * (rows.tokens.shape[1] - n + 1)
        assert rows.positions[row, :n].tolist() == list(range(n)) and not rows.positions[row, n:].any()


def test_the_chosen_come_first_and_the_rejected_in_the_same_order(pairs):
    batch = pairs.batch([7, 2, 11])
    check_rows(batch.rows, batch.ends, pairs.rows, [4, 5, 14, 15, 22, 23])
    assert batch.sides.tolist() == [2, 0, 4, 3, 1, 5]
    assert batch.n_pairs == 3 and batch.numbers.tolist() == [7, 2, 11]
    assert batch.ratings.tolist() == pairs.ratings[[7, 2, 11]].tolist()
    assert batch.margins.tolist() == pairs.margins[[7, 2, 11]].tolist()
    assert batch.flags.tolist() == pairs.flags[[7, 2, 11]].tolist()


def test_an_answer_in_several_pairs_is_read_once(crowded):
    for at in range(0, len(crowded), 4):  # four pairs about each prompt
        batch = crowded.batch(range(at, at + 4))
        wanted = [crowded.rows.document(row).tolist() for side in (0, 1) for row in range(2 * at + side, 2 * at + 8, 2)]
        found = [batch.rows.tokens[row, : batch.ends[row] + 1].tolist() for row in batch.sides]
        assert found == wanted and len(batch.rows.tokens) == len({tuple(row) for row in wanted}) < 8


def test_labelled_answers_are_rows(answers):
    batch = answers.batch([3, 0])
    check_rows(batch.rows, batch.ends, answers.rows, [3, 0])
    assert batch.is_good.tolist() == [False, True] and batch.n_answers == 2 and batch.numbers.tolist() == [3, 0]


def test_a_batch_moves_whole(pairs, answers):
    for batch in (pairs.batch([0, 1]).to("meta"), answers.batch([0, 1]).to("meta")):
        tensors = [each for each in vars(batch).values() if isinstance(each, torch.Tensor)]
        assert len(tensors) >= 3
        assert all(each.is_meta for each in [*tensors, batch.rows.tokens, batch.rows.targets, batch.rows.positions])


@pytest.mark.parametrize("scaling", [None, RopeScaling("dynamic", 2.0, original_context=32)])
def test_the_state_at_the_end_does_not_depend_on_the_padding(pairs, scaling):
    model = build(replace(POCKET, rope_scaling=scaling), seed=0, dtype=torch.float64)
    order = sorted(range(len(pairs)), key=lambda i: pairs.tokens_in([i]))
    together = pairs.batch([order[0], order[-1]])
    states = model.hidden(together.rows.tokens, together.rows.positions)
    for row, number in ((batch_row, 2 * order[0] + side) for side, batch_row in enumerate(together.sides[[0, 2]])):
        alone = model.hidden(torch.from_numpy(pairs.rows.document(number).astype("int64"))[None])[0, -1]
        torch.testing.assert_close(states[row, together.ends[row]], alone, rtol=0, atol=1e-12)


def test_in_order_gives_each_once(pairs, answers):
    for found, size in ((pairs, 4), (pairs, 23), (answers, 5)):
        batches = list(in_order(found, size))
        assert torch.cat([batch.numbers for batch in batches]).tolist() == list(range(23))
        assert [len(batch.numbers) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert pocket_tokenizer().bos_id == batches[0].rows.tokens[0, 0]
