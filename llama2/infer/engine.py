"""The engine: many requests, one model. Ids go in, ids come out; it never sees text.

    add -> waiting -> step: schedule -> run -> sample -> ... -> finished | abort

Each `step` reads what the scheduler planned, the newest token of every answer under way and chunks of new prompts, in
one forward pass, and chooses the next token of every answer that is read to its end.
"""

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence as Many
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from llama2.errors import Llama2Error, QueueFull, RequestError
from llama2.infer.beam import Beams
from llama2.infer.blocks import BLOCK, BlockPool
from llama2.infer.completion import best, completion, unless_failed
from llama2.infer.request import Completion, FinishReason, Request, Token, TopLogprobs
from llama2.infer.runner import Runner
from llama2.infer.sampling import choose, logprob_of, logprobs_of, needs_penalties, penalise, uniforms
from llama2.infer.scheduler import Scheduler
from llama2.infer.sequence import Sequence, Span
from llama2.infer.speculative import Drafter, Speculation
from llama2.model.lora import adapter_config
from llama2.model.transformer import Transformer

NOT_FINITE = (
    "the model's logits are not finite numbers: its weights are damaged, or too large for 16 bits; "
    "fetch them again, or load them with dtype float32"
)


@dataclass(frozen=True)
class Stats:
    """What the engine is doing, and what it has done since it began."""

    n_waiting: int
    n_running: int
    n_blocks: int
    """Blocks of 16 positions that exist; more are made up to the limit."""
    n_blocks_held: int
    n_steps: int
    n_prompt_tokens: int
    n_cached_tokens: int
    """Prompt tokens that were found in the cache and not read again."""
    n_new_tokens: int
    n_preempted: int
    n_aborted: int
    n_drafted: int
    n_accepted: int
    """Drafted tokens that were right."""


class Engine:
    """Continues token sequences. Not thread-safe: one owner calls add, step and abort."""

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch: int = 32,
        batch_invariant: bool | None = None,
        max_step_tokens: int = 2048,
        cache_tokens: int | None = None,
        max_waiting: int | None = None,
        prefix_cache: bool = True,
        drafter: Drafter | None = None,
    ):
        """batch_invariant: an answer's bits do not depend on who else is answered; None means for float32 and up.

        It costs speed where few answers run at once. Without it a text may change with its company, with what the
        cache holds and with how prompts are cut into chunks, because matrix products of different shapes differ in
        their last bits.

        max_step_tokens: at most this many are read in a step; longer prompts are read in chunks. cache_tokens: room
        for keys and values, in tokens over all sequences; None: for max_batch full contexts, in half of the free
        memory at most. max_waiting: more requests than that are refused. prefix_cache: prompts that begin alike are
        read once. drafter: proposes tokens that are checked several at a time (`speculative.py`).
        """
        config = model.config
        if model.rotation.is_dynamic:
            # Keys are turned by the length that was known when they were written: a prompt is read in one piece.
            max_step_tokens, prefix_cache, drafter = max_batch * config.context_length, False, None
        self.model, self.max_waiting, self.prefix_cache = model, max_waiting, prefix_cache
        weight = model.tok_embeddings.weight
        self.batch_invariant = weight.dtype.itemsize >= 4 if batch_invariant is None else batch_invariant
        self.runner = Runner(model, is_invariant=self.batch_invariant)
        if batch_invariant and not self.runner.is_invariant:
            raise RequestError("batch_invariant=True needs a model on one device, and this one is split over several")
        self.batch_invariant = self.runner.is_invariant
        self.pool = BlockPool()
        fits = free_memory(weight.device) // 2 // self.runner.cache.bytes_per_block
        wanted = max_batch * (config.context_length // BLOCK + 1) if cache_tokens is None else cache_tokens // BLOCK
        self.scheduler = Scheduler(
            self.pool,
            max_batch=max_batch,
            max_step_tokens=max(max_step_tokens, max_batch),
            max_blocks=wanted
            if cache_tokens is not None
            else max(min(wanted, fits), config.context_length // BLOCK + 2),
            on_grow=self.runner.cache.grow,
            on_copy=self.runner.cache.copy_block,
        )
        self.speculation = Speculation(drafter)
        self.beams: dict[str, Beams] = {}
        self.n_steps = self.n_prompt_tokens = self.n_cached_tokens = self.n_new_tokens = self.n_aborted = 0
        self._fingerprint = self.runner.fingerprint()

    @property
    def stats(self) -> Stats:
        scheduler, speculation = self.scheduler, self.speculation
        return Stats(
            n_waiting=len(scheduler.waiting),
            n_running=len(scheduler.running),
            n_blocks=self.pool.n_blocks,
            n_blocks_held=self.pool.n_held,
            n_steps=self.n_steps,
            n_prompt_tokens=self.n_prompt_tokens,
            n_cached_tokens=self.n_cached_tokens,
            n_new_tokens=self.n_new_tokens,
            n_preempted=scheduler.n_preempted,
            n_aborted=self.n_aborted,
            n_drafted=speculation.n_drafted,
            n_accepted=speculation.n_accepted,
        )

    @property
    def is_idle(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never be answered, QueueFull if too many wait."""
        self._check(request)
        if self.is_idle and (now := self.runner.fingerprint()) != self._fingerprint:
            self.pool.forget()
            self._fingerprint = now
        if request.params.beam_width:
            self.beams[request.id] = beams = Beams(request, self.model.config.context_length)
            sequences = beams.begin()
        else:
            seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
            sequences = [
                Sequence(request, index, seed, list(request.prompt), matcher=self._matcher(request))
                for index in range(request.params.n_written)
            ]
        for sequence in sequences:
            self.scheduler.add(sequence)

    def _matcher(self, request: Request):
        return None if request.params.grammar is None else request.params.grammar.matcher()

    def _check(self, request: Request) -> None:
        config, params, n_prompt = self.model.config, request.params, len(request.prompt)
        if not request.prompt:
            raise RequestError("the prompt has no tokens; begin it with the beginning-of-sequence token")
        if not all(0 <= token_id < config.vocab_size for token_id in request.prompt):
            bad = next(token_id for token_id in request.prompt if not 0 <= token_id < config.vocab_size)
            raise RequestError(f"the prompt holds token {bad}; the model knows 0 to {config.vocab_size - 1}")
        if n_prompt >= config.context_length:
            raise RequestError(
                f"the prompt has {n_prompt} tokens and the model's context holds {config.context_length}, "
                "which leaves no room for an answer; shorten the prompt"
            )
        room = self.scheduler.max_blocks * BLOCK
        longest = min(config.context_length, n_prompt + (params.max_new_tokens or config.context_length))
        if longest > room:
            raise RequestError(
                f"a prompt of {n_prompt} tokens and its answer may need {longest} tokens of cache, and "
                f"there is room for {room}; ask for fewer new tokens, or give the engine a larger cache"
            )
        for name in ("logit_bias", "stop_ids"):
            outside = [token_id for token_id in getattr(params, name) if not 0 <= token_id < config.vocab_size]
            if outside:
                raise RequestError(f"{name} names token {outside[0]}; the model knows 0 to {config.vocab_size - 1}")
        if request.adapter is not None:
            adapter_config(self.model, request.adapter)
        if self.max_waiting is not None and len(self.scheduler.waiting) + params.n_written > self.max_waiting:
            raise QueueFull(
                f"{len(self.scheduler.waiting)} answers wait already, at most {self.max_waiting} may; try again later"
            )

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its answers; unknown ones are ignored."""
        self.beams.pop(request_id, None)
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.request.id == request_id and index in (None, sequence.index):
                self._leave(sequence)
                self.n_aborted += 1

    @torch.no_grad()
    def step(self) -> list[Token]:
        """Advance every answer that is planned; return what happened, in no particular order of requests."""
        with self.speculation.timed() as draft:
            spans = self.scheduler.plan(draft)
            if not spans:
                return []
            self.n_steps += 1
            logits, spoilt = self._logits(spans, self.runner.hidden(spans))
            if not spoilt:
                return self._sample(spans, logits)
            events = [event for sequence in spoilt for event in self._give_up(sequence, Llama2Error(NOT_FINITE))]
            events += self._sample([span for span in spans if span.sequence in self.scheduler.running], logits)
            self._read_anew()
            return events

    def generate(self, requests: Many[Request]) -> list[list[Completion]]:
        """Answer all requests and return, for each, its n completions. Raises Llama2Error if one is given up."""
        collected: dict[tuple[str, int], list[Token]] = {}
        for token in self.stream(requests):
            collected.setdefault((token.request_id, token.index), []).append(unless_failed(token))
        return [
            [
                completion(request, index, collected[request.id, which], first=collected[request.id, 0])
                for index, which in enumerate(
                    best(request, [collected[request.id, i] for i in range(request.params.n_written)])
                )
            ]
            for request in requests
        ]

    def stream(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Answer all requests, yielding each token when it is known. Leaving early aborts the rest."""
        requests = list(requests)
        assert len({request.id for request in requests}) == len(requests), "request ids must differ"
        try:
            for request in requests:
                self.add(request)
            while not self.is_idle:
                yield from self.step()
        finally:
            for request in requests:
                self.abort(request.id)

    def _logits(self, spans: Many[Span], hidden: Tensor) -> tuple[dict[Sequence, Tensor], list[Sequence]]:
        """Return the logits that the next tokens of each sequence read to its end are chosen from, [1 + drafted, V].

        And the sequences whose logits are not finite.
        """
        rows: list[int] = []
        counts: list[tuple[Sequence, int]] = []
        at = 0
        for span in spans:
            self._score_prompt(span, hidden[at : at + len(span.tokens)])
            at += len(span.tokens)
            if span.is_last:
                rows += range(at - 1 - span.n_drafted, at)
                counts.append((span.sequence, 1 + span.n_drafted))
        if not rows:
            return {}, []
        logits = self.runner.project(hidden, rows)
        parts = logits.split([n for _, n in counts])
        found = {sequence: part for (sequence, _), part in zip(counts, parts, strict=True)}
        if torch.isfinite(logits.amax(dim=-1)).all():
            return found, []
        return found, [sequence for sequence, part in found.items() if not torch.isfinite(part.amax(dim=-1)).all()]

    def _read_anew(self) -> None:
        """Forget all keys and values: NaN hidden behind a mask would still spoil the next sequence in its blocks."""
        for sequence in list(self.scheduler.running):
            self.scheduler.preempt(sequence)
        self.pool.forget()
        self.runner.cache.clear()

    def _score_prompt(self, span: Span, hidden: Tensor) -> None:
        """Find the log-probabilities of the prompt tokens that follow those of a span, if they are asked for."""
        sequence, wanted = span.sequence, span.sequence.params.prompt_logprobs
        end = min(span.end, sequence.n_prompt - 1)
        if (
            wanted is None
            or sequence.index
            or end <= span.start + (missing := len(sequence.prompt_logprobs) - span.start)
        ):
            return
        for start in range(span.start + missing, end, 256):  # the logits of a long prompt never exist whole
            positions = range(start, min(start + 256, end))
            logits = self.runner.project(hidden, [position - span.start for position in positions])
            found = zip(logits.log_softmax(dim=-1), positions, strict=True)
            sequence.prompt_logprobs += [logprob_of(row, sequence.ids[at + 1], wanted) for row, at in found]

    def _sample(self, spans: Many[Span], logits: dict[Sequence, Tensor]) -> list[Token]:
        """Choose the next token of every sequence that was read to its end, and of a draft as many as are right."""
        events: list[Token] = []
        finished: set[Sequence] = set()
        failed: dict[Sequence, Exception] = {}
        for span in spans:
            span.sequence.n_computed = min(span.end, len(span.sequence.ids))
        live = [span for span in spans if span.is_last and not span.sequence.params.beam_width]
        drafted = {span.sequence: list(islice(span.tokens, len(span.tokens) - span.n_drafted, None)) for span in live}
        for number in range(1 + max((span.n_drafted for span in live), default=0)):
            if not live:
                break
            rows = torch.stack([logits[span.sequence][number] for span in live])
            still_live, token_ids = [], self._choose(live, rows)
            known = logprobs_of(rows, [span.sequence.params for span in live], token_ids)
            for span, token_id, logprobs in zip(live, token_ids, known, strict=True):
                sequence, draft = span.sequence, drafted[span.sequence]
                if isinstance(token_id, Exception):
                    failed[sequence] = token_id
                    continue
                event = self._event(sequence, token_id, *logprobs)
                events.append(event)
                if event.finish_reason:
                    finished.add(sequence)
                elif number < len(draft) and draft[number] == token_id:
                    still_live.append(span)
                    self.speculation.n_accepted += 1
            live = still_live
        self.speculation.count(spans, len(events))
        self.n_new_tokens += sum(event.id is not None for event in events)
        for span in spans:
            sequence = span.sequence
            if not sequence.params.beam_width and span.is_last:
                sequence.n_computed = len(sequence.ids) - 1
            if self.prefix_cache:
                sequence.remember(self.pool)
            if sequence in finished:
                self._leave(sequence)
            elif sequence in failed:
                events += self._give_up(sequence, failed[sequence])
        return events + self._advance_beams(spans, logits)

    def _choose(self, spans: Many[Span], logits: Tensor) -> list[int | Exception]:
        """Choose a token for each of some sequences from its row of logits, [B V], or say why there is none."""
        sequences = [span.sequence for span in spans]
        rows = [_penalised(row, each) for row, each in zip(logits, sequences, strict=True)]
        found: list[int | Exception] = [row if isinstance(row, Exception) else -1 for row in rows]
        able = [at for at, row in enumerate(rows) if isinstance(row, Tensor)]
        if not able:
            return found
        is_plain = not any(needs_penalties(each.params) for each in sequences)
        allowed = logits if is_plain else torch.stack([row for row in rows if isinstance(row, Tensor)])
        chosen = [sequences[at] for at in able]
        draws = uniforms([(each.seed, each.index, each.n_answer) for each in chosen])
        token_ids = choose(allowed, [each.params for each in chosen], draws)
        for at, sequence, token_id in zip(able, chosen, token_ids, strict=True):
            found[at] = _advance(sequence, token_id) or token_id
        return found

    def _event(self, sequence: Sequence, token_id: int, logprob: float | None, top: TopLogprobs) -> Token:
        """Record the chosen token and say whether it is the last."""
        params, reason = sequence.params, None
        is_first = not sequence.n_answer
        extra = {}
        if is_first:
            self.n_prompt_tokens += sequence.n_prompt
            self.n_cached_tokens += sequence.n_cached
            extra["n_cached"] = sequence.n_cached
            if params.prompt_logprobs is not None and sequence.index == 0:
                extra["prompt_logprobs"] = tuple(sequence.prompt_logprobs)
        if _is_end(sequence, token_id):
            return Token(sequence.request.id, sequence.index, None, finish_reason="stop", **extra)
        sequence.ids.append(token_id)
        if sequence.n_answer == params.max_new_tokens or len(sequence.ids) >= self.model.config.context_length:
            reason: FinishReason | None = "length"
        return Token(sequence.request.id, sequence.index, token_id, logprob, top, reason, **extra)

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.speculation.forget(sequence)

    def _give_up(self, sequence: Sequence, error: Exception) -> list[Token]:
        """End an answer that cannot go on, or a whole beam search; nobody else is disturbed."""
        request, is_beams = sequence.request, bool(sequence.params.beam_width)
        if is_beams and request.id not in self.beams:
            return []  # another of its hypotheses has ended it just now
        self.abort(request.id, None if is_beams else sequence.index)
        # Of other errors than ours the words may be a user's.
        why = str(error) if isinstance(error, Llama2Error) else f"the grammar failed: {type(error).__name__}"
        indices = range(request.params.n) if is_beams else [sequence.index]
        is_asked_for = isinstance(error, RequestError)
        return [
            Token(request.id, index, None, finish_reason="abort", error=why, is_asked_for=is_asked_for)
            for index in indices
        ]

    def _advance_beams(self, spans: Many[Span], logits: dict[Sequence, Tensor]) -> list[Token]:
        """Let every beam search whose hypotheses have all been read go on, or end."""
        events: list[Token] = []
        for span in spans:
            if not span.is_last or (beams := self.beams.get(span.sequence.request.id)) is None:
                continue
            row = _penalised(logits[span.sequence][0], span.sequence)
            if isinstance(row, Exception):
                events += self._give_up(span.sequence, row)
            else:
                beams.collect(span.sequence, row.log_softmax(dim=-1))
        for request_id, beams in list(self.beams.items()):
            if not beams.is_ready:
                continue
            before, after = beams.advance(self.pool)
            self.scheduler.replace(before, after)
            if not after:
                found = beams.events()
                self.n_prompt_tokens += len(beams.request.prompt)
                self.n_new_tokens += sum(event.id is not None for event in found)
                events += found
                del self.beams[request_id]
        return events


def _penalised(logits: Tensor, sequence: Sequence) -> Tensor | Exception:
    """Return logits with bias, penalties and bans applied, or why no token is left; a grammar may fail in any way."""
    if not needs_penalties(sequence.params):
        return logits
    try:
        found = penalise(logits, sequence.params, sequence.request.prompt, sequence.answer, sequence.matcher)
    except Exception as error:
        return error
    params = sequence.params
    if (params.grammar or params.min_tokens or params.logit_bias) and found.amax() == float("-inf"):
        return RequestError("no token is left that may come next; see logit_bias, min_tokens and what was asked for")
    return found


def _advance(sequence: Sequence, token_id: int) -> Exception | None:
    """Tell a sequence's matcher which token comes next; return what went wrong."""
    if sequence.matcher is None or _is_end(sequence, token_id):
        return None
    try:
        sequence.matcher.advance(token_id)
    except Exception as error:
        return error
    return None


def _is_end(sequence: Sequence, token_id: int) -> bool:
    return token_id in sequence.params.stop_ids and not sequence.params.ignore_eos


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not everywhere
        return 4 << 30
