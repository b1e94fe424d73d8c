"""Labelled files to items: what is asked, of which text, and the right answer.

    .jsonl .json    {"task", "language", "instruction", "input", "output"}    the story world's tasks.jsonl
    .jsonl .json    {"text", "label"}    {"source", "target"}                 with the task named
    .tsv .txt       text TAB label       source TAB target                    with the task named

Knows nothing of models.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.data.dialogues.files import records
from llama2.errors import DataError, did_you_mean
from llama2.tasks.prompts import translations

CHOICES = ("sentiment", "classify")
"""Tasks whose answer is one of a few labels."""
TASKS = (*CHOICES, "answer", "title", "summarise", "translate")
_KEYS = ("task", "language", "instruction", "input", "output", "text", "label", "source", "target", "target_language")


@dataclass(frozen=True)
class Item:
    """One question with its right answer."""

    where: str
    """Where it stands: `tasks.jsonl:12`."""
    task: str
    instruction: str | None
    """None asks in the words of tasks.toml."""
    input: str
    output: str
    language: str | None = None
    """Of the instruction and, unless something is translated, of input and output."""
    source_language: str | None = None
    target_language: str | None = None
    """What is translated into; told from the instruction where that is one of tasks.toml."""

    @property
    def group(self) -> str | None:
        """The language, or the pair of languages where something is translated."""
        if self.task != "translate" or self.target_language is None:
            return self.language
        source = self.source_language or self.language
        return f"{source}-{self.target_language}" if source else f"?-{self.target_language}"


def read_items(
    path: Path,
    *,
    task: str | None = None,
    language: str | None = None,
    source_language: str | None = None,
    target_language: str | None = None,
    labels: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[Item]:
    """Return the items of a file, the first `limit` of them. Raises DataError, which names the line.

    task: the task of records that name none, and of those that do the one to keep. language and the languages of a
    translation are for records that do not name them. labels: the model's word for each of the file's labels, as in
    {"1": "positive", "0": "negative"}.
    """
    if task is not None and task not in TASKS:
        raise DataError(f"task={task!r} is not one of {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
    items: list[Item] = []
    for where, record in _found(path):
        record = {"language": language, "source_language": source_language, "target_language": target_language} | record
        try:
            item = _item(where, record, task, labels or {})
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if task in (None, item.task):
            items.append(item)
        if len(items) == limit:
            break
    if not items:
        raise DataError(f"{path} holds no item{'' if task is None else f' of the task {task!r}'}; wanted at least one")
    return items


def _found(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix in (".tsv", ".txt"):
        yield from _pairs(path)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path} is of an unknown kind; wanted .jsonl, .json, .tsv or .txt")
    for where, record in records(path, path.name, _KEYS):
        if isinstance(record, DataError):
            raise DataError(f"{where}: {record}")
        yield where, record


def _pairs(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield lines of two texts with a tab between them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = line.rstrip("\r").split("\t")
        where = f"{path.name}:{number}"
        if len(parts) != 2:
            raise DataError(f"{where} has {len(parts)} columns; wanted two, text TAB answer")
        yield where, {"input": parts[0], "output": parts[1]}


def _item(where: str, record: dict[str, Any], task: str | None, labels: Mapping[str, str]) -> Item:
    task = record.get("task") or task
    if task is None:
        raise DataError("the record names no task; name it, e.g. --task sentiment")
    if task not in TASKS:
        raise DataError(f"the task {task!r} is not one of {', '.join(TASKS)}{did_you_mean(str(task), TASKS)}")
    for given, right in (("text", "label"), ("source", "target"), ("input", "output")):
        if given in record and right in record:
            break
    else:
        raise DataError("wanted 'input' and 'output', 'text' and 'label', or 'source' and 'target'; rename the keys")
    for key in (given, right, "instruction", "language"):
        value = record.get(key)
        if not isinstance(value, str) and not (value is None and key not in (given, right)):
            raise DataError(f"{key!r} is {value!r}; wanted text")
    if record.get("history"):
        raise DataError("it has a 'history', and a task is judged alone; take the record out, or name another file")
    instruction, language, target = record.get("instruction"), record["language"], record["target_language"]
    if task == "answer" and not (instruction or "").strip():
        raise DataError("the task 'answer' needs its question as 'instruction'")
    if task == "translate" and target is None:
        _, target = translations().get(instruction or "", (None, None))
    output = record[right]
    if task in CHOICES:
        output = labels.get(output.strip(), output.strip())
    if not record[given].strip() or not output.strip():
        raise DataError(f"{given!r} or {right!r} is empty; wanted text: write it, or take the record out")
    return Item(where, task, instruction, record[given], output, language, record["source_language"], target)
