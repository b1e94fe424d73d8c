"""Examples in memory: rendered conversations and texts, each with the tokens that are trained.

    file -> dialogues -> Sample -> chat.render -> Examples

What is too long for a row is refused, split over rows, or left out, as the caller says; never cut in silence.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from llama2.chat import Rendered
from llama2.data.dialogues.read import read_samples
from llama2.data.dialogues.render import render_sample
from llama2.data.shards import INDEX, Shards, open_shards, tokenizer_digest
from llama2.errors import DataError
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import CONTROL

TooLong = Literal["refuse", "split", "drop"]
Row = tuple[np.ndarray, np.ndarray, int]
"""Ids of an example, which of them are trained, and their UTF-8 bytes."""


@dataclass(frozen=True)
class Examples:
    """Rendered examples, one after another."""

    name: str
    tokenizer_sha256: str
    ids: np.ndarray
    """Of all examples, concatenated."""
    marks: np.ndarray
    """Which of them are trained."""
    lengths: np.ndarray
    n_bytes: np.ndarray
    """UTF-8 bytes of the trained tokens of each example."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Why records were left out -> how many."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    @property
    def n_targets(self) -> int:
        return int(self.marks.sum())

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def document(self, number: int) -> np.ndarray:
        return self.ids[self._starts[number] : self._starts[number + 1]]

    def trained(self, number: int) -> np.ndarray:
        return self.marks[self._starts[number] : self._starts[number + 1]]

    def part(self, numbers: Sequence[int], name: str) -> "Examples":
        """Return only these examples."""
        return _joined(name, self.tokenizer_sha256, [self._row(i) for i in numbers])

    def _row(self, number: int) -> "Row":
        return self.document(number), self.trained(number), int(self.n_bytes[number])


def read_examples(
    path: Path,
    tokenizer: Tokenizer,
    *,
    length: int,
    too_long: TooLong = "refuse",
    chat_format: str | None = None,
    data_format: str | None = None,
) -> Examples:
    """Read and render a file or folder of examples. length: positions of a row. Raises DataError."""
    left_out: Counter[str] = Counter()
    samples = read_samples(path, format=data_format, skipped=lambda where, reason: left_out.update([reason]))
    named = ((each.where, render_sample(each, tokenizer, chat_format=chat_format)) for each in samples)
    found = collect(named, tokenizer, name=str(path), length=length, too_long=too_long)
    return replace(found, left_out=left_out + Counter(found.left_out))


def collect(
    rendered: Iterable[tuple[str, Rendered]],
    tokenizer: Tokenizer,
    *,
    name: str,
    length: int,
    too_long: TooLong = "refuse",
) -> Examples:
    """Return rendered examples as a set; each comes with where it was read."""
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    sizes = _sizes(tokenizer)
    for where, each in rendered:
        if len(each.tokens) - 1 > length and too_long != "split":
            if too_long == "refuse":
                raise DataError(
                    f"{where} has {len(each.tokens):,} tokens and a row holds {length + 1:,}: choose a longer "
                    "--sequence-length, --too-long split to spread it over rows, or --too-long drop to leave it out"
                )
            left_out["too long"] += 1
            continue
        marks = np.asarray(each.trainable, bool)
        marks[0] = False  # nothing predicts the first token
        ids = np.asarray(each.tokens, dtype)
        rows.append((ids, marks, int(sizes[ids[marks]].sum())))
    if not rows:
        why = f": all {left_out['too long']} are longer than {length + 1:,} tokens" if left_out else ""
        raise DataError(f"{name} holds no example to train on{why}")
    return replace(_joined(name, tokenizer_digest(tokenizer), rows), left_out=left_out)


def _sizes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the UTF-8 bytes of text of each token; special ones have none."""
    kinds = tokenizer.vocabulary.types
    return np.array([0 if kinds[i] == CONTROL else len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)])


def _joined(name: str, digest: str, rows: Sequence[Row]) -> Examples:
    ids, marks = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
    lengths = np.array([len(row[0]) for row in rows], np.int64)
    return Examples(name, digest, ids, marks, lengths, np.array([row[2] for row in rows], np.int64))


def set_aside(examples: Examples, share: float, *, seed: int) -> tuple[Examples, Examples]:
    """Return the examples without a seeded share of them, and that share, at least one, in random order.

    So the first of those set aside, which is all that a short evaluation reads, are from everywhere.
    """
    order = np.random.default_rng((seed, 3)).permutation(len(examples))
    n = max(1, round(share * len(examples)))
    if n >= len(examples):
        raise DataError(
            f"{examples.name} has {len(examples)} examples, too few to set {share:g} of them aside to judge by; give "
            "--eval-data, or --eval-share 0"
        )
    aside, kept = order[:n].tolist(), sorted(order[n:].tolist())
    return examples.part(kept, examples.name), examples.part(aside, f"{examples.name} (set aside)")


def together(sets: Sequence[Examples]) -> Examples:
    """Return several sets as one, in turns by their sizes: its first examples are of each as much as all of it is."""
    if len(sets) == 1:
        return sets[0]
    turns = sorted(((i + 0.5) / len(each), k, i) for k, each in enumerate(sets) for i in range(len(each)))
    rows = [sets[k]._row(i) for _, k, i in turns]
    return _joined(", ".join(each.name for each in sets), sets[0].tokenizer_sha256, rows)


def concatenated(sets: Sequence[Examples]) -> Examples:
    """Return several sets as one, one after another."""
    rows = [each._row(i) for each in sets for i in range(len(each))]
    return _joined(", ".join(each.name for each in sets), sets[0].tokenizer_sha256, rows)


def open_documents(path: Path, tokenizer: Tokenizer, **settings) -> Examples | Shards:
    """Open token shards, if that is what lies there, or else read examples."""
    if not (path / INDEX).exists():
        return read_examples(path, tokenizer, **settings)
    shards = open_shards(path)
    if shards.tokenizer_sha256 != tokenizer_digest(tokenizer):
        _check_same_ids(path, shards.tokenizer(), tokenizer)
    return shards


def _check_same_ids(path: Path, theirs: Tokenizer, ours: Tokenizer) -> None:
    """Raise DataError unless ids mean the same: one vocabulary has other scores as tokenizer.json and as .model."""
    said = [list(zip(each.vocabulary.pieces, each.vocabulary.types, strict=True)) for each in (theirs, ours)]
    if said[0] == said[1] and (theirs.bos_id, theirs.eos_id) == (ours.bos_id, ours.eos_id):
        return
    pairs = enumerate(zip(*said, strict=False))
    where = next((f": id {i} is {a[0]!r} there and {b[0]!r} in the model" for i, (a, b) in pairs if a != b), "")
    raise DataError(f"{path} was made with another tokenizer than the model's{where}; prepare it with the model's own")
