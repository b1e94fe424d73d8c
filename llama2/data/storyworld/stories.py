"""Stories with their facts: drawn from a seed, told in English, Spanish and Chinese alike.

A story is a choice of words and sentences. Train and held-out stories never share a hero's name, thing
and place together, so a model that tells held-out stories well has not learnt them by heart.
"""

import hashlib
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from llama2.data.storyworld.words import Character, Language, Spot, Thing, table

Split = Literal["train", "heldout"]
HELD_OUT_SHARE = 0.1

OPTIONAL = {"flavour": 0.6, "react": 0.5, "thank": 0.6}
"""Beats that a story may leave out, and how often they are there."""


@dataclass(frozen=True)
class Facts:
    """What happens, in no language: indices into `words.toml` and `sentences.toml`."""

    hero: tuple[int, int]
    """Name and kind."""
    friend: tuple[int, int]
    thing: tuple[int, int]
    """Noun and quality."""
    place: int
    plot: int
    is_good: bool
    """The thing is saved in the end."""


@dataclass(frozen=True)
class Story:
    """Facts, and which sentence tells each beat."""

    facts: Facts
    beats: tuple[tuple[str, int], ...]
    """(beat, which of its sentences), in order."""

    def sentences(self, language: Language) -> list[str]:
        """Return the story sentence by sentence; the nth means the same in every language."""
        words = cast(self.facts, language)
        return [template(beat, i, self.facts.plot, language).format_map(words) for beat, i in self.beats]

    def text(self, language: Language) -> str:
        return separator(language).join(self.sentences(language))

    def opening(self, language: Language) -> str:
        """Return the first two sentences, which name the hero, the place and the thing."""
        return separator(language).join(self.sentences(language)[:2])

    def summary(self, language: Language) -> str:
        """Return what happens in one sentence."""
        plot = table("sentences")["plots"][self.facts.plot]
        chosen = plot["summary_good" if self.facts.is_good else "summary_bad"][language]
        return chosen.format_map(cast(self.facts, language))

    def title(self, language: Language) -> str:
        """Return e.g. "Mia and the red kite"."""
        return table("sentences")["title"][language].format_map(cast(self.facts, language))


def cast(facts: Facts, language: Language) -> dict[str, Any]:
    """Return the words that stand for {h}, {f}, {t} and {p}."""
    return {
        "h": character(*facts.hero, language),
        "f": character(*facts.friend, language),
        "t": thing(*facts.thing, language),
        "p": spot(facts.place, language),
    }


@cache
def character(name: int, kind: int, language: Language) -> Character:
    return Character(table("words")["names"][name], table("words")["kinds"][kind], language)


@cache
def thing(noun: int, quality: int, language: Language) -> Thing:
    return Thing(table("words")["nouns"][noun], table("words")["qualities"][quality], language)


@cache
def spot(place: int, language: Language) -> Spot:
    return Spot(table("words")["places"][place], language)


@cache
def choices(beat: str, plot: int) -> tuple[dict[str, str], ...]:
    """Return the sentences that can tell a beat; problem, help, good and bad are the plot's own."""
    sentences = table("sentences")
    return tuple(sentences[beat] if beat in sentences else sentences["plots"][plot][beat])


def template(beat: str, which: int, plot: int, language: Language) -> str:
    return choices(beat, plot)[which][language]


def separator(language: Language) -> str:
    return "" if language == "zh" else " "


def order_of_beats(is_good: bool) -> tuple[str, ...]:
    """Return the beats of a story in order, optional ones included."""
    end = ("good", "thank", "feel_good", "close_good") if is_good else ("bad", "feel_bad", "close_bad")
    return ("opening", "have", "flavour", "problem", "react", "arrive", "help", *end)


def story(seed: int, index: int, *, split: Split = "train") -> Story:
    """Return the index-th story of a world; the same arguments give the same story."""
    rng = random.Random(f"storyworld/{seed}/{split}/{index}")
    words = table("words")
    while True:
        names = rng.sample(range(len(words["names"])), 2)
        kinds = rng.sample(range(len(words["kinds"])), 2)
        facts = Facts(
            hero=(names[0], kinds[0]),
            friend=(names[1], kinds[1]),
            thing=(rng.randrange(len(words["nouns"])), rng.randrange(len(words["qualities"]))),
            place=rng.randrange(len(words["places"])),
            plot=rng.randrange(len(table("sentences")["plots"])),
            is_good=rng.random() < 0.6,
        )
        if split_of(facts) == split:
            break
    beats = [beat for beat in order_of_beats(facts.is_good) if rng.random() < OPTIONAL.get(beat, 1)]
    return Story(facts, tuple((beat, rng.randrange(len(choices(beat, facts.plot)))) for beat in beats))


def split_of(facts: Facts) -> Split:
    """Return which world a story belongs to, by its hero's name, thing and place."""
    key = f"{facts.hero[0]}/{facts.thing[0]}/{facts.place}".encode()
    share = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    return "heldout" if share < HELD_OUT_SHARE else "train"


def stories(seed: int, n: int, *, split: Split = "train") -> Iterator[Story]:
    """Yield the first n stories of a world."""
    return (story(seed, index, split=split) for index in range(n))


def other_facts(rng: random.Random, facts: Facts) -> Facts:
    """Return facts of the same plot and end in which everybody and everything is another."""
    words = table("words")

    def others(what: str, *than: int) -> list[int]:
        return rng.sample([n for n in range(len(words[what])) if n not in than], 2)

    def another(what: str, than: int) -> int:
        return others(what, than)[0]

    names = others("names", facts.hero[0], facts.friend[0])
    kinds = others("kinds", facts.hero[1], facts.friend[1])
    return Facts(
        hero=(names[0], kinds[0]),
        friend=(names[1], kinds[1]),
        thing=(another("nouns", facts.thing[0]), another("qualities", facts.thing[1])),
        place=another("places", facts.place),
        plot=facts.plot,
        is_good=facts.is_good,
    )


def phrases(told: Story, language: Language) -> list[str]:
    """Return what can be translated alone: the title, the summary, and the sentences that name the same everywhere.

    "Llevaba una cometa roja" does not say whether she or he had it, "the little wolf" not whether it is una loba. The
    nth means the same in every language.
    """
    said = zip(told.sentences(language), told.beats, strict=True)
    alone = [text for text, (beat, which) in said if _names_the_same(beat, which, told.facts.plot)]
    return [told.title(language), told.summary(language), *alone]


@cache
def _names_the_same(beat: str, which: int, plot: int) -> bool:
    """Whether every language names the same; somebody called by kind alone has a gender in Spanish only."""
    parsed = (string.Formatter().parse(text) for text in choices(beat, plot)[which].values())
    fields = [{name for _, name, _, _ in parts if name} for parts in parsed]
    slots = [{name.partition(".")[0] for name in some} for some in fields]
    people = slots[0] & {"h", "f"}
    return all(each == slots[0] for each in slots) and all(people <= some for some in fields)
