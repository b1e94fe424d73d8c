"""What goes wrong in one answer ends that answer: the others go on, no block stays held, and every answer ends."""

import functools
import itertools

import pytest
import torch

from llama2.errors import Llama2Error, RequestError
from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.infer.speculative import DraftModel, PromptLookup
from llama2.model.config import ModelConfig
from llama2.model.lora import add_adapter, set_active
from llama2.model.lora_config import LoraConfig
from tests.infer.test_engine import lively

SHAPE = ModelConfig(32, 2, 4, 40, 48, n_kv_heads=2, context_length=64)
PROMPT = tuple(range(1, 20))


class Failing:
    """A grammar whose matchers fail at some place."""

    def __init__(self, where: str, at: int = 0, error: Exception | None = None):
        self.where, self.at, self.error = where, at, error or RequestError("a dead end")

    def matcher(self):
        if self.where == "matcher":
            raise self.error
        return FailingMatcher(self)


class FailingMatcher:
    def __init__(self, grammar: Failing):
        self.grammar, self.n = grammar, 0

    def allowed(self):
        if self.grammar.where == "allowed" and self.n >= self.grammar.at:
            raise self.grammar.error
        return torch.ones(SHAPE.vocab_size, dtype=torch.bool)

    def advance(self, token_id: int) -> None:
        self.n += 1
        if self.grammar.where == "advance" and self.n > self.grammar.at:
            raise self.grammar.error


def run(engine: Engine, *requests: Request, n_steps: int = 2000):
    """Return each answer's events; fail where they do not end."""
    for each in requests:
        engine.add(each)
    found = {(each.id, index): [] for each in requests for index in range(each.params.n_written)}
    for _ in range(n_steps):
        if engine.is_idle:
            break
        for token in engine.step():
            found[token.request_id, token.index].append(token)
    assert engine.is_idle and engine.stats.n_blocks_held == 0, "answers that do not end"
    assert all(events[-1].finish_reason for events in found.values())
    return found


def ids(events):
    return [each.id for each in events if each.id is not None]


@pytest.mark.parametrize("drafter", [None, "lookup"])
@pytest.mark.parametrize("where", ["allowed", "advance"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_grammar_that_fails_ends_its_own_answer_only(where, at, drafter):
    model = lively(SHAPE)
    usual = dict(max_new_tokens=12, seed=3, temperature=1.0)
    good = [
        Request("good", PROMPT, SamplingParams(n=2, **usual)),
        Request("beams", PROMPT, SamplingParams(beam_width=3, max_new_tokens=6)),
    ]
    engine = Engine(model, drafter=PromptLookup(min_ngram=1) if drafter else None)
    bad = Request("bad", PROMPT, SamplingParams(n=2, grammar=Failing(where, at), **usual))
    found = run(engine, good[0], bad, good[1])
    for index in range(2):
        last = found["bad", index][-1]
        assert last.finish_reason == "abort" and last.error == "a dead end" and last.id is None
        assert len(ids(found["bad", index])) == at
    alone = run(Engine(model), *good)
    assert {key: ids(events) for key, events in alone.items()} == {
        key: ids(events) for key, events in found.items() if key[0] != "bad"
    }
    assert engine.stats.n_aborted == 2


def test_of_other_errors_than_ours_the_kind_is_told_and_not_the_words():
    bad = Request("bad", PROMPT, SamplingParams(grammar=Failing("allowed", error=KeyError("what a user said"))))
    (event,) = run(Engine(lively(SHAPE)), bad)["bad", 0]
    assert event.error == "the grammar failed: KeyError"


def test_a_grammar_that_cannot_begin_leaves_nothing_behind():
    engine = Engine(lively(SHAPE))
    with pytest.raises(RequestError, match="dead end"):
        engine.add(Request("bad", PROMPT, SamplingParams(n=3, grammar=Failing("matcher"))))
    assert engine.is_idle


def test_generate_raises_what_ended_an_answer():
    engine = Engine(lively(SHAPE))
    with pytest.raises(Llama2Error, match="a dead end"):
        engine.generate([Request("bad", PROMPT, SamplingParams(grammar=Failing("allowed", 2)))])
    assert engine.is_idle and engine.stats.n_blocks_held == 0


@pytest.mark.parametrize("width", [0, 3])
def test_where_bias_leaves_no_token_the_answer_ends_with_an_error(width):
    bias = {token_id: float("-inf") for token_id in range(SHAPE.vocab_size)}
    params = SamplingParams(logit_bias=bias, beam_width=width)
    found = run(Engine(lively(SHAPE)), Request("bad", PROMPT, params), Request("good", PROMPT))
    assert "no token" in found["bad", 0][-1].error and not found["good", 0][-1].error


def test_numbers_that_are_not_finite_end_the_answers_that_they_are_in():
    """As where 16 bits are too few for one prompt: token 39 spoils what it stands in, and nothing else."""
    model = lively(SHAPE)
    params = SamplingParams(n=2, max_new_tokens=20, seed=1, temperature=1.0, logit_bias={39: -99})
    good = Request("good", PROMPT, params)
    alone = run(Engine(model), good)
    with torch.no_grad():
        model.tok_embeddings.weight[39] = float("nan")
    engine = Engine(model)
    bad = [Request(f"bad{n}", (*PROMPT, *(39,) * n), SamplingParams(max_new_tokens=20)) for n in (1, 14)]
    bad.append(Request("beams", (*PROMPT, 39), SamplingParams(max_new_tokens=20, beam_width=3, n=2)))
    found = run(engine, bad[0], good, *bad[1:])
    assert all("not finite" in events[-1].error for key, events in found.items() if key[0] != "good")
    assert {key: ids(events) for key, events in alone.items()} == {
        key: ids(events) for key, events in found.items() if key[0] == "good"
    }
    after = run(engine, good)
    assert [ids(each) for each in after.values()] == [ids(each) for each in alone.values()]


@functools.cache
def beams_and_others():
    """A model, what is asked of it, and what it answers where there is room enough."""
    model = lively(SHAPE)
    first, last = (Request(f"{n}", PROMPT[: 5 + n], SamplingParams(n=2, max_new_tokens=9, seed=n)) for n in range(2))
    requests = (first, Request("beams", PROMPT, SamplingParams(beam_width=8, n=3, max_new_tokens=12)), last)
    return model, requests, run(Engine(model), *requests)


TIGHT = list(itertools.product((32, 48, 96), (8, 2048), (1, 2, 8)))
EVERY_DAY = {(32, 8, 1), (32, 2048, 8), (48, 8, 2), (48, 2048, 1), (96, 8, 8), (96, 2048, 2)}
"""One batch size for each cache and each step, and each of them twice; the others are run by make test-slow."""


@pytest.mark.parametrize(
    ("cache_tokens", "max_step_tokens", "max_batch"),
    [pytest.param(*each, marks=[] if each in EVERY_DAY else pytest.mark.slow) for each in TIGHT],
)
def test_beams_end_however_small_the_cache(cache_tokens, max_step_tokens, max_batch):
    """Hypotheses that wait for others give up their blocks, so that these can be read."""
    model, requests, free = beams_and_others()
    engine = Engine(model, cache_tokens=cache_tokens, max_step_tokens=max_step_tokens, max_batch=max_batch)
    tight = run(engine, *requests)
    assert {key: ids(events) for key, events in tight.items()} == {key: ids(events) for key, events in free.items()}


def test_where_there_are_fewer_texts_than_asked_for_every_answer_still_ends():
    model = lively(ModelConfig(32, 2, 4, 4, 48, n_kv_heads=2, context_length=32))
    found = run(Engine(model), Request("a", (1, 2), SamplingParams(beam_width=9, n=9, max_new_tokens=1)))
    assert [bool(events[-1].error) for events in found.values()] == [False] * 4 + [True] * 5
    assert "4 texts" in found["a", 8][-1].error


def test_guesses_of_some_do_not_keep_others_waiting():
    class Eager:
        def propose(self, sequence):
            return [1, 2, 3, 4, 5, 6]

        def forget(self, sequence):
            pass

    engine = Engine(lively(SHAPE), drafter=Eager(), max_batch=4, max_step_tokens=8)
    for n in range(4):
        engine.add(Request(str(n), (1, 2 + n), SamplingParams(max_new_tokens=30, seed=n)))
    assert {token.request_id for token in engine.step()} == {*"0123"}
    assert {token.request_id for token in engine.step()} == {*"0123"}
    assert engine.stats.n_drafted


@pytest.mark.parametrize("how", ["lookup", "model", "short model"])
def test_guesses_near_the_end_of_the_context_change_nothing(how):
    model = lively(SHAPE)
    shorter = ModelConfig(32, 2, 4, 40, 48, n_kv_heads=2, context_length=24)
    drafter = PromptLookup(min_ngram=1) if how == "lookup" else DraftModel(lively(shorter if "short" in how else SHAPE))
    bias = {5: 4.0, 6: 4.0}  # repeats itself
    usual = dict(max_new_tokens=None, n=2, logit_bias=bias, min_tokens=3)
    requests = [Request(str(n), (5, 6) * (16 + n), SamplingParams(seed=n, **usual)) for n in range(8)]
    engine = Engine(model, drafter=drafter, cache_tokens=160)
    with_guesses = run(engine, *requests)
    assert engine.stats.n_drafted > 20 or how == "short model"
    without = run(Engine(model), *requests)
    assert {key: ids(events) for key, events in with_guesses.items()} == {
        key: ids(events) for key, events in without.items()
    }


def test_a_draft_model_guesses_for_adapters_too():
    model = lively(SHAPE)
    add_adapter(model, LoraConfig(r=2), name="poet")
    set_active(model, ())
    requests = [Request(name, PROMPT, SamplingParams(seed=1, max_new_tokens=9), adapter=name) for name in ("poet",)]
    found = run(Engine(model, drafter=DraftModel(lively(SHAPE))), *requests)
    assert {key: ids(each) for key, each in found.items()} == {
        key: ids(each) for key, each in run(Engine(model), *requests).items()
    }


def test_every_answer_that_is_kept_knows_what_its_prompt_was_worth():
    params = SamplingParams(n=2, best_of=5, seed=2, temperature=1.0, max_new_tokens=4, prompt_logprobs=1)
    answers = Engine(lively(SHAPE)).generate([Request("a", PROMPT, params)])[0]
    assert all(len(each.prompt_logprobs or ()) == len(PROMPT) - 1 for each in answers)
    assert answers[0].prompt_logprobs == answers[1].prompt_logprobs


def test_beams_are_counted():
    engine = Engine(lively(SHAPE))
    found = run(engine, Request("a", PROMPT, SamplingParams(beam_width=3, n=2, max_new_tokens=5)))
    assert engine.stats.n_new_tokens == sum(len(ids(each)) for each in found.values())
    assert engine.stats.n_prompt_tokens == len(PROMPT)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(beam_width=2, logprobs=3), "beam_width"),
        (dict(ignore_eos=True, grammar=Failing("")), "ignore_eos"),
        (dict(stop_ids=5), "stop_ids=5"),
        (dict(logit_bias=[1]), "logit_bias="),
        (dict(dry_breaker_ids="ab"), "dry_breaker_ids"),
        (dict(ignore_eos=1), "ignore_eos=1"),
    ],
)
def test_what_does_not_go_together_is_refused(options, wanted):
    with pytest.raises(RequestError, match=wanted):
        SamplingParams(**options)
