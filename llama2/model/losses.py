"""Losses of a language model: pure functions of the model and a batch.

A loss returns (sum, count, metrics): the sum over what was trained, how many that were, and named sums for the
log. The trainer adds both up over micro-batches and ranks and divides once, so no split of a batch changes it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama2.model import fused
from llama2.model.transformer import Transformer

IGNORE = -100
"""The target of a position that is not trained, as everywhere in PyTorch."""

CHUNK_BYTES = 64 << 20
"""Logits that exist at a time, in float32; 512 rows of 32,000."""
CHUNK_ROWS = 512
"""More rows than that gain nothing, and of a small vocabulary fewer stay in a CPU's cache: half the time at 2,048."""

Losses = tuple[Float[Tensor, ""], int, dict[str, float]]


def next_token_loss(model: Transformer, batch) -> Losses:
    """Return the cross-entropy of the targets, summed; targets of -100 are not trained.

    The projection on the vocabulary and the softmax are computed a chunk of positions at a time, forward and
    backward together, so the logits [B T V] never exist whole. batch: a `data.batch.Batch`.
    """
    hidden = hidden_states(model, batch)
    weight = model.tok_embeddings.weight if model.output is None else model.output.weight
    loss = cross_entropy(hidden.flatten(0, 1), weight, batch.targets.flatten())
    return loss, batch.n_targets, {}


def hidden_states(model: Transformer, batch) -> Float[Tensor, "B T D"]:
    """Return the hidden states of a batch's rows; what several of them begin with is read once where that is known."""
    if batch.shared is None or not model.can_branch:
        return model.hidden(batch.tokens, batch.positions, batch.documents)
    found = model.hidden(batch.shared.tokens, batch.shared.positions, branches=batch.shared.branches)
    return F.embedding(batch.shared.where, found.flatten(0, 1))


def cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    *,
    chunk_rows: int | None = None,
) -> Float[Tensor, ""]:
    """Return the sum over rows of -log softmax(hidden W^T)[target], rows of target -100 left out.

    The same as `cross_entropy_plain`, without the logits of all rows; in float32 (float64 for float64).
    """
    kept = _rows_worth_computing(targets)
    if kept is not None:
        hidden, targets = hidden[kept], targets[kept]
    rows = chunk_rows or min(CHUNK_ROWS, max(16, CHUNK_BYTES // (4 * weight.shape[0])))
    learns = torch.is_grad_enabled()
    needed = learns and hidden.requires_grad, learns and weight.requires_grad
    return _Chunked.apply(hidden, weight, targets, rows, needed)  # pyright: ignore[reportReturnType]


def _rows_worth_computing(targets: Int[Tensor, " N"]) -> Int[Tensor, " M"] | None:
    """Return which rows to compute, the trained ones and some others; None for all.

    Their number is rounded up to an eighth of all: oneDNN compiles and keeps code for every new shape of a bfloat16
    product, which with a number of its own in each step took 4 MB and 40 ms a step.
    """
    n, trained = len(targets), targets != IGNORE
    grain = max(1, n // 8)
    n_kept = -(-int(trained.sum()) // grain) * grain
    return None if n_kept >= n else trained.byte().argsort(descending=True, stable=True)[:n_kept]


def cross_entropy_plain(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """The definition of `cross_entropy`."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _Chunked(torch.autograd.Function):
    """Cross-entropy whose gradients are found in the forward pass, while a chunk's logits are at hand.

    d loss / d logits = softmax(logits) - onehot(target). A loss is differentiated once, so nothing is computed
    that is not used; the matrix products are as many as with whole logits.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, needed: tuple[bool, bool]) -> Tensor:
        of_hidden, of_weight = needed
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden if of_hidden else hidden[:0])
        d_weight = torch.zeros_like(weight if of_weight else weight[:0], dtype=wide)
        for start in range(0, len(targets), rows):
            h, target = hidden[start : start + rows], targets[start : start + rows]
            logits = F.linear(h, weight)  # [n V]
            losses, slope = _slope(logits, target, fused.fits(logits) and any(needed))
            loss += losses
            if of_hidden:
                torch.mm(slope, weight, out=d_hidden[start : start + rows])
            if of_weight and wide == weight.dtype:
                d_weight.addmm_(slope.T, h)
            elif of_weight:
                d_weight += slope.T @ h
        ctx.needed = needed
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, *grads: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        found = [
            each * grads[0].to(each.dtype) if is_needed else None
            for each, is_needed in zip((d_hidden, d_weight), ctx.needed, strict=True)
        ]
        return *found, None, None, None


def _slope(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], by_kernel: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """Return the sum of -ln p(target), and its derivative by the logits in their dtype; the logits are used up."""
    if by_kernel:
        return -fused.slope_(logits, targets, torch.ones(len(logits))).sum(), logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    numbers, ignored = logits.to(wide), (targets == IGNORE)[:, None]
    target = targets[:, None].masked_fill(ignored, 0)
    highest, where = numbers.max(-1, keepdim=True)
    aimed = numbers.gather(-1, target)
    slope = numbers.softmax(-1)
    # The largest probability is 1 / sum(exp(logits - highest)): a normaliser that cannot overflow or vanish.
    loss = (highest - slope.gather(-1, where).log() - aimed).masked_fill_(ignored, 0).sum()
    slope.scatter_add_(-1, target, torch.full_like(target, -1, dtype=wide))
    return loss, slope.masked_fill_(ignored, 0).to(logits.dtype)


def token_logprobs(model: Transformer, batch, *, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """Return ln p(target) at each position, 0 where nothing is trained; in float32 (float64 for float64).

    temperature: that of the distribution, p = softmax(logits / temperature). batch: a `data.batch.Batch`.
    """
    return logprobs_and_entropy(model, batch, temperature=temperature)[0]


def logprobs_and_entropy(
    model: Transformer, batch, *, temperature: float = 1.0, hidden: Float[Tensor, "B T D"] | None = None
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return `token_logprobs`, and the entropy of the distribution at each trained position, without a gradient.

    As with `next_token_loss` the logits never exist whole; the backward pass computes them once more.
    hidden: the batch's hidden states, if they are at hand.
    """
    hidden = hidden_states(model, batch) if hidden is None else hidden
    weight = model.tok_embeddings.weight if model.output is None else model.output.weight
    targets = batch.targets.flatten()
    kept = _rows_worth_computing(targets)
    rows = slice(None) if kept is None else kept
    wide = torch.promote_types(hidden.dtype, torch.float32)
    size = min(CHUNK_ROWS, max(16, CHUNK_BYTES // (4 * weight.shape[0])))
    found = _Logprobs.apply(hidden.flatten(0, 1)[rows], weight, targets[rows], size, temperature)
    out = [torch.zeros(len(targets), dtype=wide, device=hidden.device) for _ in range(2)]
    return tuple(  # pyright: ignore[reportReturnType]
        whole.index_put((torch.arange(len(targets), device=hidden.device)[rows],), part).view_as(batch.targets)
        for whole, part in zip(out, found, strict=True)  # pyright: ignore[reportArgumentType]
    )


def logprobs_plain(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"], temperature: float
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The definition of `logprobs_and_entropy` for rows of hidden states."""
    logits = F.linear(hidden, weight)
    logprobs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    ignored = targets == IGNORE
    aimed = logprobs.gather(-1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return aimed.masked_fill(ignored, 0), entropy.detach().masked_fill(ignored, 0)


def _logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    if fused.fits(hidden, weight):
        return fused.target_logprobs(F.linear(hidden, weight), targets, temperature=temperature)
    return logprobs_plain(hidden, weight, targets, temperature)


def _logprobs_slope(logits: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Float[Tensor, "N V"]:
    """Return (onehot(target) - softmax(logits / temperature)) * weight, 0 for targets of -100; logits are used up."""
    if fused.fits(logits):
        fused.slope_(logits, targets, -weights.float(), temperature=temperature)
        return logits
    wide, ignored = torch.promote_types(logits.dtype, torch.float32), targets == IGNORE
    target = targets.masked_fill(ignored, 0)[:, None]
    slope = -(logits.to(wide) / temperature).softmax(-1)
    slope.scatter_add_(-1, target, torch.ones_like(target, dtype=wide))
    return (slope * weights.masked_fill(ignored, 0)[:, None]).to(logits.dtype)


class _Logprobs(torch.autograd.Function):
    """Log-probabilities of targets a chunk of rows at a time, forward and backward.

    d ln p(target) / d logits = (onehot(target) - softmax(logits / temperature)) / temperature
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, temperature: float):
        parts = [
            _logprobs(hidden[at : at + rows], weight, targets[at : at + rows], temperature)
            for at in range(0, max(1, len(targets)), rows)
        ]
        logprobs, entropy = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.rows, ctx.temperature = rows, temperature
        ctx.save_for_backward(hidden, weight, targets)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for at in range(0, len(targets), ctx.rows):
            part = slice(at, at + ctx.rows)
            logits, weights = F.linear(hidden[part], weight), grads[0][part] / ctx.temperature
            slope = _logprobs_slope(logits, targets[part], weights, ctx.temperature)
            if d_hidden is not None:
                d_hidden[part] = slope @ weight
            if d_weight is not None:
                d_weight += slope.T @ hidden[part]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None
