"""Speculative decoding: guess several tokens, check them all in one step, keep those that are right.

A guess is right if it is the very token that would have been chosen without it: the draw at each place uses the number
that belongs to that place (`sampling.uniforms`), whoever guesses. So speculation never changes a text, greedy or
sampled, which is stronger than the usual promise that it does not change the distribution (arXiv:2211.17192: accept
with min(1, p/q), else draw from the rest). A draft model draws with the same numbers; where its distribution q equals
p, every guess is right, and its guesses come true about as often as sum(min(p, q)) says (docs/answering.md).

Where it does not pay it is turned off by itself: the time of a token is measured with and without.
"""

import time
from collections.abc import Callable, Iterator, Sequence as Many
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch

from llama2.errors import RequestError
from llama2.infer.blocks import BLOCK, BlockPool
from llama2.infer.runner import Runner
from llama2.infer.sampling import choose, uniforms
from llama2.infer.sequence import Sequence, Span
from llama2.model.transformer import Transformer

TRIAL = 4
"""Steps with, then steps without, until it is known what pays."""
PERIOD = 64
"""After so many steps what is off gets another trial."""


class Drafter(Protocol):
    """Guesses how sequences go on."""

    def propose(self, sequence: Sequence) -> list[int]:
        """Return some tokens that may follow, or none."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It is over."""
        ...


class PromptLookup:
    """What followed the last few tokens when they stood earlier in the text: good where answers quote."""

    def __init__(self, n_draft: int = 6, max_ngram: int = 4, min_ngram: int = 2):
        self.n_draft, self.max_ngram, self.min_ngram = n_draft, max_ngram, min_ngram

    def propose(self, sequence: Sequence) -> list[int]:
        ids = sequence.ids
        for n in range(min(self.max_ngram, len(ids) - 1), self.min_ngram - 1, -1):
            tail = ids[-n:]
            for at in range(len(ids) - n - 1, -1, -1):
                if ids[at] == tail[0] and ids[at : at + n] == tail:
                    return ids[at + n : at + n + self.n_draft]
        return []

    def forget(self, sequence: Sequence) -> None:
        pass


class DraftModel:
    """A smaller model with the same vocabulary, with a cache of its own."""

    def __init__(self, model: Transformer, *, n_draft: int = 4):
        self.n_draft, self.model = n_draft, model
        self.runner, self.pool = Runner(model, is_invariant=False), BlockPool()
        self.known: dict[Sequence, Sequence] = {}

    def propose(self, sequence: Sequence) -> list[int]:
        n_true = len(sequence.ids)
        if n_true + self.n_draft >= self.model.config.context_length:
            return []
        mine = self.known.get(sequence)
        if mine is None:
            request = replace(sequence.request, adapter=None)  # the model's, which the draft model does not have
            mine = self.known[sequence] = Sequence(request, sequence.index, sequence.seed, [])
        # What was drafted and turned out wrong has to be read anew from there.
        same = min(mine.n_computed, n_true - 1)
        while same and mine.ids[same - 1] != sequence.ids[same - 1]:
            same -= 1
        mine.n_computed, mine.ids = same, list(sequence.ids)
        for number in range(self.n_draft):
            logits = self._read(mine)
            draws = uniforms([(sequence.seed, sequence.index, sequence.n_answer + number)])
            mine.ids += choose(logits, [sequence.params], draws)
        return mine.ids[n_true:]

    def _read(self, mine: Sequence) -> torch.Tensor:
        while len(mine.blocks) * BLOCK < len(mine.ids):
            if not self.pool.n_free:
                self.pool.grow(max(16, self.pool.n_blocks))
                self.runner.cache.grow(self.pool.n_blocks)
            mine.blocks.append(self.pool.take(mine.blocks[-1] if mine.blocks else None))
        span = Span(mine, mine.n_computed, mine.ids[mine.n_computed :])
        hidden = self.runner.hidden([span])
        mine.n_computed = len(mine.ids)
        return self.runner.project(hidden, [len(span.tokens) - 1])

    def forget(self, sequence: Sequence) -> None:
        if mine := self.known.pop(sequence, None):
            mine.release(self.pool)


class Speculation:
    """Decides step by step whether to guess, and counts."""

    def __init__(self, drafter: Drafter | None):
        self.drafter = drafter
        self.n_drafted = self.n_accepted = 0
        self.seconds: dict[bool, float | None] = {True: None, False: None}
        """Per token, with and without guesses: an average over the last steps that read no prompts."""
        self._n_steps = 0
        self._is_on = True
        self._n_tokens = 0

    @property
    def is_on(self) -> bool:
        return self.drafter is not None and self._is_on

    @contextmanager
    def timed(self) -> Iterator[Callable[[Sequence], list[int]]]:
        """Around a step: gives it what guesses, and measures it."""
        self._is_on, self._n_tokens = self._decide(), 0
        start = time.perf_counter()
        yield self._draft
        if self.drafter is not None and self._n_tokens:
            per_token = (time.perf_counter() - start) / self._n_tokens
            old = self.seconds[self._is_on]
            self.seconds[self._is_on] = per_token if old is None else 0.8 * old + 0.2 * per_token
            self._n_steps += 1

    def _decide(self) -> bool:
        step = self._n_steps % PERIOD
        if step < 2 * TRIAL:
            return step < TRIAL
        with_guesses, without = self.seconds[True], self.seconds[False]
        return with_guesses is None or without is None or with_guesses <= without

    def _draft(self, sequence: Sequence) -> list[int]:
        if not self.is_on or self.drafter is None or sequence.params.beam_width:
            return []
        room = len(sequence.request.prompt) + (sequence.params.max_new_tokens or 1 << 60) - len(sequence.ids) - 1
        return self.drafter.propose(sequence)[: max(0, room)]

    def count(self, spans: Many[Span], n_tokens: int) -> None:
        """A step has read these and chosen so many tokens."""
        self.n_drafted += sum(span.n_drafted for span in spans)
        # Steps that read prompts say nothing about the time of a token.
        self._n_tokens = 0 if any(span.end <= span.sequence.n_prompt for span in spans) else n_tokens

    def forget(self, sequence: Sequence) -> None:
        if self.drafter is not None:
            self.drafter.forget(sequence)


def check_draft(model: Transformer, draft: Transformer) -> None:
    """Raise RequestError if a model cannot guess for another."""
    if model.config.vocab_size != draft.config.vocab_size:
        raise RequestError(
            f"the draft model has a vocabulary of {draft.config.vocab_size} tokens and the model one of "
            f"{model.config.vocab_size}; they must be the same"
        )
