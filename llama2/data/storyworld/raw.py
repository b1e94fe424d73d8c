"""The training stories as they would be found on the web: in several kinds of files, and dirty in known ways.

Every plant is written down, so that a pipeline can be judged by what it finds. A line of the list has the kind, the
id of the document (`file`, or `file:17` for its 17th document) and what it was made of:

    exact_duplicate  near_duplicate  of: the id of the first; near ones with the Jaccard similarity of their
                                     sets of five-word shingles
    contamination                    of: the number of a held-out story and its language
    foreign                          a page in French or German
    boilerplate      lines: what stands around the story
    personal         secrets: two or three of e-mail, phone and card, none of them anybody's
    mojibake         encoding: UTF-8 read as if it were this

Streams: a million stories need no more memory than ten.
"""

import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llama2.data.storyworld.containers import ARCHIVE, LINES, PAGES, TEXT, Containers
from llama2.data.storyworld.lexicon import words_of
from llama2.data.storyworld.stories import stories, story
from llama2.data.storyworld.words import LANGUAGES, Language, table
from llama2.errors import Llama2Error

SHARES = {TEXT: 0.45, LINES: 0.45, ARCHIVE: 0.08, PAGES: 0.02}
"""Of the documents, in each kind of file; web pages take long to read, and are a file each, so they are few."""
REACH = 3000
"""A duplicate is of one of this many documents before it."""
SHINGLE = 5


@dataclass(frozen=True)
class Dirt:
    """How often each kind of plant comes, per story told in a language; 0 for none."""

    exact_duplicates: float = 0.03
    near_duplicates: float = 0.05
    contamination: float = 0.01
    foreign: float = 0.03
    boilerplate: float = 0.15
    personal: float = 0.03
    mojibake: float = 0.03

    def __post_init__(self):
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise Llama2Error(f"{field.name}={getattr(self, field.name)} is not a share; wanted 0 to 1")
        if self.boilerplate + self.personal + self.mojibake > 1:
            raise Llama2Error("boilerplate, personal and mojibake are more than 1 together; a story has one of them")


@dataclass(frozen=True)
class _Found:
    """A clean document that can be copied."""

    id: str
    text: str
    language: Language
    title: str


def write_raw(
    folder: Path, planted: Path, *, n_stories: int, n_heldout: int, seed: int = 0, dirt: Dirt | None = None
) -> None:
    """Write the first n_stories training stories into a new folder of raw files, and the list of plants to a file."""
    rng = random.Random(f"raw/{seed}")
    with Containers(folder) as files, planted.open("w", encoding="utf-8", newline="\n") as report:

        def put(text: str, language: str, title: str) -> str:
            container = rng.choices([*SHARES], [*SHARES.values()])[0]
            return files.add(container, text, language=language, title=title)

        for plant in _documents(rng, put, n_stories, n_heldout, seed, dirt or Dirt()):
            report.write(json.dumps(plant, ensure_ascii=False) + "\n")


def _documents(
    rng: random.Random, put: Callable[[str, str, str], str], n_stories: int, n_heldout: int, seed: int, dirt: Dirt
) -> Iterator[dict[str, Any]]:
    """Write every document, and yield what was planted."""
    recent: deque[_Found] = deque(maxlen=REACH)
    for index, told in enumerate(stories(seed, n_stories)):
        for language in LANGUAGES:
            text, title = told.text(language), told.title(language)
            plant = _dressed(rng, text, language, dirt)
            found = put(plant.pop("text", text), language, title)
            if plant:
                yield {**plant, "id": found, "language": language, "story": index}
            else:
                recent.append(_Found(found, text, language, title))
            yield from _extras(rng, put, recent, n_heldout, seed, dirt)


def _dressed(rng: random.Random, text: str, language: Language, dirt: Dirt) -> dict[str, Any]:
    """Return what happens to a story, if anything: its new text and the plant."""
    draw, rows = rng.random(), table("raw")
    if draw < dirt.boilerplate:
        before, after = rng.sample(rows["boilerplate"][language], 2)
        return {"kind": "boilerplate", "text": f"{before}\n{text}\n{after}", "lines": [before, after]}
    if draw < dirt.boilerplate + dirt.personal:
        line, secrets = _personal(rng, language)
        return {"kind": "personal", "text": f"{text}\n{line}", "secrets": secrets}
    if draw < dirt.boilerplate + dirt.personal + dirt.mojibake:
        curly = text if language != "en" else f"\u201c{text.replace(chr(34), chr(0x2019))}\u201d"
        garbled, encoding = garble(curly)
        return {"kind": "mojibake", "text": garbled, "encoding": encoding}
    return {}


def _extras(
    rng: random.Random,
    put: Callable[[str, str, str], str],
    recent: deque[_Found],
    n_heldout: int,
    seed: int,
    dirt: Dirt,
) -> Iterator[dict[str, Any]]:
    """Write the documents that should not be there, and yield the plants."""
    if recent and rng.random() < dirt.exact_duplicates:
        old = rng.choice(recent)
        yield {"kind": "exact_duplicate", "id": put(old.text, old.language, old.title), "language": old.language,
               "of": old.id}  # fmt: skip
    if recent and rng.random() < dirt.near_duplicates:
        old = rng.choice(recent)
        text = edited(rng, old.text, old.language)
        yield {"kind": "near_duplicate", "id": put(text, old.language, old.title), "language": old.language,
               "of": old.id, "jaccard": round(jaccard(text, old.text), 4)}  # fmt: skip
    if n_heldout and rng.random() < dirt.contamination:
        index, language = rng.randrange(n_heldout), rng.choice(LANGUAGES)
        leaked = story(seed, index, split="heldout")
        found = put(leaked.text(language), language, leaked.title(language))
        yield {"kind": "contamination", "id": found, "language": language, "of": index}
    if rng.random() < dirt.foreign:
        language = rng.choice(["fr", "de"])
        lines = table("raw")["foreign"][language]
        chosen = sorted(rng.sample(range(len(lines)), rng.randint(5, len(lines))))
        text = " ".join(lines[i] for i in chosen)
        yield {"kind": "foreign", "id": put(text, language, lines[0][:20]), "language": language}


def _personal(rng: random.Random, language: Language) -> tuple[str, dict[str, str]]:
    rows = table("raw")
    name = rng.choice(table("words")["names"])
    secrets = {
        "email": f"{name[0].lower()}{rng.randrange(1000)}@example.{rng.choice(['com', 'org', 'net'])}",
        "phone": rows["phones"][language].format(n=f"{rng.randrange(100):02}"),
        "card": rng.choice(rows["cards"]["numbers"]),
    }
    line = rng.choice(rows["personal"][language])
    said = line.format(name=name[1] if language == "zh" else name[0], **secrets)
    return said, {kind: secret for kind, secret in secrets.items() if secret in said}


def garble(text: str) -> tuple[str, str]:
    """Return UTF-8 read as if it were Windows' Latin, or ISO's where Windows' has no such byte; and which."""
    data = text.encode("utf-8")
    try:
        return data.decode("cp1252"), "cp1252"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"


def edited(rng: random.Random, text: str, language: Language) -> str:
    """Return the text with one to three words put in, changed or left out."""
    gap = "" if language == "zh" else " "
    words = list(text) if language == "zh" else text.split(" ")
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        at = rng.randrange(1, len(words) - 1)
        filler = rng.choice(table("raw")["fillers"][language])
        size = rng.choice([0, 1])
        words[at : at + size] = [filler] if size == 0 or rng.random() < 0.7 else []
    return gap.join(words)


def jaccard(left: str, right: str) -> float:
    """Return the share of five-word shingles that two texts have in common; a Chinese character is a word."""
    sets = []
    for text in (left, right):
        words = words_of(text)
        sets.append({tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])
