"""Which language a text of the story world is in: the share of its words that the world knows in that language.

The world is closed, so this is exact for what belongs to it; for other text it is as good as the overlap. A
Chinese character counts as a word.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from llama2.data.storyworld.patterns import able
from llama2.data.storyworld.words import LANGUAGES, Language, table

TABLES = ("sentences", "tasks", "dialogues", "instructions", "safety")
SLOT_OF = {"h": "h", "f": "h", "x": "h", "t": "t", "u": "t", "p": "p", "q": "p"}
"""Which kind of word stands in a slot: a character, a thing, a place."""
_SLOT = re.compile(r"\{(\w+)(\.\w+)?\}")
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, Chinese characters one by one."""
    return _WORD.findall(text.lower())


@cache
def lexicon(language: Language) -> frozenset[str]:
    """Return every word that the story world uses in a language."""
    found: set[str] = set()
    for name in TABLES:
        for text in _texts(table(name), language, inside=False):
            found.update(words_of(_SLOT.sub(" ", text)))
            found.update(word for slot, form in _SLOT.findall(text) for word in _fillings(slot, form[1:], language))
            found.update(_joined(text))
    return frozenset(found)


@cache
def _fillings(slot: str, form: str, language: Language) -> frozenset[str]:
    surfaces = able(SLOT_OF[slot], form, language) if slot in SLOT_OF else ()
    return frozenset(word for surface in surfaces for word in words_of(surface))


def _texts(node: Any, language: Language, *, inside: bool) -> Iterator[str]:
    """Yield the texts under a language's key; the outermost such key decides."""
    if isinstance(node, str):
        if inside:
            yield node
    elif isinstance(node, list):
        for each in node:
            yield from _texts(each, language, inside=inside)
    elif isinstance(node, dict):
        for key, each in node.items():
            if inside or key not in LANGUAGES or key == language:
                yield from _texts(each, language, inside=inside or key == language)


def _joined(text: str) -> Iterator[str]:
    """Yield Spanish words that end in a slot, such as "encontrar{t.lo}", in both genders."""
    for stem, slot in re.findall(r"(\w+)\{[a-z]\.(lo|o)\}", text):
        yield from (stem + ending for ending in (("la", "lo") if slot == "lo" else ("a", "o")))


def share_in(text: str, language: Language) -> float:
    """Return which share of a text's words belong to a language, from 0 to 1; 0 for a text without words."""
    words = words_of(text)
    return sum(word in lexicon(language) for word in words) / len(words) if words else 0.0


def is_in(text: str, language: Language) -> bool:
    """Say whether a text is in a language: at least half of its words are, and no other language has more of them.

    A text of names alone, or a "no", is in English and in Spanish.
    """
    share = share_in(text, language)
    return share >= 0.5 and all(share_in(text, other) <= share for other in LANGUAGES)
