"""Events of answers, put together when all have come."""

from collections.abc import Sequence as Many

from llama2.errors import Llama2Error
from llama2.infer.request import Completion, Request, Token


def completion(request: Request, index: int, events: Many[Token], *, first: Many[Token]) -> Completion:
    """Put one answer's events together; first: those of the request's first answer, which know about the prompt."""
    tokens = [event for event in events if event.id is not None]
    with_logprobs = request.params.logprobs is not None
    return Completion(
        tokens=tuple(event.id for event in tokens if event.id is not None),
        logprobs=tuple(event.logprob or 0.0 for event in tokens) if with_logprobs else None,
        top_logprobs=tuple(event.top_logprobs for event in tokens) if with_logprobs else None,
        finish_reason=events[-1].finish_reason or "abort",
        n_prompt_tokens=len(request.prompt),
        index=index,
        n_cached=events[0].n_cached,
        prompt_logprobs=first[0].prompt_logprobs,
    )


def best(request: Request, answers: Many[Many[Token]]) -> list[int]:
    """Return which of the written answers are kept, in order: all, or with best_of the n likeliest per token."""
    if request.params.best_of is None:
        return list(range(len(answers)))

    def mean_logprob(index: int) -> float:
        known = [event.logprob for event in answers[index] if event.logprob is not None]
        return sum(known) / max(1, len(known))

    return sorted(range(len(answers)), key=mean_logprob, reverse=True)[: request.params.n]


def unless_failed(token: Token) -> Token:
    """Return an event. Raises Llama2Error if its answer had to be given up."""
    if token.error is not None:
        raise Llama2Error(token.error)
    return token
