"""What an answer must look like, said as a JSON schema, a regular expression, choices or a grammar.

The automaton is llguidance's; here its bytes meet our tokenizer. Between the parts of JSON there is a line break and
eight spaces at most, since a small model may otherwise write white space for ever. What cannot be followed exactly is
refused before anything is written.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import llguidance
import numpy as np
import torch
from jaxtyping import Bool
from llguidance.gbnf_to_lark import any_to_lark
from pydantic import BaseModel
from torch import Tensor

from llama2.errors import RequestError
from llama2.tokenizer.tokenizer import Tokenizer

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
FORMS: tuple[Kind, ...] = ("json_object", "json_schema", "regex", "choice", "grammar")
WHITESPACE = r"\n? {0,8}"
MAX_CHARACTERS = 100_000
N_TRIED = 32
"""Steps and tokens at a step that are tried before a grammar is taken."""


class TextGrammar:
    """An `infer.request.Grammar` over the bytes of texts."""

    def __init__(
        self, tokenizer: Tokenizer, kind: Kind, value: Any, *, n_vocab: int, stop_ids: Sequence[int], at_start: bool
    ):
        """n_vocab: rows of the model's output. stop_ids: what may stand where the text may end. at_start: the answer
        begins a text, so that the space its first piece may begin with is not part of it.

        Raises RequestError if this can not be followed.
        """
        self.n_vocab, self.stop_ids = n_vocab, torch.tensor(sorted(stop_ids), dtype=torch.long)
        if not stop_ids:
            raise RequestError(f"{kind} needs a token that ends the answer, and this vocabulary has none")
        self.tokenizer, self.eos_id = _automaton_tokenizer(tokenizer)
        is_stripped = at_start and tokenizer.vocabulary.kind == "spm" and tokenizer.vocabulary.add_dummy_prefix
        # A space that is a byte token would not be left out of the text.
        self.never_first = tokenizer.vocabulary.ids.get("<0x20>") if is_stripped else None
        self.unk_id = tokenizer.vocabulary.unk_id
        try:
            self.text = _lark(kind, value, is_stripped)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{kind} cannot be read: {error}") from None
        if len(self.text) > MAX_CHARACTERS:
            raise RequestError(f"{kind} has {len(self.text)} characters; at most {MAX_CHARACTERS} are followed")
        self._first = self._new()
        if self._first.is_error():
            raise RequestError(f"{kind} cannot be followed: {_plain(self._first.get_error())}")
        try:
            self._try_to_begin()
        except RequestError as error:
            raise RequestError(f"{kind} cannot be followed: {error}") from None

    def _try_to_begin(self) -> None:
        """Raise RequestError where no text fits, or where the automaton grows too large, as far as N_TRIED steps tell.

        Tokens are tried depth first, up to a place where more than N_TRIED may stand: from there some text goes on.
        """
        open_, dead = [self.matcher()], RequestError("no text fits")
        for _ in range(N_TRIED):
            if not open_:
                raise dead
            matcher = open_.pop()
            try:
                allowed = matcher.allowed().nonzero()[:, 0]
                if torch.isin(allowed, self.stop_ids).any():
                    return
                is_wide = len(allowed) > N_TRIED
                for token_id in allowed[: 1 if is_wide else N_TRIED].tolist():
                    after = TextMatcher(self, matcher.automaton.deep_copy())
                    after.advance(token_id)
                    open_.append(after)
                if is_wide:
                    return
            except RequestError as error:
                dead = error

    def _new(self) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self.tokenizer, self.text, log_level=0)

    def matcher(self) -> "TextMatcher":
        return TextMatcher(self, self._first.deep_copy())


class TextMatcher:
    """Follows one answer (`infer.request.Matcher`)."""

    def __init__(self, grammar: TextGrammar, automaton: llguidance.LLMatcher):
        self.grammar, self.automaton = grammar, automaton
        self.is_first = True

    def allowed(self) -> Bool[Tensor, " V"]:
        """Return which tokens may come next, [V]."""
        mask = torch.zeros(self.grammar.n_vocab, dtype=torch.bool)
        is_whole = self.automaton.is_accepting()
        if self.automaton.is_stopped() and is_whole:
            mask[self.grammar.stop_ids] = True
            return mask
        bits = np.frombuffer(self.automaton.compute_bitmask(), np.uint8)
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))[: self.grammar.n_vocab]
        mask[: len(known)] = known
        may_end, mask[self.grammar.eos_id] = bool(mask[self.grammar.eos_id]), False
        if may_end and is_whole:  # llguidance ends texts that cannot go on, too
            mask[self.grammar.stop_ids] = True
        if self.is_first and self.grammar.never_first is not None:
            mask[self.grammar.never_first] = False
        if self.grammar.unk_id is not None:  # what llguidance takes for a character that the vocabulary lacks
            mask[self.grammar.unk_id] = False
        if not mask.any():
            why = _plain(self.automaton.get_error()).replace("NoExtensionBias", "")
            raise RequestError(f"the grammar has come to a dead end: {why or 'this vocabulary cannot go on from here'}")
        return mask

    def advance(self, token_id: int) -> None:
        """Take the token that came next."""
        self.is_first = False
        if not self.automaton.is_stopped() and not self.automaton.consume_token(token_id):
            raise RequestError(f"token {token_id} does not fit the grammar: {_plain(self.automaton.get_error())}")


def _lark(kind: Kind, value: Any, is_stripped: bool) -> str:
    """Return one grammar for all kinds, in llguidance's dialect of Lark."""
    space = '" "? ' if is_stripped else ""
    if kind == "grammar":
        try:
            return any_to_lark(_text_of(value))  # Lark as it is, GBNF translated
        except Exception as error:  # of bare Exceptions, too
            raise ValueError(str(error).split("\n")[0][:300]) from None
    if kind == "regex":
        return f"start: {space}body\nbody: /{_slashes_escaped(_text_of(value))}/\n"
    if kind == "choice":
        if isinstance(value, str) or not value or not all(isinstance(each, str) and each for each in value):
            raise ValueError(f"{value!r} is no list of texts, none of them empty")
        return f"start: {space}body\nbody: {' | '.join(json.dumps(each, ensure_ascii=True) for each in value)}\n"
    schema = {"type": "object"} if kind == "json_object" else value
    if isinstance(schema, str):
        schema = json.loads(schema)
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        schema = schema.model_json_schema()
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"a JSON schema is an object, and this is a {type(schema).__name__}")
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}}
    return f"start: {space}body\nbody: %json {json.dumps(schema)}\n"


def _slashes_escaped(regex: str) -> str:
    """Return a regular expression as it stands between slashes; one that is escaped already stays."""
    return re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], regex, flags=re.DOTALL)


def _text_of(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no text")
    return value


def _plain(error: str) -> str:
    """Return the first line of what llguidance says."""
    return re.sub(r"\s+", " ", error.strip().split("\n")[0])[:300]


class _Bytes:
    """Our tokenizer as llguidance wants it: the bytes of each token, and text to ids without a leading space."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        ids = range(tokenizer.n_vocab)
        special = {*tokenizer.special_tokens.values()}
        ends = [
            each for each in (tokenizer.eos_id, *tokenizer.vocabulary.stop_ids, tokenizer.bos_id) if each is not None
        ]
        self.eos_token_id, self.bos_token_id = ends[0] if ends else 0, tokenizer.bos_id
        self.special_token_ids = sorted(special)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in ids]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        ids = self._tokenizer.encode("\n" + text)
        while ids and b"\n" not in self._tokenizer.token_bytes(ids[0]):
            del ids[0]
        return ids[1:]


@functools.lru_cache(maxsize=4)
def _automaton_tokenizer(tokenizer: Tokenizer) -> tuple[llguidance.LLTokenizer, int]:
    wrapped = _Bytes(tokenizer)
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(wrapped)), wrapped.eos_token_id
