"""Pretraining: shards in, a Llama out. `pretrain` reads from top to bottom as what happens.

Llama 2, arXiv:2307.09288 sec. 2: next-token prediction, AdamW, cosine schedule, clipping.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llama2.checkpoint import hub, store
from llama2.data.loader import Loader
from llama2.data.shards import INDEX, Shards, open_shards
from llama2.errors import ConfigError, DataError, TokenizerError
from llama2.model.config import ModelConfig
from llama2.model.losses import next_token_loss
from llama2.model.transformer import Transformer, fresh_weights
from llama2.parallel.mesh import start
from llama2.tokenizer.formats import load_tokenizer
from llama2.train.config import PretrainConfig, RunConfig
from llama2.train.evaluation import judges_of
from llama2.train.folder import RunFolder, export_model
from llama2.train.loop import Trainer
from llama2.train.noise import add_dropout
from llama2.train.place import place_model
from llama2.train.run import Outcome, Run
from llama2.train.samples import samples_of


def pretrain(config: PretrainConfig) -> Outcome:
    """Train a Llama on token shards. Raises Llama2Error before any long work for what cannot work."""
    config.check()
    world = start(device=config.device, tensor_parallel=config.tensor_parallel, timeout_s=config.timeout_s)
    sets, held_out = open_data(config)
    shape = model_shape(config, sets[0])
    micro_batch = config.micro_batch(world.dp)
    n_steps = config.max_steps or steps_of(config, sets)
    if config.warmup_steps >= n_steps:
        raise ConfigError(f"warmup_steps={config.warmup_steps} leaves nothing of the {n_steps} steps; choose fewer")
    tokenizer = sets[0].tokenizer()
    export = partial(export_model, config=shape, tokenizer=tokenizer, dtype=config.dtype)
    folder = RunFolder(out_of(config), config, world, tokenizer, export)
    folder.open()
    model = place_model(config, shape, world, partial(first_weights, config))
    add_dropout(model, config.dropout)
    trainer = Trainer(model, config, n_steps=n_steps, world=world)
    loader = Loader(
        sets,
        **loader_settings(config),
        rows_per_step=config.batch_size,
        micro_batch_size=micro_batch,
        rank=world.dp_rank,
        n_ranks=world.dp,
    )
    run = Run(
        config,
        world,
        folder,
        trainer,
        loader,
        judges_of(
            config, trainer, next_token_loss, {"held-out": held_out} if held_out else {}, micro_batch_size=micro_batch
        ),
        next_token_loss,
        row_tokens=config.sequence_length,
        per_epoch=sum(each.n_targets for each in sets),
        sample=samples_of(config),
        sample_every=config.sample_every,
    )
    run.resume()
    return run.to_the_end()


def steps_of(config: PretrainConfig, sets: list[Shards]) -> int:
    """Return the steps of n_epochs passes over the data, by how full the first rows are."""
    sizes = np.concatenate([each.lengths for each in sets]).astype(np.int64) - 1
    if config.packing:
        sample = Loader(sets, **loader_settings(config), rows_per_step=1, micro_batch_size=1)
        sample.step()
        n_rows = sizes.sum() / (sample.fullness * config.sequence_length)
    else:
        n_rows = (-(-sizes // config.sequence_length)).sum()
    return math.ceil(config.n_epochs * float(n_rows) / config.batch_size)


def loader_settings(config: PretrainConfig) -> dict[str, Any]:
    return dict(
        weights=config.weights or None,
        sequence_length=config.sequence_length,
        packing=config.packing,
        seed=config.seed,
    )


def out_of(config: RunConfig) -> Path:
    if config.out is None:
        raise ConfigError("where to? name a folder for the run with --out")
    return config.out


def open_data(config: PretrainConfig) -> tuple[list[Shards], Shards | None]:
    """Open what to train on and what to judge by, all of one tokenizer."""
    if not config.data:
        raise ConfigError("what to train on? name token shards with --data; llama2 prepare makes them")
    sets = [open_shards(folder) for folder in config.data]
    beside = config.data[0] / "heldout"
    place = config.eval_data or (beside if (beside / INDEX).exists() else None)
    held_out = open_shards(place) if place else None
    for each in [*sets, *([held_out] if held_out else [])]:
        if each.tokenizer_sha256 != sets[0].tokenizer_sha256:
            raise DataError(
                f"{each.folder} was made with another tokenizer than {sets[0].folder}; prepare it with the same"
            )
    if config.early_stop and held_out is None:
        raise ConfigError("early_stop needs something to judge by; give eval_data, or prepare with --heldout-share")
    return sets, held_out


def model_shape(config: PretrainConfig, data: Shards) -> ModelConfig:
    """Return the shape to train, which must fit the data."""
    if config.init_from is not None:
        place = hub.resolve(config.init_from)
        check_same_tokenizer(place, data)
        old = store.read_config(place)
        shape = replace(old, **config.stretched(old))
    else:
        shape = config.fresh_model(data.n_vocab)
    if shape.vocab_size < data.n_vocab:
        raise DataError(
            f"{data.folder} has {data.n_vocab} token ids, the model vocab_size={shape.vocab_size}: its tokenizer is "
            "not the model's; prepare the data with the model's own"
        )
    if config.sequence_length > shape.context_length:
        raise ConfigError(
            f"sequence_length={config.sequence_length} is beyond the model's context_length={shape.context_length}"
        )
    return shape


def check_same_tokenizer(checkpoint: str | Path, data: Shards) -> None:
    """Raise DataError if the checkpoint has a tokenizer beside it that gives ids another meaning than the data's."""
    try:
        theirs = load_tokenizer(checkpoint).vocabulary.pieces
    except TokenizerError:
        return
    ours = data.tokenizer().vocabulary.pieces
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            raise DataError(
                f"{data.folder} was made with another tokenizer than {checkpoint} has: id {number} is {one!r} in the "
                f"data and {other!r} in the model; prepare the data with the model's own"
            )


def first_weights(config: PretrainConfig, model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield what training begins with: fresh values, or a checkpoint's."""
    if config.init_from is None:
        yield from fresh_weights(model, seed=config.seed, std=config.init_std)
        return
    checkpoint = store.read(hub.resolve(config.init_from))
    for name, _ in model.named_parameters():
        yield name, checkpoint.tensors[name]()
