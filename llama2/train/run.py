"""One run under way: steps, and between them evaluations, checkpoints, samples, signals and bad luck."""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llama2.checkpoint import store
from llama2.errors import CheckpointError, TrainingError
from llama2.llm import LLM
from llama2.model.config import config_fields
from llama2.parallel.mesh import World
from llama2.train.config import RunConfig
from llama2.train.evaluation import Evaluation, Judge
from llama2.train.folder import RunFolder, set_random_states
from llama2.train.loop import LossFn, Micro, Step, Trainer
from llama2.train.metrics import Log, memory_bytes, peak_flops
from llama2.train.report import write_report
from llama2.train.samples import Sample

MAX_REWINDS = 3
SECONDS_TO_ASK_AGAIN = 2.0


class Source(Protocol):
    """What a run learns from, step by step: rows of documents, pairs of answers, answers that it samples itself."""

    @property
    def n_read(self) -> int:
        """Tokens in the last step, of all ranks."""
        ...

    @property
    def said(self) -> str:
        """What is read, as people read it."""
        ...

    @property
    def identity(self) -> list[list[Any]]:
        """What is read, as a checkpoint remembers it."""
        ...

    @property
    def metrics(self) -> dict[str, float]:
        """What there is to say of the last step besides its loss."""
        ...

    @property
    def is_at_rest(self) -> bool:
        """Whether its state says all that is needed to go on exactly; else a checkpoint waits for a later step."""
        ...

    state: Any
    """Where the stream stands after the last step, as plain numbers for JSON; one that is given it goes on there."""

    def step(self) -> Sequence[Micro]:
        """Return this rank's micro-batches of the next step."""
        ...


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
        config: RunConfig,
        world: World,
        folder: RunFolder,
        trainer: Trainer,
        source: Source,
        judges: Mapping[str, Judge],
        loss_fn: LossFn,
        *,
        row_tokens: float,
        per_epoch: float,
        unit: str = "tokens",
        compares: bool = False,
        sample: Sample | None = None,
        sample_every: int = 0,
        chat_format: str | None = None,
        plots: Mapping[str, str] | None = None,
    ):
        """judges: evaluate the model, by name; the first one decides what is best and when to stop early.

        row_tokens: length of a row, about. per_epoch: how many of the `unit`, what the loss counts, are trained in one
        pass over the data. compares: also judge before the first step. sample: lets the model show what it can, at
        the end and every sample_every steps. plots: what else of the log is worth a plot, with titles.
        """
        self.config, self.world, self.folder, self.trainer, self.source = config, world, folder, trainer, source
        self.judges, self.loss_fn, self.row_tokens = judges, loss_fn, row_tokens
        self.per_epoch, self.unit, self.compares = per_epoch, unit, compares
        self.sample, self.sample_every = sample, sample_every
        self.chat_format, self.plots = chat_format, plots or {}
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
        """Passes over the data so far, by what was trained."""
        return self.trainer.n_tokens / self.per_epoch

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
        some = "" if self.trained_share == 1 else f" ({self.trained_share:.2%} trained)"
        self.log.say(
            f"{self.shape.n_parameters:,} parameters{some}, {self.source.said}, "
            f"{self.trainer.n_steps:,} steps of {self.step_size}"
        )

    @property
    def step_size(self) -> str:
        if self.unit == "tokens":
            return f"{round(self.config.batch_size * self.row_tokens):,} tokens"
        return f"{self.config.batch_size:,} {self.unit}"

    def go_back_to(self, checkpoint: Path, *, with_data: bool) -> None:
        """Load a checkpoint; the data goes back with it, or goes on from where it is."""
        saved, record = self.folder.read(checkpoint)
        self._check_same_run(checkpoint, record)
        self.trainer.load(saved, record["trainer"])
        self.best, self.n_worse = record["best"] and Evaluation(**record["best"]), record["n_worse"]
        if with_data:
            for evaluations, name in ((self.before, "before"), (self.now, "now")):
                evaluations |= {of: Evaluation(**values) for of, values in record[name].items()}
            self.source.state = record["loader"]
            self.n_rewinds = record["n_rewinds"]
            set_random_states(record["random"])

    def _check_same_run(self, checkpoint: Path, record: dict[str, Any]) -> None:
        config = self.folder.config
        now, usual = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
        for name in config.KEPT:
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
        if record["data"] != self.source.identity:
            raise CheckpointError(f"{checkpoint} was trained on other data; name the same, or begin a new run")

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
        is_stopping = False
        while trainer.n_done < trainer.n_steps:
            began = time.perf_counter()
            step = trainer.step(self.source.step(), self.loss_fn, stop=bool(self.signal))
            seconds = time.perf_counter() - began
            self._record(step, seconds, peak)
            self.folder.check()
            if trainer.guard.n_bad >= config.max_bad_steps:
                self._rewind(step)
                continue
            is_last = trainer.n_done == trainer.n_steps
            is_stopping |= step.is_stopped
            is_saving = is_last or is_stopping
            is_saving |= due(trainer.n_done, config.save_every) and not step.skipped  # never what a bad step left
            if not self.source.is_at_rest:
                continue
            is_patient, best = True, self.best
            if self.judges and (is_saving or due(trainer.n_done, config.eval_every)):
                is_patient = self._evaluate()
            if due(trainer.n_done, self.sample_every) and not is_last:
                self._sample(LLM(trainer.model, self.folder.tokenizer, chat_format=self.chat_format))
            is_best = self.best is not best and bool(config.early_stop)
            if is_saving or is_best or not is_patient:
                self._save()
            if not is_patient:
                self.log.say(f"stopped early: {self.n_worse} evaluations without a better loss")
                return True
            if is_stopping:
                return False
        return True

    def _record(self, step: Step, seconds: float, peak: float | None) -> None:
        rate = self.source.n_read / seconds
        # A third of the arithmetic is the gradients of weights, which frozen ones do without.
        flops = self.shape.flops_per_token(round(self.row_tokens)) * (2 + self.trained_share) / 3
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
            **{name: float(f"{value:.6g}") for name, value in {**self.source.metrics, **step.metrics}.items()},
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
        for name, judge in self.judges.items():
            found = self.now[name] = judge()
            self.log.write("evaluation", step, of=name, loss=found.loss, **found.values)
            self.log.say(f"step {step}: {name} {found.said()}")
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
            "loader": self.source.state,
            "evaluation": self.evaluation and asdict(self.evaluation),
            "now": {name: asdict(each) for name, each in self.now.items()},
            "before": {name: asdict(each) for name, each in self.before.items()},
            "data": self.source.identity,
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
            if self.sample is not None:
                self._sample(LLM(store.load(model, device="cpu"), self.folder.tokenizer, chat_format=self.chat_format))
            page = write_report(
                self.folder.out, title=f"Run {self.folder.out.name}", facts=self._facts(chosen),
                settings=(self.folder.out / "run.toml").read_text(encoding="utf-8"), plots=self.plots,
            )  # fmt: skip
            self.log.say(f"wrote {model} and {page}")
        self.world.barrier()
        return Outcome(model, self.trainer.n_done, self.evaluation, 0)

    def _facts(self, chosen: Path) -> dict[str, str]:
        facts = {
            "model": f"{self.shape.n_parameters:,} parameters, from {chosen.name}",
            "trained on": f"{self.trainer.n_tokens:,} {self.unit} in {self.trainer.n_done:,} steps",
            "passes over the data": f"{self.epoch:.2f}",
        }
        for name, now in self.now.items():
            before = self.before.get(name)
            was = {"loss": before.loss, **before.values} if before else {}
            for measure, value in {"loss": now.loss, **now.values}.items():
                begun = f"{was[measure]:.4f} -> " if measure in was else ""
                facts[f"{name} {measure.replace('_', ' ')}"] = f"{begun}{value:.4f}"
        return facts

    def _sample(self, llm: LLM) -> None:
        """Write a sample text for each prompt; with several processes only the finished model writes."""
        if not self.world.is_first or (self.world.size > 1 and llm.model is self.trainer.model):
            return
        if self.sample is None:
            return
        llm.model.eval()
        for prompt, text in self.sample(llm):
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
