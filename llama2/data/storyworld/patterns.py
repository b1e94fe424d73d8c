"""Sentences of the story world as regular expressions: whether a text could be one, and whom it then names.

An expression has one group for each slot, called slot__form__number; `able` says, for what stands there, who or
what it can be. Judges of stories and of answers read texts with these.
"""

import re
import string
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import product

from llama2.data.storyworld.stories import Facts, character, spot, thing
from llama2.data.storyworld.words import Character, Language, Spot, Thing, table

Identities = frozenset[tuple[int, ...]]


@cache
def expression(template: str, language: Language) -> str:
    """Return the regular expression of everything that a template can say."""
    pattern = ""
    for n, (literal, name, _, _) in enumerate(string.Formatter().parse(template)):
        pattern += re.escape(literal)
        if name:
            slot, _, form = name.partition(".")
            surfaces = sorted(able(slot, form, language), key=len, reverse=True)
            pattern += f"(?P<{slot}__{form}__{n}>{'|'.join(map(re.escape, surfaces))})"
    return pattern


def named(match: re.Match[str]) -> list[tuple[str, str, str]]:
    """Return the (slot, form, surface) of each slot of an expression that matched."""
    return [(*_slot_and_form(key), surface) for key, surface in match.groupdict().items() if surface is not None]


def _slot_and_form(key: str) -> tuple[str, str]:
    slot, form, _ = key.split("__")
    return slot, form


def identities(facts: Facts) -> dict[str, tuple[int, ...]]:
    """Return who and what the slots stand for."""
    return {"h": facts.hero, "f": facts.friend, "t": facts.thing, "p": (facts.place,)}


@cache
def able(slot: str, form: str, language: Language) -> dict[str, Identities]:
    """Return, for each surface that a slot can have in this form, who or what it can be."""
    found: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for identity, word in _words(slot, language):
        found[getattr(word, form) if form else str(word)].add(identity)
    return {surface: frozenset(each) for surface, each in found.items()}


def _words(slot: str, language: Language) -> Iterator[tuple[tuple[int, ...], Character | Thing | Spot]]:
    words = table("words")
    if slot in "hf":
        for n, k in product(range(len(words["names"])), range(len(words["kinds"]))):
            yield (n, k), character(n, k, language)
    elif slot == "t":
        for n, q in product(range(len(words["nouns"])), range(len(words["qualities"]))):
            yield (n, q), thing(n, q, language)
    else:
        for n in range(len(words["places"])):
            yield (n,), spot(n, language)
