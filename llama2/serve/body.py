"""Reading what a client sends, bounded in size, depth and time."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from starlette.requests import ClientDisconnect, Request

from llama2.serve.config import ServeConfig
from llama2.serve.refusal import Refusal

MAX_VALUES, MAX_FIELDS = 1_000_000, 10_000
"""Checked before anything looks at them one by one: a body of small values takes a hundred times its size."""


async def read_json(request: Request, config: ServeConfig) -> dict[str, Any]:
    """Return the JSON object in a request's body. Raises Refusal: 400, 408 or 413."""
    try:
        async with asyncio.timeout(config.read_timeout_s):
            data = await _read(request, config.max_body_bytes)
    except TimeoutError:
        raise Refusal(
            408,
            f"the request did not arrive within {config.read_timeout_s:g} s",
            headers={"connection": "close", "x-should-retry": "false"},
        ) from None
    return parse(data, max_depth=config.max_depth)


async def _read(request: Request, limit: int) -> bytes:
    """Read the body, and no further once it is too long."""
    announced = request.headers.get("content-length", "0")
    n_bytes = int(announced) if announced.isdecimal() else 0
    data = bytearray()
    if n_bytes <= limit:
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                n_bytes = len(data)
                break
        else:
            return bytes(data)
    raise Refusal(
        413,
        f"the body has {n_bytes} bytes or more; at most {limit} are taken (--max-body-bytes)",
        code="request_too_large",
        headers={"connection": "close"},
    )


def parse(data: bytes, *, max_depth: int) -> dict[str, Any]:
    """Return the object in JSON text. Raises Refusal for what is none, nested too deeply, or of too many parts."""
    too_deep = Refusal(400, f"the body is nested deeper than {max_depth} levels")
    too_many = Refusal(
        413,
        f"the body holds more than {MAX_VALUES} values, or an object of more than {MAX_FIELDS} fields; "
        "send less at a time",
    )
    if data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise too_many
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise too_deep from None
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except json.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # Python refuses to read numbers of thousands of digits
        raise Refusal(400, "the body holds a number that is too long") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is a JSON {type(value).__name__}; wanted an object")
    level, n_values = [value], 0
    for _ in range(max_depth):
        n_values += sum(map(len, level))
        if n_values > MAX_VALUES or any(isinstance(each, dict) and len(each) > MAX_FIELDS for each in level):
            raise too_many
        level = [child for each in level for child in _children(each) if isinstance(child, dict | list)]
        if not level:
            return value
    raise too_deep


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _refuse_constant(name: str) -> None:
    raise Refusal(400, f"the body holds {name}, which is not JSON")


async def gone(request: Request) -> None:
    """Return when the client has left; the body must have been read."""
    while True:
        try:
            message = await request.receive()
        except ClientDisconnect:
            return
        if message["type"] == "http.disconnect":
            return
