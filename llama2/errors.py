"""Every mistake a user can make, as one small tree of exceptions.

    Llama2Error (a ValueError)
     |- ConfigError       the numbers that describe a model contradict each other
     |- CheckpointError   a file that should hold a model does not
     |- TokenizerError    a vocabulary is broken, or text and vocabulary do not fit
     |   `- TokenizerMissing  there is none where one was looked for
     |- DataError         data to train on cannot be used
     |- TrainingError     a run cannot begin, or cannot go on
     |- ChatError         a conversation cannot be turned into tokens
     |- RequestError      a request for text asks for something impossible
     |   `- QueueFull         too many wait already
     `- HubError          a repository cannot be fetched

A message names the thing, the value it had, the value wanted and the way out.
Programming mistakes are plain `assert`s and are not listed here.
"""

import difflib
from collections.abc import Iterable


class Llama2Error(ValueError):
    """The user can mend this: the message says how."""


class ConfigError(Llama2Error):
    """The numbers that describe a model contradict each other."""


class CheckpointError(Llama2Error):
    """A file that should hold a model does not."""


class TokenizerError(Llama2Error):
    """A vocabulary is broken, or text and vocabulary do not fit."""


class TokenizerMissing(TokenizerError):
    """There is no tokenizer where one was looked for."""


class DataError(Llama2Error):
    """Data to train on cannot be used."""


class TrainingError(Llama2Error):
    """A run cannot begin, or cannot go on."""


class ChatError(Llama2Error):
    """A conversation cannot be turned into tokens."""


class RequestError(Llama2Error):
    """A request for text asks for something impossible."""


class QueueFull(RequestError):
    """Too many requests wait already."""


class HubError(Llama2Error):
    """A repository cannot be fetched."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the nearest known name, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f", did you mean {by_lower[close[0]]!r}?" if close else ""
