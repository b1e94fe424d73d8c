"""Who may ask, and how much: keys compared in constant time, buckets of requests and tokens that refill steadily."""

import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama2.errors import RequestError
from llama2.serve.refusal import Refusal, try_later

MAX_CALLERS = 10_000


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys in a file, one per line; # begins a comment. Raises RequestError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--api-keys {path} cannot be read: {error}") from None
    keys = tuple(key for line in lines if (key := line.partition("#")[0].strip()))
    for key in keys:
        if not (key.isascii() and key.isprintable() and " " not in key and len(key) >= 8):
            raise RequestError(
                f"--api-keys {path}: a key must be 8 or more plain ASCII characters without spaces; make one with "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
    if not keys:
        raise RequestError(f"--api-keys {path} holds no key; write one per line")
    return keys


def caller(keys: Sequence[str], authorization: str | None) -> str:
    """Return the name of a key's owner, `key 1` for the first. Raises Refusal: 401.

    Every key is compared, whatever the first ones say, so that the time tells nothing.
    """
    scheme, _, given = (authorization or "").partition(" ")
    offered = given.strip().encode("utf-8", "surrogateescape")
    found = [number for number, key in enumerate(keys, 1) if hmac.compare_digest(key.encode(), offered)]
    if scheme.lower() != "bearer" or not found:
        problem = "the API key is not known" if given else "an API key is needed"
        raise Refusal(
            401,
            f"{problem}; send it as the header `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    return f"key {found[0]}"


@dataclass
class Bucket:
    """Holds up to a minute's worth, refills evenly, and may go into debt for what was not known beforehand."""

    per_minute: int
    level: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level, self.at = self.per_minute, time.monotonic()

    def wait_s(self, amount: float) -> float:
        """Return after how many seconds so much is there; more than a full bucket is never asked for."""
        now = time.monotonic()
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now
        return max(0.0, min(amount, self.per_minute) - self.level) * 60 / self.per_minute

    def take(self, amount: float) -> None:
        self.level -= amount


@dataclass
class Limits:
    """The buckets of every caller."""

    requests_per_minute: int
    tokens_per_minute: int
    _requests: dict[str, Bucket] = field(default_factory=dict)
    _tokens: dict[str, Bucket] = field(default_factory=dict)

    def request(self, who: str) -> None:
        """Count a request. Raises Refusal: 429."""
        if self.requests_per_minute:
            self._spend(self._requests, who, self.requests_per_minute, 1, "requests")

    def tokens(self, who: str, n_tokens: int) -> None:
        """Count a prompt before it is read. Raises Refusal: 429."""
        if self.tokens_per_minute:
            self._spend(self._tokens, who, self.tokens_per_minute, n_tokens, "tokens")

    def written(self, who: str, n_tokens: int) -> None:
        """Count an answer that is there already."""
        if self.tokens_per_minute:
            self._bucket(self._tokens, who, self.tokens_per_minute).take(n_tokens)

    def _spend(self, buckets: dict[str, Bucket], who: str, per_minute: int, amount: int, what: str) -> None:
        bucket = self._bucket(buckets, who, per_minute)
        wait_s = bucket.wait_s(amount)
        if wait_s > 0:
            raise try_later(
                f"more than {per_minute} {what} per minute; try again in {wait_s:.0f} s",
                wait_s,
                status=429,
                code="rate_limit_exceeded",
            )
        bucket.take(amount)

    def _bucket(self, buckets: dict[str, Bucket], who: str, per_minute: int) -> Bucket:
        if who not in buckets and len(buckets) >= MAX_CALLERS:
            del buckets[next(iter(buckets))]  # the oldest caller; without keys a caller is only an address
        return buckets.setdefault(who, Bucket(per_minute))
