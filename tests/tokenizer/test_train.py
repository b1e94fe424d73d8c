"""Training a vocabulary the way Llama 2's was."""

import pytest

from llama2.data.storyworld.stories import stories
from llama2.errors import TokenizerError
from llama2.tokenizer.formats import load_tokenizer, save_tokenizer
from llama2.tokenizer.train import train_tokenizer
from llama2.tokenizer.vocabulary import BYTE, CONTROL, UNKNOWN

TEXTS = [each.text(language) for each in stories(0, 400) for language in ("en", "es", "zh")]
ODD = ["  two  spaces ", "12345 6.78", "line\nbreak\ttab", "\U0001f600 \u4f60\u597d caf\u00e9 \u0416", ""]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, vocab_size=1000)


def test_the_vocabulary_is_laid_out_as_llama_2s(trained):
    vocabulary = trained.vocabulary
    assert trained.n_vocab == 1000
    assert vocabulary.pieces[:4] == ("<unk>", "<s>", "</s>", "<0x00>")
    assert vocabulary.types[:3] == (UNKNOWN, CONTROL, CONTROL) and set(vocabulary.types[3:259]) == {BYTE}
    assert (vocabulary.unk_id, trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2, None)
    assert vocabulary.add_dummy_prefix and not vocabulary.remove_extra_spaces


@pytest.mark.parametrize("text", [*TEXTS[:6], *ODD])
def test_text_survives(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_digits_stand_alone_and_words_do_not(trained):
    pieces = [trained.vocabulary.pieces[i] for i in trained.encode("20 Mia the forest")]
    assert pieces[:3] == ["\u2581", "2", "0"] and "\u2581the" in pieces
    assert not any(len(p) > 1 and any(c.isdigit() for c in p) for p in trained.vocabulary.pieces[259:])


def test_characters_alone(trained):
    chars = train_tokenizer(TEXTS, vocab_size=1000, kind="char")
    assert {len(piece) for piece in chars.vocabulary.pieces[259:]} == {1}
    assert [chars.vocabulary.pieces[i] for i in chars.encode("Mia")] == ["\u2581", "M", "i", "a"]
    assert chars.decode(chars.encode(TEXTS[2])) == TEXTS[2]
    assert chars.n_vocab < trained.n_vocab


def test_threads_do_not_change_it(trained):
    one = train_tokenizer(TEXTS, vocab_size=1000, n_threads=1)
    assert one.vocabulary.pieces == trained.vocabulary.pieces


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_what_is_saved_reads_back_alike(tmp_path, kind):
    tokenizer = train_tokenizer(TEXTS, vocab_size=800, kind=kind)
    for format in ("model", "json", "bin"):
        save_tokenizer(tokenizer, tmp_path / format, format=format)
        again = load_tokenizer(tmp_path / format)
        assert all(again.encode(text) == tokenizer.encode(text) for text in [*TEXTS[:60], *ODD])


def test_a_long_line_is_not_dropped():
    learnt = train_tokenizer(["zq" * 20_000], vocab_size=275)
    assert "zq" in learnt.vocabulary.pieces


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(texts=TEXTS, vocab_size=259), "vocab_size=259"),
        (dict(texts=TEXTS, vocab_size=1 << 30), "vocab_size"),
        (dict(texts=TEXTS[:3], vocab_size=50_000), "too high"),
        (dict(texts=TEXTS, vocab_size=1000, kind="words"), "words"),
        (dict(texts=[], vocab_size=300), "no text"),
        (dict(texts=["\n\n"], vocab_size=300), "no text"),
        (dict(texts=["\udcff"], vocab_size=300), "surrogate"),
    ],
)
def test_what_cannot_be_learnt_is_refused(arguments, said):
    with pytest.raises(TokenizerError, match=said):
        train_tokenizer(**arguments)
