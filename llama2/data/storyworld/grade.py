"""An exact judge of stories: is it one, and do who, what and where stay the same to the end?

Form: the text is, from beginning to end, sentences of the story world in an order that tells a story.
Consistency: every name, kind, pronoun, thing and place in it can belong to one and the same cast.
"""

import re
import string
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import product

from llama2.data.storyworld.stories import Facts, choices, order_of_beats, separator, template
from llama2.data.storyworld.words import Character, Language, Spot, Thing, table

OPTIONAL_BEATS = ("flavour", "react", "thank")
Identities = frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class Grade:
    """How good a story is; `problem` says what is wrong first, and is empty if nothing is."""

    is_well_formed: bool
    is_consistent: bool
    n_sentences: int
    """Sentences that could be followed."""
    problem: str = ""


def grade(text: str, language: Language, *, facts: Facts | None = None) -> Grade:
    """Judge a story; with `facts` it must also be about these people, this thing and this place."""
    text = " ".join(text.split()) if language != "zh" else "".join(text.split())
    cast = {} if facts is None else _cast_of(facts)
    n_sentences, problem, is_consistent = 0, "", True
    for found in _follow(text, language):
        if isinstance(found, str):
            return Grade(False, is_consistent, n_sentences, problem or found)
        n_sentences += 1
        for slot, form, surface in found:
            able = _able(slot, form, language)[surface]
            cast[slot] = cast[slot] & able if slot in cast else able
            if not cast[slot] and is_consistent:
                is_consistent, problem = False, f"sentence {n_sentences}: {surface!r} does not fit what came before"
    names = [{identity[0] for identity in cast[slot]} for slot in "hf"]
    if is_consistent and len(names[0]) == 1 and names[0] == names[1]:
        return Grade(True, False, n_sentences, "hero and friend have the same name")
    return Grade(True, is_consistent, n_sentences, problem)


def _cast_of(facts: Facts) -> dict[str, Identities]:
    return {
        "h": frozenset({facts.hero}),
        "f": frozenset({facts.friend}),
        "t": frozenset({facts.thing}),
        "p": frozenset({(facts.place,)}),
    }


def _follow(text: str, language: Language):
    """Yield the (slot, form, surface) triples of each sentence in turn; a str says why the text cannot be followed."""
    at, plot, is_good = 0, 0, True
    beats = list(order_of_beats(is_good))
    while beats:
        beat = beats.pop(0)
        match = None
        for plot_id, name in _possible(beat, plot):
            match = next(filter(None, (each.match(text, at) for each in _patterns(name, plot_id, language))), None)
            if match:
                plot = plot_id
                if name == "bad":
                    beats = list(order_of_beats(False))[-2:]
                break
        if match:
            yield [(*key.split("__")[:2], surface) for key, surface in match.groupdict().items()]
            at = match.end()
        elif beat not in OPTIONAL_BEATS:
            yield f"no {beat} follows {text[max(0, at - 30) : at]!r}: {text[at : at + 60]!r}"
            return
    if at < len(text):
        yield f"the story is over, but goes on: {text[at : at + 60]!r}"


def _possible(beat: str, plot: int) -> list[tuple[int, str]]:
    """Return (plot, beat) pairs that could stand here: any plot can begin, and end well or badly."""
    if beat == "problem":
        return [(plot_id, beat) for plot_id in range(len(table("sentences")["plots"]))]
    return [(plot, "good"), (plot, "bad")] if beat == "good" else [(plot, beat)]


@cache
def _patterns(beat: str, plot: int, language: Language) -> tuple[re.Pattern[str], ...]:
    """Return one regular expression per sentence of a beat; groups are named slot__form__number."""
    gap = re.escape(separator(language))
    compiled = []
    for which in range(len(choices(beat, plot))):
        pattern = ""
        for n, (literal, name, _, _) in enumerate(string.Formatter().parse(template(beat, which, plot, language))):
            pattern += re.escape(literal)
            if name:
                slot, _, form = name.partition(".")
                surfaces = sorted(_able(slot, form, language), key=len, reverse=True)
                pattern += f"(?P<{slot}__{form}__{n}>{'|'.join(map(re.escape, surfaces))})"
        compiled.append(re.compile(f"{pattern}(?:{gap}|$)"))
    return tuple(compiled)


@cache
def _able(slot: str, form: str, language: Language) -> dict[str, Identities]:
    """Return, for each surface that a slot can have in this form, who or what it can be."""
    words = table("words")
    if slot in "hf":
        each = {
            (n, k): Character(words["names"][n], words["kinds"][k], language)
            for n, k in product(range(len(words["names"])), range(len(words["kinds"])))
        }
    elif slot == "t":
        each = {
            (n, q): Thing(words["nouns"][n], words["qualities"][q], language)
            for n, q in product(range(len(words["nouns"])), range(len(words["qualities"])))
        }
    else:
        each = {(n,): Spot(place, language) for n, place in enumerate(words["places"])}
    able: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for identity, word in each.items():
        able[getattr(word, form) if form else str(word)].add(identity)
    return {surface: frozenset(identities) for surface, identities in able.items()}
