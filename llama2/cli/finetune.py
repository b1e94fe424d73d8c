"""`llama2 finetune`: a checkpoint and examples in, a model or an adapter out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.cli.config import settle
from llama2.train.finetune_config import FinetuneConfig


def finetune(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    settings: Annotated[FinetuneConfig, Parameter(name="*")] = FinetuneConfig(),
) -> None:
    """Adapt a checkpoint to examples: all of it, or a small adapter; only the answers are trained.

    Parameters
    ----------
    model
        A folder, a file, a hub name, or an adapter's folder.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"model": model} if model else {}))
    resolved.check()
    from llama2.parallel.mesh import leave
    from llama2.train.finetune import finetune as train

    outcome = train(resolved)
    leave(128 + outcome.stopped_by if outcome.stopped_by else 0)
