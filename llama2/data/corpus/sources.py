"""Raw files to documents, one after another, in bounded memory.

    .txt .md    one document, or many with a separator     .html .htm  one page       (llama2[data])
    .jsonl      one document per line                      .warc       many pages     (llama2[data])
    .parquet    one document per row      (llama2[data])   each may be .gz or .zst

The work is cut into pieces that can be read by themselves: whole files, or parts of large plain ones. What cannot
be read is told to a `Problems` function and passed over; only a user's mistake is an error. Nothing is cleaned here.
"""

import codecs
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llama2.data.corpus.containers import (
    TooDamaged,
    open_stream,
    parquet_columns,
    parquet_groups,
    read_parquet,
    require,
)
from llama2.data.corpus.markup import read_html, read_warc
from llama2.data.corpus.plain import MAX_CHARS, MAX_LINE_BYTES, Problems, read_lines, read_text, separator_pattern
from llama2.errors import DataError, did_you_mean

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".html": "html",
    ".htm": "html",
    ".warc": "warc",
}
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Document:
    """One text and where it was found, as `file.jsonl.gz:17` (the 17th line, row, record or part)."""

    text: str
    id: str


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read by itself: bytes, or row groups of Parquet. `end` -1 is the file's end."""

    path: str
    name: str
    """The file's, as documents are called: below the folder that was named."""
    source: int
    """Which of the named inputs it belongs to."""
    start: int
    end: int
    size_bytes: int


def kind_of(path: Path) -> tuple[str | None, str]:
    """Return the kind of a file (None where it is not known) and its compression, by its name."""
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return KINDS.get(os.path.splitext(name.removesuffix(compression))[1]), compression


def find_files(raw: list[Path]) -> tuple[list[tuple[Path, int]], int]:
    """Return every file to read with the number of the input that names it, in a stable order; and how many were not.

    Folders are searched to their depths, hidden names left out. Raises DataError for what does not exist, cannot be
    read, is of an unknown kind though named, and where nothing is left.
    """
    if not raw:
        raise DataError("no raw text named; give files or folders of " + ", ".join(KINDS))
    found: dict[Path, tuple[Path, int]] = {}
    n_others = 0
    for number, path in enumerate(raw):
        if not path.exists():
            raise DataError(f"{path} does not exist; give a file or a folder of " + ", ".join(KINDS))
        files = _files_below(path) if path.is_dir() else [path]
        for file in files:
            if kind_of(file)[0] is None and file is not path:
                n_others += 1
            else:
                found.setdefault(file.resolve(), (file, number))
    files = list(found.values())
    for file, _ in files:
        _check(file)
    if not any(file.stat().st_size for file, _ in files):
        what = "no file of a known kind" if not files else "nothing but empty files"
        raise DataError(f"{what} in {', '.join(map(str, raw))}; wanted text in " + ", ".join(KINDS))
    return files, n_others


def _files_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; give it the rights, or name another")

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _check(path: Path) -> None:
    kind, _ = kind_of(path)
    if kind is None:
        suffix = path.suffix or "no suffix"
        raise DataError(
            f"{path} is of an unknown kind ({suffix}{did_you_mean(suffix, KINDS)}); wanted {', '.join(KINDS)}, "
            "each plain, .gz or .zst"
        )
    if not path.is_file():
        raise DataError(f"{path} is a device or a pipe, not a file; write it to a file first")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give it the rights, or name another") from error
    for library in {"parquet": ("pyarrow",), "html": ("trafilatura",), "warc": ("fastwarc", "trafilatura")}.get(
        kind, ()
    ):
        require(library, path)


def check_field(path: Path, text_field: str) -> None:
    """Raise DataError where the first record of a file has no such text; a damaged file is passed over later."""
    kind, _ = kind_of(path)
    try:
        if kind == "parquet" and text_field not in (columns := parquet_columns(path)):
            raise DataError(
                f"{path} has no column {text_field!r}; it has {', '.join(columns)}: name one by --text-field"
            )
        if kind == "jsonl":
            with open_stream(path) as stream:
                record = json.loads(stream.readline(MAX_LINE_BYTES))
            if isinstance(record, dict) and text_field not in record:
                fields = ", ".join(record)
                raise DataError(f"{path} has no field {text_field!r}; it has {fields}: name one by --text-field")
    except (OSError, EOFError, zlib.error, TooDamaged, json.JSONDecodeError, UnicodeDecodeError):
        pass


def cut(
    path: Path, source: int = 0, *, piece_bytes: int = 1 << 62, separator: str | None = None, name: str | None = None
) -> list[Piece]:
    """Return the pieces of a file: plain text and lines are cut where a document ends, Parquet between row groups."""
    kind, compression = kind_of(path)
    size_bytes = path.stat().st_size
    name = name or path.name
    whole = [Piece(str(path), name, source, 0, -1, size_bytes)]
    if compression or size_bytes <= piece_bytes or kind in ("html", "warc"):
        return whole
    if kind == "parquet":
        try:
            groups = parquet_groups(path, piece_bytes)
        except TooDamaged:
            return whole
        return [Piece(str(path), name, source, first, last, size_bytes // len(groups)) for first, last in groups]
    with path.open("rb") as file:
        if kind == "text" and file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return whole
        pattern = separator_pattern(separator if kind == "text" else "\n") or re.compile(b"\n")
        marks = [0]
        for mark in range(piece_bytes, size_bytes, piece_bytes):
            end = _next_end(file, max(mark, marks[-1]), pattern)
            if marks[-1] < end < size_bytes:
                marks.append(end)
    ends = [*marks[1:], size_bytes]
    return [Piece(str(path), name, source, start, end, end - start) for start, end in zip(marks, ends, strict=True)]


def _next_end(file: BinaryIO, offset: int, pattern: re.Pattern[bytes]) -> int:
    """Return where the first separator at or after an offset ends, or the end of the file."""
    file.seek(offset)
    data = b""
    while chunk := file.read(1 << 16):
        data += chunk
        match = pattern.search(data)
        if match and match.end() < len(data):
            return offset + match.end()
        if not match:
            offset, data = offset + max(0, len(data) - 256), data[-256:]
    return offset + len(data)


def read(
    piece: Piece, problems: Problems, *, text_field: str = "text", separator: str | None = None
) -> Iterator[Document]:
    """Yield the documents of a piece. A file that breaks in the middle gives those before it, and a problem."""
    path = Path(piece.path)
    kind, _ = kind_of(path)
    name = piece.name + (f"@{piece.start}" if piece.start and kind != "parquet" else "")

    def told(reason: str, suffix: str, seen: str) -> None:
        problems(reason, name + suffix, seen)

    readers = {
        "text": lambda: read_text(path, piece.start, piece.end, told, separator),
        "jsonl": lambda: read_lines(path, piece.start, piece.end, told, text_field),
        "parquet": lambda: read_parquet(path, piece.start, piece.end, text_field, told),
        "html": lambda: read_html(path, told),
        "warc": lambda: read_warc(path, told),
    }
    try:
        for suffix, text in readers[str(kind)]():
            yield from _bounded(text, f"{name}{suffix}", problems)
    except (OSError, EOFError, zlib.error, TooDamaged) as error:
        problems("broken_file", name, str(error) or type(error).__name__)


def _bounded(text: str, id: str, problems: Problems) -> Iterator[Document]:
    if len(text) <= MAX_CHARS:
        yield Document(text, id)
        return
    problems("cut_long_document", id, f"{len(text)} characters")
    start, number = 0, 0
    while start < len(text):
        end = _line_end(text, start, min(start + MAX_CHARS, len(text)))
        number += 1
        yield Document(text[start:end], f"{id}/{number}")
        start = end


def _line_end(text: str, start: int, limit: int) -> int:
    """Return one past the last line's end before the limit, else one past the last space, else the limit."""
    if limit == len(text):
        return limit
    return text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit) + 1 or limit
