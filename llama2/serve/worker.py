"""One thread owns a model: it loads it, runs its engine, and is the only one to touch either.

    event loop                         worker thread
      submit(job) ---- commands ---->    engine.add
      cancel(job) ---------------->      engine.abort
      call(function) ------------->      function(llm)          between two steps
      job.deliver(pieces) <--------      engine.step, texts     at most once a step and job

An answer that the engine gives up ends its request with an error. A step that fails ends all that are in flight; the
thread goes on with a new engine.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llama2.errors import Llama2Error
from llama2.infer.engine import Engine
from llama2.infer.request import Request, Token
from llama2.llm import LLM, AnswerTexts
from llama2.serve.refusal import Refusal, log_mistake, try_later

log = logging.getLogger("llama2.serve")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """One event of one answer, and the text that it made certain."""

    choice: int
    token: Token
    text: str


@dataclass(eq=False)
class Job:
    """A request to the engine, and where its pieces go."""

    request: Request
    texts: AnswerTexts
    deliver: Callable[[Sequence[Piece] | Exception], None]
    """Called in the event loop."""
    first_choice: int = 0
    """The number of this job's first answer among those of the client's request."""
    n_open: int = field(init=False)
    """Answers that have not ended; counted by the thread."""
    n_counted: int = field(init=False, default=0)
    """Answers counted against the worker's room; by the event loop."""

    def __post_init__(self) -> None:
        self.n_open = self.request.params.n_written


class Worker:
    """A model at work."""

    def __init__(self, name: str, open_llm: Callable[[], LLM], *, open_engine: Callable[[LLM], Engine], room: int):
        """Both are called in the thread. room: how many answers may be waiting or under way."""
        self.name, self.room = name, room
        self.llm: LLM | None = None
        self.engine: Engine | None = None
        self.failure: Exception | None = None
        """Why the model could not be loaded."""
        self.n_answers = 0
        self.open_llm, self._open_engine = open_llm, open_engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._pending: deque[Job | Callable[[], None]] = deque()
        self._thread = threading.Thread(target=self._run, name=f"llama2 {name}", daemon=True)

    # In the event loop

    def start(self, loop: asyncio.AbstractEventLoop, on_ready: Callable[[], None]) -> None:
        """Load the model; on_ready is called in the loop when it is there, or when `failure` says why not."""
        self._loop, self._on_ready = loop, on_ready
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after the step under way."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def loaded(self) -> LLM:
        """Return the model. Raises Refusal while it is not there yet."""
        if self.llm is None:
            raise try_later(f"the model {self.name!r} is still being loaded", 2, code="model_loading")
        return self.llm

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Refusal where too many wait already."""
        wanted = job.request.params.n_written
        if self.n_answers + wanted > self.room:
            raise try_later(
                f"{self.n_answers} answers are waiting or under way and {wanted} more do not fit into {self.room}",
                5,
                code="server_overloaded",
            )
        job.n_counted = wanted
        self.n_answers += wanted
        self._commands.put(lambda: self._pending.append(job))

    def release(self, job: Job, n_answers: int | None = None) -> None:
        """Give back the room of so many of a job's answers, or of all."""
        n_answers = job.n_counted if n_answers is None else min(n_answers, job.n_counted)
        job.n_counted -= n_answers
        self.n_answers -= n_answers

    def cancel(self, job: Job) -> None:
        """Drop a job wherever it is; one that has ended already is let be."""
        self.release(job)
        self._commands.put(lambda: self._drop(job))

    async def call(self, function: Callable[[LLM], Result]) -> Result:
        """Run a function of the model between two steps and return its result."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                result, error = function(self.loaded()), None
            except Exception as caught:
                result, error = None, caught
            self._post(_settle, future, result, error)

        self._commands.put(run)
        return await future

    async def change(self, function: Callable[[LLM], object]) -> None:
        """Run a function that changes the model, when no answer is under way; what comes later waits for it."""
        done: asyncio.Future[None] = self._loop.create_future()

        def alone() -> None:
            try:
                function(self.loaded())
                self.engine = self._open_engine(self.loaded())  # what it kept is another model's
                self._post(_settle, done, None, None)
            except Exception as error:
                self._post(_settle, done, None, error)

        self._commands.put(lambda: self._pending.append(alone))
        await done

    def fail(self, error: Exception) -> None:
        """End all that waits or is under way with an error."""

        def run() -> None:
            waiting, self._pending = self._pending, deque()
            for job in waiting:
                if isinstance(job, Job):
                    self._post(job.deliver, error)
            self._end_all(error)

        self._commands.put(run)

    # In the thread

    def _run(self) -> None:
        try:
            llm = self.open_llm()
            self.engine, self.llm = self._open_engine(llm), llm
        except Exception as error:
            self.failure = error
        self._post(self._on_ready)
        while self.failure is None:
            is_idle = not self._jobs and not self._pending
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                self._advance()
                continue
            if command is None:
                return
            try:
                command()
            except Exception as error:
                self._fail_all(error)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the event loop, unless that has been closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _drop(self, job: Job) -> None:
        if job in self._pending:
            self._pending.remove(job)
        if self._jobs.pop(job.request.id, None) is not None and self.engine is not None:
            self.engine.abort(job.request.id)

    def _advance(self) -> None:
        """Admit what waits and take one step; whatever goes wrong, the thread lives."""
        assert self.engine is not None
        self._admit()
        self._step(self.engine)

    def _step(self, engine: Engine) -> None:
        try:
            self._deliver(engine, engine.step())
        except Exception as error:
            self._fail_all(error)

    def _admit(self) -> None:
        """Give the engine the jobs that wait; what it refuses is told to the client.

        A change of the model waits until the engine is empty; those who came later wait behind it.
        """
        while self._pending:
            job = self._pending[0]
            if not isinstance(job, Job) and self._jobs:
                return
            self._pending.popleft()
            if not isinstance(job, Job):
                job()
                continue
            try:
                assert self.engine is not None
                self.engine.add(job.request)
                self._jobs[job.request.id] = job
            except Exception as error:
                self._post(job.deliver, error)

    def _deliver(self, engine: Engine, events: Sequence[Token]) -> None:
        pieces: dict[Job, list[Piece]] = {}
        failed: dict[Job, Refusal] = {}
        for event in events:
            job = self._jobs.get(event.request_id)
            found = job.texts.push(event) if job is not None else None
            if job is None or found is None:
                continue
            token, text = found
            if token.finish_reason != event.finish_reason:
                engine.abort(token.request_id, token.index)
            if token.error is not None:
                status = 400 if token.is_asked_for else 500
                failed[job] = Refusal(status, token.error, headers={"x-should-retry": "false"})
            pieces.setdefault(job, []).append(Piece(job.first_choice + token.index, token, text))
            if token.finish_reason:
                job.n_open -= 1
                if not job.n_open:
                    del self._jobs[event.request_id]
        for job, found in pieces.items():
            if job not in failed:
                self._post(job.deliver, found)
                continue
            log.error("%s gave an answer up", self.name)
            self._drop(job)
            self._post(job.deliver, [piece for piece in found if not piece.token.error])
            self._post(job.deliver, failed[job])

    def _fail_all(self, error: Exception) -> None:
        """End every job in flight with an error, and begin with a new engine."""
        log_mistake(f"{self.name} was at work", error)
        told = Refusal(500, f"the model failed on this request: {type(error).__name__}")
        if isinstance(error, Llama2Error):  # written for users, and without their words
            told = Refusal(500, str(error))
        self._end_all(told)

    def _end_all(self, error: Exception) -> None:
        for job in self._jobs.values():
            self._post(job.deliver, error)
        self._jobs.clear()
        self.engine = self._open_engine(self.loaded())


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
