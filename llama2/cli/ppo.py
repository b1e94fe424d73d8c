"""`llama2 ppo`: prompts, a reward and a chat checkpoint in, an adapter that answers better out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.align.online_config import PpoConfig
from llama2.cli.config import settle


def ppo(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    settings: Annotated[PpoConfig, Parameter(name="*")] = PpoConfig(),
) -> None:
    """Align a model by PPO: it answers prompts, a reward judges, and an adapter learns to be rewarded.

    Parameters
    ----------
    model
        The chat checkpoint to begin with: a folder, a file, a hub name, or an adapter's folder.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"model": model} if model else {}))
    resolved.check()
    from llama2.align.ppo import ppo as train
    from llama2.parallel.mesh import leave

    outcome = train(resolved)
    leave(128 + outcome.stopped_by if outcome.stopped_by else 0)
