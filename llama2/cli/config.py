"""Settings of a long command: defaults < --config run.toml < --flag."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from llama2.errors import ConfigError
from llama2.train.config import resolve

Config = TypeVar("Config", bound=BaseModel)


def settle(flags: Config, file: Path | None, **more: Any) -> Config:
    """Return the flags over the settings of a TOML file; `more` are settings that were no flags."""
    given = {name: getattr(flags, name) for name in flags.model_fields_set} | more
    return resolve(type(flags), read_toml(file) | given, source=str(file or "command line"))


def read_toml(path: Path | None) -> dict[str, Any]:
    """Return the settings in a file. Raises ConfigError."""
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read as TOML: {error}") from None
