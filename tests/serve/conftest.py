"""One server for all tests of the room, on a free port of this machine: a pocket model, and one that calls tools."""

import threading
import time
from contextlib import contextmanager

import openai
import pytest
import torch

import llama2
from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from llama2.serve.config import ServeConfig
from llama2.serve.models import Models
from llama2.serve.run import run
from llama2.serve.server import Server
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.vocabulary import CHAR_OF_BYTE, CONTROL, LLAMA3_SPLIT, NORMAL, Vocabulary, spell_bytes
from tests.pocket import POCKET, pocket_tokenizer

CALL = ['{"name": ', '"weather"', ', "param', 'eters": ', '{"city": ', '"Par', "is }", '\\""', "}}"]
TEXT = ["It", " is", " sunny", " in", " Paris", "."]
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.fixture(scope="session")
def pocket_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "pocket"
    llama2.save(build(POCKET, seed=0), path, tokenizer=pocket_tokenizer())
    return path


@pytest.fixture(scope="session")
def caller_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "caller"
    tokenizer = caller_tokenizer()
    llama2.save(caller_model(tokenizer), path, tokenizer=tokenizer)
    return path


def caller_tokenizer() -> Tokenizer:
    """The 256 bytes, the pieces of two answers, and the special tokens of Llama 3."""
    own = [spell_bytes(piece.encode()) for piece in [*CALL, *TEXT] if len(piece) > 1]
    pieces = (*CHAR_OF_BYTE.values(), *own, "~~", *SPECIALS)
    types = (NORMAL,) * (len(pieces) - len(SPECIALS)) + (CONTROL,) * len(SPECIALS)
    ids = {piece: i for i, piece in enumerate(pieces)}
    return Tokenizer(
        Vocabulary("bytes", pieces, types, split=LLAMA3_SPLIT, bos_id=ids[SPECIALS[0]], eos_id=ids[SPECIALS[1]])
    )


def caller_model(tokenizer: Tokenizer):
    """A Llama in which each token decides the next one: after the line break of a header it calls a tool.

    Where logit_bias forbids the first token of the call, it writes a sentence instead.
    """
    ids = tokenizer.vocabulary.ids
    n_vocab, end = tokenizer.n_vocab, ids["<|eot_id|>"]
    width = -(-n_vocab // 8) * 8
    model = build(ModelConfig(width, 1, 2, n_vocab, 16, context_length=2048))
    start = ids[spell_bytes(b"\n")]
    paths = [[*(ids[spell_bytes(piece.encode())] for piece in words), end] for words in (CALL, TEXT)]
    follows = torch.zeros(n_vocab, width)
    for path, weight in zip(paths, (8.0, 4.0), strict=True):
        for before, after in zip([start, *path], path, strict=False):
            follows[after, before] = weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                parameter.zero_()
        model.tok_embeddings.weight.copy_(torch.eye(n_vocab, width))
        model.output.weight.copy_(follows)
    return model


@contextmanager
def serving(keys=(), **settings):
    """Run a server in a thread; yield it once it listens and its models are there."""
    config = ServeConfig(port=0, device="cpu", **settings)
    server = Server(config, Models(config))
    thread = threading.Thread(target=run, args=(server, keys))
    thread.start()
    until(lambda: server.url and all(worker.llm for worker in server.models.workers))
    try:
        yield server
    finally:
        server.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


def until(is_so, seconds=20.0):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def server(pocket_path, caller_path):
    models = (f"pocket={pocket_path}", f"caller={caller_path}")
    with serving(models=models, max_waiting=64, read_timeout_s=1.5) as running:
        yield running


CLIENTS: list[openai.OpenAI] = []


def client_of(server, key: str = "none") -> openai.OpenAI:
    """Return OpenAI's client of a server; it is closed when all tests are done."""
    CLIENTS.append(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0))
    return CLIENTS[-1]


@pytest.fixture(scope="session", autouse=True)
def _clients_are_closed():
    yield
    while CLIENTS:
        CLIENTS.pop().close()


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="session")
def pocket(pocket_path):
    return llama2.load(pocket_path, device="cpu")
