"""What `llama2 finetune` can be told. Nothing here imports PyTorch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.config import TrainConfig, require

USUAL: dict[str, dict[str, Any]] = {
    "full": dict(learning_rate=2e-5, weight_decay=0.1),
    "lora": {},
    "qlora": dict(dtype="bfloat16", optimizer="adamw8bit"),
}
"""Where the method decides and nothing else is said: arXiv:2307.09288 sec. 3.1 for full, arXiv:2305.14314 for QLoRA."""

OF_ADAPTERS = (
    "lora_r", "lora_alpha", "lora_dropout", "target_modules", "trained_modules", "rslora", "dora", "lora_b_lr_ratio",
    "trained_modules_lr",
)  # fmt: skip
LONGEST_ROW = 2048


class FinetuneConfig(TrainConfig):
    """What `llama2 finetune` can be told."""

    model: str = ""
    """The checkpoint to adapt: a folder, a file, a hub name, or an adapter's folder."""
    data: tuple[Path, ...] = ()
    """Files or folders of examples (jsonl, json, parquet, txt); on the command line --data for each."""
    data_format: str | None = None
    """How the records are to be read, e.g. alpaca; recognised by their keys if not given."""
    eval_data: Path | None = None
    """Examples to judge by; else eval_share of `data`."""
    eval_share: float = 0.02
    """Share of the examples that is set aside to judge by, where eval_data is not given; 0: none."""
    chat_format: str | None = None
    """llama2, llama3, template, or plain (no tags); by the checkpoint's own template if not given."""
    too_long: Literal["refuse", "split", "drop"] = "refuse"
    """What happens to an example that does not fit a row: split spreads it over several rows."""
    show: int = 0
    """Print so many examples first, what is trained and what is not."""

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
    neftune_alpha: float = 0.0
    """Noise on the embeddings while training (arXiv:2310.05914); 5 is usual, 0 none."""

    replay: tuple[Path, ...] = ()
    """Earlier data (token shards, or files of examples) to mix in, so that it is not forgotten."""
    replay_share: float = 0.1
    """Share of the tokens that come from `replay`."""
    replay_eval: Path | None = None
    """Earlier data to judge by; by default the heldout folder of the first of `replay`, if there is one."""

    sequence_length: int = 0
    """Tokens per row; 0: the model's context, at most 2,048."""
    n_epochs: float = 2.0
    """Passes over the data, where max_steps is not given."""
    sample_prompts: tuple[str, ...] = ()
    """Questions to answer as samples."""
    learning_rate: float = 2e-4
    """At the peak of the schedule; 2e-5 with full if not given."""
    weight_decay: float = 0.0
    """Of matrices; 0.1 with full if not given."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of weights and activations in the forward and backward pass; bfloat16 with qlora if not given."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit, AdamW with its two averages in 8 bits (arXiv:2110.02861), with qlora if not given."""

    @field_validator("replay", "target_modules", "trained_modules", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @property
    def is_adapter(self) -> bool:
        return self.method != "full"

    def settled(self) -> "FinetuneConfig":
        """Return the settings with what the method decides where nothing was said."""
        usual = USUAL[self.method]
        return self.model_copy(update={name: usual[name] for name in usual if name not in self.model_fields_set})

    def check(self) -> None:
        (self if self.sequence_length else self.model_copy(update={"sequence_length": 1}))._check_shared()
        require(bool(self.model), "model", repr(self.model), "which checkpoint? name a folder, a file or a hub name")
        for name in ("eval_share", "replay_share", "lora_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "wanted a share, from 0 to less than 1")
        for name in ("lora_alpha", "lora_b_lr_ratio"):
            require(getattr(self, name) > 0, name, getattr(self, name), "wanted more than 0")
        for name in ("neftune_alpha", "show"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "wanted 0 or more")
        require(self.lora_r >= 1, "lora_r", self.lora_r, "wanted at least 1")
        if self.is_adapter and self.optimizer == "muon":
            raise ConfigError("optimizer=muon is for whole matrices; an adapter is trained with adamw or adamw8bit")
        if self.is_adapter and self.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel={self.tensor_parallel} does not split adapters; leave it out: several processes then "
                "share the data and the weights (FSDP)"
            )
        if not self.is_adapter:
            self._refuse_given(OF_ADAPTERS, f"needs an adapter, not method={self.method}")
        if self.trained_modules_lr is not None:
            require(self.trained_modules_lr > 0, "trained_modules_lr", self.trained_modules_lr, "wanted more than 0")
            require(self.learning_rate > 0, "learning_rate", self.learning_rate, "trained_modules_lr is a share of it")
            if not self.trained_modules:
                raise ConfigError(f"trained_modules_lr={self.trained_modules_lr} needs trained_modules, e.g. output")
        if self.replay and not self.replay_share:
            raise ConfigError("replay_share=0 would leave the replay data unread; leave out one of them")
        if not self.replay:
            self._refuse_given(("replay_share", "replay_eval"), "needs replay, the earlier data")

    def _refuse_given(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value == type(self).model_fields[name].default, name, value, why)

    def _check_shared(self) -> None:
        super().check()
