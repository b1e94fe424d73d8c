"""Text to ids and back.

A Tokenizer joins a Vocabulary to the engine that encodes; decoding is done here, token by token, and in
one way for whole and for streamed text. It knows no file formats (`formats.py`) and no chat (`chat.py`).

    "Hi <unfinished UTF-8>" -> encode -> [ids] -> push, push, ... flush -> the same text
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

from llama2.errors import TokenizerError
from llama2.tokenizer.engines import Engine, engine_for
from llama2.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    SPACE,
    UNKNOWN,
    Vocabulary,
    byte_value,
    check_id,
    spelled_bytes,
)

_UNKNOWN_SURFACE = " \u2047 "


class Tokenizer:
    """Encodes and decodes with one vocabulary. Cheap to make: the engine is started by the first `encode`."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.n_vocab = len(vocabulary.pieces)
        self.bos_id, self.eos_id, self.pad_id = vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id
        self.special_tokens = vocabulary.special_tokens
        self.chat_template = vocabulary.chat_template

    @cached_property
    def _engine(self) -> Engine:
        return engine_for(self.vocabulary)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Return the ids of a text. Names of special tokens in it stay text unless `special` is set.

        Raises TokenizerError where the text is not valid Unicode, or a wanted BOS or EOS does not exist.
        """
        check_text(text)
        ids = self._engine.special(text) if special else self._engine.plain(text)
        start = [self._role("bos_id")] if bos else []
        return start + ids + ([self._role("eos_id")] if eos else [])

    def _role(self, name: str) -> int:
        token_id = getattr(self.vocabulary, name)
        if token_id is None:
            raise TokenizerError(
                f"this vocabulary names no {name}; encode without it, or give tokenizer_config.json one"
            )
        return token_id

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of ids; special tokens are left out unless `special` is set.

        Bytes that are not UTF-8 become U+FFFD: one for each byte as in SentencePiece, or one for each
        broken sequence as in Python, after the vocabulary's kind.
        """
        decoder = StreamDecoder(self, special=special)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for, a leading space included; its name for a special token."""
        check_id(token_id, self.n_vocab, "token id")
        piece, kind = self.vocabulary.pieces[token_id], self.vocabulary.types[token_id]
        if kind == CONTROL:
            return piece.encode("utf-8")
        if self.vocabulary.kind == "bytes":
            return spelled_bytes(piece)
        if kind == BYTE:
            return bytes([byte_value(piece) or 0])
        return _UNKNOWN_SURFACE.encode() if kind == UNKNOWN else piece.replace(SPACE, " ").encode("utf-8")


class StreamDecoder:
    """Turns ids into text as they come, and never gives half a character.

    `prompt_ids` are what came before: they give no text here, but a space after them is kept.
    All pushes and the flush together are `decode(prompt + ids)` less `decode(prompt)`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, special: bool = False):
        self._tokenizer, self._vocabulary, self._special = tokenizer, tokenizer.vocabulary, special
        self._pending = bytearray()
        self._at_start = True
        for token_id in prompt_ids:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is certain by now."""
        check_id(token_id, self._tokenizer.n_vocab, "token id")
        kind = self._vocabulary.types[token_id]
        if self._vocabulary.kind == "bytes":
            if kind != CONTROL or self._special:
                self._pending += self._tokenizer.token_bytes(token_id)
            return self._take(final=False)
        if kind == BYTE:
            self._at_start = False
            self._pending += self._tokenizer.token_bytes(token_id)
            return self._take(final=False)
        return self._take(final=True) + self._surface(self._vocabulary.pieces[token_id], kind)

    def flush(self) -> str:
        """Return what was held back; bytes that never became a character are U+FFFD."""
        return self._take(final=True)

    def _surface(self, piece: str, kind: int) -> str:
        """The text of one SentencePiece piece. Source: sentencepiece_processor.cc, Decode."""
        if kind == CONTROL and not self._special:
            return ""
        if kind == UNKNOWN and not self._special:
            piece = _UNKNOWN_SURFACE
        elif kind not in (CONTROL, UNKNOWN):
            if self._at_start and piece.startswith(SPACE) and self._strips:
                piece = piece[1:]
                self._at_start = self._vocabulary.remove_extra_spaces and not piece
            piece = piece.replace(SPACE, " ")
        self._at_start = self._at_start and not piece
        return piece

    @property
    def _strips(self) -> bool:
        return self._vocabulary.add_dummy_prefix or self._vocabulary.remove_extra_spaces

    def _take(self, *, final: bool) -> str:
        """Cut whole characters off the pending bytes."""
        text = ""
        while self._pending:
            try:
                text += self._pending.decode("utf-8")
                self._pending.clear()
            except UnicodeDecodeError as error:
                text += self._pending[: error.start].decode("utf-8")
                del self._pending[: error.start]
                if error.reason == "unexpected end of data" and not final:
                    break
                text += "\ufffd"
                del self._pending[: 1 if self._vocabulary.kind == "spm" else error.end - error.start]
        return text


def check_text(text: str) -> None:
    """Raise TokenizerError unless this is a str that UTF-8 can hold."""
    if not isinstance(text, str):
        raise TokenizerError(f"text is a {type(text).__name__}; wanted a str: decode bytes first")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds the lone surrogate {text[error.start]!r} at character {error.start}, which is no character; "
            "decode the input with errors='replace'"
        ) from None
