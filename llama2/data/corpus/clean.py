"""Texts made whole: what is repaired or removed inside a document, before any rule judges it.

One ordered table of small functions, text to text. None deletes punctuation, stop words, case or digits: a language
model learns to write what it reads, so advice to strip them, meant for word counts of old, ruins it.
"""

import re
import tomllib
import unicodedata
from collections.abc import Callable, Collection
from functools import cache
from importlib import resources

from llama2.data.corpus.pii import scrub
from llama2.data.corpus.tally import Tally, difference, excerpt

_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufff9-\ufffb]")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACE_AT_END = re.compile(r"[ \t]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")
_MOJIBAKE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014"
    "\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]"
)
"""A lead byte of UTF-8 and its follower, both shown as characters of Windows-1252."""
_BOILERPLATE_CHARS = 150


def whole_characters(text: str) -> str:
    """Halves of surrogate pairs, which JSON can smuggle in, become the character or U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def line_ends(text: str) -> str:
    """Every line ends in a line feed, whatever system wrote it."""
    return _LINE_ENDS.sub("\n", text)


def mojibake(text: str) -> str:
    """Text that was decoded with the wrong charset is decoded again, line by line (ftfy); one cheap look goes first."""
    if text.isascii() or not _MOJIBAKE.search(text):
        return text
    import ftfy
    import ftfy.badness

    def mended(line: str) -> str:
        return ftfy.fix_encoding(line) if _MOJIBAKE.search(line) and ftfy.badness.is_bad(line) else line

    return "\n".join([mended(line) for line in text.split("\n")])


def control_characters(text: str) -> str:
    """Control characters, byte order marks and zero-width spaces go; joiners stay, which scripts and emoji need."""
    return _CONTROL.sub("", text)


def composed(text: str) -> str:
    """An accent and its letter become one character (Unicode NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def blank_space(text: str) -> str:
    """Spaces at line ends go, as do blank lines beyond one and those around the text."""
    if " \n" in text or "\t\n" in text:
        text = _SPACE_AT_END.sub("\n", text)
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip()


def boilerplate_lines(text: str) -> str:
    """Short lines of a page's frame go: cookies, newsletters, rights (C4, arXiv:1910.10683 sec. 2.2; phrases.toml)."""
    lowered = text.lower()
    if not any(phrase in lowered for phrase in _frame()):
        return text
    kept = [line for line in text.split("\n") if not _is_boilerplate(line)]
    return "\n".join(kept).strip()


def _is_boilerplate(line: str) -> bool:
    if len(line) > _BOILERPLATE_CHARS:
        return False
    lowered = line.lower().lstrip()
    return any(phrase in lowered for phrase in phrases()["boilerplate"]) or lowered.startswith(_openings())


@cache
def _frame() -> tuple[str, ...]:
    return (*phrases()["boilerplate"], *phrases()["boilerplate_openings"])


@cache
def _openings() -> tuple[str, ...]:
    return tuple(phrases()["boilerplate_openings"])


CHANGES: dict[str, Callable[[str], str]] = {
    "whole_characters": whole_characters,
    "mojibake": mojibake,
    "line_ends": line_ends,
    "control_characters": control_characters,
    "composed": composed,
    "blank_space": blank_space,
    "boilerplate_lines": boilerplate_lines,
}
"""Rule -> what it does to a text, in the order in which it is done: mojibake holds characters that end lines."""
PII = "personal_data"


def clean(text: str, tally: Tally, *, skip: Collection[str] = ()) -> str:
    """Return a text after every change, and count those that changed something."""
    for name, change in CHANGES.items():
        if (name == "whole_characters" or name not in skip) and (changed := change(text)) != text:
            at = difference(text, changed)
            shown = f"{excerpt(text, at)} -> {excerpt(changed, at)}" if name == "mojibake" else excerpt(text, at)
            tally.add(name, max(0, len(text) - len(changed)), shown)
            text = changed
    if PII not in skip:
        scrubbed, counts = scrub(text)
        for name, n in counts.items():
            tally.add(f"{PII}:{name}", 0, excerpt(scrubbed, scrubbed.find(f"[{name}]")), documents=n)
        text = scrubbed
    return text


@cache
def phrases() -> dict:
    return tomllib.loads(resources.files("llama2.data.corpus").joinpath("phrases.toml").read_text(encoding="utf-8"))
