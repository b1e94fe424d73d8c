"""Token events become text here and nowhere else, streamed or whole, in Python or over the wire.

Text that may yet become a stop string, and bytes that are not yet a character, are held back:

    stop "STOP"     tokens  " the"  " ST"  "AY"    " STO"  "P it"
                    text    " the"  " "    "STAY"  " "     ""      stopped
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama2.infer.request import Token
from llama2.tokenizer.tokenizer import StreamDecoder, Tokenizer


@dataclass
class TextStream:
    """One answer turning into text."""

    decoder: StreamDecoder
    stops: tuple[str, ...] = ()
    keeps_stop: bool = False
    held: str = ""
    is_stopped: bool = False

    def push(self, token_id: int) -> str:
        """Return the text that this token makes certain."""
        return self._release(self.decoder.push(token_id))

    def finish(self) -> str:
        """Return what was held back; nothing more can follow."""
        piece = self._release(self.decoder.flush())
        if not self.is_stopped:
            piece, self.held = piece + self.held, ""
        return piece

    def _release(self, piece: str) -> str:
        if self.is_stopped:
            return ""
        self.held += piece
        found = [(at, at + len(stop)) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            start, end = min(found)
            return self.held[: end if self.keeps_stop else start]
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        safe, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return safe


class AnswerTexts:
    """The texts of one request's answers, as its token events come in any order."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: Sequence[int] = (),
        stops: Sequence[str] = (),
        keeps_stop: bool = False,
    ):
        """context: the ids of a text that is continued where it stood; none where a text begins anew.

        keeps_stop: the stop string that was found ends the text, and belongs to it.
        """
        self._tokenizer, self._context = tokenizer, context
        self._stops, self._keeps_stop = tuple(stops), keeps_stop
        self._streams: dict[int, TextStream] = {}

    def push(self, token: Token) -> tuple[Token, str] | None:
        """Return the event and the text that it makes certain; None for what comes after the end.

        Where a stop string was found the event's finish_reason is "stop": the engine does not know, and is to be
        told to drop the answer.
        """
        if token.index not in self._streams:
            decoder = StreamDecoder(self._tokenizer, self._context)
            self._streams[token.index] = TextStream(decoder, self._stops, self._keeps_stop)
        stream = self._streams[token.index]
        if stream.is_stopped:
            return None
        piece = stream.push(token.id) if token.id is not None else ""
        if token.finish_reason:
            piece += stream.finish()
        return (replace(token, finish_reason="stop") if stream.is_stopped else token), piece


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of text could be the beginning of stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
