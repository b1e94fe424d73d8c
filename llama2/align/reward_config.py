"""What `llama2 reward` can be told. Nothing here imports PyTorch."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.config import RunConfig, at_least, require


class RewardConfig(RunConfig):
    """What `llama2 reward` can be told. Defaults are arXiv:2307.09288 sec. 3.2.2 where it says them."""

    KEPT: ClassVar[tuple[str, ...]] = (
        *RunConfig.KEPT, "model", "chat_format", "mix", "margin", "safety_weight", "sequence_length",
    )  # fmt: skip

    model: str = ""
    """The chat checkpoint to begin with: a folder, a file, a hub name; or a reward model's folder, to go on."""
    data: tuple[Path, ...] = ()
    """Files or folders of preference pairs; on the command line --data for each."""
    eval_data: Path | None = None
    """Pairs to judge by; else eval_share of `data`."""
    eval_share: float = 0.05
    """Share of the pairs that is set aside to judge by, where eval_data is not given; 0: none."""
    chat_format: str | None = None
    """llama2, llama3, template, or plain; by the checkpoint's own template if not given."""
    sequence_length: int = 0
    """Tokens of the longest side, its prompt included; 0: the model's context."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a pair that does not fit."""

    mix: Literal["all", "helpfulness", "safety"] = "all"
    """all pairs; helpfulness: those, and as many others at most; safety: those, and a tenth of others."""
    margin: Literal["none", "small", "large"] = "small"
    """By how much the better answer should win: 0; 1, 2/3, 1/3, 0; or 3, 2, 1, 0 for the four ratings."""
    safety_weight: float | None = None
    """Weight of the loss of a second head that tells safe answers from unsafe ones; 1 with mix=safety, else 0."""

    batch_size: int = 64
    """Pairs per optimizer step, over all micro-batches and processes; the paper has 512."""
    learning_rate: float = 1e-5
    """At the peak of the schedule."""
    warmup_share: float = 0.03
    """Share of the steps in which the learning rate rises from zero, at least 5 steps; warmup_steps goes before."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @property
    def weight_of_safety(self) -> float:
        return float(self.mix == "safety") if self.safety_weight is None else self.safety_weight

    def check(self) -> None:
        super().check()
        require(bool(self.model), "model", repr(self.model), "which checkpoint? name a folder, a file or a hub name")
        if not self.data:
            raise ConfigError("what to learn from? name files of preference pairs with --data")
        for name in ("eval_share", "warmup_share"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "wanted a share, from 0 to less than 1")
        for name in ("sequence_length", "safety_weight"):
            at_least(0, self, name)
        if self.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel={self.tensor_parallel} does not split reward models; leave it out: several processes "
                "then share the data and the weights (FSDP)"
            )
