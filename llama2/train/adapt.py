"""A finished checkpoint made ready to change: all of it, or an adapter beside it, and how the outcome is written."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llama2.checkpoint import store
from llama2.checkpoint.adapter import is_adapter, write_adapter
from llama2.checkpoint.resume import SavedState
from llama2.errors import ConfigError
from llama2.model.config import ModelConfig
from llama2.model.lora import adapter_names, add_adapter, fresh_adapter, merge_into
from llama2.model.lora_config import LoraConfig, check, targets, whole_modules
from llama2.model.quantized import nf4_like
from llama2.model.surgery import replace_linears
from llama2.model.transformer import Transformer
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.adapt_config import AdaptConfig
from llama2.train.folder import Export, export_model


def check_vocabulary(config: AdaptConfig, shape: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.n_vocab > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer of {config.model} has {tokenizer.n_vocab} pieces, the model vocab_size={shape.vocab_size}: "
            "they do not belong together; llama2 extend-vocabulary makes a model larger"
        )


def adapter_of(config: AdaptConfig, shape: ModelConfig) -> LoraConfig | None:
    """Return what adapter is to be trained, None for all weights. Raises ConfigError."""
    if not config.is_adapter:
        return None
    lora = LoraConfig(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=targets(config.target_modules),
        trained_modules=whole_modules(config.trained_modules),
        rslora=config.rslora,
        dora=config.dora,
    )
    check(lora, tied_embeddings=shape.tied_embeddings)
    return lora


def export_of(config: AdaptConfig, shape: ModelConfig, tokenizer: Tokenizer, lora: LoraConfig | None) -> Export:
    """Return how the outcome is written: a model's folder, or an adapter's."""
    if lora is None:
        return partial(export_model, config=shape, tokenizer=tokenizer, dtype=config.dtype)
    return partial(export_adapter, lora=lora, base=base_name(config), shape=shape, tokenizer=tokenizer)


def base_name(config: AdaptConfig) -> str:
    """Return what an adapter calls its base: a whole path, or a hub name."""
    local = Path(config.model).expanduser()
    return str(local.resolve()) if local.exists() else config.model


def export_adapter(
    saved: SavedState, kind: str, to: Path, *, lora: LoraConfig, base: str, shape: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Write saved adapter weights as PEFT does, in float32."""
    names = [name.removeprefix("weights/") for name in saved.shapes if name.startswith("weights/")]
    tensors = {name: partial(saved.read, f"{kind}/{name}") for name in names}
    write_adapter(to, tensors, lora, base=base, model=shape, tokenizer=tokenizer)


def adapt(config: AdaptConfig, lora: LoraConfig | None, model: Transformer) -> None:
    """Change the empty model: its blocks to 4 bits, an adapter beside them."""
    if config.method == "qlora":
        compute = getattr(torch, config.dtype)
        replace_linears(model, lambda _, layer: nf4_like(layer, dtype=compute), lambda name: name.startswith("layers."))
    if lora is not None:
        add_adapter(model, lora, seed=None)


def first_weights(
    config: AdaptConfig, base: Path, lora: LoraConfig | None, model: Transformer
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's weights, then a fresh adapter's."""
    if is_adapter(base):
        weights = {name: partial(torch.Tensor.detach, weight) for name, weight in merged(base).items()}
    else:
        weights = store.read(base).tensors
    for name, read in weights.items():
        yield name, read()
    if lora is not None:
        yield from fresh_adapter(model, seed=config.seed, weight_of=lambda name: weights[name]())


def merged(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a base with the adapters upon it, added up in float32."""
    model = store.load(folder, dtype="float32")
    for name in adapter_names(model):
        merge_into(model, name)
    return model.state_dict()


def lr_scale(config: AdaptConfig, name: str) -> float:
    """Return by how much the learning rate of a weight differs from learning_rate."""
    if ".lora_b." in name:
        return config.lora_b_lr_ratio
    is_whole = config.is_adapter and name.endswith(".weight")
    return config.trained_modules_lr / config.learning_rate if is_whole and config.trained_modules_lr else 1.0
