"""What `llama2 ppo` and `llama2 grpo` can be told. Nothing here imports PyTorch."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.adapt_config import AdaptConfig
from llama2.train.config import at_least, require

USUAL_ROWS = 16
USUAL_GROUPS = 8


class OnlineConfig(AdaptConfig):
    """What every command shares that learns from answers which the model samples itself."""

    KEPT: ClassVar[tuple[str, ...]] = (
        *AdaptConfig.KEPT, "reward", "safety_reward", "mini_batch_size", "n_generations", "max_new_tokens",
        "temperature", "kl_coef", "clip_ratio",
    )  # fmt: skip

    USUAL: ClassVar[dict[str, dict[str, Any]]] = AdaptConfig.USUAL | {
        "full": dict(learning_rate=1e-6, weight_decay=0.1),  # arXiv:2307.09288 sec. 3.2.3
    }

    prompts: tuple[Path, ...] = ()
    """Files or folders of prompts, conversations or pairs, whose last question is answered."""
    eval_prompts: Path | None = None
    """Prompts to judge by; else eval_share of `prompts`."""
    eval_share: float = 0.05
    """Share of the prompts that is set aside to judge by, where eval_prompts is not given; 0: none."""
    n_eval: int = 128
    """How many of those are answered in each evaluation."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a prompt that leaves no room for an answer of max_new_tokens."""
    reward: str = ""
    """A reward model's folder; MODULE:FUNCTION, called with conversations and answers; or grade, the exact judge of
    story-world prompts."""
    safety_reward: str | None = None
    """A second reward model: safety, behind the Llama 2 paper's gate."""

    n_iterations: int = 100
    """Rounds of sampling and learning."""
    batch_size: int = 64
    """Answers sampled per iteration, over all processes; the paper has 512."""
    micro_batch_size: int | None = None
    """Answers of about one length per forward pass of one process; by default up to 16, as many as divide its share."""
    mini_batch_size: int | None = None
    """Answers per optimizer step, each of which sees one gradient; by default batch_size; the paper has 64."""
    n_generations: int = 1
    """Answers to each prompt, which is read once for all of them."""
    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 1.0
    """Of sampling, and of the probabilities that are trained."""
    kl_coef: float = 0.01
    """Weight of the divergence from the model that it began with."""
    clip_ratio: float = 0.2
    """A token's probability gains nothing by changing more than this, as a ratio."""

    lr_scheduler: Literal["cosine", "wsd", "constant"] = "constant"
    """constant, as the paper has it; cosine or wsd as elsewhere."""
    outlier_sigma: float = 0.0
    """Leave out a step whose loss or gradient norm is so many standard deviations above the last ones'; 0: none."""
    eval_every: int = 0
    """Iterations between evaluations; 0: only at the beginning and the end."""
    save_every: int = 0
    """Iterations between checkpoints; 0: only at the end and when stopped."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @property
    def per_step(self) -> int:
        """Answers per optimizer step."""
        return self.mini_batch_size or self.batch_size

    @property
    def n_mini_batches(self) -> int:
        return self.batch_size // self.per_step

    def on(self, n_ranks: int, n_answers: int) -> Self:
        """Return the settings for so many data ranks and answers to a prompt, with a micro_batch_size.

        If nothing is said of it, it is the largest divisor of a rank's rows up to USUAL_ROWS: answers of about one
        length go together, and few such groups pad less than one batch of all. Several answers to a prompt are laid out
        beside each other; then it is up to USUAL_GROUPS prompts.
        Raises ConfigError where the prompts of a step do not split over the ranks.
        """
        if self.per_step % (n_ranks * n_answers):
            name = "batch_size" if self.mini_batch_size is None else "mini_batch_size"
            raise ConfigError(
                f"{name}={self.per_step} makes {self.per_step // n_answers} prompts per step, which do not split over "
                f"{n_ranks} data ranks; choose a {name} that is a multiple of {n_ranks * n_answers}"
            )
        rows = self.as_steps().micro_batch(n_ranks)
        if self.micro_batch_size is None and self.gradient_accumulation_steps is None:
            most = USUAL_ROWS if n_answers == 1 else USUAL_GROUPS * n_answers
            rows = max(n for n in range(1, most + 1) if rows % n == 0)
        return self.model_copy(update={"micro_batch_size": rows, "gradient_accumulation_steps": None})

    def as_steps(self) -> Self:
        """Return the settings as a run has them, counted in optimizer steps."""
        n = self.n_mini_batches
        changes = dict(batch_size=self.per_step, eval_every=n * self.eval_every, save_every=n * self.save_every)
        return self.model_copy(update=changes)

    def check(self) -> None:
        super().check()
        if not self.prompts:
            raise ConfigError("what to answer? name files of prompts with --prompts")
        require(bool(self.reward), "reward", repr(self.reward), "a reward model's folder, MODULE:FUNCTION, or grade")
        require(0 <= self.eval_share < 1, "eval_share", self.eval_share, "wanted a share, from 0 to less than 1")
        require(self.method != "qlora", "method", self.method, "answers are not sampled from 4 bits; lora or full")
        self.refuse_given(("max_steps", "n_epochs"), "this run is counted by n_iterations")
        self.refuse_given(("trained_modules",), "the adapter alone is learnt here; leave it out")
        for name in ("n_iterations", "mini_batch_size", "n_generations", "max_new_tokens", "n_eval"):
            at_least(1, self, name)
        at_least(0, self, "kl_coef")
        for name in ("temperature", "clip_ratio"):
            require(getattr(self, name) > 0, name, getattr(self, name), "wanted more than 0")
        if self.batch_size % self.per_step:
            raise ConfigError(
                f"mini_batch_size={self.mini_batch_size} does not divide batch_size={self.batch_size}; choose a divisor"
            )
        if self.warmup_steps >= self.n_iterations * self.n_mini_batches:
            raise ConfigError(f"warmup_steps={self.warmup_steps} leaves nothing of the run; choose fewer")
        if self.per_step % self.n_generations:
            raise ConfigError(
                f"n_generations={self.n_generations} does not divide the {self.per_step} answers of a step; choose a "
                "divisor, so that no group is torn"
            )


class PpoConfig(OnlineConfig):
    """What `llama2 ppo` can be told; defaults are arXiv:2307.09288 sec. 3.2.3 where it says them."""

    KEPT: ClassVar[tuple[str, ...]] = (
        *OnlineConfig.KEPT, "gamma", "lam", "vf_coef", "value_clip", "whiten_rewards", "whiten_over",
        "whiten_advantages", "value_lr",
    )  # fmt: skip

    gamma: float = 1.0
    """What a later reward is worth, per token."""
    lam: float = 0.95
    """Of generalised advantage estimation: 1 takes what came, 0 trusts the value model."""
    vf_coef: float = 0.1
    """Weight of the value model's loss."""
    value_clip: float = 0.2
    """A value gains nothing by changing more than this in one iteration."""
    value_lr: float | None = None
    """Learning rate of the value model; learning_rate if not given."""
    whiten_rewards: bool = True
    """Rewards less their mean, over their standard deviation, as the paper does."""
    whiten_over: Literal["iteration", "prompt"] = "iteration"
    """Whose mean and deviation: of all answers of an iteration, or of the n_generations answers to one prompt."""
    whiten_advantages: bool = True
    """Advantages of an iteration's tokens likewise."""

    def check(self) -> None:
        super().check()
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "wanted from 0 to 1")
        for name in ("vf_coef", "value_clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "wanted more than 0")
        self.refuse_given(
            ("activation_checkpointing",),
            "the value model would be computed again with the policy's adapter; choose a smaller micro_batch_size",
        )
        if self.whiten_over == "prompt":
            wanted = "needs n_generations of 2 or more, and whiten_rewards"
            require(self.n_generations >= 2 and self.whiten_rewards, "whiten_over", "prompt", wanted)
        if self.value_lr is not None:
            require(self.value_lr > 0 and self.learning_rate > 0, "value_lr", self.value_lr, "wanted more than 0")


class GrpoConfig(OnlineConfig):
    """What `llama2 grpo` can be told (arXiv:2402.03300)."""

    KEPT: ClassVar[tuple[str, ...]] = (*OnlineConfig.KEPT, "unbiased_std", "per_token")

    n_generations: int = 8
    """Answers to each prompt, which are measured by each other."""
    kl_coef: float = 0.04
    """Weight of the divergence from the model that it began with, estimated per token (k3)."""
    unbiased_std: bool = False
    """Divide by the standard deviation with n - 1."""
    per_token: bool = False
    """Weigh every token alike, so that long answers teach more than short ones (DAPO); else every answer alike."""

    def check(self) -> None:
        super().check()
        require(self.n_generations >= 2, "n_generations", self.n_generations, "wanted 2 or more: one has no equals")
