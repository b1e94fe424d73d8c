"""Tasks in worker processes that share as much memory as the system allows, and die with their parent.

A task is a tuple of arguments for one function; what it leaves lies on disk, so it may be killed at any moment.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from llama2.errors import DataError, Llama2Error

_PRELOAD = [
    "llama2.data.corpus.extract",
    "llama2.data.corpus.tokenise",
    "sentencepiece",
    "rensa",
    "zstandard",
    "pydantic",
]


def run_tasks(
    function: Callable, tasks: Sequence[tuple], *, n_workers: int, on_done: Callable[[int, object], None]
) -> None:
    """Call function(*task) for every task, in this process or in n_workers others; say which is done, and its result.

    An error in a task ends all others. Raises DataError where a worker is killed from outside.
    """
    if n_workers == 1 or len(tasks) < 2:
        for number, task in enumerate(tasks):
            on_done(number, function(*task))
        return
    context = _context()
    workers: dict[Connection, BaseProcess] = {}
    waiting = list(enumerate(tasks))[::-1]
    try:
        for _ in range(min(n_workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
            ours.send(waiting.pop())
        _serve(workers, waiting, on_done)
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _context():
    """Return how processes are started: from a small server that has imported what they need, where there are such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _serve(workers: dict, waiting: list[tuple[int, tuple]], on_done: Callable[[int, object], None]) -> None:
    busy = set(workers)
    while busy:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            try:
                number, result, error = connection.recv()
            except (EOFError, ConnectionError):
                workers[connection].join(5)
                code = workers[connection].exitcode
                raise DataError(
                    f"a worker process ended with code {code}: killed, or out of memory; run the same command again "
                    "to go on, with fewer --workers if memory was short"
                ) from None
            if error is not None:
                raise error
            on_done(number, result)
            if waiting:
                connection.send(waiting.pop())
            else:
                busy.remove(connection)
                connection.send(None)


def _work(connection: Connection, function: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while (task := connection.recv()) is not None:
        number, arguments = task
        try:
            connection.send((number, function(*arguments), None))
        except (Llama2Error, OSError) as error:
            connection.send((number, None, error))
        except Exception:
            connection.send((number, None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
