"""Beam search against exhaustive search."""

import itertools

import pytest
import torch

from llama2.errors import RequestError
from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.model.config import ModelConfig
from tests.infer.test_engine import lively

TINY = ModelConfig(32, 2, 4, 4, 48, n_kv_heads=2, context_length=32)
PROMPT = (1, 2, 0)


def logprob(model, tokens) -> float:
    with torch.no_grad():
        rows = model(torch.tensor([[*PROMPT, *tokens]]))[0].log_softmax(-1)
    return sum(float(rows[len(PROMPT) - 1 + i, each]) for i, each in enumerate(tokens))


def every_text(model, n_tokens: int, stop: int | None, length_penalty: float):
    """Yield (score, tokens, reason) of all answers of up to n_tokens tokens."""
    for n in range(n_tokens + 1):
        for tokens in itertools.product([each for each in range(4) if each != stop], repeat=n):
            if n == n_tokens:
                yield logprob(model, tokens) / n**length_penalty, tokens, "length"
            elif stop is not None:
                yield logprob(model, (*tokens, stop)) / (n + 1) ** length_penalty, tokens, "stop"


@pytest.mark.parametrize("stop", [None, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_with_enough_beams_it_is_exhaustive_search(stop, length_penalty):
    model = lively(TINY, dtype=torch.float64)
    stops = () if stop is None else (stop,)
    params = SamplingParams(
        max_new_tokens=3, beam_width=64, n=5, stop_ids=stops, length_penalty=length_penalty, logprobs=0
    )
    found = Engine(model).generate([Request("a", PROMPT, params)])[0]
    expected = sorted(every_text(model, 3, stop, length_penalty), key=lambda each: -each[0])[:5]
    assert [(each.tokens, each.finish_reason) for each in found] == [(tokens, why) for _, tokens, why in expected]


def test_one_beam_is_greedy_search_and_others_go_on_beside_it():
    model = lively(ModelConfig(32, 2, 4, 40, 48, n_kv_heads=2, context_length=64))
    greedy = Request("greedy", PROMPT, SamplingParams(max_new_tokens=20, temperature=0.0))
    beam = Request("beam", PROMPT, SamplingParams(max_new_tokens=20, beam_width=1))
    wide = Request("wide", PROMPT, SamplingParams(max_new_tokens=20, beam_width=5, n=2, logprobs=0))
    engine = Engine(model, cache_tokens=160, max_batch=8)  # with preemption
    one, two, three = engine.generate([greedy, beam, wide])
    assert one[0].tokens == two[0].tokens
    assert engine.stats.n_blocks_held == 0
    alone = Engine(model).generate([wide])[0]
    assert [each.tokens for each in three] == [each.tokens for each in alone]
    assert sum(alone[0].logprobs) >= sum(alone[1].logprobs)
    with torch.no_grad():
        rows = model(torch.tensor([[*PROMPT, *one[0].tokens]]))[0].log_softmax(-1)
    greedy_total = sum(float(rows[2 + i, each]) for i, each in enumerate(one[0].tokens))
    assert sum(alone[0].logprobs) >= greedy_total - 1e-4


def test_a_beam_search_can_be_aborted():
    engine = Engine(lively(TINY))
    engine.add(Request("a", PROMPT, SamplingParams(max_new_tokens=9, beam_width=4)))
    engine.step()
    engine.step()
    engine.abort("a")
    assert engine.is_idle and engine.stats.n_blocks_held == 0 and engine.step() == []


def test_what_does_not_go_with_beams_is_refused():
    with pytest.raises(RequestError, match="best_of"):
        SamplingParams(beam_width=4, best_of=4)
    with pytest.raises(RequestError, match="beam_width=2 must be"):
        SamplingParams(beam_width=2, n=3)
