"""What the server can be told. Nothing here imports PyTorch, so that a wrong setting is refused at once."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeConfig(BaseModel):
    """A server of one or more models."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    models: tuple[str, ...] = ()
    """Folders, files or hub names, each as PATH or NAME=PATH; clients ask for a model by its name."""
    adapter: tuple[str, ...] = ()
    """LoRA adapters as NAME=FOLDER, or MODEL/NAME=FOLDER where there are several models; clients ask for NAME."""
    allow_adapter_loading: bool = False
    """Let clients load adapters from folders of this machine, and unload them."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine only with --api-keys, or --no-auth."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_keys: Path | None = None
    """File of keys that may ask, one per line; # begins a comment."""
    auth: bool = True
    """Listen beyond this machine only with api_keys; without it anybody who reaches the port may ask."""
    allow_origin: tuple[str, ...] = ()
    """Web pages of these origins may ask from a browser, e.g. https://example.org; `*` is every page."""
    allow_host: tuple[str, ...] = ()
    """More names that this server goes by, for a proxy in front of it; without keys others are refused."""
    requests_per_minute: int = Field(default=0, ge=0)
    """Limit for each key, or each address where there are no keys; 0 is none."""
    tokens_per_minute: int = Field(default=0, ge=0)
    """Limit for each key, prompts and answers together; 0 is none."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision to compute in; the stored one if not given."""
    device: str | None = None
    """cpu, cuda, mps...; the accelerator if there is one."""
    tokenizer: Path | None = None
    """Tokenizer file or folder of the first model; looked for beside the checkpoint if not given."""
    chat_format: Literal["llama2", "llama3", "template"] | None = None
    """How messages become tokens; by the checkpoint's own template if not given."""

    max_batch: int = Field(default=32, ge=1)
    """Answers that a model writes at once."""
    max_waiting: int = Field(default=256, ge=0)
    """Answers that may wait for their turn, for each model; further requests get 503."""
    max_step_tokens: int = Field(default=2048, ge=1)
    """Tokens read in one step of a model; longer prompts are read in chunks, between which others are answered."""
    cache_tokens: int | None = Field(default=None, ge=16)
    """Room for keys and values, in tokens over all answers; None: max_batch full contexts, or half of free memory."""
    prefix_cache: bool = True
    """Read prompts that begin alike once."""
    draft: str | None = None
    """A smaller model that guesses tokens for the first one, or `lookup` in the text so far; changes no answer."""
    max_tokens: int | None = Field(default=None, ge=1)
    """No answer is longer, whatever a client asks for; None: until the context is full."""
    max_body_bytes: int = Field(default=10_000_000, ge=1)
    """A longer request gets 413, and its rest is not read."""
    max_depth: int = Field(default=64, ge=1)
    """JSON nested deeper than this is refused."""
    max_connections: int = Field(default=1024, ge=1)
    """Open connections; further ones get 503."""
    read_timeout_s: float = Field(default=30.0, gt=0)
    """Within this many seconds a client must have sent its request, and taken each piece of the answer."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Within this many seconds a request must have been answered, waiting included."""
    drain_timeout_s: float = Field(default=30.0, ge=0)
    """After SIGTERM, running answers may go on for this many seconds."""
