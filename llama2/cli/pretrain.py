"""`llama2 pretrain`: a Llama from nothing, or from a checkpoint, on token shards."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.cli.config import settle
from llama2.train.config import PretrainConfig


def pretrain(
    *,
    config: Path | None = None,
    settings: Annotated[PretrainConfig, Parameter(name="*")] = PretrainConfig(),
) -> None:
    """Train a Llama on token shards; with several processes, start it through torchrun.

    Parameters
    ----------
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config)
    resolved.check()
    from llama2.parallel.mesh import leave
    from llama2.train.pretrain import pretrain as train

    outcome = train(resolved)
    leave(128 + outcome.stopped_by if outcome.stopped_by else 0)
