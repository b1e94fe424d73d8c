"""Whole weights of a model that is split over processes, for as long as it answers.

In one process the trainer's model answers itself: an engine reads its weights where they are, without a copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World


@contextmanager
def whole(model: Transformer, world: World) -> Iterator[Transformer]:
    """Within this, every rank has a model with whole weights to sample from: gathered once, given up at the end.

    In one process it is the model itself. Adapters and quantised layers of a split model are not gathered: only models
    of plain matrices can be split over data ranks and answer.
    """
    if world.size == 1:
        yield model
        return
    with torch.device("meta"):
        copy = Transformer(model.config)
    weights = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            found = weight.full_tensor() if isinstance(weight, DTensor) else weight
            weights[name] = found.detach()
    copy.load_state_dict(weights, assign=True)
    yield copy.eval()
