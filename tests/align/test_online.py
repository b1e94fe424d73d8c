"""PPO and GRPO: what is sampled is what is learnt, whatever the split, the kills and the company."""

import signal
import time

import pytest
import torch

from llama2.align.grpo import Grpo, grpo
from llama2.align.losses import generalised_advantages
from llama2.align.online_config import GrpoConfig, PpoConfig
from llama2.align.ppo import Ppo, ppo
from llama2.align.rollout import Prompts, Sampling, rewarded, sample
from llama2.align.scoring import ASKED_AT_ONCE, shared
from llama2.chat import Message
from llama2.checkpoint import store
from llama2.data.batch import share
from llama2.errors import ConfigError, DataError, Llama2Error
from llama2.llm import load
from llama2.parallel.mesh import World
from llama2.train.loop import Trainer
from tests.align.conftest import assert_near, assert_same, finish, launch, steps
from tests.align.rewards import letters
from tests.pocket import pocket_tokenizer

TINY = dict(
    reward="tests.align.rewards:letters", n_iterations=4, batch_size=8, max_new_tokens=6, learning_rate=1e-2,
    device="cpu", n_eval=4, eval_share=0.2, timeout_s=60.0, lora_r=4,
)  # fmt: skip


@pytest.fixture
def settings(chat, prompts, tmp_path):
    """Return a function that makes the settings of a tiny run in a new folder."""

    def make(name="run", kind=PpoConfig, **changes):
        own: dict = dict(n_generations=4) if kind is GrpoConfig else {}
        if changes.get("method") == "full":
            own |= dict(lora_r=8, learning_rate=3e-3, weight_decay=0.0)  # an adapter's settings are refused
        return kind(**{**TINY, **own, "model": str(chat), "prompts": (prompts,), "out": tmp_path / name, **changes})

    return make


RUN = {PpoConfig: ppo, GrpoConfig: grpo}
BOTH = pytest.mark.parametrize("kind", [PpoConfig, GrpoConfig])
LONG = pytest.mark.parametrize("kind", [PpoConfig, pytest.param(GrpoConfig, marks=pytest.mark.slow)])
"""Of what both share and takes long; the other one is run by make test-slow."""
METHODS = pytest.mark.parametrize("method", ["lora", "full"])


@METHODS
@LONG
def test_the_reward_grows(settings, kind, method):
    lr = 5e-2 if method == "lora" else 1e-2
    changes = dict(n_iterations=40, batch_size=16, mini_batch_size=8, max_new_tokens=8, learning_rate=lr)
    outcome = RUN[kind](settings(kind=kind, method=method, **changes))
    found = [line["reward"] for line in steps(outcome.model.parent)]
    assert sum(found[-20:]) / 20 > found[0] + 0.4  # the first iteration's answers are from before any step
    assert outcome.evaluation.loss == -outcome.evaluation.values["reward"]


def test_what_is_logged_tells_a_sick_run(settings):
    outcome = ppo(settings(n_iterations=2))
    first, second = steps(outcome.model.parent)
    diagnostics = {
        *("reward", "reward_std", "answer_tokens", "cut", "distinct", "kl", "sampling_gap", "value_error"),
        *("entropy", "clip_fraction", "kl_of_step"),
    }
    assert diagnostics <= first.keys()
    assert first["kl"] == 0 and first["clip_fraction"] == 0 and second["kl"] != 0  # B of a fresh adapter is zero
    assert first["sampling_gap"] < 1e-5 and second["sampling_gap"] < 1e-5
    assert first["entropy"] == pytest.approx(5.5, abs=0.3)  # ln 260 and a little less


@METHODS
@BOTH
def test_the_base_stays_and_the_policy_speaks(settings, chat, kind, method):
    before = store.load(chat).state_dict()
    outcome = RUN[kind](settings(kind=kind, method=method))
    after = store.load(chat).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    llm = load(outcome.model)  # an adapter's folder stands for base and adapter
    assert [name for name, _ in llm.model.named_parameters() if name not in before and "lora_" not in name] == []
    ids = torch.arange(3, 23)[None]
    assert not torch.equal(llm.model(ids), load(chat).model(ids))


@BOTH
def test_all_weights_begin_at_their_reference_and_leave_it(settings, kind):
    outcome = RUN[kind](settings(kind=kind, method="full", n_iterations=2))
    first, second = steps(outcome.model.parent)
    assert first["kl"] == 0 and first["clip_fraction"] == 0 and abs(second["kl"]) > 1e-6
    assert first["sampling_gap"] < 1e-5 and second["sampling_gap"] < 1e-5


@BOTH
def test_rewards_that_are_all_equal_teach_nothing(settings, kind):
    settings_ = settings(kind=kind, reward="tests.align.rewards:constant", kl_coef=0.0, n_iterations=2)
    outcome = RUN[kind](settings_)
    last = steps(outcome.model.parent)[-1]
    assert last["reward_std"] == 0 and last["reward"] == 0.5
    if kind is GrpoConfig:
        assert last["grad_norm"] == 0 and last["idle_groups"] == 1 and last["kl"] == 0


def test_rewards_can_be_whitened_over_the_answers_to_one_prompt(settings, monkeypatch):
    """Then what the prompts differ in is gone: the sum over each prompt's answers is nothing."""
    returned = []

    def watched(rewards, values, is_answer, **options):
        returned.append(float(rewards.sum()))
        return generalised_advantages(rewards, values, is_answer, **options)

    monkeypatch.setattr("llama2.align.ppo.generalised_advantages", watched)
    ppo(settings(n_generations=4, n_iterations=1, kl_coef=0.0, whiten_over="prompt", eval_share=0.0))
    assert len(returned) == 8 and max(map(abs, returned)) > 0.5
    assert [sum(returned[at : at + 4]) for at in (0, 4)] == pytest.approx([0, 0], abs=1e-5)


@BOTH
def test_mini_batches_and_accumulation(settings, kind):
    changes = dict(kind=kind, dtype="float64", batch_size=16, mini_batch_size=8, n_iterations=2)
    RUN[kind](whole := settings("whole", **changes))
    RUN[kind](parts := settings("parts", gradient_accumulation_steps=4, **changes))
    assert len(steps(whole.out)) == 4
    assert_near(whole.out, parts.out, bound=1e-6)  # samples and rewards are the same; sums in another order
    n_answers = 4 if kind is GrpoConfig else 1
    assert parts.on(1, n_answers) == settings("parts", micro_batch_size=2, **changes)


@BOTH
def test_several_answers_to_a_prompt_read_it_once_and_teach_the_same(settings, kind, monkeypatch):
    changes = dict(kind=kind, n_generations=4, n_iterations=2, dtype="float64")
    together = RUN[kind](settings("together", **changes))
    n_shared = []

    def apart(rows, n_common, shape):
        n_shared.append(share(rows, n_common, shape) is not None)

    monkeypatch.setattr("llama2.data.preferences.batch.share", apart)
    alone = RUN[kind](settings("apart", **changes))
    assert_near(together.model.parent, alone.model.parent, bound=1e-9)
    assert all(n_shared)


def test_prompts_that_do_not_split_over_the_ranks_are_refused():
    usual = dict(model="x", prompts=("y",), reward="grade")
    with pytest.raises(ConfigError, match=r"batch_size=64 makes 64 prompts .* 3 data ranks; .* a multiple of 3"):
        PpoConfig(**usual).on(3, 1)
    config = GrpoConfig(**usual, n_generations=4, mini_batch_size=8)
    with pytest.raises(ConfigError, match=r"mini_batch_size=8 makes 2 prompts .* 4 data ranks; .* a multiple of 16"):
        config.on(4, 4)
    assert config.on(2, 4).micro_batch_size == 4
    assert [PpoConfig(**usual, batch_size=n).on(1, 1).micro_batch_size for n in (64, 72, 7)] == [16, 12, 7]


def test_the_b_matrices_have_a_learning_rate_of_their_own():
    config = PpoConfig(lora_b_lr_ratio=4.0, learning_rate=1e-3, value_lr=3e-3)
    for name, scale in {
        "layers.0.wq.lora_a.policy": 1, "layers.0.wq.lora_b.policy": 4, "layers.0.wq.lora_a.value": 3,
        "layers.0.wq.lora_b.value": 12, "heads.value.weight": 3,
    }.items():  # fmt: skip
        assert Ppo.lr_scale(config, name) == pytest.approx(scale)
        assert Grpo.lr_scale(config, name) == (4 if "lora_b" in name else 1)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (PpoConfig, "lora"),
        pytest.param(GrpoConfig, "lora", marks=pytest.mark.slow),
        pytest.param(PpoConfig, "full", marks=pytest.mark.slow),
        (GrpoConfig, "full"),
    ],
)
def test_killed_and_resumed_is_never_killed(settings, kind, method):
    changes = dict(kind=kind, method=method, n_iterations=6, batch_size=16, mini_batch_size=8)
    RUN[kind](whole := settings("whole", **changes))
    config = settings("killed", save_every=1, **changes)
    name = "ppo" if kind is PpoConfig else "grpo"
    process = launch(name, config)
    checkpoints = config.out / "checkpoints"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not list(checkpoints.glob("step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    n_before = len(list(checkpoints.glob("step-*")))
    assert n_before
    RUN[kind](config.model_copy(update={"resume": True}))
    assert_same(whole.out, config.out)


def test_a_signal_waits_for_the_end_of_the_iteration(settings, monkeypatch):
    """This process sends it to itself in the fifth step; an iteration has four."""
    config, step = settings(n_iterations=400, batch_size=16, mini_batch_size=4), Trainer.step

    def signalled(self, *args, **kwargs):
        if self.n_done == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "step", signalled)
    assert ppo(config).stopped_by == signal.SIGTERM
    assert len(steps(config.out)) == 8
    saved = sorted((config.out / "checkpoints").glob("step-*"))[-1].name
    assert saved == "step-00000008"


@pytest.mark.slow
@METHODS
@BOTH
def test_two_processes_do_what_one_does(settings, kind, method):
    changes = dict(kind=kind, method=method, dtype="float64", batch_size=16, mini_batch_size=8, n_iterations=2)
    RUN[kind](one := settings("one", **changes))
    two = settings("two", **changes)
    finish(launch("ppo" if kind is PpoConfig else "grpo", two, n=2))
    assert_near(one.out, two.out, bound=1e-6)
    ours, theirs = steps(one.out), steps(two.out)
    assert [line["reward"] for line in ours] == pytest.approx([line["reward"] for line in theirs], rel=1e-5)


# Sampling


def some_prompts(**changes):
    said = [(Message("user", text),) for text in ("Hi", "What is it?", "a")]
    return Prompts(said, pocket_tokenizer(), **{"context_length": 96, "max_new_tokens": 8, **changes})


def test_an_answer_does_not_depend_on_its_company(chat):
    model, prompts, sampling = store.load(chat), some_prompts(), Sampling(8)
    together = sample(model, prompts, [0, 1, 2], sampling, n=2, seed=5)
    alone = [each for number in range(3) for each in sample(model, prompts, [number], sampling, n=2, seed=5)]
    assert together == alone
    assert sample(model, prompts, [0, 1, 2], sampling, n=2, seed=6) != together


@pytest.mark.parametrize("size", [2, 5])
def test_the_shares_of_several_processes_are_the_answers_of_one(chat, size):
    model, prompts, sampling = store.load(chat), some_prompts(), Sampling(8)
    worlds = [World(rank, size) for rank in range(size)]  # without a mesh each keeps its own share
    found = [sample(model, prompts, [2, 0, 1], sampling, n=2, seed=5, world=each) for each in worlds]
    assert sorted(map(len, found)) == {2: [2, 4], 5: [0, 0, 2, 2, 2]}[size]
    assert [each for some in found for each in some] == sample(model, prompts, [2, 0, 1], sampling, n=2, seed=5)


def test_a_shared_reward_is_asked_about_the_same_answers_together_by_any_number_of_processes():
    answers = [f"{i}" for i in range(3 * ASKED_AT_ONCE + 5)]

    def of(size):
        asked, numbers = [], []
        for rank in range(size):
            judge = shared(
                lambda _, some: asked.append(tuple(some)) or [float(each) for each in some], World(rank, size)
            )
            numbers += judge([()] * len(answers), answers)
        return asked, numbers

    assert of(1) == of(3) == of(7) and len(of(1)[0]) == 4
    assert of(3)[1] == [float(each) for each in answers]


def test_what_was_sampled_is_kept_id_by_id(chat):
    model, prompts = store.load(chat), some_prompts()
    found = sample(model, prompts, [0, 1, 2], Sampling(8), n=20, seed=0)
    for each in found:
        assert each.is_cut == (each.ids[-1] != prompts.end_id)
        assert len(each.logprobs) == len(each.ids) - (not each.is_cut)
    assert any(each.is_cut for each in found)


def test_an_empty_answer_is_its_end_of_turn(chat):
    model, prompts = store.load(chat), some_prompts()
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.weight[prompts.end_id] = model.norm.weight * 50
        model.norm.weight.abs_()
    hidden = model.hidden(torch.tensor([prompts.ids[0]]))[0, -1]
    with torch.no_grad():
        model.output.weight[prompts.end_id] = hidden * 100
    (found,) = sample(model, prompts, [0], Sampling(8), seed=0)
    assert found.ids == (prompts.end_id,) and found.text == "" and not found.is_cut and found.logprobs == ()
    assert rewarded([found], prompts, letters)[0].reward == 0


# Bad input


def test_a_prompt_without_room_is_refused_or_left_out():
    with pytest.raises(DataError, match=r"prompt 1 has \d+ tokens and an answer may have 60.*--too-long drop"):
        some_prompts(max_new_tokens=60, context_length=85)
    found = some_prompts(max_new_tokens=60, context_length=85, too_long="drop")
    assert len(found) == 2 and found.n_left_out == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(reward=""), "a reward model's folder, MODULE:FUNCTION, or grade"),
        (dict(reward="tests.align.rewards:nothing"), "cannot be imported"),
        (dict(reward="tests.align.rewards:NUMBER"), "is a int, not a function"),
        (dict(reward="tests.align.rewards:too_few"), "gave 1 numbers for 4 answers"),
        (dict(reward="grade"), "judges prompts of the story world"),
        (dict(prompts=()), "name files of prompts"),
        (dict(mini_batch_size=3), "does not divide batch_size=8"),
        (dict(method="qlora"), "method=qlora: answers are not sampled from 4 bits"),
        (dict(max_steps=3), "counted by n_iterations"),
        (dict(n_epochs=3.0), "n_epochs=3.0: this run is counted by n_iterations"),
        (dict(trained_modules=("output",)), "trained_modules=.*the adapter alone is learnt"),
        (dict(trained_modules=("output",), trained_modules_lr=1e-3), "the adapter alone is learnt"),
        (dict(trained_modules_lr=1e-3), "needs trained_modules"),
        (dict(activation_checkpointing="full"), "computed again with the policy's adapter"),
        (dict(micro_batch_size=3), "micro_batch_size=3: does not divide the 8 rows"),
        (dict(gradient_accumulation_steps=3), "gradient_accumulation_steps=3: does not divide the 8 rows"),
        (dict(batch_size=64), "takes 64; choose a smaller batch_size|an iteration takes 64"),
        (dict(kl_coef=-1.0), "kl_coef=-1.0"),
        (dict(lam=1.5), "lam=1.5"),
        (dict(whiten_over="prompt"), "whiten_over=prompt: needs n_generations of 2 or more"),
    ],
)
def test_bad_settings_are_refused(settings, changes, message):
    with pytest.raises(Llama2Error, match=message):
        ppo(settings(**changes))


def test_a_group_needs_others():
    with pytest.raises(ConfigError, match="n_generations=1"):
        GrpoConfig(model="x", prompts=("y",), reward="grade", n_generations=1).check()
    with pytest.raises(ConfigError, match="no group is torn"):
        GrpoConfig(model="x", prompts=("y",), reward="grade", n_generations=8, mini_batch_size=4).check()


def test_another_runs_folder_is_not_overwritten(settings):
    config = settings(n_iterations=1)
    ppo(config)
    with pytest.raises(Llama2Error, match="is not empty"):
        ppo(config)
