"""A person says which of two answers is better and by how much, without knowing whose they are.

    type which answer is better, and by how much:      13  significantly    12  better    11  slightly
    1 or 2, then 3 to 0                                10  negligibly, or unsure, but one must be said

As in arXiv:2307.09288 sec. 3.2.1 one of the two has to be chosen. Which model's answer is the first is drawn anew for
each prompt. Each rating is a line of preference data as soon as it is typed; the same command goes on with the prompts
that have none.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from llama2.align.compare import Duel, Tally, pair_record, tally
from llama2.chat import Conversation
from llama2.data.preferences.pair import RATINGS
from llama2.errors import RequestError
from llama2.files.staging import make_parent

GRADES = {code: name for name, code in RATINGS.items()}
HELP = """\
Type 1 or 2, the better answer, and then by how much:
  3  significantly better      2  better
  1  slightly better           0  negligibly better, or unsure
So 13 says "the first, significantly", 20 "the second, if any".
s skips, q leaves: what was rated is kept."""


@dataclass(frozen=True)
class Rating:
    """What was said of a duel."""

    a_wins: bool
    grade: int
    """3 significantly better ... 0 negligibly, or unsure."""

    @property
    def outcome(self) -> float:
        """1 where A won, 0 where B did; one that is unsure is a tie."""
        return 0.5 if not self.grade else float(self.a_wins)


class RatingFile:
    """The lines of preference data that were rated so far."""

    def __init__(self, path: Path, *, models: Mapping[str, str], options: Mapping[str, Any]):
        """models: a and b. options: what the answers were sampled with.

        Raises RequestError for a file that is of other models or options, or holds something else.
        """
        self.path, self.models, self.options = path, dict(models), json.loads(json.dumps(dict(options)))
        self.rated: dict[str, Rating] = {}
        make_parent(path)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # of a line that was half written nothing is known
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], 1):
            key, rating = self._read(number, line)
            self.rated[key] = rating
        if len(whole) < len(data):
            path.write_bytes(whole)

    def _read(self, number: int, line: str) -> tuple[str, Rating]:
        try:
            record = json.loads(line)
            made = {"models": record["models"], "options": record["options"]}
            rating = Rating(record["winner"] == "a", RATINGS[record["rating"]])
            key = json.dumps(record["prompt"])
        except (ValueError, KeyError, TypeError):
            raise RequestError(
                f"{self.path}:{number} is no rating of this command; name a new file with --out"
            ) from None
        ours = {"models": self.models, "options": self.options}
        for name, value in ours.items():
            if made[name] != value:
                raise RequestError(
                    f"{self.path}:{number} was rated with the {name} {_plain(made[name])}, and this command has "
                    f"{_plain(value)}; give the same, or name a new file with --out"
                )
        return key, rating

    def holds(self, messages: Conversation) -> bool:
        return _key(messages) in self.rated

    def add(self, duel: Duel, rating: Rating) -> None:
        """Append a rating at once."""
        record = pair_record(
            duel, a_wins=rating.a_wins, models=self.models, rating=GRADES[rating.grade], options=self.options
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.rated[_key(duel.prompt.messages)] = rating


def _key(messages: Conversation) -> str:
    return json.dumps([vars(message) for message in messages])


def _plain(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {each}" for name, each in value.items()) or "none"


def rate(duels: Sequence[Duel], file: RatingFile, *, seed: int, source: TextIO, console: Console) -> None:
    """Show duel after duel and write what is said of each; ends with the last one, with q, or with the input."""
    worth = [duel for duel in duels if duel.foregone is None and not file.holds(duel.prompt.messages)]
    if worth:
        console.print(HELP, markup=False, highlight=False)
    for i, duel in enumerate(worth, 1):
        a_is_first = bool(np.random.default_rng((seed, 8, duel.number)).integers(2))
        first, second = (duel.a, duel.b) if a_is_first else (duel.b, duel.a)
        console.print(Rule(f"{i} of {len(worth)}"), *asked(duel.prompt.messages), sep="\n")
        console.print(Panel(visible(first), title="1"), Panel(visible(second), title="2"), sep="\n")
        said = next(replies(source, console))
        if said == "q":
            return
        if said != "s":
            file.add(duel, Rating((said[0] == "1") == a_is_first, int(said[1])))


def replies(source: TextIO, console: Console) -> Iterator[str]:
    """Yield what is typed: s, q, or which answer and by how much; what is none of these is asked again."""
    while True:
        console.print("> ", end="")
        line = source.readline()
        said = "".join(line.split()).lower()
        if not line or said in ("s", "q"):
            yield said or "q"
        elif len(said) == 2 and said[0] in "12" and said[1] in "0123":
            yield said
        else:
            console.print(HELP, markup=False, highlight=False)


def asked(messages: Conversation) -> Iterator[Text]:
    """Yield a conversation's turns to be shown."""
    for message in messages:
        yield Text.assemble((f"{message.role}: ", "bold"), visible(message.content))


def visible(text: str) -> Text:
    """Return a model's text as it is, but for characters that would move the cursor, or worse."""
    return Text("".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text))


def summary(duels: Iterable[Duel], file: RatingFile) -> tuple[Tally, Table]:
    """Return who won over all that is rated or needs no rating, and the ratings by grade."""
    foregone = [duel.foregone for duel in duels if not file.holds(duel.prompt.messages)]
    told = [each for each in foregone if each is not None]
    counts = Counter((rating.grade, rating.a_wins) for rating in file.rated.values())
    table = Table("", "A", "B", box=None, header_style="bold", pad_edge=False)
    for grade, name in GRADES.items():
        table.add_row(name, f"{counts[grade, True]:,}", f"{counts[grade, False]:,}")
    table.add_row("the other answer is empty", *(f"{sum(each == side for each in told):,}" for side in (1, 0)))
    table.add_row("both answers are the same", f"{sum(each == 0.5 for each in told):,}")
    return tally([*(rating.outcome for rating in file.rated.values()), *told]), table
