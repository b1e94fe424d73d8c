"""The engine: many requests, one model. Ids go in, ids come out; it never sees text.

Each `step` first admits waiting answers into free rows and reads their prompts (one padded batch, equal
prompts once), then gives every running answer its next token. Rows stay packed: 0..n_running-1.

    add -> waiting -> step: [prefill] -> running -> step: [decode] -> ... -> finished | abort
"""

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama2.errors import Llama2Error, RequestError
from llama2.infer.cache import DenseCache
from llama2.infer.invariant import ROW_INVARIANT
from llama2.infer.request import Completion, FinishReason, Request, SamplingParams, Token
from llama2.infer.sampling import choose, needs_penalties, penalise, uniform
from llama2.model.arithmetic import FAST, computing
from llama2.model.transformer import Transformer

MAX_PREFILL_TOKENS = 8192


@dataclass(eq=False)
class _Answer:
    """One of a request's n answers on its way."""

    request: Request
    index: int
    seed: int
    tokens: list[int] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)


class Engine:
    """Continues token sequences. Not thread-safe: one owner calls add, step and abort."""

    def __init__(self, model: Transformer, *, max_batch: int = 32, batch_invariant: bool | None = None):
        """batch_invariant: an answer's bits do not depend on who else is answered; None means for float32 and up.

        It costs speed where few answers run at once, and prompts are read one by one. Without it a text may
        change with its company, because matrix products of different shapes differ in their last bits.
        """
        self.model = model
        self.max_batch = max_batch
        weight = model.tok_embeddings.weight
        self.device = weight.device
        self.batch_invariant = weight.dtype.itemsize >= 4 if batch_invariant is None else batch_invariant
        # Padding would lengthen the shorter prompts, and dynamic RoPE turns by a prompt's length.
        self.reads_one_by_one = self.batch_invariant or model.rotation.is_dynamic
        self.cache = DenseCache(model.config, dtype=weight.dtype, device=weight.device)
        self.waiting: deque[_Answer] = deque()
        self.running: list[_Answer] = []

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never be answered."""
        config = self.model.config
        if not request.prompt:
            raise RequestError("the prompt has no tokens; begin it with the beginning-of-sequence token")
        if not all(0 <= token_id < config.vocab_size for token_id in request.prompt):
            bad = next(token_id for token_id in request.prompt if not 0 <= token_id < config.vocab_size)
            raise RequestError(f"the prompt holds token {bad}; the model knows 0 to {config.vocab_size - 1}")
        if len(request.prompt) >= config.context_length:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens and the model's context holds {config.context_length}, "
                "which leaves no room for an answer; shorten the prompt"
            )
        for name in ("logit_bias", "stop_ids"):
            outside = [token_id for token_id in getattr(request.params, name) if not 0 <= token_id < config.vocab_size]
            if outside:
                raise RequestError(f"{name} names token {outside[0]}; the model knows 0 to {config.vocab_size - 1}")
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        self.waiting.extend(_Answer(request, index, seed) for index in range(request.params.n))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its answers; unknown ones are ignored."""

        def is_meant(answer: _Answer) -> bool:
            return answer.request.id == request_id and index in (None, answer.index)

        self.waiting = deque(answer for answer in self.waiting if not is_meant(answer))
        for row in reversed([row for row, answer in enumerate(self.running) if is_meant(answer)]):
            self._leave(row)

    @torch.no_grad()
    def step(self) -> list[Token]:
        """Advance every running answer by one token; return what happened, in no particular order of requests."""
        decoding = len(self.running)
        logits = [self._decode()] if decoding else []
        while prompts := self._admit():
            logits.append(self._prefill(prompts))
        if not logits:
            return []
        events = self._sample(torch.cat(logits))
        for row in reversed([row for row, event in enumerate(events) if event.finish_reason]):
            self._leave(row)
        return events

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Answer all requests and return, for each, its n completions."""
        collected: dict[tuple[str, int], list[Token]] = {}
        for token in self.stream(requests):
            collected.setdefault((token.request_id, token.index), []).append(token)
        return [
            [completion(request, index, collected[request.id, index]) for index in range(request.params.n)]
            for request in requests
        ]

    def stream(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Answer all requests, yielding each token when it is known. Leaving early aborts the rest."""
        requests = list(requests)
        assert len({request.id for request in requests}) == len(requests), "request ids must differ"
        try:
            for request in requests:
                self.add(request)
            while self.running or self.waiting:
                yield from self.step()
        finally:
            for request in requests:
                self.abort(request.id)

    def _admit(self) -> list[_Answer]:
        """Take the next waiting answers that fit into free rows and one prefill batch, as the new last rows."""
        admitted: list[_Answer] = []
        prompts: set[tuple[int, ...]] = set()
        while self.waiting and len(self.running) < self.max_batch:
            distinct = prompts | {self.waiting[0].request.prompt}
            n_tokens = len(distinct) * max(map(len, distinct))
            if admitted and (n_tokens > MAX_PREFILL_TOKENS or (self.reads_one_by_one and len(distinct) > 1)):
                break
            prompts = distinct
            admitted.append(self.waiting.popleft())
            self.running.append(admitted[-1])
        return admitted

    def _prefill(self, answers: list[_Answer]) -> Tensor:
        """Read the prompts of the last rows and return the logits of their next tokens, [B V]."""
        first_row = len(self.running) - len(answers)
        prompts = list(dict.fromkeys(answer.request.prompt for answer in answers))
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(longest, device=self.device).expand(len(prompts), -1)
        self.cache.reserve(len(self.running), longest)
        self.cache.place(first_row, positions, lengths=[longest] * len(prompts), by_row=self.batch_invariant)
        hidden = self.model.hidden(tokens.to(self.device), positions, cache=self.cache)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        logits = self.model.project(hidden[torch.arange(len(prompts), device=self.device), ends])
        sources = [prompts.index(answer.request.prompt) for answer in answers]
        for target in reversed(range(len(answers))):  # from the back: a source row is never after its copies
            if sources[target] != target:
                prompt = answers[target].request.prompt
                self.cache.copy_row(first_row + sources[target], first_row + target, len(prompt))
        return logits[sources]

    def _decode(self) -> Tensor:
        """Read the newest token of every running answer and return the logits of the next ones, [B V]."""
        tokens = torch.tensor([answer.tokens[-1:] for answer in self.running], device=self.device)
        lengths = [answer.length for answer in self.running]
        positions = torch.tensor(lengths, device=self.device)[:, None] - 1
        self.cache.place(0, positions, lengths=lengths, by_row=self.batch_invariant)
        with computing(ROW_INVARIANT if self.batch_invariant else FAST):
            return self.model(tokens, positions, cache=self.cache)[:, -1]

    def _sample(self, logits: Tensor) -> list[Token]:
        """Choose a token for every running answer from its row of logits."""
        if not torch.isfinite(logits.amax(dim=-1)).all():
            self.cache.clear()  # NaN hidden behind a mask would still spoil the next request in this row
            raise Llama2Error(
                "the model's logits are not finite numbers: its weights are damaged, or too large for 16 bits; "
                "fetch them again, or load them with dtype float32"
            )
        allowed = logits
        if any(needs_penalties(answer.params) for answer in self.running):
            rows = [
                penalise(row, answer.params, answer.request.prompt, answer.tokens)
                for row, answer in zip(logits, self.running, strict=True)
            ]
            allowed = torch.stack(rows)
        params = [answer.params for answer in self.running]
        uniforms = [uniform(answer.seed, answer.index, len(answer.tokens)) for answer in self.running]
        if self.batch_invariant:
            each = zip(allowed.split(1), params, uniforms, strict=True)
            chosen = [choose(row, [row_params], [u])[0] for row, row_params, u in each]
        else:
            chosen = choose(allowed, params, uniforms)
        return [
            self._event(answer, token_id, row)
            for answer, token_id, row in zip(self.running, chosen, logits, strict=True)
        ]

    def _event(self, answer: _Answer, token_id: int, logits: Tensor) -> Token:
        """Record the chosen token and say whether it is the last."""
        reason: FinishReason | None = None
        if token_id in answer.params.stop_ids:
            return Token(answer.request.id, answer.index, None, finish_reason="stop")
        answer.tokens.append(token_id)
        limit = answer.params.max_new_tokens
        if len(answer.tokens) == limit or answer.length >= self.model.config.context_length:
            reason = "length"
        logprob, top = None, ()
        if answer.params.logprobs is not None:
            logprobs = logits.log_softmax(dim=-1)
            logprob = float(logprobs[token_id])
            best = logprobs.topk(min(answer.params.logprobs, logprobs.numel()))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(answer.request.id, answer.index, token_id, logprob, top, reason)

    def _leave(self, row: int) -> None:
        """Remove a running answer; the last row takes its place."""
        last = self.running.pop()
        if row < len(self.running):
            self.cache.copy_row(len(self.running), row, last.length)
            self.running[row] = last


def completion(request: Request, index: int, events: Sequence[Token]) -> Completion:
    """Put one answer's events together."""
    tokens = [event for event in events if event.id is not None]
    with_logprobs = request.params.logprobs is not None
    return Completion(
        tokens=tuple(event.id for event in tokens if event.id is not None),
        logprobs=tuple(event.logprob or 0.0 for event in tokens) if with_logprobs else None,
        top_logprobs=tuple(event.top_logprobs for event in tokens) if with_logprobs else None,
        finish_reason=events[-1].finish_reason or "abort",
        n_prompt_tokens=len(request.prompt),
        index=index,
    )
