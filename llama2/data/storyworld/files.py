"""A world as plain files, in the formats that people bring themselves.

world/
  train/ stories.en.txt  stories.es.txt  stories.zh.txt    stories, a blank line between them
         stories.jsonl                                     {"text", "language", "title", "summary"}
         readers.txt                                       exercises, phrase books and vocabularies
         tasks.jsonl                                       {"instruction", "input", "output", "task", "language", ...}
         dialogues.jsonl                                   {"messages": [{"role", "content"}], "instruction", ...}
         preferences.jsonl                                 {"prompt", "chosen", "rejected", "rating", "kind", ...}
         questions.jsonl                                   {"prompt", "kind", "language", "grading"}: to align by
         safety.jsonl                                      {"messages", "category", "vector", "is_unsafe", ...}
         guarded.jsonl                                     the same of other requests, a preprompt before each
         instructions.jsonl                                {"text", "kinds", "answers_in", ...}: standing ones
  heldout/                                                 the same, of stories that train never tells
  raw/   notes.txt  feed.jsonl.gz  crawl.warc.gz           the training stories as found on the web, dirty
         pages/000001.en.html ...
  planted.jsonl                                            what is wrong with raw/, and where

`planted.jsonl` is no text to learn from, so it stands beside raw/ and not in it.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llama2.data.corpus.pool import run_tasks
from llama2.data.storyworld import dialogues, guarded, instructions, preferences, questions, safety
from llama2.data.storyworld.raw import Dirt, write_raw
from llama2.data.storyworld.readers import page
from llama2.data.storyworld.stories import Split, Story, stories
from llama2.data.storyworld.tasks import a_task, lesson, record as as_line
from llama2.data.storyworld.words import LANGUAGES
from llama2.errors import Llama2Error
from llama2.files.staging import staged_folder


def usual_workers(n_stories: int) -> int:
    """Return how many processes are worth their start: one for a small world."""
    return 1 if n_stories < 2_000 else min(4, os.cpu_count() or 1)


def write_world(
    out: Path,
    *,
    n_stories: int,
    n_heldout: int,
    seed: int = 0,
    n_turns: int | None = None,
    raw: bool = True,
    dirt: Dirt | None = None,
    n_workers: int = 1,
) -> None:
    """Write n_stories and n_heldout stories, each in every language, and what follows from them, into a new folder.

    Of dialogues, preference pairs, questions, requests about safety, guarded ones and instructions there are as many
    as stories, the language going round. `n_turns` is that of the dialogues, 2 to 6 if not given. `raw` adds the dirty
    corpus, with `dirt` as it says. With more than one worker files are written in other processes; they are the same.
    """
    for name, n in (("stories", n_stories), ("heldout", n_heldout)):
        if n < 1:
            raise Llama2Error(f"{name}={n} must be at least 1")
    dialogues.check_turns(n_turns)
    with staged_folder(out) as folder:
        (folder / "train").mkdir()
        (folder / "heldout").mkdir()
        tasks: list[tuple] = []
        if raw:
            tasks.append((_raw, folder, n_stories, n_heldout, seed, dirt))
        for split, n in (("train", n_stories), ("heldout", n_heldout)):
            for write in (_stories, _pairs, _conversations, _questions, _requests):
                tasks.append((write, folder / split, split, n, seed, n_turns))
        run_tasks(_call, tasks, n_workers=n_workers, on_done=lambda number, result: None)


def _call(write: Callable[..., None], *arguments: Any) -> None:
    write(*arguments)


def _raw(folder: Path, n_stories: int, n_heldout: int, seed: int, dirt: Dirt | None) -> None:
    planted = folder / "planted.jsonl"
    write_raw(folder / "raw", planted, n_stories=n_stories, n_heldout=n_heldout, seed=seed, dirt=dirt)


def _stories(folder: Path, split: Split, n: int, seed: int, n_turns: int | None) -> None:
    with ExitStack() as stack:

        def create(name: str):
            return stack.enter_context((folder / name).open("w", encoding="utf-8", newline="\n"))

        plain = {language: create(f"stories.{language}.txt") for language in LANGUAGES}
        draw = lesson if split == "train" else a_task
        records, tasks, readers = (create(name) for name in ("stories.jsonl", "tasks.jsonl", "readers.txt"))
        for index, each in enumerate(stories(seed, n, split=split)):
            readers.write(page(each, index) + "\n\n")
            for language in LANGUAGES:
                plain[language].write(each.text(language) + "\n\n")
            records.writelines(line(record) for record in told(each))
            for language in LANGUAGES:
                tasks.write(line(as_line(draw(each, language, seed=index))))


def _conversations(folder: Path, split: Split, n: int, seed: int, n_turns: int | None) -> None:
    talks = dialogues.dialogues(seed, n, split=split, n_turns=n_turns)
    _lines(folder / "dialogues.jsonl", map(dialogues.record, talks))


def _pairs(folder: Path, split: Split, n: int, seed: int, n_turns: int | None) -> None:
    pairs = preferences.preferences(seed, n, split=split)
    _lines(folder / "preferences.jsonl", map(preferences.record, pairs))


def _questions(folder: Path, split: Split, n: int, seed: int, n_turns: int | None) -> None:
    _lines(folder / "questions.jsonl", (each.line for each in questions.questions(seed, n, split=split)))
    _lines(folder / "instructions.jsonl", instructions.instructions(seed, n, split=split))


def _requests(folder: Path, split: Split, n: int, seed: int, n_turns: int | None) -> None:
    _lines(folder / "safety.jsonl", map(safety.record, safety.safety_requests(seed, n, split=split)))
    _lines(folder / "guarded.jsonl", guarded.guarded_requests(seed, n, split=split))


def _lines(path: Path, records: Iterable[object]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(line, records))


def told(story: Story) -> Iterator[dict[str, str]]:
    """Yield the story in each language, with what it is called and what happens in it."""
    for language in LANGUAGES:
        yield {
            "text": story.text(language),
            "language": language,
            "title": story.title(language),
            "summary": story.summary(language),
        }


def line(record: object) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
