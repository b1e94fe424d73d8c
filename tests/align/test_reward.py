"""Reward models: the right loss, read at the right place, written as others read it, the same however they are run."""

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from llama2.align.losses import MARGINS
from llama2.align.reward import reward_loss, train_reward
from llama2.align.reward_config import RewardConfig
from llama2.align.scoring import Gate, RewardModel, load_reward, resolve_reward
from llama2.chat import Message
from llama2.checkpoint import store
from llama2.data.preferences.sets import read_pair_set
from llama2.errors import CheckpointError, ConfigError, DataError, Llama2Error
from llama2.llm import load
from llama2.model.heads import add_heads, at_ends, read_head
from llama2.model.lora import active_adapters
from llama2.train.loop import Trainer
from tests.align.conftest import SHAPE, assert_near, assert_same, finish, launch, steps
from tests.pocket import pocket_tokenizer

TINY = dict(batch_size=8, learning_rate=1e-2, max_steps=10, device="cpu", eval_share=0.2, timeout_s=60.0)


@pytest.fixture
def settings(chat, pairs, tmp_path):
    """Return a function that makes the settings of a tiny run in a new folder."""

    def make(name="run", **changes):
        return RewardConfig(**{**TINY, "model": str(chat), "data": (pairs,), "out": tmp_path / name, **changes})

    return make


@pytest.fixture(scope="module")
def trained(chat, pairs, tmp_path_factory):
    """A reward model with a safety head, and where its run is."""
    out = tmp_path_factory.mktemp("trained") / "run"
    config = RewardConfig(
        **{**TINY, "max_steps": 30}, model=str(chat), data=(pairs,), out=out, safety_weight=1.0, margin="large"
    )
    return train_reward(config).model


ASKED = [(Message("user", f"say {i}"),) for i in range(6)]
ANSWERS = ["aaa", "b", "", "a" * 20, "bbbb", "a b c"]


# The loss


@pytest.mark.parametrize("margin", ["none", "small", "large"])
def test_the_loss_of_a_batch_by_hand(chat, pairs, settings, margin):
    model = add_heads(store.load(chat, dtype="float32").double(), "score", "safety")
    torch.manual_seed(0)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight)
    batch = read_pair_set(pairs, pocket_tokenizer(), length=96).batch(range(8))
    loss, count, metrics = reward_loss(settings(margin=margin, safety_weight=0.5))(model, batch)
    total = right = 0.0
    for i in range(8):
        scores, safe = [], []
        for row in (int(batch.sides[i]), int(batch.sides[8 + i])):
            end = int(batch.ends[row])
            hidden = model.hidden(batch.rows.tokens[row : row + 1, : end + 1])[0, -1]  # alone, without padding
            scores.append(hidden @ model.heads["score"].weight[0])
            safe.append(hidden @ model.heads["safety"].weight[0])
        gap = scores[0] - scores[1]
        total += -torch.nn.functional.logsigmoid(gap - MARGINS[margin][i % 4])
        is_safe = (1.0, float(i % 2 == 0))
        total += 0.5 * sum(-torch.log(torch.sigmoid(s if y else -s)) for s, y in zip(safe, is_safe, strict=True))
        right += float(gap > 0)
    assert count == 8 and metrics["accuracy"] == right
    torch.testing.assert_close(loss, total, rtol=1e-9, atol=1e-9)


def test_training_puts_pairs_in_order(settings):
    outcome = train_reward(settings(max_steps=40))
    assert outcome.evaluation.values["accuracy"] == 1.0
    out = outcome.model.parent
    lines = steps(out)
    assert lines[0]["loss"] > lines[-1]["loss"] + 0.3 and lines[-1]["accuracy"] == 1.0
    found = json.loads((out / "accuracy.json").read_text())
    assert found[-1]["rating"] == "all" and found[-1]["share"] == 1.0 and found[-1]["n"] == 8
    assert (out / "calibration.png").stat().st_size > 1000


def test_the_warm_up_is_a_share_of_the_steps_and_at_least_five(settings):
    rates = [line["learning_rate"] for line in steps(train_reward(settings()).model.parent)]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2]) and rates[-1] == pytest.approx(1e-3)


# Reading it


def test_a_score_depends_neither_on_company_nor_on_padding(trained):
    reward = load_reward(trained)
    together = reward(ASKED, ANSWERS)
    alone = [reward([asked], [answer])[0] for asked, answer in zip(ASKED, ANSWERS, strict=True)]
    two = RewardModel(reward.model, reward.tokenizer, batch_size=2)(ASKED, ANSWERS)
    assert together == pytest.approx(alone, abs=1e-5) and together == pytest.approx(two, abs=1e-5)
    assert len(set(together)) == 6


def test_transformers_reads_the_same_scores_whatever_the_padding_side(trained):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForSequenceClassification.from_pretrained(trained).eval()
    assert model.config.num_labels == 1
    reward = load_reward(trained)
    from llama2.data.preferences.render import render_answer

    rows = [render_answer(asked, answer, reward.tokenizer).tokens for asked, answer in zip(ASKED, ANSWERS, strict=True)]
    longest, pad = max(map(len, rows)), model.config.pad_token_id
    for side in ("left", "right"):
        blanks = [[pad] * (longest - len(row)) for row in rows]
        ids = [b + r if side == "left" else r + b for b, r in zip(blanks, rows, strict=True)]
        mask = [[0] * len(b) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(b)
                for b, r in zip(blanks, rows, strict=True)]  # fmt: skip
        with torch.no_grad():
            found = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0]
        assert found.tolist() == pytest.approx(reward(ASKED, ANSWERS), abs=1e-4)


def test_the_safety_head_lies_in_a_file_of_its_own(trained):
    assert load_file(trained / "heads.safetensors")["safety"].shape == (1, SHAPE.dim)
    reward = load_reward(trained)
    assert reward.tells_safety
    probabilities = reward.probabilities(ASKED, ANSWERS)
    scored = reward.read("safety", ASKED, ANSWERS)
    assert probabilities.tolist() == pytest.approx(torch.sigmoid(scored).tolist())


def test_the_gate_is_the_papers(trained):
    reward = load_reward(trained)
    unsafe = set(ASKED[:2])
    gate = Gate(reward, reward, is_unsafe=lambda asked: asked in unsafe, threshold=0.5)
    found = torch.tensor(gate(ASKED, ANSWERS)).sigmoid().tolist()
    safe, helpful = reward.probabilities(ASKED, ANSWERS).tolist(), torch.tensor(reward(ASKED, ANSWERS)).sigmoid()
    wanted = [s if asked in unsafe or s < 0.5 else h for s, h, asked in zip(safe, helpful.tolist(), ASKED, strict=True)]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_reward_model_is_no_language_model_and_the_other_way_round(trained, chat):
    with pytest.raises(CheckpointError, match="is a reward model: it scores answers and writes none"):
        load(trained)
    with pytest.raises(CheckpointError, match="is no reward model"):
        load_reward(chat)


def test_an_answer_that_is_too_long_for_the_reward_model_is_told(trained):
    with pytest.raises(
        DataError, match=r"answer 1 has 2\d\d tokens with its prompt.*context holds 96; .*shorter answers"
    ):
        load_reward(trained)(ASKED[:2], ["a", "a" * 200])
    assert len(load_reward(trained)(ASKED[:2], ["a", "\ufffd" * 30])) == 2  # sampled as broken bytes, 30 tokens


def test_another_tokenizer_is_refused(trained, assets):
    from llama2.tokenizer.formats import load_tokenizer

    with pytest.raises(CheckpointError, match="has another tokenizer than the model to align"):
        resolve_reward(str(trained), tokenizer=load_tokenizer(assets / "checkpoints/stories260K/tok512.model"))
    assert isinstance(resolve_reward(str(trained), tokenizer=pocket_tokenizer()), RewardModel)


def test_the_head_is_read_after_the_norm_and_nothing_else_changes(trained):
    model = store.load_scored(trained)
    assert active_adapters(model) == ()
    tokens = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        hidden = at_ends(model.hidden(tokens), torch.tensor([2]))
        wanted = float(hidden[0] @ model.heads["score"].weight[0])
        assert float(read_head(model, "score", hidden)) == pytest.approx(wanted)


# The same however it is run


def test_accumulation_changes_nothing(settings):
    train_reward(whole := settings("whole", dtype="float64"))
    train_reward(parts := settings("parts", dtype="float64", micro_batch_size=1))
    assert_near(whole.out, parts.out, bound=1e-9)


def test_stopped_and_resumed_is_never_stopped(settings, monkeypatch):
    """In one process; the kill below is the real thing."""
    train_reward(whole := settings("whole", safety_weight=1.0))
    split, step = settings("split", safety_weight=1.0), Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, *a, **k: step(self, *a, **k | {"stop": self.n_done == 4}))
        assert train_reward(split).stopped_by
    torch.rand(3)
    assert train_reward(split.model_copy(update={"resume": True})).n_steps == 10
    assert_same(whole.out, split.out)


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(settings):
    train_reward(whole := settings("whole", max_steps=30))
    config = settings("killed", max_steps=30, save_every=1)
    process = launch("reward", config)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not list(config.out.glob("checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(config.out.glob("checkpoints/step-*"))
    train_reward(config.model_copy(update={"resume": True}))
    assert_same(whole.out, config.out)


@pytest.mark.slow
def test_two_processes_do_what_one_does(settings):
    train_reward(one := settings("one", dtype="float64", safety_weight=1.0))
    finish(launch("reward", two := settings("two", dtype="float64", safety_weight=1.0), n=2))
    assert_near(one.out, two.out, bound=1e-9)


def test_a_reward_model_can_be_trained_on(settings, trained):
    before = load_reward(trained)(ASKED, ANSWERS)
    again = train_reward(settings(model=str(trained), learning_rate=0.0, max_steps=1, safety_weight=1.0))
    assert load_reward(again.model)(ASKED, ANSWERS) == pytest.approx(before, abs=1e-6)
    assert load_reward(again.model).tells_safety


def test_a_head_that_is_not_trained_on_stays_as_it_is(settings, trained):
    again = train_reward(settings(model=str(trained), max_steps=3)).model
    before, after = (load_file(folder / "heads.safetensors")["safety"] for folder in (trained, again))
    assert torch.equal(before, after) and load_reward(again).tells_safety
    assert load_reward(again)(ASKED, ANSWERS) != pytest.approx(load_reward(trained)(ASKED, ANSWERS), abs=1e-3)


# The data


def test_the_papers_mixes(settings, pairs):
    from llama2.align.pair_data import mixed

    found = read_pair_set(pairs, pocket_tokenizer(), length=96)
    helpful, safe = mixed(found, "helpfulness", seed=0), mixed(found, "safety", seed=0)
    assert (helpful.flags[:, 0] == 0).sum() == 32 and (helpful.flags[:, 0] == 1).sum() == 8
    assert (safe.flags[:, 0] == 1).sum() == 8 and (safe.flags[:, 0] == 0).sum() == 1
    assert settings(mix="safety").weight_of_safety == 1 and settings(mix="helpfulness").weight_of_safety == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data=()), "name files of preference pairs"),
        (dict(model=""), "which checkpoint"),
        (dict(sequence_length=500), "beyond the context"),
        (dict(sequence_length=10), "has .* tokens with its prompt"),
        (dict(safety_weight=-1.0), "safety_weight=-1.0"),
        (dict(eval_share=1.5), "eval_share=1.5"),
        (dict(warmup_steps=10), "leaves nothing of the 10 steps"),
        (dict(tensor_parallel=2), "does not split reward models"),
    ],
)
def test_bad_settings_are_refused(settings, changes, message):
    with pytest.raises(Llama2Error, match=message):
        train_reward(settings(**changes))


def test_safety_needs_pairs_that_say_what_is_safe(settings, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(9))
    )
    with pytest.raises(ConfigError, match="no pair says whether its answers are safe"):
        train_reward(settings(data=(path,), safety_weight=1.0))
    with pytest.raises(DataError, match="no pair about safety"):
        train_reward(settings(data=(path,), mix="safety"))
