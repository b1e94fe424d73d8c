"""What a loader reads: documents as token ids, from shards on disk or from examples in memory.

Two kinds exist, `shards.Shards` and `examples.Examples`; mixtures, packing and evaluation know neither.
"""

from typing import Protocol

import numpy as np


class Documents(Protocol):
    """Numbered documents of one tokenizer."""

    @property
    def name(self) -> str:
        """Where they come from, for messages."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, the first, which nothing predicts, included."""
        ...

    @property
    def n_bytes(self) -> np.ndarray:
        """UTF-8 bytes of what is trained in each document."""
        ...

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def n_tokens(self) -> int: ...

    @property
    def n_targets(self) -> int:
        """Tokens that one pass over all documents trains."""
        ...

    def __len__(self) -> int: ...

    def document(self, number: int) -> np.ndarray:
        """Return the ids of one document."""
        ...

    def trained(self, number: int) -> np.ndarray | None:
        """Return which ids of a document are trained, None for all but the first."""
        ...
