"""The answers to one request: whoever leaves is heard, whenever it is."""

import asyncio
import time

import pytest

from llama2.serve.generation import Generation


def waiting(timeout_s: float) -> Generation:
    """Return a generation that has begun and whose pieces are put by hand."""
    made = object.__new__(Generation)
    made._queue, made.finish_reasons, made.n_choices = asyncio.Queue(), {}, 1
    made._began, made._timeout_s = time.monotonic(), timeout_s
    return made


@pytest.mark.parametrize("ticks", range(5))
def test_a_cancellation_that_comes_with_a_piece_is_not_lost(ticks):
    async def leave() -> bool:
        generation = waiting(10)
        task = asyncio.create_task(generation.next())
        await asyncio.sleep(0)
        generation._queue.put_nowait([])
        for _ in range(ticks):
            await asyncio.sleep(0)
        if task.done():
            return True  # the piece came first
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return True
        return False

    assert asyncio.run(leave())


def test_a_piece_that_does_not_come_in_time_is_an_error():
    async def wait():
        await waiting(0.01).next()

    with pytest.raises(Exception, match=r"0\.01"):
        asyncio.run(wait())
