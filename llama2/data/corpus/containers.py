"""What text lies in: gzip, zstandard and Parquet files, opened as streams, and the libraries that extras bring.

Knows nothing of documents. Damage that a library reports in its own way becomes `TooDamaged`.
"""

import gzip
import importlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llama2.errors import DataError


class TooDamaged(Exception):
    """A file cannot be read on from here."""


def require(library: str, path: Path) -> None:
    """Raise DataError unless a library that this file needs is installed."""
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise DataError(
            f"{path} needs {library}, which is not installed ({error}); run: pip install 'llama2[data]'"
        ) from None


@contextmanager
def open_stream(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed by its name. A damaged one raises OSError, EOFError, zlib.error or TooDamaged later."""
    name = str(path).lower()
    with open(path, "rb") as file:
        if name.endswith(".gz"):
            with gzip.open(file) as stream:
                yield stream  # pyright: ignore[reportReturnType]
        elif name.endswith(".zst"):
            yield io.BufferedReader(_Zstandard(file), 1 << 17)  # pyright: ignore[reportReturnType]
        else:
            yield file


class _Zstandard(io.RawIOBase):
    """Frames of zstandard one after another. Its own reader takes a file that was cut off for a whole one."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._zstandard, self._file = zstandard, file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh, self._input, self._output = True, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            data = self._input or self._file.read(1 << 16)
            if not data and self._fresh:
                return 0
            if not data:
                raise TooDamaged("the zstandard data ends in the middle")
            self._take(data)
        n = min(len(buffer), len(self._output))
        buffer[:n], self._output = self._output[:n], self._output[n:]
        return n

    def _take(self, data: bytes) -> None:
        try:
            self._output, self._fresh, self._input = self._frame.decompress(data), False, b""
        except self._zstandard.ZstdError as error:
            raise TooDamaged(str(error)) from None
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame, self._fresh = self._zstandard.ZstdDecompressor().decompressobj(), True


@contextmanager
def _parquet(path: Path):
    """Open a Parquet file, a compressed one through a temporary file, since it is read from its end."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_stream(path) as stream, tempfile.TemporaryFile() as temporary:
            if path.suffix.lower() in (".gz", ".zst"):
                shutil.copyfileobj(stream, temporary, 1 << 20)
                stream = temporary
            yield pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 16)
    except (pyarrow.ArrowException, ValueError) as error:
        raise TooDamaged(str(error)) from None


def parquet_columns(path: Path) -> list[str]:
    with _parquet(path) as file:
        return file.schema_arrow.names


def parquet_groups(path: Path, piece_bytes: int) -> list[tuple[int, int]]:
    """Return [first, last) row groups that together hold about piece_bytes of the file each."""
    with _parquet(path) as file:
        marks, held = [0], 0
        for number in range(file.num_row_groups):
            held += file.metadata.row_group(number).total_byte_size
            if held >= piece_bytes:
                marks, held = [*marks, number + 1], 0
        if marks[-1] < file.num_row_groups or len(marks) == 1:
            marks.append(file.num_row_groups)
    return list(itertools.pairwise(marks))


def read_parquet(
    path: Path, first: int, last: int, column: str, problems: Callable[[str, str, str], None]
) -> Iterator[tuple[str, str]]:
    """Yield the number of each row and its text, a few rows in memory at a time."""
    with _parquet(path) as file:
        if column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise TooDamaged(f"no column {column!r}; the columns are {names}")
        last = file.num_row_groups if last < 0 else last
        number = sum(file.metadata.row_group(group).num_rows for group in range(first))
        rows = file.iter_batches(256, row_groups=list(range(first, last)), columns=[column], use_threads=False)
        for batch in rows:
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield f":{number}", text
                else:
                    problems("broken_line", f":{number}", f"a {type(text).__name__}, wanted text")
