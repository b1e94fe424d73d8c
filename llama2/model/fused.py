"""What a bfloat16 training step on a CPU does besides its large products (`kernels/training.c`, `attention.c`).

PyTorch computes a norm, a rotation or a masked softmax in several operations, each of which writes all its numbers;
of a small model's step that was three quarters. Here numbers are read once, computed in float32 and rounded
where the plain definitions round, or less often; and attention computes only what documents in a row see.
`applies` says when: everything else, and a machine without kernels, takes the definitions in `transformer.py`,
`rope.py`, `attention.py` and `losses.py`.
"""

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from llama2.kernels.build import call, library

LONGEST = 512 * 64
"""Positions times head size up to which rows without documents are attended to here."""


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


def attends(q: Float[Tensor, "B T H Dh"], k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` computes these: not long rows seen whole, for which PyTorch's kernel is the faster."""
    _, time, _, dim = q.shape
    return time > 1 and (mask is not None or time * dim <= LONGEST) and applies(q, k, v)


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
    """Rotate q and k and attend: causal, and only where a mask allows it. Scores are never kept."""
    return _Attention.apply(q, k, v, turns, mask)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        angles, seen = torch.view_as_real(turns.contiguous()), None if mask is None else mask.contiguous()
        out, sums = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
        ctx.sizes = (*q.shape[:3], *k.shape[2:], len(angles), 1 if seen is None else len(seen), q.shape[-1] ** -0.5)
        call("attention", q, k, v, angles, seen, out, sums, *ctx.sizes)
        ctx.save_for_backward(q, k, v, angles, seen, sums)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        q, k, v, angles, seen, sums = ctx.saved_tensors
        slopes = [torch.empty_like(each) for each in (q, k, v)]
        call("attention_backward", grads[0].contiguous(), q, k, v, angles, seen, sums, *slopes, *ctx.sizes)
        return *slopes, None, None


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
