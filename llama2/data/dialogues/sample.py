"""One example to learn from, and what makes a dialogue fit to learn from.

    [system] user assistant user assistant ...      a tool's answer (tool, ipython) stands between two assistants

Knows nothing of files, record formats or tokens. Errors name the turn; who reads the file puts the line before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama2.chat import Conversation, Message, conversation
from llama2.errors import ChatError, DataError

BEFORE = {
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool", "ipython"),
    "tool": ("assistant", "tool", "ipython"),
    "ipython": ("assistant", "tool", "ipython"),
    "system": ("",),
}
"""Which roles may stand before each; an empty name is the beginning."""


@dataclass(frozen=True)
class Sample:
    """One example: a conversation, or a plain text; the other one is None."""

    where: str
    """`chats.jsonl:12` (line 12), `chats.json[11]` (counted from 0), `chats.parquet row 12` or `notes.txt`."""
    messages: Conversation | None
    text: str | None = None
    """All of it is trained on."""
    trained: tuple[bool, ...] | None = None
    """Of each message, whether to train on it; None is every answer of the assistant."""


@dataclass(frozen=True)
class Turn:
    """A message as a record has it; `is_trained` counts for the assistant's only."""

    role: str
    content: str
    is_trained: bool = True


class NotForTraining(Exception):
    """A sound record that is not to be learnt from: the message says why."""


def dialogue(where: str, turns: Sequence[Turn]) -> Sample:
    """Return checked turns as a sample; a blank system message is left out. Raises DataError without `where`."""
    turns = [turn for turn in turns if turn.role != "system" or not _is_blank(turn.content)]
    if not turns:
        raise DataError(
            "no message in the dialogue; wanted at least a user's and an assistant's: add them, or take it out"
        )
    try:
        messages = conversation(Message(turn.role, turn.content) for turn in turns)
    except ChatError as error:
        raise DataError(f"{error}; mend the record, or take it out") from None
    _check_order([message.role for message in messages])
    for i, message in enumerate(messages):
        if message.role in ("user", "assistant") and _is_blank(message.content):
            raise DataError(f"message {i} ({message.role}) is empty; wanted text: write it, or take the record out")
    trained = tuple(turn.role == "assistant" and turn.is_trained for turn in turns)
    all_answers = tuple(turn.role == "assistant" for turn in turns)
    if not any(trained):
        fault = "no answer of the assistant is to be trained" if any(all_answers) else "no message of the assistant"
        raise DataError(f"nothing to train on: {fault}; add an answer, or take the record out")
    return Sample(where, messages, trained=None if trained == all_answers else trained)


def _is_blank(content: str) -> bool:
    return isinstance(content, str) and not content.strip()


def _check_order(roles: list[str]) -> None:
    for i, (before, role) in enumerate(zip(["", *roles], roles, strict=False)):
        if before in BEFORE[role]:
            continue
        if role == "system":
            fault, way_out = "a system message may only be the first", "put its text there"
        elif not before or before == "system":
            fault, way_out = (
                f"the dialogue begins with the role {role!r}",
                "put a user's message before it, or cut it off",
            )
        elif before == role:
            fault, way_out = f"two messages of the {role} in a row", "join them"
        else:
            wanted = " or ".join(name for name in BEFORE if before in BEFORE[name])
            fault, way_out = f"{role!r} follows {before!r}, wanted {wanted}", "add the turn that is missing"
        raise DataError(f"message {i}: {fault}; users and assistants take turns: {way_out}, or take the record out")
