"""Shards come back as they were written, and a damaged set is refused by name."""

import json

import numpy as np
import pytest

from llama2.data.shards import ShardWriter, open_shards
from llama2.errors import DataError


def test_documents_come_back(make_set):
    shards = make_set(31)
    rng = np.random.default_rng(0)
    documents = [np.concatenate([[1], rng.integers(3, 259, rng.integers(1, 60)), [2]]) for _ in range(31)]
    expected = documents[0::2] + documents[1::2]
    assert len(shards) == 31 and shards.n_tokens == sum(map(len, documents))
    assert all((shards.document(i) == expected[i]).all() for i in range(31))
    assert shards.tokenizer().n_vocab == shards.n_vocab == 260


def test_a_failure_leaves_no_shard(tmp_path):
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, "00000", dtype=np.dtype("<u2")) as writer:
        writer.add([1, 2], 1)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def truncate(folder):
    path = folder / "00001.tokens"
    path.write_bytes(path.read_bytes()[:-2])


def rename(folder):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = "../00000"
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "does not hold"),
        (rename, "outside its folder"),
        (lambda folder: (folder / "00000.lengths").unlink(), "00000.lengths is missing"),
        (lambda folder: (folder / "index.json").write_text("{"), "is broken"),
        (lambda folder: (folder / "index.json").write_text('{"format": "other"}'), "version 1"),
        (lambda folder: (folder / "index.json").unlink(), "llama2 prepare"),
    ],
)
def test_a_damaged_set_is_refused(make_set, damage, said):
    folder = make_set(9).folder
    damage(folder)
    with pytest.raises(DataError, match=said):
        open_shards(folder)
