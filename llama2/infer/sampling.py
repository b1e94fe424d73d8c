"""From logits to the next token.

Order: logit bias, penalties, DRY, tokens that may not come, temperature, top-k, top-p, min-p, typical-p, draw. The
draw inverts the cumulative distribution at one uniform number from a counter-based stream (Philox) keyed by the
request's seed, the answer's index and the step: the same numbers alone or in a crowd, whatever was drawn before.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama2.infer.request import Matcher, SamplingParams


def uniform(seed: int, index: int, step: int) -> float:
    """Return the number in [0, 1) that belongs to this step of this answer."""
    key, counter = np.array([seed % 2**64, index], np.uint64), np.array([step, 0, 0, 0], np.uint64)
    return (int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11) * 2.0**-53


def penalise(
    logits: Float[Tensor, " V"],
    params: SamplingParams,
    prompt: Sequence[int],
    answer: Sequence[int],
    matcher: Matcher | None = None,
) -> Float[Tensor, " V"]:
    """Return logits with bias, penalties and bans applied; the input is not changed."""
    logits = logits.clone()
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *answer}), device=logits.device)
        chosen = logits[seen]
        logits[seen] = torch.where(chosen > 0, chosen / params.repetition_penalty, chosen * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and answer:
        counts = Counter(answer)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    if params.dry_multiplier:
        for token_id, length in repetitions([*prompt, *answer], {*params.dry_breaker_ids}).items():
            if length >= params.dry_allowed_length:
                excess = min(length - params.dry_allowed_length, 100)  # so that base ** excess stays finite
                logits[token_id] -= params.dry_multiplier * params.dry_base**excess
    if matcher is not None:
        logits.masked_fill_(~matcher.allowed().to(logits.device), float("-inf"))
    if len(answer) < params.min_tokens and params.stop_ids:
        without = logits.index_fill(0, torch.tensor(params.stop_ids, device=logits.device), float("-inf"))
        if matcher is None or bool((without > float("-inf")).any()):  # a grammar's end is stronger than min_tokens
            logits = without
    return logits


def repetitions(ids: Sequence[int], breakers: set[int]) -> dict[int, int]:
    """Return, for each token that came after an earlier copy of the end of `ids`, how long the copy was (DRY).

    After "a b c d a b c" the next "d" would lengthen a repetition of three tokens: {d: 3, ...}.
    Source: oobabooga/text-generation-webui pull request 5677.
    """
    longest: dict[int, int] = {}
    if not ids or ids[-1] in breakers:
        return longest
    for at in range(len(ids) - 2, -1, -1):
        if ids[at] != ids[-1]:
            continue
        n = 1
        while n <= at and n < 64 and ids[at - n] == ids[-1 - n] and ids[at - n] not in breakers:
            n += 1
        following = ids[at + 1]
        if following not in breakers:
            longest[following] = max(n, longest.get(following, 0))
    return longest


def needs_penalties(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.dry_multiplier
        or params.min_tokens
        or params.grammar
    )


def filtered(
    logits: Float[Tensor, "B V"], params: Sequence[SamplingParams]
) -> tuple[Float[Tensor, "B V"], Int[Tensor, "B V"]]:
    """Return each row's distribution after temperature and filters, and the ids it belongs to.

    Likeliest first, ties by id; dropped tokens have probability 0; rows sum to 1. Temperature must be above 0.
    top-p is Meta's: a token is dropped when those before it already exceed top_p (facebookresearch/llama).
    """

    def column(values: Sequence[float | int]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=logits.dtype)[:, None]

    n_vocab = logits.shape[-1]
    logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # The largest logit is subtracted first, so that a tiny temperature cannot overflow.
    p = ((logits - logits[:, :1]) / column([each.temperature for each in params])).softmax(dim=-1)
    rank = torch.arange(n_vocab, device=logits.device)
    p = p * (rank < column([each.top_k or n_vocab for each in params]))
    p = p / p.sum(dim=-1, keepdim=True)
    p = p * (p.cumsum(dim=-1) - p <= column([each.top_p for each in params]))
    p = p * (p >= column([each.min_p for each in params]) * p[:, :1])
    p = p / p.sum(dim=-1, keepdim=True)
    if any(each.typical_p < 1 for each in params):
        p = _typical(p, column([each.typical_p for each in params]))
    return p, ids


def _typical(p: Float[Tensor, "B V"], share: Float[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
    """Keep the tokens whose surprise -ln p is nearest to the entropy, up to this probability (arXiv:2202.00666)."""
    surprise = -p.clamp(min=1e-38).log()
    entropy = (p * surprise).sum(dim=-1, keepdim=True)
    order = (surprise - entropy).abs().masked_fill(p == 0, float("inf")).argsort(dim=-1, stable=True)
    sorted_p = p.gather(-1, order)
    is_kept = (sorted_p.cumsum(dim=-1) - sorted_p < share) | (share >= 1)
    p = p * torch.zeros_like(p).scatter(-1, order, is_kept.to(p.dtype))
    return p / p.sum(dim=-1, keepdim=True)


def choose(logits: Float[Tensor, "B V"], params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Return the next token id of each row; logits already penalised."""
    chosen = logits.argmax(dim=-1).tolist()
    rows = [row for row, each in enumerate(params) if each.temperature > 0]
    if rows:
        picked = logits if len(rows) == len(params) else logits[rows]
        p, ids = filtered(picked, [params[row] for row in rows])
        u = torch.tensor([uniforms[row] for row in rows], device=p.device, dtype=p.dtype)[:, None]
        cumulative = p.cumsum(dim=-1)
        at = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
        last = ((p > 0) * torch.arange(p.shape[-1], device=p.device)).amax(dim=-1, keepdim=True)
        at = torch.minimum(at, last)  # rounding must not reach a dropped token
        for row, token_id in zip(rows, ids.gather(1, at)[:, 0].tolist(), strict=True):
            chosen[row] = token_id
    return chosen
