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

from llama2.infer.request import Matcher, SamplingParams, TopLogprobs


def uniforms(keys: Sequence[tuple[int, int, int]]) -> list[float]:
    """Return the number in [0, 1) that belongs to each (seed, index, step): this step of this answer.

    The first of the four words of Philox4x64-10 (Salmon et al., SC 2011) for the key (seed, index) and the counter
    (step + 1, 0, 0, 0), as numpy.random.Philox gives it, for all answers at once.
    """
    if not keys:
        return []
    seeds, indices, steps = (np.array(each, np.uint64) for each in zip(*_within_64_bits(keys), strict=True))
    words = [steps + np.uint64(1), *(np.zeros_like(steps) for _ in range(3))]
    with np.errstate(over="ignore"):
        for _ in range(10):
            (high0, low0), (high1, low1) = _product(words[0], PHILOX_M[0]), _product(words[2], PHILOX_M[1])
            words = [high1 ^ words[1] ^ seeds, low1, high0 ^ words[3] ^ indices, low0]
            seeds, indices = seeds + PHILOX_W[0], indices + PHILOX_W[1]
    return ((words[0] >> np.uint64(11)).astype(np.float64) * 2.0**-53).tolist()


PHILOX_M = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], np.uint64)
PHILOX_W = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], np.uint64)


def _within_64_bits(keys: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return [(seed % 2**64, index, step) for seed, index, step in keys]


def _product(a: np.ndarray, b: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Return the high and the low 64 bits of a product."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    a1, a0, b1, b0 = a >> half, a & mask, b >> half, b & mask
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & mask)
    return a1 * b1 + (middle >> half) + (other >> half), a * b


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


N_CANDIDATES = 128
"""Likeliest tokens that are looked at first; where a filter keeps more than these, all are sorted."""


def filtered(
    logits: Float[Tensor, "B V"], params: Sequence[SamplingParams], *, n_candidates: int | None = None
) -> tuple[Float[Tensor, "B C"], Int[Tensor, "B C"]]:
    """Return each row's distribution after temperature and filters, and the ids it belongs to.

    Likeliest first, ties by id; dropped tokens have probability 0; rows sum to 1. Temperature must be above 0.
    top-p is Meta's: a token is dropped when those before it already exceed top_p (facebookresearch/llama).
    n_candidates: only so many of the likeliest are sorted, if all that the filters keep are certainly among them.
    """

    def column(values: Sequence[float | int]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=logits.dtype)[:, None]

    # The largest logit is subtracted first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / column([each.temperature for each in params])
    whole = scaled.logsumexp(dim=-1, keepdim=True)
    top_k, top_p = column([each.top_k or logits.shape[-1] for each in params]), column([each.top_p for each in params])
    min_p = column([each.min_p for each in params])
    if n_candidates is None or n_candidates >= logits.shape[-1]:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
        p = (values - whole).exp()
    else:
        values, ids = _likeliest(scaled, n_candidates)
        p = (values - whole).exp()
        is_enough = (top_k <= n_candidates) | (_running(p)[:, -1:] > top_p) | (min_p * p[:, :1] > p[:, -1:])
        if not bool(is_enough.all()):
            return filtered(logits, params)
    p = p * (torch.arange(p.shape[-1], device=logits.device) < top_k)
    p = torch.where(top_k < logits.shape[-1], p / _running(p)[:, -1:], p)
    p = p * (_running(p) - p <= top_p)
    p = p * (p >= min_p * p[:, :1])
    p = p / _running(p)[:, -1:]
    if any(each.typical_p < 1 for each in params):
        p = _typical(p, column([each.typical_p for each in params]))
    return p, ids


def _likeliest(values: Float[Tensor, "B V"], n: int) -> tuple[Float[Tensor, "B C"], Int[Tensor, "B C"]]:
    """Return the n largest of each row, ties by id."""
    values, ids = values.topk(n, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, again = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, again)


def _running(p: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Return sums up to each place: they add in order, where `sum` adds a single row in another order than many."""
    return p.cumsum(dim=-1)


def _typical(p: Float[Tensor, "B C"], share: Float[Tensor, "B 1"]) -> Float[Tensor, "B C"]:
    """Keep the tokens whose surprise -ln p is nearest to the entropy, up to this probability (arXiv:2202.00666)."""
    surprise = -p.clamp(min=1e-38).log()
    entropy = (p * surprise).sum(dim=-1, keepdim=True)
    order = (surprise - entropy).abs().masked_fill(p == 0, float("inf")).argsort(dim=-1, stable=True)
    sorted_p = p.gather(-1, order)
    is_kept = (_running(sorted_p) - sorted_p < share) | (share >= 1)
    p = p * torch.zeros_like(p).scatter(-1, order, is_kept.to(p.dtype))
    return p / _running(p)[:, -1:]


def choose(logits: Float[Tensor, "B V"], params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Return the next token id of each row; logits already penalised. A row's choice does not depend on the others."""
    chosen = logits.argmax(dim=-1).tolist()
    whole = [row for row, each in enumerate(params) if each.temperature > 0 and not _has_filter(each)]
    some = [row for row, each in enumerate(params) if each.temperature > 0 and _has_filter(each)]
    for rows in filter(None, (whole, some)):
        picked = logits if len(rows) == len(params) else logits[rows]
        own = [params[row] for row in rows]
        u = torch.tensor([draws[row] for row in rows], device=logits.device, dtype=logits.dtype)[:, None]
        if rows is whole:  # nothing is dropped: no order is needed
            heat = torch.tensor([each.temperature for each in own], device=logits.device, dtype=logits.dtype)[:, None]
            p, ids = ((picked - picked.amax(dim=-1, keepdim=True)) / heat).softmax(dim=-1), None
        else:
            p, ids = filtered(picked, own, n_candidates=N_CANDIDATES)
        at = _drawn(p, u)
        token_ids = at if ids is None else ids.gather(1, at)
        for row, token_id in zip(rows, token_ids[:, 0].tolist(), strict=True):
            chosen[row] = token_id
    return chosen


def _drawn(p: Float[Tensor, "B C"], u: Float[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
    """Return where the cumulative distribution reaches u."""
    cumulative = _running(p)
    at = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    last = ((p > 0) * torch.arange(p.shape[-1], device=p.device)).amax(dim=-1, keepdim=True)
    return torch.minimum(at, last)  # rounding must not reach a dropped token


def _has_filter(params: SamplingParams) -> bool:
    return bool(params.top_k) or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1


def logprobs_of(
    logits: Float[Tensor, "B V"], params: Sequence[SamplingParams], token_ids: Sequence[int | Exception]
) -> list[tuple[float | None, TopLogprobs]]:
    """Return the log-probability of each row's chosen token, and the likeliest others, where they are asked for."""
    is_asked = [
        (each.logprobs is not None or each.best_of is not None) and isinstance(token_id, int)
        for each, token_id in zip(params, token_ids, strict=True)
    ]
    if not any(is_asked):
        return [(None, ())] * len(params)
    table = logits.log_softmax(dim=-1)
    ids = [token_id if isinstance(token_id, int) else 0 for token_id in token_ids]
    values = table.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    found: list[tuple[float | None, TopLogprobs]] = []
    for row, each, token_id, value, asked in zip(table, params, ids, values, is_asked, strict=True):
        if asked and each.logprobs:
            found.append(logprob_of(row, token_id, each.logprobs))
        else:
            found.append((value if asked else None, ()))
    return found


def logprob_of(logprobs: Float[Tensor, " V"], token_id: int, n_top: int) -> tuple[float, TopLogprobs]:
    """Return the log-probability of a token, and the likeliest alternatives."""
    top = logprobs.topk(min(n_top, logprobs.numel()))
    return float(logprobs[token_id]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
