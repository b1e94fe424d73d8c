"""Every token is predicted once, and rows are full."""

import numpy as np
from hypothesis import given, strategies as st

from llama2.data.batch import IGNORE, Span, collate
from llama2.data.pack import best_fit, cut


@given(st.integers(0, 200), st.integers(1, 40), st.none() | st.integers(1, 40))
def test_every_id_but_the_first_is_predicted_once(n_ids, length, first):
    pieces = list(cut(0, 0, n_ids, length, first=first))
    predicted = [i for piece in pieces for i in range(piece.start + 1, piece.start + piece.n + 1)]
    assert predicted == list(range(1, n_ids))
    assert all(1 <= piece.n <= length for piece in pieces)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_loses_nothing_and_overfills_nothing(sizes):
    rows = best_fit(sizes, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 50 for row in rows)
    fewest = -(-sum(sizes) // 50)
    assert len(rows) <= 11 / 9 * max(fewest, sum(size > 25 for size in sizes)) + 1


def test_best_fit_takes_the_fullest_row_that_fits():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_collate_lays_out_positions_targets_and_documents():
    batch = collate([[Span(np.array([5, 6, 7])), Span(np.array([8, 9]))]], 5)
    assert batch.tokens.tolist() == [[5, 6, 8, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 9, IGNORE, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 0, 0, 1]]
    assert batch.documents is not None and batch.documents.tolist() == [[0, 0, 1, 2, 2]]
    assert batch.n_targets == 3


def test_rows_of_one_document_need_no_document_mask():
    assert collate([[Span(np.arange(4))], [Span(np.arange(3))], []], 5).documents is None
