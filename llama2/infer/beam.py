"""Beam search: the hypotheses of one request grow together, and the likeliest go on.

Every hypothesis is a sequence of its own; those that begin alike share blocks of the cache. A step takes the best
continuations over all of them. With as many hypotheses as there are texts it is exhaustive search
(`tests/infer/test_beam.py`).
"""

from dataclasses import dataclass, replace

from torch import Tensor

from llama2.infer.blocks import BlockPool
from llama2.infer.request import FinishReason, Request, Token
from llama2.infer.sequence import Sequence


@dataclass(frozen=True)
class _Hypothesis:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    reason: FinishReason | None = None

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class Beams:
    """One request's hypotheses. Ended ones are scored by ln p / length ** length_penalty, their end counted in ln p."""

    def __init__(self, request: Request, context_length: int):
        self.request, self.params = request, request.params
        room = context_length - len(request.prompt)
        self.max_new_tokens = min(room, self.params.max_new_tokens or room)
        self.live: dict[Sequence, _Hypothesis] = {}
        self.done: list[tuple[float, _Hypothesis]] = []
        self._logprobs: dict[Sequence, Tensor] = {}

    def begin(self) -> list[Sequence]:
        first = Sequence(self.request, 0, 0, list(self.request.prompt))
        self.live = {first: _Hypothesis()}
        return [first]

    def collect(self, sequence: Sequence, logprobs: Tensor) -> None:
        """A hypothesis has been read; this is how likely each next token is, [V]."""
        self._logprobs[sequence] = logprobs

    @property
    def is_ready(self) -> bool:
        return len(self._logprobs) == len(self.live)

    def advance(self, pool: BlockPool) -> tuple[list[Sequence], list[Sequence]]:
        """Return the hypotheses so far and those that take their place, which share their blocks; none when over."""
        width, before = self.params.beam_width, list(self.live)
        candidates: list[tuple[float, Sequence, int, float]] = []
        for sequence, logprobs in self._logprobs.items():
            likeliest = logprobs.topk(min(2 * width, logprobs.numel()))
            for token_id, value in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
                candidates.append((self.live[sequence].total + value, sequence, token_id, value))
        candidates.sort(key=lambda each: -each[0])
        chosen: list[tuple[Sequence, _Hypothesis]] = []
        for rank, (total, parent, token_id, value) in enumerate(candidates):
            if len(chosen) == width or total == float("-inf"):
                break
            old = self.live[parent]
            if token_id in self.params.stop_ids and not self.params.ignore_eos:
                if rank < width:
                    self._end(replace(old, logprobs=(*old.logprobs, value), reason="stop"))
                continue
            new = _Hypothesis((*old.tokens, token_id), (*old.logprobs, value))
            if len(new.tokens) >= self.max_new_tokens:
                self._end(replace(new, reason="length"))
            else:
                chosen.append((parent, new))
        chosen = [] if chosen and self._is_over(chosen[0][1]) else chosen
        self._logprobs.clear()
        self.live = {self._fork(parent, new, pool): new for parent, new in chosen}
        return before, list(self.live)

    def _fork(self, parent: Sequence, hypothesis: _Hypothesis, pool: BlockPool) -> Sequence:
        for block in parent.blocks:
            pool.share(block)
        ids = [*self.request.prompt, *hypothesis.tokens]
        return replace(parent, ids=ids, blocks=list(parent.blocks), hashes=list(parent.hashes), prompt_logprobs=[])

    def _end(self, hypothesis: _Hypothesis) -> None:
        score = hypothesis.total / len(hypothesis.logprobs) ** self.params.length_penalty
        self.done.append((score, hypothesis))
        self.done.sort(key=lambda each: -each[0])
        del self.done[self.params.beam_width :]

    def _is_over(self, best_live: _Hypothesis) -> bool:
        """Can no hypothesis come before the worst that is kept any more?"""
        if len(self.done) < self.params.beam_width:
            return False
        longest = self.max_new_tokens if self.params.length_penalty > 0 else len(best_live.tokens)
        return best_live.total / longest**self.params.length_penalty <= self.done[-1][0]

    def events(self) -> list[Token]:
        """Return the n best as if they had been written token by token."""
        found: list[Token] = []
        for index in range(self.params.n):
            if index >= len(self.done):
                why = f"beam search found {len(self.done)} texts, and n={self.params.n} were asked for"
                found.append(Token(self.request.id, index, None, finish_reason="abort", error=why))
                continue
            each = self.done[index][1]
            pairs = zip(each.tokens, each.logprobs, strict=False)
            found += [Token(self.request.id, index, token_id, logprob) for token_id, logprob in pairs]
            if each.reason == "length":
                found[-1] = replace(found[-1], finish_reason="length")
            else:
                found.append(Token(self.request.id, index, None, finish_reason="stop"))
        return found
