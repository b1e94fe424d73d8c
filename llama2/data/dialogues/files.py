"""Files of records, one record after another: where it stands, and what it holds.

    .jsonl     one record per line, streamed        .parquet   one record per row (llama2[data])
    .json      an array, or an object that holds    .txt       one record {"text"}, as `llama2 prepare` has it
               one, or lines                        each may be .gz or .zst

Knows nothing of what the records mean. A record that cannot be read is yielded as its error: the caller may go on.
"""

import json
import os
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama2.data.corpus.containers import TooDamaged, _parquet, open_stream, parquet_columns, require
from llama2.data.corpus.plain import MAX_LINE_BYTES, read_text
from llama2.data.corpus.sources import COMPRESSED
from llama2.errors import DataError, did_you_mean

KINDS = (".jsonl", ".json", ".parquet", ".txt")

Found = tuple[str, dict | DataError]
"""Where a record stands, and the record, or why it is none."""


def kind_of(path: Path) -> str | None:
    """Return the ending that says how a file is read, or None."""
    name = path.name.lower()
    name = next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)
    ending = os.path.splitext(name)[1]
    return ending if ending in KINDS else None


def find(path: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """Return the files to read and their names below the folder, in order of their names; and the names of others.

    Folders are searched to their depths, hidden names left out. Raises DataError for what does not exist, cannot be
    read, is of an unknown kind though named, and where nothing is left.
    """
    wanted = f"{', '.join(KINDS)}, each plain, .gz or .zst"
    if not path.exists():
        raise DataError(f"{path} does not exist; give a file or a folder of {wanted}")
    if not path.is_dir():
        if kind_of(path) is None:
            suffix = path.suffix or "no suffix"
            raise DataError(f"{path} is of an unknown kind ({suffix}{did_you_mean(suffix, KINDS)}); wanted {wanted}")
        return [(path, path.name)], []
    names = sorted(_below(path))
    files = [(path / name, name) for name in names if kind_of(Path(name))]
    if not files:
        raise DataError(f"{path} holds no file to read; wanted {wanted}")
    return files, [name for name in names if not kind_of(Path(name))]


def _below(folder: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; give it the rights, or name another")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name).relative_to(folder).as_posix() for name in names if not name.startswith("."))


def records(path: Path, name: str, keys: Collection[str]) -> Iterator[Found]:
    """Yield the records of a file, called `name`; `keys` are those that records may have and that are looked at.

    Raises DataError where the file cannot be read, or holds none.
    """
    readers = {".jsonl": _lines, ".json": _json, ".parquet": _rows, ".txt": _texts}
    with _told(name):
        n_records = 0
        for found in readers[kind_of(path) or ""](path, name, keys):
            n_records += 1
            yield found
    if not n_records:
        raise DataError(f"{name} is empty; wanted at least one record: fill it, or take it out")


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, TooDamaged) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise DataError(f"{name} cannot be read: {reason}; give a whole file that may be read") from error


def _lines(path: Path, name: str, keys: Collection[str]) -> Iterator[Found]:
    with open_stream(path) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise DataError(f"{name}:{number} is longer than {MAX_LINE_BYTES} bytes; cut the record up")
            if line.strip():
                yield _record(f"{name}:{number}", line)


def _record(where: str, line: bytes) -> Found:
    try:
        record = json.loads(line.rstrip().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return where, DataError(f"broken JSON: {error.msg} at column {error.colno}; mend the line, or take it out")
    except UnicodeDecodeError as error:
        return where, DataError(f"not UTF-8 at byte {error.start}; save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return where, DataError(f"broken JSON: {error}; mend the line, or take it out")
    return where, _object(record)


def _object(record: object) -> dict | DataError:
    if isinstance(record, dict):
        return record
    return DataError(f"a {type(record).__name__} stands here; wanted an object with keys such as 'messages'")


def _json(path: Path, name: str, keys: Collection[str]) -> Iterator[Found]:
    with open_stream(path) as stream:
        data = stream.read()
    if not data.strip():
        return
    try:
        whole = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            yield from _lines(path, name, keys)
            return
        raise DataError(f"{name}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}; mend it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: broken JSON: {error}; mend it") from None
    for i, record in enumerate(_array(whole, name, keys)):
        yield f"{name}[{i}]", _object(record)


def _array(whole: object, name: str, keys: Collection[str]) -> list:
    """Return the records of a JSON file: an array, the one that an object holds, or the object where it is a record."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        raise DataError(f"{name} holds a {type(whole).__name__}; wanted an array of records")
    if any(key in keys for key in whole):
        return [whole]
    arrays = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(arrays) != 1:
        held = f"arrays of records in {', '.join(map(repr, arrays))}" if arrays else "an object without records"
        raise DataError(f"{name} holds {held}; wanted one array of records: put each into a file of its own")
    return whole[arrays[0]]


def _rows(path: Path, name: str, keys: Collection[str]) -> Iterator[Found]:
    require("pyarrow", path)
    names = parquet_columns(path)
    columns = [column for column in names if column in keys]
    if not columns:
        wanted = "'messages', 'conversations', 'prompt', 'instruction', 'chosen' or 'text'"
        held = ", ".join(map(repr, names)) or "none"
        raise DataError(f"{name} has no column to learn from; it has {held}; wanted {wanted}: rename one")
    with _parquet(path) as file:
        number = 0
        for batch in file.iter_batches(256, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f"{name} row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Leave out what a row does not have: a column of objects gives each of them every key of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _texts(path: Path, name: str, keys: Collection[str]) -> Iterator[Found]:
    def told(reason: str, suffix: str, seen: str) -> None:
        if reason == "not_utf8":
            raise DataError(f"{name}{suffix} is not UTF-8 ({seen}); save it as UTF-8")

    for suffix, text in read_text(path, 0, -1, told, None):
        yield f"{name}{suffix}", {"text": text}
