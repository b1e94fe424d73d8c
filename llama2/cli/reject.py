"""`llama2 reject`: prompts, a reward and a chat checkpoint in, a model that learnt its best answers out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.align.rejection_config import RejectConfig
from llama2.cli.config import settle


def reject(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    settings: Annotated[RejectConfig, Parameter(name="*")] = RejectConfig(),
) -> None:
    """Sample answers, keep the best, learn them, and begin again: rejection sampling in rounds.

    Parameters
    ----------
    model
        The chat checkpoint to begin with: a folder, a file, a hub name, or an adapter's folder.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"model": model} if model else {}))
    resolved.check()
    from llama2.align.rejection import reject as run

    run(resolved)
