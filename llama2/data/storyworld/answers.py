"""An exact judge of answers, for every task and every turn of a dialogue, built on the judge of stories.

    form      looks like an answer to this question; of a text, the share of it that can be followed
    facts     names the right people, things and places; of a text, the share of sentences that do
    right     is the right answer
    language  is in the language wanted
    obeys     keeps to the standing instruction

    score = (0.2 form + 0.3 facts + 0.4 right + 0.1 language) * (1 if it obeys, else 1/2)

A right answer scores 1. One that is right but for case, spaces or the full stop loses a little (`TIDY`): a
difference of style, not of content.
"""

import re
from dataclasses import dataclass, replace
from functools import cache

from llama2.data.storyworld.grade import grade, grade_passage
from llama2.data.storyworld.instructions import STOPS, obeys, stopped, undressed
from llama2.data.storyworld.lexicon import share_in
from llama2.data.storyworld.patterns import able as able_to_be, expression, identities, named
from llama2.data.storyworld.stories import order_of_beats, separator
from llama2.data.storyworld.turns import Turn
from llama2.data.storyworld.words import Language, table

WEIGHTS = {"form": 0.2, "facts": 0.3, "right": 0.4, "language": 0.1}
TIDY = 0.95
"""What is right but for case, spaces or the full stop counts this much."""
FLAWED = 0.75
"""A text with a flaw is this right, times the square of the share of it that is good."""
RAMBLING = 0.5
"""The right answer that then goes on is this right, and has not the form of an answer."""
N_SENTENCES = len(order_of_beats(True)) - 3
"""Sentences that every story has."""


@dataclass(frozen=True)
class AnswerGrade:
    """How good an answer is; every number from 0 to 1."""

    score: float
    form: float
    facts: float
    right: float
    language: float
    obeys: bool


def grade_answer(answer: str, turn: Turn) -> AnswerGrade:
    """Judge an answer to a turn of a dialogue."""
    body = undressed(answer, turn.standing)
    task = _judged_as(turn)
    if task in ("story", "translate"):
        form, facts, right = _grade_text(body, turn)
    else:
        form, facts, right = _grade_short(body, replace(turn, task=task))
    language = share_in(body, turn.language) if right < TIDY else 1.0
    parts = {"form": form, "facts": facts, "right": right, "language": language}
    is_obedient = obeys(answer, turn.standing)
    score = sum(WEIGHTS[name] * part for name, part in parts.items()) * (1.0 if is_obedient else 0.5)
    return AnswerGrade(round(score, 6), **parts, obeys=is_obedient)


def _judged_as(turn: Turn) -> str:
    """Return the task whose answers look like this one's: a translated title looks like a title."""
    told = {"title": turn.story.title(turn.language), "summarise": turn.story.summary(turn.language)}
    translated = [task for task, text in told.items() if text == turn.answer]
    return translated[0] if turn.task == "translate" and translated else turn.task


def _grade_text(body: str, turn: Turn) -> tuple[float, float, float]:
    """Judge a story, which may be any about what was asked for, or a translation, which must be of this text."""
    is_story = turn.task == "story"
    wanted = turn.story.sentences(turn.language)
    if not is_story and turn.answer != turn.story.text(turn.language):
        wanted = [sentence for sentence in wanted if sentence in turn.answer]
        found = grade_passage(body, turn.language, facts=turn.story.facts)
    else:
        found = grade(body, turn.language, facts=turn.story.facts, about=turn.about if is_story else "hftp")
    n_wanted = N_SENTENCES if is_story else len(wanted)
    n_fit = max(0, found.n_sentences - found.n_misfits)
    form = 1.0 if found.is_well_formed else 0.8 * min(1.0, found.n_sentences / n_wanted)
    facts = share = n_fit / max(found.n_sentences, n_wanted)
    tidy = separator(turn.language).join(body.split())
    if is_story:
        is_right = found.is_well_formed and found.is_consistent
    else:
        is_right = tidy == turn.answer
        share = min(share, sum(sentence in tidy for sentence in wanted) / len(wanted))
    if is_right:
        return 1.0, 1.0, 1.0 if body == tidy else TIDY
    return form, facts, FLAWED * share**2


def _grade_short(body: str, turn: Turn) -> tuple[float, float, float]:
    """Judge an answer that is a word or a sentence."""
    if body in (turn.answer, stopped(turn.answer, turn.language)):
        return 1.0, 1.0, 1.0
    if _plain(body) == _plain(turn.answer):
        return 1.0, 1.0, TIDY
    if _goes_on(_plain(body), _plain(turn.answer), turn.language):
        return 0.0, 1.0, RAMBLING
    who = identities(turn.story.facts)
    best = None
    for shape in _shapes(turn.task, turn.about, turn.language):
        match = shape.fullmatch(_plain(body))
        if match:
            slots = named(match)
            surfaces = ((able_plain(slot, form, turn.language), slot, surface) for slot, form, surface in slots)
            fits = [who[slot] in able[surface] for able, slot, surface in surfaces]
            best = max(best or 0.0, sum(fits) / len(fits) if fits else 0.0)
    return (0.0, 0.0, 0.0) if best is None else (1.0, best, 0.0)


def _goes_on(body: str, answer: str, language: Language) -> bool:
    rest = body.removeprefix(answer)
    return len(rest) < len(body) and (language == "zh" or not rest[0].isalnum())


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip("".join(STOPS)).lower()


@cache
def able_plain(slot: str, form: str, language: Language) -> dict[str, frozenset[tuple[int, ...]]]:
    """Return what each surface, in lower case, can be."""
    return {surface.lower(): who for surface, who in able_to_be(slot, form, language).items()}


@cache
def _shapes(task: str, about: str, language: Language) -> tuple[re.Pattern[str], ...]:
    """Return what answers to a question look like, whether right or wrong, without case and full stop."""
    bare = [template.rstrip("".join(STOPS)) for template in _templates(task, about, language)]
    return tuple(re.compile(expression(template, language), re.IGNORECASE) for template in bare)


def _templates(task: str, about: str, language: Language) -> list[str]:
    if task == "title":
        return [table("sentences")["title"][language]]
    if task == "summarise":
        return [plot[end][language] for plot in table("sentences")["plots"] for end in ("summary_good", "summary_bad")]
    if task == "sentiment":
        return [mood[language] for mood in table("tasks")["sentiments"].values()]
    if task == "check":
        return [word[language] for word in table("dialogues")["yes_no"].values()]
    if task == "thanks":
        return [table("dialogues")["thanks"]["answer"][language]]
    rows = [*table("tasks")["questions"], *table("dialogues")["questions"]]
    row = next(row for row in rows if row["about"] == about)
    return [answer[language] for key, answer in row.items() if key.startswith("answer")]
