"""A labelled file to a table: every item answered, and each task and language scored.

items -> answer_items -> Answered, one after another -> score_answers -> Score
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Unpack

from llama2.errors import ChatError, RequestError
from llama2.llm import LLM, SamplingOptions
from llama2.tasks.items import CHOICES, Item
from llama2.tasks.labels import By, check_labels, decide
from llama2.tasks.metrics import Measure, corpus_scores, is_same, macro_f1, require_sacrebleu, rouge, share
from llama2.tasks.prompts import Prompt, Style, default_instruction, question, table
from llama2.tasks.texts import write

BATCHES_AT_ONCE = 4
"""Batches of the engine that are given to it together: while the longest answers end, others begin."""


class EvaluateOptions(SamplingOptions, total=False):
    """Keyword arguments of an evaluation; of SamplingOptions all but n."""

    labels: Sequence[str] | None
    """To choose from; those that occur in the file, in each language, if not given."""
    by: By
    calibrate: bool
    instruction: str | None
    """Instead of every item's own."""
    examples: Sequence[Item]
    """Shown before each item: those of its task and group that are not the item itself."""
    style: Style
    cue: str


@dataclass(frozen=True)
class Answered:
    """An item and what the model made of it."""

    item: Item
    text: str
    probabilities: dict[str, float] | None = None
    """Of each label, where one is chosen."""
    finish_reason: str | None = None
    """Why an answer that was written ended."""


@dataclass(frozen=True)
class Score:
    """One number of the table, from 0 to 100, with its 95 % interval."""

    task: str
    language: str | None
    """Or a pair, "en-es"; None where the file does not tell."""
    metric: str
    value: float
    low: float
    high: float
    n: int
    """Items that it rests on."""


def evaluate_tasks(llm: LLM, items: Sequence[Item], **options: Unpack[EvaluateOptions]) -> list[Score]:
    """Return how well a model does on items, by task and language. Raises RequestError before any work is done."""
    return score_answers(list(answer_items(llm, items, **options)))


def answer_items(llm: LLM, items: Sequence[Item], **options: Unpack[EvaluateOptions]) -> Iterator[Answered]:
    """Answer items, greedily unless a temperature is given, and yield them in order."""
    if {"translate", "summarise"} & {item.task for item in items}:
        require_sacrebleu()
    labels = _labels(items, options.get("labels"))
    prompts = [_prompt(item, labels.get(_key(item), ()), options) for item in items]
    _check_lengths(llm, items, prompts)
    return _answers(llm, items, prompts, labels, options)


def _answers(
    llm: LLM, items: Sequence[Item], prompts: Sequence[Prompt], labels: dict[Any, Sequence[str]], options: Any
) -> Iterator[Answered]:
    own = EvaluateOptions.__annotations__.keys() - SamplingOptions.__annotations__.keys()
    sampling: Any = {name: value for name, value in options.items() if name not in own}
    weighing = {name: options[name] for name in ("by", "calibrate") if name in options}
    size = BATCHES_AT_ONCE * llm.max_batch
    for start in range(0, len(items), size):
        found: dict[int, Answered] = {}
        chunk = sorted(range(start, min(start + size, len(items))), key=lambda i: str(_key(items[i])))
        for key, group in groupby(chunk, key=lambda i: _key(items[i])):
            indices = list(group)
            asked = [prompts[i] for i in indices]
            if key[0] in CHOICES:
                made = decide(llm, asked, labels[key], **weighing)
                answers = [(each.label, each.probabilities, None) for each in made]
            else:
                answers = [(each.text, None, each.finish_reason) for each in write(llm, asked, sampling)]
            found |= {i: Answered(items[i], *each) for i, each in zip(indices, answers, strict=True)}
        yield from (found[i] for i in sorted(found))


def _key(item: Item) -> tuple[str, str | None]:
    return item.task, item.group


def _labels(items: Sequence[Item], given: Sequence[str] | None) -> dict[tuple[str, str | None], Sequence[str]]:
    """Return what each group of items chooses from: given, the two of its language, or all that occur."""
    found: dict[tuple[str, str | None], Sequence[str]] = {}
    for key in dict.fromkeys(_key(item) for item in items if item.task in CHOICES):
        occurring = list(dict.fromkeys(item.output for item in items if _key(item) == key))
        pair = table()["sentiments"].get(key[1] or "en", ()) if key[0] == "sentiment" else ()
        found[key] = given or (pair if set(occurring) <= set(pair) else occurring)
        check_labels(found[key])
        strange = next((label for label in occurring if label not in found[key]), None)
        if strange is not None:
            raise RequestError(f"the label {strange!r} of the file is none of {', '.join(found[key])}; name it too")
    return found


def _prompt(item: Item, labels: Sequence[str], options: Any) -> Prompt:
    near = [each for each in options.get("examples", ()) if _key(each) == _key(item) and each != item]
    pairs = tuple((question(_instruction(each, labels, options), each.input), each.output) for each in near)
    said = _instruction(item, labels, options)
    return Prompt(said, item.input, pairs, options.get("style", "chat"), options.get("cue", "\n"))


def _instruction(item: Item, labels: Sequence[str], options: Any) -> str:
    given = options.get("instruction")
    given = item.instruction if given is None else given
    if given is not None:
        return given
    return default_instruction(item.task, item.language, target=item.target_language, labels=labels)


def _check_lengths(llm: LLM, items: Sequence[Item], prompts: Sequence[Prompt]) -> None:
    """Refuse what cannot be asked before any work is done."""
    room = llm.config.context_length
    for item, prompt in zip(items, prompts, strict=True):
        try:
            n_tokens = len(llm.prompt_ids(prompt.asked()))
        except ChatError as error:
            raise RequestError(f"{item.where}: {error}") from None
        if n_tokens >= room:
            raise RequestError(
                f"{item.where}: the prompt has {n_tokens} tokens and the model's context holds {room}, which leaves "
                "no room for an answer; take the item out, or give fewer examples"
            )


def score_answers(answered: Sequence[Answered]) -> list[Score]:
    """Return the table: the metrics of each task, for each language in it, in the order of the items."""
    groups: dict[tuple[str, str | None], list[Answered]] = {}
    for each in answered:
        groups.setdefault(_key(each.item), []).append(each)
    return [
        Score(task, language, each.name, each.value, each.low, each.high, len(group))
        for (task, language), group in groups.items()
        for each in _measures(task, group)
    ]


def _measures(task: str, group: Sequence[Answered]) -> list[Measure]:
    right, said = [each.item.output for each in group], [each.text for each in group]
    hits = [is_same(a, b) for a, b in zip(said, right, strict=True)]
    item = group[0].item
    spoken = item.target_language if task == "translate" else item.language
    match task:
        case "sentiment" | "classify":
            return [share("accuracy", hits), macro_f1(right, said)]
        case "answer":
            return [share("exact", hits)]
        case "title":
            return [share("exact", hits), *rouge(right, said)]
        case "summarise":
            return [*rouge(right, said), *corpus_scores(right, said, language=spoken)]
        case _:
            return corpus_scores(right, said, language=spoken)
