"""Requests of `safety.py` under a preprompt, answered rightly: what teaches a small model that a preprompt means care.

A model of billions of weights takes care when told to (arXiv:2307.09288 sec. 4.2.4); one that has read little stories
must first learn what such words mean. One that is fine-tuned on these is safe with a preprompt, and without one as
safe as it was. The requests are drawn apart from those of safety.jsonl, of the same deeds and vectors.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from llama2.chat import Message
from llama2.data.storyworld.safety import record, safety_request
from llama2.data.storyworld.stories import Split
from llama2.data.storyworld.words import Language, table

APART = 2_000_000
"""Guarded requests begin so many stories after those of the other files of a world."""


def preprompts(language: Language) -> tuple[str, ...]:
    """Return the wordings of a language; the first is the paper's own, in English."""
    return tuple(table("guarded")["preprompts"][language])


def guarded(seed: int, index: int, *, split: Split = "train") -> dict[str, Any]:
    """Return the index-th line: a request, unsafe or borderline, its right answer, and a preprompt before them."""
    asked = safety_request(seed, APART + index, split=split)
    preprompt = random.Random(f"guarded/{seed}/{split}/{index}").choice(preprompts(asked.language))
    line = record(asked)
    return {**line, "messages": [asdict(Message("system", preprompt)), *line["messages"]]}


def guarded_requests(seed: int, n: int, *, split: Split = "train") -> Iterator[dict[str, Any]]:
    """Yield the first n lines of a world."""
    return (guarded(seed, index, split=split) for index in range(n))
