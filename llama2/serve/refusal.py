"""What a client is told when something is not done: OpenAI's error object, and a status."""

import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from llama2.errors import Llama2Error

log = logging.getLogger("llama2.serve")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Refusal(Exception):
    """A request that is not answered: the status says whose fault it is, the message what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {**(headers or {})}

    def body(self) -> dict[str, Any]:
        """Return {"error": ...} as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Json(self.body(), status_code=self.status, headers=self.headers)


class Json(Response):
    """JSON in UTF-8. A lone surrogate, which UTF-8 cannot hold, stays the escape that it came as."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # \udcff is an escape in JSON too


def try_later(message: str, seconds: float, *, status: int = 503, code: str | None = None) -> Refusal:
    """Return a refusal that says when to come again."""
    return Refusal(status, message, code=code, headers={"retry-after": str(max(1, round(seconds + 0.5)))})


def out_of_time(seconds: float) -> Refusal:
    """Return a refusal that clients do not answer by asking the same again."""
    return Refusal(
        504,
        f"the request was not answered within {seconds:g} s; ask for fewer tokens",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def refusal(error: Exception) -> Refusal:
    """Return what to tell the client of any exception; of our own mistakes no more than that there was one."""
    match error:
        case Refusal():
            return error
        case ValidationError():
            return _wrong_field(error)
        case Llama2Error():
            too_long = "context holds" in str(error)
            return Refusal(400, str(error), code="context_length_exceeded" if too_long else None)
    log_mistake("answering a request", error)
    return Refusal(500, f"the server made a mistake ({type(error).__name__}); its log says more")


def log_mistake(while_doing: str, error: Exception) -> None:
    """Log an exception that should not be: its kind and where it came from, not its words, which may be a user's."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("a mistake while %s: %s\n%s", while_doing, type(error).__name__, frames)


def _wrong_field(error: ValidationError) -> Refusal:
    """Return a mistake that pydantic found, without the value, which may be a whole prompt."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a field with alternatives all are reported; that which came nearest is told.
    same = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    nearest = max(same, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
    names = [part for part in nearest["loc"] if isinstance(part, int) or _is_field(part)]
    where, message = ".".join(map(str, names)), nearest["msg"].removeprefix("Value error, ")
    name, colon, rest = message.partition(": ")
    if not where and colon and name.isidentifier():
        where, message = name, rest
    return Refusal(400, f"{where}: {message}" if where else message, param=where or None)


def _is_field(part: str) -> bool:
    """Tell a field's name from the name of an alternative, e.g. `str` or `list[str]`."""
    return part.isidentifier() and part not in ("str", "int", "float", "bool") and part == part.lower()
