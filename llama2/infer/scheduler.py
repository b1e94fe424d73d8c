"""Who is read in this step, and how much of each: answers under way first, then prompts, in chunks.

waiting --admit--> running --finished or aborted--> gone
   ^                  |
   +----preempted-----+    its blocks are needed by others; it is read again later, and goes on as if never stopped
"""

from collections import deque
from collections.abc import Callable

from llama2.infer.blocks import BLOCK, BlockPool
from llama2.infer.sequence import Sequence, Span


class Scheduler:
    """Keeps the queues, and the blocks of whoever runs."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch: int,
        max_step_tokens: int,
        max_blocks: int,
        on_grow: Callable[[int], None],
        on_copy: Callable[[int, int], None],
    ):
        """on_grow(n_blocks) and on_copy(source, target) do with the cache what is done here with numbers."""
        self.pool = pool
        self.max_batch, self.max_step_tokens, self.max_blocks = max_batch, max_step_tokens, max_blocks
        self.on_grow, self.on_copy = on_grow, on_copy
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.n_preempted = 0
        self._n_arrived = 0
        self._served: dict[str | None, int] = {}
        self._n_plans = 0

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self._n_arrived
        self._n_arrived += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: its blocks are free."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.release(self.pool)

    def replace(self, before: list[Sequence], after: list[Sequence]) -> None:
        """Let sequences go on as others, which hold blocks of theirs already."""
        self.running += after
        for sequence in before:
            self.remove(sequence)

    def plan(self, draft: Callable[[Sequence], list[int]] = lambda _: []) -> list[Span]:
        """Return what this step reads; the blocks for it are reserved. draft: tokens that a sequence may go on with.

        All of it is read through the same adapter; whose turn is longest ago is served.
        """
        adapter, spans, budget = self._next_adapter(), [], self.max_step_tokens
        mine = [each for each in self.running if each.request.adapter == adapter]
        for number, sequence in enumerate(mine, 1):
            if sequence not in self.running or budget <= 0:  # preempted just now
                continue
            drafted = draft(sequence) if sequence.n_computed == len(sequence.ids) - 1 else []
            most = max(1, budget - (len(mine) - number))  # guesses and prompts leave the others a token each
            tokens = [*sequence.ids[sequence.n_computed :], *drafted][:most]
            if not tokens:  # a hypothesis that waits for the others
                continue
            if not self._reserve(sequence, sequence.n_computed + len(tokens)):
                drafted, tokens = [], tokens[:1]
                if not self._reserve(sequence, sequence.n_computed + 1, by_force=True):
                    continue
            budget -= len(tokens)
            n_drafted = max(0, sequence.n_computed + len(tokens) - len(sequence.ids))
            spans.append(Span(sequence, sequence.n_computed, tokens, n_drafted))
        # Whoever was preempted after its span was planned is not read.
        spans = [span for span in spans if span.sequence in self.running]
        spans += self._admit(adapter, budget)
        # Hypotheses that wait must not keep those that they wait for from being read.
        idle = [each for each in mine if each in self.running and each.n_computed == len(each.ids)]
        while idle and not spans:
            self.preempt(idle.pop())
            spans = self._admit(adapter, budget)
        return spans

    def _admit(self, adapter: str | None, budget: int) -> list[Span]:
        """Let waiting sequences in, in their order, as long as there is room for their first chunk."""
        spans: list[Span] = []
        for sequence in [each for each in self.waiting if each.request.adapter == adapter]:
            if budget <= 0 or len(self.running) >= self.max_batch:
                break
            twin = next((each for each in self.running if each.request is sequence.request), None)
            if twin is not None and twin.n_computed < twin.n_prompt:
                continue  # its prompt is being read: wait and share it
            self._begin(sequence, twin)
            tokens = sequence.ids[sequence.n_computed :][:budget]
            if not self._reserve(sequence, sequence.n_computed + len(tokens)):
                sequence.release(self.pool)
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.n_cached = sequence.n_cached or min(sequence.n_computed, sequence.n_prompt)
            budget -= len(tokens)
            spans.append(Span(sequence, sequence.n_computed, tokens))
        return spans

    def _begin(self, sequence: Sequence, twin: Sequence | None) -> None:
        """Take over what is in the cache already: a twin's prompt, or blocks that begin alike."""
        if sequence.params.prompt_logprobs is not None and sequence.index == 0:
            return  # every token of the prompt has to be read
        found = sequence.find_prefix(self.pool)
        n_computed = len(found) * BLOCK
        if twin is not None and sequence.n_prompt - 1 > n_computed:
            n_computed = sequence.n_prompt - 1
            found = twin.blocks[: -(-n_computed // BLOCK)]
        for block in found:
            self.pool.share(block)
        sequence.blocks, sequence.n_computed = list(found), n_computed

    def _reserve(self, sequence: Sequence, n_tokens: int, *, by_force: bool = False) -> bool:
        """Give a sequence blocks of its own to write positions n_computed..n_tokens-1; False if there are too few.

        by_force: whoever came last is preempted, in the end the sequence itself (then False).
        """
        shared = sequence.n_computed // BLOCK  # the block that is written next, if others read it too: copy it
        must_copy = shared < len(sequence.blocks) and self.pool.refs[sequence.blocks[shared]] > 1
        needed = -(-n_tokens // BLOCK) - len(sequence.blocks) + must_copy
        while not self._free(needed):
            if not by_force:
                return False
            last = max(self.running, key=lambda each: each.arrival)
            self.preempt(last)
            if last is sequence:
                return False
        if must_copy:
            source = sequence.blocks[shared]
            target = self.pool.take(sequence.blocks[shared - 1] if shared else None)
            self.on_copy(source, target)
            self.pool.release(source)
            sequence.blocks[shared] = target
            needed -= 1
        for _ in range(needed):
            sequence.blocks.append(self.pool.take(sequence.blocks[-1] if sequence.blocks else None))
        return True

    def _free(self, n_blocks: int) -> bool:
        """Make sure that so many blocks can be taken; the pool grows to its limit before anything is forgotten."""
        if n_blocks > self.pool.n_empty and self.pool.n_blocks < self.max_blocks:
            more = max(n_blocks - self.pool.n_empty, self.pool.n_blocks // 2, 16)
            self.pool.grow(min(more, self.max_blocks - self.pool.n_blocks))
            self.on_grow(self.pool.n_blocks)
        return n_blocks <= self.pool.n_free

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away; it waits to be read again."""
        self.running.remove(sequence)
        sequence.release(self.pool)
        later = [each for each in self.waiting if each.arrival > sequence.arrival]
        self.waiting.insert(len(self.waiting) - len(later), sequence)
        self.n_preempted += 1

    def _next_adapter(self) -> str | None:
        """Return the adapter whose turn it is."""
        present = dict.fromkeys(each.request.adapter for each in (*self.running, *self.waiting))
        if not present:
            return None
        chosen = min(present, key=lambda name: self._served.get(name, -1))
        self._n_plans += 1
        self._served[chosen] = self._n_plans
        return chosen
