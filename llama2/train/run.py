"""One run under way: steps, and between them evaluations, checkpoints, samples, signals and bad luck."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llama2.checkpoint import store
from llama2.data.documents import Documents
from llama2.data.loader import Loader
from llama2.errors import CheckpointError, TrainingError
from llama2.llm import LLM, Prompt, SamplingOptions
from llama2.model.config import config_fields
from llama2.parallel.mesh import World
from llama2.train.config import TrainConfig
from llama2.train.evaluation import Evaluation, evaluate
from llama2.train.folder import RunFolder, set_random_states
from llama2.train.loop import LossFn, Step, Trainer
from llama2.train.metrics import Log, memory_bytes, peak_flops
from llama2.train.report import write_report

MAX_REWINDS = 3
SECONDS_TO_ASK_AGAIN = 2.0

KEPT = (
    "sequence_length", "batch_size", "packing", "seed", "weights", "optimizer", "adam_beta1", "adam_beta2",
    "ema_decay", "dtype", "master_weights", "method", "model", "lora_r", "lora_alpha", "lora_dropout", "target_modules",
    "trained_modules", "rslora", "dora", "neftune_alpha", "chat_format", "replay_share",
)  # fmt: skip
"""Settings that a run cannot change on its way and still be the same run; those that its command has."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    model: Path | None
    """The trained model's folder; None if the run was stopped before its end."""
    n_steps: int
    evaluation: Evaluation | None
    stopped_by: int
    """The signal that stopped it, 0 if none did."""


class Run:
    """One run under way: what it holds together, and the loop."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        folder: RunFolder,
        trainer: Trainer,
        loader: Loader,
        held_out: Mapping[str, Documents],
        loss_fn: LossFn,
        *,
        micro_batch: int,
        tokens_per_epoch: float,
        compares: bool = False,
        as_prompt: Callable[[str], Prompt] = str,
        chat_format: str | None = None,
    ):
        """held_out: sets to judge by, by name; the first one decides what is best and when to stop early.

        tokens_per_epoch: trained tokens in one pass over the data. compares: also judge before the first step.
        as_prompt: what a sample prompt is for the model, a text to continue or a conversation to answer.
        """
        self.config, self.world, self.folder, self.trainer, self.loader = config, world, folder, trainer, loader
        self.held_out, self.loss_fn, self.micro_batch = held_out, loss_fn, micro_batch
        self.tokens_per_epoch, self.compares = tokens_per_epoch, compares
        self.as_prompt, self.chat_format = as_prompt, chat_format
        self.shape = trainer.model.config
        trained = sum(each.numel() for each in trainer.masters.model_weights.values())
        self.trained_share = min(1.0, trained / self.shape.n_parameters)
        self.n_worse = self.n_rewinds = 0
        self.before: dict[str, Evaluation] = {}
        self.now: dict[str, Evaluation] = {}
        self.best: Evaluation | None = None
        self.signal = 0

    @property
    def epoch(self) -> float:
        """Passes over the data so far, by tokens trained."""
        return self.trainer.n_tokens / self.tokens_per_epoch

    @property
    def evaluation(self) -> Evaluation | None:
        """The newest on the set that decides."""
        return next(iter(self.now.values()), None)

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
        parameters, tokens = self.shape.n_parameters, sum(each.n_tokens for each in self.loader.sets)
        some = "" if self.trained_share == 1 else f" ({self.trained_share:.2%} trained)"
        per_step = config.batch_size * config.sequence_length
        self.log.say(
            f"{parameters:,} parameters{some}, {tokens:,} tokens of data, "
            f"{self.trainer.n_steps:,} steps of {per_step:,} tokens"
        )

    def go_back_to(self, checkpoint: Path, *, with_data: bool) -> None:
        """Load a checkpoint; the data goes back with it, or goes on from where it is."""
        saved, record = self.folder.read(checkpoint)
        self._check_same_run(checkpoint, record)
        self.trainer.load(saved, record["trainer"])
        self.best, self.n_worse = record["best"] and Evaluation(**record["best"]), record["n_worse"]
        if with_data:
            for evaluations, name in ((self.before, "before"), (self.now, "now")):
                evaluations |= {of: Evaluation(**values) for of, values in record[name].items()}
            self.loader.state = record["loader"]
            self.n_rewinds = record["n_rewinds"]
            set_random_states(record["random"])

    def _check_same_run(self, checkpoint: Path, record: dict[str, Any]) -> None:
        now, usual = self.config.model_dump(mode="json"), type(self.config)().model_dump(mode="json")
        for name in (name for name in KEPT if name in now):
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
        return [[each.tokenizer_sha256, len(each), each.n_tokens] for each in self.loader.sets]

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
        if self.compares and not trainer.n_done:
            self._evaluate()
            self.before = dict(self.now)
            self.best, self.n_worse = None, 0  # what there was before is no outcome of this run
        while trainer.n_done < trainer.n_steps:
            began = time.perf_counter()
            step = trainer.step(self.loader.step(), self.loss_fn, stop=bool(self.signal))
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
            if self.held_out and (is_saving or due(trainer.n_done, config.eval_every)):
                is_patient = self._evaluate()
            if due(trainer.n_done, config.sample_every) and not is_last:
                self._sample(LLM(trainer.model, self.folder.tokenizer, chat_format=self.chat_format))
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
        rate = self.loader.n_read / seconds
        # A third of the arithmetic is the gradients of weights, which frozen ones do without.
        flops = self.shape.flops_per_token(self.config.sequence_length) * (2 + self.trained_share) / 3
        mfu = rate * flops / peak if peak else None
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
        step = self.trainer.n_done
        for name, documents in self.held_out.items():
            found = self.now[name] = evaluate(
                self.trainer,
                self.loss_fn,
                documents,
                n_tokens=self.config.eval_tokens,
                sequence_length=self.config.sequence_length,
                micro_batch_size=self.micro_batch,
            )
            values = {"loss": found.loss, "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
            self.log.write("evaluation", step, of=name, **values)
            self.log.say(
                f"step {step}: {name} loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, "
                f"{found.bits_per_byte:.3f} bits per byte"
            )
        now = self.evaluation
        assert now is not None
        if self.best is None or now.loss < self.best.loss:
            self.best, self.n_worse = now, 0
        else:
            self.n_worse += 1
        return not self.config.early_stop or self.n_worse < self.config.early_stop

    def _save(self) -> None:
        record = {
            "step": self.trainer.n_done,
            "best": self.best and asdict(self.best),
            "n_worse": self.n_worse,
            "n_rewinds": self.n_rewinds,
            "trainer": self.trainer.state,
            "loader": self.loader.state,
            "evaluation": self.evaluation and asdict(self.evaluation),
            "now": {name: asdict(each) for name, each in self.now.items()},
            "before": {name: asdict(each) for name, each in self.before.items()},
            "data": self._data(),
            "model": config_fields(self.shape),
        }
        self.folder.save(self.trainer.n_done, self.trainer.tensors(), record)

    def _leave(self) -> Outcome:
        """Say where a stopped run stands."""
        self.log.write("stopped", self.trainer.n_done, reason=f"signal {self.signal}")
        self.log.say(f"stopped at step {self.trainer.n_done}; {self.folder.newest()} is saved: go on with --resume")
        return Outcome(None, self.trainer.n_done, self.evaluation, self.signal or signal.SIGTERM)

    def _conclude(self) -> Outcome:
        """Publish the model and write samples and the report."""
        model = self.folder.out / "model"
        if self.config.early_stop and self.best is not None:
            self.now[next(iter(self.now))] = self.best
        if self.world.is_first:
            newest, best = self.folder.newest(), self.folder.best()
            chosen = best if self.config.early_stop and best else newest
            assert chosen is not None
            self.folder.publish(chosen)
            if self.config.sample_prompts:
                self._sample(LLM(store.load(model, device="cpu"), self.folder.tokenizer, chat_format=self.chat_format))
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
        for name, now in self.now.items():
            was = f"{self.before[name].loss:.4f} -> " if name in self.before else ""
            facts[f"{name} loss"] = f"{was}{now.loss:.4f} nats per token"
            facts[f"{name} perplexity"] = f"{now.perplexity:.3f}"
            facts[f"{name} bits per byte"] = f"{now.bits_per_byte:.4f}"
        return facts

    def _sample(self, llm: LLM) -> None:
        """Write a sample text for each prompt; with several processes only the finished model writes."""
        if not self.world.is_first or (self.world.size > 1 and llm.model is self.trainer.model):
            return
        llm.model.eval()
        room = self.shape.context_length
        for prompt in self.config.sample_prompts:
            asked = self.as_prompt(prompt)
            n = min(self.config.sample_tokens, room - len(llm.prompt_ids(asked)))
            options = SamplingOptions(max_new_tokens=max(1, n), temperature=0.8, top_p=1.0, seed=self.config.seed)
            text = ("" if isinstance(asked, str) else " ") + llm.complete(asked, **options).text
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
