"""What goes into the engine and what comes out: token ids and numbers, never text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llama2.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]
MAX_TOP_LOGPROBS = 100


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each next token. Every field is checked; the order of application is in `sampling.py`."""

    max_new_tokens: int | None = 256
    """At most this many new tokens; None means until the context is full."""
    temperature: float = 0.6
    """0 always takes the likeliest token; 1 samples the model's own distribution."""
    top_p: float = 0.9
    """Keep the likeliest tokens up to this total probability, the one that crosses it included; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens seen in prompt or answer by this, multiply negative ones (CTRL)."""
    presence_penalty: float = 0.0
    """Subtract this from the logit of every token already in the answer."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit once for each time that it is already in the answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; they are not part of it."""
    seed: int | None = None
    """Fixes the random choices; None draws a new seed."""
    n: int = 1
    """Number of answers, each with a random stream of its own."""
    logprobs: int | None = None
    """Report log-probabilities, with this many of the likeliest alternatives for each token."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "n", "logprobs"):
            value = getattr(self, name)
            is_optional = name in ("max_new_tokens", "seed", "logprobs")
            self._check(name, (value is None and is_optional) or is_whole(value), "a whole number")
        for name in (
            *("temperature", "top_p", "min_p"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        ):
            self._check(name, is_number(getattr(self, name)), "a number")
        self._check("logit_bias", all(is_whole(k) and is_number(v) for k, v in self.logit_bias.items()), "id: number")
        self._check("stop_ids", all(map(is_whole, self.stop_ids)), "token ids")
        self._check("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1, or None")
        self._check("temperature", 0 <= self.temperature < math.inf, "0 or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "0 (off) or more")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is none")
        self._check("presence_penalty", math.isfinite(self.presence_penalty), "a finite number")
        self._check("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")
        self._check("logit_bias", all(bias < math.inf for bias in self.logit_bias.values()), "numbers below infinity")
        self._check("n", 1 <= self.n <= 1024, "from 1 to 1024")
        known = self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS
        self._check("logprobs", known, f"from 0 to {MAX_TOP_LOGPROBS}, or None")

    def _check(self, name: str, is_valid: bool, wanted: str) -> None:
        if not is_valid:
            raise RequestError(f"{name}={getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. `id` names it in the tokens that come back."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()


@dataclass(frozen=True)
class Token:
    """One event of one answer: a new token, or its end (then `id` may be None)."""

    request_id: str
    index: int
    """Which of the request's n answers."""
    id: int | None
    logprob: float | None = None
    """Log-probability under the model itself, before temperature, penalties and filters."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest alternatives, (id, log-probability), best first."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """One finished answer."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    finish_reason: FinishReason
    n_prompt_tokens: int
    index: int = 0

    @property
    def n_new_tokens(self) -> int:
        return len(self.tokens)
