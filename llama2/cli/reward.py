"""`llama2 reward`: preference pairs and a chat checkpoint in, a reward model out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.align.reward_config import RewardConfig
from llama2.cli.config import settle


def reward(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    settings: Annotated[RewardConfig, Parameter(name="*")] = RewardConfig(),
) -> None:
    """Train a reward model on preference pairs: the better answer is to score higher, by the margin of its rating.

    Parameters
    ----------
    model
        The chat checkpoint to begin with: a folder, a file, a hub name, or a reward model's folder.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"model": model} if model else {}))
    resolved.check()
    from llama2.align.reward import train_reward
    from llama2.parallel.mesh import leave

    outcome = train_reward(resolved)
    leave(128 + outcome.stopped_by if outcome.stopped_by else 0)
