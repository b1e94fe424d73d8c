"""Pretraining: shards in, a Llama out. `pretrain` reads from top to bottom as what happens.

Llama 2, arXiv:2307.09288 sec. 2: next-token prediction, AdamW, cosine schedule, clipping.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2.checkpoint import hub, store
from llama2.data.batch import IGNORE, Batch
from llama2.data.loader import Loader, in_order
from llama2.data.shards import INDEX, Shards, open_shards
from llama2.errors import CheckpointError, ConfigError, DataError, TokenizerError, TrainingError
from llama2.llm import LLM
from llama2.model.config import ModelConfig, config_fields
from llama2.model.losses import next_token_loss
from llama2.model.transformer import Transformer, fresh_weights
from llama2.parallel.mesh import World, start
from llama2.parallel.region import fill
from llama2.parallel.shard import parallelize
from llama2.tokenizer.formats import load_tokenizer
from llama2.train.config import PretrainConfig
from llama2.train.loop import Step, Trainer
from llama2.train.metrics import Log, memory_bytes, peak_flops
from llama2.train.report import write_report
from llama2.train.run import RunFolder, set_random_states

MAX_REWINDS = 3
SECONDS_TO_ASK_AGAIN = 2.0

KEPT = (
    "sequence_length", "batch_size", "packing", "seed", "weights", "optimizer", "adam_beta1", "adam_beta2",
    "ema_decay", "dtype", "master_weights",
)  # fmt: skip
"""Settings that a run cannot change on its way and still be the same run."""


@dataclass(frozen=True)
class Evaluation:
    """How well held-out text is predicted."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """The same per UTF-8 byte of text, comparable between tokenizers."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this vocabulary."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    model: Path | None
    """The trained model's folder; None if the run was stopped before its end."""
    n_steps: int
    evaluation: Evaluation | None
    stopped_by: int
    """The signal that stopped it, 0 if none did."""


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
    folder = RunFolder(out_of(config), config, world, shape, sets[0].tokenizer())
    folder.open()
    model = place_model(config, shape, world)
    trainer = Trainer(model, config, n_steps=n_steps, world=world)
    loader = Loader(
        sets,
        **loader_settings(config),
        rows_per_step=config.batch_size,
        micro_batch_size=micro_batch,
        rank=world.dp_rank,
        n_ranks=world.dp,
    )
    run = Run(config, world, folder, trainer, loader, sets, held_out, micro_batch)
    run.resume()
    return run.to_the_end()


def steps_of(config: PretrainConfig, sets: list[Shards]) -> int:
    """Return the steps of n_epochs passes over the data, by how full the first rows are."""
    sizes = np.concatenate([each.lengths for each in sets]).astype(np.int64) - 1
    if config.packing:
        sample = Loader(sets, **loader_settings(config), rows_per_step=512, micro_batch_size=512).step()[0]
        n_rows = sizes.sum() / sample.n_targets * len(sample.tokens)
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


def out_of(config: PretrainConfig) -> Path:
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


def place_model(config: PretrainConfig, shape: ModelConfig, world: World) -> Transformer:
    """Return the model with its weights, split over the processes; a whole weight exists only one at a time."""
    compute = getattr(torch, config.dtype)
    keeps_wide = world.dp > 1 and config.dtype == "bfloat16" and config.master_weights
    with torch.device("meta"):
        model = Transformer(shape).to(torch.float32 if keeps_wide else compute)
        whole = Transformer(shape)  # names and shapes, from before the model is split
    parallelize(
        model,
        world,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        compute_dtype=compute if keeps_wide else None,
    )
    model.to_empty(device=world.device)
    parameters = dict(model.named_parameters())
    for name, values in first_weights(config, whole):
        fill(parameters[name], values)
    return model


def first_weights(config: PretrainConfig, model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield what training begins with: fresh values, or a checkpoint's."""
    if config.init_from is None:
        yield from fresh_weights(model, seed=config.seed, std=config.init_std)
        return
    checkpoint = store.read(hub.resolve(config.init_from))
    for name, _ in model.named_parameters():
        yield name, checkpoint.tensors[name]()


class Run:
    """One run under way: what it holds together, and the loop."""

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        folder: RunFolder,
        trainer: Trainer,
        loader: Loader,
        sets: list[Shards],
        held_out: Shards | None,
        micro_batch: int,
    ):
        self.config, self.world, self.folder, self.trainer, self.loader = config, world, folder, trainer, loader
        self.sets, self.held_out, self.micro_batch = sets, held_out, micro_batch
        self.shape = trainer.model.config
        self.n_worse = self.n_rewinds = 0
        self.evaluation: Evaluation | None = None
        self.best: Evaluation | None = None
        self.signal = 0

    @property
    def epoch(self) -> float:
        """Passes over the data so far, by tokens trained."""
        return self.trainer.n_tokens / sum(each.n_tokens - len(each) for each in self.sets)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one and resume is set; then open the log."""
        newest = self.folder.newest() if self.config.resume else None
        if newest is not None:
            self.go_back_to(newest, with_data=True)
        self.folder.write_settings()
        n_done, config = self.trainer.n_done, self.config
        self.log = Log(
            self.folder.out, self.world, n_steps=self.trainer.n_steps, n_done=n_done, tensorboard=config.tensorboard
        )
        if newest is not None:
            self.log.write("resumed", n_done)
            self.log.say(f"resumed from {newest}, step {n_done}")
        parameters, tokens = self.shape.n_parameters, sum(each.n_tokens for each in self.sets)
        per_step = config.batch_size * config.sequence_length
        self.log.say(
            f"{parameters:,} parameters, {tokens:,} tokens of data, "
            f"{self.trainer.n_steps:,} steps of {per_step:,} tokens"
        )

    def go_back_to(self, checkpoint: Path, *, with_data: bool) -> None:
        """Load a checkpoint; the data goes back with it, or goes on from where it is."""
        saved, record = self.folder.read(checkpoint)
        self._check_same_run(checkpoint, record)
        self.trainer.make_room()
        saved.load(self.trainer.tensors())
        self.trainer.state = record["trainer"]
        self.best, self.n_worse = record["best"] and Evaluation(**record["best"]), record["n_worse"]
        if with_data:
            self.evaluation = record["evaluation"] and Evaluation(**record["evaluation"])
            self.loader.state = record["loader"]
            self.n_rewinds = record["n_rewinds"]
            set_random_states(record["random"])

    def _check_same_run(self, checkpoint: Path, record: dict[str, Any]) -> None:
        now, usual = self.config.model_dump(mode="json"), type(self.config)().model_dump(mode="json")
        for name in KEPT:
            before = record["settings"].get(name, usual[name])
            if before != now[name]:
                raise CheckpointError(
                    f"{checkpoint} was trained with {name}={before}, not {now[name]}; set it back, or begin a new run"
                )
        for name, value in json.loads(json.dumps(config_fields(self.shape))).items():
            if record["model"].get(name) != value:
                raise CheckpointError(
                    f"{checkpoint} is a model with {name}={record['model'].get(name)}, not {value}; set it back, or "
                    "begin a new run"
                )
        if record["data"] != self._data():
            raise CheckpointError(f"{checkpoint} was trained on other data; name the same shards, or begin a new run")

    def _data(self) -> list[list[Any]]:
        return [[each.tokenizer_sha256, len(each), each.n_tokens] for each in self.sets]

    def to_the_end(self) -> Outcome:
        """Train, and write what there is to show. Checkpoints and signals are seen to between steps."""
        if self.trainer.n_done >= self.trainer.n_steps and (self.folder.out / "model").exists():
            self.log.say(f"nothing to do: {self.folder.out} is at step {self.trainer.n_done} of {self.trainer.n_steps}")
            self.log.close()
            return Outcome(self.folder.out / "model", self.trainer.n_done, self.evaluation, 0)
        peak = peak_flops(self.world, getattr(torch, self.config.dtype)) if self.world.is_first else None
        try:
            with self._catching_signals(), self.world.together():
                is_whole = self._train(peak)
                self.folder.finish()
                return self._conclude() if is_whole else self._leave()
        finally:
            self.log.close()

    def _train(self, peak: float | None) -> bool:
        """Take all steps; return False if the run was asked to stop before."""
        trainer, config = self.trainer, self.config
        while trainer.n_done < trainer.n_steps:
            began = time.perf_counter()
            step = trainer.step(self.loader.step(), next_token_loss, stop=bool(self.signal))
            seconds = time.perf_counter() - began
            self._record(step, seconds, peak)
            self.folder.check()
            if trainer.guard.n_bad >= config.max_bad_steps:
                self._rewind(step)
                continue
            is_last = trainer.n_done == trainer.n_steps
            is_saving = is_last or step.is_stopped
            is_saving |= due(trainer.n_done, config.save_every) and not step.skipped  # never what a bad step left
            is_patient, best = True, self.best
            if self.held_out and (is_last or is_saving or due(trainer.n_done, config.eval_every)):
                is_patient = self._evaluate()
            if due(trainer.n_done, config.sample_every) and not is_last:
                self._sample(LLM(trainer.model, self.folder.tokenizer))
            is_best = self.best is not best and bool(config.early_stop)
            if is_saving or is_best or not is_patient:
                self._save()
            if not is_patient:
                self.log.say(f"stopped early: {self.n_worse} evaluations without a better loss")
                return True
            if step.is_stopped:
                return False
        return True

    def _record(self, step: Step, seconds: float, peak: float | None) -> None:
        rate = step.count / seconds
        mfu = rate * self.shape.flops_per_token(self.config.sequence_length) / peak if peak else None
        self.log.step(
            step.step,
            loss=step.loss,
            grad_norm=step.grad_norm,
            learning_rate=step.learning_rate,
            n_tokens=step.count,
            epoch=round(self.epoch, 4),
            tokens_per_s=round(rate, 1),
            mfu=None if mfu is None else round(mfu, 4),
            memory_bytes=memory_bytes(self.world),
            seconds=round(seconds, 4),
            **({"skipped": step.skipped} if step.skipped else {}),
        )
        if step.skipped:
            self.log.write("skipped", step.step, reason=step.skipped)
            self.log.say(f"step {step.step} is left out: {step.skipped}")

    def _rewind(self, step: Step) -> None:
        """Go back to the last checkpoint, and on with data that comes after the bad steps."""
        self.folder.finish()
        newest = self.folder.newest()
        if newest is None or self.n_rewinds == MAX_REWINDS:
            why = "there is no checkpoint to go back to" if newest is None else f"the run went back {MAX_REWINDS} times"
            raise TrainingError(
                f"{self.config.max_bad_steps} bad steps in a row up to step {step.step} ({step.skipped}), and {why}; "
                "try a lower learning_rate, more warmup_steps, or look at the data"
            )
        self.go_back_to(newest, with_data=False)
        self.trainer.guard.state["n_bad"] = 0
        self.n_rewinds += 1
        self.log.write("rewind", step.step, reason=f"back to step {self.trainer.n_done}")
        self.log.say(f"{self.config.max_bad_steps} bad steps in a row: back to {newest.name}; the data goes on")

    def _evaluate(self) -> bool:
        """Evaluate and log; return False if it is time to stop early."""
        with self.trainer.as_published():
            self.evaluation = evaluate(self.trainer, self.held_out, self.config, self.micro_batch)  # pyright: ignore[reportArgumentType]
        now, step = self.evaluation, self.trainer.n_done
        self.log.write("evaluation", step, loss=now.loss, perplexity=now.perplexity, bits_per_byte=now.bits_per_byte)
        self.log.say(
            f"step {step}: held-out loss {now.loss:.4f}, perplexity {now.perplexity:.2f}, "
            f"{now.bits_per_byte:.3f} bits per byte"
        )
        if self.best is None or now.loss < self.best.loss:
            self.best, self.n_worse = now, 0
        else:
            self.n_worse += 1
        return not self.config.early_stop or self.n_worse < self.config.early_stop

    def _save(self) -> None:
        evaluated = self.evaluation.loss if self.evaluation else None
        record = {
            "step": self.trainer.n_done,
            "eval_loss": evaluated,
            "best": self.best and asdict(self.best),
            "n_worse": self.n_worse,
            "n_rewinds": self.n_rewinds,
            "trainer": self.trainer.state,
            "loader": self.loader.state,
            "evaluation": self.evaluation and asdict(self.evaluation),
            "data": self._data(),
            "model": config_fields(self.shape),
        }
        self.folder.save(self.trainer.n_done, self.trainer.tensors(), record)

    def _leave(self) -> Outcome:
        """Say where a stopped run stands, once the checkpoint of all ranks is whole."""
        self.world.barrier()
        self.log.write("stopped", self.trainer.n_done, reason=f"signal {self.signal}")
        self.log.say(f"stopped at step {self.trainer.n_done}; {self.folder.newest()} is saved: go on with --resume")
        return Outcome(None, self.trainer.n_done, self.evaluation, self.signal or signal.SIGTERM)

    def _conclude(self) -> Outcome:
        """Publish the model and write samples and the report."""
        self.world.barrier()
        model = self.folder.out / "model"
        if self.config.early_stop:
            self.evaluation = self.best
        if self.world.is_first:
            newest, best = self.folder.newest(), self.folder.best()
            chosen = best if self.config.early_stop and best else newest
            assert chosen is not None
            self.folder.publish(chosen)
            self._sample(load_llm(model, self.folder))
            page = write_report(
                self.folder.out, title=f"Run {self.folder.out.name}", facts=self._facts(chosen),
                settings=(self.folder.out / "run.toml").read_text(encoding="utf-8"),
            )  # fmt: skip
            self.log.say(f"wrote {model} and {page}")
        self.world.barrier()
        return Outcome(model, self.trainer.n_done, self.evaluation, 0)

    def _facts(self, chosen: Path) -> dict[str, str]:
        facts = {
            "model": f"{self.shape.n_parameters:,} parameters, from {chosen.name}",
            "trained on": f"{self.trainer.n_tokens:,} tokens in {self.trainer.n_done:,} steps",
            "passes over the data": f"{self.epoch:.2f}",
        }
        if self.evaluation:
            now = self.evaluation
            facts["held-out loss"] = f"{now.loss:.4f} nats per token"
            facts["perplexity"] = f"{now.perplexity:.3f}"
            facts["bits per byte"] = f"{now.bits_per_byte:.4f}"
        return facts

    def _sample(self, llm: LLM) -> None:
        """Write a sample text for each prompt; with several processes only the finished model writes."""
        if not self.world.is_first or (self.world.size > 1 and llm.model is self.trainer.model):
            return
        llm.model.eval()
        room = self.shape.context_length
        for prompt in self.config.sample_prompts:
            n = min(self.config.sample_tokens, room - len(llm.prompt_ids(prompt)))
            text = llm.generate(prompt, max_new_tokens=max(1, n), temperature=0.8, top_p=1.0, seed=self.config.seed)
            self.log.write("sample", self.trainer.n_done, prompt=prompt, text=text)
            self.log.say("sample: " + "".join(c if c.isprintable() else " " for c in prompt + text))

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Let SIGTERM and Ctrl-C end the run after the step under way.

        A launcher passes on what it gets, so one request may come twice; only one that comes seconds later, from
        somebody who will not wait, ends the run at once.
        """
        first = 0.0

        def catch(number: int, frame: object) -> None:
            nonlocal first
            if not self.signal:
                self.signal, first = number, time.monotonic()
                self.log.say("asked to stop: saving after this step; ask again to leave without")
            elif time.monotonic() - first > SECONDS_TO_ASK_AGAIN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def load_llm(model: Path, folder: RunFolder) -> LLM:
    return LLM(store.load(model, device="cpu"), folder.tokenizer)


def evaluate(trainer: Trainer, held_out: Shards, config: PretrainConfig, micro_batch: int) -> Evaluation:
    """Return how well the first eval_tokens of the held-out set are predicted, in whole documents."""
    totals = held_out.lengths.cumsum(dtype="int64")
    n = min(len(held_out), int((totals < config.eval_tokens).sum()) + 1)
    world = trainer.world
    batches = in_order(held_out, range(n), sequence_length=config.sequence_length, micro_batch_size=micro_batch)
    loss_sum, count = trainer.evaluate(_shared_out(batches, world), next_token_loss)
    return Evaluation(loss_sum / count, loss_sum / math.log(2) / max(1, int(held_out.n_bytes[:n].sum())))


def _shared_out(batches: Iterator[Batch], world: World) -> Iterator[Batch]:
    """Yield this rank's share; every rank gets equally many, the last ones with nothing to count."""
    while group := list(islice(batches, world.dp)):
        spare = replace(group[0], targets=torch.full_like(group[0].targets, IGNORE))
        yield group[world.dp_rank] if world.dp_rank < len(group) else spare
