"""The public names, for editors and type checkers; `__init__.py` imports them when they are first used."""

from llama2.chat import (
    Message as Message,
)
from llama2.chat import (
    render as render,
)
from llama2.checkpoint.hub import (
    pull as pull,
)
from llama2.checkpoint.store import (
    convert as convert,
)
from llama2.checkpoint.store import (
    save as save,
)
from llama2.errors import (
    ChatError as ChatError,
)
from llama2.errors import (
    CheckpointError as CheckpointError,
)
from llama2.errors import (
    ConfigError as ConfigError,
)
from llama2.errors import (
    HubError as HubError,
)
from llama2.errors import (
    Llama2Error as Llama2Error,
)
from llama2.errors import (
    RequestError as RequestError,
)
from llama2.errors import (
    TokenizerError as TokenizerError,
)
from llama2.errors import (
    TokenizerMissing as TokenizerMissing,
)
from llama2.infer.request import (
    SamplingParams as SamplingParams,
)
from llama2.llm import (
    LLM as LLM,
)
from llama2.llm import (
    Score as Score,
)
from llama2.llm import (
    TextCompletion as TextCompletion,
)
from llama2.llm import (
    load as load,
)
from llama2.model.config import (
    FAMILY as FAMILY,
)
from llama2.model.config import (
    ModelConfig as ModelConfig,
)
from llama2.model.config import (
    RopeScaling as RopeScaling,
)
from llama2.model.transformer import (
    Transformer as Transformer,
)
from llama2.model.transformer import (
    build as build,
)
from llama2.tokenizer.formats import (
    load_tokenizer as load_tokenizer,
)
from llama2.tokenizer.tokenizer import (
    StreamDecoder as StreamDecoder,
)
from llama2.tokenizer.tokenizer import (
    Tokenizer as Tokenizer,
)
from llama2.tutorial import (
    LLama2Model as LLama2Model,
)
from llama2.tutorial import (
    LLama2Tokenizer as LLama2Tokenizer,
)
from llama2.tutorial import (
    LLaMAForCausalLM as LLaMAForCausalLM,
)
from llama2.tutorial import (
    LLaMATokenizer as LLaMATokenizer,
)
from llama2.tutorial import (
    preprocess_text as preprocess_text,
)

__version__: str
__all__ = [
    "ChatError",
    "CheckpointError",
    "ConfigError",
    "FAMILY",
    "HubError",
    "LLM",
    "LLaMAForCausalLM",
    "LLaMATokenizer",
    "LLama2Model",
    "LLama2Tokenizer",
    "Llama2Error",
    "Message",
    "ModelConfig",
    "RequestError",
    "RopeScaling",
    "SamplingParams",
    "Score",
    "StreamDecoder",
    "TextCompletion",
    "Tokenizer",
    "TokenizerError",
    "TokenizerMissing",
    "Transformer",
    "build",
    "convert",
    "load",
    "load_tokenizer",
    "preprocess_text",
    "pull",
    "render",
    "save",
]
