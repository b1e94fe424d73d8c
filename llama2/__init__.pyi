"""The public names, for editors and type checkers; `__init__.py` imports them when they are first used."""

from llama2.chat import Message as Message, render as render
from llama2.checkpoint.hub import pull as pull
from llama2.checkpoint.store import convert as convert, save as save
from llama2.data.corpus.prepare import PrepareConfig as PrepareConfig, prepare as prepare
from llama2.errors import (
    ChatError as ChatError,
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    DataError as DataError,
    HubError as HubError,
    Llama2Error as Llama2Error,
    RequestError as RequestError,
    TokenizerError as TokenizerError,
    TokenizerMissing as TokenizerMissing,
    TrainingError as TrainingError,
)
from llama2.infer.request import SamplingParams as SamplingParams
from llama2.llm import LLM as LLM, Score as Score, TextCompletion as TextCompletion, load as load
from llama2.model.config import ModelConfig as ModelConfig, RopeScaling as RopeScaling
from llama2.model.family import FAMILY as FAMILY
from llama2.model.transformer import Transformer as Transformer, build as build
from llama2.tokenizer.formats import load_tokenizer as load_tokenizer
from llama2.tokenizer.tokenizer import StreamDecoder as StreamDecoder, Tokenizer as Tokenizer
from llama2.tokenizer.train import train_tokenizer as train_tokenizer
from llama2.train.config import PretrainConfig as PretrainConfig
from llama2.train.pretrain import pretrain as pretrain
from llama2.tutorial import (
    LLama2Model as LLama2Model,
    LLama2Tokenizer as LLama2Tokenizer,
    LLaMAForCausalLM as LLaMAForCausalLM,
    LLaMATokenizer as LLaMATokenizer,
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
    "train_tokenizer",
]
