"""Scaled dot-product attention over grouped heads: one plain definition and its fast twin.

What a query may see is said once, by `visible`: keys at its own position or before, in its own
document, within the window. The model never learns how keys and values are kept: a `Cache` does.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """Keeps the keys and values of earlier positions and attends over them.

    Where the new tokens stand (their rows and positions) was told to the cache before the forward
    pass; that is the business of whoever made the cache, not of the model.
    """

    def attend(
        self, layer: int, q: Float[Tensor, "B T H Dh"], k: Float[Tensor, "B T K Dh"], v: Float[Tensor, "B T K Dh"]
    ) -> Float[Tensor, "B T H Dh"]:
        """Append k and v (already rotated) to this layer's, and return attention of q over all it may see."""
        ...


def visible(
    q_positions: Int[Tensor, "#B T"],
    k_positions: Int[Tensor, "#B S"],
    *,
    window: int | None = None,
    documents: Int[Tensor, "B T"] | None = None,
    branches: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "#B T S"]:
    """Return which keys each query may see: not later ones, not other documents', not beyond the window.

    With `documents` the keys are those of the same T tokens, with `branches` too, and all see those of branch 0.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    if branches is not None:
        seen = seen & ((branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :]))
    return seen


def attend_plain(
    q: Float[Tensor, "B T H Dh"],
    k: Float[Tensor, "B S K Dh"],
    v: Float[Tensor, "B S K Dh"],
    mask: Bool[Tensor, "#B T S"],
) -> Float[Tensor, "B T H Dh"]:
    """softmax(q k^T / sqrt(Dh)) v, the definition: query head h reads key head h // (H / K), softmax in float32.

    Every query must see at least one key.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)  # [B S H Dh]
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def attend(
    q: Float[Tensor, "B T H Dh"],
    k: Float[Tensor, "B S K Dh"],
    v: Float[Tensor, "B S K Dh"],
    mask: Bool[Tensor, "#B T S"] | Float[Tensor, "#B T S"] | None = None,
) -> Float[Tensor, "B T H Dh"]:
    """The same through PyTorch's fused kernels. Without a mask: causal if S = T, else everything is seen (T = 1).

    A mask of numbers is added to the scores: 0 and -inf.
    """
    assert mask is not None or q.shape[1] in (1, k.shape[1])
    if q.shape[1] == 1:
        return _attend_one(q, k, v, mask)
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[1] <= 512:
        return attend_by_products(q, k, v, mask)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=mask is None and q.shape[1] > 1,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # [B H T Dh]
    return out.transpose(1, 2)


QUERIES = 128
"""How many are computed at a time."""


def attend_by_products(
    q: Float[Tensor, "B T H Dh"],
    k: Float[Tensor, "B S K Dh"],
    v: Float[Tensor, "B S K Dh"],
    mask: Bool[Tensor, "#B T S"] | None,
) -> Float[Tensor, "B T H Dh"]:
    """The same as two batched products, for training in bfloat16 on a CPU: scores exist whole, rounded to bfloat16.

    Of the fused kernel the backward pass is the slow part there. 16 rows of 256 tokens, 4 heads of 32, one core:
    19 ms forward and backward for 33. In float32 the fused kernel is the faster. Some queries at a time, and only the
    keys up to the last of them: with documents in the rows 47 ms for 80, at 512 tokens 78 for 136.
    """
    n_kv, group = k.shape[2], q.shape[2] // k.shape[2]
    n, offset = q.shape[1], k.shape[1] - q.shape[1]
    seen = torch.ones(1, n, k.shape[1], dtype=torch.bool, device=q.device).tril(offset) if mask is None else mask
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))[:, None, None]
    scaled = (q * q.shape[-1] ** -0.5).unflatten(2, (n_kv, group)).permute(0, 2, 3, 1, 4)  # [B K G T Dh]
    keys, values = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    parts = []
    for start in range(0, n, QUERIES):
        end = min(n, start + QUERIES)
        scores = (scaled[:, :, :, start:end].flatten(2, 3) @ keys[..., : end + offset]).unflatten(2, (group, -1))
        weights = (scores + bias[..., start:end, : end + offset]).softmax(-1)  # [B K G QUERIES S]
        parts.append((weights.flatten(2, 3) @ values[:, :, : end + offset]).unflatten(2, (group, -1)))
    return torch.cat(parts, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _attend_one(
    q: Float[Tensor, "B 1 H Dh"],
    k: Float[Tensor, "B S K Dh"],
    v: Float[Tensor, "B S K Dh"],
    mask: Bool[Tensor, "#B 1 S"] | Float[Tensor, "#B 1 S"] | None,
) -> Float[Tensor, "B 1 H Dh"]:
    """The same for one new token: the heads that share a key head are its queries, so keys are read once a group.

    Against enable_gqa at 512 keys, 32 heads over 4, on two cores: 30 us for 55 in bfloat16, 31 for 88 in float32.
    """
    grouped = q[:, 0].unflatten(1, (k.shape[2], -1))  # [B K H/K Dh]
    seen = None if mask is None else mask[:, None]
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen)
    return out.flatten(1, 2)[:, None]
