"""What is random in a training step: noise on the embeddings, dropout. Both are hooks; the model knows of neither.

Their numbers follow from the step's own (`Trainer.step`), so that a resumed run draws the same ones.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.model.transformer import Block, Transformer


def add_noise(model: Transformer, alpha: float) -> None:
    """Add uniform noise of size alpha / sqrt(T D) to the embeddings of every training step (arXiv:2310.05914)."""
    if not alpha:
        return

    def noisy(module: nn.Module, args: object, out: Tensor) -> Tensor:
        if not module.training:
            return out
        size = alpha / math.sqrt(out.shape[-2] * out.shape[-1])
        return out + torch.empty_like(out).uniform_(-size, size)

    model.tok_embeddings.register_forward_hook(noisy)


def add_dropout(model: Transformer, share: float) -> None:
    """In training, zero this share of what is added to the residual stream: embeddings, attention, feed-forward.

    The rest is scaled up by 1 / (1 - share): arXiv:1706.03762 sec. 5.4. No Llama was trained so: it is for little
    data and many passes.
    """
    if not share:
        return

    def dropped(module: nn.Module, args: object, out: Tensor) -> Tensor:
        return F.dropout(out, share, module.training)

    model.tok_embeddings.register_forward_hook(dropped)
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.attention.register_forward_hook(dropped)
        layer.feed_forward.register_forward_hook(dropped)
