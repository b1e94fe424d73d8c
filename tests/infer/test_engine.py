"""Cached, batched and ragged answering against the plain model."""

import pytest
import torch

from llama2.errors import ConfigError, Llama2Error, QueueFull, RequestError
from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.model.config import ModelConfig, RopeScaling
from llama2.model.lora import add_adapter, set_active
from llama2.model.lora_config import LoraConfig
from llama2.model.transformer import build

CONFIGS = {
    "grouped": ModelConfig(32, 2, 4, 40, 48, n_kv_heads=2, context_length=64),
    "window": ModelConfig(32, 2, 4, 40, 48, n_kv_heads=1, context_length=64, sliding_window=5),
    "yarn": ModelConfig(32, 2, 4, 40, 48, context_length=64, rope_scaling=RopeScaling("yarn", 2.0, 16)),
}
GREEDY = dict(temperature=0.0)


def lively(config, seed=0, dtype=torch.float32):
    """A model whose logits are far apart, so that sampling has something to choose from."""
    model = build(config, seed=seed, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def greedy_by_hand(model, prompt, n_tokens):
    """Feed the whole sequence anew for every token: no cache, no batch."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def answer(model, prompt, max_batch=32, **options):
    return Engine(model, max_batch=max_batch).generate([Request("r", tuple(prompt), SamplingParams(**options))])[0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_decode_equals_the_uncached_model(config):
    model = lively(config, dtype=torch.float64)
    for prompt in ([1], [1, 5, 7], list(range(20))):
        expected = greedy_by_hand(model, prompt, 12)
        assert answer(model, prompt, max_new_tokens=12, **GREEDY)[0].tokens == expected


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_ragged_batch_equals_each_prompt_alone(config):
    model = lively(config)
    prompts = [tuple((7 * i + j) % 40 for j in range(1 + 3 * i % 17)) for i in range(9)]
    params = [SamplingParams(max_new_tokens=3 + i, seed=i, temperature=1.0, top_p=0.95) for i in range(9)]
    requests = [Request(str(i), prompt, params[i]) for i, prompt in enumerate(prompts)]
    alone = [Engine(model).generate([request])[0][0].tokens for request in requests]
    assert list(map(len, alone)) == [3 + i for i in range(9)]
    for max_batch in (1, 3, 32):
        together = Engine(model, max_batch=max_batch).generate(requests)
        assert [each[0].tokens for each in together] == alone, max_batch


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_dynamic_rope_turns_by_each_prompts_own_length(batch_invariant):
    model = lively(ModelConfig(32, 2, 4, 40, 48, context_length=64, rope_scaling=RopeScaling("dynamic", 4.0, 8)))
    params = SamplingParams(max_new_tokens=1, logprobs=1, **GREEDY)
    requests = [Request(str(n), tuple(range(1, n)), params) for n in (12, 40)]
    together = Engine(model, batch_invariant=batch_invariant).generate(requests)
    for request, (done,) in zip(requests, together, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([request.prompt]))[0, -1].log_softmax(-1)
        assert done.logprobs[0] == pytest.approx(expected[done.tokens[0]].item(), abs=1e-4)


@pytest.mark.slow
def test_tokens_do_not_depend_on_the_crowd_over_ten_thousand_tokens():
    model = lively(ModelConfig(64, 3, 4, 300, 96, n_kv_heads=2, context_length=512))
    params = [SamplingParams(max_new_tokens=320, seed=i, temperature=1.0, top_p=1.0) for i in range(32)]
    requests = [Request(str(i), tuple(range(1, 2 + i)), params[i]) for i in range(32)]
    together = Engine(model).generate(requests)
    assert sum(each[0].n_new_tokens for each in together) == 10_240
    alone = Engine(model, max_batch=1).generate(requests)
    assert [each[0].tokens for each in together] == [each[0].tokens for each in alone]


def test_n_answers_have_streams_of_their_own_and_equal_single_draws():
    model = lively(CONFIGS["grouped"])
    options = dict(max_new_tokens=10, seed=3, temperature=1.0, top_p=1.0)
    five = answer(model, [1, 2, 3], n=5, **options)
    assert len({each.tokens for each in five}) > 1
    assert [each.index for each in five] == [0, 1, 2, 3, 4]
    assert answer(model, [1, 2, 3], n=5, max_batch=2, **options) == five
    assert answer(model, [1, 2, 3], **options)[0] == five[0]


def test_stop_ids_end_the_answer_and_are_not_part_of_it():
    model = lively(CONFIGS["grouped"])
    free = answer(model, [1, 2], max_new_tokens=12, **GREEDY)[0]
    assert free.finish_reason == "length"
    stop = free.tokens[5]
    first = free.tokens.index(stop)
    stopped = answer(model, [1, 2], max_new_tokens=12, stop_ids=(stop,), **GREEDY)[0]
    assert stopped.tokens == free.tokens[:first]
    assert stopped.finish_reason == "stop"


def test_the_contexts_end_ends_the_answer():
    model = lively(CONFIGS["grouped"])
    full = answer(model, range(30), max_new_tokens=None, **GREEDY)[0]
    assert full.n_prompt_tokens + full.n_new_tokens == 64
    assert full.finish_reason == "length"


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers():
    model = lively(CONFIGS["grouped"])
    with pytest.raises(RequestError, match="64 tokens .* 64"):
        answer(model, [1] * 64)
    assert answer(model, [1] * 63, max_new_tokens=5)[0].n_new_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([40], {}, "token 40"),
        ([-1], {}, "token -1"),
        ([1], dict(logit_bias={99: 1.0}), "99"),
        ([1], dict(stop_ids=(40,)), "stop_ids names token 40"),
    ],
)
def test_impossible_requests_are_refused(prompt, options, message):
    with pytest.raises(RequestError, match=message):
        answer(lively(CONFIGS["grouped"]), prompt, **options)


def test_logprobs_are_the_models_own():
    model = lively(CONFIGS["grouped"], dtype=torch.float64)
    done = answer(model, [1, 2], max_new_tokens=6, seed=0, temperature=0.7, top_k=3, logprobs=4)[0]
    tokens = [1, 2, *done.tokens]
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0, 1:-1].log_softmax(-1)
    assert done.logprobs is not None and done.top_logprobs is not None
    for row, token_id, logprob, top in zip(expected, done.tokens, done.logprobs, done.top_logprobs, strict=True):
        assert logprob == pytest.approx(row[token_id].item(), abs=1e-9)
        assert [token_id for token_id, _ in top] == row.topk(4).indices.tolist()
        assert [value for _, value in top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-9)


def test_logit_bias_can_force_and_forbid():
    model = lively(CONFIGS["grouped"])
    free = answer(model, [1], max_new_tokens=1, **GREEDY)[0].tokens[0]
    assert answer(model, [1], max_new_tokens=3, logit_bias={9: 1e4}, **GREEDY)[0].tokens == (9, 9, 9)
    forbidden = answer(model, [1], max_new_tokens=1, logit_bias={free: float("-inf")}, **GREEDY)[0]
    assert forbidden.tokens[0] != free


def test_abort_leaves_the_others_undisturbed():
    model = lively(CONFIGS["grouped"])
    params = SamplingParams(max_new_tokens=20, seed=1, temperature=1.0, top_p=1.0)
    requests = [Request(name, (1, 2, ord(name) % 40), params) for name in "abcde"]
    expected = {name: Engine(model).generate([request])[0][0] for name, request in zip("abcde", requests, strict=True)}
    engine = Engine(model, max_batch=4)  # e waits
    for request in requests:
        engine.add(request)
    seen: dict[str, list[int]] = {name: [] for name in "abcde"}
    for step in range(40):
        for token in engine.step():
            seen[token.request_id].append(token.id or 0)
        if step == 3:
            engine.abort("b")
            engine.abort("nobody")
    assert seen.pop("b") == list(expected.pop("b").tokens[:4])
    assert {name: tuple(tokens) for name, tokens in seen.items()} == {
        name: each.tokens for name, each in expected.items()
    }
    assert engine.is_idle and engine.step() == [] and engine.stats.n_blocks_held == 0


def test_leaving_a_stream_early_frees_the_engine():
    engine = Engine(lively(CONFIGS["grouped"]))
    stream = engine.stream([Request("a", (1,), SamplingParams(max_new_tokens=20))])
    next(stream)
    stream.close()
    assert engine.is_idle and engine.stats.n_blocks_held == 0


def test_broken_weights_are_reported_and_do_not_poison_the_next_request():
    model = lively(CONFIGS["grouped"])
    good = answer(model, [1, 2], max_new_tokens=4, **GREEDY)[0]
    engine = Engine(model)
    kept = model.norm.weight.detach().clone()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(Llama2Error, match="not finite"):
        engine.generate([Request("a", (5, 6, 7), SamplingParams(max_new_tokens=4))])
    with torch.no_grad():
        model.norm.weight.copy_(kept)
    again = engine.generate([Request("b", (1, 2), SamplingParams(max_new_tokens=4, **GREEDY))])[0][0]
    assert again.tokens == good.tokens


def test_an_engine_answers_with_the_weights_as_they_are_now():
    """As alignment does: train, sample, train; what was read with older weights must not be found again."""
    model = lively(CONFIGS["grouped"])
    engine = Engine(model, max_batch=2)
    request = Request("a", tuple(range(1, 40)), SamplingParams(max_new_tokens=10, temperature=0.0, logprobs=0))
    before = engine.generate([request])[0][0]
    assert engine.generate([request])[0][0].n_cached == 32
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.05)
    after = engine.generate([request])[0][0]
    assert after.n_cached == 0 and after.logprobs != before.logprobs
    assert after == Engine(model).generate([request])[0][0]


def test_a_full_queue_is_refused_and_nothing_of_the_request_stays():
    engine = Engine(lively(CONFIGS["grouped"]), max_batch=1, max_waiting=2)
    params = SamplingParams(max_new_tokens=3)
    engine.add(Request("a", (1,), params))
    engine.add(Request("b", (1,), params))
    with pytest.raises(QueueFull, match="2 answers wait already, at most 2 may"):
        engine.add(Request("c", (1,), params))
    seen = set()
    while not engine.is_idle:
        seen |= {event.request_id for event in engine.step()}
    assert seen == {"a", "b"}


def test_a_request_that_no_cache_could_hold_is_refused_with_both_numbers():
    engine = Engine(lively(CONFIGS["grouped"]), cache_tokens=32)
    with pytest.raises(RequestError, match="may need 43 tokens of cache, and there is room for 32"):
        engine.add(Request("a", (1, 2, 3), SamplingParams(max_new_tokens=40)))


def test_best_of_keeps_the_likeliest_answers():
    model = lively(CONFIGS["grouped"])
    options = dict(max_new_tokens=6, seed=3, temperature=1.0, top_p=1.0, logprobs=0)
    every = answer(model, [1, 2, 3], n=6, **options)
    kept = answer(model, [1, 2, 3], n=2, best_of=6, **options)
    ranked = sorted(every, key=lambda each: -sum(each.logprobs) / len(each.logprobs))
    assert [each.tokens for each in kept] == [each.tokens for each in ranked[:2]]
    assert [each.index for each in kept] == [0, 1]


def test_prompt_logprobs_are_those_of_the_plain_model_whatever_the_chunks():
    model, prompt = lively(CONFIGS["grouped"]), tuple(range(1, 38))
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=2, temperature=0.0)
    with torch.no_grad():
        rows = model(torch.tensor([prompt]))[0].log_softmax(-1)
    engine = Engine(model, max_step_tokens=7, max_batch=2)
    for _ in range(2):  # the second time the prompt is in the cache
        found = engine.generate([Request("a", prompt, params)])[0][0].prompt_logprobs
        assert len(found) == len(prompt) - 1
        for at, (logprob, top) in enumerate(found):
            assert logprob == pytest.approx(float(rows[at, prompt[at + 1]]), abs=1e-4)
            assert top[0][0] == int(rows[at].argmax()) and len(top) == 2


def test_ignore_eos_goes_on_and_a_grammar_forbids_what_it_does_not_know():
    model = lively(CONFIGS["grouped"])
    free = answer(model, [1, 2], max_new_tokens=12, **GREEDY)[0]
    through = answer(model, [1, 2], max_new_tokens=12, stop_ids=(free.tokens[3],), ignore_eos=True, **GREEDY)[0]
    assert through.tokens == free.tokens
    limited = answer(model, [1, 2], max_new_tokens=9, stop_ids=(39,), grammar=OddThenEnd(), **GREEDY)[0]
    assert limited.finish_reason == "stop" and len(limited.tokens) == 5
    assert all(token_id % 2 for token_id in limited.tokens)


class OddThenEnd:
    """Five odd tokens, then the end, 39."""

    def matcher(self):
        return OddThenEndMatcher()


class OddThenEndMatcher:
    def __init__(self):
        self.n = 0

    def allowed(self):
        ids = torch.arange(40)
        return (ids % 2 == 1) & (ids < 39) if self.n < 5 else ids == 39

    def advance(self, token_id):
        assert token_id % 2
        self.n += 1


def test_adapters_are_chosen_by_request_and_do_not_mix():
    model = lively(CONFIGS["grouped"])
    prompt, params = tuple(range(1, 20)), SamplingParams(max_new_tokens=8, **GREEDY)
    base = Engine(model).generate([Request("base", prompt, params)])[0][0].tokens
    expected = {None: base}
    for seed, name in enumerate(("one", "two")):
        add_adapter(model, LoraConfig(r=4), name=name, seed=seed)
        with torch.no_grad():
            for where, weight in model.named_parameters():
                if f"lora_b.{name}" in where:
                    weight.normal_(generator=torch.Generator().manual_seed(seed))
    model.eval()
    for name in ("one", "two"):
        set_active(model, name)
        expected[name] = Engine(model).generate([Request("x", prompt, params)])[0][0].tokens
    set_active(model, ())
    assert len({*expected.values()}) == 3
    names = [None, "one", "two", "one", None, "two"]
    requests = [Request(str(i), prompt, params, adapter=name) for i, name in enumerate(names)]
    found = Engine(model, max_batch=4).generate(requests)
    assert [each[0].tokens for each in found] == [expected[name] for name in names]
    with pytest.raises(ConfigError, match="no adapter 'three'"):
        Engine(model).add(Request("x", prompt, params, adapter="three"))
