"""The front door of text in, text out."""

from llama2.llm.llm import LLM, Ids, Messages, Prompt, Score, TextCompletion, load
from llama2.llm.loading import default_device, tokenizer_of
from llama2.llm.options import SamplingOptions, sampling_defaults
from llama2.llm.text import AnswerTexts, TextStream

__all__ = [
    "LLM",
    "AnswerTexts",
    "Ids",
    "Messages",
    "Prompt",
    "SamplingOptions",
    "Score",
    "TextCompletion",
    "TextStream",
    "default_device",
    "load",
    "sampling_defaults",
    "tokenizer_of",
]
