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
        tokens = torch.tensor([[token_id for span in spans for token_id in span.tokens]])
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans])[None]
        self.cache.place(spans)
        return self.model.hidden(tokens.to(self.device), positions.to(self.device), cache=self.cache)[0]

    @torch.no_grad()
    def project(self, hidden: Float[Tensor, "R D"], rows: Iterable[int]) -> Float[Tensor, "R V"]:
        """Return the logits of some rows of hidden states."""
        picked = hidden[torch.tensor([*rows], device=self.device)]
        with self._computing():
            return self.model.project(picked)

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
