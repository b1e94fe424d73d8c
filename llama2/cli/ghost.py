"""`llama2 ghost`: dialogues, instructions and a chat checkpoint in, a model that does not forget them out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.align.ghost_config import GhostConfig
from llama2.cli.config import settle


def ghost(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    settings: Annotated[GhostConfig, Parameter(name="*")] = GhostConfig(),
) -> None:
    """Teach a model to keep in mind what it was told in the first turn: Ghost Attention.

    Parameters
    ----------
    model
        The chat checkpoint to begin with: a folder, a file, a hub name, or an adapter's folder.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"model": model} if model else {}))
    resolved.check()
    from llama2.align.ghost import ghost as run

    run(resolved)
