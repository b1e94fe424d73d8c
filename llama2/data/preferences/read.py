"""Files of preferences to pairs, or to labelled answers, one after another: files -> records -> formats -> Pair.

Files are those of `dialogues`. What is not for training is told to `skipped`, and the first broken record is an error
unless `broken` is there to take it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from llama2.data.dialogues.files import find, records
from llama2.data.dialogues.formats import Record
from llama2.data.dialogues.read import Skipped, _ignore
from llama2.data.dialogues.sample import NotForTraining
from llama2.data.preferences import formats
from llama2.data.preferences.pair import Labelled, Pair
from llama2.errors import DataError

Broken = Callable[[DataError], None]
Judged = TypeVar("Judged", Pair, Labelled)


def read_pairs(path: str | Path, *, skipped: Skipped | None = None, broken: Broken | None = None) -> Iterator[Pair]:
    """Yield the pairs of a file or of a folder of files, in the order of their names.

    `skipped` is told of pairs of Anthropic's that part before the last answer, and of files of other kinds in a
    folder. `broken` is given the error of each record that cannot be used, and reading goes on; without it the error
    is raised. Raises DataError that names file and line, and where no pair is left.
    """
    return _read(Path(path), formats.pair, "pair of answers", skipped, broken)


def read_labelled(
    path: str | Path, *, skipped: Skipped | None = None, broken: Broken | None = None
) -> Iterator[Labelled]:
    """Yield the labelled answers of a file or folder; `skipped`, `broken` and errors as in `read_pairs`."""
    return _read(Path(path), formats.labelled, "labelled answer", skipped, broken)


def _read(
    path: Path,
    parse: Callable[[Record, str], Judged],
    what: str,
    skipped: Skipped | None,
    broken: Broken | None,
) -> Iterator[Judged]:
    n_found = n_skipped = 0
    files, others = find(path)
    skipped = skipped or _ignore
    for name in others:
        skipped(name, "a file of another kind")
    for file, name in files:
        for where, record in records(file, name, formats.KEYS):
            try:
                if isinstance(record, DataError):
                    raise record
                found = parse(record, where)
            except NotForTraining as reason:
                n_skipped += 1
                skipped(where, str(reason))
            except DataError as error:
                if not broken:
                    raise DataError(f"{where}: {error}") from None
                broken(DataError(f"{where}: {error}"))
            else:
                n_found += 1
                yield found
    if not n_found:
        passed = f" ({n_skipped} skipped)" if n_skipped else ""
        raise DataError(f"{path} holds no {what} to train on{passed}; wanted at least one")
