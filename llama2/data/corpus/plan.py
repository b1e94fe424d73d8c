"""Before any work: what will be read, in which units, and whether a folder already holds another preparation."""

import hashlib
import json
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from llama2.data.corpus.sources import Piece, check_field, cut, find_files, kind_of
from llama2.errors import DataError
from llama2.files.staging import make_parent, staged_file

SETTINGS = "prepare.toml"
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 22, 1 << 26
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 1 << 22, 1 << 28
_MAX_PIECES = 1000


@dataclass(frozen=True)
class Plan:
    """Units of work in the order of the input; which machine or worker does one changes nothing about it."""

    units: tuple[tuple[Piece, ...], ...]
    n_other_files: int
    digest: str
    """Of every input file's path, size and time, and of what else the result depends on."""

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for unit in self.units for piece in unit)


def make_plan(raw: list[Path], *, text_field: str, separator: str | None, more: list[str]) -> Plan:
    """Find all files and cut them into units of 4 to 64 MB. Raises DataError for what a user can mend."""
    files, n_others = find_files(raw)
    size_bytes = sum(path.stat().st_size for path, _ in files)
    unit_bytes = min(max(size_bytes // 256, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    pieces: list[Piece] = []
    checked: set[tuple[int, str | None]] = set()
    for path, source in files:
        kind, _ = kind_of(path)
        if (source, kind) not in checked:  # the first of each kind, not ten thousand
            check_field(path, text_field)
            checked.add((source, kind))
        name = path.relative_to(raw[source]).as_posix() if path != raw[source] else path.name
        pieces += cut(path.resolve(), source, piece_bytes=unit_bytes, separator=separator, name=name)
    said = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path, _ in files]
    digest = hashlib.sha256(json.dumps([said, more]).encode()).hexdigest()
    return Plan(tuple(_grouped(pieces, unit_bytes)), n_others, digest)


def _grouped(pieces: list[Piece], unit_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Put small files together."""
    group: list[Piece] = []
    for piece in pieces:
        held = sum(each.size_bytes for each in group)
        if group and (held + piece.size_bytes > unit_bytes or len(group) == _MAX_PIECES):
            yield tuple(group)
            group = []
        group.append(piece)
    if group:
        yield tuple(group)


def shard_bytes(total_bytes: int) -> int:
    """Return about how much text goes into one shard: 4 to 256 MB, at most 64 shards where that is possible."""
    return min(max(total_bytes // 64, MIN_SHARD_BYTES), MAX_SHARD_BYTES)


def claim(out: Path, settings: dict[str, Any], plan: Plan) -> None:
    """Make the output folder this preparation's, or see that it is. Raises DataError where it is another's."""
    file = out / SETTINGS
    said = {**settings, "inputs_sha256": plan.digest}
    if file.exists():
        _compare(out, tomllib.loads(file.read_text(encoding="utf-8")), said)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not a folder of llama2 prepare; name a new one with --out")
    make_parent(file)
    with staged_file(file) as temporary:
        temporary.write_text(tomli_w.dumps(said), encoding="utf-8")


def _compare(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in [*now, *before]:
        then, wanted = before.get(name, "unset"), now.get(name, "unset")
        if then != wanted and name == "inputs_sha256":
            raise DataError(
                f"the raw files, the tokenizer or the evaluation files changed since {out} was begun; "
                f"name a new --out, or remove {out}"
            )
        if then != wanted:
            raise DataError(
                f"{out} was begun with {name}={then!r}, now it is {wanted!r}; name a new --out, or remove {out}"
            )


@contextmanager
def locked(folder: Path, rank: int) -> Iterator[None]:
    """Hold this rank's lock, so that a second run by mistake does not work against the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank}.lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except OSError:
            raise DataError(
                f"another llama2 prepare with rank {rank} is at work in {folder.parent}; wait for it, or end it first"
            ) from None
        yield


def abandon(out: Path) -> None:
    """Remove what `claim` and the first stage left of a preparation that gives nothing."""
    shutil.rmtree(out / "work", ignore_errors=True)
    (out / SETTINGS).unlink(missing_ok=True)
    if out.exists() and not any(out.iterdir()):
        out.rmdir()
