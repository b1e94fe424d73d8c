"""Server-sent events: lines as OpenAI's clients read them, and an eye on the client while they are sent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama2.serve.body import gone
from llama2.serve.refusal import refusal, to_json

DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has left; nobody reads an answer."""


async def until_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return the work's result. Raises ClientGone, and gives the work up, if the client leaves first."""
    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGone
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


class EventStream(Response):
    """A response whose events are written as they come.

    A failure on the way becomes one event with an `error`, which OpenAI's clients raise; `close` is called however
    it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], *, close: Callable[[], None], headers: Mapping[str, str] | None = None
    ):
        self.events, self.close = events, close
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone):
                await until_gone(Request(scope, receive), self._send(send))
        finally:
            self.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except ClientGone:
            raise
        except Exception as error:
            await send({"type": "http.response.body", "body": data(refusal(error).body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def data(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    return b"event: " + name.encode() + b"\n" + data(value)
