"""What `llama2 dpo` can be told. Nothing here imports PyTorch."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.adapt_config import AdaptConfig
from llama2.train.config import at_least, require

PER_TOKEN = ("orpo", "simpo")
"""Losses of the mean log-probability per token, which need no reference."""


class DpoConfig(AdaptConfig):
    """What `llama2 dpo` can be told: learning from pairs of answers, or from labelled ones, without sampling."""

    KEPT: ClassVar[tuple[str, ...]] = (
        *AdaptConfig.KEPT, "loss", "beta", "label_smoothing", "gamma", "nll_weight", "desirable_weight",
        "undesirable_weight", "sequence_length",
    )  # fmt: skip
    USUAL: ClassVar[dict[str, dict[str, Any]]] = AdaptConfig.USUAL | {"full": dict(learning_rate=5e-7)}

    data: tuple[Path, ...] = ()
    """Files or folders of preference pairs, with kto also of labelled answers; on the command line --data for each."""
    eval_data: Path | None = None
    """Pairs (or labelled answers) to judge by; else eval_share of `data`."""
    eval_share: float = 0.05
    """Share of the data that is set aside to judge by, where eval_data is not given; 0: none."""
    sequence_length: int = 0
    """Tokens of the longest side, its prompt included; 0: the model's context."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a pair that does not fit."""

    loss: Literal["sigmoid", "ipo", "cdpo", "hinge", "kto", "orpo", "simpo"] = "sigmoid"
    """sigmoid: DPO (arXiv:2305.18290); cdpo: the same for labels some of which are wrong; ipo (arXiv:2310.12036);
    hinge: SLiC (arXiv:2305.10425); kto: good and bad answers (arXiv:2402.01306); orpo (arXiv:2403.07691) and simpo
    (arXiv:2405.14734): log-probabilities per token, without a reference."""
    beta: float | None = None
    """How much a difference of log-probabilities counts; 0.1, with simpo 2, if not given. A smaller one lets the model
    go farther from where it began; with orpo it is the weight of the odds ratio, lambda in the paper."""
    label_smoothing: float | None = None
    """With cdpo: the share of pairs whose order is taken to be wrong, less than a half; 0.1 if not given."""
    gamma: float | None = None
    """With simpo: by how much the chosen answer should win; half of beta if not given."""
    nll_weight: float = 0.0
    """Weight of the next-token loss of the chosen answer, per token, beside the loss; Llama 3 has 0.2
    (arXiv:2407.21783 sec. 4.1.4)."""
    desirable_weight: float = 1.0
    """With kto: weight of good answers."""
    undesirable_weight: float = 1.0
    """With kto: weight of bad answers; the paper wants desirable_weight times their number to be 1 to 4/3 of this times
    the number of bad ones."""

    batch_size: int = 32
    """Pairs per optimizer step, with kto answers, over all micro-batches and processes."""
    learning_rate: float = 5e-5
    """At the peak of the schedule; with full 5e-7, as in the DPO authors' own code, if not given (Llama 3: 1e-5)."""
    weight_decay: float = 0.0
    """Of matrices."""
    warmup_share: float = 0.1
    """Share of the steps in which the learning rate rises from zero, at least 5 steps; warmup_steps goes before."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @property
    def has_reference(self) -> bool:
        """Whether the loss looks at where the model began."""
        return self.loss not in PER_TOKEN

    def settled(self) -> Self:
        config = super().settled()
        beta = config.beta if config.beta is not None else 2.0 if config.loss == "simpo" else 0.1
        own = {"cdpo": {"label_smoothing": 0.1}, "simpo": {"gamma": 0.5 * beta}}.get(config.loss, {})
        return config.model_copy(
            update={"beta": beta, **{name: value for name, value in own.items() if getattr(config, name) is None}}
        )

    def check(self) -> None:
        super().check()
        if not self.data:
            raise ConfigError("what to learn from? name files of preference pairs with --data")
        for name in ("eval_share", "warmup_share"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "wanted a share, from 0 to less than 1")
        for name in ("sequence_length", "gamma", "nll_weight"):
            at_least(0, self, name)
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "wanted more than 0")
        smoothing = self.label_smoothing
        require(
            smoothing is None or 0 <= smoothing < 0.5, "label_smoothing", smoothing, "wanted from 0 to less than 0.5"
        )
        self._check_loss()
        if self.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel={self.tensor_parallel} is not for learning from preferences; leave it out: several "
                "processes then share the data and the weights (FSDP)"
            )

    def _check_loss(self) -> None:
        """Raise ConfigError for a setting that means nothing to the loss."""
        for name, loss in (("label_smoothing", "cdpo"), ("gamma", "simpo")):
            if self.loss != loss:
                self.refuse_given((name,), f"means something to loss={loss} only, not to {self.loss}")
        if self.loss != "kto":
            self.refuse_given(("desirable_weight", "undesirable_weight"), f"needs loss=kto, not {self.loss}")
        if self.loss == "kto":
            self.refuse_given(("nll_weight",), "kto has no pairs, so no chosen answer; leave it out")
            require(
                self.batch_size >= 2, "batch_size", self.batch_size,
                "kto compares good and bad answers and needs at least 2",
            )  # fmt: skip
        if self.loss == "orpo":
            self.refuse_given(("nll_weight",), "orpo holds that loss already, with the weight 1; leave it out")
