"""What all routes share: the models, the limits, the metrics, and how a request is read, counted and refused."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from llama2.chat import Message
from llama2.llm import LLM, Ids, SamplingOptions
from llama2.serve.answers import Envelope
from llama2.serve.body import read_json
from llama2.serve.config import ServeConfig
from llama2.serve.generation import Generation, Prepared, Usage, prepare
from llama2.serve.keys import Limits
from llama2.serve.metrics import Metrics
from llama2.serve.models import Models, Served
from llama2.serve.protocol import Sampled, Wire, ignored

Asked = TypeVar("Asked", bound=Wire)


@dataclass
class Call:
    """One HTTP request under way: what the log and the limits want to know of it."""

    who: str
    usage: Usage
    path: str = "unknown"
    """The route, not what stood in the address."""
    ignored: str = ""
    """Fields that the server does not know."""


@dataclass(frozen=True)
class Target:
    """The model that a request means."""

    served: Served
    adapter: str | None
    name: str
    llm: LLM


class Server:
    """The state of a server, owned by the event loop."""

    def __init__(self, config: ServeConfig, models: Models):
        self.config, self.models = config, models
        self.limits = Limits(config.requests_per_minute, config.tokens_per_minute)
        self.metrics = Metrics(lambda: {worker.name: worker.engine.stats for worker in models.workers if worker.engine})
        self.is_draining = False
        self.n_running = 0
        """HTTP requests under way."""
        self.url = ""
        """Where it listens, once it does."""
        self.on_stop: Callable[[], object] = lambda: None

    def stop(self) -> None:
        """Begin to shut down; from any thread."""
        self.on_stop()

    async def read(self, request: Request, kind: type[Asked]) -> Asked:
        """Return what a client asks for, checked. Raises Refusal and pydantic's ValidationError."""
        asked = kind.model_validate(await read_json(request, self.config))
        names = sorted({_harmless(name) for name in ignored(asked)})
        call_of(request).ignored = ",".join(names)[:500]
        return asked

    def target(self, name: str | None) -> Target:
        """Return the model that a client names. Raises Refusal where there is none, or not yet."""
        served, adapter = self.models.find(name)
        return Target(served, adapter, adapter or served.worker.name, served.worker.loaded())

    def envelope(self, target: Target, kind: str, prefix: str) -> Envelope:
        return Envelope.new(kind, prefix, target.name, target.served.fingerprint)

    async def prepare(
        self, target: Target, prompts: Sequence[str | Ids | list[Message]], options: SamplingOptions
    ) -> list[Prepared]:
        """Return each prompt as ids with its sampling; a long text takes a while, so a thread does it."""
        return await asyncio.to_thread(
            lambda: [prepare(target.llm, prompt, options, adapter=target.adapter) for prompt in prompts]
        )

    def generation(self, request: Request, target: Target, prepared: Sequence[Prepared]) -> Generation:
        """Return the answers to some prompts, queued. Raises Refusal where the caller or the server has enough."""
        call = call_of(request)
        self.limits.tokens(call.who, sum(len(each.request.prompt) for each in prepared))
        generation = Generation(
            target.served.worker,
            prepared,
            usage=call.usage,
            metrics=self.metrics,
            timeout_s=self.config.request_timeout_s,
        )
        generation.start()
        return generation

    def options(self, asked: Sampled, *, max_tokens: int | None, logprobs: int | None) -> SamplingOptions:
        """Return a request's sampling as the engine's, the length bounded by the server's own limit.

        max_tokens: how long the answer may be; None until the context is full.
        """
        limits = [limit for limit in (max_tokens, self.config.max_tokens) if limit is not None]
        beam_width = (asked.n or 1) if asked.use_beam_search and asked.beam_width is None else asked.beam_width
        top_k = None if asked.top_k is None else max(asked.top_k, 0)
        bias = asked.logit_bias and {int(token_id): float(value) for token_id, value in asked.logit_bias.items()}
        given: dict[str, Any] = dict(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=top_k,
            min_p=asked.min_p,
            typical_p=asked.typical_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            dry_multiplier=asked.dry_multiplier,
            dry_base=asked.dry_base,
            dry_allowed_length=asked.dry_allowed_length,
            min_tokens=asked.min_tokens,
            ignore_eos=asked.ignore_eos,
            beam_width=beam_width,
            length_penalty=asked.length_penalty,
            stop_ids=asked.stop_token_ids and tuple(asked.stop_token_ids),
            stop=asked.stop,
            include_stop=asked.include_stop_str_in_output,
            logit_bias=bias,
            seed=asked.seed,
            n=asked.n,
            logprobs=logprobs,
        )
        known = {name: value for name, value in given.items() if value is not None}
        return SamplingOptions(**known, max_new_tokens=min(limits) if limits else None)


def call_of(request: Request) -> Call:
    return request.scope["state"]["call"]


def _harmless(name: str) -> str:
    """Return a field's name as a header and a log may hold it."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "_-.[]") else "?" for char in name)[:64]
