"""Keys and values of what was read so far: one dense block of memory per layer.

A key is visible iff it does not stand after the query, so whatever lies in a row beyond its sequence's
end (padding of a ragged batch, an earlier sequence) is never seen, and is overwritten in time.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama2.model.attention import attend, visible
from llama2.model.config import ModelConfig

GROWTH = 256


class DenseCache:
    """Rows of keys and values; capacity grows by itself. Tell it with `place` where the next tokens stand."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device):
        self.window = config.sliding_window
        shape = (0, config.n_kv_heads, 0, config.head_dim)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]  # [R K S Dh]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    def clear(self) -> None:
        """Overwrite everything with zeros; the sequences in it are lost."""
        for store in (*self.k, *self.v):
            store.zero_()

    def reserve(self, n_rows: int, n_tokens: int) -> None:
        """Make room for at least this many rows and tokens per row, keeping what is there."""
        rows, _, tokens, _ = self.k[0].shape
        if n_rows <= rows and n_tokens <= tokens:
            return
        if n_tokens > tokens:
            n_tokens = -(-max(n_tokens, tokens * 3 // 2) // GROWTH) * GROWTH
        n_rows, n_tokens = max(n_rows, rows), max(n_tokens, tokens)
        for store in (self.k, self.v):
            for layer, old in enumerate(store):
                new = old.new_zeros((n_rows, old.shape[1], n_tokens, old.shape[3]))
                new[:rows, :, :tokens] = old
                store[layer] = new

    def copy_row(self, source: int, target: int, n_tokens: int) -> None:
        """Let row `target` begin with the first n_tokens of row `source`."""
        for store in (*self.k, *self.v):
            store[target, :, :n_tokens] = store[source, :, :n_tokens]

    def place(self, first_row: int, positions: Int[Tensor, "B T"], *, lengths: Sequence[int], by_row: bool) -> None:
        """The next forward pass brings tokens for rows first_row.. at these positions.

        positions: consecutive in each row. lengths: each row's largest position + 1, known to the caller without
        asking the device. by_row: attend to each row by itself, over exactly its own keys, so that its bits do
        not depend on the others.
        """
        n_rows, n_new = positions.shape
        self.reserve(first_row + n_rows, max(lengths))
        self.rows = range(first_row, first_row + n_rows)
        self.index = (torch.arange(first_row, first_row + n_rows, device=positions.device)[:, None], positions)
        self.lengths = lengths
        self.span = slice(lengths[0] - n_new, lengths[0]) if len(set(lengths)) == 1 else None
        self.is_fresh = n_new == max(lengths) and n_new > 1 and self.window is None  # nothing before these tokens
        self.by_row = by_row and n_new == 1
        self.mask = None
        if not self.is_fresh and not self.by_row and (n_rows > 1 or n_new > 1 or self.window is not None):
            keys = torch.arange(max(lengths), device=positions.device)[None]
            self.mask = visible(positions, keys, window=self.window)

    def attend(
        self, layer: int, q: Float[Tensor, "B T H Dh"], k: Float[Tensor, "B T K Dh"], v: Float[Tensor, "B T K Dh"]
    ) -> Float[Tensor, "B T H Dh"]:
        """Keep k and v, and attend over all that each query may see (`model.attention.Cache`)."""
        self._keep(self.k[layer], k)
        self._keep(self.v[layer], v)
        if self.is_fresh:
            return attend(q, k, v)
        if not self.by_row:
            return attend(q, *self._kept(layer, slice(self.rows.start, self.rows.stop), max(self.lengths)), self.mask)
        outs = [
            attend(q[i : i + 1], *self._kept(layer, slice(row, row + 1), length, self.window))
            for i, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True))
        ]
        return torch.cat(outs)

    def _keep(self, store: Float[Tensor, "R K S Dh"], new: Float[Tensor, "B T K Dh"]) -> None:
        """Write where `place` said; where all rows stand alike that is a plain copy."""
        if self.span is not None:
            store[self.rows.start : self.rows.stop, :, self.span] = new.transpose(1, 2)
        else:
            rows, positions = self.index
            store[rows, :, positions] = new

    def _kept(
        self, layer: int, rows: slice, length: int, window: int | None = None
    ) -> tuple[Float[Tensor, "B S K Dh"], Float[Tensor, "B S K Dh"]]:
        """Return views of the keys and values of some rows, up to a length, or the last `window` of those."""
        start = max(0, length - window) if window else 0
        k, v = (store[layer][rows, :, start:length].transpose(1, 2) for store in (self.k, self.v))
        return k, v
