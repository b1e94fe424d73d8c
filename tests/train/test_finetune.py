"""Fine-tuning as a user runs it: what it writes and refuses, and that no split and no kill changes what is learnt."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tomli_w
import torch

import llama2
from llama2.checkpoint import store
from llama2.checkpoint.resume import SavedState
from llama2.cli.main import main
from llama2.data.shards import ShardWriter, token_dtype, write_index
from llama2.errors import ConfigError
from llama2.model.config import ModelConfig
from llama2.model.lora import adapter_names
from llama2.model.quantized import NF4Linear
from llama2.model.transformer import build
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import finetune as module
from llama2.train.finetune import finetune
from llama2.train.finetune_config import FinetuneConfig
from llama2.train.folder import plain
from llama2.train.loop import Trainer
from llama2.train.metrics import read_log
from tests.pocket import pocket_tokenizer

SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, vocab_size=260, ffn_dim=48, n_kv_heads=2, context_length=96)
METHODS = ("full", "lora", "qlora")


def asked(i, answer=None):
    return {"prompt": f"Add {i} and {i % 7}.", "completion": answer or str(i + i % 7)}


def write(path, records):
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in records))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small model whose attention matters, and files of questions beside it."""
    folder = tmp_path_factory.mktemp("base")
    model = build(SHAPE, seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(3)
    store.save(model, folder / "base", tokenizer=pocket_tokenizer())
    write(folder / "sums.jsonl", [asked(i) for i in range(60)])
    write(folder / "words.jsonl", [{"instruction": f"Say {i}", "output": f"It is {i}!"} for i in range(20)])
    return folder


TINY = dict(
    sequence_length=64, batch_size=8, learning_rate=1e-2, max_steps=8, device="cpu", dtype="float32", optimizer="adamw",
    eval_share=0.1, timeout_s=60.0,
)  # fmt: skip


@pytest.fixture
def settings(base, tmp_path):
    """Return a function that makes a FinetuneConfig of a tiny run in a new folder."""

    def make(name="run", **changes):
        model = {"model": str(base / "base"), "data": (base / "sums.jsonl",), "out": tmp_path / name}
        values = {**TINY, **model, **changes}
        return FinetuneConfig(**{key: value for key, value in values.items() if value is not None})

    return make


def curve(out):
    """What was learnt, without what a clock says."""
    lines = [line for line in read_log(out / "log.jsonl") if line["kind"] in ("step", "evaluation")]
    return [{k: v for k, v in line.items() if k in ("step", "loss", "grad_norm", "learning_rate")} for line in lines]


def losses_of(outcome):
    """On what is held out."""
    return [line["loss"] for line in read_log(outcome.model.parent / "log.jsonl") if line["kind"] == "evaluation"]


def state(out):
    saved = SavedState(sorted((out / "checkpoints").glob("step-*"))[-1] / "state")
    return {name: saved.read(name) for name in saved.shapes}


def assert_near(one, other, *, bound=1e-9):
    """Float64 sums in another order."""
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=bound, atol=bound)


def assert_same(one, other):
    ours, theirs = ([line for line in curve(out) if "learning_rate" in line] for out in (one, other))
    assert ours == theirs
    first, second = state(one), state(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(config, *flags, n=1):
    """Start the command as a user does; with n > 1 through torchrun."""
    path = config.out.with_suffix(".toml")
    path.write_text(tomli_w.dumps(plain(config.settled())))
    start = [sys.executable, "-m"]
    many = [] if n == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m"]
    command = [*start, *many, "llama2", "finetune", "--config", str(path), *flags]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)


def finish(process, expected=0):
    _, said = process.communicate(timeout=200)
    assert process.returncode == expected, said
    return said


def logits(model, ids=tuple(range(3, 43))):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids]))


@pytest.fixture
def trained(monkeypatch):
    """Return a list that every model that is trained is put in."""
    found = []
    begin = Trainer.__init__

    def begun(self, model, *args, **kwargs):
        found.append(model)
        begin(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "__init__", begun)
    return found


# What comes out


def test_full_leaves_a_model_that_learnt(settings, trained, report):
    outcome = finetune(settings(method="full", learning_rate=3e-3))
    out = outcome.model.parent
    losses = [line["loss"] for line in read_log(out / "log.jsonl") if line["kind"] == "step"]
    assert outcome.n_steps == len(losses) == 8 and losses[-1] < losses[0] - 0.3
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= {file.name for file in outcome.model.iterdir()}
    assert torch.equal(logits(store.load(outcome.model)), logits(trained[0]))
    evaluations = [line for line in read_log(out / "log.jsonl") if line["kind"] == "evaluation"]
    assert [(line["step"], line["of"]) for line in evaluations] == [(0, "held-out"), (8, "held-out")]
    assert re.search(r"held-out loss.{1,40}\d -&gt; \d", (out / "report.html").read_text(), re.DOTALL)


ADAPTERS = [
    {},
    {"rslora": True, "lora_r": 4, "lora_alpha": 8.0, "target_modules": ("wq", "v_proj")},
    {"dora": True},
    {"trained_modules": ("tok_embeddings", "output")},
    {"target_modules": ("all-linear", "output")},
    {"lora_dropout": 0.2, "neftune_alpha": 5.0},
]


@pytest.mark.parametrize("changes", ADAPTERS)
def test_an_adapter_is_what_was_trained(settings, trained, base, changes):
    outcome = finetune(settings(**changes))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in outcome.model.iterdir()}
    before, (model,) = store.load(base / "base"), trained
    loaded = store.load(outcome.model)
    assert adapter_names(loaded) == ("default",)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)  # float32, as it was trained
    assert (logits(loaded) - logits(before)).abs().max() > 1e-2
    whole = {f"{name}.weight" for name in changes.get("trained_modules", ())}
    ours = dict(model.named_parameters())
    for name, weight in before.named_parameters():  # the base is what it was, but for what is trained whole
        assert torch.equal(ours[name], weight) == (name not in whole), name
    saved = {name.removeprefix("weights/") for name in state(outcome.model.parent) if name.startswith("weights/")}
    assert saved == {name for name, weight in ours.items() if weight.requires_grad}
    assert {name for name in saved if name.endswith(".weight")} == whole
    assert llama2.load(outcome.model, device="cpu").chat([{"role": "user", "content": "Add 1 and 1."}]) is not None


def test_qlora_trains_beside_four_bits(settings, trained, base):
    outcome = finetune(settings(method="qlora", dora=True))
    model, before = trained[0], dict(store.load(base / "base").named_parameters())
    quantised = {name: each for name, each in model.named_modules() if isinstance(each, NF4Linear)}
    assert len(quantised) == 14 and not any(name.endswith("wq.weight") for name, _ in model.named_parameters())
    for name, layer in quantised.items():
        fresh = NF4Linear(layer.in_features, layer.out_features, dtype=torch.float32)
        fresh.quantise(before[f"{name}.weight"])
        assert torch.equal(layer.codes, fresh.codes) and torch.equal(layer.dense(), fresh.dense())
    losses = [line["loss"] for line in read_log(outcome.model.parent / "log.jsonl") if line["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.3
    loaded = store.load(outcome.model)  # upon the base as it is stored: what four bits cost is the difference
    lost, learnt = logits(loaded) - logits(model), logits(loaded) - logits(store.load(base / "base"))
    assert 0 < lost.abs().mean() < 0.5 * learnt.abs().mean()


def test_qlora_is_bfloat16_and_8_bits_unless_said(settings, trained):
    outcome = finetune(settings(method="qlora", dtype=None, optimizer=None, learning_rate=None, max_steps=2))
    resolved = (outcome.model.parent / "run.toml").read_text()
    assert 'dtype = "bfloat16"' in resolved and 'optimizer = "adamw8bit"' in resolved
    assert trained[0].tok_embeddings.weight.dtype == torch.bfloat16
    assert trained[0].layers[0].attention.wq.dense().dtype == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_upon_an_adapter(settings, trained, base, dora):
    first = finetune(settings("first", dora=dora, trained_modules=("output",)))
    second = finetune(settings("second", model=str(first.model), dora=dora, data=(base / "words.jsonl",)))
    loaded = store.load(second.model)
    assert adapter_names(loaded) == ("default", "default2")
    # The first one is merged in training and beside when loaded: float32 sums in another order.
    torch.testing.assert_close(logits(loaded), logits(trained[1]), rtol=1e-4, atol=1e-4)
    alone = finetune(settings("alone", data=(base / "words.jsonl",), max_steps=1))
    assert losses_of(second)[0] != losses_of(alone)[0]  # before training, on the same examples


def test_a_fresh_adapter_changes_nothing(settings):
    outcome = finetune(settings(max_steps=1, learning_rate=0.0, eval_tokens=10**6))
    before, after = losses_of(outcome)
    assert before == after
    whole = finetune(settings("full", method="full", max_steps=1, learning_rate=0.0, eval_tokens=10**6))
    assert losses_of(whole)[0] == pytest.approx(before, rel=1e-6)


def test_the_best_is_kept_where_it_stops_early(settings):
    outcome = finetune(
        settings(max_steps=40, eval_every=2, early_stop=2, learning_rate=0.5, lr_scheduler="constant", keep_last=9)
    )
    out = outcome.model.parent
    losses = {line["step"]: line["loss"] for line in read_log(out / "log.jsonl") if line["kind"] == "evaluation"}
    del losses[0]  # before training there is no adapter to keep
    best = min(losses, key=losses.__getitem__)
    assert outcome.n_steps < 40
    published = (outcome.model / "adapter_model.safetensors").read_bytes()
    assert published == (out / "checkpoints" / f"step-{best:08}" / "adapter_model.safetensors").read_bytes()


def test_what_was_there_before_is_no_outcome(settings):
    """A run that only does harm publishes its best, and says how good that is."""
    taught = finetune(settings("taught", max_steps=20))
    harm = dict(model=str(taught.model), max_steps=6, eval_every=2, early_stop=2, outlier_sigma=0, keep_last=9)
    outcome = finetune(settings("harmed", learning_rate=3.0, **harm))
    log = read_log(outcome.model.parent / "log.jsonl")
    found = {line["step"]: line["loss"] for line in log if line["kind"] == "evaluation"}
    before = found.pop(0)
    assert outcome.evaluation.loss == min(found.values()) > before


def test_learning_rates_of_their_own_reach_the_optimizer(settings, trained, monkeypatch):
    seen = {}
    update = Trainer._update

    def watched(self, *args):
        update(self, *args)
        names = {id(weight): name for name, weight in self.masters.weights.items()}
        seen.update({names[id(w)]: g["lr"] for o in self.optimizers for g in o.param_groups for w in g["params"]})

    monkeypatch.setattr(Trainer, "_update", watched)
    changes = dict(lora_b_lr_ratio=16.0, trained_modules=("output",), trained_modules_lr=1e-4, lr_scheduler="constant")
    finetune(settings(max_steps=1, dora=True, **changes))
    kinds = {name: name.split(".")[-2] if "default" in name else "whole" for name in seen}
    expected = {"lora_a": 1e-2, "lora_b": 0.16, "magnitude": 1e-2, "whole": 1e-4}
    assert set(kinds.values()) == set(expected)
    assert all(seen[name] == pytest.approx(expected[kind]) for name, kind in kinds.items())


def test_replay_is_mixed_in_and_judged_too(settings, shards, report):
    outcome = finetune(settings(replay=(shards,), replay_share=0.3, too_long="drop", max_steps=None, n_epochs=6.0))
    log = read_log(outcome.model.parent / "log.jsonl")
    evaluations = [(line["step"], line["of"]) for line in log if line["kind"] == "evaluation"]
    n = outcome.n_steps
    assert evaluations == [(0, "held-out"), (0, "earlier"), (n, "held-out"), (n, "earlier")]
    last = [line for line in log if line["kind"] == "step"][-1]
    assert last["epoch"] == pytest.approx(6.0, rel=0.2)  # whole steps, and rows that are nearly full
    page = (outcome.model.parent / "report.html").read_text()
    assert "held-out loss" in page and "earlier loss" in page


def test_several_tasks_by_weight(settings, base):
    both = (base / "sums.jsonl", base / "words.jsonl")
    config = settings(data=both, weights=(0.5, 0.5)).settled()
    data = module.open_data(config, pocket_tokenizer(), module.Console(quiet=True))
    plan = module.plan_steps(config, data)
    assert plan.weights == [0.5, 0.5] and len(data.held_out["held-out"]) == 6 + 2
    density = sum(each.n_targets / (each.n_tokens - len(each)) for each in data.tasks) / 2
    n_read = sum(each.n_tokens - len(each) for each in data.tasks)
    assert plan.tokens_per_epoch == pytest.approx(n_read * density)
    by_size = module.plan_steps(config.model_copy(update={"weights": ()}), data)
    assert by_size.tokens_per_epoch == pytest.approx(sum(each.n_targets for each in data.tasks))


# What is learnt does not depend on how it is computed


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_1x8_equals_8x1(settings, method):
    changes = dict(method=method, dtype="float64", max_steps=6)
    one = finetune(settings("one", **changes)).model.parent
    other = finetune(settings("other", micro_batch_size=1, **changes)).model.parent
    assert_near(one, other)


def test_a_micro_batch_that_trains_nothing_changes_nothing(settings, base, tmp_path):
    """A long question fills rows of its own when it is split: nothing in them is trained."""
    path = write(tmp_path / "long.jsonl", [asked(i) for i in range(6)] + [{"prompt": "x" * 500, "completion": "y"}])
    changes = dict(data=(path,), too_long="split", dtype="float64", eval_share=0.0, packing=False, max_steps=4)
    one = finetune(settings("one", **changes)).model.parent
    other = finetune(settings("other", micro_batch_size=1, **changes)).model.parent
    assert_near(one, other)
    assert all(line.get("skipped") is None for line in read_log(one / "log.jsonl"))


PARALLEL = [
    {"method": "lora"},
    {"method": "lora", "optimizer": "muon"},
    pytest.param({"method": "full"}, marks=pytest.mark.slow),
    pytest.param({"method": "qlora"}, marks=pytest.mark.slow),
    pytest.param({"method": "qlora", "dora": True, "micro_batch_size": 2}, marks=pytest.mark.slow),
    pytest.param({"dora": True, "target_modules": ("all-linear", "output")}, marks=pytest.mark.slow),
    pytest.param({"trained_modules": ("tok_embeddings", "output"), "ema_decay": 0.9}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", PARALLEL)
def test_two_ranks_equal_one_process(settings, changes):
    changes = dict(dtype="float64", max_steps=6) | changes
    one, many = settings("one", **changes), settings("many", **changes)
    finetune(one)
    finish(launch(many, n=2))
    # Where a row's gradient is next to nothing AdamW divides rounding by rounding: one magnitude of 260 by 1.7e-9.
    assert_near(one.out, many.out, bound=1e-8 if changes.get("dora") else 1e-9)
    ours, theirs = (logits(store.load(config.out / "model")) for config in (one, many))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # adapters are stored in float32


@pytest.mark.slow
def test_two_ranks_in_bfloat16(settings):
    """Sharded float32 weights beside whole NF4 blocks that are computed with in bfloat16."""
    changes = dict(method="qlora", dtype=None, optimizer=None, max_steps=6)
    one, many = settings("one", **changes), settings("many", **changes)
    finetune(one)
    finish(launch(many, n=2))
    for a, b in zip(curve(one.out), curve(many.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)  # eight bits


RANDOM = dict(lora_dropout=0.3, neftune_alpha=5.0)
EIGHT_BITS = dict(optimizer="adamw8bit", lora_r=128, trained_modules=("tok_embeddings",))
"""Matrices of 128 x 32 and more, so that their averages are in 8 bits."""


STATES = [
    RANDOM,
    RANDOM | EIGHT_BITS,
    {"method": "full", "optimizer": "adamw8bit"},
    {"optimizer": "muon", "dora": True},
    {"method": "qlora", "dtype": None, **EIGHT_BITS},
]


@pytest.mark.parametrize("changes", STATES)
def test_stopping_and_going_on_equals_never_stopping(settings, changes, monkeypatch):
    """In one process, for every kind of state; the kill below is the real thing."""
    whole = finetune(settings("whole", max_steps=6, eval_every=2, **changes)).model.parent
    split = settings("split", max_steps=6, eval_every=2, **changes)
    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, *a, **k: step(self, *a, **k | {"stop": self.n_done == 3}))
        assert finetune(split).stopped_by
    torch.rand(3)
    assert finetune(split.model_copy(update={"resume": True})).n_steps == 6
    assert_same(whole, split.out)


def test_killed_and_resumed_equals_never_killed(settings):
    changes = dict(max_steps=14, save_every=4, **RANDOM, **EIGHT_BITS)
    whole, killed = settings("whole", **changes), settings("killed", **changes)
    finetune(whole)
    process = launch(killed)
    while len(curve(killed.out) if (killed.out / "log.jsonl").exists() else []) < 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (killed.out / "model").exists()
    finetune(killed.model_copy(update={"resume": True}))
    assert_same(whole.out, killed.out)
    ours, theirs = ((config.out / "model" / "adapter_model.safetensors").read_bytes() for config in (whole, killed))
    assert ours == theirs


# What a dry run says, and what is refused


def run(*arguments, monkeypatch, capsys):
    """The command in this process: its exit code and what it says."""
    monkeypatch.setattr(sys, "argv", ["llama2", "finetune", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    out, said = capsys.readouterr()
    assert out == ""
    return code, said


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def flags(config):
    """Return settings as flags."""
    given = {name: getattr(config, name) for name in config.model_fields_set - {"model", "data"}}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return [config.model, *(part for path in config.data for part in ("--data", path)), *sum(pairs, ())]


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_says_what_the_run_does_and_writes_nothing(settings, command, trained, method):
    config = settings(method=method, max_steps=None)
    code, said = command(*flags(config), "--dry-run")
    assert code == 0 and not config.out.exists() and not trained
    steps = int(said.split("steps")[1].split()[0].replace(",", ""))
    n_trained = int(said.split("\ntrained")[1].split()[0].replace(",", ""))
    assert f"{steps * 8 * 64:,} positions" in said and "GiB per process at its peak" in said
    assert "60 examples (prompt-completion)" in said
    outcome = finetune(config)
    assert outcome.n_steps == steps
    assert sum(each.numel() for each in trained[0].parameters() if each.requires_grad) == n_trained


def test_show_prints_what_is_trained(settings, command):
    code, said = command(*flags(settings()), "--show", "2", "--dry-run")
    assert code == 0 and said.count("[[") == 2
    assert "sums.jsonl:1  33 tokens, 4 trained\n<s> [INST] Add 0 and 0. [/INST][[ 0 </s>]]" in said


def test_nothing_written_by_hand_is_lost_between_file_and_flags(settings, command, tmp_path):
    """run.toml of a run is itself a --config, whatever the method made of the settings."""
    outcome = finetune(settings(method="full", max_steps=1))
    again = tmp_path / "again"
    code, said = command("--config", outcome.model.parent / "run.toml", "--out", again)
    assert code == 0, said
    assert (again / "model" / "model.safetensors").read_bytes() == (outcome.model / "model.safetensors").read_bytes()


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
BAD_ROLE = {"messages": [{"role": "usr", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
REFUSED = [
    ({"data": ()}, None, "name files of examples with --data"),
    ({"data": ("nowhere.jsonl",)}, None, "nowhere.jsonl does not exist"),
    ({}, [asked(1), '{"prompt": \n'], "data.jsonl:2: broken JSON"),
    ({}, [asked(1), CHAT], "data.jsonl:2: mixed formats: this record is 'messages'"),
    ({}, [CHAT, BAD_ROLE], "data.jsonl:2: messages[0]: the role is 'usr', wanted one of system, user"),
    ({}, [{"prompt": "x" * 100, "completion": "y"}, asked(1)], "data.jsonl:1 has 121 tokens and a row holds 65"),
    ({}, [{"question": "a"}], "a record of no known format; its keys are 'question'"),
    ({"eval_share": 0.5}, [asked(1)], "has 1 examples, too few to set 0.5 of them aside"),
    ({"eval_share": 1.0}, None, "eval_share=1.0: wanted a share"),
    ({"eval_data": "nowhere.jsonl"}, None, "nowhere.jsonl does not exist"),
    ({"early_stop": 2, "eval_share": 0.0}, None, "early_stop needs something to judge by"),
    ({"model": "nobase"}, None, "nobase"),
    ({"model": ""}, None, "which checkpoint?"),
    ({"sequence_length": 97}, None, "sequence_length=97 is beyond the context of"),
    ({"tensor_parallel": 2}, None, "tensor_parallel=2 does not split adapters"),
    ({"weights": (1.0, 2.0)}, None, "2 weights for 1 data sets"),
    ({"method": "full", "lora_r": 16}, None, "lora_r=16: needs an adapter, not method=full"),
    ({"method": "full", "rslora": True}, None, "rslora=True: needs an adapter"),
    ({"trained_modules_lr": 1e-4}, None, "trained_modules_lr=0.0001 needs trained_modules"),
    ({"target_modules": ("wz",)}, None, "target_modules names 'wz'"),
    ({"lora_dropout": 0.1, "target_modules": ("output",)}, None, "cannot be had on 'output'"),
    ({"lora_r": 0}, None, "lora_r=0: wanted at least 1"),
    ({"replay_share": 0.5}, None, "replay_share=0.5: needs replay"),
    ({"replay": ("nowhere",)}, None, "nowhere does not exist"),
    ({"warmup_steps": 8}, None, "leaves nothing of the 8 steps"),
    ({"chat_format": "lama2"}, None, "did you mean 'llama2'"),
    ({"data_format": "alpca"}, None, "did you mean 'alpaca'"),
    ({"max_steps": 3, "n_epochs": 3.0}, None, "say different things"),
    ({"out": None}, None, "--out"),
]


@pytest.mark.parametrize(
    ("changes", "records", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_work_is_refused_in_one_line(settings, command, tmp_path, monkeypatch, changes, records, said):
    monkeypatch.chdir(tmp_path)
    if records is not None:
        changes = changes | {"data": (write(tmp_path / "data.jsonl", records),)}
    config = settings(**changes)
    path = tmp_path / "settings.toml"
    path.write_text(tomli_w.dumps(plain(config)))
    before = set(tmp_path.iterdir())
    code, error = command("--config", path)
    last = error.splitlines()[-1]
    assert code == 2 and last.startswith("llama2: error: ") and said in last
    assert error.count("llama2: error") == 1 and "Traceback" not in error
    assert set(tmp_path.iterdir()) == before


def test_replay_of_another_tokenizer_is_refused(settings, command, tmp_path):
    pocket = pocket_tokenizer().vocabulary
    other = Tokenizer(replace(pocket, pieces=(*pocket.pieces[:3], *pocket.pieces[3:259][::-1], pocket.pieces[259])))
    with ShardWriter(tmp_path / "other", "00000", dtype=token_dtype(260)) as writer:
        writer.add(other.encode("Once upon a time", bos=True, eos=True), 16)
    write_index(tmp_path / "other", other, [writer.entry])
    config = settings()
    code, said = command(*flags(config), "--replay", tmp_path / "other")
    assert code == 2 and "other was made with another tokenizer than the model's: id 3 is '<0xFF>' there" in said
    assert not config.out.exists()


def test_a_tokenizer_larger_than_the_model_is_refused(settings, base, tmp_path):
    store.save(build(ModelConfig(**{**vars(SHAPE), "vocab_size": 200})), tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((base / "base" / name).read_bytes())
    with pytest.raises(ConfigError, match="has 260 pieces, the model vocab_size=200: they do not belong together"):
        finetune(settings(model=str(tmp_path / "small")))


def test_the_real_command_refuses_with_a_suggestion(settings):
    done = finish(launch(settings(), "--lora-rr", "4"), expected=2)
    assert "--lora-rr" in done and "Did you mean --lora-r?" in done and done.count("\n") == 1


WIDE = ModelConfig(
    dim=512, n_layers=8, n_heads=8, vocab_size=8000, ffn_dim=1376, n_kv_heads=8, context_length=512
)  # fmt: skip
PEAK = """
import sys, tomllib
from llama2.train.finetune import finetune
from llama2.train.finetune_config import FinetuneConfig
finetune(FinetuneConfig(**tomllib.load(open(sys.argv[1], "rb"))))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.evidence
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("method", METHODS)
def test_the_memory_that_a_dry_run_says_is_what_it_takes(settings, command, tmp_path, method):
    """Within 35 %: what the heap keeps of freed products is no law. 25 million weights, 4 rows of 512 tokens."""
    store.save(build(WIDE), tmp_path / "wide", tokenizer=pocket_tokenizer())
    data = write(tmp_path / "long.jsonl", [asked(i, "it is so, " * 30) for i in range(60)])
    config = settings(model=str(tmp_path / "wide"), data=(data,), method=method, batch_size=4, max_steps=2)
    config = config.model_copy(update={"sequence_length": 512, "dtype": "bfloat16" if method == "qlora" else "float32"})
    code, said = command(*flags(config), "--dry-run")
    assert code == 0
    expected = float(said.split("\nmemory")[1].split()[1]) * 2**20
    path = tmp_path / "settings.toml"
    path.write_text(tomli_w.dumps(plain(config)))
    done = subprocess.run([sys.executable, "-c", PEAK, path], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected == pytest.approx(int(done.stdout), rel=0.35)
