"""Filters against worked numbers, draws against their distribution."""

import math

import numpy as np
import pytest
import torch

from llama2.errors import RequestError
from llama2.infer.request import SamplingParams
from llama2.infer.sampling import choose, filtered, penalise, repetitions, uniforms

PLAIN = dict(temperature=1.0, top_p=1.0)


def distribution(p, **options):
    """Return the filtered distribution in the vocabulary's own order."""
    logits = torch.tensor([p], dtype=torch.float64).log()
    probabilities, ids = filtered(logits, [SamplingParams(**{**PLAIN, **options})])
    return torch.zeros_like(probabilities).scatter(1, ids, probabilities)[0].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(top_p=0.81), [0.526315789, 0.315789474, 0.157894737, 0]),
        (dict(top_p=0.79), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.01), [1, 0, 0, 0]),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_k=100), [0.5, 0.3, 0.15, 0.05]),
        (dict(min_p=0.29), [0.526315789, 0.315789474, 0.157894737, 0]),
        (dict(min_p=1.0), [1, 0, 0, 0]),
        (dict(top_k=3, top_p=0.53), [0.625, 0.375, 0, 0]),  # top-p sees what top-k left: 0.526 + ...
        (dict(temperature=0.5), [0.684931507, 0.246575342, 0.061643836, 0.006849315]),
        (dict(), [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_filters(options, expected):
    assert distribution([0.5, 0.3, 0.15, 0.05], **options) == pytest.approx(expected, abs=1e-9)


def test_filters_find_the_likeliest_wherever_they_stand():
    assert distribution([0.05, 0.5, 0.15, 0.3], top_k=2) == pytest.approx([0, 0.625, 0, 0.375], abs=1e-9)


def test_rows_have_parameters_of_their_own():
    logits = torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.float64).log()
    rows = [SamplingParams(**PLAIN, top_k=1), SamplingParams(**PLAIN), SamplingParams(temperature=1.0, top_p=0.6)]
    p, _ = filtered(logits, rows)
    assert p.tolist() == [pytest.approx([1, 0, 0]), pytest.approx([0.5, 0.3, 0.2]), pytest.approx([0.625, 0.375, 0])]


def test_a_tiny_temperature_does_not_overflow():
    p, ids = filtered(torch.tensor([[1e4, -1e4, 9e3]]), [SamplingParams(temperature=1e-6, top_p=1.0)])
    assert p.tolist() == [[1.0, 0.0, 0.0]] and ids[0, 0] == 0


def test_penalties():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={3: 1.5})
    out = penalise(logits, params, prompt=[0], answer=[1, 1, 3])
    # 0: 2/2. 1: -2*2 - 0.25 - 2*0.5. 2: unseen. 3: (0.5 + 1.5)/2 - 0.25 - 0.5
    assert out.tolist() == pytest.approx([1.0, -5.25, 1.0, 0.25])
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5]


def test_temperature_zero_takes_the_first_of_the_likeliest():
    assert choose(
        torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 0.0]]), [SamplingParams(temperature=0)] * 2, [0.9, 0.9]
    ) == [
        1,
        0,
    ]


def test_draws_follow_the_distribution():
    p = [0.5, 0.3, 0.15, 0.05]
    n = 20_000
    logits = torch.tensor(p, dtype=torch.float64).log().expand(n, -1)
    drawn = choose(logits, [SamplingParams(**PLAIN)] * n, uniforms([(7, 0, step) for step in range(n)]))
    for token_id, probability in enumerate(p):
        spread = 4 * math.sqrt(probability * (1 - probability) / n)
        assert drawn.count(token_id) / n == pytest.approx(probability, abs=spread)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.999999, 1 - 2**-53])
def test_a_dropped_token_is_never_drawn(u):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    kept = logits.argsort(descending=True)[:, :3]
    drawn = choose(logits, [SamplingParams(temperature=1.0, top_p=1.0, top_k=3)] * 64, [u] * 64)
    assert all(token_id in row for token_id, row in zip(drawn, kept.tolist(), strict=True))


def test_uniforms_are_those_of_numpys_philox():
    for seed, index, step in [(0, 0, 0), (-1, 3, 7), (2**63 + 5, 12, 4095), (7, 2**31, 2**20)]:
        key, counter = np.array([seed % 2**64, index], np.uint64), np.array([step, 0, 0, 0], np.uint64)
        word = int(np.random.Philox(key=key, counter=counter).random_raw())
        assert uniforms([(seed, index, step)]) == [(word >> 11) * 2.0**-53]


def test_uniforms_depend_on_seed_answer_and_step_alone():
    keys = [(seed, index, step) for seed in (0, 1, -1) for index in (0, 1) for step in range(50)]
    numbers = uniforms(keys)
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert [uniforms([key])[0] for key in keys] == numbers and uniforms([]) == []
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    "bad",
    [
        dict(max_new_tokens=0),
        dict(max_new_tokens=2.5),
        dict(temperature="1"),
        dict(temperature=None),
        dict(top_k=2.5),
        dict(seed="x"),
        dict(n=1.5),
        dict(n=True),
        dict(logit_bias={"a": 1.0}),
        dict(stop_ids=("</s>",)),
        dict(temperature=-1),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(top_p=0),
        dict(top_p=1.1),
        dict(top_k=-1),
        dict(min_p=2),
        dict(repetition_penalty=0),
        dict(presence_penalty=math.inf),
        dict(frequency_penalty=math.nan),
        dict(logit_bias={1: math.nan}),
        dict(logit_bias={1: math.inf}),
        dict(n=0),
        dict(logprobs=101),
    ],
)
def test_impossible_parameters_are_refused_by_name(bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_typical_sampling_keeps_what_is_nearest_to_the_expected_surprise():
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    # entropy 1.2206; surprises 0.693, 1.609, 1.609, 2.303: distances 0.53, 0.39, 0.39, 1.08
    kept, ids = filtered(p.log(), [SamplingParams(temperature=1.0, top_p=1.0, typical_p=0.3)])
    assert dict(zip(ids[0].tolist(), kept[0].tolist(), strict=True)) == pytest.approx({0: 0, 1: 0.5, 2: 0.5, 3: 0})
    kept, _ = filtered(p.log(), [SamplingParams(temperature=1.0, top_p=1.0, typical_p=0.5)])
    assert kept[0].tolist() == pytest.approx([0.5 / 0.9, 0.2 / 0.9, 0.2 / 0.9, 0])
    drawn = {
        choose(p.log(), [SamplingParams(temperature=1.0, top_p=1.0, typical_p=0.3)], [u / 10])[0] for u in range(10)
    }
    assert drawn == {1, 2}


def test_dry_finds_the_longest_repetition_that_a_token_would_go_on_with():
    assert repetitions([1, 2, 3, 4, 1, 2, 3], set()) == {4: 3}
    assert repetitions([9, 2, 3, 5, 1, 2, 3, 4, 1, 2, 3], set()) == {4: 3, 5: 2}
    assert repetitions([1, 2, 3, 4, 1, 2, 3], {2}) == {4: 1}
    assert repetitions([1, 2, 3], {3}) == {} and repetitions([], set()) == {}


def test_dry_grows_with_the_repetition_beyond_what_is_allowed():
    params = SamplingParams(dry_multiplier=0.8, dry_base=2.0, dry_allowed_length=2)
    found = penalise(torch.zeros(10), params, [1, 2, 3, 4], [1, 2, 3])
    assert found.tolist() == pytest.approx([0, 0, 0, 0, -0.8 * 2, 0, 0, 0, 0, 0])  # a repetition of three


def test_no_stop_id_before_min_tokens():
    params = SamplingParams(min_tokens=2, stop_ids=(3,))
    assert penalise(torch.zeros(5), params, [1], [1])[3] == float("-inf")
    assert penalise(torch.zeros(5), params, [1], [1, 1])[3] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(typical_p=0.0), "typical_p=0.0 must be above 0"),
        (dict(min_tokens=9, max_new_tokens=8), "min_tokens=9 must be 0 to max_new_tokens"),
        (dict(best_of=2, n=3), "best_of=2 must be from n"),
        (dict(dry_base=0.5), "dry_base=0.5 must be at least 1"),
        (dict(prompt_logprobs=1000), "prompt_logprobs=1000 must be from 0"),
        (dict(grammar="a"), "grammar='a' must be a Grammar"),
    ],
)
def test_impossible_options_of_the_engine_are_refused(options, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**options)


def test_sorting_the_likeliest_only_keeps_the_same_tokens():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 500:600] = logits[:, :100]  # with ties
    kinds = [
        dict(top_p=0.9),
        dict(top_k=50),
        dict(min_p=0.05),
        dict(top_p=0.5, top_k=7),
        dict(top_k=900),
        dict(typical_p=0.5),
    ]
    params = [SamplingParams(**{"temperature": 0.8, "top_p": 1.0, **kinds[i % 6]}) for i in range(64)]
    for i, each in enumerate(params):
        row = logits[i : i + 1]
        whole, whole_ids = filtered(row, [each])
        some, some_ids = filtered(row, [each], n_candidates=128)
        n = int((whole > 0).sum())
        kept = torch.zeros(2, 1000).scatter(1, torch.cat([whole_ids, whole_ids]), torch.cat([whole, whole]))[0]
        again = torch.zeros(1, 1000).scatter(1, some_ids, some)[0]
        assert int((some > 0).sum()) == n and torch.allclose(kept, again, atol=1e-6)
    draws = [i / 64 for i in range(64)]
    together = choose(logits, params, draws)
    assert together == [choose(logits[i : i + 1], [params[i]], [draws[i]])[0] for i in range(64)]
