"""`llama2 grpo`: prompts, a reward and a chat checkpoint in, an adapter that answers better out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.align.online_config import GrpoConfig
from llama2.cli.config import settle


def grpo(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    settings: Annotated[GrpoConfig, Parameter(name="*")] = GrpoConfig(),
) -> None:
    """Align a model by GRPO: it answers each prompt several times, and learns from the answers that a reward prefers.

    Parameters
    ----------
    model
        The chat checkpoint to begin with: a folder, a file, a hub name, or an adapter's folder.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"model": model} if model else {}))
    resolved.check()
    from llama2.align.grpo import grpo as train
    from llama2.parallel.mesh import leave

    outcome = train(resolved)
    leave(128 + outcome.stopped_by if outcome.stopped_by else 0)
