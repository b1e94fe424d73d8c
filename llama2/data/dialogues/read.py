"""Fine-tuning files to samples, one after another: files -> records -> formats -> Sample.

Each file is in one record format, told from its first record; in a folder each file has its own. What is not for
training is told to `skipped`, and the first broken record is an error unless `broken` is there to take it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from llama2.data.dialogues.files import find, records
from llama2.data.dialogues.formats import FORMATS, KEYS, detect, parse, unknown
from llama2.data.dialogues.sample import NotForTraining, Sample
from llama2.errors import DataError, did_you_mean

Skipped = Callable[[str, str], None]
"""Told where something stood, and why it is not trained on."""


def read_samples(
    path: str | Path,
    *,
    format: str | None = None,
    skipped: Skipped | None = None,
    broken: Callable[[DataError], None] | None = None,
) -> Iterator[Sample]:
    """Yield the samples of a file or of a folder of files, in the order of their names.

    `format` is one of FORMATS and holds for every record; without it each file's is detected. `skipped` is told of
    trees without an answer, of answers labelled as bad, and of files of other kinds in a folder. `broken` is given the
    error of each record that cannot be used, and reading goes on; without it the error is raised. Raises DataError
    that names file and line, and where no sample is left.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"format={format!r} is not one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    files, others = find(Path(path))
    return _samples(Path(path), files, others, format, skipped or _ignore, broken or _raise)


def _ignore(where: str, reason: str) -> None:
    pass


def _raise(error: DataError) -> None:
    raise error


def _samples(
    path: Path,
    files: list[tuple[Path, str]],
    others: list[str],
    format: str | None,
    skipped: Skipped,
    broken: Callable[[DataError], None],
) -> Iterator[Sample]:
    n_samples = n_skipped = 0
    for name in others:
        skipped(name, "a file of another kind")
    for file, name in files:
        seen = format
        for where, record in records(file, name, KEYS):
            try:
                if isinstance(record, DataError):
                    raise record
                seen = seen or detect(record)
                sample = _sample(record, where, seen, is_forced=format is not None)
            except NotForTraining as reason:
                n_skipped += 1
                skipped(where, str(reason))
            except DataError as error:
                broken(DataError(f"{where}: {error}"))
            else:
                n_samples += 1
                yield sample
    if not n_samples:
        passed = f" ({n_skipped} skipped)" if n_skipped else ""
        raise DataError(f"{path} holds no sample to train on{passed}; wanted at least one dialogue with an answer")


def _sample(record: dict, where: str, format: str | None, *, is_forced: bool) -> Sample:
    if format is None:
        raise unknown(record)
    if not is_forced and (own := detect(record)) not in (None, format):
        raise DataError(
            f"mixed formats: this record is {own!r}, the file began with {format!r}; put each into a file of its "
            "own, or name the one that all of them fit with format="
        )
    return parse(record, format, where)


def detect_samples(path: str | Path) -> str:
    """Return the record format, one of FORMATS, of a file, or of the first file in a folder.

    Raises DataError where there is no record, or the first one is of no known format.
    """
    file, name = find(Path(path))[0][0]
    where, record = next(records(file, name, KEYS))
    if isinstance(record, DataError):
        raise DataError(f"{where}: {record}")
    found = detect(record)
    if found is None:
        raise DataError(f"{where}: {unknown(record)}")
    return found
