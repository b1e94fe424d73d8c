"""What is sent back: OpenAI's JSON, built from pieces of answers, whole or in chunks. The two always agree."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llama2.infer.request import TopLogprobs
from llama2.serve.generation import Usage
from llama2.serve.protocol import StreamOptions
from llama2.serve.tools import Delta
from llama2.serve.worker import Piece
from llama2.tokenizer.tokenizer import StreamDecoder, Tokenizer

Object = dict[str, Any]


@dataclass(frozen=True)
class Envelope:
    """What all chunks of an answer have alike."""

    kind: str
    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, kind: str, prefix: str, model: str, fingerprint: str) -> "Envelope":
        return cls(kind, f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, fingerprint)

    def wrap(self, choices: list[Object], *, kind: str | None = None, **more: Any) -> Object:
        return {
            "id": self.id,
            "object": kind or self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def usage_json(usage: Usage) -> Object:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def chunk_usage(options: StreamOptions | None, usage: Usage) -> Object:
    """Return what each chunk of a stream says of usage: null, where it is told at the end and not all the way."""
    if options is None or not options.include_usage:
        return {}
    return {"usage": usage_json(usage) if options.continuous_usage_stats else None}


def token_ids(pieces: Iterable[Piece]) -> list[int]:
    return [piece.token.id for piece in pieces if piece.token.id is not None]


def spelled(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text; where it is not whole characters, as `bytes:\\xe2\\x80`, so that no two look alike."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


# Chat


def chat_logprobs(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Object:
    """Return {"content": [...]}, an entry for each token."""

    def entry(token_id: int, logprob: float) -> Object:
        data = tokenizer.token_bytes(token_id)
        return {"token": spelled(tokenizer, token_id), "logprob": finite(logprob), "bytes": list(data)}

    content = [
        {
            **entry(piece.token.id, piece.token.logprob or 0.0),
            "top_logprobs": [entry(*each) for each in piece.token.top_logprobs],
        }
        for piece in pieces
        if piece.token.id is not None
    ]
    return {"content": content, "refusal": None}


def finite(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes -9999 for what is as good as impossible."""
    return max(logprob, -9999.0)


def chat_message(deltas: Iterable[Delta]) -> Object:
    """Put the deltas of an answer together."""
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({key: value for key, value in call.items() if key != "index"})
                calls[-1]["function"] = {**call["function"]}
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    message: Object = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
    return {**message, "tool_calls": calls} if calls else message


def chat_finish(reason: str, n_calls: int) -> str:
    """An answer that ended by itself in a call ends with tool_calls."""
    return "tool_calls" if n_calls and reason == "stop" else reason


def prompt_logprobs(tokenizer: Tokenizer, prompt: Sequence[int], first: Piece) -> list[Object | None]:
    """Return an entry for each token of a prompt, null for the first: it and its likeliest rivals, by their ids.

    A token that is not among those has no rank.
    """
    entries: list[Object | None] = [None]
    for token_id, (logprob, top) in zip(prompt[1:], first.token.prompt_logprobs or (), strict=True):
        ranks = {each: rank for rank, (each, _) in enumerate(top, 1)}
        entries.append(
            {
                str(each): {
                    "logprob": finite(value),
                    "rank": ranks.get(each),
                    "decoded_token": spelled(tokenizer, each),
                }
                for each, value in {token_id: logprob, **dict(top)}.items()
            }
        )
    return entries


# Completions


@dataclass
class CompletionLogprobs:
    """The four lists of an answer's log-probabilities, made piece by piece; offsets count characters from the start."""

    tokenizer: Tokenizer
    decoder: StreamDecoder
    offset: int = 0

    def prompt(self, ids: Sequence[int], found: Sequence[tuple[float, TopLogprobs]]) -> Object:
        """Return the entries of an echoed prompt; the first token has no probability."""
        rows: list[tuple[int, float | None, TopLogprobs]] = [(ids[0], None, ())]
        rows += [(token_id, *each) for token_id, each in zip(ids[1:], found, strict=True)]
        return self._lists(rows)

    def answer(self, pieces: Iterable[Piece]) -> Object:
        rows = [(p.token.id, p.token.logprob, p.token.top_logprobs) for p in pieces if p.token.id is not None]
        return self._lists(rows)

    def _lists(self, rows: Sequence[tuple[int, float | None, TopLogprobs]]) -> Object:
        offsets = []
        for token_id, _, _ in rows:
            offsets.append(self.offset)
            self.offset += len(self.decoder.push(token_id))
        return {
            "tokens": [spelled(self.tokenizer, token_id) for token_id, _, _ in rows],
            "token_logprobs": [None if logprob is None else finite(logprob) for _, logprob, _ in rows],
            "top_logprobs": [
                None if logprob is None else self._top(token_id, logprob, top) for token_id, logprob, top in rows
            ],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, logprob: float, top: TopLogprobs) -> Object:
        """Return the likeliest tokens and the chosen one."""
        return {spelled(self.tokenizer, each): finite(value) for each, value in [*top, (token_id, logprob)]}


def joined(first: Object | None, second: Object | None) -> Object | None:
    """Return two groups of lists one after the other."""
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}
