"""What a bfloat16 training step on a CPU does between its matrix products, in one pass each (`kernels/training.c`).

PyTorch computes a norm, a rotation or a masked softmax in several operations, each of which writes all its numbers;
of a small model's step that was three quarters. Here numbers are read once, computed in float32 and rounded
where the plain definitions round, or less often. `applies` says when: everything else, and a machine without
kernels, takes the definitions in `transformer.py`, `rope.py`, `attention.py` and `losses.py`.
"""

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from llama2.kernels.build import call, library
from llama2.model.attention import QUERIES

SCORES_BYTES = 128 << 20
"""What a layer may keep of its scores for the backward pass; beyond it PyTorch's kernels, which keep none."""


def applies(*tensors: Tensor) -> bool:
    """Whether these are computed by kernels: bfloat16 numbers on a CPU, with gradients."""
    return torch.is_grad_enabled() and fits(*tensors)


def fits(*tensors: Tensor) -> bool:
    """Whether there are kernels for such numbers."""
    return (
        all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in tensors)
        and all(type(each) in (Tensor, nn.Parameter) for each in tensors)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def attends(q: Float[Tensor, "B T H Dh"], k: Tensor, v: Tensor) -> bool:
    """Whether `attend` computes these."""
    batch, time, n_heads, _ = q.shape
    return time > 1 and batch * n_heads * time * (time + QUERIES) <= SCORES_BYTES and applies(q, k, v)


def rms_norm(x: Float[Tensor, "*B D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "*B D"]:
    """x / rms(x) rounded, times weight."""
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        dim = x.shape[-1]
        out, inverse = torch.empty_like(x), torch.empty(x.numel() // dim)
        call("rms_norm", x, weight, out, inverse, len(inverse), dim, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight, inverse = ctx.saved_tensors
        n, dim = len(inverse), x.shape[-1]
        d_x, parts = torch.empty_like(x), torch.empty(-(-n // 64), dim)
        call("rms_norm_backward", grads[0].contiguous(), x, weight, inverse, d_x, parts, n, dim)
        return d_x, parts.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def swiglu(a: Float[Tensor, "*B F"], b: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
    """silu(a) * b"""
    return _SwiGLU.apply(a, b)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        out = torch.empty_like(a)
        call("swiglu", a, b, out, a.numel())
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        a, b = ctx.saved_tensors
        d_a, d_b = torch.empty_like(a), torch.empty_like(b)
        call("swiglu_backward", grads[0].contiguous(), a, b, d_a, d_b, a.numel())
        return d_a, d_b


def attend(
    q: Float[Tensor, "B T H Dh"],
    k: Float[Tensor, "B T K Dh"],
    v: Float[Tensor, "B T K Dh"],
    turns: Complex[Tensor, "#B T 1 P"],
    mask: Bool[Tensor, "#B T T"] | None,
) -> Float[Tensor, "B T H Dh"]:
    """Rotate q and k and attend: causal without a mask. Scores exist whole, rounded to bfloat16."""
    return _Attention.apply(q, k, v, turns, mask)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    """Two batched products, and in the backward pass five, with everything between them in place.

    Heads come first in between: [B K G T Dh], G query heads to each key head.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        batch, time, n_heads, dim = q.shape
        n_kv = k.shape[2]
        angles, seen = torch.view_as_real(turns.contiguous()), None if mask is None else mask.contiguous()
        queries = _heads_first(q, angles, dim**-0.5).view(batch, n_kv, -1, time, dim)
        keys, values = _heads_first(k, angles), _heads_first(v, None)
        out, weights = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for start, end in _chunks(time):
            some = queries[:, :, :, start:end].flatten(2, 3)  # [B K G*Q Dh]
            scores = some @ keys[:, :, :end].transpose(2, 3)
            shape = 0 if seen is None else len(seen)
            call(
                "masked_softmax", scores, seen, batch, n_heads, end - start, end, shape, time, time, start
            )  # fmt: skip
            weights.append(scores)
            part = (scores @ values[:, :, :end]).view(batch, n_heads, end - start, dim)
            _lay_out(part, out[:, start:end].transpose(1, 2))
        ctx.save_for_backward(queries, keys, values, angles, *weights)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        queries, keys, values, angles, *weights = ctx.saved_tensors
        group, time, dim = queries.shape[2:]
        d_out = _heads_first(grads[0].contiguous(), None).view_as(queries)
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for (start, end), weight in zip(_chunks(time), weights, strict=True):
            grad = d_out[:, :, :, start:end].flatten(2, 3)
            slope = grad @ values[:, :, :end].transpose(2, 3)
            call("softmax_backward", weight, slope, slope.numel() // end, end)
            d_queries[:, :, :, start:end] = (slope @ keys[:, :, :end]).unflatten(2, (group, -1))
            d_keys[:, :, :end] += slope.transpose(2, 3) @ queries[:, :, :, start:end].flatten(2, 3)
            d_values[:, :, :end] += weight.transpose(2, 3) @ grad
        d_q = _time_first(d_queries.flatten(1, 2), angles, dim**-0.5)
        return d_q, _time_first(d_keys, angles), _time_first(d_values, None), None, None


def _chunks(time: int) -> list[tuple[int, int]]:
    return [(start, min(time, start + QUERIES)) for start in range(0, time, QUERIES)]


def _heads_first(x: Tensor, angles: Tensor | None, scale: float = 1.0) -> Tensor:
    """[B T H Dh] -> [B H T Dh], turned by the angles."""
    batch, time, heads, dim = x.shape
    out = x.new_empty(batch, heads, time, dim)
    _lay_out(x.transpose(1, 2), out, angles, scale)
    return out


def _time_first(x: Tensor, angles: Tensor | None, scale: float = 1.0) -> Tensor:
    """[B H T Dh] -> [B T H Dh], turned back by the angles."""
    batch, heads, time, dim = x.shape
    out = x.new_empty(batch, time, heads, dim)
    _lay_out(x, out.transpose(1, 2), angles, scale, -1.0)
    return out


def _lay_out(x: Tensor, out: Tensor, angles: Tensor | None = None, scale: float = 1.0, direction: float = 1.0) -> None:
    """Write x [B H T Dh] to out, by whatever strides both have; with angles turned, and times the scale."""
    assert x.stride(-1) == out.stride(-1) == 1
    batch, heads, time, dim = x.shape
    strides = [torch.tensor([each.stride(i) for i in (0, 2, 1)]) for each in (x, out)]
    rows = 1 if angles is None else len(angles)
    call("rotate", x, angles, out, batch, time, heads, dim, *strides, rows, scale, direction)


def target_logprobs(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], *, temperature: float = 1.0
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return ln p(target) and the entropy of softmax(logits / temperature) in float32; 0 for targets below 0."""
    logprobs, entropy = torch.empty(len(logits)), torch.empty(len(logits))
    call("target_logprobs", logits, targets.contiguous(), None, logprobs, entropy, *logits.shape, 1 / temperature)
    return logprobs, entropy


def slope_(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """Turn logits into (softmax(logits / temperature) - onehot(target)) * weight; return ln p(target)."""
    logprobs = torch.empty(len(logits))
    weights = weights.contiguous()
    call("target_logprobs", logits, targets.contiguous(), weights, logprobs, None, *logits.shape, 1 / temperature)
    return logprobs
