"""The answers to one client's request on their way: one job per prompt, all pieces in one queue."""

import asyncio
import functools
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llama2.chat import Message
from llama2.errors import RequestError
from llama2.infer.request import Request
from llama2.llm import LLM, Ids, Prompt, SamplingOptions
from llama2.llm.options import stop_strings
from llama2.serve.metrics import Metrics
from llama2.serve.refusal import Refusal, out_of_time
from llama2.serve.worker import Job, Piece, Worker
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import BYTE, UNKNOWN


@dataclass
class Usage:
    """What a request took, so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Prepared:
    """A prompt as the engine takes it."""

    request: Request
    prompt: Prompt | Ids
    stops: tuple[str, ...]
    keeps_stop: bool


def prepare(llm: LLM, prompt: Prompt | Ids, options: SamplingOptions, *, adapter: str | None) -> Prepared:
    """Return a prompt as ids with its sampling; slow for a long prompt, so not for the event loop.

    Raises Llama2Error for what the model cannot be asked.
    """
    check_could_fit(llm, prompt)
    request = replace(llm.request(uuid.uuid4().hex, prompt, **options), adapter=adapter)
    n_tokens, room = len(request.prompt), llm.config.context_length
    if n_tokens >= room:
        raise RequestError(
            f"the prompt has {n_tokens} tokens and the model's context holds {room}, which leaves no room for an "
            "answer; shorten the prompt"
        )
    return Prepared(request, prompt, stop_strings(options), options.get("include_stop", False))


COUNTED = 1 << 16
"""Bytes."""


def check_could_fit(llm: LLM, prompt: Prompt | Ids) -> None:
    """Refuse a text that cannot fit before minutes are spent on its tokens: none is longer than the longest.

    Those of a text up to COUNTED are counted, so that the refusal can say how many they are.
    """
    text = prompt if isinstance(prompt, str) else "".join(_said(each).strip() for each in prompt)
    if not text or not (longest := _longest_token(llm.tokenizer)):
        return
    if llm.tokenizer.vocabulary.remove_extra_spaces:
        text = re.sub(" +", " ", text)
    n_bytes, room = len(text.encode("utf-8", "replace")), llm.config.context_length
    n_least = n_bytes // longest
    if n_bytes > COUNTED and n_least > room:
        raise RequestError(
            f"the prompt has more than {n_least} tokens and the model's context holds {room}, which leaves no room for "
            "an answer; shorten the prompt"
        )


def _said(part: Message | Mapping[str, str] | int) -> str:
    """Return what a part of a prompt says; of an id nothing, since it is counted already."""
    return part.content if isinstance(part, Message) else part["content"] if isinstance(part, Mapping) else ""


@functools.lru_cache(maxsize=16)
def _longest_token(tokenizer: Tokenizer) -> int:
    """Return the bytes of the longest token; 0 where one of unknown length stands for what the vocabulary lacks."""
    types = tokenizer.vocabulary.types
    if UNKNOWN in types and BYTE not in types:
        return 0
    return max(len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.n_vocab))


class Generation:
    """Submit with `start`, read with `next`, and always `close`: what is not finished then is cancelled."""

    def __init__(
        self,
        worker: Worker,
        prepared: Sequence[Prepared],
        *,
        usage: Usage,
        metrics: Metrics,
        timeout_s: float,
    ):
        self.worker, self.usage, self.metrics = worker, usage, metrics
        self.requests = [each.request for each in prepared]
        self.finish_reasons: dict[int, str] = {}
        self._has_failed = False
        self._queue: asyncio.Queue[Sequence[Piece] | Exception] = asyncio.Queue()
        self._began = self._last = time.monotonic()
        self._timeout_s = timeout_s
        self._jobs: list[Job] = []
        llm, n_choices = worker.loaded(), 0
        for each in prepared:
            texts = llm.texts(each.request, each.prompt, stops=each.stops, keeps_stop=each.keeps_stop)
            job = Job(each.request, texts, self._queue.put_nowait, first_choice=n_choices)
            self._jobs.append(job)
            n_choices += each.request.params.n_written
        self.n_choices = n_choices

    def start(self) -> None:
        """Queue all of it, or nothing. Raises Refusal."""
        if self.n_choices > self.worker.room:
            raise Refusal(
                400, f"the request asks for {self.n_choices} answers; at most {self.worker.room} are taken at once"
            )
        self.usage.prompt_tokens = sum(len(request.prompt) for request in self.requests)
        try:
            for job in self._jobs:
                self.worker.submit(job)
        except Refusal:
            self.close()
            raise
        self.metrics.tokens.labels(self.worker.name, "prompt").inc(self.usage.prompt_tokens)

    async def next(self) -> Sequence[Piece] | None:
        """Return the next pieces; None when all answers have ended. Raises what went wrong."""
        if len(self.finish_reasons) == self.n_choices:
            return None
        left = self._began + self._timeout_s - time.monotonic()
        try:
            # Not asyncio.wait_for: up to Python 3.11 it loses a cancellation that comes together with a piece, and an
            # answer that nobody reads any more would be written to its end.
            async with asyncio.timeout(max(left, 0)):
                found = await self._queue.get()
        except TimeoutError:
            raise out_of_time(self._timeout_s) from None
        if isinstance(found, Exception):
            self._has_failed = True
            raise found
        for piece in found:
            self._count(piece)
        return found

    async def collect(self) -> list[list[Piece]]:
        """Return all pieces of each answer."""
        answers: list[list[Piece]] = [[] for _ in range(self.n_choices)]
        while (found := await self.next()) is not None:
            for piece in found:
                answers[piece.choice].append(piece)
        return answers

    def close(self) -> None:
        """Cancel what is not finished."""
        for job in self._jobs:
            if job.n_counted:
                if not self._has_failed:
                    self.metrics.cancelled.labels(self.worker.name).inc()
                self.worker.cancel(job)

    def _count(self, piece: Piece) -> None:
        now, name = time.monotonic(), self.worker.name
        if not self.usage.completion_tokens:
            self.metrics.first_token_s.labels(name).observe(now - self._began)
        elif piece.token.id is not None:
            self.metrics.next_token_s.labels(name).observe(now - self._last)
        self._last = now
        if piece.token.id is not None:
            self.usage.completion_tokens += 1
            self.metrics.tokens.labels(name, "completion").inc()
        if not piece.token.index:  # the other answers to a prompt find all of it
            self.usage.cached_tokens += piece.token.n_cached
        if piece.token.finish_reason:
            self.finish_reasons[piece.choice] = piece.token.finish_reason
            job = max((job for job in self._jobs if job.first_choice <= piece.choice), key=lambda job: job.first_choice)
            self.worker.release(job, 1)
