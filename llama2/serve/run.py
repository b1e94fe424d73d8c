"""Serve models: bind, load, answer, and on SIGTERM let the running answers end.

bind -> event loop, 503 while the worker threads load -> answers -> SIGTERM: 503 -> drain -> abort the rest -> leave
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama2.errors import RequestError
from llama2.serve.app import make_app
from llama2.serve.config import LOOPBACK, ServeConfig
from llama2.serve.keys import read_keys
from llama2.serve.models import Models, is_split
from llama2.serve.refusal import try_later
from llama2.serve.server import Server

log = logging.getLogger("llama2.serve")


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises Llama2Error where the server cannot begin, or a model cannot be loaded."""
    keys = read_keys(config.api_keys) if config.api_keys is not None else ()
    if not config.models:
        raise RequestError("serve needs a model: a folder, a file or a hub name")
    if config.host not in LOOPBACK and not keys:
        if config.auth:
            raise RequestError(
                f"--host {config.host} is open to other machines; give --api-keys FILE, or --no-auth if anybody may ask"
            )
        log.warning("anybody who reaches %s port %d may ask: --no-auth", config.host, config.port)
    if is_split():
        if len(config.models) > 1 or config.adapter or config.draft:
            raise RequestError("several processes serve one plain model: no other models, adapters or draft beside it")
        if os.environ["RANK"] != "0":  # it holds its part of the model, and does as the first process does
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_IGN)
            Models(config).workers[0].open_llm()
    run(Server(config, Models(config)), keys)


def run(server: Server, keys: Sequence[str] = ()) -> None:
    """Serve until `server.stop` is called."""
    config = server.config
    listener = _bind(config.host, config.port)
    where = f"[{config.host}]" if ":" in config.host else config.host
    server.url = f"http://{where}:{listener.getsockname()[1]}"
    log.info("listening on %s; loading %s", server.url, ", ".join(server.models.served))
    try:
        failure = asyncio.run(_run(server, keys, listener))
    finally:
        listener.close()
    if failure is not None:
        raise failure


def _bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises RequestError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except socket.gaierror as error:
        listener.close()
        raise RequestError(f"--host {host} is no address of this machine ({error.strerror})") from None
    except OSError as error:
        listener.close()
        raise RequestError(f"port {port} of {host} cannot be used ({error.strerror}); choose another --port") from None
    listener.listen(1024)
    return listener


async def _run(server: Server, keys: Sequence[str], listener: socket.socket) -> Exception | None:
    """Run until the end; return why a model could not be loaded, if that was the end."""
    config, failures = server.config, []
    http = _Http(
        uvicorn.Config(
            make_app(server, keys),
            http=type("Protocol", (_Protocol,), {"timeout_s": config.read_timeout_s}),
            loop="asyncio",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            limit_concurrency=config.max_connections,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        ),
        on_signal=server.stop,
    )
    loop = asyncio.get_running_loop()
    server.on_stop = lambda: asyncio.run_coroutine_threadsafe(_drain(server, http), loop)

    def fail(error: Exception) -> None:
        failures.append(error)
        http.should_exit = True

    server.models.start(fail)
    try:
        await http.serve(sockets=[listener])
    finally:
        server.models.stop()
    return failures[0] if failures else None


async def _drain(server: Server, http: uvicorn.Server) -> None:
    """Take nothing new, let what runs end within the limit, then end it, and leave."""
    server.is_draining = True
    log.info("shutting down: %d requests may end within %g s", server.n_running, server.config.drain_timeout_s)
    await _until_idle(server, server.config.drain_timeout_s)
    for worker in server.models.workers:
        worker.fail(try_later("the server is shutting down", 5, code="shutting_down"))
    await _until_idle(server, 5)
    http.should_exit = True


async def _until_idle(server: Server, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while server.n_running and loop.time() < end:
        await asyncio.sleep(0.02)


class _Http(uvicorn.Server):
    """Drains at the first signal, and leaves at once at the second."""

    def __init__(self, config: uvicorn.Config, *, on_signal: Callable[[], object]):
        super().__init__(config)
        self._on_signal, self._n_signals = on_signal, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        if self._n_signals == 1:
            self._on_signal()
        else:
            self.should_exit = self.force_exit = True


class _Protocol(H11Protocol):
    """Closes a connection whose request line and headers do not arrive in time; uvicorn would wait for ever."""

    timeout_s = 30.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if before is None or before.response_complete:
            self._wait()
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.timeout_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
