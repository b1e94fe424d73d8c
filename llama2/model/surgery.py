"""Changes to a finished Transformer: its vocabulary made larger, its linear layers replaced."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama2.errors import ConfigError
from llama2.model.transformer import Transformer


def replace_linears(
    model: Transformer, make: Callable[[str, nn.Module], nn.Module], where: Callable[[str], bool]
) -> Transformer:
    """Put make(name, layer) in the place of every linear layer whose name `where` accepts; return the model.

    Names are like layers.0.attention.wq and output. `make` may return the layer it was given. What counts as linear
    has in_features and out_features, whatever holds its weight.
    """
    found = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "in_features") and where(name)]
    for name, layer in found:
        made = make(name, layer)
        if made is not layer:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)
    return model


def resize_vocabulary(model: Transformer, parts: Sequence[Sequence[int]], *, n_old: int | None = None) -> Transformer:
    """Return the model with a token for each of `parts`, beginning as the mean of the tokens listed there.

    parts: for each new token the ids, below n_old, of the old ones that its text had; both its row of the embedding
    and its row of the output are the mean of theirs, computed in float32 (float64 for a float64 model) and rounded
    once, as in Chinese Llama 2 projects. All other weights are shared with the given model, which stays as it is.
    n_old: the first new id, if the model has rows without a token at its end; they are then used first. vocab_size
    if not given. Raises ConfigError for ids that do not exist.
    """
    n_rows = model.config.vocab_size
    first = n_rows if n_old is None else n_old
    if not 0 < first <= n_rows:
        raise ConfigError(
            f"n_old={first} tokens, but the model has vocab_size={n_rows}; they belong to different models"
        )
    for number, ids in enumerate(parts):
        if not ids or not all(0 <= token_id < first for token_id in ids):
            raise ConfigError(
                f"new token {number} is made of the tokens {list(ids)}; wanted one or more of 0..{first - 1}"
            )
    config = replace(model.config, vocab_size=max(n_rows, first + len(parts)))
    weights = model.state_dict()
    if any(".lora_a." in name for name in weights):
        raise ConfigError("the model has adapters, which know its old vocabulary; merge them first (llama2 merge)")
    for name in ("tok_embeddings.weight", "output.weight"):
        if name in weights:
            weights[name] = _with_means(weights[name], parts, first, config.vocab_size)
    with torch.device("meta"):
        larger = Transformer(config)
    larger.load_state_dict(weights, assign=True)
    return larger.train(model.training)


@torch.no_grad()
def _with_means(
    rows: Float[Tensor, "V D"], parts: Sequence[Sequence[int]], first: int, n_rows: int
) -> Float[Tensor, "N D"]:
    exact = torch.promote_types(rows.dtype, torch.float32)
    larger = rows.new_empty(n_rows, rows.shape[1])
    larger[: rows.shape[0]] = rows
    for number, ids in enumerate(parts, first):
        larger[number] = rows[list(ids)].to(exact).mean(dim=0).to(rows.dtype)
    return larger
