"""How likely answers are that are given, not sampled: many rows at once, and only the logits that count.

Rows are padded on the right, where causal attention cannot see it:

    <s> [INST] ... [/INST] positive </s>
                           ^^^^^^^^^^^^^      ln p of these
    <s> [INST] ... [/INST] negative ...  0 0
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llama2.chat import Rendered
from llama2.errors import RequestError
from llama2.llm import LLM

MAX_TOKENS = 16_384
"""In one forward pass, padding included."""


@torch.no_grad()
def answer_logprobs(llm: LLM, rows: Sequence[Rendered]) -> list[list[float]]:
    """Return ln p of each marked token of each row, given the tokens before it."""
    for row in rows:
        if len(row.tokens) > llm.config.context_length:
            raise RequestError(
                f"prompt and answer have {len(row.tokens)} tokens and the model's context holds "
                f"{llm.config.context_length}; shorten the text, or give fewer examples"
            )
    found: dict[int, list[float]] = {}
    for chosen in _batches(rows, llm):
        found |= zip(chosen, _batch_logprobs(llm, [rows[i] for i in chosen]), strict=True)
    return [found[i] for i in range(len(rows))]


def _batches(rows: Sequence[Rendered], llm: LLM) -> Iterator[list[int]]:
    """Yield which rows to read together: of like length, as many as the engine would answer at once."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].tokens)):
        width = len(rows[i].tokens)
        is_full = len(batch) == llm.max_batch or (len(batch) + 1) * width > MAX_TOKENS
        # Dynamic RoPE turns by the length of the whole row, so padding would turn the shorter ones.
        is_other = llm.model.rotation.is_dynamic and batch and len(rows[batch[0]].tokens) != width
        if batch and (is_full or is_other):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _batch_logprobs(llm: LLM, rows: Sequence[Rendered]) -> list[list[float]]:
    width = max(len(row.tokens) for row in rows) - 1
    tokens = torch.tensor([row.tokens[:-1] + [0] * (width + 1 - len(row.tokens)) for row in rows])
    marked = [(i, at) for i, row in enumerate(rows) for at, mark in enumerate(row.trainable) if mark]
    device = llm.model.tok_embeddings.weight.device
    of_row, at = torch.tensor(marked, device=device).T
    wanted = torch.tensor([rows[i].tokens[k] for i, k in marked], device=device)
    logits: Tensor = llm.model.project(llm.model.hidden(tokens.to(device))[of_row, at - 1])  # [N V]
    logprobs = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].tolist()
    found: list[list[float]] = [[] for _ in rows]
    for (i, _), logprob in zip(marked, logprobs, strict=True):
        found[i].append(logprob)
    return found
