"""Every form of file, and what is wrong with broken ones."""

import json
from itertools import islice

import pytest

from llama2.data.storyworld.stories import stories
from llama2.data.storyworld.tasks import tasks
from llama2.errors import DataError
from llama2.tasks import read_items


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_the_worlds_records(tmp_path):
    story = next(iter(islice(stories(0, 1, split="heldout"), 1)))
    records = [vars(task) for language in ("en", "es", "zh") for task in tasks(story, language)]
    path = write(tmp_path / "tasks.jsonl", records)
    items = read_items(path)
    assert len(items) == len(records) and items[0].where == "tasks.jsonl:1"
    pairs = {item.group for item in items if item.task == "translate"}
    assert pairs == {"en-es", "en-zh", "es-en", "es-zh", "zh-en", "zh-es"}
    assert {item.group for item in items if item.task == "sentiment"} == {"en", "es", "zh"}
    assert {item.task for item in read_items(path, task="title")} == {"title"}
    assert len(read_items(path, limit=3)) == 3


def test_pairs_of_text_and_label(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("a film \t1\r\nno film\t0\n\n")
    items = read_items(path, task="sentiment", language="en", labels={"1": "positive", "0": "negative"})
    assert [(item.input, item.output, item.language) for item in items] == [
        ("a film ", "positive", "en"),
        ("no film", "negative", "en"),
    ]
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": "spam"}])
    assert read_items(path, task="classify")[0].output == "spam"
    path = write(tmp_path / "b.jsonl", [{"source": "x", "target": "y"}])
    assert read_items(path, task="translate", source_language="en", target_language="de")[0].group == "en-de"
    assert read_items(path, task="translate")[0].group is None


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"input": "a", "output": "b"}, "x.jsonl:1: the record names no task"),
        ({"task": "titles", "input": "a", "output": "b"}, "'titles' is not one of .* did you mean 'title'"),
        ({"task": "title", "input": "a"}, "rename the keys"),
        ({"task": "title", "input": "a", "output": 3}, "'output' is 3"),
        ({"task": "title", "input": " ", "output": "b"}, "is empty"),
        ({"task": "answer", "input": "a", "output": "b"}, "needs its question"),
        ({"task": "title", "input": "", "output": "b", "history": [["c", "d"]]}, "x.jsonl:1: it has a 'history'"),
        ([1], "a list stands here"),
    ],
)
def test_a_broken_record_is_named(tmp_path, record, said):
    with pytest.raises(DataError, match=said):
        read_items(write(tmp_path / "x.jsonl", [record]))


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\tc\n")
    with pytest.raises(DataError, match="x.tsv:1 has 3 columns"):
        read_items(path, task="title")
    with pytest.raises(DataError, match="none.tsv cannot be read"):
        read_items(tmp_path / "none.tsv", task="title")
    with pytest.raises(DataError, match="unknown kind"):
        read_items(tmp_path / "x.csv", task="title")
    with pytest.raises(DataError, match="task='poem'"):
        read_items(path, task="poem")
    with pytest.raises(DataError, match="holds no item of the task 'answer'"):
        read_items(write(tmp_path / "y.jsonl", [{"task": "title", "input": "a", "output": "b"}]), task="answer")
