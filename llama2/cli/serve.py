"""`llama2 serve`: models behind OpenAI's protocol."""

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.cli.config import settle
from llama2.serve.config import ServeConfig


def serve(
    *models: str,
    config: Path | None = None,
    settings: Annotated[ServeConfig, Parameter(name="*")] = ServeConfig(),
) -> None:
    """Serve models behind OpenAI's protocol, until SIGTERM or Ctrl-C.

    Parameters
    ----------
    models
        Folders, files or hub names, each as PATH or NAME=PATH; clients ask for a model by its name.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"models": models} if models else {}))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    from llama2.serve.run import serve as run

    run(resolved)
