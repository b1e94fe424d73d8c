"""A pocket model that answers noise, but always the same noise."""

from dataclasses import replace

import pytest

from llama2.llm import LLM
from llama2.model.transformer import build
from tests.pocket import POCKET, pocket_tokenizer


def opinionated(config) -> LLM:
    """Return a model with three times the usual spread of weights; with little ones all labels are equally likely."""
    model = build(config, seed=0).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data *= 3
    return LLM(model, pocket_tokenizer())


@pytest.fixture(scope="session")
def llm() -> LLM:
    return opinionated(replace(POCKET, context_length=640))


@pytest.fixture(scope="session")
def make_llm():
    return opinionated
