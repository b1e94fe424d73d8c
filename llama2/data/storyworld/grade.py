"""An exact judge of stories: is it one, and do who, what and where stay the same to the end?

Form: the text is, from beginning to end, sentences of the story world in an order that tells a story.
Consistency: every name, kind, pronoun, thing and place in it can belong to one and the same cast.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from llama2.data.storyworld.patterns import Identities, able, expression, identities, named
from llama2.data.storyworld.stories import Facts, choices, order_of_beats, separator, template
from llama2.data.storyworld.words import Language, table

Found = list[tuple[str, str, str]] | str
"""The (slot, form, surface) triples of a sentence; or why there is none."""
OPTIONAL_BEATS = ("flavour", "react", "thank")


@dataclass(frozen=True)
class Grade:
    """How good a story is; `problem` says what is wrong first, and is empty if nothing is."""

    is_well_formed: bool
    is_consistent: bool
    n_sentences: int
    """Sentences that could be followed."""
    problem: str = ""
    n_misfits: int = 0
    """Sentences that name somebody or something that does not fit what came before."""


def grade(text: str, language: Language, *, facts: Facts | None = None, about: str = "hftp") -> Grade:
    """Judge a story; with `facts` it must also be about these people, this thing and this place.

    `about` says which of them it must keep to: h hero, f friend, t thing, p place.
    """
    cast = {} if facts is None else {slot: frozenset({identities(facts)[slot]}) for slot in about}
    return _judged(_follow(_tidy(text, language), language), language, cast)


def grade_passage(text: str, language: Language, *, facts: Facts) -> Grade:
    """Judge a part of a story: sentences of any beats, which must be about these people, this thing and this place."""
    cast = {slot: frozenset({who}) for slot, who in identities(facts).items()}
    return _judged(_read(_tidy(text, language), language), language, cast)


def _tidy(text: str, language: Language) -> str:
    return separator(language).join(text.split())


def _judged(sentences: Iterator[Found], language: Language, cast: dict[str, Identities]) -> Grade:
    """Return the grade of sentences as they come, whose people, thing and place must fit a cast and each other."""
    n_sentences, n_misfits, problem = 0, 0, ""
    for found in sentences:
        if isinstance(found, str):
            return Grade(False, not n_misfits, n_sentences, problem or found, n_misfits)
        n_sentences += 1
        misfit = ""
        for slot, form, surface in found:
            who = able(slot, form, language)[surface]
            if slot in cast and not cast[slot] & who:
                misfit = misfit or surface
            else:
                cast[slot] = cast[slot] & who if slot in cast else who
        if misfit:
            n_misfits += 1
            problem = problem or f"sentence {n_sentences}: {misfit!r} does not fit what came before"
    names = [{identity[0] for identity in cast[slot]} for slot in "hf"]
    if not n_misfits and len(names[0]) == 1 and names[0] == names[1]:
        return Grade(True, False, n_sentences, "hero and friend have the same name", 1)
    return Grade(True, not n_misfits, n_sentences, problem, n_misfits)


def _read(text: str, language: Language) -> Iterator[Found]:
    """Yield what `_follow` does, of sentences in any order; without any there is a problem too."""
    at = 0
    while not at or at < len(text):
        match = next(filter(None, (each.match(text, at) for each in _every_pattern(language))), None)
        if match is None:
            yield f"no sentence: {text[at : at + 60]!r}"
            return
        yield named(match)
        at = match.end()


def _follow(text: str, language: Language) -> Iterator[Found]:
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
            yield named(match)
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
def _every_pattern(language: Language) -> tuple[re.Pattern[str], ...]:
    beats = dict.fromkeys((*order_of_beats(True), *order_of_beats(False)))
    plots = range(len(table("sentences")["plots"]))
    found = {each for beat in beats for plot in plots for each in _patterns(beat, plot, language)}
    return tuple(sorted(found, key=lambda each: each.pattern))


@cache
def _patterns(beat: str, plot: int, language: Language) -> tuple[re.Pattern[str], ...]:
    """Return one regular expression per sentence of a beat."""
    gap = re.escape(separator(language))
    templates = [template(beat, which, plot, language) for which in range(len(choices(beat, plot)))]
    return tuple(re.compile(f"{expression(each, language)}(?:{gap}|$)") for each in templates)
