"""From a plan to logits: one forward pass over all that a step reads."""

from collections.abc import Iterable, Iterator, Sequence as Many
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama2.infer.cache import PagedCache
from llama2.infer.invariant import ROW_INVARIANT
from llama2.infer.sequence import Span
from llama2.model.arithmetic import computing
from llama2.model.lora import active_adapters, set_active
from llama2.model.transformer import Transformer

EXACT_ROWS = 32
"""Up to here every number of rows is computed as it is: so many answers may well run at once."""


class Runner:
    """A model and its cache."""

    def __init__(self, model: Transformer, *, is_invariant: bool):
        weight = model.tok_embeddings.weight
        split = getattr(model, "split", None)  # over several processes (`split.py`)
        self.model, self.device, self.is_invariant = model, weight.device, is_invariant and split is None
        settings: dict[str, Any] = dict(dtype=weight.dtype, device=weight.device, is_invariant=self.is_invariant)
        self.cache: PagedCache = split.cache(**settings) if split else PagedCache(model.config, **settings)

    @torch.no_grad()
    def hidden(self, spans: Many[Span]) -> Float[Tensor, "N D"]:
        """Read the tokens of all spans; return their hidden states, one after the other."""
        # Dynamic RoPE turns by a row's length: then each sequence is a row of its own.
        parts = [[span] for span in spans] if self.model.rotation.is_dynamic else [spans]
        with self._computing(), self._adapted(spans[0].sequence.request.adapter):
            found = [self._hidden(part) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _hidden(self, spans: Many[Span]) -> Float[Tensor, "N D"]:
        tokens = [token_id for span in spans for token_id in span.tokens]
        n_tokens, n_rows = len(tokens), self._rows(len(tokens))
        padded = torch.tensor([tokens + tokens[:1] * (n_rows - n_tokens)], device=self.device)
        where = [position for span in spans for position in range(span.start, span.end)]
        positions = torch.tensor([where + [0] * (n_rows - n_tokens)])
        self.cache.place(spans)
        return self.model.hidden(padded, positions.to(self.device), cache=self.cache)[0, :n_tokens]

    @torch.no_grad()
    def project(self, hidden: Float[Tensor, "R D"], rows: Iterable[int]) -> Float[Tensor, "R V"]:
        """Return the logits of some rows of hidden states."""
        wanted = [*rows]
        index = torch.tensor(wanted + wanted[:1] * (self._rows(len(wanted)) - len(wanted)), device=self.device)
        with self._computing():
            return self.model.project(hidden[index])[: len(wanted)]

    def _rows(self, n: int) -> int:
        """Return how many rows are computed for n: on a CPU oneDNN compiles and keeps code for every number of them.

        A server that had read 6,000 prompts of all lengths had grown from 0.3 to 0.9 GB by that (docs/log.md).
        """
        if n <= EXACT_ROWS or self.device.type != "cpu":
            return n
        step = 16 if n <= 128 else 64
        return -(-n // step) * step

    def fingerprint(self) -> int:
        """Return a number that changes when the weights do, or the adapters that take part: then the cache is stale."""
        weights = tuple((weight.data_ptr(), weight._version) for weight in self.model.parameters())
        return hash((weights, active_adapters(self.model)))

    def _computing(self):
        return computing(ROW_INVARIANT) if self.is_invariant else nullcontext()

    @contextmanager
    def _adapted(self, adapter: str | None) -> Iterator[None]:
        """Within this, a request's adapter takes part besides those that always do."""
        if adapter is None:
            yield
            return
        always = active_adapters(self.model)
        set_active(self.model, {*always, adapter})
        try:
            yield
        finally:
            set_active(self.model, always)
