"""Flags that several commands share, flattened into each."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from llama2.errors import RequestError

Text = Annotated[str, Parameter(allow_leading_hyphen=True)]
"""A text, which may well begin with a hyphen, or be one."""


def read_standard_input() -> str:
    """Return all of standard input, which must be UTF-8 whatever the locale says."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8: {error}; convert it, e.g. with iconv") from None


DType = Literal["float32", "bfloat16", "float16"]


@Parameter(name="*")
@dataclass(frozen=True)
class LoadOptions:
    """How to load a model."""

    dtype: DType | None = None
    """Precision to compute in; the stored one if not given."""
    device: str | None = None
    """cpu, cuda, mps...; the accelerator if there is one."""
    tokenizer: Path | None = None
    """Tokenizer file or folder; looked for beside the checkpoint if not given."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    draft: str | None = None
    """A smaller model of the same vocabulary that guesses tokens ahead, or "lookup"; changes no text."""

    def load(self, model: str, *, max_batch: int = 32, chat_format: str | None = None):
        """Return the loaded LLM (imports PyTorch)."""
        import llama2

        # Under torchrun every process holds a part of the model; only the first comes back from here.
        split = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return llama2.load(model, **vars(self), max_batch=max_batch, chat_format=chat_format, split=split)


@Parameter(name="*")
@dataclass(frozen=True)
class SampleOptions:
    """How to choose tokens. What is not given comes from the checkpoint's generation_config, else Meta's defaults."""

    max_new_tokens: int | None = None
    """At most this many new tokens [default: 256; in a chat: until the context is full]."""
    temperature: float | None = None
    """0 always takes the likeliest token [default: 0.6]."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this probability [default: 0.9]."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float | None = None
    """Drop tokens less likely than this fraction of the likeliest."""
    repetition_penalty: float | None = None
    """Above 1 discourages tokens seen in prompt or answer."""
    presence_penalty: float | None = None
    """Subtracted from the logit of each token already in the answer."""
    frequency_penalty: float | None = None
    """Subtracted once for each time a token is in the answer."""
    stop: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative="", show_default=False)] = ()
    """Text that ends the answer; give the flag again for more."""
    seed: int | None = None
    """Makes the random choices repeatable."""

    def given(self) -> dict[str, Any]:
        """Return only what the user set, as keyword arguments of the LLM's verbs."""
        return {name: value for name, value in vars(self).items() if value not in (None, ())}
