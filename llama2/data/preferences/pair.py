"""What people said of answers: of two which is the better one and by how much, or of one whether it is good.

    rating                        code    "Share your preference", arXiv:2307.09288 sec. 3.2.1
    significantly better             3
    better                           2
    slightly better                  1
    negligibly better / unsure       0

Knows nothing of files, record formats or tokens.
"""

from dataclasses import dataclass

from llama2.chat import Conversation

RATINGS = {"significantly better": 3, "better": 2, "slightly better": 1, "negligibly better / unsure": 0}
"""The four ratings of the paper, the clearest first, and the number that files and tensors may have for each."""

FLAGS = ("is_safety", "chosen_is_safe", "rejected_is_safe")
"""The fields of a Pair that are true, false or unknown."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; `chosen` is the better one. None is unknown."""

    where: str
    """`pairs.jsonl:12`, as `Sample.where` has it."""
    prompt: Conversation
    """Ends with the turn that is answered."""
    chosen: str
    rejected: str
    rating: str | None = None
    """One of RATINGS; where it is given there is no margin."""
    margin: float | None = None
    """By how much the better one should win, 0 or more."""
    is_safety: bool | None = None
    """The prompt asks for something unsafe, so that the pair is about safety."""
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None


@dataclass(frozen=True)
class Labelled:
    """One answer to a prompt, and whether it is a good one."""

    where: str
    prompt: Conversation
    answer: str
    is_good: bool
