"""Speculation changes no text and no distribution, and stops where it does not pay."""

import pytest
import torch

from llama2.infer.engine import Engine
from llama2.infer.request import Request, SamplingParams
from llama2.infer.sequence import Sequence
from llama2.infer.speculative import DraftModel, PromptLookup, Speculation
from llama2.model.config import ModelConfig
from tests.infer.test_engine import lively

SHAPE = ModelConfig(32, 2, 4, 12, 48, n_kv_heads=2, context_length=128)


def test_prompt_lookup_finds_what_followed_the_longest_copy_of_the_end():
    sequence = Sequence(Request("a", (1,)), 0, 0, [1, 2, 3, 9, 8, 1, 5, 2, 3, 7, 1, 2, 3])
    assert PromptLookup(n_draft=3, max_ngram=3).propose(sequence) == [9, 8, 1]
    assert PromptLookup(n_draft=3, max_ngram=2).propose(sequence) == [7, 1, 2]
    sequence.ids = [1, 2, 3, 4]
    assert PromptLookup().propose(sequence) == []


@pytest.mark.parametrize("how", [pytest.param("draft model", marks=pytest.mark.slow), "prompt lookup"])
def test_the_distribution_of_sampled_texts_passes_a_chi_square_test(how):
    """Thousands of draws of three tokens with guesses, against the exact probabilities of the model."""
    model = lively(SHAPE)
    with torch.no_grad():
        model.output.weight.mul_(0.15)  # so that many texts are likely
    prompt, n = (1, 2, 3, 4, 1, 2, 3, 4, 1, 2), 4000 if how == "prompt lookup" else 1000
    drafter = PromptLookup(min_ngram=1) if how == "prompt lookup" else DraftModel(lively(SHAPE, seed=4), n_draft=2)
    engine = Engine(model, max_batch=256, drafter=drafter, batch_invariant=False)
    params = [SamplingParams(max_new_tokens=3, temperature=1.0, top_p=1.0, seed=seed) for seed in range(n)]
    done = engine.generate([Request(str(i), prompt, each) for i, each in enumerate(params)])
    assert engine.stats.n_drafted > 500
    counts = torch.zeros(12, 12)
    for (each,) in done:
        counts[each.tokens[1], each.tokens[2]] += 1
    expected = torch.zeros(12, 12, dtype=torch.float64)
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].double().softmax(-1)
        for a in range(12):
            second = model(torch.tensor([[*prompt, a]]))[0, -1].double().softmax(-1)
            rows = torch.stack([torch.tensor([*prompt, a, b]) for b in range(12)])
            third = model(rows)[:, -1].double().softmax(-1)
            expected += first[a] * second[:, None] * third
    expected *= n
    often = expected > 5
    chi2 = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    chi2 += float((counts[~often].sum() - expected[~often].sum()) ** 2 / expected[~often].sum().clamp(min=1e-9))
    degrees = int(often.sum())
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


def test_guesses_of_the_model_itself_all_come_true():
    model = lively(SHAPE)
    engine = Engine(model, drafter=DraftModel(model, n_draft=3), batch_invariant=False)
    request = Request("a", (1, 2, 3), SamplingParams(max_new_tokens=40, temperature=1.0, top_p=1.0, seed=5))
    engine.generate([request])
    assert engine.stats.n_accepted == engine.stats.n_drafted > 0


def test_it_is_turned_off_where_it_costs_and_tried_again_later():
    speculation = Speculation(PromptLookup())
    modes = []
    for _ in range(200):
        with speculation.timed():
            modes.append(speculation.is_on)
            speculation._n_tokens = 1
        speculation.seconds[True], speculation.seconds[False] = 2.0, 1.0  # guessing costs twice as much
    assert sum(modes[8:64]) == 0 and modes[:4] == [True] * 4
    assert any(modes[64:72])  # a second look


def test_greedy_text_with_prompt_lookup_takes_fewer_steps():
    model = lively(SHAPE)
    params = SamplingParams(max_new_tokens=80, temperature=0.0)
    plain, quick = Engine(model), Engine(model, drafter=PromptLookup(min_ngram=1))
    quick.speculation._decide = lambda: True
    request = Request("a", (1, 2, 3, 1, 2, 3), params)
    assert plain.generate([request])[0][0].tokens == quick.generate([request])[0][0].tokens
    assert quick.n_steps < plain.n_steps
