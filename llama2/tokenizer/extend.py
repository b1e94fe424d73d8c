"""Add pieces for another language or domain to a SentencePiece vocabulary.

New pieces are learnt from the text alone, as a vocabulary of its own (`train.py`), and those that the old one lacks
get the ids after it, as in Chinese-LLaMA (arXiv:2304.08177 sec. 3.1). That project gives every new piece the score
0, the best there is, so new pieces form before old ones do and text that the old model knew is cut anew. Here their
scores are below all old ones: the old merges happen first and in their old order, then new pieces join what is left.

    old        _el _per ro _am ar illo          what the model knew
    extended   _el _perro  _amarillo            old pieces joined, never cut otherwise

A text in which no new piece occurs therefore has the ids it always had. Byte-level vocabularies (Llama 3) are
refused: their merges stay within what a regular expression cuts, and all of Llama 3's are already multilingual.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from llama2.errors import TokenizerError
from llama2.tokenizer.document import document
from llama2.tokenizer.hf import from_json
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.train import N_FIXED, train_tokenizer
from llama2.tokenizer.vocabulary import BYTE, NORMAL, Source, Vocabulary, splits

MOST_PIECES = 1 << 20


def find_pieces(
    tokenizer: Tokenizer, texts: Iterable[str], *, n_pieces: int, n_threads: int | None = None
) -> list[str]:
    """Return up to n_pieces pieces that the texts need most and the vocabulary lacks, characters before what uses them.

    Each can be reached: its own text, encoded alone, becomes it. Texts are kept in memory, by the trainer too. Raises
    TokenizerError for a byte-level vocabulary, and where nothing is new.
    """
    vocabulary = tokenizer.vocabulary
    _check(vocabulary)
    if n_pieces < 1:
        raise TokenizerError(f"n_pieces={n_pieces} must be at least 1; the Chinese Llama projects add some 20,000")
    lines = list(texts)
    size = N_FIXED + max(1000, 4 * n_pieces)
    while True:
        learnt = train_tokenizer(lines, vocab_size=size, n_threads=n_threads, may_be_smaller=True).vocabulary
        found = _choose(vocabulary, [learnt.pieces[i] for i in learnt.ids_of(NORMAL)], n_pieces)
        if len(found) >= n_pieces or len(learnt.pieces) < size or size >= MOST_PIECES:
            break
        size = min(4 * size, MOST_PIECES)
    if not found:
        raise TokenizerError(
            f"no new piece found: the vocabulary of {tokenizer.n_vocab} pieces has all that the text would teach; "
            "give text of another language or domain, or more of it"
        )
    return found


def _check(vocabulary: Vocabulary) -> None:
    if vocabulary.kind != "spm":
        raise TokenizerError(
            "a byte-level vocabulary (Llama 3) cannot be extended, only SentencePiece's (Llama 1, 2, TinyLlama): train "
            "a tokenizer of its own with train-tokenizer, or keep this one, which has pieces for most languages"
        )
    if vocabulary.unportable:
        raise TokenizerError(f"this vocabulary cannot be extended: {vocabulary.unportable}")


def _choose(vocabulary: Vocabulary, candidates: Sequence[str], n: int) -> list[str]:
    """Return the first n candidates that the vocabulary lacks and that its pieces and each other can make."""
    scores = {vocabulary.pieces[i]: vocabulary.scores[i] for i in vocabulary.ids_of(NORMAL)}
    lowest, chosen = min(scores.values(), default=0.0), []

    def take(piece: str) -> None:
        chosen.append(piece)
        scores[piece] = lowest - len(chosen)

    waiting = [piece for piece in candidates if piece not in vocabulary.ids]
    while waiting:
        n_before, later = len(chosen), []
        for piece in waiting:
            missing = list(dict.fromkeys(char for char in piece if char not in scores))
            if any(char in vocabulary.ids for char in missing):
                continue  # it has an id, but one that nothing is merged with
            if piece in scores or len(chosen) + len(missing) + (len(piece) > 1) > n:
                continue
            for char in missing:
                take(char)
            if len(piece) > 1 and len(merge(piece, scores)) == 2:
                take(piece)
            elif len(piece) > 1:
                later.append(piece)
        # what was out of reach may be made of what was taken since
        waiting = later if len(chosen) > n_before else []
    return chosen


def merge(text: str, scores: dict[str, float]) -> list[str]:
    """Cut a text as SentencePiece does: of the neighbours that join into a piece, those of the best score go first."""
    parts = list(text)
    while True:
        joins = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not joins:
            return parts
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def old_ids(vocabulary: Vocabulary, piece: str) -> list[int]:
    """Return the ids that a piece's text has in a vocabulary without it, bytes for characters that have none."""
    scores = {vocabulary.pieces[i]: vocabulary.scores[i] for i in vocabulary.ids_of(NORMAL)}
    ids: list[int] = []
    for part in merge(piece, scores):
        if part in scores:
            ids.append(vocabulary.ids[part])
        elif BYTE in vocabulary.types:
            ids += (vocabulary.ids[f"<0x{byte:02X}>"] for byte in part.encode("utf-8"))
        else:
            assert vocabulary.unk_id is not None
            ids.append(vocabulary.unk_id)
    return ids


def extended(tokenizer: Tokenizer, pieces: Sequence[str]) -> Tokenizer:
    """Return the tokenizer with new pieces after its own, each of a lower score than the one before."""
    old = tokenizer.vocabulary
    _check(old)
    again = next((piece for piece in pieces if piece in old.ids), None)
    if again is not None:
        raise TokenizerError(f"piece {again!r} is in the vocabulary already, at id {old.ids[again]}; leave it out")
    lowest = min((old.scores[i] for i in old.ids_of(NORMAL)), default=0.0)
    # files keep scores in 32 bits: the step must not be lost beside a large number
    step = 2.0 ** max(0, math.frexp(abs(lowest) + len(pieces))[1] - 22)
    new = replace(
        old,
        pieces=(*old.pieces, *pieces),
        types=(*old.types, *[NORMAL] * len(pieces)),
        scores=(*old.scores, *(lowest - step * (i + 1) for i in range(len(pieces)))),
    )
    if old.source and old.source.format == "json":
        new = _with_merges(old, new)
    return Tokenizer(new)


def _with_merges(old: Vocabulary, new: Vocabulary) -> Vocabulary:
    """Return the new vocabulary with its merges in its tokenizer.json, after those that are there."""
    whole = document(new)
    known = {new.pieces[i]: i for i in new.ids_of(NORMAL)}
    added = new.pieces[len(old.pieces) :]
    merges = [pair for piece in added for pair in splits(piece, known)]
    as_text = bool(whole["model"]["merges"]) and isinstance(whole["model"]["merges"][0], str)
    whole["model"]["merges"] += [" ".join(pair) if as_text else list(pair) for pair in merges]
    data = json.dumps(whole, ensure_ascii=False).encode("utf-8")
    read = from_json(data, name="the extended tokenizer.json")
    return replace(new, scores=read.scores, source=Source("json", data), unportable=read.unportable)
