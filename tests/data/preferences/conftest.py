"""Sets of storyworld pairs and of labelled answers."""

import pytest

from llama2.data.preferences.pair import Labelled, Pair
from llama2.data.preferences.sets import collect_labelled, collect_pairs
from llama2.data.storyworld.preferences import preferences
from tests.pocket import pocket_tokenizer


def world_pairs(n: int, *, per_prompt: int = 1) -> list[Pair]:
    return [
        Pair(f"world:{i}", each.prompt, each.chosen, each.rejected, each.rating, is_safety=each.kind == "safe")
        for i, each in enumerate(preferences(0, n, per_prompt=per_prompt))
    ]


def world_labelled(n: int) -> list[Labelled]:
    """Every other answer is a good one."""
    return [
        Labelled(each.where, each.prompt, each.rejected if i % 2 else each.chosen, i % 2 == 0)
        for i, each in enumerate(world_pairs(n))
    ]


@pytest.fixture(scope="session")
def pairs():
    return collect_pairs(world_pairs(23), pocket_tokenizer(), name="world", length=4096)


@pytest.fixture(scope="session")
def crowded():
    """Four pairs about each of twelve prompts."""
    return collect_pairs(world_pairs(48, per_prompt=4), pocket_tokenizer(), name="world", length=4096)


@pytest.fixture(scope="session")
def answers():
    return collect_labelled(world_labelled(23), pocket_tokenizer(), name="world", length=4096)
