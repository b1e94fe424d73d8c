"""A world as plain files, in the formats that people bring themselves.

world/
  train/ stories.en.txt  stories.es.txt  stories.zh.txt    stories, a blank line between them
         stories.jsonl                                     {"text", "language", "title", "summary"}
         tasks.jsonl                                       {"instruction", "input", "output", "task", "language"}
  heldout/                                                 the same, of stories that train never tells
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from llama2.data.storyworld.stories import Split, Story, stories
from llama2.data.storyworld.tasks import a_task
from llama2.data.storyworld.words import LANGUAGES
from llama2.errors import Llama2Error
from llama2.files.staging import staged_folder


def write_world(out: Path, *, n_stories: int, n_heldout: int, seed: int = 0) -> None:
    """Write n_stories and n_heldout stories, each in every language, into a new folder."""
    for name, n in (("stories", n_stories), ("heldout", n_heldout)):
        if n < 1:
            raise Llama2Error(f"{name}={n} must be at least 1")
    with staged_folder(out) as folder:
        _write_split(folder / "train", "train", n_stories, seed)
        _write_split(folder / "heldout", "heldout", n_heldout, seed)


def _write_split(folder: Path, split: Split, n: int, seed: int) -> None:
    folder.mkdir()
    with ExitStack() as stack:

        def create(name: str):
            return stack.enter_context((folder / name).open("w", encoding="utf-8", newline="\n"))

        plain = {language: create(f"stories.{language}.txt") for language in LANGUAGES}
        records, tasks = create("stories.jsonl"), create("tasks.jsonl")
        for index, each in enumerate(stories(seed, n, split=split)):
            for language in LANGUAGES:
                plain[language].write(each.text(language) + "\n\n")
            records.writelines(line(record) for record in told(each))
            for language in LANGUAGES:
                tasks.write(line(asdict(a_task(each, language, seed=index))))


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
