"""What `llama2 reject` can be told. Nothing here imports PyTorch."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.adapt_config import AdaptConfig
from llama2.train.config import at_least, require


class RejectConfig(AdaptConfig):
    """What `llama2 reject` can be told. The settings of training are those of `llama2 finetune`, for each round."""

    KEPT: ClassVar[tuple[str, ...]] = (
        *AdaptConfig.KEPT, "prompts", "reward", "safety_reward", "n_samples", "n_prompts", "temperatures", "n_tuning",
        "max_new_tokens", "tolerance", "keep_earlier", "replay", "replay_share", "pairs", "pairs_judge",
        "pairs_learning_rate",
    )  # fmt: skip

    prompts: tuple[Path, ...] = ()
    """Files or folders of prompts, conversations or pairs, whose last question is answered."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a prompt that leaves no room for an answer of max_new_tokens."""
    reward: str = ""
    """A reward model's folder; MODULE:FUNCTION, called with conversations and answers; or grade, the exact judge of
    story-world prompts."""
    safety_reward: str | None = None
    """A second reward model: safety, behind the Llama 2 paper's gate."""

    n_rounds: int = 1
    """Rounds of sampling and training; the paper went to V5."""
    n_prompts: int = 1000
    """Prompts that are answered in each round, others each time."""
    n_samples: int = 10
    """Answers to each prompt, of which the best is learnt (K)."""
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.3)
    """Those to choose from in each round, by the reward of the best of K on the first n_tuning prompts."""
    n_tuning: int = 32
    """Prompts on which temperatures are compared."""
    max_new_tokens: int = 128
    """Longest answer."""
    tolerance: float | None = None
    """Learn all different answers whose rewards are at most so much below the best one's to the same prompt; by default
    the best alone."""
    least_gap: float = 0.0
    """By how much rewards must differ for two answers to a prompt to be a pair of contrasts.jsonl."""
    keep_earlier: bool = True
    """Learn from the best answers of all rounds so far; without them the paper's models forgot what they had learnt."""
    replay: tuple[Path, ...] = ()
    """Other examples to learn beside the answers, e.g. those of the first fine-tuning."""
    replay_share: float = 0.1
    """Share of the tokens that come from `replay`."""

    pairs: tuple[Path, ...] = ()
    """With pairs_judge: the preference pairs that the reward model was trained on, to which each round adds."""
    pairs_judge: str | None = None
    """Who labels pairs of the current model's answers before each round but the first: MODULE:FUNCTION, or grade. The
    reward model is then trained on, with those pairs, before it chooses."""
    pairs_learning_rate: float = 1e-5
    """At the peak of the schedule, of the reward model that is trained on."""

    batch_size: int = 16
    """Rows per optimizer step."""
    n_epochs: float = 2.0
    """Passes over the chosen answers."""

    @field_validator("prompts", "pairs", "replay", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("temperatures", mode="before")
    @classmethod
    def _one_temperature(cls, value: object) -> object:
        return [value] if isinstance(value, int | float | str) else value

    def check(self) -> None:
        super().check()
        if not self.prompts:
            raise ConfigError("what to answer? name files of prompts with --prompts")
        require(bool(self.reward), "reward", repr(self.reward), "a reward model's folder, MODULE:FUNCTION, or grade")
        for name in ("n_rounds", "n_prompts", "n_samples", "n_tuning", "max_new_tokens"):
            at_least(1, self, name)
        for name in ("tolerance", "least_gap"):
            at_least(0, self, name)
        if not self.temperatures:
            raise ConfigError("temperatures is empty; name at least one")
        for temperature in self.temperatures:
            require(temperature > 0, "temperatures", temperature, "wanted more than 0: K equal answers teach nothing")
        require(0 <= self.replay_share < 1, "replay_share", self.replay_share, "wanted a share, from 0 to less than 1")
        require(self.pairs_learning_rate > 0, "pairs_learning_rate", self.pairs_learning_rate, "wanted more than 0")
        if self.pairs_judge is None:
            self.refuse_given(("pairs_learning_rate",), "needs pairs_judge, with which the reward model is trained on")
        if self.pairs_judge is None and self.pairs:
            raise ConfigError("pairs are for training the reward model on; give pairs_judge, or leave them out")
        if self.pairs_judge is not None and not Path(self.reward).is_dir():
            raise ConfigError(
                f"pairs_judge={self.pairs_judge} trains the reward model on between rounds, and reward={self.reward} "
                "is no reward model's folder; name one, or leave pairs_judge out"
            )
