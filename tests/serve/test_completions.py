"""Texts and token ids continued over the wire."""

import json
import os

import openai
import pytest


def ask(client, prompt="One", **options):
    return client.completions.create(
        **{"model": "pocket", "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
    )


def streamed(client, prompt="One", **options):
    """Return what the chunks add up to, by index: text, finish reason, lists of log-probabilities."""
    found: dict[int, list] = {}
    for chunk in ask(client, prompt, stream=True, **options):
        for choice in chunk.choices:
            entry = found.setdefault(choice.index, ["", None, {}])
            entry[0] += choice.text
            entry[1] = choice.finish_reason or entry[1]
            for name, values in choice.logprobs or ():
                entry[2].setdefault(name, []).extend(values)
    return [found[index] for index in sorted(found)]


def test_texts_ids_and_lists_of_them(client, pocket):
    expected = pocket.generate(["One", "Two"], max_new_tokens=12, temperature=0)
    ids = [pocket.prompt_ids("One"), pocket.prompt_ids("Two")]
    assert ask(client, "One").choices[0].text == expected[0]
    assert ask(client, ids[0]).choices[0].text == expected[0]
    for prompt in (["One", "Two"], ids):
        whole = ask(client, prompt)
        assert [choice.text for choice in whole.choices] == expected
        assert [choice.index for choice in whole.choices] == [0, 1]
        assert [text for text, _, _ in streamed(client, prompt)] == expected
        assert whole.usage.prompt_tokens == sum(map(len, ids))


def test_n_of_each_prompt(client, pocket):
    options = {"temperature": 1.5, "seed": 3, "n": 2}
    expected = pocket.generate(["One", "Two"], max_new_tokens=12, **options)
    assert [choice.text for choice in ask(client, ["One", "Two"], **options).choices] == [*expected[0], *expected[1]]
    assert [text for text, _, _ in streamed(client, ["One", "Two"], **options)] == [*expected[0], *expected[1]]


def test_the_best_of_several_are_the_likeliest_per_token(client, pocket):
    written = pocket.complete("One", max_new_tokens=12, temperature=1.5, seed=3, n=5, logprobs=0)
    ranked = sorted(written, key=lambda each: -sum(each.logprobs) / len(each.logprobs))
    found = ask(client, temperature=1.5, seed=3, n=2, best_of=5)
    assert [choice.text for choice in found.choices] == [each.text for each in ranked[:2]]
    assert found.usage.completion_tokens == sum(each.n_new_tokens for each in written)


def test_sixteen_tokens_unless_asked_otherwise(client):
    assert ask(client, max_tokens=None, extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_echo_and_logprobs_judge_a_given_text(client, pocket):
    text = "hello world"
    score = pocket.score(text)
    whole = ask(client, text, echo=True, logprobs=2, max_tokens=3).choices[0]
    pieces, _, lists = streamed(client, text, echo=True, logprobs=2, max_tokens=3)[0]
    assert (pieces, lists) == (whole.text, whole.logprobs.model_dump())
    assert pieces.startswith(text)
    assert len(lists["tokens"]) == len(score.tokens) + 1 + 3  # the beginning of sequence, and what was written
    assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
    assert lists["token_logprobs"][1:-3] == pytest.approx(score.logprobs, abs=1e-5)
    assert all(len(top) in (2, 3) for top in lists["top_logprobs"][1:])
    assert lists["text_offset"][:4] == [0, 0, 0, 1] and lists["text_offset"][-3] == len(text)
    assert lists["text_offset"] == sorted(lists["text_offset"])


def test_echo_alone(client, pocket):
    assert ask(client, "One", echo=True).choices[0].text == "One" + pocket.generate(
        "One", max_new_tokens=12, temperature=0
    )
    assert ask(client, "One", echo=True, max_tokens=0).choices[0].text == "One"
    assert ask(client, "One", echo=True, max_tokens=0, logprobs=1).choices[0].logprobs.token_logprobs[0] is None
    assert streamed(client, "One", echo=True)[0][0].startswith("One")


def test_the_written_token_of_a_judged_text_is_there_even_if_it_ends_the_text(client, pocket):
    eos = str(pocket.tokenizer.eos_id)
    found = ask(client, [1, 70, 71], echo=True, logprobs=1, max_tokens=1, logit_bias={eos: 100}).choices[0]
    assert len(found.logprobs.token_logprobs) == 4 and found.logprobs.tokens[-1] == "</s>"


def test_streamed_logprobs_are_the_whole_ones(client):
    options = {"logprobs": 1, "temperature": 1.5, "seed": 2}
    whole = ask(client, **options).choices[0]
    text, reason, lists = streamed(client, **options)[0]
    assert (text, reason, lists) == (whole.text, whole.finish_reason, whole.logprobs.model_dump())


def test_beam_search(client, pocket):
    expected = pocket.generate("One", max_new_tokens=8, beam_width=3, n=2)
    found = ask(client, max_tokens=8, n=2, extra_body={"beam_width": 3})
    assert [choice.text for choice in found.choices] == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"suffix": "end"},
        {"best_of": 2, "n": 3},
        {"best_of": 2, "stream": True},
        {"logprobs": 21},
        {"prompt": []},
        {"prompt": [[1, 2], []]},
        {"prompt": [1, -1]},
        {"prompt": [1, 260]},
        {"prompt": [1, "a"]},
        {"prompt": None},
        {"prompt": {"text": "x"}},
        {"max_tokens": 0},
        {"n": 128},
    ],
)
def test_what_cannot_be_asked_is_a_bad_request(client, wrong):
    with pytest.raises(openai.BadRequestError):
        ask(client, **wrong)


@pytest.mark.slow
def test_lm_eval_reads_the_same_numbers_over_the_wire_as_in_process(assets, monkeypatch):
    """In process is transformers, on the same weights."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    api_models = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tests.serve.conftest import serving

    path = str(assets / "checkpoints/tinystories-656K")
    pairs = [
        ("Once upon a time", ", there was a little girl"),
        ("The dog", " was happy."),
        ("She", " xyz"),
        ("", "Lily"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with serving(models=(f"stories={path}",)) as server:
        same = dict(tokenizer=path, tokenizer_backend="huggingface", add_bos_token=True)
        api = api_models.LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="stories", **same)
        wire = api.loglikelihood(requests, disable_tqdm=True)
    model = HFLM(pretrained=path, device="cpu", dtype="float32", add_bos_token=True)
    own = model.loglikelihood(requests, disable_tqdm=True)
    for (a, is_greedy_a), (b, is_greedy_b) in zip(wire, own, strict=True):
        assert a == pytest.approx(b, abs=1e-3) and is_greedy_a == is_greedy_b


def test_the_answer_is_json_whatever_the_tokens_are(client):
    found = ask(client, temperature=2.0, seed=1, max_tokens=60, logprobs=3, extra_body={"ignore_eos": True})
    assert len(found.choices[0].logprobs.tokens) == 60 and json.dumps(found.model_dump())
