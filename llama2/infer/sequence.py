"""One answer on its way: what was read, what was written, and which blocks hold it."""

from dataclasses import dataclass, field

from llama2.infer.blocks import BLOCK, BlockPool, block_hash
from llama2.infer.request import Matcher, Request, SamplingParams, TopLogprobs


@dataclass(eq=False)
class Sequence:
    """One of a request's answers. `ids[:n_computed]` are in the cache, the rest is still to be read."""

    request: Request
    index: int
    seed: int
    ids: list[int]
    """Prompt and answer."""
    arrival: int = 0
    n_computed: int = 0
    n_cached: int = 0
    """Prompt tokens that were found in the cache."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks at the beginning of `ids`."""
    matcher: Matcher | None = None
    prompt_logprobs: list[tuple[float, TopLogprobs]] = field(default_factory=list)
    """Of prompt tokens 1, 2, ... as far as they are known."""

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def answer(self) -> list[int]:
        return self.ids[self.n_prompt :]

    @property
    def n_answer(self) -> int:
        return len(self.ids) - self.n_prompt

    def hash_up_to(self, n_tokens: int) -> list[bytes]:
        """Return the hashes of all full blocks within the first n_tokens."""
        while (len(self.hashes) + 1) * BLOCK <= n_tokens:
            start = len(self.hashes) * BLOCK
            before = self.hashes[-1] if self.hashes else b""
            self.hashes.append(block_hash(before, self.ids[start : start + BLOCK], self.request.adapter))
        return self.hashes[: n_tokens // BLOCK]

    def find_prefix(self, pool: BlockPool) -> list[int]:
        """Return the blocks that hold the beginning of `ids` already; at least the last token is left to read."""
        found = []
        for name in self.hash_up_to(len(self.ids) - 1):
            block = pool.find(name)
            if block is None:
                break
            found.append(block)
        return found

    def remember(self, pool: BlockPool) -> None:
        """Let others find the blocks that are full."""
        for block, name in zip(self.blocks, self.hash_up_to(self.n_computed), strict=False):
            if block not in pool.cached:
                pool.remember(block, name)

    def release(self, pool: BlockPool) -> None:
        """Give all blocks back, the last first, so that the beginning is found longest."""
        for block in reversed(self.blocks):
            pool.release(block)
        self.blocks.clear()
        self.n_computed = 0


@dataclass(frozen=True)
class Span:
    """The next tokens of a sequence that one step reads: `tokens` from position `start`."""

    sequence: Sequence
    start: int
    tokens: list[int]
    """From `ids`, and after their end a draft."""
    n_drafted: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_last(self) -> bool:
        """After it everything is read, so that the next token can be chosen."""
        return self.end - self.n_drafted == len(self.sequence.ids)
