"""Which documents are worth learning from: one ordered table of small rules, each of which says "drop" or nothing.

Most rules and thresholds are Gopher's (arXiv:2112.11446 sec. A1.1 and table A1), made aware of scripts without spaces:
there every character is a word, an average length of words means nothing, and runs of n words become runs of 2n
characters. Lorem ipsum is C4's (arXiv:1910.10683 sec. 2.2). C4's rules that every line must end in punctuation and that
no line may hold a curly bracket are not here: they drop poems, headings and all code.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from llama2.data.corpus.clean import phrases
from llama2.data.corpus.words import LETTER, SPACE, Words, run_hashes

TOP_RUNS = {2: 0.20, 3: 0.18, 4: 0.16}
"""n -> largest share of a text's characters that its commonest run of n words may take (table A1)."""
REPEATED_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""n -> largest share of characters in runs of n words that were there before in the same text (table A1)."""
_A_HABIT = 4
"""A run that occurs less often is no repetition, however short the text: two names in a poem take a fifth of it."""
_FEW_REPEATS = 0.02
"""Where fewer of the runs of five words are repeats, none of REPEATED_RUNS can be exceeded: no closer look is taken."""


@dataclass(frozen=True)
class Limits:
    """What a user can turn about the rules."""

    min_words: int = 50
    max_words: int = 100_000
    languages: tuple[str, ...] = ()
    skip: frozenset[str] = frozenset()


class Block:
    """Some texts, their words, and which are still in."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        self.words = Words(texts)
        self.alive = np.ones(len(texts), bool)
        self.n_characters = np.fromiter(map(len, texts), np.int64, len(texts))

    @cached_property
    def n_visible(self) -> np.ndarray:
        """Characters of each text that are no space."""
        return np.maximum(self.words.sums(self.words.kinds != SPACE), 1)

    @cached_property
    def token_starts(self) -> np.ndarray:
        """Where each run of visible characters begins."""
        visible = self.words.kinds != SPACE
        return np.flatnonzero(visible & np.concatenate([[True], ~visible[:-1]]))

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """Words as Gopher counts them: what stands between spaces."""
        return np.maximum(np.diff(np.searchsorted(self.token_starts, self.words.text_starts)), 1)

    def where(self, test: Callable[[str], bool]) -> np.ndarray:
        """Return which of the texts that are still in pass a test of one text."""
        return np.array([alive and test(text) for alive, text in zip(self.alive, self.texts, strict=True)], bool)


def too_few_words(block: Block, limits: Limits) -> np.ndarray:
    return block.words.n_words < limits.min_words


def too_many_words(block: Block, limits: Limits) -> np.ndarray:
    return block.words.n_words > limits.max_words


def broken_characters(block: Block, limits: Limits) -> np.ndarray:
    """More than one character in a hundred is U+FFFD: bytes that were no text."""
    return block.where(lambda text: "\ufffd" in text and text.count("\ufffd") * 100 > len(text))


def mean_word_length(block: Block, limits: Limits) -> np.ndarray:
    """Words are 3 to 10 characters long on average."""
    mean = block.n_visible / block.n_tokens
    return ((mean < 3) | (mean > 10)) & ~block.words.unspaced


def symbols(block: Block, limits: Limits) -> np.ndarray:
    """More than one hash sign, or one ellipsis, for ten words."""
    dots = [max(text.count("#"), text.count("...") + text.count("\u2026")) for text in block.texts]
    return np.array(dots, np.int64) * 10 > np.where(block.words.unspaced, block.words.n_words, block.n_tokens)


def few_letters(block: Block, limits: Limits) -> np.ndarray:
    """Fewer than four words in five hold a letter; without spaces, fewer than half of the characters are any."""
    kinds = block.words.kinds
    letters = np.concatenate([[0], np.cumsum(kinds == LETTER)])
    ends = np.append(block.token_starts[1:], len(kinds))
    with_letter = letters[ends] > letters[block.token_starts]
    found = np.concatenate([[0], np.cumsum(with_letter)])
    first = np.searchsorted(block.token_starts, block.words.text_starts)
    spaced = (found[first[1:]] - found[first[:-1]]) / block.n_tokens < 0.8
    return np.where(block.words.unspaced, block.words.n_words < 0.5 * block.n_visible, spaced)


def bullets(block: Block, limits: Limits) -> np.ndarray:
    """More than nine lines in ten begin with a bullet."""
    marks = ("- ", "* ", "\u2022", "\u25cf", "\u25aa", "\u2023", "\u00b7")
    return block.where(lambda text: _share(text, lambda line: line.lstrip().startswith(marks)) > 0.9)


def ellipses(block: Block, limits: Limits) -> np.ndarray:
    """More than three lines in ten end with an ellipsis."""
    ends = ("...", "\u2026")
    return block.where(lambda text: _share(text, lambda line: line.rstrip().endswith(ends)) > 0.3)


def _share(text: str, test: Callable[[str], bool]) -> float:
    lines = [line for line in text.split("\n") if line]
    return sum(map(test, lines)) / max(len(lines), 1)


def lorem_ipsum(block: Block, limits: Limits) -> np.ndarray:
    return block.where(lambda text: "lorem ipsum" in text.lower())


def repeated_lines(block: Block, limits: Limits) -> np.ndarray:
    """More than 30 % of the lines, or 20 % of the characters in lines, were there before."""
    return block.where(lambda text: _repeats(text.split("\n")))


def repeated_paragraphs(block: Block, limits: Limits) -> np.ndarray:
    """More than 30 % of the paragraphs, or 20 % of the characters in them, were there before."""
    return block.where(lambda text: "\n\n" in text and _repeats(text.split("\n\n")))


def _repeats(parts: list[str]) -> bool:
    parts = [part for part in parts if part]
    distinct = set(parts)
    if len(parts) == len(distinct):
        return False
    n_all, n_distinct = sum(map(len, parts)), sum(map(len, distinct))
    return (len(parts) - len(distinct)) > 0.3 * len(parts) or (n_all - n_distinct) > 0.2 * n_all


def top_run(block: Block, limits: Limits) -> np.ndarray:
    """The commonest run of 2, 3 or 4 words, found four times or more, takes over 20, 18 or 16 % of the characters."""
    return _with_unspaced(block, lambda n, unit: _top_share(block, n * unit) > TOP_RUNS[n], TOP_RUNS)


def _with_unspaced(block: Block, test: Callable[[int, int], np.ndarray], sizes: Iterable[int]) -> np.ndarray:
    """Say where a test of runs of n words fails for any n; without spaces the runs are of 2n characters."""
    unspaced = block.words.unspaced
    found = np.zeros(len(block.texts), bool)
    for n in sizes:
        if not unspaced.all():
            found |= test(n, 1) & ~unspaced
        if unspaced.any():
            found |= test(n, 2) & unspaced
    return found


def _top_share(block: Block, n: int) -> np.ndarray:
    words = block.words
    hashes, at = words.runs(n)
    shares = np.zeros(len(block.texts))
    if len(at):
        keys = words.text_ids[at].astype(np.uint64) << np.uint64(48) | hashes >> np.uint64(16)
        order = np.argsort(keys)
        keys, at = keys[order], at[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts = np.diff(np.append(begins, len(keys)))
        begins, counts = begins[counts >= _A_HABIT], counts[counts >= _A_HABIT]
        lengths = words.ends[at[begins] + n - 1] - words.starts[at[begins]]
        text_ids = words.text_ids[at[begins]]
        np.maximum.at(shares, text_ids, counts * lengths / np.maximum(block.n_characters[text_ids], 1))
    return shares


def repeated_runs(block: Block, limits: Limits) -> np.ndarray:
    """Runs of 5, 6, 7, 8, 9, 10 words that were there before take over 15, 14, 13, 12, 11, 10 % of the characters."""
    words = block.words
    _, first = words.run_sets(5)
    n_runs = np.maximum(words.n_words - 4, 1)
    found = (n_runs - np.diff(first) > _FEW_REPEATS * n_runs) & block.alive
    for text in np.flatnonzero(found).tolist():
        unit = 2 if words.unspaced[text] else 1
        found[text] = any(_repeated_share(words, text, n * unit) > limit for n, limit in REPEATED_RUNS.items())
    return found


def _repeated_share(words: Words, text: int, n: int) -> float:
    """Share of the characters in words that are part of a run which was there before; each counts once."""
    span = slice(words.first[text], words.first[text + 1])
    hashes = words.hashes[span]
    if len(hashes) < n:
        return 0.0
    runs = run_hashes(hashes, n)
    is_repeat = np.ones(len(runs), bool)
    is_repeat[np.unique(runs, return_index=True)[1]] = False
    covered = np.zeros(len(hashes) + 1, np.int64)
    np.add.at(covered, np.flatnonzero(is_repeat), 1)
    np.subtract.at(covered, np.flatnonzero(is_repeat) + n, 1)
    lengths = words.ends[span] - words.starts[span]
    return float(lengths[np.cumsum(covered[:-1]) > 0].sum() / lengths.sum())


def no_stop_words(block: Block, limits: Limits) -> np.ndarray:
    """Fewer than two of the commonest words of any language known by them; other languages are let pass."""
    words = block.words
    known = _stop_hashes()
    is_stop = known[np.minimum(np.searchsorted(known, words.hashes), len(known) - 1)] == words.hashes
    totals = np.concatenate([[0], np.cumsum(is_stop)])
    few = totals[words.first[1:]] - totals[words.first[:-1]] < 2
    few &= ~words.unspaced & block.alive
    for text in np.flatnonzero(few).tolist():
        few[text] = language(block.texts[text]) in phrases()["stop_words"]
    return few


@cache
def _stop_hashes() -> np.ndarray:
    found = {word for words in phrases()["stop_words"].values() for word in words}
    return np.sort(Words([" ".join(sorted(found))]).hashes)


def other_language(block: Block, limits: Limits) -> np.ndarray:
    """The language, told by py3langid from three samples of the text, is not among those wanted."""
    if not limits.languages:
        return np.zeros(len(block.texts), bool)
    return block.where(lambda text: language(text) not in limits.languages)


_SAMPLE = 200


def language(text: str) -> str:
    """Return the language of a text as two letters (ISO 639-1)."""
    import py3langid

    if len(text) > 3 * _SAMPLE:
        middle = (len(text) - _SAMPLE) // 2
        text = f"{text[:_SAMPLE]} {text[middle : middle + _SAMPLE]} {text[-_SAMPLE:]}"
    return py3langid.classify(text)[0]


def known_languages() -> list[str]:
    """Return every language that can be told."""
    import py3langid

    return sorted(code for code, _ in py3langid.rank("a"))


DROPS: dict[str, Callable[[Block, Limits], np.ndarray]] = {
    rule.__name__: rule
    for rule in (
        *(too_few_words, too_many_words, broken_characters, few_letters, mean_word_length, symbols, bullets, ellipses),
        *(lorem_ipsum, repeated_lines, repeated_paragraphs, top_run, repeated_runs, no_stop_words, other_language),
    )
}
"""Rule -> which texts of a block it drops, in the order in which they judge."""


def judge(block: Block, limits: Limits) -> list[str | None]:
    """Return for each text the first rule that drops it, or None; `block.alive` says the same."""
    reasons: list[str | None] = [None] * len(block.texts)
    for name, rule in DROPS.items():
        if name not in limits.skip:
            for text in np.flatnonzero(rule(block, limits) & block.alive).tolist():
                reasons[text] = name
                block.alive[text] = False
    return reasons
