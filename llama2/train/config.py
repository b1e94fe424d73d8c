"""What a training run can be told: one flat model per command, each field with its unit.

    defaults < --config run.toml < --flag

Nothing here imports PyTorch, so that a wrong setting is refused at once.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from llama2.errors import ConfigError, did_you_mean
from llama2.model.config import ModelConfig, RopeScaling, ffn_width
from llama2.model.family import family_config


class RunConfig(BaseModel):
    """What every run shares, whatever it learns from: where, how long, how fast, what is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    KEPT: ClassVar[tuple[str, ...]] = (
        "batch_size", "seed", "optimizer", "adam_beta1", "adam_beta2", "ema_decay", "dtype", "master_weights",
    )  # fmt: skip
    """Settings that a run cannot change on its way and still be the same run."""

    out: Path | None = None
    """Folder of the run: checkpoints, log, plots, report."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`; begin where there is none yet."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""

    batch_size: int = 32
    """Rows per optimizer step, over all micro-batches and processes."""
    micro_batch_size: int | None = None
    """Rows per forward pass of one process; by default its whole share of the batch."""
    gradient_accumulation_steps: int | None = None
    """Another way to say micro_batch_size: forward passes per step and process."""

    max_steps: int | None = None
    """Optimizer steps; by default n_epochs passes over the data."""
    n_epochs: float = 1.0
    """Passes over the data, where max_steps is not given."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: AdamW with its two averages in 8 bits (arXiv:2110.02861). muon: for the matrices of the blocks
    (arXiv:2502.16982), AdamW for the rest, at the same learning_rate."""
    learning_rate: float = 3e-4
    """At the peak of the schedule."""
    lr_scheduler: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine to min_lr_share; wsd: constant, then down to it over the last decay_share of the steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from zero."""
    min_lr_share: float = 0.1
    """The last learning rate, as a share of the peak."""
    decay_share: float = 0.2
    """Share of the steps in which wsd decays."""
    weight_decay: float = 0.1
    """Of matrices; vectors (norms, biases) are not decayed."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients, per step."""
    adam_beta2: float = 0.95
    """Decay of the mean of squared gradients, per step."""
    adam_eps: float = 1e-5
    """Added to the root of the mean square, as Llama 2 has it."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    ema_decay: float = 0.0
    """Per step; above 0 the final model is the moving average of the weights."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of weights and activations in the forward and backward pass."""
    master_weights: bool = True
    """With bfloat16: keep the weights that the optimizer changes in float32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute activations again in the backward pass: all, or but the dear ones; slower, in less memory."""
    compile: bool = False
    """torch.compile each block; needs a C++ compiler."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    tensor_parallel: int = 1
    """Processes that share every matrix; the others split the data (FSDP)."""
    timeout_s: float = 600.0
    """How long a process waits for the others before it gives up, in seconds."""

    outlier_sigma: float = 8.0
    """Leave out a step whose loss or gradient norm is so many standard deviations above the last ones'; 0: none."""
    max_bad_steps: int = 5
    """So many bad steps in a row lead back to the last checkpoint; the data goes on."""

    eval_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    early_stop: int = 0
    """Stop after so many evaluations without a better loss; 0: never."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end and when stopped."""
    keep_last: int = 2
    """Checkpoints to keep besides the best."""
    tensorboard: bool = False
    """Also write events for TensorBoard (pip install 'llama2[train]')."""

    def check(self) -> None:
        """Raise ConfigError for a number out of range, or settings that exclude each other."""
        at_least_one = ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
        for name in (*at_least_one, "max_steps", "tensor_parallel", "max_bad_steps", "keep_last"):
            at_least(1, self, name)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "adam_eps", "outlier_sigma", "eval_every"):
            at_least(0, self, name)
        for name in ("early_stop", "save_every", "learning_rate"):
            at_least(0, self, name)
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "wanted from 0 to less than 1")
        for name in ("min_lr_share", "decay_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "wanted a share, from 0 to 1")
        if self.max_steps is not None and self.n_epochs != type(self).model_fields["n_epochs"].default:
            raise ConfigError(f"max_steps={self.max_steps} and n_epochs={self.n_epochs} say different things; give one")
        for name in ("n_epochs", "timeout_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "wanted more than 0")

    def micro_batch(self, n_ranks: int) -> int:
        """Return the rows of a forward pass for so many data ranks. Raises ConfigError if the batch does not split."""
        per_rank, left = divmod(self.batch_size, n_ranks)
        way_out = f"choose a batch_size that is a multiple of {n_ranks}"
        require(not left, "batch_size", self.batch_size, f"does not split over {n_ranks} data ranks: {way_out}")
        micro, steps = self.micro_batch_size, self.gradient_accumulation_steps
        if micro is not None and steps is not None and micro * steps != per_rank:
            raise ConfigError(
                f"micro_batch_size={micro} x gradient_accumulation_steps={steps} x {n_ranks} data ranks is not "
                f"batch_size={self.batch_size}; leave one of them out"
            )
        name, value = ("gradient_accumulation_steps", steps) if micro is None else ("micro_batch_size", micro)
        if value is not None:
            require(per_rank % value == 0, name, value, f"does not divide the {per_rank} rows of each rank")
        return micro or (per_rank // steps if steps else per_rank)


class TrainConfig(RunConfig):
    """What training on rows of tokens shares."""

    KEPT: ClassVar[tuple[str, ...]] = (*RunConfig.KEPT, "sequence_length", "packing", "weights", "dropout")

    data: tuple[Path, ...] = ()
    """What to train on; on the command line --data for each."""
    weights: tuple[float, ...] = ()
    """Share of tokens from each of `data`; by default in proportion to their size."""
    eval_data: Path | None = None
    """What to judge by, of the same kind as `data`."""
    sequence_length: int = 256
    """Tokens per row."""
    packing: bool = True
    """Put several short documents in a row; they do not see each other."""
    dropout: float = 0.0
    """Share of what embeddings, attention and feed-forward add that is zeroed in training: for many passes over little
    data; no Llama was trained with any."""
    eval_tokens: int = 100_000
    """How much of the held-out data each evaluation reads, in whole documents."""
    sample_every: int = 0
    """Steps between sample texts; 0: only at the end."""
    sample_prompts: tuple[str, ...] = ("",)
    """What the samples begin with, or answer."""
    sample_tokens: int = 120
    """Length of a sample."""
    dry_run: bool = False
    """Say how many steps and tokens it would be and what memory it would take, and stop there."""

    @field_validator("data", "sample_prompts", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    def check(self) -> None:
        super().check()
        for name in ("sequence_length", "eval_tokens", "sample_tokens"):
            at_least(1, self, name)
        require(0 <= self.dropout < 1, "dropout", self.dropout, "wanted a share, from 0 to less than 1")
        if self.weights and len(self.weights) != len(self.data):
            raise ConfigError(f"{len(self.weights)} weights for {len(self.data)} data sets; give one each")
        for weight in self.weights:
            require(weight > 0, "weights", weight, "each must be more than 0")


class PretrainConfig(TrainConfig):
    """What `llama2 pretrain` can be told."""

    data: tuple[Path, ...] = ()
    """Token shards to train on, as llama2 prepare makes them; on the command line --data for each."""
    eval_data: Path | None = None
    """Token shards to judge by; by default the heldout folder of the first of `data`, if there is one."""

    model: str | None = None
    """A model of the family by name, e.g. llama2-7b; else its numbers:"""
    dim: int | None = None
    """Width of the model."""
    n_layers: int | None = None
    """Blocks."""
    n_heads: int | None = None
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads; n_heads if not given."""
    ffn_dim: int | None = None
    """Width of the feed-forward; by Meta's rule if not given."""
    context_length: int | None = None
    """Longest sequence the model may be asked for; sequence_length if not given."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    tied_embeddings: bool = False
    """One matrix for the first layer and the last."""
    init_from: str | None = None
    """A checkpoint or hub name to go on from, in place of fresh weights."""
    rope_scaling: Literal["linear", "ntk", "dynamic", "yarn", "llama3"] | None = None
    """With init_from: how positions are stretched for a longer sequence_length."""
    rope_factor: float | None = None
    """How many times the old context; by default what sequence_length needs."""
    init_std: float = 0.02
    """Standard deviation of fresh weights."""

    def check(self) -> None:
        super().check()
        numbers = ("dim", "n_layers", "n_heads")
        given = [name for name in numbers if getattr(self, name) is not None]
        ways = [self.model is not None, bool(given), self.init_from is not None]
        if sum(ways) > 1:
            raise ConfigError("model, its numbers (dim, n_layers, n_heads) and init_from exclude each other; give one")
        if given and len(given) < 3:
            missing = ", ".join(name for name in numbers if name not in given)
            raise ConfigError(f"{missing} missing: a model by its numbers needs dim, n_layers and n_heads")
        for name in ("n_kv_heads", "ffn_dim", "context_length", "rope_theta", "tied_embeddings", "init_std"):
            fixed = "init_from" if self.init_from else "model" if self.model and name != "init_std" else ""
            is_given = getattr(self, name) != type(self).model_fields[name].default
            require(not (fixed and is_given), name, getattr(self, name), f"{fixed} decides that; leave it out")
        if self.rope_factor is not None and self.rope_scaling is None:
            raise ConfigError(f"rope_factor={self.rope_factor} needs rope_scaling, e.g. yarn")
        if self.rope_scaling and self.init_from is None:
            raise ConfigError(f"rope_scaling={self.rope_scaling!r} stretches a trained context; it needs init_from")

    def fresh_model(self, vocab_size: int) -> ModelConfig:
        """Return the shape of a model that starts from nothing. Raises ConfigError."""
        if self.model is not None:
            return family_config(self.model)
        if self.dim is None or self.n_layers is None or self.n_heads is None:
            raise ConfigError("which model? give a family name (--model), dim, n_layers and n_heads, or --init-from")
        return ModelConfig(
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            vocab_size=vocab_size,
            ffn_dim=self.ffn_dim or ffn_width(self.dim, multiple_of=32),
            n_kv_heads=self.n_kv_heads or self.n_heads,
            context_length=self.context_length or self.sequence_length,
            rope_theta=self.rope_theta,
            tied_embeddings=self.tied_embeddings,
        )

    def stretched(self, old: ModelConfig) -> dict[str, Any]:
        """Return what changes in a trained model's shape: its context, and how positions reach it."""
        if self.rope_scaling is None:
            if self.sequence_length > old.context_length:
                raise ConfigError(
                    f"sequence_length={self.sequence_length} is beyond the context of {self.init_from}, "
                    f"{old.context_length}; give rope_scaling (e.g. yarn), or a shorter sequence_length"
                )
            return {}
        before = old.rope_scaling
        if before is not None and (before.kind != self.rope_scaling or before.original_context is None):
            raise ConfigError(
                f"{self.init_from} is stretched by rope_scaling={before.kind} already; "
                f"{self.rope_scaling!r} cannot be put on top: stretch it further by the same"
            )
        original = old.context_length if before is None else before.original_context
        assert original is not None
        factor = self.rope_factor or self.sequence_length / original
        scaling = RopeScaling(self.rope_scaling, factor, original_context=original)
        return {"rope_scaling": scaling, "context_length": max(self.sequence_length, old.context_length)}


def at_least(least: int, config: BaseModel, name: str) -> None:
    """Raise ConfigError if a setting is given and less than that."""
    value = getattr(config, name)
    require(value is None or value >= least, name, value, f"wanted {'at least 1' if least else '0 or more'}")


def require(is_right: bool, name: str, value: object, wanted: str) -> None:
    if not is_right:
        raise ConfigError(f"{name}={value}: {wanted}")


Config = TypeVar("Config", bound=BaseModel)


def resolve(kind: type[Config], settings: dict[str, Any], *, source: str) -> Config:
    """Return a config of these settings. Raises ConfigError, with the nearest name for an unknown one."""
    for name in settings:
        if name not in kind.model_fields:
            near = did_you_mean(name, kind.model_fields)
            raise ConfigError(
                f"{source}: {name!r} is not a setting" + (near or f"; settings are {', '.join(kind.model_fields)}")
            )
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{source}: {name}={first['input']!r}: {first['msg'].lower()}") from None
