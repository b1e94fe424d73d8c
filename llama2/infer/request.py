"""What goes into the engine and what comes out: token ids and numbers, never text."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from llama2.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]
MAX_TOP_LOGPROBS = 100

TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest ids with their log-probabilities, best first."""


@runtime_checkable
class Matcher(Protocol):
    """Follows one answer, and knows which tokens may come next."""

    def allowed(self) -> Bool[Tensor, " V"]:
        """Return True for each id that may come next; end tokens among them where the answer may end."""
        ...

    def advance(self, token_id: int) -> None:
        """This token, an allowed one, came next."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """What an answer must look like; where it comes from is not the engine's business."""

    def matcher(self) -> Matcher:
        """Return one that stands at the beginning of an answer."""
        ...


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
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the expected one, up to this total probability; 1 keeps all."""
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
    dry_multiplier: float = 0.0
    """Strength of the penalty for a token that would go on repeating earlier text (DRY); 0 is none."""
    dry_base: float = 1.75
    """The penalty is multiplier * base ** (length of the repetition - allowed length)."""
    dry_allowed_length: int = 2
    """Repetitions of up to this many tokens cost nothing."""
    dry_breaker_ids: tuple[int, ...] = ()
    """Repetitions are not followed across these token ids."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; they are not part of it."""
    ignore_eos: bool = False
    """Go on after a stop id, which is then part of the answer."""
    min_tokens: int = 0
    """No stop id before this many new tokens."""
    grammar: Grammar | None = None
    """What the answer must look like."""
    seed: int | None = None
    """Fixes the random choices; None draws a new seed."""
    n: int = 1
    """Number of answers, each with a random stream of its own."""
    best_of: int | None = None
    """Write this many answers and keep the n likeliest per token; None writes n."""
    beam_width: int = 0
    """Keep this many hypotheses and return the n best of them (beam search); 0 samples."""
    length_penalty: float = 1.0
    """Hypotheses are ordered by ln p / length ** length_penalty; 0 prefers short ones."""
    logprobs: int | None = None
    """Report log-probabilities, with this many of the likeliest alternatives for each token."""
    prompt_logprobs: int | None = None
    """Report them for the tokens of the prompt too, all but the first."""

    @property
    def n_written(self) -> int:
        """How many answers are written, of which n are kept."""
        return self.best_of or self.n

    def __post_init__(self) -> None:
        optional = ("max_new_tokens", "seed", "logprobs", "best_of", "prompt_logprobs")
        for name in (*optional, "top_k", "n", "min_tokens", "beam_width", "dry_allowed_length"):
            value = getattr(self, name)
            self._check(name, (value is None and name in optional) or is_whole(value), "a whole number")
        for name in (
            *("temperature", "top_p", "typical_p", "min_p", "dry_multiplier", "dry_base", "length_penalty"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        ):
            self._check(name, is_number(getattr(self, name)), "a number")
        is_table = isinstance(self.logit_bias, Mapping)
        is_table = is_table and all(is_whole(k) and is_number(v) for k, v in self.logit_bias.items())
        self._check("logit_bias", is_table, "id: number")
        for name in ("stop_ids", "dry_breaker_ids"):
            value = getattr(self, name)
            self._check(name, isinstance(value, Iterable) and all(map(is_whole, value)), "token ids")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")
        self._check("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1, or None")
        self._check("temperature", 0 <= self.temperature < math.inf, "0 or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "0 (off) or more")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is none")
        self._check("presence_penalty", math.isfinite(self.presence_penalty), "a finite number")
        self._check("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")
        self._check("dry_multiplier", 0 <= self.dry_multiplier < math.inf, "0 (off) or more")
        self._check("dry_base", 1 <= self.dry_base < math.inf, "at least 1")
        self._check("dry_allowed_length", self.dry_allowed_length >= 1, "at least 1")
        self._check("logit_bias", all(bias < math.inf for bias in self.logit_bias.values()), "numbers below infinity")
        self._check("min_tokens", 0 <= self.min_tokens <= (self.max_new_tokens or math.inf), "0 to max_new_tokens")
        self._check("n", 1 <= self.n <= 1024, "from 1 to 1024")
        self._check("best_of", self.best_of is None or self.n <= self.best_of <= 1024, "from n to 1024, or None")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            known = value is None or 0 <= value <= MAX_TOP_LOGPROBS
            self._check(name, known, f"from 0 to {MAX_TOP_LOGPROBS}, or None")
        self._check("length_penalty", math.isfinite(self.length_penalty), "a finite number")
        self._check("grammar", self.grammar is None or isinstance(self.grammar, Grammar), "a Grammar, or None")
        self._check("beam_width", self.beam_width == 0 or self.n <= self.beam_width <= 64, "0 (off), or from n to 64")
        if self.beam_width and (self.best_of or self.grammar or self.prompt_logprobs is not None):
            raise RequestError("beam_width does not go with best_of, grammar or prompt_logprobs")
        if self.beam_width and self.logprobs:
            raise RequestError(f"beam_width knows no alternatives: logprobs={self.logprobs} must be 0, or None")
        if self.ignore_eos and self.grammar is not None:
            raise RequestError("ignore_eos does not go with a grammar, whose texts have an end")

    def _check(self, name: str, is_valid: bool, wanted: str) -> None:
        if not is_valid:
            raise RequestError(f"{name}={getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. `id` names it in the tokens that come back."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    adapter: str | None = None
    """Which of the model's adapters takes part, by name; None leaves those on that are."""


@dataclass(frozen=True)
class Token:
    """One event of one answer: a new token, or its end (then `id` may be None)."""

    request_id: str
    index: int
    """Which of the request's n answers."""
    id: int | None
    logprob: float | None = None
    """Log-probability under the model itself, before temperature, penalties and filters."""
    top_logprobs: TopLogprobs = ()
    """The likeliest alternatives, (id, log-probability), best first."""
    finish_reason: FinishReason | None = None
    n_cached: int = 0
    """On an answer's first event: tokens of the prompt that were found in the cache."""
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] | None = None
    """On the first event of a request's first answer, if asked for: of the prompt's second token, third token..."""
    error: str | None = None
    """Why the answer had to be given up; its finish_reason is then `abort`."""
    is_asked_for: bool = False
    """Whether that follows from what was asked for, as where a grammar comes to a dead end."""


@dataclass(frozen=True)
class Completion:
    """One finished answer."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[TopLogprobs, ...] | None
    finish_reason: FinishReason
    n_prompt_tokens: int
    index: int = 0
    n_cached: int = 0
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] | None = None

    @property
    def n_new_tokens(self) -> int:
        return len(self.tokens)
