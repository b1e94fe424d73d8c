"""One record with a judgement: what it asks, what is answered, and what is thought of it.

    pairs      {"prompt" or "conversations", "chosen", "rejected"}   each a text, a message, or messages
               {"chosen", "rejected"}                                two dialogues that part at their last answer
               {"chosen": "\\n\\nHuman: ...", "rejected": ...}         the same as texts of Anthropic's
    labelled   any dialogue of `dialogues.formats`, and "label"      true or false

Turns are read as `dialogues` reads them. Knows nothing of files; docs/dialogues.md shows an example of each.
"""

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

from llama2.chat import Conversation
from llama2.data.dialogues import formats
from llama2.data.dialogues.formats import Record, detect
from llama2.data.dialogues.sample import NotForTraining, Turn, dialogue
from llama2.data.dialogues.turns import WAY_OUT, field, framed, kind, text_of, turns_of
from llama2.data.preferences.pair import RATINGS, Labelled, Pair
from llama2.errors import DataError, did_you_mean

SIDES = ("chosen", "rejected")
SINGLE = ("messages", "sharegpt", "prompt-completion", "alpaca")
"""Formats of a dialogue whose last answer can be labelled."""
KEYS = (
    *formats.KEYS,
    *("rejected", "rating", "margin", "kind", "is_safety", "is_unsafe", "chosen_is_safe", "rejected_is_safe"),
)
"""Every key that is looked at."""

_SHORT = {"significantly": 3, "slightly": 1, "negligibly": 0, "negligibly better": 0, "negligibly better/unsure": 0}
_SPELLINGS = RATINGS | _SHORT | {"unsure": 0}
_NAMES = {code: name for name, code in RATINGS.items()}
_KINDS = {"safe": True, "helpful": False}


def pair(record: Record, where: str) -> Pair:
    """Return the pair that a record holds. Raises DataError without `where`, and NotForTraining."""
    _check_two_sides(record)
    prompt, *answers = _sides(record)
    for side, answer in zip(SIDES, answers, strict=True):
        _check_answer(answer, side)
    asked, chosen = _checked(prompt, answers[0])
    _, rejected = _checked(prompt, answers[1])
    if chosen.strip() == rejected.strip():
        raise DataError(
            "'chosen' and 'rejected' are the same; a pair needs a better and a worse answer: take the record out"
        )
    safe = {f"{side}_is_safe": _true_or_false(record, f"{side}_is_safe") for side in SIDES}
    return Pair(where, asked, chosen, rejected, *_rating_or_margin(record), _is_safety(record), **safe)


def labelled(record: Record, where: str) -> Labelled:
    """Return the labelled answer that a record holds. Raises DataError without `where`, and NotForTraining."""
    if any(record.get(side) is not None for side in SIDES):
        raise DataError(
            "a pair of answers stands here; wanted one answer and its 'label': `llama2 reward` and `llama2 dpo` take "
            "pairs"
        )
    format = detect(record)
    if format not in SINGLE:
        raise formats.unknown(record) if format is None else _no_answer(format)
    field(record, "label")  # says what is there
    *prompt, answer = formats.READERS[format](record)
    if answer.role != "assistant":
        raise DataError(f"the last message is the {answer.role}'s; wanted the assistant's answer: {WAY_OUT}")
    _check_answer(answer, "answer")
    return Labelled(where, *_checked(prompt, answer), bool(_true_or_false(record, "label")))


def _no_answer(format: str) -> DataError:
    return DataError(f"a record of the format {format!r} has no one answer to label; wanted {', '.join(SINGLE)}")


def _check_two_sides(record: Record) -> None:
    missing = [side for side in SIDES if record.get(side) is None]
    if len(missing) == 1:
        field(record, missing[0])  # says what is there
    if not missing:
        return
    if detect(record) is None:
        keys = ", ".join(map(repr, record)) or "none"
        hint = next((did_you_mean(key, SIDES) for key in record if did_you_mean(key, SIDES)), "")
        raise DataError(
            f"no key 'chosen' or 'rejected' that holds something; the keys are {keys}{hint}; wanted 'prompt', 'chosen' "
            "and 'rejected': rename them"
        )
    if record.get("label") is None:
        raise DataError(
            "one answer stands here; wanted a pair, 'chosen' and 'rejected': `llama2 finetune` takes single answers"
        )
    raise DataError(
        "one labelled answer stands here; wanted a pair, 'chosen' and 'rejected': `llama2 dpo --loss kto` takes "
        "labelled answers"
    )


# What is asked and answered


def _sides(record: Record) -> tuple[list[Turn], Turn, Turn]:
    """Return the prompt and the two answers."""
    asked = next((key for key in ("conversations", "prompt") if record.get(key) is not None), None)
    if asked is None and detect(record) == "hh":
        return _hh(record)
    chosen, rejected = (turns_of(record[side], side, speaker="assistant") for side in SIDES)
    are_whole = [turns[0].role in ("system", "user") for turns in (chosen, rejected)]
    if all(are_whole):
        return _whole(chosen, rejected, record, asked)
    if any(are_whole):
        whole, single = SIDES if are_whole[0] else SIDES[::-1]
        raise DataError(f"{whole!r} is a whole dialogue and {single!r} only an answer; wanted both alike: {WAY_OUT}")
    prompt = turns_of(field(record, asked or "prompt"), asked or "prompt")
    for side, turns in zip(SIDES, (chosen, rejected), strict=True):
        if len(turns) != 1:
            raise DataError(f"{side!r} holds {len(turns)} messages, wanted one answer: move the others to the prompt")
    return framed(prompt, record), chosen[0], rejected[0]


def _whole(
    chosen: list[Turn], rejected: list[Turn], record: Record, asked: str | None
) -> tuple[list[Turn], Turn, Turn]:
    """Two dialogues that are the same up to their last answers. Many files repeat their first question in a prompt."""
    n_common = _n_common(chosen, rejected)
    if not len(chosen) == len(rejected) <= n_common + 1:
        raise DataError(
            f"'chosen' ({len(chosen)} messages) and 'rejected' ({len(rejected)}) part at message {n_common}; two "
            f"dialogues may differ in their last answer only: {WAY_OUT}"
        )
    said = {turn.content.strip() for turn in chosen[:-1]}
    if asked and any(turn.content.strip() not in said for turn in turns_of(record[asked], asked)):
        raise DataError(f"{asked!r} is not in 'chosen', which is a whole dialogue: leave one of the two")
    return framed(chosen[:-1], record), chosen[-1], rejected[-1]


def _hh(record: Record) -> tuple[list[Turn], Turn, Turn]:
    """Anthropic's own pairs: some part before the last answer, some hold an empty one or two turns of one speaker."""
    if not str(record["rejected"]).startswith("\n\nHuman:"):
        raise DataError("'chosen' is a dialogue of Human and Assistant, and 'rejected' is none; wanted both alike")
    chosen, rejected = (formats.READERS["hh"]({"text": text_of(record, side)}) for side in SIDES)
    n_asked = _n_common(chosen, rejected)
    while n_asked and chosen[n_asked - 1].role != "user":
        n_asked -= 1
    prompt, *answers = chosen[:n_asked], chosen[n_asked:], rejected[n_asked:]
    if any([turn.role for turn in rest] != ["assistant"] for rest in answers):
        raise NotForTraining("the dialogues part before their last answer")
    if any(one.role == two.role for one, two in pairwise(prompt)):
        raise NotForTraining("two turns of one speaker in a row")
    if not all(turns[-1].content for turns in answers):
        raise NotForTraining("an answer is empty")
    return framed(prompt, record), answers[0][0], answers[1][0]


def _n_common(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> int:
    """Return how many turns two dialogues begin with alike."""

    def is_same(turns: tuple[Turn, Turn]) -> bool:
        return turns[0].role == turns[1].role and turns[0].content == turns[1].content

    return len(list(takewhile(is_same, zip(chosen, rejected, strict=False))))


def _check_answer(answer: Turn, side: str) -> None:
    if answer.role != "assistant":
        raise DataError(f"{side!r} ends with a message of the {answer.role}; wanted the assistant's: {WAY_OUT}")
    if not answer.content.strip():
        raise DataError(f"{side!r} is empty; wanted an answer: write it, or take the record out")
    if not answer.is_trained:
        raise NotForTraining(f"{side!r} has the weight 0")


def _checked(prompt: Sequence[Turn], answer: Turn) -> tuple[Conversation, str]:
    """Return prompt and answer as they may stand in a dialogue."""
    messages = dialogue("", [*prompt, answer]).messages
    assert messages is not None
    return messages[:-1], messages[-1].content


# What is thought of it


def _rating_or_margin(record: Record) -> tuple[str | None, float | None]:
    rating, margin = record.get("rating"), record.get("margin")
    if rating is not None and margin is not None:
        raise DataError(
            f"both a rating ({rating!r}) and a margin ({margin!r}) are given; a pair has one of them: leave one out"
        )
    return _rating(rating), _margin(margin)


def _rating(value: Any) -> str | None:
    if value is None:
        return None
    spelt = " ".join(value.lower().split()) if isinstance(value, str) else value
    known = isinstance(spelt, int | float | str) and not isinstance(spelt, bool)
    if known and spelt in _NAMES:
        return _NAMES[spelt]
    if known and spelt in _SPELLINGS:
        return _NAMES[_SPELLINGS[spelt]]
    wanted = ", ".join(f"{name!r} ({code})" for name, code in RATINGS.items())
    hint = did_you_mean(spelt, _SPELLINGS) if isinstance(spelt, str) else ""
    raise DataError(f"the rating is {value!r}, wanted one of {wanted}{hint}; {WAY_OUT}")


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    # not finite, or not so in float32
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 3e38:
        raise DataError(f"the margin is {value!r}, wanted a finite number, 0 or more; {WAY_OUT}")
    return float(value)


def _is_safety(record: Record) -> bool | None:
    """Whether a pair is about safety; a `kind` that is neither of ours may mean anything, and says nothing."""
    told = {key: _true_or_false(record, key) for key in ("is_safety", "is_unsafe")}
    if isinstance(record.get("kind"), str):
        told["kind"] = _KINDS.get(record["kind"])
    found = {value for value in told.values() if value is not None}
    if len(found) > 1:
        said = ", ".join(f"{key} {record[key]!r}" for key, value in told.items() if value is not None)
        raise DataError(f"{said} contradict each other; leave one that is right, or take the record out")
    return found.pop() if found else None


def _true_or_false(record: Record, key: str) -> bool | None:
    value = record.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{key!r} is {kind(value)} ({value!r}), wanted true or false; {WAY_OUT}")
    return value
