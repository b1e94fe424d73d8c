"""Plain text and JSON lines to documents, as streams: a file of any size in a few megabytes.

Files may be cut at byte offsets; the caller sees to it that the offsets lie where documents begin.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from llama2.data.corpus.containers import open_stream

MAX_CHARS = 1 << 21
"""A longer document is cut at a line's end: tokenising one takes about 60 bytes of memory per character."""
MAX_LINE_BYTES = 1 << 26

Problems = Callable[[str, str, str], None]
"""Told of a reason, the id of a document or file, and what was seen there."""


def read_lines(path: Path, start: int, end: int, problems: Problems, text_field: str) -> Iterator[tuple[str, str]]:
    number = 0
    with open_stream(path) as stream:
        if start:
            stream.seek(start)
        left = end - start if end >= 0 else -1
        while left and (line := stream.readline(MAX_LINE_BYTES)):
            number += 1
            left -= len(line) if left > 0 else 0
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                problems("broken_line", f":{number}", f"longer than {MAX_LINE_BYTES} bytes")
                while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    left -= len(rest) if left > 0 else 0
                left -= len(rest) if left > 0 else 0
            elif not line.isspace():
                try:
                    yield f":{number}", record_text(json.loads(line), text_field)
                except (ValueError, RecursionError) as error:
                    problems("broken_line", f":{number}", str(error))


def record_text(record: object, text_field: str) -> str:
    """Return the text of one JSON record. Raises ValueError, naming what is there instead."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, wanted an object with {text_field!r}")
    text = record.get(text_field)
    if not isinstance(text, str):
        raise ValueError(f"no text in {text_field!r}; the fields are {', '.join(map(str, record))}")
    return text


def read_text(path: Path, start: int, end: int, problems: Problems, separator: str | None) -> Iterator[tuple[str, str]]:
    """Yield each part of a text file; without a separator there is one, cut where it is too long to hold."""
    pattern = separator_pattern(separator)
    with open_stream(path) as plain:
        stream = _without_bom(plain, start)
        parts = _parts(stream, end - start if end >= 0 else -1, pattern)
        for number, (data, is_cut) in enumerate(parts, 1):
            id = f":{number}" if pattern or is_cut or number > 1 or start else ""
            if is_cut or (number == 1 and start and not pattern):
                problems("cut_long_document", id, f"{len(data)} bytes of it")
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                problems("not_utf8", id, str(error))
                text = data.decode("utf-8", "replace")
            yield id, text


def separator_pattern(separator: str | None) -> re.Pattern[bytes] | None:
    """A separator of nothing but line ends means blank lines, as many as there are."""
    if not separator:
        return None
    if not separator.strip("\n"):
        return re.compile(b"(?:\r?\n){%d,}" % len(separator))
    return re.compile(re.escape(separator.encode("utf-8")))


def _without_bom(stream: BinaryIO, start: int) -> BinaryIO:
    """Go to where reading starts; a mark of UTF-8 is left out, UTF-16 is turned into UTF-8."""
    if start:
        stream.seek(start)
        return stream
    head = stream.peek(3)[:3]  # pyright: ignore[reportAttributeAccessIssue]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return codecs.EncodedFile(stream, "utf-8", "utf-16", errors="replace")  # pyright: ignore[reportReturnType]
    if head == codecs.BOM_UTF8:
        stream.read(3)
    return stream


def _parts(stream: BinaryIO, n_bytes: int, pattern: re.Pattern[bytes] | None) -> Iterator[tuple[bytes, bool]]:
    """Yield what stands between separators; what is longer than MAX_CHARS bytes comes in parts cut at line ends."""
    rest = b""
    while n_bytes and (chunk := stream.read(1 << 20 if n_bytes < 0 else min(1 << 20, n_bytes))):
        n_bytes -= len(chunk) if n_bytes > 0 else 0
        rest += chunk
        if pattern:
            *parts, rest = pattern.split(rest)
            yield from ((part, False) for part in parts if part and not part.isspace())
        while len(rest) > MAX_CHARS + (1 << 20):
            end = rest.rfind(b"\n", 0, MAX_CHARS) + 1 or rest.rfind(b" ", 0, MAX_CHARS) + 1 or _whole_character(rest)
            yield rest[:end], True
            rest = rest[end:]
    if rest and not rest.isspace():
        yield rest, False


def _whole_character(data: bytes) -> int:
    end = MAX_CHARS
    while data[end] & 0xC0 == 0x80:
        end -= 1
    return end
