"""A small shard set of random documents."""

import numpy as np
import pytest

from llama2.data.shards import ShardWriter, open_shards, token_dtype, write_index
from tests.pocket import pocket_tokenizer


def write_set(folder, documents, n_shards=2):
    tokenizer, entries = pocket_tokenizer(), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_shards):
        with ShardWriter(folder, f"{i:05}", dtype=token_dtype(tokenizer.n_vocab)) as writer:
            for ids in documents[i::n_shards]:
                writer.add(ids, len(ids))
        entries.append(writer.entry)
    write_index(folder, tokenizer, entries)
    return open_shards(folder)


@pytest.fixture
def make_set(tmp_path):
    """Return a function that writes n documents of random ids, the first of each its own number."""

    def make(n, *, longest=60, name="set", seed=0):
        rng = np.random.default_rng(seed)
        documents = [np.concatenate([[1], rng.integers(3, 259, rng.integers(1, longest)), [2]]) for _ in range(n)]
        return write_set(tmp_path / name, documents)

    return make
