"""Last stage of preparing: the documents that stay, from some parts, to one token shard."""

import io
import json
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from llama2.data.corpus.extract import RECORD
from llama2.data.shards import ShardWriter, token_dtype
from llama2.files.staging import staged_file
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer


def tokenise(
    marker: Path, out: Path, name: str, parts: tuple[tuple[Path, int], ...], fates: Path, fate: int, vocabulary: Path
) -> None:
    """Write the documents of one fate in some parts as the shard `name`; `marker` then holds what it holds.

    A part comes with the number of its first document in the whole corpus, by which its fate is looked up.
    """
    if marker.exists():
        return
    start = time.perf_counter()
    tokenizer = _tokenizer(vocabulary, vocabulary.stat().st_mtime_ns)
    sources: dict[int, list[int]] = {}
    with ShardWriter(out, name, dtype=token_dtype(tokenizer.n_vocab)) as shard:
        for text, source in _documents(parts, fates, fate):
            ids = tokenizer.encode(text.decode("utf-8"), bos=True, eos=True)
            shard.add(ids, len(text))
            counts = sources.setdefault(source, [0, 0])
            counts[0], counts[1] = counts[0] + 1, counts[1] + len(ids)
    seconds = round(time.perf_counter() - start, 3)
    with staged_file(marker) as path:
        path.write_text(json.dumps({"entry": shard.entry, "sources": sources, "seconds": seconds}))


@cache
def _tokenizer(path: Path, changed_ns: int) -> Tokenizer:
    return load_tokenizer(path)


def _documents(parts: tuple[tuple[Path, int], ...], fates: Path, fate: int) -> Iterator[tuple[bytes, int]]:
    all_fates = np.memmap(fates, np.uint8, "r")
    for folder, first in parts:
        records = np.fromfile(folder / "documents", RECORD)
        wanted = all_fates[first : first + len(records)] == fate
        for number, text in enumerate(part_texts(folder, records)):
            if wanted[number]:
                yield text, int(records[number]["source"])


def part_texts(folder: Path, records: np.ndarray) -> Iterator[bytes]:
    """Yield the texts of a part in order."""
    import zstandard

    with (folder / "text").open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        buffered = io.BufferedReader(reader, 1 << 18)  # pyright: ignore[reportArgumentType]
        for n_bytes in records["n_bytes"].tolist():
            yield buffered.read(n_bytes)


def part_ids(folder: Path) -> list[str]:
    """Return where each document of a part was found."""
    import zstandard

    with (folder / "ids").open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        return reader.read().decode("utf-8").split("\n")[:-1]
