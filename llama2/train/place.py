"""A model with its first weights, where it is to be trained: whole weights exist only one at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llama2.model.config import ModelConfig
from llama2.model.quantized import NF4Linear
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World
from llama2.parallel.region import fill
from llama2.parallel.shard import parallelize
from llama2.train.config import RunConfig

Weights = Callable[[Transformer], Iterator[tuple[str, Tensor]]]
"""Yields name and value of every weight of a model, which is given for its names and shapes."""


def place_model(
    config: RunConfig,
    shape: ModelConfig,
    world: World,
    weights: Weights,
    *,
    adapt: Callable[[Transformer], None] = lambda model: None,
) -> Transformer:
    """Return the model with its weights, split over the processes. adapt: changes the empty model beforehand."""
    compute = getattr(torch, config.dtype)
    keeps_wide = world.dp > 1 and config.dtype == "bfloat16" and config.master_weights
    with torch.device("meta"):
        model = Transformer(shape).to(torch.float32 if keeps_wide else compute)
        whole = Transformer(shape).to(model.norm.weight.dtype)  # names and shapes, from before the model is split
        adapt(model)
        adapt(whole)
    parallelize(
        model,
        world,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        compute_dtype=compute if keeps_wide else None,
    )
    model.to_empty(device=world.device)
    parameters = dict(model.named_parameters())
    for name, values in weights(whole):
        if name in parameters:
            fill(parameters[name], values)
        else:
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, NF4Linear), name
            layer.quantise(values.to(world.device))
    return model
