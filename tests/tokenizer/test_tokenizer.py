"""Encoding against published ids, decoding against the reference libraries, streams against the whole."""

import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from llama2.errors import TokenizerError
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.tokenizer import StreamDecoder, Tokenizer

LLAMA2_IDS = {
    "": [],
    "Hello world": [15043, 3186],
    "Hello, world!": [15043, 29892, 3186, 29991],
    " Hello": [29871, 15043],
    "Hello ": [15043, 29871],
    "  ": [1678],
    "    x": [268, 921],
    "\n": [29871, 13],
    "1234567890": [29871, 29896, 29906, 29941, 29946, 29945, 29953, 29955, 29947, 29929, 29900],
    "\u4f60\u597d\uff0c\u4e16\u754c": [29871, 30919, 31076, 30214, 30793, 30967],
    "F\u00fchrer": [383, 4000, 261],
    "\U0001f999": [29871, 243, 162, 169, 156],
    "\U0001f600": [29871, 243, 162, 155, 131],
    "\uc548\ub155": [29871, 31734, 238, 136, 152],
    "\u00e9": [904],
    "e\u0301": [321, 30103],
    "\x00": [29871, 3],
    "\u3000": [29871, 30358],
    "na\u00efve caf\u00e9": [1055, 30085, 345, 274, 28059],
    "\u041f\u0440\u0438\u0432\u0435\u0442": [7203, 7616],
    "<s>": [529, 29879, 29958],
    "</s>": [1533, 29879, 29958],
    "<0x41>": [529, 29900, 29916, 29946, 29896, 29958],
    "\u2581": [259],
    "I'm": [306, 29915, 29885],
    "The quick brown fox jumps over the lazy dog.": [
        450, 4996, 17354, 1701, 29916, 432, 17204, 975, 278, 17366, 11203, 29889,
    ],
    "def f(x):\n    return x+1\n": [822, 285, 29898, 29916, 1125, 13, 1678, 736, 921, 29974, 29896, 13],
    "I believe the meaning of life is": [306, 4658, 278, 6593, 310, 2834, 338],
    "Simply put, the theory of relativity states that ": [
        3439, 17632, 1925, 29892, 278, 6368, 310, 14215, 537, 5922, 393, 29871,
    ],
    "ied 4 \u00bd months": [474, 287, 29871, 29946, 29871, 30226, 7378],
    "w048 7tuijk dsdfhu": [281, 29900, 29946, 29947, 29871, 29955, 9161, 13535, 18031, 2176, 6905],
    "3333": [29871, 29941, 29941, 29941, 29941],
    "C\u1eeda Vi\u1ec7t": [315, 228, 190, 176, 29874, 10630, 30529, 29873],
}  # fmt: skip
LLAMA3_IDS = {
    "": [],
    "Hello world": [9906, 1917],
    " Hello": [22691],
    "Hello, world!": [9906, 11, 1917, 0],
    "\u4f60\u597d\uff0c\u4e16\u754c": [57668, 53901, 3922, 102616],
    "\U0001f999": [9468, 99, 247],
    "\n\n": [271],
    "1234567890": [4513, 10961, 16474, 15],
    "I'm": [40, 2846],
    "I'M": [40, 28703],
    "    x": [262, 865],
    "user": [882],
    "assistant": [78191],
    "system": [9125],
    "ipython": [23799, 4690],
}


@pytest.fixture(scope="module")
def llama2(assets) -> Tokenizer:
    return load_tokenizer(assets / "tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="module")
def llama2_json(assets) -> Tokenizer:
    return load_tokenizer(assets / "tokenizers/llama2/hf_tokenizer.json")


@pytest.fixture(scope="module")
def llama3(assets) -> Tokenizer:
    return load_tokenizer(assets / "tokenizers/llama3")


def test_llama2_ids_are_the_published_ones(llama2, llama2_json):
    for text, ids in LLAMA2_IDS.items():
        assert llama2.encode(text) == ids, text
        assert llama2_json.encode(text) == ids, text


def test_llama3_ids_are_the_published_ones(llama3):
    for text, ids in LLAMA3_IDS.items():
        assert llama3.encode(text) == ids, text
    wanted = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert llama3.encode("This is a test sentence.", bos=True, eos=True) == wanted


def test_special_ids(llama2, llama3):
    assert (llama2.n_vocab, llama2.bos_id, llama2.eos_id, llama2.pad_id) == (32000, 1, 2, None)
    assert llama2.special_tokens == {"<s>": 1, "</s>": 2}
    assert (llama3.n_vocab, llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128256, 128000, 128001, 128004)
    assert llama3.special_tokens["<|eot_id|>"] == 128009


def test_text_becomes_a_special_token_only_when_asked(llama2, llama2_json, llama3):
    for tokenizer in (llama2, llama2_json, llama3):
        specials = set(tokenizer.special_tokens.values())
        for name, token_id in tokenizer.special_tokens.items():
            for text in (name, f"x{name}y", f"\n{name}\n", name * 2):
                assert not specials & set(tokenizer.encode(text)), name
            assert token_id in tokenizer.encode(f"a{name}b", special=True)


def test_special_names_cut_the_text(llama2, llama2_json, llama3):
    for tokenizer in (llama2, llama2_json):
        assert tokenizer.encode("<s>Hello</s>", special=True) == [1, 15043, 2]
        assert tokenizer.encode("Hello</s>Hello", special=True) == [15043, 2, 15043]
    text = "<|begin_of_text|>Hello world<|eot_id|>"
    assert llama3.encode(text, special=True) == [128000, 9906, 1917, 128009]


def test_wrong_text_and_ids_are_refused(llama2, llama3):
    for tokenizer in (llama2, llama3):
        for text in ("\ud800", "a\udfffb", b"bytes", None, 3):
            with pytest.raises(TokenizerError):
                tokenizer.encode(text)
        for token_id in (-1, tokenizer.n_vocab, 10**9):
            with pytest.raises(TokenizerError, match="outside the vocabulary"):
                tokenizer.decode([token_id])
            with pytest.raises(TokenizerError):
                tokenizer.token_bytes(token_id)


def test_long_runs_take_no_quadratic_time(llama2, llama3):
    for tokenizer in (llama2, llama3):
        for text in (" " * 200_000, "a" * 200_000, "\n" * 50_000):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_equals_sentencepiece_on_any_ids(llama2, assets):
    from sentencepiece import SentencePieceProcessor

    for path in ("tokenizers/llama2/tokenizer.model", "checkpoints/stories260K/tok512.model"):
        reference = SentencePieceProcessor(model_file=str(assets / path))
        tokenizer = load_tokenizer(assets / path)
        rng = random.Random(0)
        for _ in range(3000):
            common = [0, 1, 2, 13, 35, 29871, 259, *rng.choices(range(3, 259), k=8), rng.randrange(tokenizer.n_vocab)]
            ids = [i for i in rng.choices(common, k=rng.randrange(12)) if i < tokenizer.n_vocab]
            if "tok512" in path:
                # this file spells its sign for unknown text as backslashes and digits, by mistake
                ids = [i for i in ids if i != 0]
            assert tokenizer.decode(ids) == reference.DecodeIds(ids), ids


def test_decode_spaces(llama2):
    assert llama2.decode([15043, 3186]) == "Hello world"
    assert llama2.decode([29871, 15043]) == " Hello"
    assert llama2.decode([13, 15043]) == "\n Hello"
    assert llama2.decode([1, 15043, 2]) == "Hello"
    assert llama2.decode([1, 15043, 2], special=True) == "<s> Hello</s>"


def test_byte_level_decoding_equals_python(llama3):
    rng = random.Random(1)
    for _ in range(500):
        ids = rng.choices([*range(256), 9468, 99, 247, 128009, rng.randrange(128000)], k=10)
        data = b"".join(llama3.token_bytes(i) for i in ids if i < 128000)
        assert llama3.decode(ids) == data.decode("utf-8", errors="replace")


def test_decoding_equals_the_tokenizers_library(llama2_json, llama3, assets):
    from tokenizers import Tokenizer as Reference

    from llama2.tokenizer.document import to_json

    for tokenizer in (llama2_json, llama3):
        reference = Reference.from_str(to_json(tokenizer.vocabulary).decode())
        for text in [*LLAMA2_IDS, "caf\u00e9 \U0001f999  x\n\n y "]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == reference.decode(ids), text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
def test_round_trip_and_stream(llama2, llama3, text, prompt):
    text, prompt = text.replace("\u2581", ""), prompt.replace("\u2581", "")
    for tokenizer in (llama2, llama3):
        ids, before = tokenizer.encode(text), tokenizer.encode(prompt, bos=True)
        assert tokenizer.decode(ids) == text
        decoder = StreamDecoder(tokenizer, before)
        pushed = [decoder.push(i) for i in ids]
        assert "\ufffd" not in "".join(pushed).replace("\ufffd", "", text.count("\ufffd"))
        whole = "".join(pushed) + decoder.flush()
        assert whole == tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.one_of(st.integers(0, 300), st.sampled_from([13, 29871, 15043, 228, 190])), max_size=20))
def test_a_stream_of_any_ids_is_the_whole(llama2, llama3, ids):
    for tokenizer in (llama2, llama3):
        decoder = StreamDecoder(tokenizer)
        assert "".join([decoder.push(i) for i in ids]) + decoder.flush() == tokenizer.decode(ids)


def test_a_stream_waits_for_the_whole_character(llama2, llama3):
    decoder = StreamDecoder(llama2)
    assert [decoder.push(i) for i in (29871, 243, 162, 169, 156)] == ["", "", "", "", "\U0001f999"]
    decoder = StreamDecoder(llama3)
    assert [decoder.push(i) for i in (9468, 99, 247)] == ["", "", "\U0001f999"]
    decoder.push(9468)
    assert decoder.flush() == "\ufffd"


def test_a_stream_keeps_the_space_after_a_prompt(llama2):
    prompt = llama2.encode("Say", bos=True)
    assert StreamDecoder(llama2, prompt).push(15043) == " Hello"
    assert StreamDecoder(llama2, [1]).push(15043) == "Hello"


def test_token_bytes_add_up_to_the_text(llama2, llama3):
    for tokenizer, prefix in ((llama2, " "), (llama3, "")):
        for text in LLAMA2_IDS:
            if text and "\u2581" not in text:
                joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text))
                assert joined.decode() == prefix + text
    assert llama2.token_bytes(1) == b"<s>" and llama2.token_bytes(13) == b"\n"
