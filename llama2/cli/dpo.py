"""`llama2 dpo`: a chat checkpoint and preference pairs in, one that prefers the better answers out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.align.dpo_config import DpoConfig
from llama2.cli.config import settle


def dpo(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    settings: Annotated[DpoConfig, Parameter(name="*")] = DpoConfig(),
) -> None:
    """Learn from pairs of answers to prefer the better one, without a reward model and without sampling.

    Parameters
    ----------
    model
        A chat checkpoint: a folder, a file, a hub name, or an adapter's folder.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"model": model} if model else {}))
    resolved.check()
    from llama2.align.dpo import train_dpo
    from llama2.parallel.mesh import leave

    outcome = train_dpo(resolved)
    leave(128 + outcome.stopped_by if outcome.stopped_by else 0)
