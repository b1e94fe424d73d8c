"""Documents that hold questions of an evaluation, found by runs of 13 words as in GPT-3 (arXiv:2005.14165 app. C).

A text of the evaluation shorter than 13 words must be found whole. One shorter than five ("Yes.", "Paris") would be
found everywhere: it only counts where it is the whole document. Where no spaces are written, two characters are a word.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llama2.data.corpus.clean import clean
from llama2.data.corpus.containers import open_stream, parquet_columns
from llama2.data.corpus.plain import MAX_LINE_BYTES
from llama2.data.corpus.sources import cut, kind_of, read
from llama2.data.corpus.tally import Tally
from llama2.data.corpus.words import Words, run_hashes
from llama2.errors import DataError

MIN_WORDS = 5
_TEXTS_AT_ONCE = 512


class Contamination:
    """Hashes of what must not be trained on: length of a run -> sorted hashes of such runs.

    A negative length stands for texts too short to look for: only a document that is nothing else is like them.
    """

    def __init__(self, runs: dict[int, np.ndarray]):
        self.runs = runs

    def found_in(self, words: Words) -> np.ndarray:
        """Say which texts of a block hold any of it."""
        found = np.zeros(len(words.n_words), bool)
        for n, known in self.runs.items():
            hashes, at = words.runs(abs(n))
            hits = at[known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes]
            text_ids = words.text_ids[hits]
            found[text_ids if n > 0 else text_ids[words.n_words[text_ids] == -n]] = True
        return found

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **{str(n): hashes for n, hashes in self.runs.items()})

    @classmethod
    def load(cls, path: Path) -> "Contamination":
        with np.load(path) as file:
            return cls({int(n): file[n] for n in file.files})


def contamination_of(
    paths: Iterable[Path], *, n_words: int = 13, text_field: str = "text", separator: str | None = None
) -> Contamination:
    """Read evaluation files. Of JSON lines and Parquet every text counts, whatever its field. Raises DataError."""
    found: dict[int, list[np.ndarray]] = {}
    for path in paths:
        n_texts = 0
        for texts in _blocks(_texts(path, text_field, separator)):
            n_texts += len(texts)
            words = Words([clean(text, Tally()) for text in texts])
            for text, n_own in enumerate(words.n_words.tolist()):
                unit = 2 if words.unspaced[text] else 1
                n = min(n_own, n_words * unit)
                if n:
                    own = words.hashes[words.first[text] : words.first[text + 1]]
                    found.setdefault(n if n >= MIN_WORDS * unit else -n, []).append(run_hashes(own, n))
        if not n_texts:
            raise DataError(f"{path} holds no text to keep out of the data; name a file with questions in it")
    return Contamination({n: np.unique(np.concatenate(runs)) for n, runs in sorted(found.items())})


def _texts(path: Path, text_field: str, separator: str | None) -> Iterator[str]:
    def refuse(reason: str, id: str, seen: str) -> None:
        if reason not in ("cut_long_document", "not_utf8"):
            raise DataError(f"{id} cannot be used against contamination: {seen}; mend or leave out the file")

    kind, _ = kind_of(path)
    (piece,) = cut(path)
    if kind == "jsonl":
        yield from _strings_of_lines(path)
    elif kind == "parquet":
        for column in parquet_columns(path):
            yield from (document.text for document in read(piece, lambda *_: None, text_field=column))
    else:
        yield from (document.text for document in read(piece, refuse, text_field=text_field, separator=separator))


def _strings_of_lines(path: Path) -> Iterator[str]:
    with open_stream(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), 1):
            try:
                yield from _strings(json.loads(line) if line.strip() else None)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}; mend or leave out the file") from None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for text in texts:
        block.append(text)
        if len(block) == _TEXTS_AT_ONCE:
            yield block
            block = []
    if block:
        yield block
