"""Standing instructions: said once, they hold for every later answer (Ghost Attention, arXiv:2307.09288 sec. 3.3).

"Always answer in Spanish", "call me Captain", "begin every answer with ...", "end every answer with ...", "act as Mia
the rabbit", alone or two together, half of them as a terse keyword and value, as in the paper. What an obedient
answer looks like is exact, so obedience can be judged.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llama2.data.storyworld.lexicon import is_in
from llama2.data.storyworld.stories import Split, character, separator
from llama2.data.storyworld.words import LANGUAGES, Language, others, table

FRONTS = ("address", "beginning", "role")
STOPS = (".", "!", "?", "\u3002", "\uff01", "\uff1f", '"', "\u00bb", "\u201d")


@dataclass(frozen=True)
class Instruction:
    """What was asked for, and what an answer must be like to obey."""

    text: str
    """As the user says it."""
    kinds: tuple[str, ...]
    """One or two of language, address, beginning, role, ending."""
    answers_in: Language
    """The language that answers are to be in."""
    front: str = ""
    """What an obedient answer begins with."""
    back: str = ""
    """What an obedient answer ends with."""
    address: str = ""
    """What an obedient answer calls the user, anywhere."""


def instruction(rng: random.Random, language: Language, *, may_combine: bool = True) -> Instruction:
    """Draw an instruction, said in a language; of two parts now and then, where they may be combined."""
    kinds = [rng.choice(("language", *FRONTS, "ending"))]
    if may_combine and rng.random() < 0.3:
        rest = [kind for kind in ("language", rng.choice(FRONTS), "ending") if kind not in kinds]
        kinds.append(rng.choice([kind for kind in rest if not {kinds[0], kind} <= set(FRONTS)]))
    answers_in = rng.choice(others(language)) if "language" in kinds else language
    said, marks = [], {"front": "", "back": "", "address": ""}
    for kind in kinds:
        words, filled = _filling(rng, kind, language, answers_in)
        form = "terse" if rng.random() < 0.5 else "say"
        said.append(table("instructions")[kind][form][language].format_map(words))
        marks |= filled
    return Instruction(separator(language).join(said), tuple(kinds), answers_in, **marks)


def instructions(seed: int, n: int, *, split: Split = "train") -> Iterator[dict[str, Any]]:
    """Yield the first n instructions of a world as lines of JSON; the language that they are said in goes round."""
    for index in range(n):
        language = LANGUAGES[index % len(LANGUAGES)]
        drawn = instruction(random.Random(f"instruction/{seed}/{split}/{index}"), language)
        yield {**asdict(drawn), "language": language}


def read_instruction(line: Mapping[str, Any]) -> Instruction:
    """Return an instruction from its record. Raises KeyError or TypeError for a record that is none."""
    marks = {name: line[name] for name in ("text", "answers_in", "front", "back", "address")}
    return Instruction(kinds=tuple(line["kinds"]), **marks)


def _filling(
    rng: random.Random, kind: str, language: Language, answers_in: Language
) -> tuple[dict[str, object], dict[str, str]]:
    """Return the words of an instruction, and the marks it leaves on answers."""
    row = table("instructions")[kind]
    if kind == "language":
        return {"word": row["words"][answers_in][language]}, {}
    which = rng.randrange(len(row["words"]))
    name = rng.randrange(len(table("words")["names"]))

    def words(inside: Language) -> dict[str, object]:
        animal = character(name, which, inside) if kind == "role" else ""
        return {"word": row["words"][which][inside], "h": animal}

    marks = {side: row[side][answers_in].format_map(words(answers_in)) for side in ("front", "back") if side in row}
    if kind == "address":
        marks["address"] = row["words"][which][answers_in]
    # what is to be quoted word for word is named in the language of the answers
    return words(language if kind in ("address", "role") else answers_in), marks


def dressed(answer: str, standing: Instruction | None) -> str:
    """Return an answer, already in the right language, as the instruction wants it."""
    if standing is None:
        return answer
    if not standing.back:
        return standing.front + answer
    return standing.front + stopped(answer, standing.answers_in) + separator(standing.answers_in) + standing.back


def stopped(answer: str, language: Language) -> str:
    """Return the answer with a full stop where it has none."""
    return answer if answer.endswith(STOPS) else answer + ("\u3002" if language == "zh" else ".")


def undressed(answer: str, standing: Instruction | None) -> str:
    """Return an answer without what the instruction adds to it."""
    answer = answer.strip()
    if standing is None:
        return answer
    return answer.removeprefix(standing.front).removesuffix(standing.back).strip()


def obeys(answer: str, standing: Instruction | None) -> bool:
    """Say whether an answer keeps to the instruction in every part."""
    if standing is None:
        return True
    text, body = answer.strip(), undressed(answer, standing)
    if not text.endswith(standing.back) or ("language" in standing.kinds and not is_in(body, standing.answers_in)):
        return False
    return standing.address in text if standing.address else text.startswith(standing.front.strip())
