"""What changing a finished checkpoint can be told: which one, all of it or an adapter beside it.

Nothing here imports PyTorch.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.config import RunConfig, require

OF_ADAPTERS = (
    "lora_r", "lora_alpha", "lora_dropout", "target_modules", "trained_modules", "rslora", "dora", "lora_b_lr_ratio",
    "trained_modules_lr",
)  # fmt: skip


class AdaptConfig(RunConfig):
    """What every run that begins with a checkpoint shares."""

    KEPT: ClassVar[tuple[str, ...]] = (
        *RunConfig.KEPT, "model", "chat_format", "method", "lora_r", "lora_alpha", "lora_dropout", "target_modules",
        "trained_modules", "rslora", "dora",
    )  # fmt: skip
    USUAL: ClassVar[dict[str, dict[str, Any]]] = {
        "full": dict(learning_rate=2e-5, weight_decay=0.1),
        "lora": {},
        "qlora": dict(dtype="bfloat16", optimizer="adamw8bit"),
    }
    """Where the method decides and nothing else is said: arXiv:2307.09288 sec. 3.1 for full, arXiv:2305.14314 for
    QLoRA."""

    model: str = ""
    """The checkpoint to adapt: a folder, a file, a hub name, or an adapter's folder."""
    chat_format: str | None = None
    """llama2, llama3, template, or plain (no tags); by the checkpoint's own template if not given."""

    method: Literal["full", "lora", "qlora"] = "lora"
    """full: all weights; lora: small matrices beside frozen ones; qlora: the frozen ones in 4 bits."""
    lora_r: int = 8
    """Rank of the adapter's matrices."""
    lora_alpha: float = 16.0
    """The adapter is scaled by alpha / r."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that is left out in training."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Which layers get an adapter: wq, wk, wv, wo, w1, w2, w3 (or Hugging Face's names)."""
    trained_modules: tuple[str, ...] = ()
    """tok_embeddings, output: trained whole beside the adapter, e.g. after llama2 extend-vocabulary."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    dora: bool = False
    """Learn the length of each row apart from its direction (arXiv:2402.09353)."""
    lora_b_lr_ratio: float = 1.0
    """Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv:2402.12354)."""
    trained_modules_lr: float | None = None
    """Learning rate of trained_modules; learning_rate if not given."""

    learning_rate: float = 2e-4
    """At the peak of the schedule; 2e-5 with full if not given."""
    weight_decay: float = 0.0
    """Of matrices; 0.1 with full if not given."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of weights and activations in the forward and backward pass; bfloat16 with qlora if not given."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit, AdamW with its two averages in 8 bits (arXiv:2110.02861), with qlora if not given. muon: for the
    matrices of the blocks, those of an adapter too; AdamW for the rest."""

    @field_validator("target_modules", "trained_modules", mode="before")
    @classmethod
    def _one_layer_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @property
    def is_adapter(self) -> bool:
        return self.method != "full"

    def settled(self) -> Self:
        """Return the settings with what the method decides where nothing was said."""
        usual = self.USUAL[self.method]
        return self.model_copy(update={name: usual[name] for name in usual if name not in self.model_fields_set})

    def check(self) -> None:
        super().check()
        require(bool(self.model), "model", repr(self.model), "which checkpoint? name a folder, a file or a hub name")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "wanted a share, from 0 to less than 1")
        for name in ("lora_alpha", "lora_b_lr_ratio"):
            require(getattr(self, name) > 0, name, getattr(self, name), "wanted more than 0")
        require(self.lora_r >= 1, "lora_r", self.lora_r, "wanted at least 1")
        if self.is_adapter and self.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel={self.tensor_parallel} does not split adapters; leave it out: several processes then "
                "share the data and the weights (FSDP)"
            )
        if not self.is_adapter:
            self.refuse_given(OF_ADAPTERS, f"needs an adapter, not method={self.method}")
        if self.trained_modules_lr is not None:
            require(self.trained_modules_lr > 0, "trained_modules_lr", self.trained_modules_lr, "wanted more than 0")
            require(self.learning_rate > 0, "learning_rate", self.learning_rate, "trained_modules_lr is a share of it")
            if not self.trained_modules:
                raise ConfigError(f"trained_modules_lr={self.trained_modules_lr} needs trained_modules, e.g. output")

    def refuse_given(self, names: tuple[str, ...], why: str) -> None:
        """Raise ConfigError for one of these settings that is not what it is by default."""
        for name in names:
            value = getattr(self, name)
            require(value == type(self).model_fields[name].default, name, value, why)
