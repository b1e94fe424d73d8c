"""Fine-tuning files: what is read from real ones, each format and container, and what is refused, by its line."""

import gzip
import json
import os

import pytest
import zstandard
from hypothesis import given, settings, strategies as st

from llama2.chat import Message
from llama2.data.dialogues.formats import FORMATS, detect, parse
from llama2.data.dialogues.read import detect_samples, read_samples
from llama2.data.dialogues.sample import NotForTraining
from llama2.data.storyworld.files import write_world
from llama2.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


def lines(*records) -> str:
    return "".join((each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)) + "\n" for each in records)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes records as JSON lines, or text as it is, and returns the path."""

    def put(*records, name="chats.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines(*records), encoding="utf-8")
        return path

    return put


def said(sample) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


def one(path, **settings):
    (sample,) = read_samples(path, **settings)
    return sample


def refusal(path, **settings) -> str:
    with pytest.raises(DataError) as caught:
        list(read_samples(path, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def chat(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


# Real files


@pytest.mark.parametrize(
    "name, format, n_samples, n_skipped, n_broken",
    [
        ("sft/alpaca_en_demo.json", "alpaca", 999, 0, 0),
        ("sft/alpaca_zh_demo.json", "alpaca", 1000, 0, 0),
        ("sft/dolly_hhrlhf_train_small.jsonl", "prompt-completion", 1000, 0, 0),
        ("sft/en_100_tree.jsonl", "oasst", 100, 0, 0),
        ("sft/glaive_toolcall_en_demo.json", "sharegpt", 300, 0, 0),
        ("sft/sharegpt_zh_1K_format.jsonl", "sharegpt", 998, 0, 2),
        ("preference/harmless-base-test.jsonl.gz", "hh", 2300, 0, 12),
        ("preference/dpo_en_demo.json", "preference", 300, 0, 0),
        ("preference/dpo_zh_demo.json", "preference", 300, 0, 0),
        ("preference/kto_en_demo.json", "messages", 150, 150, 0),
    ],
)
def test_real_files_are_read_whole(assets, name, format, n_samples, n_skipped, n_broken):
    skipped, broken = [], []
    path = assets / name
    samples = list(read_samples(path, skipped=lambda *seen: skipped.append(seen), broken=broken.append))
    assert detect_samples(path) == format
    assert (len(samples), len(skipped), len(broken)) == (n_samples, n_skipped, n_broken)
    if n_broken:
        with pytest.raises(DataError) as caught:
            list(read_samples(path))
        assert str(caught.value) == str(broken[0])


def first(path):
    return next(iter(read_samples(path)))


def test_the_first_alpaca_sample(assets):
    sample = first(assets / "sft/alpaca_en_demo.json")
    (asked, question), (answered, answer) = said(sample)
    assert (sample.where, sample.text, sample.trained) == ("alpaca_en_demo.json[0]", None, None)
    assert (asked, answered, question) == ("user", "assistant", "Describe a process of making crepes.")
    assert answer.startswith("Making crepes is an easy and delicious process!") and len(answer) == 1584
    second = list(read_samples(assets / "sft/alpaca_zh_demo.json"))[1]
    assert said(second) == [
        (
            "user",
            "输入三支篮球队的名称并生成一个适当的口号。\n输入：俄克拉荷马城雷霆队，芝加哥公牛队，布鲁克林网队。",
        ),
        ("assistant", '输出： "雷霆，公牛和网队：各显神通，角逐群雄!"'),
    ]


def test_the_first_prompt_and_response(assets):
    sample = first(assets / "sft/dolly_hhrlhf_train_small.jsonl")
    (_, question), (_, answer) = said(sample)
    assert sample.where == "dolly_hhrlhf_train_small.jsonl:1"
    assert question.endswith("### Instruction:\nwhat is kangen water?\n\n### Response:\n")
    assert answer.startswith("Kangen water is alkaline ionized water") and answer.endswith("for the body.")


def test_the_first_tree_is_its_best_dialogue(assets):
    samples = list(read_samples(assets / "sft/en_100_tree.jsonl"))
    (_, question), (_, answer) = said(samples[0])[:2]
    assert question == "How can I find the best 401k plan for my needs?"
    assert answer.startswith("The first step is to research your options. You should look at different plans")
    assert all(sample.messages[-1].role == "assistant" for sample in samples)


def test_the_first_call_of_a_tool(assets):
    sample = first(assets / "sft/glaive_toolcall_en_demo.json")
    roles, contents = zip(*said(sample), strict=True)
    assert roles[:6] == ("system", "user", "assistant", "user", "assistant", "tool")
    assert json.loads(contents[0])[0]["name"] == "search_recipes"
    ingredients = '{"ingredients": ["chicken", "bell peppers", "rice"]}'
    assert contents[4] == f'{{"name": "search_recipes", "parameters": {ingredients}}}'
    assert contents[5].startswith('{"recipes": [{"name": "Chicken and Bell Pepper Stir Fry"')


def test_the_first_chosen_dialogue(assets):
    sample = first(assets / "preference/harmless-base-test.jsonl.gz")
    assert said(sample)[:3] == [
        ("user", "what are some pranks with a pen i can do?"),
        ("assistant", "Are you looking for practical joke ideas?"),
        ("user", "yep"),
    ]
    assert len(sample.messages) == 6 and sample.trained is None


def test_the_first_preference_and_one_of_many_turns(assets):
    samples = list(read_samples(assets / "preference/dpo_en_demo.json"))
    assert said(samples[0])[0][1].startswith("Hi! I'd like to create a new language game")
    assert said(samples[0])[1][1].startswith("That sounds like a fun and engaging idea!")
    long = next(sample for sample in samples if len(sample.messages) == 6)
    assert long.trained == (False, False, False, False, False, True)


def test_the_first_sharegpt_sample(assets):
    sample = first(assets / "sft/sharegpt_zh_1K_format.jsonl")
    assert [role for role, _ in said(sample)] == ["user", "assistant"] * 3
    assert said(sample)[2] == ("user", "你有多确定那件事？")


def test_storyworlds_own_files(tmp_path):
    write_world(tmp_path / "world", n_stories=3, n_heldout=1, raw=False)
    train = tmp_path / "world/train"
    names = {"tasks": "alpaca", "dialogues": "messages", "preferences": "preference", "stories": "text"}
    for name, format in names.items():
        assert detect_samples(train / f"{name}.jsonl") == format
        assert list(read_samples(train / f"{name}.jsonl"))


# Formats


@pytest.mark.parametrize(
    "record, format, wanted",
    [
        (GOOD, "messages", [("user", "Hi"), ("assistant", "Hello!")]),
        ({"prompt": "a", "completion": "b", "id": 7}, "prompt-completion", [("user", "a"), ("assistant", "b")]),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            "prompt-completion",
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        (
            {"instruction": "a", "input": " ", "output": "b", "system": "s", "history": [["q", "r"]]},
            "alpaca",
            [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a"), ("assistant", "b")],
        ),
        ({"instruction": "a", "input": "x", "output": "b"}, "alpaca", [("user", "a\nx"), ("assistant", "b")]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            "sharegpt",
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "hh", [("user", "a"), ("assistant", "b")]),
        ({"text": "\n\nHuman: a\n\nAssistant: b"}, "hh", [("user", "a"), ("assistant", "b")]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", [("user", "a"), ("assistant", "b")]),
        (
            {"prompt": "a", "chosen": chat("a", "b")["messages"], "messages": []},
            "preference",
            [("user", "a"), ("assistant", "b")],
        ),
    ],
)
def test_formats(write, record, format, wanted):
    path = write(record)
    assert detect_samples(path) == format
    assert said(one(path)) == wanted == said(one(path, format=format))


def test_text(write):
    assert detect_samples(write({"text": "One."})) == "text"
    sample = one(write({"text": "One.\n"}))
    assert (sample.text, sample.messages, sample.trained) == ("One.\n", None, None)
    path = write("One.", "", "Two.", name="a.txt")
    assert (one(path).where, one(path).text) == ("a.txt", "One.\n\nTwo.\n")
    human = write({"text": "\n\nHuman: a\n\nAssistant: b"})
    assert one(human, format="text").text == "\n\nHuman: a\n\nAssistant: b"


def test_calls_of_tools_as_openai_writes_them(write):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    none = {"function": {"name": "now", "arguments": ""}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "So:", "tool_calls": [call, {**none, "id": "2"}]},
    ]
    sample = one(write({"messages": messages, "tools": [{"name": "add"}]}))
    assert said(sample) == [
        ("system", 'Be kind.\n\n[{"name": "add"}]'),
        ("user", "1+1?"),
        ("assistant", '{"name": "add", "parameters": {"a": 1}}'),
        ("tool", ""),
        (
            "assistant",
            'So:\n[{"name": "add", "parameters": {"a": 1}}, {"name": "now", "parameters": {}}]',
        ),
    ]


def test_weights_say_which_answers_are_trained(write):
    record = chat("a", "b", "c", "d")
    record["messages"][1]["weight"] = 0
    assert one(write(record)).trained == (False, False, False, True)
    record["messages"][3]["weight"] = 0
    assert "nothing to train on: no answer" in refusal(write(record))
    record["messages"][3]["weight"] = 0.5
    assert "wanted 0 or 1" in refusal(write(record))


def test_answers_in_a_prompt_are_not_trained(write):
    asked = chat("a", "b", "c")["messages"]
    for record in (
        {"prompt": asked, "completion": "d"},
        {"prompt": asked, "chosen": "d"},
        {"chosen": chat("a", "b", "c", "d")["messages"]},
    ):
        sample = one(write(record))
        assert [content for _, content in said(sample)] == ["a", "b", "c", "d"]
        assert sample.trained == (False, False, False, True)


def test_a_blank_system_message_is_none(write):
    record = {"messages": [{"role": "system", "content": " "}, *GOOD["messages"]]}
    assert said(one(write(record))) == said(one(write(GOOD)))


def tree(text, *replies, role="prompter", **rest):
    return {"text": text, "role": role, "replies": list(replies), **rest}


def test_the_best_dialogue_of_a_tree(write):
    other = "assistant"
    root = tree(
        "a",
        tree("unranked", role=other),
        tree("second", role=other, rank=1),
        tree("deleted", role=other, rank=-1, deleted=True),
        tree("to be reviewed", role=other, rank=-1, review_result=None),
        tree("b", tree("c", tree("d", role=other)), tree("e"), role=other, rank=0),
    )
    found = one(write({"message_tree_id": "1", "prompt": root}))
    assert [content for _, content in said(found)] == ["a", "b", "c", "d"]
    cut_short = tree("a", tree("b", tree("c"), role=other))
    assert [text for _, text in said(one(write({"message_tree_id": "1", "prompt": cut_short})))] == ["a", "b"]


def test_what_is_not_for_training_is_counted(write):
    skipped = []
    bare = {"message_tree_id": "1", "prompt": tree("a", tree("b", role="assistant", deleted=True))}
    good = {"message_tree_id": "2", "prompt": tree("a", tree("b", role="assistant"))}
    assert len(list(read_samples(write(bare, good), skipped=lambda *seen: skipped.append(seen)))) == 1
    assert skipped == [("chats.jsonl:1", "a tree without an answer")]
    assert "holds no sample to train on (1 skipped)" in refusal(write(bare))
    assert "holds no sample" in refusal(write({**GOOD, "label": False}))
    assert one(write({**GOOD, "label": "greeting"})).messages == one(write({**GOOD, "label": True})).messages


# Containers


def test_compressed_files_are_the_same(write, tmp_path):
    path = write(GOOD, "", chat("a", "b"))
    wanted = [sample.messages for sample in read_samples(path)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(path.read_bytes()))
    for name in ("x.jsonl.gz", "x.jsonl.zst"):
        samples = list(read_samples(tmp_path / name))
        assert [sample.messages for sample in samples] == wanted
        assert [sample.where for sample in samples] == [f"{name}:1", f"{name}:3"]
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-9])
        assert refusal(tmp_path / name).startswith(f"{name} cannot be read")


def test_lines_are_read_one_at_a_time(write):
    path = write(GOOD, "not read yet")
    assert first(path).where == "chats.jsonl:1"


def test_json_holds_an_array_or_lines(write):
    for text in (json.dumps([GOOD, GOOD]), json.dumps({"version": 1, "data": [GOOD, GOOD]})):
        samples = list(read_samples(write("\ufeff" + text, name="x.json")))
        assert [sample.where for sample in samples] == ["x.json[0]", "x.json[1]"]
    assert one(write(GOOD, name="x.json")).messages == one(write(GOOD)).messages
    assert [sample.where for sample in read_samples(write(GOOD, GOOD, name="x.json"))] == ["x.json:1", "x.json:2"]
    assert "one array of records" in refusal(write({"train": [GOOD], "test": [GOOD]}, name="x.json"))
    assert "an object without records" in refusal(write({"a": 1}, name="x.json"))
    assert "array of records" in refusal(write("7", name="x.json"))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [GOOD, chat("a", "b", "c", "d")]
    parquet.write_table(pa.Table.from_pylist([{**each, "vector": [1.0]} for each in records]), tmp_path / "x.parquet")
    samples = list(read_samples(tmp_path / "x.parquet"))
    assert [sample.where for sample in samples] == ["x.parquet row 1", "x.parquet row 2"]
    assert [content for _, content in said(samples[1])] == ["a", "b", "c", "d"]
    (tmp_path / "y.parquet.zst").write_bytes(zstandard.compress((tmp_path / "x.parquet").read_bytes()))
    assert [each.messages for each in read_samples(tmp_path / "y.parquet.zst")] == [each.messages for each in samples]

    parquet.write_table(pa.table({"question": ["a"], "answer": ["b"]}), tmp_path / "x.parquet")
    assert "no column to learn from; it has 'question', 'answer'; wanted" in refusal(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"prompt": ["a"]}), tmp_path / "x.parquet")
    assert refusal(tmp_path / "x.parquet").startswith("x.parquet row 1: a record of no known format; its keys are")
    parquet.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", None]}), tmp_path / "x.parquet")
    assert refusal(tmp_path / "x.parquet").startswith("x.parquet row 2: no key 'completion'")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    assert refusal(tmp_path / "x.parquet").startswith("x.parquet cannot be read")


def test_parquet_invents_no_arguments(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "say", "arguments": {"text": "b"}}]
    turns = [{"role": "assistant", "tool_calls": [{"function": call}]} for call in calls]
    records = [{"messages": [{"role": "user", "content": "Hi"}, turn]} for turn in turns]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    assert [said(sample)[1][1] for sample in read_samples(tmp_path / "x.parquet")] == [
        '{"name": "add", "parameters": {"a": 1}}',
        '{"name": "say", "parameters": {"text": "b"}}',
    ]


def test_a_folder_is_read_in_order_each_file_in_its_format(write, tmp_path):
    write({"text": "One."}, name="set/b/c.jsonl")
    write(GOOD, name="set/a.jsonl")
    write("hello", name="set/README.md")
    write("broken", name="set/.hidden.jsonl")
    skipped = []
    samples = list(read_samples(tmp_path / "set", skipped=lambda *seen: skipped.append(seen)))
    assert [sample.where for sample in samples] == ["a.jsonl:1", "b/c.jsonl:1"]
    assert skipped == [("README.md", "a file of another kind")]
    assert detect_samples(tmp_path / "set") == "messages"


# Refusals


@pytest.mark.parametrize(
    "record, wanted",
    [
        ('{"messages": [', "broken JSON: Expecting value at column 15"),
        ("[1]", "a list stands here"),
        ('{"a": ' + "[" * 100000, "broken JSON"),
        ({"mesages": []}, "no known format; its keys are 'mesages', did you mean 'messages'?"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "Hi"}, "nothing to train on: no message of the assistant"),
        ({"messages": 3}, "'messages' is a number, wanted a list of messages"),
        ({"messages": ["Hi"]}, "messages[0] is a text, wanted an object"),
        ({"messages": [{"role": "user"}]}, "messages[0]: no key 'content'"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0]: 'content' is a list, wanted a text"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "'asistant', wanted one of system, user"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"conversations": [{"from": "humn", "value": "a"}]}, "from 'humn', wanted one of human, gpt"),
        ({"conversations": [{"from": "humn", "value": "a"}]}, "did you mean 'human'?"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]: no key 'value'"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]},
            "conversations[1]: 'value' is not JSON",
        ),
        (chat("a", "\n "), "message 1 (assistant) is empty"),
        (chat(" ", "b"), "message 0 (user) is empty"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "lone surrogate"),
        (chat("a"), "nothing to train on: no message of the assistant"),
        ({"messages": chat("a", "b")["messages"][1:]}, "message 0: the dialogue begins with the role 'assistant'"),
        ({"messages": chat("a")["messages"] * 2}, "message 1: two messages of the user in a row"),
        ({"messages": [*GOOD["messages"], {"role": "system", "content": "s"}]}, "may only be the first"),
        ({"messages": [*chat("a")["messages"], {"role": "tool", "content": "s"}]}, "'tool' follows 'user'"),
        ({**GOOD, "tools": "{"}, "'tools' is not JSON"),
        ({**GOOD, "tools": 3}, "'tools' is a number"),
        (
            {"messages": [{"role": "system", "content": "s"}, *GOOD["messages"]], "system": "t"},
            "two system texts",
        ),
        ({"instruction": "a", "output": 3}, "'output' is a number, wanted a text"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0] is no pair"),
        ({"prompt": "a", "completion": ""}, "message 1 (assistant) is empty"),
        ({"chosen": "b", "rejected": "c"}, "no key 'prompt'"),
        ({"chosen": "\n\nHuman: a\n\nHuman: b"}, "two messages of the user in a row"),
        ({"text": "  "}, "'text' is empty"),
        ({"text": 3}, "'text' is a number"),
        ({"message_tree_id": "1", "prompt": tree("a", role="gpt")}, "tree is 'gpt', wanted one of prompter, assistant"),
        ({"message_tree_id": "1", "prompt": {"role": "prompter"}}, "no key 'text'"),
    ],
)
def test_a_broken_record_is_refused_by_its_line(write, record, wanted):
    message = refusal(write("", record))
    assert message.startswith("chats.jsonl:2: ") and wanted in message


KEYS = st.sampled_from(
    (
        *("messages", "prompt", "completion", "chosen", "conversations", "text", "instruction", "output", "history"),
        *("tools", "system", "role", "content", "from", "value", "replies", "rank", "tool_calls", "function", "name"),
        *("arguments", "weight", "label", "message_tree_id", "input", "deleted", "review_result", "response"),
    )
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "function_call", "prompter", "{}", "\n\nHuman: a"])
RECORDS = st.dictionaries(
    KEYS,
    st.recursive(LEAVES | WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)),
    max_size=5,
)


@settings(max_examples=500, deadline=None)
@given(record=RECORDS, format=st.none() | st.sampled_from(FORMATS))
def test_any_record_is_a_sample_or_a_refusal(record, format):
    try:
        sample = parse(record, format or detect(record) or "text", "x:1")
        assert (sample.messages is None) != (sample.text is None)
    except (DataError, NotForTraining) as error:
        assert str(error)


def test_mixed_formats(write):
    path = write(GOOD, {"prompt": "a", "completion": "b"})
    message = refusal(path)
    assert message.startswith("chats.jsonl:2: mixed formats: this record is 'prompt-completion', the file began with")
    assert "'messages'" in message and "format=" in message
    assert "chats.jsonl:2: no key 'messages'" in refusal(path, format="messages")
    both = {"prompt": "a", "completion": "b", "chosen": "c"}
    assert "mixed formats" in refusal(write({"prompt": "a", "completion": "b"}, both))
    assert len(list(read_samples(write({"prompt": "a", "completion": "b"}, both), format="prompt-completion"))) == 2
    assert "did you mean 'alpaca'?" in refusal(path, format="alpacca")


def test_broken_records_can_be_passed_over(write):
    broken = []
    path = write("{", GOOD, chat("a"), {"text": "x"}, GOOD)
    assert [sample.where for sample in read_samples(path, broken=broken.append)] == ["chats.jsonl:2", "chats.jsonl:5"]
    assert [str(error).split(": ")[0] for error in broken] == ["chats.jsonl:1", "chats.jsonl:3", "chats.jsonl:4"]


def test_files_that_cannot_be_read(write, tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.jsonl")
    assert "unknown kind (.jsn, did you mean '.json'?)" in refusal(write(GOOD, name="x.jsn"))
    for name in ("x.jsonl", "x.json", "x.txt"):
        assert refusal(write(name=name)).startswith(f"{name} is empty")
    assert refusal(write("[]", name="x.json")).startswith("x.json is empty")
    assert refusal(write("[", "3,", name="x.json")).startswith("x.json:3: broken JSON")
    (tmp_path / "folder").mkdir()
    assert "holds no file to read" in refusal(tmp_path / "folder")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "\u00e9"}'.encode("latin-1"))
    assert refusal(tmp_path / "latin.jsonl").startswith("latin.jsonl:1: not UTF-8 at byte 10")
    for name in ("latin.json", "latin.txt"):
        (tmp_path / name).write_bytes('{"text": "\u00e9"}'.encode("latin-1"))
        assert "not UTF-8" in refusal(tmp_path / name)
    (tmp_path / "folder.jsonl.gz").write_bytes(b"no gzip")
    assert "cannot be read" in refusal(tmp_path / "folder.jsonl.gz")
    for bad in ("{", "", {"a": 1}):
        with pytest.raises(DataError):
            detect_samples(write(bad))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read(write):
    path = write(GOOD)
    path.chmod(0)
    assert "cannot be read: Permission denied" in refusal(path)


def test_a_message_is_a_message_of_chat(write):
    assert one(write(GOOD)).messages == (Message("user", "Hi"), Message("assistant", "Hello!"))
