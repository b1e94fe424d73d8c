"""Learning from preferences as a user runs it: what each loss begins with and does, the reference, and what is refused.

No split of a batch, no rank and no kill changes what is learnt.
"""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import tomli_w
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import llama2
from llama2.align import dpo as module, reference as reference_module
from llama2.align.dpo import train_dpo
from llama2.align.dpo_config import DpoConfig
from llama2.align.kto import mismatched, one_by_one
from llama2.align.losses import orpo_loss, simpo_loss
from llama2.checkpoint import store
from llama2.checkpoint.resume import SavedState
from llama2.cli.main import main
from llama2.data.preferences.sets import read_pair_set
from llama2.errors import DataError
from llama2.model.config import ModelConfig
from llama2.model.lora import adapter_names
from llama2.model.transformer import build
from llama2.train.folder import plain
from llama2.train.loop import Trainer
from llama2.train.metrics import read_log
from tests.pocket import pocket_tokenizer

SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, vocab_size=260, ffn_dim=48, n_kv_heads=2, context_length=80)
LOSSES = ("sigmoid", "cdpo", "ipo", "hinge", "kto", "orpo", "simpo")


def pair(i):
    """The better answer is a number, the worse one a word."""
    return {"prompt": f"Add {i} and {i % 7}", "chosen": str(i + i % 7), "rejected": ("no", "why", "never")[i % 3]}


def labelled(record):
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": record["prompt"], "completion": record[side], "label": label} for side, label in sides]


def write(path, records):
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in records))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small model whose attention matters, and pairs beside it."""
    folder = tmp_path_factory.mktemp("base")
    model = build(SHAPE, seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(3)
    store.save(model, folder / "base", tokenizer=pocket_tokenizer())
    write(folder / "pairs.jsonl", [pair(i) for i in range(40)])
    write(folder / "labelled.jsonl", [each for i in range(40) for each in labelled(pair(i))])
    write(folder / "heldout.jsonl", [pair(i) for i in range(50, 60)])
    return folder


TINY = dict(batch_size=8, learning_rate=1e-2, max_steps=8, device="cpu", timeout_s=60.0, seed=3)


@pytest.fixture
def settings(base, tmp_path):
    """Return a function that makes a DpoConfig of a tiny run in a new folder."""

    def make(name="run", **changes):
        own = {"model": str(base / "base"), "out": tmp_path / name}
        data = {"data": (base / "pairs.jsonl",), "eval_data": base / "heldout.jsonl"}
        values = {**TINY, **own, **data, **changes}
        return DpoConfig(**{key: value for key, value in values.items() if value is not None})

    return make


def lines_of(out, kind):
    return [line for line in read_log(out / "log.jsonl") if line["kind"] == kind]


def curve(out):
    """What was learnt, without what a clock says."""
    clock = ("tokens_per_s", "memory_bytes", "seconds", "mfu", "time")
    steps = [*lines_of(out, "step"), *lines_of(out, "evaluation")]
    return [{key: value for key, value in line.items() if key not in clock} for line in steps]


def stored(path):
    """In memory: what load_file returns is the file itself, and changes with it."""
    return {name: each.clone() for name, each in load_file(path).items()}


def state(out):
    saved = SavedState(sorted((out / "checkpoints").glob("step-*"))[-1] / "state")
    return {name: saved.read(name) for name in saved.shapes}


def assert_near(one, other, *, bound):
    """Float64 sums in another order. AdamW divides rounding by rounding where a gradient is next to nothing."""
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=bound, abs=bound)
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=bound, atol=bound)


def assert_same(one, other):
    assert curve(one) == curve(other)
    first, second = state(one), state(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def launch(config, *flags, n=1):
    """Start the command as a user does; with n > 1 through torchrun."""
    path = config.out.with_suffix(".toml")
    path.write_text(tomli_w.dumps(plain(config)))
    many = [] if n == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m"]
    command = [sys.executable, "-m", *many, "llama2", "dpo", "--config", str(path), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process, expected=0):
    _, said = process.communicate(timeout=200)
    assert process.returncode == expected, said
    return said


@torch.no_grad()
def plain_logprobs(model, rows):
    """The definition: ln p of the marked tokens of each row, alone and by all logits, and how many they are."""
    sums, counts = [], []
    for i in range(len(rows)):
        ids = torch.tensor(rows.document(i).astype("int64"))
        found = model(ids[None, :-1])[0].double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        marks = torch.from_numpy(rows.trained(i)[1:])
        sums.append(found[marks].sum())
        counts.append(marks.sum())
    return torch.stack(sums), torch.stack(counts)


def held_out(base):
    return read_pair_set(base / "heldout.jsonl", pocket_tokenizer(), length=80)


def logits(model, ids=tuple(range(3, 43))):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids]))


# What each loss begins with, and what it does


def at_first(loss, base):
    """The loss on the held-out pairs before training, by hand."""
    if loss in ("sigmoid", "cdpo"):
        return math.log(2)
    if loss in ("ipo", "hinge", "kto"):
        return {"ipo": (1 / (2 * 0.1)) ** 2, "hinge": 1.0, "kto": 0.5}[loss]
    p, n = plain_logprobs(store.load(base / "base").double(), held_out(base).rows)
    chosen, rejected = (p / n)[0::2], (p / n)[1::2]
    if loss == "simpo":
        return float(simpo_loss(chosen, rejected, beta=2.0, gamma=1.0).mean())
    return float(orpo_loss(chosen, rejected, beta=0.1).mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_moves_the_chosen_over_the_rejected(settings, base, loss):
    more = dict(batch_size=16, max_steps=16, beta=0.5) if loss == "kto" else {}  # a batch is of answers, not of pairs
    outcome = train_dpo(settings(loss=loss, **more))
    out = outcome.model.parent
    before, after = lines_of(out, "evaluation")
    assert before["loss"] == pytest.approx(at_first(loss, base), rel=1e-5)
    if loss not in ("orpo", "simpo"):
        assert before["margin"] == pytest.approx(0, abs=1e-5)
    assert after["loss"] < before["loss"] and after["margin"] > before["margin"] + (0.01 if loss == "orpo" else 0.1)
    assert after["accuracy"] > 0.6 if loss == "kto" else after["accuracy"] == 1.0
    gap = [line["chosen_logprob"] - line["rejected_logprob"] for line in (before, after)]
    assert gap[1] > gap[0] + 0.3
    steps = lines_of(out, "step")
    assert all(name in line for line in steps for name in ("accuracy", "margin"))
    assert (out / "reference.safetensors").exists() == (loss not in ("orpo", "simpo"))


def test_the_last_evaluation_is_that_of_the_published_model(settings, base):
    outcome = train_dpo(settings())
    rows = held_out(base).rows
    p, _ = plain_logprobs(store.load(outcome.model), rows)
    ref, _ = plain_logprobs(store.load(base / "base"), rows)
    gain = p - ref
    h = gain[0::2] - gain[1::2]
    last = lines_of(outcome.model.parent, "evaluation")[-1]
    assert last["loss"] == pytest.approx(float(torch.nn.functional.softplus(-0.1 * h).mean()), rel=1e-4)
    assert last["margin"] == pytest.approx(0.1 * float(h.mean()), rel=1e-4)
    assert last["chosen_logprob"] == pytest.approx(float(p[0::2].mean()), rel=1e-4)
    assert last["rejected_logprob"] == pytest.approx(float(p[1::2].mean()), rel=1e-4)


def test_the_chosen_answer_is_learnt_beside_it(settings, base):
    outcome = train_dpo(settings(nll_weight=0.2, max_steps=1))
    p, n = plain_logprobs(store.load(base / "base"), held_out(base).rows)
    wanted = math.log(2) - 0.2 * float((p / n)[0::2].mean())
    assert lines_of(outcome.model.parent, "evaluation")[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_smoothed_loss_goes_less_far(settings):
    margins = [train_dpo(settings(name, loss=name)).evaluation.values["margin"] for name in ("sigmoid", "cdpo")]
    assert margins[1] < margins[0]


def test_labelled_answers_are_pairs_taken_apart(settings, base):
    """The same answers in the same order, once as pairs and once one by one."""
    changes = dict(loss="kto", eval_data=None, eval_share=0.0)
    one = train_dpo(settings("pairs", **changes)).model.parent
    other = train_dpo(settings("labelled", data=(base / "labelled.jsonl",), **changes)).model.parent
    assert_same(one, other)
    steps = lines_of(one, "step")
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-6) and steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["loss"] < 0.499


def test_weights_of_good_and_bad_answers(settings):
    changes = dict(loss="kto", max_steps=1, desirable_weight=3.0, undesirable_weight=0.5)
    outcome = train_dpo(settings(**changes))
    assert lines_of(outcome.model.parent, "evaluation")[0]["loss"] == pytest.approx((3 + 0.5) / 2 / 2, rel=1e-5)


def test_both_sides_of_a_pair_are_set_aside_together(settings, base):
    outcome = train_dpo(settings(loss="kto", eval_data=None, eval_share=0.1, max_steps=1))
    with safe_open(outcome.model.parent / "reference.safetensors", "pt") as file:
        assert file.get_slice("train").get_shape() == [72] and file.get_slice("held-out").get_shape() == [8]


def test_all_weights_and_the_report(settings, base, report):
    outcome = train_dpo(settings(method="full", learning_rate=3e-3, weight_decay=0.0))
    out = outcome.model.parent
    assert outcome.evaluation.values["accuracy"] == 1.0
    assert not torch.equal(logits(store.load(outcome.model)), logits(store.load(base / "base")))
    assert llama2.load(outcome.model, device="cpu").chat([{"role": "user", "content": "Add 1 and 1"}]) is not None
    assert {"accuracy.png", "margin.png", "chosen_logprob.png"} <= {file.name for file in out.iterdir()}
    assert "held-out margin" in (out / "report.html").read_text()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_stands_beside_its_base(settings, base, method):
    outcome = train_dpo(settings(method=method, dora=method == "lora", dtype="float32"))
    loaded = store.load(outcome.model)
    assert adapter_names(loaded) == ("default",)
    assert not torch.equal(logits(loaded), logits(store.load(base / "base")))
    assert llama2.load(outcome.model, device="cpu").chat([{"role": "user", "content": "Add 1 and 1"}]) is not None


# The reference


def test_the_reference_is_the_base_without_the_adapter(settings, base):
    outcome = train_dpo(settings(max_steps=2, micro_batch_size=2))
    found = stored(outcome.model.parent / "reference.safetensors")
    model = store.load(base / "base").eval()
    for name, file in (("train", "pairs.jsonl"), ("held-out", "heldout.jsonl")):
        rows = read_pair_set(base / file, pocket_tokenizer(), length=80).rows
        wanted, _ = plain_logprobs(model, rows)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-4)


def test_a_reference_of_other_data_is_not_taken(settings, monkeypatch):
    outcome = train_dpo(settings(max_steps=2, save_every=1))
    out, good = outcome.model.parent, stored(outcome.model.parent / "reference.safetensors")
    with safe_open(out / "reference.safetensors", "pt") as file:
        key = file.metadata()["key"]
    spoilt = {name: each + 1 for name, each in good.items()}
    for saved_key, expected in ((key, spoilt), ("another", good)):
        save_file(spoilt, out / "reference.safetensors", {"key": saved_key})
        train_dpo(settings(max_steps=2, save_every=1, resume=True))
        again = stored(out / "reference.safetensors")
        assert all(torch.equal(again[name], expected[name]) for name in good), saved_key


def test_a_reference_that_is_lost_is_that_of_the_beginning(settings):
    """Not of the weights that have learnt meanwhile."""
    out = train_dpo(settings(max_steps=2)).model.parent
    good = stored(out / "reference.safetensors")
    (out / "reference.safetensors").write_bytes(b"not one")
    train_dpo(settings(max_steps=2, resume=True))
    again = stored(out / "reference.safetensors")
    assert all(torch.equal(again[name], good[name]) for name in good)


def test_identity_follows_weights_and_ids(base):
    rows, model = held_out(base).rows, store.load(base / "base")
    first = reference_module.identity(model, {"train": rows}, module.start(device="cpu"))
    assert first == reference_module.identity(store.load(base / "base"), {"train": rows}, module.start(device="cpu"))
    fewer = rows.part(range(10), rows.name)
    assert first != reference_module.identity(model, {"train": fewer}, module.start(device="cpu"))
    with torch.no_grad():
        model.layers[1].attention.wq.weight[0, 0] += 1e-3
    assert first != reference_module.identity(model, {"train": rows}, module.start(device="cpu"))


# Mismatched answers


def spliced(found, i):
    tokenizer = pocket_tokenizer()
    ids, marks = found.rows.document(i), found.rows.trained(i)
    return tokenizer.decode(ids[~marks].tolist()), tokenizer.decode(ids[marks].tolist())


def test_a_mismatched_answer_is_to_another_prompt(tmp_path):
    records = [{"prompt": each, "chosen": f"{each}+", "rejected": f"{each}-"} for each in ("ab", "ab", "cd")]
    records[1]["rejected"] = "ab--"
    pairs = read_pair_set(write(tmp_path / "pairs.jsonl", records), pocket_tokenizer(), length=80)
    found = mismatched(one_by_one(pairs).rows, 80)
    assert found.counts.all() and len(found.rows) == 6
    answers = [spliced(found, i) for i in range(6)]
    assert [answer.strip() for _, answer in answers] == ["cd+"] * 4 + ["ab+"] * 2
    assert ["ab" in prompt for prompt, _ in answers] == [True] * 4 + [False] * 2


def test_what_does_not_fit_has_no_part(tmp_path):
    records = [pair(1), {"prompt": "Add and add and add", "chosen": "yes, yes and yes", "rejected": "no, no and no"}]
    pairs = read_pair_set(write(tmp_path / "pairs.jsonl", records), pocket_tokenizer(), length=80)
    rows = one_by_one(pairs).rows
    found = mismatched(rows, int(rows.lengths.max()))
    assert found.counts.all()
    short = mismatched(rows, int(rows.lengths[:2].max()))
    assert short.counts.tolist() == [False] * 4
    assert short.rows.ids.tolist() == rows.ids.tolist()


def test_answers_to_one_prompt_alone_are_refused(settings, tmp_path):
    records = [{"prompt": "Hi", "chosen": f"Yes {i}", "rejected": "No"} for i in range(9)]
    data = write(tmp_path / "pairs.jsonl", records)
    with pytest.raises(DataError, match="holds no answer to another prompt to compare with, which kto does"):
        train_dpo(settings(loss="kto", data=(data,), eval_data=None, eval_share=0.0))


# What is learnt does not depend on how it is computed


@pytest.mark.parametrize(
    "changes", [{"nll_weight": 0.2}, {"loss": "kto"}, {"loss": "simpo", "method": "full"}], ids=str
)
def test_accumulation_1x8_equals_8x1(settings, changes):
    changes = dict(dtype="float64", max_steps=4, learning_rate=1e-3, adam_eps=1e-3) | changes
    one = train_dpo(settings("one", **changes)).model.parent
    other = train_dpo(settings("other", micro_batch_size=1, **changes)).model.parent
    assert_near(one, other, bound=1e-12)


PARALLEL = [{"loss": "kto"}, {"method": "full", "micro_batch_size": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("changes", PARALLEL, ids=str)
def test_two_ranks_equal_one_process(settings, changes):
    changes = dict(dtype="float64", max_steps=4) | changes
    one, many = settings("one", **changes), settings("many", **changes)
    train_dpo(one)
    finish(launch(many, n=2))
    assert_near(one.out, many.out, bound=1e-9)
    ours, theirs = (stored(config.out / "reference.safetensors") for config in (one, many))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.2}, {"loss": "kto", "method": "full"}], ids=str)
def test_stopping_and_going_on_equals_never_stopping(settings, changes, monkeypatch):
    """In one process; the kill below is the real thing."""
    whole = train_dpo(settings("whole", eval_every=2, **changes)).model.parent
    split = settings("split", eval_every=2, **changes)
    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, *a, **k: step(self, *a, **k | {"stop": self.n_done == 4}))
        assert train_dpo(split).stopped_by
    before = (split.out / "reference.safetensors").read_bytes()
    torch.rand(3)
    assert train_dpo(split.model_copy(update={"resume": True})).n_steps == 8
    assert (split.out / "reference.safetensors").read_bytes() == before
    ours = [line for line in curve(whole) if line["kind"] == "step"]
    assert ours == [line for line in curve(split.out) if line["kind"] == "step"]
    first, second = state(whole), state(split.out)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(settings):
    changes = dict(max_steps=16, save_every=4, lora_dropout=0.1)
    whole, killed = settings("whole", **changes), settings("killed", **changes)
    train_dpo(whole)
    process = launch(killed)
    while len(lines_of(killed.out, "step") if (killed.out / "log.jsonl").exists() else []) < 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (killed.out / "model").exists()
    train_dpo(killed.model_copy(update={"resume": True}))
    assert_same(whole.out, killed.out)
    ours, theirs = ((config.out / "model" / "adapter_model.safetensors").read_bytes() for config in (whole, killed))
    assert ours == theirs


# What is refused


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs the command in this process and returns its exit code and what it says."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llama2", "dpo", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return run


LONG = {"prompt": "Add", "chosen": "1" * 80, "rejected": "2"}
REFUSED = [
    ({"data": ()}, None, "name files of preference pairs with --data"),
    ({"model": ""}, None, "which checkpoint?"),
    ({"out": None}, None, "--out"),
    ({"eval_data": "nowhere.jsonl"}, None, "nowhere.jsonl does not exist"),
    ({"beta": 0.0}, None, "beta=0.0: wanted more than 0"),
    ({"label_smoothing": 0.1, "loss": "ipo"}, None, "label_smoothing=0.1: means something to loss=cdpo only"),
    ({"label_smoothing": 0.5, "loss": "cdpo"}, None, "label_smoothing=0.5: wanted from 0 to less than 0.5"),
    ({"gamma": 1.0}, None, "gamma=1.0: means something to loss=simpo only, not to sigmoid"),
    ({"nll_weight": 0.2, "loss": "orpo"}, None, "orpo holds that loss already"),
    ({"nll_weight": 0.2, "loss": "kto"}, None, "kto has no pairs"),
    ({"nll_weight": -1.0}, None, "nll_weight=-1.0: wanted 0 or more"),
    ({"desirable_weight": 2.0}, None, "desirable_weight=2.0: needs loss=kto, not sigmoid"),
    ({"batch_size": 1, "loss": "kto"}, None, "batch_size=1: kto compares good and bad answers and needs at least 2"),
    ({"tensor_parallel": 2, "method": "full"}, None, "tensor_parallel=2 is not for learning from preferences"),
    ({"sequence_length": 81}, None, "sequence_length=81 is beyond the context of"),
    ({"warmup_steps": 8}, None, "leaves nothing of the 8 steps"),
    ({"lora_r": 4, "method": "full"}, None, "lora_r=4: needs an adapter"),
    ({}, labelled(pair(1)), "data.jsonl:1: one labelled answer stands here; wanted a pair"),
    ({"loss": "kto"}, [*labelled(pair(1)), pair(2)], "data.jsonl:3: a pair of answers stands here; wanted one answer"),
    ({}, [pair(1), LONG], "data.jsonl:2 has 103 tokens with its prompt and a row holds 80"),
    ({}, [{"prompt": "Hi", "chosen": "Yes", "rejected": "Yes"}], "data.jsonl:1: 'chosen' and 'rejected' are the same"),
    ({"eval_data": None}, [pair(1)], "has 1 pairs about 1 prompts, too few to set 0.05 of them aside"),
    ({"eval_data": None, "eval_share": 0.0, "early_stop": 1}, None, "early_stop needs something to judge by"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "records", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_work_is_refused_in_one_line(settings, command, tmp_path, changes, records, said):
    if records is not None:
        changes = changes | {"data": (write(tmp_path / "data.jsonl", records),)}
    path = tmp_path / "settings.toml"
    path.write_text(tomli_w.dumps(plain(settings(**changes))))
    before = set(tmp_path.iterdir())
    code, error = command("--config", path)
    last = error.splitlines()[-1]
    assert code == 2 and last.startswith("llama2: error: ") and said in last
    assert error.count("llama2: error") == 1 and "Traceback" not in error
    assert set(tmp_path.iterdir()) == before


def test_an_unknown_loss_is_refused_with_those_that_are(command, tmp_path):
    code, said = command("model", "--data", "pairs.jsonl", "--loss", "sigmod")
    assert code == 2 and "sigmod" in said and "sigmoid" in said and "simpo" in said
    path = tmp_path / "settings.toml"
    path.write_text('model = "model"\nloss = "sigmod"\n')
    code, said = command("--config", path)
    assert code == 2 and "loss='sigmod'" in said and "'sigmoid'" in said
    path.write_text('model = "model"\nlos = "sigmoid"\n')
    code, said = command("--config", path)
    assert code == 2 and "'los' is not a setting, did you mean 'loss'?" in said


def test_a_run_goes_on_with_its_own_loss_only(settings, command):
    first = settings(max_steps=1)
    train_dpo(first)
    code, said = command("--config", first.out / "run.toml", "--loss", "ipo", "--resume", "--max-steps", "2")
    assert code == 2 and "was trained with loss=sigmoid, not ipo" in said
    code, said = command("--config", first.out / "run.toml", "--resume", "--max-steps", "2")
    assert code == 0, said
