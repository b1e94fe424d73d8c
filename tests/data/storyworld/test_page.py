"""docs/storyworld.md shows what the code makes."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from llama2.data.storyworld import dialogues, preferences, safety
from llama2.data.storyworld.files import told
from llama2.data.storyworld.stories import story

PAGE = (Path(__file__).parents[3] / "docs/storyworld.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_records_are_the_codes():
    shown = [json.loads(block) for block in blocks("json")[:-1]]
    made = [
        *told(story(0, 2, split="heldout")),
        dialogues.record(dialogues.dialogue(0, 3, split="heldout")),
        preferences.record(preferences.preference(0, 9, split="heldout")),
        *(safety.record(safety.safety_request(0, index, split="heldout")) for index in (0, 3)),
    ]
    for record in made:
        record.pop("grading", None)
    assert [record for record in shown if "task" not in record] == made


def test_the_example_prints_what_the_page_says():
    printed = StringIO()
    with redirect_stdout(printed):
        exec(blocks("python")[0], {})
    assert printed.getvalue() == blocks("text")[1]


def test_every_kind_of_plant_is_shown():
    kinds = {json.loads(line)["kind"] for line in blocks("json")[-1].splitlines()}
    assert len(kinds) == 7 and all(kind in PAGE for kind in kinds)
