"""A model that says a, b and c and stops, and judges of what it says."""

import torch

from llama2.checkpoint import store
from llama2.model.config import ModelConfig
from llama2.model.transformer import build
from tests.pocket import pocket_tokenizer

SHAPE = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=260, ffn_dim=24, n_kv_heads=1, context_length=256)
EOS, A = 2, 3 + ord("a")
STRONG = 15
"""How much more than at first the context matters."""
LIKELY = {A: 3.0, A + 1: 3.0, A + 2: 3.0, EOS: 2.6}


def chatty(folder, *, context_length=256, seed=1):
    """Write the model; what it says depends a little on what it reads."""
    shape = ModelConfig(**{**vars(SHAPE), "context_length": context_length})
    model = build(shape, seed=seed)
    with torch.no_grad():
        for weight in model.layers.parameters():
            if weight.ndim == 2:
                weight.mul_(STRONG)
        model.tok_embeddings.weight.mul_(30).add_(1)  # so that every hidden state points the same way, more or less
        model.output.weight.mul_(12).add_(-0.4)
        for token, bias in LIKELY.items():
            model.output.weight[token] += 0.4 + bias / shape.dim
    store.save(model, folder, tokenizer=pocket_tokenizer())
    return folder


def says_its_letter(instruction, answer):
    """Obeys {"text": "say b", "letter": "b"}."""
    return instruction["letter"] in answer


def letters(conversations, answers):
    """The more of an answer is the letter a, the better."""
    assert all(message.role != "system" for asked in conversations for message in asked)
    return [float(answer.count("a")) for answer in answers]


def same(conversations, answers):
    return [1.0 for _ in answers]
