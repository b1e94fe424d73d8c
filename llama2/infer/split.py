"""A model that is too large for one device answers on several: each process holds a part of every matrix.

The first process runs the engine as always. Before each forward pass, and each change of a cache, it says to the
others what it is about to do, and they do the same with their parts (`follow`):

    rank 0   engine -> place, hidden -----+--> sums over the ranks --> logits -> sampling
    rank 1..                 place, hidden+

What is said is numbers, as JSON. Followers know no requests, no sampling and no text.
"""

import json
import weakref
from collections.abc import Sequence as Many
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama2.infer.cache import PagedCache
from llama2.infer.request import Request
from llama2.infer.sequence import Sequence, Span
from llama2.model.transformer import Transformer
from llama2.parallel.mesh import World


class LedCache(PagedCache):
    """The first process's cache: what happens to it happens to the others'."""

    def __init__(self, leader: "Leader", number: int, **settings: Any):
        super().__init__(leader.model.config, **settings)
        self.leader, self.number = leader, number

    def grow(self, n_blocks: int) -> None:
        self.leader.say("grow", self.number, n_blocks)
        super().grow(n_blocks)

    def clear(self) -> None:
        self.leader.say("clear", self.number)
        super().clear()

    def copy_block(self, source: int, target: int) -> None:
        self.leader.say("copy_block", self.number, source, target)
        super().copy_block(source, target)

    def place(self, spans: Many[Span]) -> None:
        said = [[span.sequence.blocks, span.start, len(span.tokens)] for span in spans]
        self.leader.say("place", self.number, said)
        super().place(spans)


class Leader:
    """Speaks to the other processes on behalf of a split model."""

    def __init__(self, model: Transformer, world: World):
        self.model, self.world = model, world
        self.n_caches, self._gone = 0, list[int]()
        self._hidden = model.hidden
        # The model says by itself what it does, whoever calls it; and the engine asks it for a cache.
        model.__dict__.update(hidden=self.hidden, split=self)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, documents=None, cache=None) -> Tensor:
        assert documents is None
        number = cache.number if isinstance(cache, LedCache) else None
        self.say("hidden", tokens.tolist(), None if positions is None else positions.tolist(), number)
        return self._hidden(tokens, positions, None, cache)

    def cache(self, **settings: Any) -> LedCache:
        """Return a cache for this process's heads; the others make theirs."""
        self.n_caches += 1
        self.say("cache", self.n_caches)
        cache = LedCache(self, self.n_caches, n_kv_heads=_own_heads(self.model, self.world), **settings)
        weakref.finalize(cache, self._gone.append, cache.number)
        return cache

    def say(self, *what: Any) -> None:
        """Tell the others; first of all which caches are gone."""
        while self._gone:
            self._broadcast("forget", self._gone.pop())
        self._broadcast(*what)

    def _broadcast(self, *what: Any) -> None:
        data = torch.frombuffer(bytearray(json.dumps(what).encode()), dtype=torch.uint8).to(self.world.device)
        dist.broadcast(torch.tensor([len(data)], device=self.world.device), src=0)
        dist.broadcast(data, src=0)

    def dismiss(self) -> None:
        """Let the others go."""
        self.say("end")


@torch.no_grad()
def follow(model: Transformer, world: World) -> None:
    """Do what the first process says, until it says that it is over."""
    caches: dict[int, PagedCache] = {}
    weight = model.tok_embeddings.weight
    while True:
        what, *said = _hear(world)
        if what == "end":
            return
        if what == "cache":
            settings: dict[str, Any] = dict(dtype=weight.dtype, device=weight.device, is_invariant=False)
            caches[said[0]] = PagedCache(model.config, n_kv_heads=_own_heads(model, world), **settings)
        elif what == "hidden":
            tokens, positions, number = said
            placed = None if positions is None else torch.tensor(positions, device=world.device)
            cache = None if number is None else caches[number]
            model.hidden(torch.tensor(tokens, device=world.device), placed, cache=cache)
        elif what == "forget":
            del caches[said[0]]
        elif what == "place":
            caches[said[0]].place([_span(*each) for each in said[1]])
        else:
            getattr(caches[said[0]], what)(*said[1:])


def _hear(world: World) -> list[Any]:
    size = torch.zeros(1, dtype=torch.long, device=world.device)
    dist.broadcast(size, src=0)
    data = torch.empty(int(size), dtype=torch.uint8, device=world.device)
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.tolist()))


def _span(blocks: list[int], start: int, n_tokens: int) -> Span:
    return Span(Sequence(Request("", ()), 0, 0, [], blocks=blocks), start, [0] * n_tokens)


def _own_heads(model: Transformer, world: World) -> int:
    return model.config.n_kv_heads // world.tp
