"""Open Assistant's message trees (arXiv:2304.07327 sec. 3.1) to one dialogue each.

    prompter --+-- assistant (rank 1)
               +-- assistant (rank 0) --+-- prompter --+-- assistant (no rank)
                                        |              +-- assistant (rank 0)   <- the dialogue ends here

At every turn the reply of the lowest rank is taken, ranked ones before others, the first of equals.
"""

from collections.abc import Mapping
from typing import Any

from llama2.data.dialogues.sample import NotForTraining, Turn
from llama2.data.dialogues.turns import WAY_OUT, field, kind, text_of
from llama2.errors import DataError, did_you_mean

SPEAKERS = {"prompter": "user", "assistant": "assistant"}


def tree_turns(record: Mapping[str, Any]) -> list[Turn]:
    """Return the best dialogue of a tree, up to its last answer. Raises NotForTraining where there is none."""
    message: object = field(record, "prompt")
    turns: list[Turn] = []
    while message is not None:
        if not isinstance(message, Mapping):
            raise DataError(f"a message of the tree is {kind(message)}, wanted an object; {WAY_OUT}")
        if not _stands(message):
            break
        role = text_of(message, "role")
        if role not in SPEAKERS:
            wanted = f"wanted one of {', '.join(SPEAKERS)}{did_you_mean(role, SPEAKERS)}"
            raise DataError(f"the role of a message of the tree is {role!r}, {wanted}; {WAY_OUT}")
        turns.append(Turn(SPEAKERS[role], text_of(message, "text")))
        message = _best(message.get("replies") or [])
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise NotForTraining("a tree without an answer")
    return turns


def _stands(message: Mapping[str, Any]) -> bool:
    """Neither deleted nor turned down nor still to be reviewed; a file that does not say so has it all reviewed."""
    return not message.get("deleted") and message.get("review_result", True) is True


def _best(replies: object) -> object:
    if not isinstance(replies, list):
        raise DataError(f"'replies' is {kind(replies)}, wanted a list; {WAY_OUT}")
    standing = [reply for reply in replies if not isinstance(reply, Mapping) or _stands(reply)]
    return min(standing, key=_rank, default=None)


def _rank(reply: object) -> float:
    rank = reply.get("rank") if isinstance(reply, Mapping) else None
    return rank if isinstance(rank, int | float) else float("inf")
