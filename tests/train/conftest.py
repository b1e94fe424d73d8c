"""A small shard set of stories in bytes, and the settings of a tiny run."""

import pytest

from llama2.data.shards import ShardWriter, token_dtype, write_index
from llama2.data.storyworld.stories import stories
from llama2.train.config import PretrainConfig
from tests.plots import no_plots, report  # noqa: F401
from tests.pocket import pocket_tokenizer


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """60 stories to train on, 10 held out."""
    folder, tokenizer = tmp_path_factory.mktemp("shards"), pocket_tokenizer()
    for place, split, n in ((folder, "train", 60), (folder / "heldout", "heldout", 10)):
        place.mkdir(exist_ok=True)
        with ShardWriter(place, "00000", dtype=token_dtype(tokenizer.n_vocab)) as writer:
            for story in stories(0, n, split=split):
                text = story.text("en")
                writer.add(tokenizer.encode(text, bos=True, eos=True), len(text.encode()))
        write_index(place, tokenizer, [writer.entry])
    return folder


TINY = dict(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, sequence_length=48, batch_size=8, learning_rate=1e-2, device="cpu",
    eval_tokens=2_000, sample_tokens=4, max_steps=12, timeout_s=60.0,
)  # fmt: skip


@pytest.fixture
def settings(shards, tmp_path):
    """Return a function that makes a PretrainConfig of a tiny run in a new folder."""

    def make(name="run", **changes):
        values = {**TINY, "data": (shards,), "out": tmp_path / name, **changes}
        return PretrainConfig(**{key: value for key, value in values.items() if value is not None})

    return make
