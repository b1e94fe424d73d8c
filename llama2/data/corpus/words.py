"""The words of many texts at once, as 64-bit hashes in numpy arrays.

Quality rules, duplicates and decontamination all ask about words and runs of words. They are found here once
for a whole block of texts, without a Python object per word. A word is a run of letters, marks and digits in
lower case; a character of a script that writes no spaces (Chinese, Japanese, Thai, Khmer, Lao, Burmese) is a word
by itself. Punctuation is no part of any word.

    "The cat, the \u732b"  ->  the | cat | the | \u732b
"""

import unicodedata
from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np

LETTER, DIGIT, ALONE, SPACE = 1, 2, 3, 4
_WITHOUT_SPACES = (
    *((0x0E00, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF)),
    *((0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x20000, 0x323AF)),
)
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


class Words:
    """Words of a block of texts: hashes in order, where each word stands, and which text it is of."""

    def __init__(self, texts: Sequence[str]):
        self.lowered = [text.lower() for text in texts]
        joined = "\n".join(self.lowered)
        points = np.frombuffer(joined.encode("utf-32-le"), "<u4")
        lengths = np.fromiter(map(len, self.lowered), np.int64, len(self.lowered))
        self.text_starts = np.concatenate([[0], np.cumsum(lengths + 1)])
        """Where each text begins among the characters; one more at the end."""
        self.kinds = _kinds()[points]
        is_part = (self.kinds == LETTER) | (self.kinds == DIGIT)
        is_alone = self.kinds == ALONE
        begins, ends = is_part.copy(), is_part.copy()
        begins[1:] &= ~is_part[:-1]
        ends[:-1] &= ~is_part[1:]
        self.starts = np.flatnonzero(begins | is_alone)
        self.ends = np.flatnonzero(ends | is_alone) + 1
        self.first = np.searchsorted(self.starts, self.text_starts)
        """Number of each text's first word; one more at the end."""
        self.hashes = _hash_words(points, self.starts, self.ends)
        self.n_words = np.diff(self.first)
        alone = np.concatenate([[0], np.cumsum(is_alone[self.starts])])
        n_alone = alone[self.first[1:]] - alone[self.first[:-1]]
        self.unspaced = n_alone * 3 > self.n_words
        """Texts of which more than a third are words of one character, so that counts of words mean something else."""

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of a value per character over each text."""
        totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        ends = self.text_starts[1:] - 1
        return totals[ends] - totals[self.text_starts[:-1]]

    @cached_property
    def text_ids(self) -> np.ndarray:
        """The number of the text that each word is of."""
        return np.repeat(np.arange(len(self.n_words)), self.n_words)

    def runs(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of all runs of n words within one text, and the number of the word each begins with."""
        hashes = run_hashes(self.hashes, n)
        at = np.flatnonzero(np.arange(len(hashes)) + n <= np.repeat(self.first[1:], self.n_words)[: len(hashes)])
        return hashes[at], at

    def run_sets(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct runs of each text as sorted 48-bit hashes, one text after another, and where each begins.

        A text of fewer than n words has one run, the whole of it.
        """
        hashes, at = self.runs(n)
        short = np.flatnonzero(self.n_words < n)
        whole = np.array([self._whole(text) for text in short.tolist()], np.uint64)
        text_ids = np.concatenate([self.text_ids[at], short]).astype(np.uint64)
        keys = np.sort(text_ids << np.uint64(48) | np.concatenate([hashes, whole]) >> np.uint64(16))
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
        first = np.searchsorted(keys, np.arange(len(self.n_words) + 1, dtype=np.uint64) << np.uint64(48))
        return keys & np.uint64((1 << 48) - 1), first

    def _whole(self, text: int) -> np.uint64:
        words = self.hashes[self.first[text] : self.first[text + 1]]
        return run_hashes(words, len(words))[0] if len(words) else np.uint64(hash_text(self.lowered[text]))


def run_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of every run of n among hashes of words."""
    n_runs = max(0, len(words) - n + 1)
    hashes = words[:n_runs].copy()
    for k in range(1, n):
        hashes = hashes * np.uint64(_BASE) + words[k : n_runs + k]
    return _mixed(hashes)


def hash_text(text: str) -> int:
    """Return 64 bits of a text whose words are none, so that even "!!!" equals itself only."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return int(_hash_words(points, np.array([0]), np.array([len(points)]))[0]) if len(points) else 0


def _hash_words(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Polynomial hashes from one running sum: (sum to the end - sum to the start) / base^start, modulo 2^64."""
    sums = np.zeros(len(points) + 1, np.uint64)
    np.cumsum((points.astype(np.uint64) + np.uint64(1)) * _powers(_BASE, len(points)), out=sums[1:])
    return _mixed((sums[ends] - sums[starts]) * _powers(_INVERSE, len(points) + 1)[starts])


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all others (the finaliser of splitmix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


_POWERS: dict[int, np.ndarray] = {}


def _powers(base: int, n: int) -> np.ndarray:
    if len(_POWERS.get(base, ())) < n:
        powers = np.full(1 << max(20, (n - 1).bit_length()), base, np.uint64)
        powers[0] = 1
        _POWERS[base] = np.cumprod(powers)
    return _POWERS[base][:n]


@cache
def _kinds() -> np.ndarray:
    """What every code point is: LETTER, DIGIT, ALONE, SPACE or 0."""
    kinds = np.zeros(0x110000, np.uint8)
    for point in range(0x323B0):
        category = unicodedata.category(chr(point))
        if category[0] in "LM":
            kinds[point] = LETTER
        elif category[0] == "N":
            kinds[point] = DIGIT
        elif category[0] == "Z" or chr(point).isspace():
            kinds[point] = SPACE
    for first, last in _WITHOUT_SPACES:
        block = kinds[first : last + 1]
        block[block == LETTER] = ALONE
    return kinds
