"""From logits to the next token.

Order: logit bias, penalties, temperature, top-k, top-p, min-p, draw. The draw inverts the cumulative
distribution at one uniform number from a counter-based stream (Philox) keyed by the request's seed, the
answer's index and the step: the same numbers alone or in a crowd, whatever was drawn before.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama2.infer.request import SamplingParams


def uniform(seed: int, index: int, step: int) -> float:
    """Return the number in [0, 1) that belongs to this step of this answer."""
    key, counter = np.array([seed % 2**64, index], np.uint64), np.array([step, 0, 0, 0], np.uint64)
    return (int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11) * 2.0**-53


def penalise(
    logits: Float[Tensor, " V"], params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> Float[Tensor, " V"]:
    """Return logits with bias and penalties applied; the input is not changed."""
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
    return logits


def needs_penalties(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias or params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    )


def filtered(
    logits: Float[Tensor, "B V"], params: Sequence[SamplingParams]
) -> tuple[Float[Tensor, "B V"], Int[Tensor, "B V"]]:
    """Return each row's distribution after temperature, top-k, top-p and min-p, and the ids it belongs to.

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
    return p / p.sum(dim=-1, keepdim=True), ids


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
        n_kept = (p > 0).sum(dim=-1, keepdim=True)  # rounding must not reach a dropped token
        for row, token_id in zip(rows, ids.gather(1, at.clamp(max=n_kept - 1))[:, 0].tolist(), strict=True):
            chosen[row] = token_id
    return chosen
