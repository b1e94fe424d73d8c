"""What changes the weights: parameter groups, learning rates over time, float32 masters of bfloat16 weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llama2.parallel.region import local_part, split_names
from llama2.train.adam8bit import AdamW8bit
from llama2.train.config import RunConfig
from llama2.train.muon import Muon


def learning_rate(step: int, n_steps: int, config: RunConfig) -> float:
    """Return the learning rate of a step, counted from 0.

    It rises linearly over warmup_steps, then: cosine falls to min_lr_share at the last step (Llama 2,
    arXiv:2307.09288 sec. 2.2); wsd stays, and falls linearly over the last decay_share (arXiv:2404.06395);
    constant stays.
    """
    peak, last = config.learning_rate, config.min_lr_share
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return peak
    start = config.warmup_steps
    if config.lr_scheduler == "wsd":
        start = max(start, n_steps - round(config.decay_share * n_steps))
    if step < start:
        return peak
    done = min(1.0, (step - start + 1) / max(1, n_steps - start))
    shape = (1 + math.cos(math.pi * done)) / 2 if config.lr_scheduler == "cosine" else 1 - done
    return peak * (last + (1 - last) * shape)


class MasterWeights:
    """The numbers that the optimizer changes, as plain tensors by name.

    Of a model that is split over processes they are this rank's parts; of a bfloat16 model float32 copies:
    small updates vanish in bfloat16's eight bits, and so do small gradients added to large ones.
    """

    def __init__(self, model: nn.Module, *, separate: bool):
        self.model_weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.separate = separate
        self.weights: dict[str, Tensor] = {}
        for name, weight in self.model_weights.items():
            if separate:
                self.weights[name] = local_part(weight).detach().float().clone()
            elif isinstance(weight, DTensor):
                self.weights[name] = local_part(weight).detach()  # the same memory
            else:
                self.weights[name] = weight

    def gather_gradients(self) -> None:
        """After each backward pass: bring the model's gradients to the masters, added up in their precision."""
        for name, weight in self.model_weights.items():
            master = self.weights[name]
            if master is weight or weight.grad is None:
                continue
            gradient = local_part(weight.grad)
            if not self.separate:
                master.grad = gradient  # FSDP adds up itself
                continue
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """After an optimizer step: round the masters into the model."""
        if self.separate:
            torch._foreach_copy_(
                [local_part(each) for each in self.model_weights.values()], list(self.weights.values())
            )

    def clear_gradients(self) -> None:
        for weights in (self.weights, self.model_weights):
            for weight in weights.values():
                weight.grad = None

    def gradient_norm(self) -> float:
        """Return the norm of all gradients together, over all ranks, each part counted once."""
        groups: dict[tuple[str, ...], list[Tensor]] = {}
        meshes: dict[tuple[str, ...], DeviceMesh] = {}
        for name, weight in self.weights.items():
            if weight.grad is not None:
                like = self.model_weights[name]
                split = split_names(like)
                groups.setdefault(split, []).append(weight.grad)
                if isinstance(like, DTensor):
                    meshes[split] = like.device_mesh
        total = 0.0
        for split in sorted(groups):
            norms = torch.stack(torch._foreach_norm(groups[split]))
            part = norms.to(torch.float64 if norms.device.type == "cpu" else norms.dtype).square().sum()
            for name in split:
                torch.distributed.all_reduce(part, group=meshes[split].get_group(name))
            total += float(part)
        return math.sqrt(total) if total >= 0 else math.nan

    def scale_gradients(self, factor: float) -> None:
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)


def make_optimizers(
    weights: Mapping[str, Tensor],
    config: RunConfig,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    split_as: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of all weights: AdamW, and Muon for the blocks' matrices where it is asked for.

    Matrices are decayed, vectors are not. Muon's update is scaled to the size that AdamW's would have
    (arXiv:2502.16982 eq. 4), so one learning rate serves both. lr_scale: a factor to it for a weight, by its name.
    split_as: the model's own weights, where those to be trained are this process's parts of them.
    """
    is_muons = {name: config.optimizer == "muon" and w.ndim == 2 and "layers." in name for name, w in weights.items()}
    groups: dict[tuple[bool, bool, float], list[Tensor]] = {}
    for name, weight in sorted(weights.items(), key=lambda each: each[1].ndim <= 1):
        groups.setdefault((is_muons[name], weight.ndim > 1, lr_scale(name)), []).append(weight)
    sorts: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for (is_muon, is_decayed, scale), members in groups.items():
        decay = config.weight_decay if is_decayed else 0.0
        sorts[is_muon].append({"params": members, "weight_decay": decay, "lr_scale": scale})
    optimizers: list[torch.optim.Optimizer] = []
    if sorts[False]:
        settings: dict[str, Any] = dict(lr=config.learning_rate, eps=config.adam_eps)
        settings["betas"] = (config.adam_beta1, config.adam_beta2)
        if config.optimizer == "adamw8bit":
            optimizers.append(AdamW8bit(sorts[False], **settings))
        else:
            optimizers.append(torch.optim.AdamW(sorts[False], **settings, fused=_can_fuse(weights.values())))
    if sorts[True]:
        settings = dict(lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95)
        split = {weights[name]: like for name, like in split_as.items() if isinstance(like, DTensor)}
        optimizers.append(Muon(sorts[True], **settings, split_as=split))
    return optimizers


def _can_fuse(weights: Iterable[Tensor]) -> bool:
    return all(weight.device.type in ("cpu", "cuda") and weight.is_floating_point() for weight in weights)
