"""Rejection sampling: the best of K is learnt, with the best of all rounds before, and a stopped loop goes on."""

import json
import shutil

import numpy as np
import pytest

from llama2.align import lessons
from llama2.align.curves import curve_of
from llama2.align.label import safety_weight
from llama2.align.lessons import line
from llama2.align.rejection import AT_ONCE, _whole_groups, best_of, contrasts, reject
from llama2.align.rejection_config import RejectConfig
from llama2.align.reward import train_reward
from llama2.align.reward_config import RewardConfig
from llama2.align.scoring import load_reward
from llama2.errors import ConfigError, Llama2Error, TrainingError
from llama2.llm import load
from llama2.parallel.mesh import World
from tests.align.chatty import chatty
from tests.align.conftest import assert_same_files, assert_same_weights, by_one_and_by_two, finish, launch
from tests.align.rewards import letters

TINY = dict(
    reward="tests.align.rewards:letters", n_prompts=12, n_samples=4, temperatures=(1.0,), max_new_tokens=10,
    batch_size=4, max_steps=3, learning_rate=1e-2, device="cpu", timeout_s=60.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The folder of a tiny chat model that comes to the end of most answers."""
    return chatty(tmp_path_factory.mktemp("rejection") / "model")


@pytest.fixture
def settings(chat, prompts, tmp_path):
    """Return a function that makes the settings of a tiny loop in a new folder."""

    def make(name="loop", **changes):
        return RejectConfig(**{**TINY, "model": str(chat), "prompts": (prompts,), "out": tmp_path / name, **changes})

    return make


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_of_each_prompt_is_learnt(settings):
    config = settings()
    model = reject(config)
    samples, best = lines(config.out / "round-1/samples.jsonl"), lines(config.out / "round-1/best.jsonl")
    assert len(samples) == 48 and any(each["is_cut"] for each in samples)
    assert [each["reward"] for each in samples] == letters([], [each["completion"] for each in samples])
    groups = [samples[at : at + 4] for at in range(0, 48, 4)]
    assert all(len({json.dumps(each["prompt"]) for each in group}) == 1 for group in groups)
    assert best == [each for group in groups for each in best_of(group)] and len(best) > 6
    pairs = lines(config.out / "round-1/contrasts.jsonl")
    assert pairs == [pair for group in groups for pair in contrasts(group, 0.0)] and len(pairs) > 3
    curve = json.loads((config.out / "round-1/curve.json").read_text())
    assert curve["max"][-1] == pytest.approx(np.mean([max(each["reward"] for each in group) for group in groups]))
    assert curve["n_left_out"] == 12 - len(best)
    assert curve["max"][0] == pytest.approx(curve["mean"]) and (config.out / "round-1/curve.png").stat().st_size > 1000
    assert load(model).complete([{"role": "user", "content": "Hi"}], max_new_tokens=2, temperature=0).tokens


def an_answer(text, reward, *, is_cut=False):
    return {"prompt": [], "completion": text, "reward": reward, "is_cut": is_cut}


def test_an_answer_that_was_cut_is_not_learnt_as_if_it_had_ended():
    short, long, empty = an_answer("a", 1.0), an_answer("aaaa", 4.0, is_cut=True), an_answer("", 9.0)
    assert best_of([short, long, empty]) == [short]
    assert best_of([long, empty]) == []


def test_with_a_tolerance_every_different_good_answer_is_learnt():
    group = [an_answer(*each) for each in [("a", 0.5), ("b", 1.0), ("c", 0.9), ("b", 1.0), ("d", 0.95)]]
    assert [each["completion"] for each in best_of(group)] == ["b"]
    assert [each["completion"] for each in best_of(group, 0.0)] == ["b"]
    assert [each["completion"] for each in best_of(group, 0.06)] == ["b", "d"]
    assert best_of([], 1.0) == []


def test_the_best_are_paired_with_the_worst():
    def answer(text, reward, is_cut=False):
        return {"prompt": [], "completion": text, "reward": reward, "is_cut": is_cut}

    def pairs(group, least_gap):
        return [(each["chosen"], each["rejected"]) for each in contrasts(group, least_gap)]

    rewards = {"a": 0.5, "b": 0.9, "c": 0.1, "d": 0.4, "e": 0.8, "f": 0.3, "g": 0.6, "h": 0.7}
    group = [answer(text, reward) for text, reward in rewards.items()]
    assert pairs(group, 0.0) == [("b", "c"), ("e", "f"), ("h", "d"), ("g", "a")]  # 8 / 2 of them
    assert pairs([answer("b", 0.9), answer("b", 0.9), answer("c", 0.1), answer("c", 0.1)], 0.0) == [("b", "c")]
    assert pairs(group, 0.6) == [("b", "c")]
    assert pairs([answer("a", 0.5), answer("b", 0.9), answer("c", 1.0, True), answer("", 0.0)], 0.0) == [("b", "a")]
    assert pairs([answer("a", 0.5), answer("b", 0.5)], 0.0) == [] and pairs(group[:1], 0.0) == []


def test_prompts_whose_answers_are_all_cut_are_left_out_and_told(settings, capsys):
    config = settings(n_samples=1, max_new_tokens=4)
    reject(config)
    n = json.loads((config.out / "round-1/curve.json").read_text())["n_left_out"]
    assert 0 < n == 12 - len(lines(config.out / "round-1/best.jsonl"))
    assert f"{n} of 12 prompts left out" in capsys.readouterr().err
    with pytest.raises(TrainingError, match=r"no answer of round 1 came to its end within max_new_tokens=1\b"):
        reject(settings("none", n_samples=1, max_new_tokens=1))


def test_a_text_may_hold_any_line_end(tmp_path):
    path = tmp_path / "samples.jsonl"
    found = [an_answer(f"{i}\u2028and\u0085on", 1.0) for i in range(AT_ONCE)]
    whole = "".join(line(each) for each in found)
    path.write_text(whole, encoding="utf-8")
    assert _whole_groups(path, 1) == found
    path.write_bytes((whole + line(found[0])).encode()[:-4])  # killed within a letter
    assert _whole_groups(path, 1) == found


def test_each_round_answers_other_prompts_with_the_newest_model_and_learns_from_all_rounds(settings):
    reject(both := settings("both", n_rounds=2))
    one, two = (lines(both.out / f"round-{number}/samples.jsonl") for number in (1, 2))
    assert [each["prompt"] for each in one] != [each["prompt"] for each in two]
    data = (both.out / "round-2/run/run.toml").read_text()
    assert "round-1/best.jsonl" in data and "round-2/best.jsonl" in data
    assert len(json.loads((both.out / "rounds.json").read_text())) == 2
    reject(alone := settings("alone", n_rounds=2, keep_earlier=False))
    assert "round-1/best.jsonl" not in (alone.out / "round-2/run/run.toml").read_text()


def test_a_loop_that_was_stopped_goes_on_and_comes_to_the_same(settings):
    reject(config := settings(n_rounds=2))
    names = ("round-1/samples.jsonl", "round-2/samples.jsonl", "round-2/best.jsonl")
    whole = {name: (config.out / name).read_text() for name in names}
    shutil.rmtree(config.out / "round-2")
    (config.out / "round-1/curve.png").unlink()
    text = (config.out / "round-1/samples.jsonl").read_text()
    (config.out / "round-1/samples.jsonl").write_text(text[: len(text) // 2])  # killed while it wrote
    reject(config.model_copy(update={"resume": True}))
    assert {name: (config.out / name).read_text() for name in names} == whole
    with pytest.raises(Llama2Error, match="holds a run already; add --resume"):
        reject(config)
    with pytest.raises(Llama2Error, match="was begun with n_samples=4, not 5"):
        reject(config.model_copy(update={"resume": True, "n_samples": 5}))
    with pytest.raises(Llama2Error, match="was begun with prompts="):
        reject(config.model_copy(update={"resume": True, "prompts": (config.out / "round-1/best.jsonl",)}))
    with pytest.raises(Llama2Error, match="was begun with n_tuning=32, not 8"):
        reject(config.model_copy(update={"resume": True, "n_tuning": 8}))


def test_the_temperature_is_chosen_anew_in_each_round(settings):
    reject(config := settings(temperatures=(0.3, 1.5), n_tuning=6, n_rounds=2))
    for number in (1, 2):
        found = json.loads((config.out / f"round-{number}/temperature.json").read_text())
        chosen = json.loads((config.out / f"round-{number}/curve.json").read_text())["temperature"]
        assert set(found) == {"0.3", "1.5"} and found[str(chosen)] == max(found.values())


def test_the_reward_model_learns_between_rounds(settings, chat, pairs, tmp_path):
    base = dict(model=str(chat), data=(pairs,), out=tmp_path / "reward", max_steps=2, batch_size=8, eval_share=0.0)
    first = train_reward(RewardConfig(**base, device="cpu", safety_weight=1.0)).model
    config = settings(
        reward=str(first), pairs=(pairs,), pairs_judge="tests.align.rewards:letters", n_rounds=2, n_prompts=16,
        chat_format="llama2", pairs_learning_rate=2e-5,
    )  # fmt: skip
    reject(config)
    made = lines(config.out / "round-2/pairs.jsonl")
    assert made and all(letters([], [each["chosen"]]) > letters([], [each["rejected"]]) for each in made)
    assert len({each["rating"] for each in made}) > 1
    data = (config.out / "round-2/reward/run.toml").read_text()
    assert "round-2/pairs.jsonl" in data and "pairs.jsonl" in data and str(first) in data
    assert all(
        f"{each}\n" in data for each in ("learning_rate = 2e-05", 'chat_format = "llama2"', "safety_weight = 1.0")
    )
    assert load_reward(config.out / "round-2/reward/model").tells_safety
    assert safety_weight(str(first), (config.out / "round-2/pairs.jsonl",)) == 0.0  # nobody says what is safe there


@pytest.mark.slow
def test_two_processes_write_and_learn_what_one_does(settings, chat, pairs, tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(90)))
    base = dict(model=str(chat), data=(pairs,), out=tmp_path / "reward", max_steps=2, batch_size=8, eval_share=0.0)
    reward = str(train_reward(RewardConfig(**base, device="cpu", learning_rate=1e-2)).model)
    changes = dict(
        prompts=(asked,), n_prompts=AT_ONCE + 7, reward=reward, pairs=(pairs,),
        pairs_judge="tests.align.rewards:letters", n_samples=3, n_rounds=2, temperatures=(0.7, 1.3), n_tuning=5,
        dtype="float64",
    )  # fmt: skip
    one, two = settings("one", **changes), settings("two", **changes)
    by_one_and_by_two("reject", one, two)
    names = ("temperature.json", "samples.jsonl", "best.jsonl", "contrasts.jsonl", "curve.json")
    rounds = [f"round-{number}/{name}" for number in (1, 2) for name in names]
    assert_same_files(one.out, two.out, ["settings.json", "rounds.json", "round-2/pairs.jsonl", *rounds])
    for name in ("round-1/run/model", "model"):
        assert_same_weights(one.out / name, two.out / name)
    # stopped while it wrote: whole batches of prompts stay as they are, the others are answered again
    (two.out / "round-1/curve.png").unlink()
    samples = two.out / "round-1/samples.jsonl"
    whole = samples.read_text()
    mark = whole.splitlines(keepends=True)[0]
    samples.write_text((line(an_answer("kept", 9.0)) + whole[len(mark) :])[:-40])
    finish(launch("reject", two, "--resume", n=2))
    assert samples.read_text() == line(an_answer("kept", 9.0)) + whole[len(mark) :]
    assert lines(two.out / "round-1/best.jsonl")[0]["completion"] == "kept"
    assert "holds a run already; add --resume" in finish(launch("reject", two, n=2), expected=1)


def test_what_cannot_be_split_is_refused_before_long_work(settings, monkeypatch):
    with pytest.raises(ConfigError, match="tensor_parallel=2 is not for a command that samples with whole models"):
        reject(settings(tensor_parallel=2, method="full"))
    monkeypatch.setattr(lessons, "start", lambda **changes: World(size=3))
    with pytest.raises(ConfigError, match="batch_size=4: does not split over 3 data ranks"):
        reject(config := settings())
    assert not config.out.exists()


def test_the_expected_best_of_k():
    rewards = np.array([[1.0, 4.0, 2.0, 8.0]])
    found = curve_of(rewards)
    assert found["k"] == [1, 2, 3, 4] and found["mean"] == 3.75
    pairs = [max(a, b) for i, a in enumerate(rewards[0]) for b in rewards[0][i + 1 :]]
    assert found["max"] == pytest.approx([3.75, np.mean(pairs), np.mean([8, 8, 8, 4]), 8])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompts=()), "name files of prompts"),
        (dict(reward=""), "a reward model's folder"),
        (dict(temperatures=(0.0,)), "K equal answers teach nothing"),
        (dict(temperatures=()), "temperatures is empty"),
        (dict(n_samples=0), "n_samples=0"),
        (dict(pairs_judge="tests.align.rewards:letters"), "is no reward model's folder"),
        (dict(pairs=("x.jsonl",)), "give pairs_judge"),
        (dict(pairs_learning_rate=1e-4), "pairs_learning_rate=0.0001: needs pairs_judge"),
        (dict(pairs_learning_rate=0.0), "wanted more than 0"),
    ],
)
def test_bad_settings_are_refused(settings, changes, message):
    with pytest.raises(Llama2Error, match=message):
        reject(settings(**changes))
