"""The folder of a run: what is saved, when, and what is kept.

    OUT/
      run.toml                    the resolved settings
      log.jsonl                   one line per step, evaluation, sample and event
      checkpoints/step-00000100/  a Hugging Face folder that every command can read, and
                    state/        weights, averages and optimizer state, one file per rank
                    run.json      step, loader, random states, versions, settings
      model/                      the outcome, as a Hugging Face folder
      report.html, *.png          what happened

A checkpoint is written beside the running training and gets its name when it is whole: a kill at any moment
leaves the one before. Nothing in it is a pickle.
"""

import json
import os
import platform
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import Tensor

import llama2
from llama2.checkpoint import hf
from llama2.checkpoint.resume import Part, SavedState, flush, snapshot, write_parts
from llama2.checkpoint.weights import Checkpoint
from llama2.errors import CheckpointError, Llama2Error, TrainingError
from llama2.files.staging import make_parent
from llama2.model.config import ModelConfig
from llama2.parallel.mesh import World
from llama2.parallel.region import Held
from llama2.tokenizer.formats import save_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train.config import RunConfig

Export = Callable[[SavedState, str, Path], None]
"""Writes saved weights, "weights" or "averaged", into a new folder."""


class RunFolder:
    """Saves and finds checkpoints of one run."""

    def __init__(self, out: Path, config: RunConfig, world: World, tokenizer: Tokenizer, export: Export):
        """export: writes what others read (a model, an adapter) from saved state."""
        self.out, self.config, self.world = out, config, world
        self.tokenizer, self.export = tokenizer, export
        self.checkpoints = out / "checkpoints"
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None

    def open(self) -> None:
        """Make the folder, or take it over. Raises TrainingError where something is there and resume is not set."""
        error = None
        if self.world.is_first:
            try:
                self._take()
            except Llama2Error as problem:
                error = problem
        if self.world.any(error is not None):
            raise error or TrainingError("rank 0 cannot use the folder of the run; its own message says why")

    def _take(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise TrainingError(f"out={self.out} is a file; name a folder")
        if not self.config.resume and self.out.exists() and any(self.out.iterdir()):
            raise TrainingError(f"out={self.out} is not empty; add --resume to go on with it, or name a new folder")
        try:
            make_parent(self.checkpoints / "step")
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except OSError as error:
            raise TrainingError(f"out={self.out} cannot be written: {error.strerror}; name another") from error
        for old in self.checkpoints.glob(".old-step-*"):  # killed between two renames: the old one is whole
            target = old.with_name(old.name.removeprefix(".old-"))
            if not target.exists():
                os.replace(old, target)
        for partial in self.checkpoints.glob(".*step-*"):
            shutil.rmtree(partial)

    def write_settings(self) -> None:
        """Write run.toml."""
        if self.world.is_first:
            (self.out / "run.toml").write_text(tomli_w.dumps(plain(self.config)), encoding="utf-8")

    def newest(self) -> Path | None:
        """Return the last whole checkpoint."""
        found = sorted(self.checkpoints.glob("step-*"))
        return found[-1] if found else None

    def read(self, path: Path) -> tuple[SavedState, dict[str, Any]]:
        """Open a checkpoint: its tensors, and run.json."""
        try:
            return SavedState(path / "state"), json.loads((path / "run.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{path / 'run.json'} is broken: {error}; remove {path}, an older one is used"
            ) from error

    def save(self, step: int, tensors: Mapping[str, Held], state: Mapping[str, Any]) -> None:
        """Begin to save; returns as soon as everything is copied. `finish` waits for the end."""
        self.finish()
        parts = snapshot(tensors)
        record = {**state, "random": random_states(), "settings": plain(self.config), "versions": versions()}
        target = self.checkpoints / f"step-{step:08}"
        self._writing = threading.Thread(target=self._write, args=(target, parts, record), daemon=True)
        self._writing.start()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises TrainingError if it could not be."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
            self.world.barrier()  # only now every rank sees the same checkpoints
        self.check()

    def check(self) -> None:
        """Raise TrainingError if the last checkpoint could not be written."""
        if self._error is not None:
            error, self._error = self._error, None
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            newest = self.newest()
            kept = f"{newest} is whole: free some space and add --resume" if newest else "no earlier one exists"
            raise TrainingError(f"a checkpoint could not be written to {self.checkpoints}: {reason}; {kept}") from error

    def _write(self, target: Path, parts: Mapping[str, Part], record: Mapping[str, Any]) -> None:
        partial = target.with_name(f".{target.name}")
        try:
            write_parts(partial / "state", parts, self.world.rank)
            if self.world.is_first:
                self._complete(partial, record)
                old = target.with_name(f".old-{target.name}")
                if target.exists():  # a step that is done again, after going back
                    os.replace(target, old)
                os.replace(partial, target)
                shutil.rmtree(old, ignore_errors=True)
                self._forget()
        except Exception as error:
            self._error = error
            if self.world.size == 1:
                shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, partial: Path, record: Mapping[str, Any]) -> None:
        """Wait for the other ranks' parts, then write what is not a part."""
        deadline = time.monotonic() + self.config.timeout_s
        while len(list((partial / "state").glob("*.safetensors"))) < self.world.size:
            if time.monotonic() > deadline:
                raise TrainingError(f"the other processes did not write their parts in {self.config.timeout_s:g} s")
            time.sleep(0.02)
        kind = "averaged" if self.config.ema_decay else "weights"
        self.export(SavedState(partial / "state"), kind, partial / "model")
        for file in (partial / "model").iterdir():
            flush(file)
            os.replace(file, partial / file.name)
        (partial / "model").rmdir()
        (partial / "run.json").write_text(json.dumps(record, indent=1))
        flush(partial / "run.json")

    def _forget(self) -> None:
        """Remove all checkpoints but the last keep_last and the best."""
        found = sorted(self.checkpoints.glob("step-*"))
        best = self.best()
        for path in found[: -self.config.keep_last]:
            if path != best:
                hidden = path.rename(path.with_name(f".{path.name}"))
                shutil.rmtree(hidden)

    def best(self) -> Path | None:
        """Return the checkpoint of the lowest evaluation loss."""
        losses = {}
        for path in sorted(self.checkpoints.glob("step-*")):
            try:
                evaluation = json.loads((path / "run.json").read_text()).get("evaluation")
            except (OSError, json.JSONDecodeError):
                continue
            if evaluation is not None:
                losses[path] = evaluation["loss"]
        return min(losses, key=losses.__getitem__) if losses else None

    def publish(self, checkpoint: Path) -> Path:
        """Put the model of a checkpoint at OUT/model, without the training state."""
        target, partial = self.out / "model", self.out / ".model"
        for path in (partial, target):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns("state"))
        os.replace(partial, target)
        return target


def export_model(
    saved: SavedState, kind: str, to: Path, *, config: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> None:
    """Write saved weights ("weights" or "averaged") as a Hugging Face folder, tensor by tensor, but for heads."""

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: saved.read(f"{kind}/{name}")

    names = [name.removeprefix("weights/") for name in saved.shapes if name.startswith("weights/")]
    names = [name for name in names if not name.startswith("heads.")]
    stored = dtype.replace("float64", "float32")
    hf.write(
        to, Checkpoint(config, {name: reader(name) for name in names}, stored, to), tokenizer=tokenizer, dtype=stored
    )
    if tokenizer.vocabulary.kind == "spm":
        save_tokenizer(tokenizer, to, format="model")


def plain(config: RunConfig) -> dict[str, Any]:
    """Return the settings as TOML can hold them: no None."""
    return {name: value for name, value in config.model_dump(mode="json").items() if value is not None}


def random_states() -> dict[str, Any]:
    """Return every random state there is, as JSON can hold it."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, following = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), following],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Undo everything random since the states were taken."""
    torch.set_rng_state(_bytes(states["torch"]))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, internal, following = states["python"]
    random.setstate((version, tuple(internal), following))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def versions() -> dict[str, str]:
    """Return what the run ran on."""
    found = {"llama2": llama2.__version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        command = ["git", "-C", str(Path(llama2.__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return found
    return found | ({"git_commit": done.stdout.strip()} if done.returncode == 0 else {})
