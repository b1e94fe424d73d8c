"""Token shards: documents as token ids on disk, memory-mapped, with an index.

    OUT/
      index.json       what the set holds and which tokenizer made it
      00000.tokens     token ids, little-endian, document after document, each with BOS and EOS
      00000.lengths    two uint32 per document: its tokens, and the UTF-8 bytes of its text
      tokenizer.*      the tokenizer itself
      heldout/         a set of the same kind that no one trains on, if one was asked for

Nothing here is read into memory but the lengths. A set is whole when its index.json is there.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from llama2.errors import DataError
from llama2.files.staging import make_parent, staged_file
from llama2.tokenizer.formats import load_tokenizer, save_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer

FORMAT, VERSION = "llama2 shards", 1
INDEX = "index.json"


def token_dtype(n_vocab: int) -> np.dtype:
    """Return the smallest type that holds every id."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return what tells two vocabularies apart: a hash of the pieces, their kinds and scores, and the special ids."""
    vocabulary = tokenizer.vocabulary
    scores = [] if vocabulary.scores is None else [float(np.float32(score)) for score in vocabulary.scores]
    said = (vocabulary.kind, vocabulary.pieces, vocabulary.types, scores, tokenizer.bos_id, tokenizer.eos_id)
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class ShardWriter:
    """Writes one shard; it exists under its name only when the `with` block ends well."""

    def __init__(self, folder: Path, name: str, *, dtype: np.dtype):
        self.folder, self.name, self.dtype = folder, name, dtype
        self.n_documents = self.n_tokens = self.n_bytes = 0
        make_parent(folder / name)
        self._files = [(folder / f".{name}.{kind}").open("wb") for kind in ("tokens", "lengths")]

    def add(self, ids: list[int] | np.ndarray, n_bytes: int) -> None:
        """Append one document: ids with BOS and EOS, and the UTF-8 bytes that its text had."""
        self._files[0].write(np.asarray(ids, dtype=self.dtype).tobytes())
        self._files[1].write(np.asarray([len(ids), n_bytes], dtype="<u4").tobytes())
        self.n_documents += 1
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes

    @property
    def entry(self) -> dict[str, object]:
        """What index.json says of this shard."""
        counts = {"n_documents": self.n_documents, "n_tokens": self.n_tokens, "n_bytes": self.n_bytes}
        return {"name": self.name, **counts}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for file in self._files:
            file.close()
            if kind is not None:
                os.unlink(file.name)
            else:
                os.replace(file.name, self.folder / Path(file.name).name.removeprefix("."))


def write_index(folder: Path, tokenizer: Tokenizer, entries: list[dict[str, object]]) -> None:
    """Close a set: copy the tokenizer beside the shards and write index.json, last."""
    for format in ("model", "json") if tokenizer.vocabulary.kind == "spm" else ("json",):
        if not (folder / f"tokenizer.{format}").exists():
            save_tokenizer(tokenizer, folder, format=format)
    totals = {key: sum(int(str(entry[key])) for entry in entries) for key in ("n_documents", "n_tokens", "n_bytes")}
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": {"<u2": "uint16", "<u4": "uint32"}[token_dtype(tokenizer.n_vocab).str],
        "n_vocab": tokenizer.n_vocab,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        **totals,
        "shards": entries,
    }
    with staged_file(folder / INDEX) as path:
        path.write_text(json.dumps(index, indent=1) + "\n")


@dataclass(frozen=True)
class Shards:
    """A set on disk. `shards.document(i)` maps it; lengths of all documents are in memory."""

    folder: Path
    dtype: np.dtype
    n_vocab: int
    tokenizer_sha256: str
    names: tuple[str, ...]
    lengths: np.ndarray
    """Tokens of each document, BOS and EOS included."""
    n_bytes: np.ndarray
    """UTF-8 bytes of each document's text."""
    first: np.ndarray
    """Number of the first document of each shard, and one past the last."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def n_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def n_targets(self) -> int:
        """Tokens that one pass trains: all but the first of each document."""
        return self.n_tokens - len(self)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each document begins in the concatenation of all shards, in tokens."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        files = [self.folder / f"{name}.tokens" for name in self.names]
        return [np.memmap(file, self.dtype, "r") if file.stat().st_size else np.zeros(0, self.dtype) for file in files]

    def document(self, number: int) -> np.ndarray:
        """Return the ids of one document, mapped from the file."""
        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        start = self._starts[number] - self._starts[self.first[shard]]
        return self._maps[shard][start : start + self.lengths[number]]

    def trained(self, number: int) -> None:
        """Every id is trained but the first."""

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)


def open_shards(folder: Path) -> Shards:
    """Open a set; its files are checked against its index. Raises DataError."""
    try:
        index = json.loads((folder / INDEX).read_text())
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise DataError(f"{folder / INDEX} is not of {FORMAT}, version {VERSION}; prepare the data again")
        names = tuple(str(shard["name"]) for shard in index["shards"])
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[index["dtype"]])
        counts = [_read_lengths(folder, shard, dtype) for shard in index["shards"]]
        digest, n_vocab = str(index["tokenizer_sha256"]), int(index["n_vocab"])
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no token shards: {error.filename} is missing; make them with llama2 prepare"
        ) from None
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise DataError(f"{folder / INDEX} is broken ({error}); prepare the data again") from error
    lengths = np.concatenate([np.zeros((0, 2), "<u4"), *counts])
    if not len(lengths):
        raise DataError(f"{folder} holds no documents; prepare it again from text that passes the filters")
    first = np.cumsum([0, *(len(each) for each in counts)])
    return Shards(folder, dtype, n_vocab, digest, names, lengths[:, 0], lengths[:, 1], first)


def _read_lengths(folder: Path, shard: dict[str, int | str], dtype: np.dtype) -> np.ndarray:
    name = str(shard["name"])
    if Path(name).name != name:
        raise DataError(f"{folder / INDEX} names a shard {name!r} outside its folder; prepare the data again")
    lengths = np.fromfile(folder / f"{name}.lengths", "<u4").reshape(-1, 2)
    n_tokens, size = int(lengths[:, 0].sum(dtype=np.int64)), (folder / f"{name}.tokens").stat().st_size
    if len(lengths) != shard["n_documents"] or n_tokens != shard["n_tokens"] or size != n_tokens * dtype.itemsize:
        raise DataError(
            f"{folder / name}.tokens does not hold the {shard['n_tokens']} tokens in {shard['n_documents']} documents "
            "that index.json says; prepare the data again"
        )
    return lengths
