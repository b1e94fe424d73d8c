"""llama2: the Llama 2 recipe in one package.

    import llama2
    llm = llama2.load("path/or/hub-name")
    print(llm.generate("Once upon a time", max_new_tokens=50))

Names are imported when first used, so `import llama2` loads no PyTorch.
"""

import importlib

_HOME = {
    "ChatError": "llama2.errors",
    "CheckpointError": "llama2.errors",
    "ConfigError": "llama2.errors",
    "DataError": "llama2.errors",
    "FAMILY": "llama2.model.family",
    "HubError": "llama2.errors",
    "LLM": "llama2.llm",
    "LLaMAForCausalLM": "llama2.tutorial",
    "LLaMATokenizer": "llama2.tutorial",
    "LLama2Model": "llama2.tutorial",
    "LLama2Tokenizer": "llama2.tutorial",
    "Llama2Error": "llama2.errors",
    "Message": "llama2.chat",
    "ModelConfig": "llama2.model.config",
    "PrepareConfig": "llama2.data.corpus.prepare",
    "PretrainConfig": "llama2.train.config",
    "RequestError": "llama2.errors",
    "RopeScaling": "llama2.model.config",
    "SamplingParams": "llama2.infer.request",
    "Score": "llama2.llm",
    "StreamDecoder": "llama2.tokenizer.tokenizer",
    "TextCompletion": "llama2.llm",
    "Tokenizer": "llama2.tokenizer.tokenizer",
    "TokenizerError": "llama2.errors",
    "TokenizerMissing": "llama2.errors",
    "TrainingError": "llama2.errors",
    "Transformer": "llama2.model.transformer",
    "build": "llama2.model.transformer",
    "convert": "llama2.checkpoint.store",
    "load": "llama2.llm",
    "load_tokenizer": "llama2.tokenizer.formats",
    "prepare": "llama2.data.corpus.prepare",
    "preprocess_text": "llama2.tutorial",
    "pretrain": "llama2.train.pretrain",
    "pull": "llama2.checkpoint.hub",
    "render": "llama2.chat",
    "save": "llama2.checkpoint.store",
    "train_tokenizer": "llama2.tokenizer.train",
}

__version__ = "0.1.0"
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'llama2' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
