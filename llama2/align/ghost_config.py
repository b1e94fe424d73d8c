"""What `llama2 ghost` can be told. Nothing here imports PyTorch."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.adapt_config import AdaptConfig
from llama2.train.config import at_least, require


class GhostConfig(AdaptConfig):
    """What `llama2 ghost` can be told. The settings of training are those of `llama2 finetune`."""

    KEPT: ClassVar[tuple[str, ...]] = (
        *AdaptConfig.KEPT, "dialogues", "instructions", "n_dialogues", "temperature", "max_new_tokens", "depths",
        "keep", "judge", "replay", "replay_share", "eval_dialogues", "eval_instructions", "eval_share", "n_eval",
        "recall_turns",
    )  # fmt: skip

    dialogues: tuple[Path, ...] = ()
    """Files or folders of conversations, of which the user's turns are taken; those that have an "instruction" already
    are left out."""
    instructions: Path | None = None
    """A file of {"text", "language"?} and what a judge needs: what is to be kept in mind."""
    n_dialogues: int | None = None
    """How many dialogues to carry on; all if not given."""
    temperature: float = 0.7
    """Of the sampled answers; the paper does not say its own. 0: the likeliest answers."""
    max_new_tokens: int = 128
    """Longest answer."""
    depths: Literal["random", "last", "every"] = "random"
    """Which answer of a dialogue is learnt: one drawn evenly, so that all depths occur; the last; or each in turn."""
    keep: Literal["all", "obedient"] = "all"
    """Examples to learn: all, as in the paper, or those whose answer the judge passes."""
    judge: str | None = None
    """Who says whether an answer obeys: MODULE:FUNCTION, called with the instruction's record and the answer; or world,
    the exact judge of story-world instructions, which is the usual one for those."""
    replay: tuple[Path, ...] = ()
    """Other examples to learn beside these, e.g. those of the first fine-tuning."""
    replay_share: float = 0.1
    """Share of the tokens that come from `replay`."""

    eval_dialogues: Path | None = None
    """Conversations by which recall is judged, e.g. of twenty turns; else eval_share of `dialogues`."""
    eval_instructions: Path | None = None
    """Instructions that stand over those; `instructions` if not given."""
    eval_share: float = 0.1
    """Share of the dialogues that is set aside to judge by, where eval_dialogues is not given; 0: none."""
    n_eval: int = 100
    """How many dialogues are carried on to judge by."""
    recall_turns: tuple[int, ...] = (2, 4, 6, 20)
    """Turns at which obedience is told, of those that the dialogues have; the last one ends them."""

    batch_size: int = 16
    """Rows per optimizer step."""
    n_epochs: float = 2.0
    """Passes over the examples."""

    @field_validator("dialogues", "replay", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("recall_turns", mode="before")
    @classmethod
    def _one_turn(cls, value: object) -> object:
        return [value] if isinstance(value, int | str) else value

    def check(self) -> None:
        super().check()
        if not self.dialogues:
            raise ConfigError("what to talk about? name files of conversations with --dialogues")
        if self.instructions is None:
            raise ConfigError('what is to be kept in mind? name a file of {"text"} with --instructions')
        for name in ("n_dialogues", "max_new_tokens", "n_eval"):
            at_least(1, self, name)
        at_least(0, self, "temperature")
        require(0 <= self.eval_share < 1, "eval_share", self.eval_share, "wanted a share, from 0 to less than 1")
        require(0 <= self.replay_share < 1, "replay_share", self.replay_share, "wanted a share, from 0 to less than 1")
        if not self.recall_turns:
            raise ConfigError("recall_turns is empty; name at least one")
        for turn in self.recall_turns:
            require(turn >= 1, "recall_turns", turn, "wanted turns, counted from 1")
