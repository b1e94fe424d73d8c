"""Text in, text out, on real checkpoints and on a pocket model."""

import json
import math

import pytest
import torch

import llama2
from llama2.errors import ChatError, CheckpointError, RequestError, TokenizerError, TokenizerMissing
from llama2.infer.request import SamplingParams
from llama2.llm import LLM, sampling_defaults
from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from tests.pocket import pocket_tokenizer

POCKET = ModelConfig(32, 2, 4, 260, 48, n_kv_heads=2, context_length=128)


@pytest.fixture(scope="module")
def stories(assets):
    return llama2.load(assets / "checkpoints/stories260K/stories260K.bin", device="cpu")


@pytest.fixture(scope="module")
def pocket():
    return LLM(build(POCKET, seed=0), pocket_tokenizer())


@pytest.fixture(scope="module")
def published(assets):
    return json.loads((assets / "checkpoints/expected.json").read_text())["stories260K"][0]["expected"]


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K_v1.bin", "stories260K.gguf"])
def test_the_published_text_byte_for_byte(assets, published, name):
    llm = llama2.load(assets / "checkpoints/stories260K" / name, device="cpu")
    assert llm.generate("", max_new_tokens=200, temperature=0) == published


@pytest.mark.parametrize("to", ["hf", "meta", "gguf", "llama2c"])
def test_the_published_text_after_conversion_and_back(assets, published, tmp_path, to):
    there, back = tmp_path / "there", tmp_path / "back.bin"
    llama2.convert(assets / "checkpoints/stories260K/stories260K.bin", there, to=to)
    llama2.convert(there, back, to="llama2c")
    assert llama2.load(there, device="cpu").generate("", max_new_tokens=200, temperature=0) == published
    before = llama2.load(assets / "checkpoints/stories260K/stories260K.bin", device="cpu").model.state_dict()
    again = llama2.load(back, device="cpu")
    after = again.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    beginning = again.generate("", max_new_tokens=30, temperature=0)  # of the same bits
    assert len(beginning) > 30 and published.startswith(beginning)


def test_the_folder_and_the_q8_file_of_a_real_model_both_tell_stories(assets):
    folder = assets / "checkpoints/tinystories-656K"
    for path in (folder, folder / "TinyStories-656K-Q8_0.gguf"):
        text = llama2.load(path, device="cpu").generate("Once upon a time", max_new_tokens=40, temperature=0)
        assert text.startswith(", a little girl named Lily lived in a small house")


def test_generate_returns_the_new_text_in_the_shape_of_what_was_asked(stories):
    options = dict(max_new_tokens=8, temperature=0)
    one = stories.generate("Once upon a time", **options)
    assert one.startswith(", there was")
    assert stories.generate(["Once upon a time", "Lily"], **options)[0] == one
    assert stories.generate(["Once upon a time"], **options) == [one]
    assert stories.generate("Once upon a time", n=2, **options) == [one, one]
    assert stories.generate(["Once upon a time", "Lily"], n=2, **options)[0] == [one, one]
    assert stories.generate([], **options) == []


def test_a_seed_gives_the_same_text_alone_in_a_batch_and_as_one_of_n(stories):
    options = dict(max_new_tokens=40, temperature=1.0, seed=11)
    alone = stories.generate("The dog", **options)
    assert stories.generate(["A cat", "The dog", "One day there"], **options)[1] == alone
    several = stories.generate("The dog", n=3, **options)
    assert several[0] == alone and len(set(several)) == 3
    assert stories.generate("The dog", max_new_tokens=40, temperature=1.0, seed=12) != alone


def test_streamed_pieces_are_the_text(stories):
    options = dict(max_new_tokens=60, temperature=1.0, seed=3)
    pieces = list(stories.stream("Tim", **options))
    assert len(pieces) > 20
    assert "".join(pieces) == stories.generate("Tim", **options)


def test_streamed_bytes_are_whole_characters(pocket):
    pieces = list(pocket.stream("x", max_new_tokens=60, temperature=2.0, top_p=1.0, seed=1))
    assert "".join(pieces) == pocket.generate("x", max_new_tokens=60, temperature=2.0, top_p=1.0, seed=1)


@pytest.mark.parametrize("stop", ["Lily", ["Lily", "zzz"], [" girl", "Lily"], "named Lily. She"])
def test_stop_strings_end_the_text_and_never_leak(stories, stop):
    free = stories.generate("Once upon a time", max_new_tokens=60, temperature=0)
    stops = [stop] if isinstance(stop, str) else stop
    end = min(free.find(each) for each in stops if each in free)
    done = stories.complete("Once upon a time", max_new_tokens=60, temperature=0, stop=stop)
    assert done.text == free[:end]
    assert done.finish_reason == "stop"
    assert "".join(stories.stream("Once upon a time", max_new_tokens=60, temperature=0, stop=stop)) == free[:end]
    found = next(each for each in stops if free.find(each) == end)
    kept = dict(max_new_tokens=60, temperature=0, stop=stop, include_stop=True)
    assert stories.generate("Once upon a time", **kept) == free[: end + len(found)]
    assert "".join(stories.stream("Once upon a time", **kept)) == free[: end + len(found)]


def test_a_stop_string_that_never_comes_holds_nothing_back_in_the_end(stories):
    free = stories.generate("Once upon a time", max_new_tokens=30, temperature=0)
    stop = free[-3:] + "\x00"
    assert stories.generate("Once upon a time", max_new_tokens=30, temperature=0, stop=stop) == free


def test_stop_strings_in_a_batch_stop_only_their_own_answer(stories):
    free = stories.generate(["Once upon a time", "The dog"], max_new_tokens=40, temperature=0)
    stopped = stories.generate(["Once upon a time", "The dog"], max_new_tokens=40, temperature=0, stop="Lily")
    assert stopped == [text.split("Lily")[0] for text in free]


def test_complete_tells_everything(stories):
    done = stories.complete("Once upon a time", max_new_tokens=5, temperature=0, logprobs=2)
    assert (done.n_prompt_tokens, done.n_new_tokens, done.finish_reason) == (
        len(stories.tokenizer.encode("Once upon a time")) + 1,
        5,
        "length",
    )
    assert len(done.logprobs) == len(done.top_logprobs) == 5
    for token_id, logprob, top in zip(done.tokens, done.logprobs, done.top_logprobs, strict=True):
        assert top[0] == (token_id, logprob) and len(top) == 2 and top[1][1] <= logprob < 0
    assert done.text == stories.tokenizer.decode(done.tokens)


def test_score_is_the_models_own_probability(pocket):
    text = "hello world"
    score = pocket.score(text)
    tokens = [1, *pocket.tokenizer.encode(text)]
    with torch.no_grad():
        expected = pocket.model(torch.tensor([tokens]))[0, :-1].log_softmax(-1)
    wanted = [row[token_id].item() for row, token_id in zip(expected, tokens[1:], strict=True)]
    assert score.logprobs == pytest.approx(wanted, abs=1e-5)
    assert score.total == pytest.approx(sum(wanted), abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-sum(wanted) / len(wanted)), rel=1e-5)
    with pytest.raises(RequestError, match="at least one token"):
        pocket.score("")
    with pytest.raises(RequestError, match="128"):
        pocket.score("x" * 200)


def test_embeddings(pocket):
    vectors = pocket.embed(["a", "longer text"])
    assert vectors.shape == (2, 32)
    assert torch.equal(pocket.embed("a"), vectors[0])
    tokens = torch.tensor([[1, *pocket.tokenizer.encode("a")]])
    hidden = pocket.model.hidden(tokens)[0].detach()
    torch.testing.assert_close(vectors[0], hidden.mean(0))
    torch.testing.assert_close(pocket.embed("a", pooling="last"), hidden[-1])
    with pytest.raises(RequestError, match="pooling"):
        pocket.embed("a", pooling="max")


def test_chat_answers_a_conversation_and_its_text_begins_anew(pocket):
    messages = [{"role": "user", "content": "Hi"}]
    done = pocket.complete(messages, max_new_tokens=6, temperature=0)
    assert done.n_prompt_tokens == len(llama2.render(messages, pocket.tokenizer, add_generation_prompt=True).tokens)
    assert pocket.chat(messages, max_new_tokens=6, temperature=0) == done.text
    assert "".join(pocket.stream(messages, max_new_tokens=6, temperature=0)) == done.text


def test_what_cannot_be_asked_is_refused(pocket):
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        pocket.generate("x", temprature=1)
    with pytest.raises(RequestError, match="n > 1"):
        pocket.stream("x", n=2)
    with pytest.raises(RequestError, match="stop_ids"):
        pocket.continue_ids([1], stop="x")
    with pytest.raises(ChatError, match="generate continues a text"):
        pocket.chat("Hi")
    with pytest.raises(ChatError, match="empty"):
        pocket.chat([])
    with pytest.raises(RequestError, match="301 tokens"):
        pocket.embed("x" * 299)
    for wrong in (3, b"hi", ["a", 5]):
        with pytest.raises(RequestError, match="wanted a text"):
            pocket.generate(wrong)
    with pytest.raises(RequestError, match="whole numbers"):
        pocket.continue_ids("ab")
    with pytest.raises(RequestError, match="stop"):
        pocket.generate("x", stop="")
    with pytest.raises(RequestError, match="302 tokens .* 128"):
        pocket.generate("x" * 300)
    with pytest.raises(TokenizerError, match="surrogate"):
        pocket.generate("\udcff")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(choice=[]), "choice"),
        (dict(regex=""), "regex"),
        (dict(grammar=""), "grammar"),
        (dict(json_schema=False), "json_schema"),
        (dict(json_object="yes"), "json_object='yes'"),
        (dict(json_object=True, json_schema={}), "do not go together"),
        (dict(stop=5), "stop=5"),
        (dict(stop_ids=5), "stop_ids=5"),
    ],
)
def test_no_form_and_no_stop_is_dropped_in_silence(pocket, options, wanted):
    with pytest.raises(RequestError, match=wanted):
        pocket.generate("One", max_new_tokens=5, **options)


def test_an_empty_schema_is_any_json_and_false_is_no_form(pocket):
    for seed in range(5):
        (full,) = pocket.complete(["One"], json_schema={}, max_new_tokens=200, seed=seed)
        if full.finish_reason == "stop":
            json.loads(full.text)
    plain = pocket.generate("One", max_new_tokens=5, seed=1)
    assert pocket.generate("One", max_new_tokens=5, seed=1, json_object=False, regex=None) == plain


def test_generation_fills_the_context_and_stops(pocket):
    done = pocket.complete("x" * 100, max_new_tokens=None, temperature=0, logit_bias={5: 100.0})
    assert done.n_prompt_tokens + done.n_new_tokens == 128
    assert done.finish_reason == "length"


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, (0.6, 0.9)),
        ({"eos_token_id": 2}, (0.6, 0.9)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.95}, (0.7, 0.95)),
        ({"temperature": 0.7}, (0.7, 1.0)),
        ({"top_p": 0.5, "temperature": None}, (1.0, 0.5)),
        ({"do_sample": False}, (0.0, 0.9)),
        ({"do_sample": False, "temperature": 0.7}, (0.0, 1.0)),
    ],
)
def test_defaults_come_from_the_checkpoint_or_from_meta(generation, expected):
    params = sampling_defaults(generation)
    assert (params.temperature, params.top_p) == expected


@pytest.mark.parametrize("bad", [{"temperature": "hot"}, {"top_k": [1]}, {"temperature": -1}])
def test_broken_defaults_are_refused(bad):
    with pytest.raises(CheckpointError, match="generation_config"):
        sampling_defaults(bad)


def test_every_end_token_of_the_checkpoint_stops():
    llm = LLM(build(POCKET), pocket_tokenizer(), generation={"eos_token_id": [7, 9]})
    assert llm.stop_ids == {1, 2, 7, 9}
    with pytest.raises(CheckpointError, match="eos_token_id"):
        LLM(build(POCKET), pocket_tokenizer(), generation={"eos_token_id": "x"})


def test_a_model_without_a_tokenizer_gives_logits_and_says_what_text_needs(tmp_path):
    llama2.save(build(POCKET), tmp_path / "model")
    llm = llama2.load(tmp_path / "model", device="cpu")
    assert llm.model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 260)
    assert len(llm.continue_ids([1, 2], max_new_tokens=4)[0]) == 6
    with pytest.raises(TokenizerMissing, match="tokenizer.model"):
        llm.generate("x")


def test_a_tokenizer_of_another_model_is_refused(assets, tmp_path):
    llama2.save(build(POCKET), tmp_path / "model")
    with pytest.raises(TokenizerError, match="do not belong together"):
        llama2.load(tmp_path / "model", tokenizer=assets / "tokenizers/llama2/tokenizer.model", device="cpu")


def test_the_defaults_of_sampling_options_are_those_of_params():
    from llama2.llm import SamplingOptions
    from llama2.llm.grammar import FORMS

    fields = set(SamplingParams.__dataclass_fields__)
    assert set(SamplingOptions.__annotations__) == fields | {"stop", "include_stop", *FORMS}
