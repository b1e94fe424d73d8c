"""Files of anything that asks something, to what is to be answered: files -> records -> AskedPrompt.

    {"prompt"}                         a text, a message, or messages
    {"instruction", "input"}           as Alpaca has it, with or without an "output"
    {"prompt", "chosen", "rejected"}   pairs, Anthropic's too: what the two answers answer
    {"messages"}, {"conversations"}    a dialogue, up to its last answer, or as far as it goes

Answers in the middle stay: they are part of what is asked. Every record speaks for itself, whatever the file began
with, and is handed on whole: what else it says (a right answer, whether it is unsafe) is for whoever rewards.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llama2.chat import Conversation
from llama2.data.corpus.containers import TooDamaged, parquet_columns, require
from llama2.data.dialogues import formats
from llama2.data.dialogues.files import find, kind_of, records
from llama2.data.dialogues.formats import Record
from llama2.data.dialogues.sample import NotForTraining, Turn, dialogue
from llama2.data.dialogues.turns import WAY_OUT, field, framed, turns_of
from llama2.errors import DataError, did_you_mean

WANTED = "'prompt', 'messages', 'conversations', 'instruction' or 'chosen'"


@dataclass(frozen=True)
class AskedPrompt:
    """What is to be answered, and the record that asks it."""

    where: str
    """`prompts.jsonl:12`, as `Sample.where` has it."""
    messages: Conversation
    """Ends with the turn to answer."""
    record: Record


def read_prompts(
    path: str | Path,
    *,
    skipped: Callable[[str, str], None] | None = None,
    broken: Callable[[DataError], None] | None = None,
) -> Iterator[AskedPrompt]:
    """Yield the prompts of a file or of a folder of files, in the order of their names.

    `skipped` is told of files of other kinds in a folder, and of dialogues that nobody can go on with (of Open
    Assistant's and Anthropic's). `broken` is given the error of each record that cannot be used, and reading goes on;
    without it the error is raised. Raises DataError that names file and line, and where no prompt is left.
    """
    n_found, path = 0, Path(path)
    files, others = find(path)
    told = skipped or (lambda where, reason: None)
    for name in others:
        told(name, "a file of another kind")
    for file, name in files:
        for where, record in records(file, name, _keys(file)):
            try:
                if isinstance(record, DataError):
                    raise record
                messages = asked(record)
            except NotForTraining as reason:
                told(where, str(reason))
            except DataError as error:
                if broken is None:
                    raise DataError(f"{where}: {error}") from None
                broken(DataError(f"{where}: {error}"))
            else:
                n_found += 1
                yield AskedPrompt(where, messages, record)
    if not n_found:
        raise DataError(f"{path} holds no prompt; wanted at least one record with {WANTED}")


def asked(record: Record) -> Conversation:
    """Return what a record asks. Raises DataError without a place, and NotForTraining."""
    format = formats.detect(record)
    turns = _turns(record, format)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not any(turn.role != "system" for turn in turns):
        raise DataError(f"nothing is asked: no message of a user stands here; {WAY_OUT}")
    if format == "hh" and any(one.role == two.role for one, two in pairwise(turns)):
        raise NotForTraining("two turns of one speaker in a row")
    # a dialogue has an answer: one stands in, so that what may stand before it is looked at as everywhere
    messages = dialogue("", [*turns, Turn("assistant", "answer")]).messages
    assert messages is not None
    return messages[:-1]


def _turns(record: Record, format: str | None) -> list[Turn]:
    if format in formats.READERS:
        return list(formats.READERS[format](record))
    if format is None and record.get("prompt") is not None:
        return framed(turns_of(field(record, "prompt"), "prompt"), record)
    if format is None and record.get("instruction") is not None:
        return list(formats.READERS["alpaca"]({**record, "output": ""}))
    held = ", ".join(map(repr, record)) or "none"
    near = ((key, did_you_mean(key, formats.KEYS)) for key in record if key not in formats.KEYS)
    hint = next((said for _, said in near if said), "")
    raise DataError(f"nothing is asked: the keys are {held}{hint}; wanted {WANTED}: rename them")


def _keys(file: Path) -> Collection[str]:
    """Return the keys that are read: of columns all, since what a reward looks at may be called anything."""
    if kind_of(file) != ".parquet":
        return formats.KEYS
    require("pyarrow", file)
    try:
        return parquet_columns(file)
    except (OSError, TooDamaged):
        return formats.KEYS  # what is wrong with it is said where it is read
