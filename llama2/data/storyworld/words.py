"""Who, what and where in the story world, in English, Spanish and Chinese.

The words themselves are in `words.toml`. Here they get the forms that sentences need, so that articles,
genders and measure words agree by themselves: `{t.un}` in a Spanish sentence becomes "una cometa roja".
"""

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Language = Literal["en", "es", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "es", "zh")


def others(language: Language) -> list[Language]:
    """Return the languages but this one."""
    return [each for each in LANGUAGES if each != language]


@cache
def table(name: str) -> dict[str, Any]:
    """Return what a .toml file of this folder holds."""
    return tomllib.loads(files("llama2.data.storyworld").joinpath(f"{name}.toml").read_text("utf-8"))


class Character:
    """A name and a kind; `str()` is the name."""

    def __init__(self, name: Sequence[str], kind: Sequence[str], language: Language):
        latin, chinese, gender = name
        is_female = gender == "f"
        self.text = chinese if language == "zh" else latin
        self.kind = {"en": kind[0], "es": kind[1 if is_female else 2], "zh": kind[3]}[language]
        self.a = f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"
        self.she, self.her, self.obj = ("she", "her", "her") if is_female else ("he", "his", "him")
        self.She, self.Her = self.she.capitalize(), self.her.capitalize()
        self.o = "a" if is_female else "o"
        self.un, self.el = (
            (f"una {self.kind}", f"la {self.kind}") if is_female else (f"un {self.kind}", f"el {self.kind}")
        )
        self.El = self.el.capitalize()
        self.al = f"a {self.el}" if is_female else f"al {self.kind}"
        self.amigo = f"amig{self.o}"
        self.ta = table("words")["chinese_pronouns"][gender] if language == "zh" else ""

    def __str__(self) -> str:
        return self.text


class Thing:
    """A noun and its quality; `str()` is both, `noun` and `quality` each alone."""

    def __init__(self, noun: Sequence[str], quality: Sequence[str], language: Language):
        english, spanish, gender, chinese, measure = noun
        is_feminine = gender == "f"
        adjective = {"en": quality[0], "es": quality[1 if is_feminine else 2], "zh": quality[3]}[language]
        self.noun = {"en": english, "es": spanish, "zh": chinese}[language]
        self.quality = adjective
        self.text = {"en": f"{adjective} {english}", "es": f"{spanish} {adjective}", "zh": adjective + chinese}[
            language
        ]
        self.a = f"{'an' if adjective[0] in 'aeiou' else 'a'} {self.text}"
        self.un, self.el = (
            (f"una {self.text}", f"la {self.text}") if is_feminine else (f"un {self.text}", f"el {self.text}")
        )
        self.El = self.el.capitalize()
        self.de = f"de {self.el}" if is_feminine else f"del {self.text}"
        self.elnoun = f"{'la' if is_feminine else 'el'} {self.noun}"
        self.alnoun = f"a {self.elnoun}" if is_feminine else f"al {self.noun}"
        self.Elnoun = self.elnoun.capitalize()
        self.lo, self.o = ("la", "a") if is_feminine else ("lo", "o")
        self.yi = measure + self.text

    def __str__(self) -> str:
        return self.text


class Spot:
    """A place; `str()` is its name, `to` and `at` say where to and where."""

    def __init__(self, place: Sequence[str], language: Language):
        english, preposition, spanish, gender, chinese, chinese_at = place
        article = "la" if gender == "f" else "el"
        self.text = {"en": english, "es": spanish, "zh": chinese}[language]
        self.to = {
            "en": f"to the {english}",
            "es": f"a la {spanish}" if gender == "f" else f"al {spanish}",
            "zh": chinese,
        }[language]
        self.at = {"en": f"{preposition} the {english}", "es": f"en {article} {spanish}", "zh": chinese_at}[language]

    def __str__(self) -> str:
        return self.text
