"""A model for one device becomes a model for many, in one fixed order:

    tensor parallel -> activation checkpointing -> compile -> FSDP2

Each is a function of the finished model; none leaves a trace in the names of the weights.
"""

import functools
from typing import Literal

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llama2.errors import TrainingError
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World

Checkpointing = Literal["none", "selective", "full"]

_PLAN = {
    **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
    "attention.wo": RowwiseParallel(),
    **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
    "feed_forward.w2": RowwiseParallel(),
}
"""Heads and the feed-forward's width are split, so a block needs two sums over the ranks (arXiv:1909.08053)."""

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""What selective checkpointing keeps: the dear results. Norms, SiLU and rotations are computed again."""


def parallelize(
    model: Transformer,
    world: World,
    *,
    activation_checkpointing: Checkpointing = "none",
    compile: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Transformer:
    """Make the model run this way, in place, and return it.

    compute_dtype: for more than one data rank, what the sharded float32 weights are gathered as.
    """
    if world.tp > 1:
        _split_matrices(model, world)
    for layer in model.layers:
        checkpoint_block(layer, activation_checkpointing)
    if compile:
        for layer in model.layers:
            layer.compile()
    if world.dp > 1:
        _shard(model, world, compute_dtype)
    return model


def _split_matrices(model: Transformer, world: World) -> None:
    assert world.mesh is not None
    for name in ("n_heads", "n_kv_heads", "ffn_dim"):
        value = getattr(model.config, name)
        if value % world.tp:
            raise TrainingError(f"{name}={value} is not divisible by tensor_parallel={world.tp}; choose a divisor")
    for layer in model.layers:
        parallelize_module(layer, world.mesh["tp"], _PLAN)


def checkpoint_block(block: torch.nn.Module, kind: Checkpointing) -> None:
    """Let a block forget activations in the forward pass and compute them again in the backward pass."""
    if kind == "none":
        return
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    options = {"context_fn": contexts} if kind == "selective" else {}
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(model: Transformer, world: World, compute_dtype: torch.dtype | None) -> None:
    assert world.mesh is not None
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=model.norm.weight.dtype)
    for layer in model.layers:
        fully_shard(layer, mesh=world.mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=world.mesh["dp"], mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")  # the loss calls it, not forward
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are sums: gradients are added, not averaged
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def synchronise_gradients(model: torch.nn.Module, is_last: bool) -> None:
    """Before a backward pass: add gradients up over the ranks only with the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)


def forget_gathered(model: torch.nn.Module) -> None:
    """After weights were changed outside a training step: what FSDP keeps gathered of them is gathered anew."""
    if isinstance(model, FSDPModule):
        model.reshard()
