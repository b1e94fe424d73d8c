"""Pairs and labelled answers in memory, as tokens with the answer marked.

    file -> read_pairs -> Pair -> render_answer -> PairSet       rows of its `Examples`   chosen 0
                                                                                          rejected 0
                                                                                          chosen 1 ...

What is too long is refused or left out, as the caller says; never cut.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from llama2.chat import Rendered
from llama2.data.examples import Examples, collect, concatenated
from llama2.data.preferences.batch import LabelledBatch, PairBatch, lay_out
from llama2.data.preferences.pair import FLAGS, RATINGS, Labelled, Pair
from llama2.data.preferences.read import Broken, read_labelled, read_pairs
from llama2.data.preferences.render import render_answer
from llama2.errors import DataError
from llama2.tokenizer.tokenizer import Tokenizer

TooLong = Literal["refuse", "drop"]


@dataclass(frozen=True)
class Judged:
    """Answers with their prompts as tokens."""

    rows: Examples

    @property
    def name(self) -> str:
        return self.rows.name

    @property
    def tokenizer_sha256(self) -> str:
        return self.rows.tokenizer_sha256

    @property
    def n_tokens(self) -> int:
        return self.rows.n_tokens

    @cached_property
    def prompts(self) -> np.ndarray:
        """Which prompt each row answers, counted from 0: rows that answer the same one have one number."""
        return numbered(
            self.rows.document(i)[: int(np.argmax(self.rows.trained(i)))].tobytes() for i in range(len(self.rows))
        )


@dataclass(frozen=True)
class PairSet(Judged):
    """N pairs as tokens, and what people said of them."""

    rows: Examples
    """The chosen side of pair i is row 2i, the rejected one row 2i + 1."""
    ratings: np.ndarray
    """int8 [N]: 3 significantly better ... 0 negligibly, -1 unknown."""
    margins: np.ndarray
    """float32 [N]; 0, which asks for nothing, where none is given."""
    flags: np.ndarray
    """int8 [N 3], as FLAGS has them: 1 true, 0 false, -1 unknown."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Why records were left out -> how many."""

    def __len__(self) -> int:
        return len(self.ratings)

    @property
    def groups(self) -> np.ndarray:
        """Which prompt each pair is about."""
        return self.prompts[0::2]

    @cached_property
    def _first_alike(self) -> np.ndarray:
        """Of each row, the first one that has the same tokens."""
        alike = numbered(self.rows.document(i).tobytes() for i in range(len(self.rows)))
        return np.unique(alike, return_index=True)[1][alike]

    @property
    def what(self) -> str:
        return "pairs"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair's longer side."""
        return self.rows.lengths.reshape(-1, 2).max(1)

    def tokens_in(self, numbers: Sequence[int]) -> int:
        """Return how many tokens both sides of these pairs have."""
        return int(self.rows.lengths.reshape(-1, 2)[np.asarray(numbers, np.int64)].sum())

    def batch(self, numbers: Sequence[int]) -> PairBatch:
        """Lay out these pairs, each different answer once."""
        at = np.asarray(numbers, np.int64)
        kept, sides = np.unique(self._first_alike[np.concatenate([2 * at, 2 * at + 1])], return_inverse=True)
        rows, ends = lay_out(self.rows, kept)
        ratings, margins, flags = (torch.from_numpy(each[at]) for each in (self.ratings, self.margins, self.flags))
        rest = (ratings.long(), margins, flags.long(), torch.from_numpy(at))
        return PairBatch(rows, ends, torch.from_numpy(sides), *rest)

    def part(self, numbers: Sequence[int], name: str | None = None) -> "PairSet":
        """Return only these pairs."""
        rows = self.rows.part([row for i in numbers for row in (2 * i, 2 * i + 1)], name or self.name)
        at = np.asarray(numbers, np.int64)
        return PairSet(rows, self.ratings[at], self.margins[at], self.flags[at])


@dataclass(frozen=True)
class LabelledSet(Judged):
    """N single answers as tokens, and whether each is a good one."""

    is_good: np.ndarray
    """bool [N]."""
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.is_good)

    @property
    def groups(self) -> np.ndarray:
        """Which prompt each answers."""
        return self.prompts

    @property
    def what(self) -> str:
        return "answers"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer with its prompt."""
        return self.rows.lengths

    def tokens_in(self, numbers: Sequence[int]) -> int:
        """Return how many tokens these answers have."""
        return int(self.rows.lengths[np.asarray(numbers, np.int64)].sum())

    def batch(self, numbers: Sequence[int]) -> LabelledBatch:
        """Lay out these answers."""
        at = np.asarray(numbers, np.int64)
        rows, ends = lay_out(self.rows, at)
        return LabelledBatch(rows, ends, torch.from_numpy(self.is_good[at]), torch.from_numpy(at))

    def part(self, numbers: Sequence[int], name: str | None = None) -> "LabelledSet":
        """Return only these answers."""
        return LabelledSet(self.rows.part(numbers, name or self.name), self.is_good[np.asarray(numbers, np.int64)])


JudgedSet = TypeVar("JudgedSet", PairSet, LabelledSet)


def numbered(keys: Iterable[Hashable]) -> np.ndarray:
    """Return a number for each key, equal ones for equal keys, counted from 0 as they come."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


def read_pair_set(path: str | Path, tokenizer: Tokenizer, *, broken: Broken | None = None, **settings) -> PairSet:
    """Read and render a file or folder of pairs; the settings are those of `collect_pairs`. Raises DataError."""
    skipped: Counter[str] = Counter()
    pairs = read_pairs(path, skipped=lambda where, reason: skipped.update([reason]), broken=broken)
    found = collect_pairs(pairs, tokenizer, name=str(path), **settings)
    return replace(found, left_out=skipped + Counter(found.left_out))


def read_labelled_set(
    path: str | Path, tokenizer: Tokenizer, *, broken: Broken | None = None, **settings
) -> LabelledSet:
    """Read and render a file or folder of labelled answers; the settings are those of `collect_labelled`."""
    skipped: Counter[str] = Counter()
    answers = read_labelled(path, skipped=lambda where, reason: skipped.update([reason]), broken=broken)
    found = collect_labelled(answers, tokenizer, name=str(path), **settings)
    return replace(found, left_out=skipped + Counter(found.left_out))


def collect_pairs(
    pairs: Iterable[Pair],
    tokenizer: Tokenizer,
    *,
    name: str,
    length: int,
    too_long: TooLong = "refuse",
    chat_format: str | None = None,
) -> PairSet:
    """Return rendered pairs as a set. length: tokens of the longest side that is kept, its prompt included."""
    labels: list[tuple[int, float, list[int]]] = []
    left_out: Counter[str] = Counter()

    def rows() -> Iterator[tuple[str, Rendered]]:
        for pair in pairs:
            sides = [
                (pair.where, render_answer(pair.prompt, answer, tokenizer, chat_format=chat_format, where=pair.where))
                for answer in (pair.chosen, pair.rejected)
            ]
            if _fits(sides, length, too_long, left_out):
                labels.append((RATINGS.get(pair.rating or "", -1), pair.margin or 0.0, _flags(pair)))
                yield from sides
        _check_some(labels, name, length, left_out)

    found = collect(rows(), tokenizer, name=name, length=length)
    ratings, margins, flags = zip(*labels, strict=True)
    kinds = (np.int8, np.float32, np.int8)
    arrays = (np.asarray(each, kind) for each, kind in zip((ratings, margins, flags), kinds, strict=True))
    return PairSet(found, *arrays, left_out=left_out)


def collect_labelled(
    answers: Iterable[Labelled],
    tokenizer: Tokenizer,
    *,
    name: str,
    length: int,
    too_long: TooLong = "refuse",
    chat_format: str | None = None,
) -> LabelledSet:
    """Return rendered answers as a set. length: tokens of the longest one that is kept, its prompt included."""
    labels: list[bool] = []
    left_out: Counter[str] = Counter()

    def rows() -> Iterator[tuple[str, Rendered]]:
        for each in answers:
            rendered = render_answer(each.prompt, each.answer, tokenizer, chat_format=chat_format, where=each.where)
            if _fits([(each.where, rendered)], length, too_long, left_out):
                labels.append(each.is_good)
                yield each.where, rendered
        _check_some(labels, name, length, left_out)

    found = collect(rows(), tokenizer, name=name, length=length)
    return LabelledSet(found, np.asarray(labels, bool), left_out)


def _flags(pair: Pair) -> list[int]:
    values = [getattr(pair, name) for name in FLAGS]
    return [-1 if value is None else int(value) for value in values]


def _fits(sides: Sequence[tuple[str, Rendered]], length: int, too_long: TooLong, left_out: Counter[str]) -> bool:
    where, longest = sides[0][0], max(len(rendered.tokens) for _, rendered in sides)
    if longest <= length:
        return True
    if too_long == "refuse":
        raise DataError(
            f"{where} has {longest:,} tokens with its prompt and a row holds {length:,}: choose a longer "
            "--sequence-length, or --too-long drop to leave it out"
        )
    left_out["too long"] += 1
    return False


def _check_some(labels: Sequence[object], name: str, length: int, left_out: Counter[str]) -> None:
    if not labels:
        why = f": all {left_out['too long']:,} are longer than {length:,} tokens" if left_out else ""
        raise DataError(f"{name} holds nothing to train on{why}")


def joined(sets: Sequence[PairSet]) -> PairSet:
    """Return several sets of pairs as one, one after another."""
    if len(sets) == 1:
        return sets[0]
    arrays = (np.concatenate([getattr(each, name) for each in sets]) for name in ("ratings", "margins", "flags"))
    left_out = sum((Counter(each.left_out) for each in sets), Counter())
    return PairSet(concatenated([each.rows for each in sets]), *arrays, left_out=left_out)


def set_aside(found: JudgedSet, share: float, *, seed: int) -> tuple[JudgedSet, JudgedSet]:
    """Return the set without a seeded share of it, and that share, at least one, in random order.

    All that is about one prompt goes to one side.
    """
    place = np.random.default_rng((seed, 3)).permutation(found.groups.max() + 1)[found.groups]
    order = np.argsort(place, kind="stable")
    n = max(1, round(share * len(found)))
    n = int(np.searchsorted(place[order], place[order[min(n, len(found)) - 1]], side="right"))  # to the prompt's end
    if n >= len(found):
        raise DataError(
            f"{found.name} has {len(found)} {found.what} about {found.groups.max() + 1} prompts, too few to set "
            f"{share:g} of them aside to judge by; give --eval-data, or --eval-share 0"
        )
    aside, kept = order[:n].tolist(), sorted(order[n:].tolist())
    return found.part(kept), found.part(aside, f"{found.name} (set aside)")
