"""Safety training as the paper has it: what is distilled, what is kept, what is learnt, and what is told of it."""

import io
import json

import pytest
from rich.console import Console

import llama2
from llama2.align.distillation import distil, preprompt_of, read_templates, with_preprompt
from llama2.align.rollout import Prompts, Sampling, sample
from llama2.align.safety import read_all, safety
from llama2.align.safety_config import PREPROMPT, SafetyConfig
from llama2.align.safety_prompts import group_of, question_of, reward_of, tag_of
from llama2.align.safety_report import lines, summary, tables
from llama2.chat import Message
from llama2.data.dialogues.prompts import read_prompts
from llama2.data.interval import wilson
from llama2.data.storyworld import questions as story_questions
from llama2.data.storyworld.safety import record, safety_requests
from llama2.errors import ConfigError, DataError, TrainingError
from tests.align.chatty import chatty, letters
from tests.align.conftest import assert_same_files, assert_same_weights, by_one_and_by_two, finish, launch
from tests.pocket import pocket_tokenizer

QUIET = Console(quiet=True)
CATEGORIES = ("illicit", "hateful", "advice")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chatty(tmp_path_factory.mktemp("safety") / "model")


def request(i):
    """Two of three are unsafe, one is borderline."""
    return {
        "messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "No."}],
        "category": CATEGORIES[i % 3], "vector": f"v{i % 2}", "is_unsafe": i % 3 != 2 or i % 2 == 0,
    }  # fmt: skip


def write(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


@pytest.fixture
def settings(model, tmp_path):
    """Return a function that makes the settings of a tiny run."""
    prompts = write(tmp_path / "prompts.jsonl", [request(i) for i in range(24)])
    judging = [request(i) for i in range(24, 36)] + [{"prompt": "hello"}, {"prompt": "you there"}]

    def make(**changes):
        usual = dict(
            model=str(model), out=tmp_path / "out", prompts=prompts, safety_reward="tests.align.chatty:letters",
            preprompt="be good", eval_prompts=write(tmp_path / "judging.jsonl", judging), max_new_tokens=12,
            temperature=1.0, max_steps=1, batch_size=2, device="cpu", method="full",
        )  # fmt: skip
        return SafetyConfig(**(usual | changes))

    return make


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_distilled_answer_is_kept_only_where_the_reward_prefers_it(settings):
    config = settings()
    asked, _ = read_all(config, QUIET)
    found = distil(config, asked, QUIET)
    assert len(found) == len(asked) == 20
    for line in found:
        assert line["original_reward"] == line["original"].count("a")
        assert line["distilled_reward"] == line["distilled"].count("a")
    kept = [line for line in found if line["is_kept"]]
    assert all(line["distilled_reward"] > line["original_reward"] for line in kept)
    assert 0 < len(kept) < len(found)
    # a tie is no preference
    assert not any(line["is_kept"] for line in distil(settings(safety_reward="tests.align.chatty:same"), asked, QUIET))
    # and the two answers are to the prompt as it is, and under the preprompt
    llm = llama2.load(config.model, device="cpu")
    for name, seed, change in (
        ("original", 0, lambda it: it),
        ("distilled", 1, lambda it: with_preprompt(it, "be good")),
    ):
        some = [change(each.messages) for each in asked]
        prompts = Prompts(some, llm.tokenizer, context_length=256, max_new_tokens=12)
        again = sample(llm.model, prompts, range(len(some)), Sampling(12, 1.0), seed=seed)
        assert [each.text for each in again] == [line[name] for line in found]


def test_only_unsafe_prompts_are_distilled_and_learnt_without_the_preprompt(settings, tmp_path):
    shown = write(tmp_path / "shown.jsonl", [request(i) for i in range(50, 56)])
    config = settings(demonstrations=shown)
    model = safety(config)
    out = config.out
    assert model == out / "amount-100" / "run" / "model"
    unsafe = {f"q {i}" for i in range(24) if request(i)["is_unsafe"]}
    distilled, data = lines_of(out / "distilled.jsonl"), lines_of(out / "data.jsonl")
    assert {line["prompt"][-1]["content"] for line in distilled} == unsafe
    kept = [(line["prompt"], line["distilled"]) for line in distilled if line["is_kept"]]
    learnt = [(line["prompt"], line["completion"]) for line in data if line["source"] == "distilled"]
    assert sorted(learnt, key=str) == sorted(kept, key=str) and kept
    shown = [line for line in data if line["source"] == "demonstration"]
    assert len(shown) == 6 and {line["completion"] for line in shown} == {"No."}
    assert all(message["role"] != "system" for line in data for message in line["prompt"])
    assert "be good" not in (out / "data.jsonl").read_text()
    assert (out / "amount-100" / "data.jsonl").read_text() == (out / "data.jsonl").read_text()
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"before", "after"} and set(report["after"]["by_category"]) == {*CATEGORIES}
    assert not (out / "curves.png").exists()


def test_amounts_are_nested_and_curves_are_drawn_and_resume_makes_nothing_anew(settings, tmp_path):
    shown = write(tmp_path / "shown.jsonl", [request(i) for i in range(50, 60)])
    replay = write(tmp_path / "replay.jsonl", [{"prompt": "hi", "completion": "ho"}] * 4)
    changes = dict(amounts=(50, 0, 100), demonstrations=shown, replay=replay, replay_share=0.5)
    config = settings(**changes)
    safety(config)
    out = config.out
    whole, half = lines_of(out / "amount-100" / "data.jsonl"), lines_of(out / "amount-50" / "data.jsonl")
    assert len(half) == -(-len(whole) // 2) and half == whole[: len(half)]
    assert not (out / "amount-0").exists()
    curves = json.loads((out / "curves.json").read_text())
    assert curves["n_examples"] == len(whole)
    assert [each["amount"] for each in curves["amounts"]] == [0, 50, 100]
    for each in curves["amounts"]:
        assert {"refused", "false_refusals", "harmful", "safety_reward", "helpfulness"} < set(each)
        assert each["safety_reward"] is not None and each["helpfulness"] is None
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    share = {n: (out / f"amount-{n}" / "run" / "run.toml").read_text() for n in (50, 100)}
    assert "replay_share = 0.5\n" in share[100] and "replay_share = 0.66" in share[50]  # equally many helpful tokens
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if "curves" not in path.name}
    made.pop(out / "report.json")
    safety(settings(**changes, resume=True))
    assert made == {path: path.stat().st_mtime_ns for path in made}
    with pytest.raises(TrainingError, match="preprompt=be good, not be wise"):
        safety(settings(**changes, resume=True, preprompt="be wise"))


@pytest.mark.slow
def test_two_processes_write_and_learn_what_one_does(settings, tmp_path):
    asked = write(tmp_path / "many.jsonl", [request(i) for i in range(100)])
    shown = write(tmp_path / "shown.jsonl", [request(i) for i in range(100, 104)])
    changes = dict(
        prompts=asked, demonstrations=shown, amounts=(50, 100), helpfulness_reward="tests.align.chatty:letters",
        dtype="float64",
    )  # fmt: skip
    one, two = (settings(out=tmp_path / name, **changes) for name in ("one", "two"))
    by_one_and_by_two("safety", one, two)
    names = [f"{folder}/answers.jsonl" for folder in ("before", "amount-50", "amount-100")]
    files = ("settings.json", "distilled.jsonl", "data.jsonl", "amount-50/data.jsonl", "report.json", "curves.json")
    assert_same_files(one.out, two.out, [*names, *files])
    for amount in (50, 100):
        assert_same_weights(*(each.out / f"amount-{amount}" / "run" / "model" for each in (one, two)))
    kept = [line["is_kept"] for line in lines_of(two.out / "distilled.jsonl")]
    assert len(kept) > 64 and 0 < sum(kept) < len(kept)
    made = {path: path.stat().st_mtime_ns for path in two.out.rglob("*.jsonl")}
    (two.out / "amount-100" / "answers.jsonl").unlink()
    finish(launch("safety", two, "--resume", n=2))
    made.pop(two.out / "amount-100" / "answers.jsonl")
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert_same_files(one.out, two.out, names)


def test_shares_are_told_with_intervals_by_category_and_vector():
    def line(group, category, vector, is_refusal):
        return {"group": group, "category": category, "vector": vector, "is_refusal": is_refusal, "is_harmful": False,
                "safety_reward": 2.0 if is_refusal else 1.0, "helpfulness": None}  # fmt: skip

    found = summary(
        [line("unsafe", "advice", "plain", True)] * 3 + [line("unsafe", "advice", "logic", False)]
        + [line("borderline", "advice", "plain", True)] + [line("borderline", "illicit", "plain", False)] * 3
    )  # fmt: skip
    assert found["refused"]["unsafe"] == {"share": 0.75, "low": wilson(3, 4)[0], "high": wilson(3, 4)[1], "n": 4}
    assert found["refused"]["borderline"]["share"] == 0.25 and found["refused"]["ordinary"] is None
    assert found["by_category"]["advice"]["borderline"]["share"] == 1
    assert found["by_category"]["illicit"] == {
        "unsafe": None,
        "borderline": found["by_category"]["illicit"]["borderline"],
    }
    assert found["by_vector"]["logic"]["unsafe"]["share"] == 0 and found["by_vector"]["plain"]["unsafe"]["n"] == 3
    assert found["safety_reward"] == pytest.approx(12 / 8) and found["helpfulness"] is None


def test_what_nothing_tells_is_no_harm_of_zero(settings):
    asked, _ = read_all(settings(), QUIET)
    found = lines(settings(), asked[:3], ["a", "b", "c"], pocket_tokenizer())
    assert [line["is_harmful"] for line in found] == [None] * 3
    over_all = summary(found)
    assert over_all["harmful"] is None and over_all["refused"]["unsafe"]["n"] == 3
    out = io.StringIO()
    Console(file=out, width=120).print(tables(over_all, over_all)[0])
    assert any(row.split()[-3:] == ["harm", "n/a", "n/a"] for row in out.getvalue().splitlines())


def test_story_world_prompts_tell_their_kind_and_are_judged_exactly(tmp_path):
    unsafe = write(tmp_path / "safety.jsonl", [record(each) for each in safety_requests(0, 40)])
    asks = write(tmp_path / "questions.jsonl", [each.line for each in story_questions.questions(0, 60)])
    asked = list(read_prompts(unsafe))
    assert {group_of(each) for each in asked} == {"unsafe", "borderline"}
    for each in asked:
        found = question_of(each)
        assert found is not None and found.grade(found.right_answer) == 1 and found.grade(each.record["wrong"]) == 0
        assert (found.kind == "unsafe") == (group_of(each) == "unsafe")
    others = list(read_prompts(asks))
    assert {group_of(each) for each in others} == {"unsafe", "borderline", "ordinary"}
    assert {tag_of(each, "category") for each in [*asked, *others]} == {*CATEGORIES, ""}
    both = [*asked, *others]
    reward = reward_of("safety_reward", "grade", both, pocket_tokenizer())
    assert reward([each.messages for each in both], [question_of(each).right_answer for each in both]) == [1] * len(
        both
    )
    with pytest.raises(ConfigError, match="helpfulness_reward=grade judges prompts of the story world"):
        reward_of(
            "helpfulness_reward", "grade", list(read_prompts(write(tmp_path / "x.jsonl", [{"prompt": "x"}]))), None
        )


def test_a_category_or_a_language_may_have_its_own_preprompt(settings, tmp_path):
    path = write(
        tmp_path / "templates.jsonl",
        [{"category": "advice", "preprompt": "ask a doctor"}, {"language": "es", "preprompt": "cuidado"},
         {"category": "advice", "language": "es", "preprompt": "pregunta"}],
    )  # fmt: skip
    templates, config = read_templates(path), settings()
    lines = [("illicit", "en"), ("advice", "en"), ("illicit", "es"), ("advice", "es")]
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "x", "category": a, "language": b} for a, b in lines])
    found = [preprompt_of(config, templates, each) for each in read_prompts(prompts)]
    assert found == ["be good", "ask a doctor", "cuidado", "pregunta"]
    system, user = Message("system", "be brief"), Message("user", "x")
    assert with_preprompt((user,), "care") == (Message("system", "care"), user)
    assert with_preprompt((system, user), "care") == (Message("system", "care\n\nbe brief"), user)
    for records, match in (
        ([{"preprompt": " "}], "templates.jsonl:1: 'preprompt' is ' '"),
        ([{"preprompt": "a"}] * 2, "templates.jsonl:2: a second preprompt"),
    ):
        with pytest.raises(DataError, match=match):
            read_templates(write(path, records))


def test_settings_and_prompts_that_cannot_work_are_refused(settings, tmp_path):
    def run(error, match, **changes):
        with pytest.raises(error, match=match):
            safety(settings(out=tmp_path / match[:8], **changes))

    assert SafetyConfig().preprompt == PREPROMPT
    run(ConfigError, "preprompt='  '", preprompt="  ")
    run(ConfigError, "amounts=101", amounts=(101,))
    run(ConfigError, "amounts=-5", amounts=(-5,))
    run(ConfigError, "names one twice", amounts=(10, 10))
    run(ConfigError, "tensor_parallel=2 is not for", tensor_parallel=2)
    run(ConfigError, "nothing would be learnt", amounts=(0,))
    run(ConfigError, "name files of prompts", prompts=())
    run(ConfigError, "safety_reward=''", safety_reward="")
    run(ConfigError, "safety_reward=grade judges", safety_reward="grade", eval_prompts=(), eval_share=0)
    safe = write(tmp_path / "safe.jsonl", [{"prompt": "x", "is_unsafe": False}])
    run(DataError, "holds no unsafe prompt", prompts=safe)
    run(DataError, "with their preprompts: prompt 0 has", preprompt="x" * 300, eval_prompts=(), eval_share=0)
    none = dict(safety_reward="tests.align.chatty:same", eval_prompts=(), eval_share=0)
    run(DataError, "prefers none to the original", **none)
    ends_open = write(tmp_path / "open.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    run(DataError, "no message of the assistant", demonstrations=ends_open)
    assert letters([[Message("user", "x")]], ["aba"]) == [2.0]
