"""First stage of preparing: one unit of raw files to one part on disk, of cleaned documents and their signatures.

    parts/00017/  text       UTF-8 of the kept documents, one after another, zstandard
                  documents  per document: bytes and characters of the text, number of its source
                  ids        where each was found, one per line, zstandard
                  exact, bands, sketches, sketch_ends     for duplicates (dedup.py)
                  counts.json                             what was read, changed and dropped

A part appears whole or not at all, depends on its files and the options only, and is made in a few blocks' memory.
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llama2.data.corpus.clean import CHANGES, clean
from llama2.data.corpus.decontaminate import Contamination
from llama2.data.corpus.dedup import Signatures, signatures
from llama2.data.corpus.quality import DROPS, Block, Limits, judge
from llama2.data.corpus.sources import Document, Piece, read
from llama2.data.corpus.tally import Tally, excerpt
from llama2.files.staging import staged_folder

BLOCK_CHARS, BLOCK_DOCUMENTS = 1 << 20, 1024
RECORD = np.dtype([("n_bytes", "<u4"), ("n_characters", "<u4"), ("source", "<u4")])
EMPTY, CONTAMINATED = "empty", "contaminated"


@dataclass(frozen=True)
class Options:
    """What decides how documents are read, cleaned and judged."""

    text_field: str
    separator: str | None
    limits: Limits
    threshold: float
    """Jaccard index from which documents count as near-duplicates; at 1 they are not looked for."""
    contamination: Path | None


class PartWriter:
    """Appends blocks of kept documents to the files of a part."""

    def __init__(self, folder: Path):
        import zstandard

        self._stack = ExitStack()
        names = ("text", "documents", "ids", "exact", "bands", "sketches", "sketch_ends")
        self._files: dict[str, Any] = {name: self._stack.enter_context((folder / name).open("wb")) for name in names}
        for name in ("text", "ids"):
            compressor = zstandard.ZstdCompressor(level=1)
            self._files[name] = self._stack.enter_context(compressor.stream_writer(self._files[name]))
        self._n_hashes, self._bands = 0, folder / "bands"
        self.n_documents = 0

    def add(self, documents: list[Document], sources: list[int], texts: list[str], found: Signatures) -> None:
        data = [text.encode("utf-8") for text in texts]
        records = list(zip(map(len, data), map(len, texts), sources, strict=True))
        sizes = np.cumsum(found.sketch_sizes, dtype=np.int64) + self._n_hashes
        self._n_hashes = int(sizes[-1])
        self.n_documents += len(data)
        self._files["text"].write(b"".join(data))
        self._files["ids"].write("".join(f"{document.id}\n" for document in documents).encode("utf-8", "replace"))
        self._files["documents"].write(np.array(records, RECORD).tobytes())
        self._files["exact"].write(found.exact.tobytes())
        self._files["bands"].write(found.bands.tobytes())
        self._files["sketches"].write(found.sketches.tobytes())
        self._files["sketch_ends"].write(sizes.astype("<u8").tobytes())

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._stack.close()
        if kind is None and self.n_documents:  # one band after another, as they will be read
            np.fromfile(self._bands, "<u8").reshape(self.n_documents, -1).T.tofile(self._bands)


def extract(folder: Path, pieces: tuple[Piece, ...], options: Options) -> None:
    """Read, clean and judge the documents of some pieces, and keep them as the part `folder`."""
    if folder.exists():
        return
    start = time.perf_counter()
    counts = {name: Tally() for name in ("read", "problems", "changes", "drops", "kept")}
    with staged_folder(folder) as place:
        with PartWriter(place) as part:
            for block in _blocks(pieces, options, counts):
                _take(block, part, options, counts)
        plain = {name: tally.plain([*CHANGES, EMPTY, *DROPS]) for name, tally in counts.items()}
        seconds = round(time.perf_counter() - start, 3)
        (place / "counts.json").write_text(json.dumps({"seconds": seconds, **plain}), encoding="utf-8")


def _blocks(
    pieces: tuple[Piece, ...], options: Options, counts: dict[str, Tally]
) -> Iterator[list[tuple[Document, int, str]]]:
    """Yield some documents with the number of their source and their text after all changes, not empty."""
    block: list[tuple[Document, int, str]] = []
    n_characters = 0
    for piece in pieces:
        for document in read(piece, _Problems(counts["problems"]), **_reading(options)):
            counts["read"].add(str(piece.source), len(document.text), "")
            text = clean(document.text, counts["changes"], skip=options.limits.skip)
            if not text:
                counts["drops"].add(EMPTY, len(document.text), document.id)
                continue
            if block and (n_characters + len(text) > BLOCK_CHARS or len(block) == BLOCK_DOCUMENTS):
                yield block
                block, n_characters = [], 0
            block.append((document, piece.source, text))
            n_characters += len(text)
    if block:
        yield block


def _reading(options: Options) -> dict:
    return {"text_field": options.text_field, "separator": options.separator}


class _Problems:
    def __init__(self, tally: Tally):
        self.tally = tally

    def __call__(self, reason: str, id: str, seen: str) -> None:
        self.tally.add(reason, 0, f"{id}: {excerpt(seen)}")


def _take(block: list[tuple[Document, int, str]], part: PartWriter, options: Options, counts: dict[str, Tally]) -> None:
    """Judge a block, count what is dropped, write what is kept."""
    texts = [text for _, _, text in block]
    judged = Block(texts)
    reasons = judge(judged, options.limits)
    if options.contamination:
        for number in np.flatnonzero(
            _contamination(options.contamination, options.contamination.stat().st_mtime_ns).found_in(judged.words)
            & judged.alive
        ):
            reasons[number], judged.alive[number] = CONTAMINATED, False
    for (document, _, text), reason in zip(block, reasons, strict=True):
        if reason:
            counts["drops"].add(reason, len(text), f"{document.id}: {excerpt(text)}")
    keep = np.flatnonzero(judged.alive)
    if not len(keep):
        return
    for number in keep:
        counts["kept"].add(str(block[number][1]), len(texts[number]), "")
    part.add(
        [block[number][0] for number in keep],
        [block[number][1] for number in keep],
        [texts[number] for number in keep],
        signatures(judged.words, keep, threshold=options.threshold),
    )


@cache
def _contamination(path: Path, changed_ns: int) -> Contamination:
    return Contamination.load(path)
