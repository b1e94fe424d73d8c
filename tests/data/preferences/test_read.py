"""Preference files: what is read from real ones and from each format, and what is refused, by its line."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import llama2
from llama2.chat import Message
from llama2.data.preferences.formats import KEYS, labelled, pair
from llama2.data.preferences.pair import FLAGS, RATINGS, Labelled, Pair
from llama2.data.preferences.read import read_labelled, read_pairs
from llama2.data.storyworld import preferences as storyworld
from llama2.errors import DataError

HI = (Message("user", "Hi"),)
PLAIN = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
EXPECTED = Pair("here", HI, "Hello!", "Go away.")


def user(content):
    return {"role": "user", "content": content}


def bot(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes records as JSON lines and returns the path."""

    def put(*records, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
        return path

    return put


@pytest.mark.parametrize(
    "record",
    [
        PLAIN,
        {"prompt": [user("Hi")], "chosen": [bot("Hello!")], "rejected": [bot("Go away.")]},
        {"prompt": user("Hi"), "chosen": bot("Hello!"), "rejected": "Go away."},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "Go away."},
        },
        {"chosen": [user("Hi"), bot("Hello!")], "rejected": [user("Hi"), bot("Go away.")]},
        {"prompt": "Hi", "chosen": [user("Hi"), bot("Hello!")], "rejected": [user("Hi"), bot("Go away.")]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."},
        {**PLAIN, "label": None, "margin": None, "source": "a key that nobody knows", "kind": "chitchat"},
    ],
)
def test_every_format_gives_the_same_pair(record):
    assert pair(record, "here") == EXPECTED


def test_earlier_turns_and_a_system_text_are_the_prompt():
    turns = [user("Hi"), bot("Hello!"), user("Bye")]
    prompt = (Message("system", "Be brief."), *HI, Message("assistant", "Hello!"), Message("user", "Bye"))
    expected = Pair("here", prompt, "Bye.", "Stay!")
    hh = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: "
    for record in (
        {"prompt": turns, "chosen": "Bye.", "rejected": "Stay!"},
        {"chosen": [*turns, bot("Bye.")], "rejected": [*turns, bot("Stay!")]},
        {"chosen": hh + "Bye.", "rejected": hh + "Stay!"},
    ):
        assert pair({**record, "system": "Be brief."}, "here") == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *((name, name) for name in RATINGS),
        *((code, name) for name, code in RATINGS.items()),
        ("Significantly  Better", "significantly better"),
        ("slightly", "slightly better"),
        ("Negligibly better", "negligibly better / unsure"),
        ("unsure", "negligibly better / unsure"),
        (2.0, "better"),
    ],
)
def test_ratings_are_known_in_every_spelling(given, expected):
    assert pair({**PLAIN, "rating": given}, "here").rating == expected


def test_storyworld_has_the_same_ratings():
    assert list(RATINGS) == list(storyworld.RATINGS)
    assert list(RATINGS.values()) == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, (None, None, None)),
        ({"kind": "safe"}, (True, None, None)),
        ({"kind": "helpful", "is_unsafe": False}, (False, None, None)),
        ({"is_unsafe": True, "rejected_is_safe": False}, (True, None, False)),
        ({"is_safety": False, "chosen_is_safe": True}, (False, True, None)),
    ],
)
def test_what_is_told_of_safety(told, expected):
    found = pair({**PLAIN, **told}, "here")
    assert tuple(getattr(found, name) for name in FLAGS) == expected


def test_a_margin_may_stand_for_the_rating():
    assert pair({**PLAIN, "margin": 1}, "here") == Pair("here", HI, "Hello!", "Go away.", margin=1.0)


REFUSED = [
    ({"prompt": "Hi", "chosen": "Hello!"}, "no key 'rejected' that holds something; the keys are 'prompt', 'chosen'"),
    ({"prompt": "Hi", "rejected": "No."}, "no key 'chosen' that holds something"),
    ({"chosen": "Hello!", "rejected": "Go away."}, "no key 'prompt' that holds something"),
    ({**PLAIN, "rejected": " "}, "'rejected' is empty; wanted an answer: write it, or take the record out"),
    ({**PLAIN, "chosen": ""}, "'chosen' is empty"),
    ({**PLAIN, "prompt": " "}, "message 0 (user) is empty"),
    ({**PLAIN, "prompt": 3}, "'prompt' is a number, wanted a list of messages"),
    ({**PLAIN, "prompt": [user("Hi"), bot("Hey")]}, "message 2: two messages of the assistant in a row"),
    (
        {**PLAIN, "rejected": "Hello! "},
        "'chosen' and 'rejected' are the same; a pair needs a better and a worse answer: take the record out",
    ),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!"},
        "'chosen' and 'rejected' are the same",
    ),
    ({**PLAIN, "chosen": [bot("Hello!"), user("Hm"), bot("So?")]}, "'chosen' holds 3 messages, wanted one answer"),
    ({**PLAIN, "chosen": [user("Hi"), bot("Hey")]}, "'chosen' is a whole dialogue and 'rejected' only an answer"),
    (
        {"prompt": "Bye", "chosen": [user("Hi"), bot("Hello!")], "rejected": [user("Hi"), bot("Go away.")]},
        "'prompt' is not in 'chosen', which is a whole dialogue: leave one of the two",
    ),
    (
        {"chosen": [user("Hi"), bot("Hello!")], "rejected": [user("Hey"), bot("Go away.")]},
        "'chosen' (2 messages) and 'rejected' (2) part at message 0; two dialogues may differ in their last",
    ),
    (
        {"chosen": [user("Hi"), bot("Hello!")], "rejected": [user("Hi"), bot("Go"), user("Oh"), bot("Go away.")]},
        "'chosen' (2 messages) and 'rejected' (4) part at message 1",
    ),
    ({"chosen": [user("Hi"), user("Hm")], "rejected": [user("Hi"), bot("Go")]}, "'chosen' ends with a message of the"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "Go"}, "'rejected' is none; wanted both alike"),
    (
        {**PLAIN, "rating": "slightly betterx"},
        "the rating is 'slightly betterx', wanted one of 'significantly better' (3), 'better' (2), 'slightly better' "
        "(1), 'negligibly better / unsure' (0), did you mean 'slightly better'?",
    ),
    ({**PLAIN, "rating": 4}, "the rating is 4, wanted one of 'significantly better' (3)"),
    ({**PLAIN, "rating": True}, "the rating is True, wanted one of"),
    ({**PLAIN, "rating": [3]}, "the rating is [3], wanted one of"),
    ({**PLAIN, "margin": -0.5}, "the margin is -0.5, wanted a finite number, 0 or more"),
    ({**PLAIN, "margin": "much"}, "the margin is 'much', wanted a finite number"),
    ({**PLAIN, "margin": float("inf")}, "the margin is inf, wanted a finite number"),
    ({**PLAIN, "margin": float("nan")}, "the margin is nan, wanted a finite number"),
    ({**PLAIN, "margin": 10**400}, "wanted a finite number"),
    ({**PLAIN, "margin": 1, "rating": 3}, "both a rating (3) and a margin (1) are given; a pair has one of them"),
    ({**PLAIN, "chosen_is_safe": "yes"}, "'chosen_is_safe' is a text ('yes'), wanted true or false"),
    ({**PLAIN, "kind": "safe", "is_unsafe": False}, "is_unsafe False, kind 'safe' contradict each other"),
    ({"prompt": "Hi", "completion": "Hello!"}, "`llama2 finetune` takes single answers"),
    ({"prompt": "Hi", "completion": "Hello!", "label": True}, "`llama2 dpo --loss kto` takes labelled answers"),
    (
        {"chosenn": "Hi"},
        "no key 'chosen' or 'rejected' that holds something; the keys are 'chosenn', did you mean 'chosen'?; wanted",
    ),
]


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_what_is_no_pair_is_refused_by_its_line(write, record, message):
    path = write(PLAIN, record)
    with pytest.raises(DataError) as caught:
        list(read_pairs(path))
    assert str(caught.value).startswith("pairs.jsonl:2: ") and message in str(caught.value)


GOOD = {"prompt": "Hi", "completion": "Hello!", "label": True}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PLAIN, "a pair of answers stands here; wanted one answer and its 'label': `llama2 reward` and `llama2 dpo`"),
        ({"prompt": "Hi", "completion": "Hello!"}, "no key 'label' that holds something"),
        ({**GOOD, "label": 1}, "'label' is a number (1), wanted true or false"),
        ({**GOOD, "completion": " "}, "'answer' is empty"),
        ({"messages": [user("Hi"), bot("Hey"), user("So?")], "label": True}, "the last message is the user's; wanted"),
        ({"text": "Once", "label": True}, "a record of the format 'text' has no one answer to label"),
        ({"promptx": "Hi", "label": True}, "a record of no known format"),
    ],
)
def test_what_is_no_labelled_answer_is_refused_by_its_line(write, record, message):
    path = write(GOOD, record)
    with pytest.raises(DataError) as caught:
        list(read_labelled(path))
    assert str(caught.value).startswith("pairs.jsonl:2: ") and message in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "completion": "Go away.", "label": False},
        {"messages": [user("Hi"), bot("Go away.")], "label": False},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Go away."}], "label": False},
    ],
)
def test_every_format_gives_the_same_labelled_answer(record):
    assert labelled(record, "here") == Labelled("here", HI, "Go away.", False)


def test_broken_records_can_be_taken_one_by_one(write):
    path = write(PLAIN, {**PLAIN, "rating": 7}, [1], {**PLAIN, "chosen": "Good day."})
    broken = []
    assert [found.chosen for found in read_pairs(path, broken=broken.append)] == ["Hello!", "Good day."]
    assert [str(error).split(": ")[0] for error in broken] == ["pairs.jsonl:2", "pairs.jsonl:3"]


def test_nothing_left_is_an_error(write):
    path = write({**PLAIN, "chosen": {**bot("Hello!"), "weight": 0}})
    skipped = []
    with pytest.raises(DataError, match=r"holds no pair of answers to train on \(1 skipped\)"):
        list(read_pairs(path, skipped=lambda *told: skipped.append(told)))
    assert skipped == [("pairs.jsonl:1", "'chosen' has the weight 0")]


def test_a_folder_is_read_in_order_of_its_names(write, tmp_path):
    write({**PLAIN, "chosen": "2"}, name="b.jsonl")
    write({**PLAIN, "chosen": "1"}, name="a.jsonl")
    (tmp_path / "notes.md").write_text("no records")
    skipped = []
    found = list(read_pairs(tmp_path, skipped=lambda *told: skipped.append(told)))
    assert [(each.where, each.chosen) for each in found] == [("a.jsonl:1", "1"), ("b.jsonl:1", "2")]
    assert skipped == [("notes.md", "a file of another kind")]


def test_parquet_knows_every_key(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    records = [{**PLAIN, "rating": 3, "kind": "safe", "rejected_is_safe": False}, {**PLAIN, "is_unsafe": False}]
    parquet.write_table(arrow.Table.from_pylist(records, schema=arrow.schema(
        [*((key, arrow.string()) for key in ("prompt", "chosen", "rejected", "kind")), ("rating", arrow.int8())]
        + [(key, arrow.bool_()) for key in ("rejected_is_safe", "is_unsafe")]
    )), tmp_path / "pairs.parquet")  # fmt: skip
    first, second = read_pairs(tmp_path / "pairs.parquet")
    assert (first.rating, first.is_safety, first.rejected_is_safe) == ("significantly better", True, False)
    assert (second.rating, second.is_safety, second.rejected_is_safe) == (None, False, None)
    assert set(FLAGS) < set(KEYS)


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json"])
def test_llama_factorys_pairs(assets, name):
    path = assets / "preference" / name
    found, records = list(read_pairs(path)), json.loads(path.read_text(encoding="utf-8"))
    assert len(found) == 300
    for each, record in zip(found, records, strict=True):
        assert (each.chosen, each.rejected) == (record["chosen"]["value"], record["rejected"]["value"])
        assert [message.content for message in each.prompt] == [turn["value"] for turn in record["conversations"]]


def test_llama_factorys_labels(assets):
    path = assets / "preference/kto_en_demo.json"
    found, records = list(read_labelled(path)), json.loads(path.read_text(encoding="utf-8"))
    assert [each.is_good for each in found] == [record["label"] for record in records]
    assert [each.answer for each in found] == [record["messages"][-1]["content"] for record in records]
    assert Counter(each.is_good for each in found) == {True: 150, False: 150}


def test_anthropics_pairs(assets):
    path = assets / "preference/harmless-base-test.jsonl.gz"
    skipped = {}
    found = list(read_pairs(path, skipped=lambda where, reason: skipped.update({where: reason})))
    assert len(found) + len(skipped) == 2312
    assert Counter(skipped.values()) == {
        "the dialogues part before their last answer": 5,
        "an answer is empty": 4,
        "two turns of one speaker in a row": 4,
    }
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    for each in found:
        record = json.loads(lines[int(each.where.split(":")[1]) - 1])
        for side, answer in (("chosen", each.chosen), ("rejected", each.rejected)):
            names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
            turns = [*each.prompt, Message("assistant", answer)]
            whole = "".join(names[turn.role] + turn.content for turn in turns)
            assert "".join(whole.split()) == "".join(record[side].split())


def test_storyworlds_pairs(write):
    world = list(storyworld.preferences(0, 50))
    found = list(read_pairs(write(*map(storyworld.record, world))))
    assert len(found) == 50
    for each, original in zip(found, world, strict=True):
        assert (each.prompt, each.chosen, each.rejected) == (original.prompt, original.chosen, original.rejected)
        assert (each.rating, each.is_safety) == (original.rating, original.kind == "safe")
        assert (each.chosen_is_safe, each.rejected_is_safe) == (original.chosen_is_safe, original.rejected_is_safe)
    assert {each.is_safety for each in found} == {True, False}


def test_the_page_shows_what_can_be_read():
    page = (Path(llama2.__file__).parents[1] / "docs/dialogues.md").read_text(encoding="utf-8")
    section = page.partition("## Pairs and labelled answers")[2]
    records = [json.loads(line) for line in re.findall(r"^\{.*\}$", section, re.MULTILINE)]
    assert len(records) == 6
    for record in records:
        read = labelled if "label" in record else pair
        assert read(record, "here").prompt == HI
