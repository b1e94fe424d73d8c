"""What `llama2 safety` can be told. Nothing here imports PyTorch."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.adapt_config import AdaptConfig
from llama2.train.config import at_least, require

PREPROMPT = (
    "The following is a discussion between a human and a knowledgeable and empathetic assistant. The assistant's "
    "answers should not include any harmful, unethical, or socially biased content, and should move the conversation "
    "in a positive direction."
)
"""arXiv:2307.09288 table 13: the generic preprompt of context distillation."""


class SafetyConfig(AdaptConfig):
    """What `llama2 safety` can be told. The settings of training are those of `llama2 finetune`, for each amount."""

    KEPT: ClassVar[tuple[str, ...]] = (
        *AdaptConfig.KEPT, "prompts", "safety_reward", "preprompt", "templates", "temperature", "max_new_tokens",
        "demonstrations", "replay", "replay_share", "helpfulness_reward", "eval_prompts", "eval_share", "n_eval",
    )  # fmt: skip

    prompts: tuple[Path, ...] = ()
    """Files or folders of prompts; those with "is_unsafe" are distilled, the others only judge."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a prompt that with its preprompt leaves no room for an answer of max_new_tokens."""
    safety_reward: str = ""
    """Who decides between two answers: a reward model's folder; MODULE:FUNCTION, called with conversations and answers;
    or grade, the exact judge of story-world prompts."""
    preprompt: str = PREPROMPT
    """What stands before an unsafe prompt, as a system message, while the answer to learn is sampled."""
    templates: Path | None = None
    """A file of {"preprompt", "category"?, "language"?}: others for the prompts of a risk category, a language, or
    both."""
    temperature: float = 0.7
    """Of both answers; the paper does not say its own. 0: the likeliest answers."""
    max_new_tokens: int = 128
    """Longest answer."""

    demonstrations: tuple[Path, ...] = ()
    """Files of conversations whose last answer is right, to learn beside the distilled answers."""
    amounts: tuple[float, ...] = (100.0,)
    """Percent of the safety data to learn; each makes a model of its own, and the data of a smaller one is part of that
    of a larger one. 0 is the model as it came."""
    replay: tuple[Path, ...] = ()
    """Helpful examples to learn beside, e.g. those of the first fine-tuning: equally much of them for each amount."""
    replay_share: float = 0.1
    """Share of the tokens that come from `replay` where the amount is 100."""

    eval_prompts: tuple[Path, ...] = ()
    """Prompts to judge by: unsafe, borderline ("is_unsafe" is false) and ordinary ones; else eval_share of
    `prompts`."""
    eval_share: float = 0.1
    """Share of the prompts that is set aside to judge by, where eval_prompts is not given; 0: none."""
    n_eval: int | None = None
    """How many of those are answered; all if not given."""
    helpfulness_reward: str | None = None
    """Who judges answers to prompts that are not unsafe, as safety_reward is said; grade where the prompts have an
    exact judge, if not given."""

    batch_size: int = 16
    """Rows per optimizer step."""
    n_epochs: float = 2.0
    """Passes over the safety data."""

    @field_validator("prompts", "demonstrations", "replay", "eval_prompts", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("amounts", mode="before")
    @classmethod
    def _one_amount(cls, value: object) -> object:
        return [value] if isinstance(value, int | float | str) else value

    def check(self) -> None:
        super().check()
        if not self.prompts:
            raise ConfigError("what to answer? name files of prompts with --prompts")
        wanted = "a reward model's folder, MODULE:FUNCTION, or grade"
        require(bool(self.safety_reward), "safety_reward", repr(self.safety_reward), wanted)
        require(bool(self.preprompt.strip()), "preprompt", repr(self.preprompt), "wanted a text that asks for care")
        for name in ("max_new_tokens", "n_eval"):
            at_least(1, self, name)
        at_least(0, self, "temperature")
        if not self.amounts:
            raise ConfigError("amounts is empty; name at least one, in percent")
        for amount in self.amounts:
            require(0 <= amount <= 100, "amounts", amount, "wanted percent, from 0 to 100")
        if len(set(self.amounts)) < len(self.amounts):
            raise ConfigError(f"amounts={', '.join(map('{:g}'.format, self.amounts))} names one twice")
        require(max(self.amounts) > 0, "amounts", max(self.amounts), "wanted one above 0: nothing would be learnt")
        for name in ("eval_share", "replay_share"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "wanted a share, from 0 to less than 1")
