"""A file to a table, in the process and through the command."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

import llama2
from llama2.cli.main import make_app
from llama2.data.dialogues.formats import parse
from llama2.data.dialogues.render import render_sample
from llama2.errors import Llama2Error, RequestError
from llama2.llm import LLM
from llama2.model.transformer import build
from llama2.tasks import Item, classify, evaluate_tasks, sentiment, summarise, translate
from llama2.tasks.evaluate import Answered, answer_items, score_answers
from tests.pocket import POCKET, pocket_tokenizer

WORLD = [
    {"task": "sentiment", "language": "en", "instruction": "Well or badly?", "input": "a", "output": "positive"},
    {"task": "sentiment", "language": "en", "instruction": "Well or badly?", "input": "b", "output": "negative"},
    {"task": "sentiment", "language": "es", "instruction": "?", "input": "a", "output": "positivo"},
    {"task": "title", "language": "en", "instruction": "Title?", "input": "a", "output": "A day"},
    {"task": "summarise", "language": "zh", "instruction": "S?", "input": "a", "output": "\u4e00\u53e5\u8bdd"},
    {"task": "answer", "language": "en", "instruction": "Who?", "input": "a", "output": "Mia"},
    {"task": "translate", "language": "en", "instruction": "Translate into Spanish.", "input": "a", "output": "uno"},
    {"task": "translate", "language": "en", "instruction": "Translate into Spanish.", "input": "b", "output": "dos"},
]
METRICS = [
    *[("sentiment", "en", "accuracy", 2), ("sentiment", "en", "macro F1", 2)],
    *[("sentiment", "es", "accuracy", 1), ("sentiment", "es", "macro F1", 1)],
    *[("title", "en", "exact", 1), *[("title", "en", f"ROUGE-{n}", 1) for n in "12L"]],
    *[("summarise", "zh", f"ROUGE-{n}", 1) for n in "12L"],
    *[("summarise", "zh", "chrF", 1), ("summarise", "zh", "BLEU", 1), ("answer", "en", "exact", 1)],
    *[("translate", "en-es", "chrF", 2), ("translate", "en-es", "BLEU", 2)],
]


def items(records=WORLD):
    pair = {"source_language": None, "target_language": None}
    return [
        Item(str(i), **record, **(pair | ({"target_language": "es"} if record["task"] == "translate" else {})))
        for i, record in enumerate(records)
    ]


def test_every_item_is_answered_as_alone(llm):
    answered = list(answer_items(llm, items(), max_new_tokens=8))
    assert [each.item.where for each in answered] == [str(i) for i in range(len(WORLD))]
    alone = sentiment(llm, "b", instruction="Well or badly?")
    assert answered[1].text == alone.label
    assert answered[1].probabilities == pytest.approx(alone.probabilities, abs=1e-6)
    assert answered[4].text == summarise(llm, "a", instruction="S?", max_new_tokens=8).text
    scores = score_answers(answered)
    assert [(each.task, each.language, each.metric, each.n) for each in scores] == METRICS
    assert all(0 <= each.low <= each.high <= 100 for each in scores)
    assert evaluate_tasks(llm, items(), max_new_tokens=8) == scores


def test_the_table_by_hand():
    answered = [Answered(item, said) for item, said in zip(items(), ["positive"] * 2 + ["positivo"] * 6, strict=True)]
    found = {(each.task, each.language, each.metric): each for each in score_answers(answered)}
    assert found["sentiment", "en", "accuracy"].value == 50
    assert found["sentiment", "en", "macro F1"].value == pytest.approx(100 / 3)
    assert found["sentiment", "en", "accuracy"].low == pytest.approx(9.45, abs=0.01)
    assert found["sentiment", "es", "accuracy"].value == 100
    assert found["title", "en", "exact"].value == found["answer", "en", "exact"].value == 0


def test_labels_are_those_of_the_file_or_given(llm):
    spam = [Item(label, "classify", "Which?", "x", label) for label in ("spam", "ham")]
    answered = list(answer_items(llm, spam))
    assert list(answered[0].probabilities or {}) == ["spam", "ham"]
    three = next(answer_items(llm, spam, labels=("ham", "spam", "eggs"), calibrate=True, by="mean"))
    wanted = classify(llm, "x", ("ham", "spam", "eggs"), instruction="Which?", calibrate=True, by="mean")
    assert three.probabilities == pytest.approx(wanted.probabilities, abs=1e-6)


def test_examples_of_the_same_group_are_shown(llm):
    shots = [Item("e", "summarise", "S?", "one", "1", "zh"), Item("f", "summarise", "S?", "two", "2", "en")]
    found = next(answer_items(llm, items()[4:5], examples=shots, max_new_tokens=8))
    assert found.text == summarise(llm, "a", instruction="S?", examples=[("one", "1")], max_new_tokens=8).text


def test_what_cannot_be_done_is_refused_before_any_work(llm, monkeypatch):
    with pytest.raises(RequestError, match="x:1: the prompt has .* context holds 640"):
        answer_items(llm, [Item("x:1", "title", "T", "x" * 700, "y")])
    with pytest.raises(RequestError, match=r"x:1: .*\[INST\]"):
        answer_items(llm, [Item("x:1", "title", "T", "[INST]", "y")])
    with pytest.raises(RequestError, match="label 'b' of the file is none of a, c"):
        answer_items(llm, [Item("x:1", "classify", "T", "x", "b")], labels=("a", "c"))
    with pytest.raises(RequestError, match="at least two"):
        answer_items(llm, [Item("x:1", "classify", "T", "x", "b")])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(RequestError, match="pip install"):
        answer_items(llm, items())


def test_a_model_trained_on_the_records_answers_without_settings():
    """A few steps on six records, in the form that fine-tuning reads, and the same call knows them."""
    texts = {"a good day": "positive", "a bad day": "negative", "it was good": "positive", "it was bad": "negative"}
    said = {"translate": ("Translate into Spanish.", {"the sun": "el sol", "the sea": "la mar"})}
    said |= {"sentiment": ("Does the story end well or badly?", texts)}
    records = [
        {"task": task, "language": "en", "instruction": instruction, "input": given, "output": wanted}
        for task, (instruction, pairs) in said.items()
        for given, wanted in pairs.items()
    ]
    llm = LLM(build(POCKET, seed=0), pocket_tokenizer())
    learn(llm, records, n_steps=120)
    assert sentiment(llm, "a good day").probability > 0.9
    assert [sentiment(llm, text).label for text in texts] == list(texts.values())
    assert translate(llm, "the sun", target_language="es", max_new_tokens=20).text == "el sol"
    found = {(each.task, each.metric): each.value for each in evaluate_tasks(llm, items(records), max_new_tokens=20)}
    assert found["sentiment", "accuracy"] == found["translate", "chrF"] == pytest.approx(100)


def learn(llm, records, *, n_steps):
    rows = [render_sample(parse(record, "alpaca", "x"), llm.tokenizer, chat_format=None) for record in records]
    width = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([row.tokens + [0] * (width - len(row.tokens)) for row in rows])
    marks = torch.tensor([row.trainable + [False] * (width - len(row.tokens)) for row in rows])
    targets = tokens.masked_fill(~marks, -100)[:, 1:]
    optimizer = torch.optim.AdamW(llm.model.parameters(), lr=3e-3)
    for _ in range(n_steps):
        loss = torch.nn.functional.cross_entropy(llm.model(tokens[:, :-1]).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    llm.model.eval()


@pytest.fixture(scope="module")
def model(llm, tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "model"
    llama2.save(llm.model, path, tokenizer=llm.tokenizer)
    return path


@pytest.fixture
def task(capsys):
    """What `llama2 task ...` prints, without the seconds that a new process takes."""

    def run(*arguments):
        make_app()(["task", *map(str, arguments)])
        return capsys.readouterr().out

    return run


def test_the_command_prints_the_table(llm, model, tmp_path):
    source, out = tmp_path / "tasks.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in WORLD), encoding="utf-8")
    command = [sys.executable, "-m", "llama2", "task", "evaluate", model, source, "--max-new-tokens", "8", "--out", out]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["task", "language", "metric", "value"] and len(lines) == 1 + len(METRICS)
    assert "answering" in done.stderr
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    wanted = list(answer_items(llm, items(), max_new_tokens=8))
    assert [each["answer"] for each in answers] == [each.text for each in wanted]
    with pytest.raises(Llama2Error, match="nothing is overwritten"):
        make_app()(list(map(str, command[3:])))


def test_the_command_prints_json_and_takes_sst2s_form(task, model, tmp_path):
    source = tmp_path / "dev.tsv"
    source.write_text("a film\t1\nno film\t0\n")
    labels = ["--label", "1=positive", "--label", "0=negative"]
    found = json.loads(task("evaluate", model, source, "--task", "sentiment", *labels, "--json"))
    assert [(each["metric"], each["n"]) for each in found] == [("accuracy", 2), ("macro F1", 2)]
    with pytest.raises(Llama2Error, match="dev.tsv:1: the record names no task"):
        task("evaluate", model, source)


def test_one_text_through_the_command(llm, task, model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("A cat sat.")
    said = json.loads(task("sentiment", model, f"@{tmp_path / 'text.txt'}", "--json"))
    assert said["probabilities"] == pytest.approx(sentiment(llm, "A cat sat.").probabilities)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A cat sat.")))
    piped = task("classify", model, "-", "--label", "a", "--label", "b").splitlines()
    chances = [(line.split()[1], float(line.split()[0])) for line in piped]
    assert dict(chances) == pytest.approx(classify(llm, "A cat sat.", ("a", "b")).probabilities, abs=1e-3)
    assert chances[0][1] >= chances[1][1]
    with pytest.raises(Llama2Error, match="labels=.'a',.: give at least two"):
        task("classify", model, "x", "--label", "a")
    with pytest.raises(Llama2Error, match="@none.txt cannot be read"):
        task("summarise", model, "@none.txt")


def test_written_answers_through_the_command(task, model, tmp_path):
    (tmp_path / "shots.jsonl").write_text('{"instruction": "Who?", "input": "p", "output": "Mia"}\n')
    few = ["--max-new-tokens", 4, "--json"]
    for arguments in (
        ("translate", model, "Hi", "--to", "es", "--from", "en"),
        ("answer", model, "p", "--question", "Who?", "--examples", tmp_path / "shots.jsonl"),
        ("summarise", model, "p", "--style", "plain"),
    ):
        assert set(json.loads(task(*arguments, *few))) == {"text", "logprob", "n_tokens", "finish_reason"}
    ranked = json.loads(task("title", model, "p", "--n", 3, "--seed", 1, *few))
    assert [each["logprob"] for each in ranked] == sorted((each["logprob"] for each in ranked), reverse=True)


@pytest.mark.parametrize("command", ["sentiment", "classify", "translate", "summarise", "answer", "title", "evaluate"])
def test_every_command_has_help_with_an_example(command, capsys):
    make_app()(["task", command, "--help"])
    assert f"  llama2 task {command}" in capsys.readouterr().out.split("Examples:")[1]
