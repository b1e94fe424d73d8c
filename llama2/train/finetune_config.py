"""What `llama2 finetune` can be told. Nothing here imports PyTorch."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from llama2.errors import ConfigError
from llama2.train.adapt_config import AdaptConfig
from llama2.train.config import TrainConfig, at_least, require

LONGEST_ROW = 2048


class FinetuneConfig(AdaptConfig, TrainConfig):
    """What `llama2 finetune` can be told."""

    KEPT: ClassVar[tuple[str, ...]] = (*AdaptConfig.KEPT, *TrainConfig.KEPT, "neftune_alpha", "replay_share")

    data: tuple[Path, ...] = ()
    """Files or folders of examples (jsonl, json, parquet, txt); on the command line --data for each."""
    data_format: str | None = None
    """How the records are to be read, e.g. alpaca; recognised by their keys if not given."""
    eval_data: Path | None = None
    """Examples to judge by; else eval_share of `data`."""
    eval_share: float = 0.02
    """Share of the examples that is set aside to judge by, where eval_data is not given; 0: none."""
    too_long: Literal["refuse", "split", "drop"] = "refuse"
    """What happens to an example that does not fit a row: split spreads it over several rows."""
    show: int = 0
    """Print so many examples first, what is trained and what is not."""

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

    @field_validator("replay", mode="before")
    @classmethod
    def _one_replay_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    def check(self) -> None:
        (self if self.sequence_length else self.model_copy(update={"sequence_length": 1}))._check_shared()
        for name in ("eval_share", "replay_share"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "wanted a share, from 0 to less than 1")
        for name in ("neftune_alpha", "show"):
            at_least(0, self, name)
        if self.replay and not self.replay_share:
            raise ConfigError("replay_share=0 would leave the replay data unread; leave out one of them")
        if not self.replay:
            self.refuse_given(("replay_share", "replay_eval"), "needs replay, the earlier data")

    def _check_shared(self) -> None:
        super().check()
