"""Whole weights of a model that is split over processes, for as long as it answers.

In one process the trainer's model answers itself: an engine reads its weights where they are, without a copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from llama2.model.heads import add_heads, head_names
from llama2.model.lora import active_adapters, adapter_config, adapter_names, add_adapter, set_active
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World


@contextmanager
def whole(model: Transformer, world: World) -> Iterator[Transformer]:
    """Within this, every rank has a model with whole weights to sample from: gathered once, given up at the end.

    Adapters and heads come with it. In one process it is the model itself. Quantised layers are not gathered.
    """
    if world.size == 1:
        yield model
        return
    with torch.device("meta"):
        copy = Transformer(model.config)
        for name in adapter_names(model):
            add_adapter(copy, adapter_config(model, name), name=name, seed=None)
        if names := head_names(model):
            add_heads(copy, *names)
    weights = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            found = weight.full_tensor() if isinstance(weight, DTensor) else weight
            weights[name] = found.detach()
    copy.load_state_dict(weights, assign=True)
    set_active(copy, active_adapters(model))
    yield copy.eval()
