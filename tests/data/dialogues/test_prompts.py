"""What is asked in files of every kind: the last answer is cut off, whatever else the record says is kept."""

import json

import pytest

from llama2.data.dialogues.prompts import read_prompts
from llama2.data.storyworld.files import write_world
from llama2.errors import DataError

U, A = "user", "assistant"


def turns(*contents, roles=(U, A)):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes records as JSON lines, or lines as they are, and returns the path."""

    def put(*records, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
        return path

    return put


def said(found) -> list[str]:
    return [f"{message.role}: {message.content}" for message in found.messages]


ASKED = {
    "text": ({"prompt": "Hi"}, ["user: Hi"]),
    "message": ({"prompt": {"role": U, "content": "Hi"}}, ["user: Hi"]),
    "messages in a prompt": ({"prompt": turns("Hi", "Yes?", "Go")}, ["user: Hi", "assistant: Yes?", "user: Go"]),
    "system": ({"prompt": "Hi", "system": "Be kind"}, ["system: Be kind", "user: Hi"]),
    "dialogue with an answer": (
        {"messages": turns("Hi", "Yes?", "Go", "Gone")},
        ["user: Hi", "assistant: Yes?", "user: Go"],
    ),
    "dialogue without": ({"messages": turns("Hi", "Yes?", "Go")}, ["user: Hi", "assistant: Yes?", "user: Go"]),
    "empty answer": ({"messages": turns("Hi", "")}, ["user: Hi"]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}, ["user: Hi"]),
    "alpaca": ({"instruction": "Add", "input": "1 1", "output": "2"}, ["user: Add\n1 1"]),
    "alpaca without an output": ({"instruction": "Add", "input": "1 1"}, ["user: Add\n1 1"]),
    "completion": ({"prompt": "Hi", "completion": "Yes?"}, ["user: Hi"]),
    "pair": ({"prompt": "Hi", "chosen": "Yes?", "rejected": "No"}, ["user: Hi"]),
    "pair of dialogues": ({"chosen": turns("Hi", "Yes?"), "rejected": turns("Hi", "No")}, ["user: Hi"]),
    "hh": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant: Gone", "rejected": "\n\nHuman: Hi"},
        ["user: Hi", "assistant: Yes?", "user: Go"],
    ),
    "bad answer": ({"prompt": "Hi", "completion": "No", "label": False}, ["user: Hi"]),
    "tool": (
        {"messages": [*turns("Add", "add(1, 1)"), {"role": "tool", "content": "2"}]},
        ["user: Add", "assistant: add(1, 1)", "tool: 2"],
    ),
}


@pytest.mark.parametrize("kind", ASKED)
def test_what_is_asked(write, kind):
    record, wanted = ASKED[kind]
    (found,) = read_prompts(write(record | {"answer": 2}))
    assert said(found) == wanted and found.where == "prompts.jsonl:1"
    assert found.record == record | {"answer": 2}


def test_kinds_may_be_mixed(write):
    found = list(read_prompts(write(*(record for record, _ in ASKED.values()))))
    assert [said(each) for each in found] == [wanted for _, wanted in ASKED.values()]


REFUSED = [
    ('{"prompt": ', "prompts.jsonl:2: broken JSON"),
    ({"prompts": "Hi"}, "prompts.jsonl:2: nothing is asked: the keys are 'prompts', did you mean 'prompt'?"),
    ({"text": "Once upon a time"}, "prompts.jsonl:2: nothing is asked: the keys are 'text'; wanted 'prompt'"),
    ({"prompt": ""}, "prompts.jsonl:2: message 0 (user) is empty"),
    ({"prompt": 3}, "prompts.jsonl:2: 'prompt' is a number"),
    ({"messages": []}, "prompts.jsonl:2: 'messages' is an empty list"),
    ({"messages": [{"role": A, "content": "Hi"}]}, "prompts.jsonl:2: nothing is asked: no message of a user"),
    ({"messages": [{"role": "system", "content": "Be kind"}]}, "nothing is asked: no message of a user"),
    ({"messages": turns("Hi", "Ho", roles=(U, U))}, "prompts.jsonl:2: message 1: two messages of the user in a row"),
    ({"messages": [{"role": "usr", "content": "Hi"}]}, "the role is 'usr', wanted one of system, user"),
]


@pytest.mark.parametrize(("record", "wanted"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_asks_nothing_is_refused_by_its_line(write, record, wanted):
    path = write({"prompt": "Hi"}, record, {"prompt": "Ho"})
    with pytest.raises(DataError) as caught:
        list(read_prompts(path))
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
    broken = []
    assert [said(each) for each in read_prompts(path, broken=broken.append)] == [["user: Hi"], ["user: Ho"]]
    assert [str(each) for each in broken] == [str(caught.value)]


def test_what_nobody_can_go_on_with_is_told(write):
    twice = "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: Yes?"
    told = []
    path = write({"prompt": "Hi"}, {"chosen": twice, "rejected": twice})
    assert len(list(read_prompts(path, skipped=lambda *why: told.append(why)))) == 1
    assert told == [("prompts.jsonl:2", "two turns of one speaker in a row")]


def test_a_file_without_a_prompt_is_refused(write):
    path = write({"chosen": "\n\nHuman: Hi\n\nHuman: Ho\n\nAssistant: Yes?"})
    with pytest.raises(DataError, match="holds no prompt; wanted at least one record with 'prompt'"):
        list(read_prompts(path))


def test_columns_of_any_name_are_kept(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"prompt": ["Add 1 and 1."], "solution": ["2"]})
    pq.write_table(table, tmp_path / "sums.parquet")
    (found,) = read_prompts(tmp_path / "sums.parquet")
    assert said(found) == ["user: Add 1 and 1."] and found.record == {"prompt": "Add 1 and 1.", "solution": "2"}
    (tmp_path / "sums.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"sums\.parquet"):
        list(read_prompts(tmp_path / "sums.parquet"))


def test_what_a_world_asks(tmp_path):
    write_world(tmp_path / "world", n_stories=8, n_heldout=4)
    folder = tmp_path / "world" / "train"
    for name in ("preferences.jsonl", "safety.jsonl", "dialogues.jsonl", "tasks.jsonl"):
        found = list(read_prompts(folder / name))
        assert found and all(each.messages[-1].role == U for each in found)
    assert {each.record["is_unsafe"] for each in read_prompts(folder / "safety.jsonl")} == {True, False}


def test_real_pairs(assets):
    """Anthropic's own file: every record asks something, or it is told why not."""
    path = assets / "preference/harmless-base-test.jsonl.gz"
    told, broken = [], []
    found = list(read_prompts(path, skipped=lambda *why: told.append(why), broken=broken.append))
    assert not broken and len(found) > 20 * len(told)
    assert all(each.messages[-1].role == U for each in found)
