"""Losses of a language model: pure functions of the model and a batch.

A loss returns (sum, count, metrics): the sum over what was trained, how many that were, and named sums for the
log. The trainer adds both up over micro-batches and ranks and divides once, so no split of a batch changes it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

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
    hidden = model.hidden(batch.tokens, batch.positions, batch.documents)
    weight = model.tok_embeddings.weight if model.output is None else model.output.weight
    loss = cross_entropy(hidden.flatten(0, 1), weight, batch.targets.flatten())
    return loss, batch.n_targets, {}


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
            h, target = hidden[start : start + rows], targets[start : start + rows, None]
            ignored = target == IGNORE
            target = target.masked_fill(ignored, 0)
            logits = F.linear(h, weight).to(wide)  # [n V]
            highest, where = logits.max(-1, keepdim=True)
            aimed = logits.gather(-1, target)
            slope = logits.softmax(-1)
            # The largest probability is 1 / sum(exp(logits - highest)): a normaliser that cannot overflow or vanish.
            loss += (highest - slope.gather(-1, where).log() - aimed).masked_fill_(ignored, 0).sum()
            if of_hidden or of_weight:
                slope.scatter_add_(-1, target, torch.full_like(target, -1, dtype=wide))
                slope.masked_fill_(ignored, 0)
                slope = slope.to(hidden.dtype)
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
