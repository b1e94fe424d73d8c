"""New pieces in an old vocabulary: they are used, and what the old one knew stays as it was."""

from dataclasses import replace

import pytest

from llama2.data.storyworld.stories import stories
from llama2.errors import TokenizerError
from llama2.tokenizer.extend import extended, find_pieces, merge, old_ids
from llama2.tokenizer.formats import load_tokenizer, save_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.train import train_tokenizer
from llama2.tokenizer.vocabulary import CHAR_OF_BYTE, CONTROL, NORMAL, SPACE, Vocabulary

ENGLISH = [each.text("en") for each in stories(0, 200)]
SPANISH = [each.text("es") for each in stories(0, 300)]
CHINESE = [each.text("zh") for each in stories(0, 300)]
ODD = [
    "",
    " ",
    "  two  spaces ",
    "12345 6.78",
    "line\nbreak\ttab",
    "\U0001f600 caf\u00e9 \u0416\u98ce",
    "<s></s>",
    "\x00",
]


@pytest.fixture(scope="module")
def old():
    return train_tokenizer(ENGLISH, vocab_size=600)


@pytest.fixture(scope="module", params=["model", "json"])
def source(request, old, tmp_path_factory):
    """The same vocabulary as it comes from either file."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tokenizer(old, folder, format=request.param)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pieces(old):
    return find_pieces(old, [*SPANISH, *CHINESE], n_pieces=400)


@pytest.fixture(scope="module")
def new(source, pieces):
    return extended(source, pieces)


def test_old_ids_keep_their_pieces_and_new_ones_follow(old, new, pieces):
    n = old.n_vocab
    assert new.n_vocab == n + len(pieces) == n + 400
    assert new.vocabulary.pieces == (*old.vocabulary.pieces, *pieces)
    assert set(new.vocabulary.types[n:]) == {NORMAL}
    merged = [i for i in range(n) if new.vocabulary.types[i] == NORMAL and len(new.vocabulary.pieces[i]) > 1]
    assert max(new.vocabulary.scores[n:]) < min(new.vocabulary.scores[i] for i in merged)
    assert (new.bos_id, new.eos_id, new.vocabulary.unk_id) == (old.bos_id, old.eos_id, old.vocabulary.unk_id)


def test_every_new_piece_is_reached(new, pieces):
    for i, piece in enumerate(pieces, new.n_vocab - len(pieces)):
        if piece.startswith(SPACE) and piece != SPACE:
            assert new.encode(piece[1:].replace(SPACE, " ")) == [i]
        else:
            assert i in new.encode(f"1{piece.replace(SPACE, ' ')}1")


def test_text_without_new_pieces_has_the_old_ids(old, new, pieces):
    n_same = 0
    for text in [*ENGLISH, *ODD]:
        written = SPACE + text.replace(" ", SPACE)
        if not any(piece in written for piece in pieces):
            assert new.encode(text) == old.encode(text)
            n_same += 1
    assert n_same > 3
    words = sorted({word for text in ENGLISH for word in text.split()})
    untouched = [word for word in words if not any(piece in SPACE + word for piece in pieces)]
    assert len(untouched) > 100
    assert all(new.encode(word) == old.encode(word) for word in untouched)


def test_old_pieces_are_joined_and_never_cut(old, new):
    for text in [*SPANISH[:60], *ENGLISH[:60]]:
        ends, at = set(), 0
        for token_id in old.encode(text):
            at += len(old.token_bytes(token_id))
            ends.add(at)
        at = 0
        for token_id in new.encode(text):
            at += len(new.token_bytes(token_id))
            assert at in ends


def test_text_survives_and_gets_shorter(old, new):
    for texts in (SPANISH, CHINESE, ENGLISH, ODD):
        assert all(new.decode(new.encode(text)) == text for text in texts)
    for texts in (SPANISH, CHINESE):
        counts = [sum(len(each.encode(text)) for text in texts) for each in (old, new)]
        assert counts[1] < 0.7 * counts[0]


def test_both_files_agree(new, tmp_path):
    for format in ("model", "json", "bin"):
        save_tokenizer(new, tmp_path / format, format=format)
        again = load_tokenizer(tmp_path / format)
        for text in [*SPANISH[:50], *CHINESE[:50], *ENGLISH[:50], *ODD[1:]]:
            if "\x00" not in text:
                assert again.encode(text) == new.encode(text), (format, text)


def test_old_ids_are_what_the_old_tokenizer_gives(old, pieces):
    for piece in pieces:
        ids = old_ids(old.vocabulary, piece)
        assert ids
        if piece.startswith(SPACE) and piece != SPACE:
            assert ids == old.encode(piece[1:].replace(SPACE, " "))
        assert b"".join(map(old.token_bytes, ids)).decode() == piece.replace(SPACE, " ")


def test_merging_by_hand():
    scores = {"a": -9.0, "b": -9.0, "ab": -2.0, "ba": -1.0, "aba": -3.0}
    assert merge("abab", scores) == ["aba", "b"]  # ba first, then a + ba
    assert merge("aabb", scores) == ["a", "ab", "b"] and merge("bab", scores) == ["ba", "b"]
    assert merge("xy", scores) == ["x", "y"] and merge("", scores) == []


def test_characters_come_before_what_is_made_of_them(old, pieces):
    seen = {old.vocabulary.pieces[i] for i in old.vocabulary.ids_of(NORMAL)}
    for piece in pieces:
        assert len(piece) == 1 or set(piece) <= seen
        seen.add(piece)


def test_extending_twice(old, pieces):
    both = extended(extended(old, pieces[:200]), pieces[200:])
    at_once = extended(old, pieces)
    assert all(both.encode(text) == at_once.encode(text) for text in [*SPANISH[:50], *CHINESE[:50]])


def test_scores_stay_apart_in_32_bits(old, pieces):
    far = replace(old.vocabulary, source=None, scores=tuple(score - 1e9 for score in old.vocabulary.scores))
    new = extended(Tokenizer(far), pieces)
    assert all(new.decode(new.encode(text)) == text for text in SPANISH[:20])
    assert sum(len(new.encode(text)) for text in SPANISH) < sum(len(old.encode(text)) for text in SPANISH)


def test_fewer_pieces_where_there_are_no_more(old):
    found = find_pieces(old, ["zebra zebra zebra"], n_pieces=500)
    assert 0 < len(found) < 20 and SPACE + "zebra" in found


def test_what_cannot_be_extended_is_refused(old):
    with pytest.raises(TokenizerError, match="no new piece found"):
        find_pieces(old, ["a a"], n_pieces=5)
    with pytest.raises(TokenizerError, match="n_pieces=0"):
        find_pieces(old, SPANISH, n_pieces=0)
    with pytest.raises(TokenizerError, match="no text"):
        find_pieces(old, [], n_pieces=5)
    with pytest.raises(TokenizerError, match="in the vocabulary already"):
        extended(old, ["\u2581the"])
    letters = tuple(CHAR_OF_BYTE.values())
    llama3 = Vocabulary("bytes", (*letters, "<|end|>"), (*[NORMAL] * 256, CONTROL), split=r"\w+|\W+")
    for verb in (
        lambda: find_pieces(Tokenizer(llama3), SPANISH, n_pieces=5),
        lambda: extended(Tokenizer(llama3), ["x"]),
    ):
        with pytest.raises(TokenizerError, match="byte-level"):
            verb()
