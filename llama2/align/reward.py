"""Reward models: a chat checkpoint and pairs of answers in, a model that scores answers out.

    L = -ln sigmoid(r(x, y_w) - r(x, y_l) - m(rating)) + w BCE(safe(x, y), y is safe)      arXiv:2307.09288 sec. 3.2.2

The next-token projection gives way to a scalar head, read at the last token. The paper's two models are two runs of
this: mix=helpfulness and mix=safety. Its auxiliary loss is not spelled out there; here it is the binary cross-entropy
of a second head at the same place, over both answers of each pair whose safety is known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from llama2.align.losses import MARGINS, ranking_loss
from llama2.align.pair_data import open_pairs, steps_of
from llama2.align.reward_config import RewardConfig
from llama2.align.reward_report import write_accuracy
from llama2.checkpoint import hf, hub, store
from llama2.checkpoint.adapter import is_adapter
from llama2.checkpoint.resume import SavedState
from llama2.checkpoint.weights import Checkpoint, LazyTensor
from llama2.data.preferences.batch import PairBatch
from llama2.data.preferences.loader import PairLoader, in_order
from llama2.data.preferences.sets import PairSet
from llama2.errors import ConfigError
from llama2.llm import tokenizer_of
from llama2.model.config import ModelConfig
from llama2.model.heads import add_heads, at_ends, read_head, trunk_only
from llama2.model.losses import hidden_states
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World, start
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.adapt import merged
from llama2.train.evaluation import Evaluation, Judge
from llama2.train.folder import RunFolder
from llama2.train.loop import LossFn, Trainer
from llama2.train.place import place_model
from llama2.train.pretrain import out_of
from llama2.train.run import Outcome, Run

PLOTS = {"accuracy": "Pairs in the right order", "margin": "Reward of the chosen less that of the rejected"}


def train_reward(config: RewardConfig) -> Outcome:
    """Train a reward model. Raises Llama2Error before any long work for what cannot work."""
    config.check()
    world = start(device=config.device, timeout_s=config.timeout_s)
    base = hub.resolve(config.model)
    shape, tokenizer = trunk_only(store.read_config(base)), tokenizer_of(base)
    console = Console(stderr=True, highlight=False, quiet=not world.is_first)
    pairs, held_out = open_pairs(config, shape, tokenizer, console, mix=config.mix)
    if config.weight_of_safety and not (pairs.flags[:, 1:] >= 0).any():
        raise ConfigError(
            f"safety_weight={config.weight_of_safety:g}, but no pair says whether its answers are safe "
            "(chosen_is_safe, rejected_is_safe); add that, or set safety_weight to 0"
        )
    config, n_steps = steps_of(config, len(pairs))
    heads = ("score", "safety") if config.weight_of_safety else ("score",)
    export = partial(export_reward, shape=shape, tokenizer=tokenizer, dtype=config.dtype, kept=other_heads(base, heads))
    folder = RunFolder(out_of(config), config, world, tokenizer, export)
    folder.open()
    weights = partial(first_weights, base, heads)
    model = place_model(config, shape, world, weights, adapt=partial(with_heads, heads))
    trainer = Trainer(model, config, n_steps=n_steps, world=world)
    micro_batch = config.micro_batch(world.dp)
    loader = PairLoader(
        pairs,
        batch_size=config.batch_size,
        micro_batch_size=micro_batch,
        rank=world.dp_rank,
        n_ranks=world.dp,
        seed=config.seed,
    )
    loss_fn = reward_loss(config)
    run = Run(
        config,
        world,
        folder,
        trainer,
        loader,
        {"held-out": judge_pairs(trainer, loss_fn, held_out, micro_batch)} if held_out else {},
        loss_fn,
        row_tokens=pairs.n_tokens / len(pairs),
        per_epoch=len(pairs),
        unit="pairs",
        compares=held_out is not None,
        plots=PLOTS,
    )
    run.resume()
    outcome = run.to_the_end()
    if outcome.model is not None and held_out is not None and world.is_first:
        write_accuracy(outcome.model, held_out, console)
    return outcome


def with_heads(names: tuple[str, ...], model: Transformer) -> None:
    add_heads(model, *names)


def first_weights(base: Path, heads: tuple[str, ...], model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's weights, and heads: its own, or zeros, with which all answers are equal."""
    if is_adapter(base):
        checkpoint, weights = None, {name: partial(Tensor.detach, each) for name, each in merged(base).items()}
    else:
        checkpoint = store.read(base)
        weights = checkpoint.tensors
    for name, _ in model.named_parameters():
        if not name.startswith("heads."):
            yield name, weights[name]()
    for name in heads:
        known = checkpoint is not None and name in checkpoint.heads
        value = checkpoint.heads[name]() if known and checkpoint else torch.zeros(1, model.config.dim)
        yield f"heads.{name}.weight", value


def other_heads(base: Path, trained: tuple[str, ...]) -> dict[str, LazyTensor]:
    """Return a reward model's heads that are not trained on: they stay as they are."""
    known = {} if is_adapter(base) else store.read(base).heads
    return {name: read for name, read in known.items() if name not in trained}


def export_reward(
    saved: SavedState,
    kind: str,
    to: Path,
    *,
    shape: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
    kept: Mapping[str, LazyTensor],
) -> None:
    """Write saved weights, and the heads that were kept, as transformers' LlamaForSequenceClassification.

    See `checkpoint.hf`.
    """
    names = [name.removeprefix("weights/") for name in saved.shapes if name.startswith("weights/")]
    tensors = {name: partial(saved.read, f"{kind}/{name}") for name in names}
    heads = {name.split(".")[1]: tensors.pop(name) for name in names if name.startswith("heads.")}
    stored = dtype.replace("float64", "float32")
    hf.write(to, Checkpoint(shape, tensors, stored, to, heads={**heads, **kept}), tokenizer=tokenizer, dtype=stored)


def reward_loss(config: RewardConfig) -> LossFn:
    """Return the loss of a batch of pairs; a pair of number -1 does not count."""
    table, weight = torch.tensor([*MARGINS[config.margin][::-1], 0.0], dtype=torch.float64), config.weight_of_safety

    def loss_fn(model: Transformer, batch: PairBatch) -> tuple[Tensor, int, dict[str, float]]:
        ends = at_ends(hidden_states(model, batch.rows), batch.ends)[batch.sides]
        chosen, rejected = read_head(model, "score", ends).chunk(2)
        counts = batch.numbers >= 0
        margins = batch.margins + table.to(chosen.device)[batch.ratings]  # of an unknown rating, -1, the last: 0
        loss = ranking_loss(chosen, rejected, margins.to(chosen.dtype))
        gap = (chosen - rejected).detach()
        metrics = {
            "accuracy": float(((gap > 0) + 0.5 * (gap == 0))[counts].sum()),
            "margin": float(gap[counts].sum()),
        }
        if weight:
            is_safe = batch.flags[:, 1:].T.flatten()
            known = (is_safe >= 0) & counts.repeat(2)
            found = read_head(model, "safety", ends)
            right = F.binary_cross_entropy_with_logits(
                found, is_safe.clamp_min(0).to(found.dtype), reduction="none"
            ).masked_fill(~known, 0)
            loss = loss + weight * right.view(2, -1).sum(0)
        return loss[counts].sum(), int(counts.sum()), metrics

    return loss_fn


def judge_pairs(trainer: Trainer, loss_fn: LossFn, held_out: PairSet, micro_batch: int) -> Judge:
    """Return what judges the model by held-out pairs: the mean loss, and the mean of what else the loss tells."""

    def judge() -> Evaluation:
        with trainer.as_published():
            batches = shared_out(in_order(held_out, micro_batch), trainer.world)
            loss, count, sums = trainer.evaluate(batches, loss_fn)
        return Evaluation(loss / count, {name: value / count for name, value in sums.items()})

    return judge


def shared_out(batches: Iterator[PairBatch], world: World) -> Iterator[PairBatch]:
    """Yield this rank's share; every rank gets equally many, the last ones with pairs that do not count."""
    while group := list(islice(batches, world.dp)):
        spare = replace(group[0], numbers=torch.full_like(group[0].numbers, -1))
        yield group[world.dp_rank] if world.dp_rank < len(group) else spare
