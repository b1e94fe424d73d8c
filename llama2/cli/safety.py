"""`llama2 safety`: unsafe prompts, a safety reward and a chat checkpoint in, a safer model out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.align.safety_config import SafetyConfig
from llama2.cli.config import settle


def safety(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    settings: Annotated[SafetyConfig, Parameter(name="*")] = SafetyConfig(),
) -> None:
    """Teach a model safety: distilled answers, demonstrations, and what each amount of them does.

    Parameters
    ----------
    model
        The chat checkpoint to begin with: a folder, a file, a hub name, or an adapter's folder.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"model": model} if model else {}))
    resolved.check()
    from llama2.align.safety import safety as run

    run(resolved)
