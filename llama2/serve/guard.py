"""The door: every request passes here first. Who asks, from where, how often; and one line in the log for each.

The log holds method, path, status, time, token counts and a request id: nothing of what anybody wrote.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2.serve.config import LOOPBACK, ServeConfig
from llama2.serve.generation import Usage
from llama2.serve.keys import caller
from llama2.serve.refusal import Refusal, try_later
from llama2.serve.server import Call, Server
from llama2.serve.stream import ClientGone

log = logging.getLogger("llama2.serve")

OPEN = ("/health", "/", "/page.css", "/page.js")
"""Paths that need no key; the page at / asks for one itself."""


class Guard:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, server: Server, keys: Sequence[str], routes: Mapping[str, str]):
        """routes: of each path the name that the log has for it; others are not named there."""
        self.app, self.server, self.keys, self.routes = app, server, keys, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, began = Request(scope, receive), time.perf_counter()
        address = request.client.host if request.client else "somebody"
        call = Call(address, Usage(), self.routes.get(request.url.path, "unknown"))
        scope.setdefault("state", {})["call"] = call
        request_id, status = f"req_{uuid.uuid4().hex[:24]}", 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = {"x-request-id": request_id, "openai-processing-ms": f"{_ms(began):.0f}"}
                if call.ignored:
                    more["x-llama2-ignored"] = call.ignored
                raw = [(name.encode(), value.encode()) for name, value in more.items()]
                message = {**message, "headers": [*message["headers"], *raw]}
            try:
                async with asyncio.timeout(self.server.config.read_timeout_s):
                    await send(message)
            except TimeoutError:  # a client that reads nothing would keep its answer here for ever
                raise ClientGone from None

        self.server.n_running += 1
        try:
            try:
                self._check(request, call)
            except Refusal as error:
                await error.response()(scope, receive, watched)
            else:
                await self.app(scope, receive, watched)
        except ClientGone:
            pass
        finally:
            self.server.n_running -= 1
            self.server.limits.written(call.who, call.usage.completion_tokens)
            self._note(scope, call, status, request_id, began)

    def _check(self, request: Request, call: Call) -> None:
        """Raise Refusal for those who may not ask, or not now."""
        if not self.keys:
            _check_host(request, self.server.config)
        _check_origin(request, self.server.config.allow_origin)
        path = request.url.path
        if path in OPEN or request.method == "OPTIONS":
            return
        if self.keys:
            call.who = caller(self.keys, request.headers.get("authorization"))
        if path == "/metrics":
            return
        if self.server.is_draining:
            raise try_later("the server is shutting down", 5, code="shutting_down")
        self.server.limits.request(call.who)

    def _note(self, scope: Scope, call: Call, status: int, request_id: str, began: float) -> None:
        usage = call.usage
        self.server.metrics.requests.labels(call.path, str(status)).inc()
        log.info(
            "%s %s %d %.0fms in=%d out=%d %s %s%s",
            scope["method"] if scope["method"].isalpha() else "?",
            call.path,
            status,
            _ms(began),
            usage.prompt_tokens,
            usage.completion_tokens,
            call.who,
            request_id,
            f" ignored={call.ignored}" if call.ignored else "",
        )


def _check_host(request: Request, config: ServeConfig) -> None:
    """Refuse a page in a browser that reaches this machine under a name of its own (DNS rebinding)."""
    if config.host not in LOOPBACK:
        return
    name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    if name not in (*LOOPBACK, *config.allow_host):
        raise Refusal(
            403, "this server listens on this machine only, and the Host header names another; see --allow-host"
        )


def _check_origin(request: Request, allowed: Sequence[str]) -> None:
    """Refuse pages of other origins: a browser would send their requests, though it hid the answers."""
    origin = request.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if urlsplit(origin).netloc != request.headers.get("host"):
        raise Refusal(403, "web pages of other origins may not ask here; see --allow-origin")


def _ms(began: float) -> float:
    return (time.perf_counter() - began) * 1000
