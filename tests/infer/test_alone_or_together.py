"""A request's tokens do not depend on company, arrival, cache, chunks, preemption or speculation: bit for bit."""

import functools
import random

import pytest
import torch

from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.infer.speculative import DraftModel, PromptLookup
from llama2.model.config import ModelConfig, RopeScaling
from llama2.model.transformer import build
from tests.infer.test_engine import lively

SHAPES = {
    "grouped": ModelConfig(32, 2, 4, 40, 48, n_kv_heads=2, context_length=160),
    "window": ModelConfig(32, 2, 4, 40, 48, n_kv_heads=1, context_length=160, sliding_window=21),
    "yarn": ModelConfig(32, 2, 4, 40, 48, context_length=160, rope_scaling=RopeScaling("yarn", 2.0, 80)),
}
WAYS = {
    "crowd": dict(),
    "without prefix cache": dict(prefix_cache=False),
    "chunks of 7": dict(max_step_tokens=7, max_batch=5),
    "preemption": dict(cache_tokens=144),
    "chunks and preemption": dict(max_step_tokens=9, max_batch=6, cache_tokens=112),
    "prompt lookup": dict(drafter=PromptLookup(n_draft=5, min_ngram=1)),
}


def requests_of(n: int, n_new: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 60 tokens, a third of them with a common beginning; greedy and sampled; some with n = 3."""
    rng, common = random.Random(seed), tuple(random.Random(5).randrange(40) for _ in range(37))
    found = []
    for i in range(n):
        start = common if i % 3 == 0 else ()
        prompt = start + tuple(rng.randrange(40) for _ in range(rng.randint(1, 23)))
        how = dict(temperature=0.0) if i % 2 else dict(temperature=1.0, top_p=0.95, seed=i)
        if i % 5 == 4:
            how |= dict(repetition_penalty=1.1, frequency_penalty=0.2, top_k=10, min_tokens=3, stop_ids=(7,))
        found.append(
            Request(str(i), prompt, SamplingParams(max_new_tokens=n_new, n=1 + 2 * (i % 7 == 3), logprobs=2, **how))
        )
    return found


def drip(engine: Engine, requests: list[Request], seed: int = 0):
    """Let requests arrive at random while others are being answered; return the tokens and log-probabilities."""
    rng, left = random.Random(seed), list(requests)
    found: dict[tuple[str, int], list] = {}
    while left or not engine.is_idle:
        for _ in range(rng.choice((0, 0, 1, 2))):
            if left:
                engine.add(left.pop(0))
        for event in engine.step():
            found.setdefault((event.request_id, event.index), []).append((event.id, event.logprob, event.top_logprobs))
    assert engine.stats.n_blocks_held == 0
    return found


@functools.cache
def model_and_answers(shape: str):
    """A model, some requests, and what it answers to each alone."""
    model = lively(SHAPES[shape])
    requests = requests_of(9, 16)
    return model, requests, alone(model, requests)


def alone(model, requests: list[Request], **options):
    found = {}
    for request in requests:
        found |= drip(Engine(model, batch_invariant=True, prefix_cache=False, **options), [request])
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_and_log_probabilities_are_the_same_bit_for_bit(way, shape):
    model, requests, expected = model_and_answers(shape)
    engine = Engine(model, batch_invariant=True, **{"max_batch": 16, **WAYS[way]})
    assert drip(engine, requests) == expected
    if "preemption" in way:
        assert engine.stats.n_preempted > 0
    if way == "prompt lookup":
        assert engine.stats.n_accepted > 0
    if way == "crowd":
        assert engine.stats.n_cached_tokens > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_model_changes_no_bit(dtype):
    model = lively(SHAPES["grouped"], dtype=dtype)
    draft = lively(SHAPES["grouped"], seed=0, dtype=dtype)
    with torch.no_grad():
        draft.layers[1].feed_forward.w2.weight.mul_(0.5)  # like the model, but not the same
    requests = requests_of(6, 20)
    engine = Engine(model, batch_invariant=True, drafter=DraftModel(draft))
    assert drip(engine, requests) == alone(model, requests)
    assert 0 < engine.stats.n_accepted < engine.stats.n_drafted
    assert not engine.speculation.drafter.known  # nothing is left of answers that are over


def test_bfloat16_is_the_same_bit_for_bit_when_asked_for():
    model = lively(SHAPES["grouped"], dtype=torch.bfloat16)
    requests = requests_of(8, 16)
    expected = alone(model, requests)
    for options in (dict(), dict(max_step_tokens=11, max_batch=6, cache_tokens=128)):
        assert drip(Engine(model, batch_invariant=True, **options), requests) == expected


def test_the_plain_model_chooses_the_same_tokens():
    """No cache and no batch: the whole sequence anew for every token."""
    model = build(SHAPES["grouped"], dtype=torch.float64)
    requests = [each for each in requests_of(8, 12) if each.params.temperature == 0]
    for request in requests:
        ids = list(request.prompt)
        params = request.params
        if params.repetition_penalty != 1:
            continue
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        done = Engine(model).generate([request])[0][0]
        assert list(done.tokens) == ids[len(request.prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_over_ten_thousand_tokens(way, dtype):
    model = lively(ModelConfig(64, 3, 4, 300, 96, n_kv_heads=2, context_length=512), dtype=dtype)
    requests = requests_of(32, 300, seed=1)
    options = {"max_batch": 16, **WAYS[way]}
    if "cache_tokens" in options:
        options["cache_tokens"] *= 8
    together = drip(Engine(model, batch_invariant=True, **options), requests)
    assert sum(map(len, together.values())) > 10_000
    assert together == alone(model, requests)
