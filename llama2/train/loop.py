"""The step that every kind of training shares: accumulate, divide once, clip, watch, update.

    losses and counts are sums, over micro-batches here and over ranks at the end of the step:

        gradient = d(sum of losses) / (sum of counts)

so neither accumulation nor the number of ranks nor an all-masked micro-batch changes what is learnt.
The Trainer knows no data, no files and no screen; the command's own loop says what happens and when.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2.checkpoint.resume import SavedState
from llama2.errors import ConfigError
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World
from llama2.parallel.region import Held, held
from llama2.parallel.shard import forget_gathered, synchronise_gradients
from llama2.train.adam8bit import Average
from llama2.train.config import RunConfig
from llama2.train.guard import Guard
from llama2.train.optim import MasterWeights, learning_rate, make_optimizers

LossFn = Callable[[Transformer, Any], tuple[Tensor, int, dict[str, float]]]
"""Gives the sum of losses of a micro-batch, the count of what is trained, and sums of other measures by name.

The names are the same for every batch.
"""


class Micro(Protocol):
    """A micro-batch, of whatever kind the loss function takes."""

    def to(self, device: torch.device | str) -> "Micro": ...


class Sums:
    """Adds up what a loss function returns."""

    def __init__(self):
        self.loss, self.count = 0.0, 0
        self.metrics: dict[str, float] = {}

    def add(self, loss: float, count: int, metrics: Mapping[str, float]) -> None:
        self.loss, self.count = self.loss + loss, self.count + count
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value

    def over(self, world: World) -> tuple[float, int, dict[str, float]]:
        """Return the sums over all ranks."""
        loss, count, *rest = world.sum([self.loss, self.count, *self.metrics.values()])
        return loss, round(count), dict(zip(self.metrics, rest, strict=True))


@dataclass(frozen=True)
class Step:
    """What one optimizer step was."""

    step: int
    """Counted from 1."""
    loss: float
    """Per trained token (pair, answer), over all ranks."""
    count: int
    """Trained tokens (pairs, answers), over all ranks."""
    grad_norm: float
    learning_rate: float
    metrics: dict[str, float]
    """What else the loss function told, per trained token (pair, answer), over all ranks."""
    skipped: str
    """Why nothing was learnt from it; empty if all went well."""
    is_stopped: bool
    """A rank was asked to stop."""


class Trainer:
    """Model, optimizers, schedule and step counter."""

    def __init__(
        self,
        model: Transformer,
        config: RunConfig,
        *,
        n_steps: int,
        world: World = World(),
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ):
        """lr_scale: by how much the learning rate of a weight, told by its name, differs from the schedule's."""
        self.model, self.config, self.n_steps, self.world = model, config, n_steps, world
        if config.optimizer == "muon" and world.tp > 1:
            raise ConfigError(f"optimizer=muon needs the whole gradient, and tensor_parallel={world.tp}; use adamw")
        separate = config.dtype == "bfloat16" and config.master_weights and world.dp == 1
        self.masters = MasterWeights(model, separate=separate)
        self.optimizers = make_optimizers(self.masters.weights, config, lr_scale, self.masters.model_weights)
        self.guard = Guard(config.outlier_sigma)
        self.averaged: dict[str, Tensor] = {}
        if config.ema_decay:
            self.averaged = {name: weight.detach().clone() for name, weight in self.masters.weights.items()}
        self.n_done = self.n_tokens = 0

    def step(self, batches: Sequence[Micro], loss_fn: LossFn, *, stop: bool = False) -> Step:
        """Learn from the micro-batches of one step. stop: this rank was asked to stop; all ranks get to know."""
        self.model.train()
        # What is random in a step (dropout, noise) follows from its number, so that resuming needs no random state.
        # Ranks that share the matrices hold the same activations, and must draw the same numbers.
        torch.manual_seed((self.config.seed * 1_000_003 + self.n_done) * self.world.dp + self.world.dp_rank)
        sums = Sums()
        for number, batch in enumerate(batches):
            synchronise_gradients(self.model, number == len(batches) - 1)
            loss, n, metrics = loss_fn(self.model, batch.to(self.world.device))
            loss.backward()
            self.masters.gather_gradients()
            sums.add(float(loss.detach()), n, metrics)
        loss_sum, count, metrics = sums.over(self.world)
        lr = learning_rate(self.n_done, self.n_steps, self.config)
        mean, norm, skipped = 0.0, 0.0, "nothing in it is trained"
        if count:
            mean = loss_sum / count
            norm = self.masters.gradient_norm() / count
            skipped = self.guard.judge(mean, norm)
        if not skipped:
            self._update(count, norm, lr)
        self.masters.clear_gradients()
        self.n_done += 1
        self.n_tokens += count
        metrics = {name: value / max(1, count) for name, value in metrics.items()}
        return Step(self.n_done, mean, count, norm, lr, metrics, skipped, self.world.any(stop))

    def _update(self, count: int, norm: float, lr: float) -> None:
        limit = self.config.max_grad_norm
        clip = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        self.masters.scale_gradients(clip / count)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            optimizer.step()
        self.masters.publish()
        if self.averaged:
            with torch.no_grad():
                weights = [self.masters.weights[name].detach() for name in self.averaged]
                # A short run must not remember its random beginning: the average is at most as long as the run.
                decay = min(self.config.ema_decay, (1 + self.n_done) / (10 + self.n_done))
                torch._foreach_lerp_(list(self.averaged.values()), weights, 1 - decay)

    @contextmanager
    def as_published(self) -> Iterator[None]:
        """Within this the model has the weights that will be published: their averages, where those are kept."""
        if not self.averaged:
            yield
            return
        kept = {name: weight.detach().clone() for name, weight in self.masters.weights.items()}
        try:
            self._set(self.averaged)
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, weights: Mapping[str, Tensor]) -> None:
        torch._foreach_copy_([self.masters.weights[name] for name in weights], list(weights.values()))
        self.masters.publish()
        forget_gathered(self.model)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Micro], loss_fn: LossFn) -> tuple[float, int, dict[str, float]]:
        """Return the sum of losses over these batches, the count, and the sums of metrics, over all ranks."""
        self.model.eval()
        sums = Sums()
        for batch in batches:
            loss, n, metrics = loss_fn(self.model, batch.to(self.world.device))
            sums.add(float(loss), n, metrics)
        return sums.over(self.world)

    def load(self, saved: SavedState, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was written."""
        self._make_room()
        rounded: list[tuple[Average, Tensor]] = []
        saved.load(self.tensors(rounded))
        for average, values in rounded:
            average.write(values)
        self.state = state

    def tensors(self, rounded: list[tuple[Average, Tensor]] | None = None) -> dict[str, Held]:
        """Return everything that must be saved to go on exactly, by name: weights, averages, optimizer state.

        rounded: is given the 8-bit averages, each with its numbers, which are a copy.
        """
        kinds = {"weights": self.masters.weights, "averaged": self.averaged}
        found = {f"{kind}/{name}": each for kind, those in kinds.items() for name, each in those.items()}
        names = {id(weight): name for name, weight in self.masters.weights.items()}
        for optimizer in self.optimizers:
            for weight, state in optimizer.state.items():
                for key, value in state.items():
                    plain = value.read() if isinstance(value, Average) else value
                    found[f"optimizer {key}/{names[id(weight)]}"] = plain
                    if rounded is not None and isinstance(value, Average):
                        rounded.append((value, plain))
        like = self.masters.model_weights
        return {name: held(each, like[name.split("/", 1)[1]], self.world) for name, each in found.items()}

    def _make_room(self) -> None:
        """Create the optimizers' state, empty, so that `tensors` has all its names before the first step."""
        for weight in self.masters.weights.values():
            weight.grad = torch.zeros_like(weight)
        for optimizer in self.optimizers:
            rates = [(group, group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            for group, _, _ in rates:
                group["lr"] = group["weight_decay"] = 0.0
            optimizer.step()
            for group, lr, weight_decay in rates:
                group["lr"], group["weight_decay"] = lr, weight_decay
        self.masters.clear_gradients()

    @property
    def state(self) -> dict[str, Any]:
        """The plain numbers beside the tensors."""
        return {"n_done": self.n_done, "n_tokens": self.n_tokens, "guard": self.guard.state}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.n_done, self.n_tokens, self.guard.state = state["n_done"], state["n_tokens"], state["guard"]
        self.masters.publish()
        forget_gathered(self.model)
