"""The libraries that turn text into ids: SentencePiece for kind "spm", `tokenizers` for the rest.

Two engines with one face: `plain` never gives a special token, `special` reads the names of special
tokens out of the text. There is no BPE of our own here, and no decoding (`tokenizer.py`).
"""

import re
from functools import cached_property
from typing import Protocol

from llama2.errors import TokenizerError
from llama2.tokenizer.document import document, load_document, plain_document
from llama2.tokenizer.proto import to_proto
from llama2.tokenizer.vocabulary import Vocabulary


class Engine(Protocol):
    def plain(self, text: str) -> list[int]: ...
    def special(self, text: str) -> list[int]: ...


def engine_for(vocabulary: Vocabulary) -> Engine:
    """Choose the engine: a tokenizer.json is run from its own JSON, so that odd normalizers stay exact."""
    from_json = vocabulary.source is not None and vocabulary.source.format == "json"
    return JsonEngine(vocabulary) if from_json or vocabulary.kind == "bytes" else SentencePieceEngine(vocabulary)


class SentencePieceEngine:
    def __init__(self, vocabulary: Vocabulary):
        from sentencepiece import SentencePieceProcessor

        self._vocabulary = vocabulary
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(to_proto(vocabulary))
        except (RuntimeError, ValueError, TypeError) as error:
            raise TokenizerError(f"SentencePiece refuses the vocabulary ({error}); the file is damaged") from None

    def plain(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def special(self, text: str) -> list[int]:
        """Cut at the names, longest first; each part between gets its own dummy prefix, as in llama.cpp."""
        ids: list[int] = []
        for part in self._names.split(text):
            token_id = self._vocabulary.special_tokens.get(part)
            ids += self.plain(part) if token_id is None else [token_id]
        return ids

    @cached_property
    def _names(self) -> re.Pattern[str]:
        names = sorted(self._vocabulary.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"(?!)")


class JsonEngine:
    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        whole = document(vocabulary)
        self._plain = load_document(plain_document(whole, vocabulary), name="tokenizer.json")

    def plain(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def special(self, text: str) -> list[int]:
        return self._special.encode(text, add_special_tokens=False).ids

    @cached_property
    def _special(self):
        return load_document(document(self._vocabulary), name="tokenizer.json")
