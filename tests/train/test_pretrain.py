"""The real command: what it writes, what it refuses, and that killing it changes nothing."""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tomli_w
import torch

import llama2
from llama2.checkpoint.resume import SavedState
from llama2.data.loader import Loader
from llama2.data.shards import ShardWriter, open_shards, token_dtype, write_index
from llama2.errors import CheckpointError, ConfigError, DataError, TrainingError
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import pretrain as module
from llama2.train.folder import plain
from llama2.train.metrics import read_log
from llama2.train.pretrain import pretrain
from tests.pocket import pocket_tokenizer

COMMAND = [sys.executable, "-m", "llama2", "pretrain"]


def write_toml(config):
    path = config.out.with_suffix(".toml")
    path.write_text(tomli_w.dumps(plain(config)))
    return path


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def launch(config, *flags, n=1, **options):
    """Start the command as a user does; with n > 1 through torchrun."""
    start = COMMAND if n == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                    f"--nproc-per-node={n}", "-m", "llama2", "pretrain"]  # fmt: skip
    command = [*start, "--config", str(write_toml(config)), *flags]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, **options)


def finish(process, expected=0):
    _, said = process.communicate(timeout=200)
    assert process.returncode == expected, said
    return said


def curve(out):
    """What was learnt, without what a clock says."""
    lines = [line for line in read_log(out / "log.jsonl") if line["kind"] in ("step", "evaluation")]
    return [{k: v for k, v in line.items() if k in ("step", "loss", "grad_norm", "learning_rate")} for line in lines]


def state(out):
    saved = SavedState(sorted((out / "checkpoints").glob("step-*"))[-1] / "state")
    return {name: saved.read(name) for name in saved.shapes}


def assert_same(one, other):
    assert curve(one) == curve(other)
    first, second = state(one), state(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_a_model_a_log_and_a_report(settings, report):
    outcome = pretrain(settings(save_every=5, eval_every=4, sample_every=6, keep_last=2, tensorboard=True))
    out = outcome.model.parent
    assert outcome.n_steps == 12 and outcome.stopped_by == 0
    losses = [line["loss"] for line in read_log(out / "log.jsonl") if line["kind"] == "step"]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.3
    assert len(list((out / "checkpoints").iterdir())) in (2, 3)
    page = (out / "report.html").read_text()
    assert (
        page.count("<svg") == 4
        and "bits per byte" in page
        and "http" not in re.sub(r"www\.w3\.org|http://purl", "", page)[:200]
    )
    assert {path.name for path in out.glob("*.png")} == {
        f"{name}.png" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s")
    }
    assert list((out / "tensorboard").iterdir())
    assert isinstance(llama2.load(str(outcome.model)).generate("One", max_new_tokens=3, seed=0), str)
    record = json.loads((sorted((out / "checkpoints").iterdir())[-1] / "run.json").read_text())
    assert {"llama2", "torch", "python"} <= set(record["versions"]) and record["settings"]["seed"] == 0


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"early_stop": 1, "eval_every": 1, "learning_rate": 3.0}])
def test_the_evaluation_is_that_of_the_published_model(settings, shards, changes):
    outcome = pretrain(settings(eval_tokens=10**9, **changes))
    held_out = open_shards(shards / "heldout")
    llm, total, count = llama2.load(str(outcome.model)), 0.0, 0
    for i in range(len(held_out)):
        ids = torch.tensor(held_out.document(i).astype("int64"))
        for start in range(0, len(ids) - 1, 48):
            piece = ids[start : start + 49]
            logprobs = llm.model(piece[None, :-1]).log_softmax(-1)
            total -= float(logprobs[0].gather(-1, piece[1:, None]).sum().detach())
            count += len(piece) - 1
    assert outcome.evaluation.loss == pytest.approx(total / count, rel=1e-5)
    assert outcome.evaluation.values["bits_per_byte"] == pytest.approx(
        total / 0.6931471805599453 / int(held_out.n_bytes.sum()), rel=1e-5
    )


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_1x8_equals_8x1(settings, micro):
    one = pretrain(settings("one", dtype="float64")).model.parent
    other = pretrain(settings("other", dtype="float64", micro_batch_size=micro)).model.parent
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    first, second = state(one), state(other)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"optimizer": "muon", "ema_decay": 0.9, "dropout": 0.1}]
)
def test_stopping_and_going_on_equals_never_stopping(settings, changes, monkeypatch):
    """In one process, for every kind of state; the kills below are the real thing."""
    whole = pretrain(settings("whole", eval_every=5, **changes)).model.parent
    split = settings("split", eval_every=5, **changes)
    step = module.Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "step", lambda self, *a, **k: step(self, *a, **k | {"stop": self.n_done == 6}))
        assert pretrain(split).stopped_by
    monkeypatch.undo()
    torch.rand(3)
    assert pretrain(split.model_copy(update={"resume": True})).n_steps == 12
    a, b = [[line for line in curve(out) if "learning_rate" in line] for out in (whole, split.out)]
    assert a == b
    first, second = state(whole), state(split.out)
    assert all(torch.equal(first[name], second[name]) for name in first)


def killed_and_resumed(config, rng, n_kills):
    """Kill the run at a random moment of each of so many parts of it; then let it finish, in this process."""
    for part in range(n_kills):
        at = 0.95 * config.max_steps * (part + rng.random()) / n_kills  # before it has written what comes out
        process = launch(config, "--resume")
        while process.poll() is None and last_step(config.out) < at:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        process.kill()
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
    pretrain(config.model_copy(update={"resume": True}))


def last_step(out):
    return max((line["step"] for line in read_log(out / "log.jsonl") if line["kind"] == "step"), default=0)


def long(settings, name):
    # More than one pass over the data, so that kills fall before and after its end.
    return settings(name, max_steps=90, save_every=4, eval_every=7, keep_last=1)


def test_killed_at_random_and_resumed_equals_never_killed(settings):
    whole, killed = long(settings, "whole"), long(settings, "killed")
    pretrain(whole)
    killed_and_resumed(killed, random.Random(5), 2)
    assert_same(whole.out, killed.out)


@pytest.mark.evidence
@pytest.mark.timeout(1800)
def test_killed_twenty_times_and_resumed_equals_never_killed(settings):
    whole, killed = long(settings, "whole"), long(settings, "killed")
    pretrain(whole)
    killed_and_resumed(killed, random.Random(1), 20)
    assert_same(whole.out, killed.out)


@pytest.mark.slow
def test_a_launcher_that_signals_twice_loses_nothing(settings):
    config = settings(max_steps=100_000)
    process = launch(config, n=2, start_new_session=True)
    while len(read_log(config.out / "log.jsonl")) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # torchrun gets it and passes it on to ranks that have it already
    process.communicate(timeout=100)
    last = [line["step"] for line in read_log(config.out / "log.jsonl") if line["kind"] == "step"][-1]
    assert (config.out / "checkpoints" / f"step-{last:08}" / "run.json").is_file()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_signals_save_and_leave(settings, number):
    config = settings(max_steps=100_000)
    process = launch(config)
    while len(read_log(config.out / "log.jsonl")) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    said = finish(process, expected=128 + number)
    assert "go on with --resume" in said and "Traceback" not in said
    last = [line["step"] for line in read_log(config.out / "log.jsonl") if line["kind"] == "step"][-1]
    assert (config.out / "checkpoints" / f"step-{last:08}").is_dir()


@pytest.mark.parametrize(
    ("both", "changes"),
    [
        ({}, {}),
        ({"dropout": 0.2}, {"tensor_parallel": 2}),  # ranks with the same activations drop the same
        pytest.param({}, {"activation_checkpointing": "full", "micro_batch_size": 2}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "muon"}, {}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_process(settings, both, changes):
    one = settings("one", dtype="float64", max_steps=20, **both)
    pretrain(one)
    many = settings("many", dtype="float64", max_steps=20, **both, **changes)
    finish(launch(many, n=2))
    for a, b in zip(curve(one.out), curve(many.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    first, second = state(one.out), state(many.out)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_learn_the_same(settings):
    """By the real command: the shape checks of these tests would be compiled too."""
    plain, compiled = settings("plain"), settings("compiled", compile=True)
    pretrain(plain)
    finish(launch(compiled))
    for a, b in zip(curve(plain.out), curve(compiled.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_equal_one_process_in_float32(settings):
    one, two = settings("one", max_steps=20), settings("two", max_steps=20)
    pretrain(one)
    finish(launch(two, n=2))
    for a, b in zip(curve(one.out), curve(two.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"ema_decay": 0.9, "eval_every": 3}])
def test_two_ranks_resume_bit_for_bit(settings, changes):
    whole, split = settings("whole", **changes), settings("split", save_every=6, keep_last=9, **changes)
    for config in (whole, split):
        finish(launch(config, n=2))
    shutil.rmtree(split.out / "checkpoints" / "step-00000012")
    finish(launch(split, "--resume", n=2))
    ours, theirs = ([line for line in curve(out) if "learning_rate" in line] for out in (whole.out, split.out))
    assert ours == theirs
    first, second = state(whole.out), state(split.out)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_another_world_size_goes_on_with_the_same_data(settings):
    """Four ranks (2 data x 2 tensor) are stopped half way; one process, and two, go on."""
    whole = settings("whole", dtype="float64", max_steps=20)
    pretrain(whole)
    four = settings("four", dtype="float64", max_steps=20, save_every=10, keep_last=9, tensor_parallel=2)
    finish(launch(four, n=4))
    for n in (1, 2):
        half = settings(f"half-{n}", dtype="float64", max_steps=20)
        subprocess.run(["cp", "-r", four.out, half.out], check=True)
        for name in ("checkpoints/step-00000020", "model"):
            subprocess.run(["rm", "-r", half.out / name], check=True)
        finish(launch(half, "--resume", n=n))
        for a, b in zip(curve(whole.out), curve(half.out), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)


def test_a_dead_rank_ends_the_run_with_a_message(settings):
    config = settings(max_steps=100_000, timeout_s=20)
    process = launch(config, n=2, start_new_session=True)
    while len(read_log(config.out / "log.jsonl")) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = sorted(int(pid) for pid in children)
    began = time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0 and time.monotonic() - began < 90
    assert "Signal 9" in said or "SIGKILL" in said or "lost the other processes" in said


def test_an_epoch_is_the_default(settings, shards):
    outcome = pretrain(settings(max_steps=None, n_epochs=0.5))
    lines = [line for line in read_log(outcome.model.parent / "log.jsonl") if line["kind"] == "step"]
    assert lines[-1]["epoch"] == pytest.approx(0.5, abs=0.05)


def test_early_stopping_publishes_the_best(settings):
    outcome = pretrain(settings(max_steps=60, eval_every=1, save_every=1, early_stop=2, learning_rate=3.0, keep_last=9))
    out = outcome.model.parent
    losses = {line["step"]: line["loss"] for line in read_log(out / "log.jsonl") if line["kind"] == "evaluation"}
    best = min(losses, key=losses.__getitem__)
    assert outcome.n_steps < 60 and best == outcome.n_steps - 2
    published = (outcome.model / "model.safetensors").read_bytes()
    assert published == (out / "checkpoints" / f"step-{best:08}" / "model.safetensors").read_bytes()


def test_the_average_is_what_is_published(settings):
    outcome = pretrain(settings(ema_decay=0.9))
    weights = state(outcome.model.parent)
    published = llama2.load(str(outcome.model)).model.state_dict()["layers.0.feed_forward.w1.weight"]
    assert torch.equal(published, weights["averaged/layers.0.feed_forward.w1.weight"])
    assert not torch.equal(published, weights["weights/layers.0.feed_forward.w1.weight"])


def test_continued_pretraining_at_a_longer_context(settings):
    first = pretrain(settings("first"))
    none = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"))
    with pytest.raises(ConfigError, match="beyond the context of"):
        pretrain(settings("second", init_from=str(first.model), sequence_length=96, **none))
    longer = settings("second", init_from=str(first.model), sequence_length=96, rope_scaling="yarn", **none)
    outcome = pretrain(longer)
    config = llama2.load(str(outcome.model)).config
    assert config.context_length == 96 and config.rope_scaling.factor == 2.0
    again = settings("third", init_from=str(outcome.model), sequence_length=192, rope_scaling="yarn", **none)
    further = llama2.load(str(pretrain(again).model)).config.rope_scaling
    assert (further.factor, further.original_context) == (4.0, 48)
    with pytest.raises(ConfigError, match="stretched by rope_scaling=yarn already"):
        pretrain(settings("fourth", init_from=str(outcome.model), sequence_length=192, rope_scaling="linear", **none))
    with pytest.raises(ConfigError, match="rope_theta=5.0: init_from decides that"):
        pretrain(settings("fifth", init_from=str(outcome.model), rope_theta=5.0, **none))
    losses = [line["loss"] for line in read_log(longer.out / "log.jsonl") if line["kind"] == "step"]
    before = [line["loss"] for line in read_log(first.model.parent / "log.jsonl") if line["kind"] == "step"]
    assert losses[0] < before[4]  # it does not begin anew


def test_bad_steps_lead_back_and_the_data_goes_on(settings, monkeypatch):
    """In the steps that read the 8th to the 10th batch the loss is no number."""
    n_seen = 0
    real = module.next_token_loss

    def poisoned(model, batch):
        nonlocal n_seen
        n_seen += model.training
        loss, count, metrics = real(model, batch)
        return (loss * float("nan") if model.training and 8 <= n_seen <= 10 else loss), count, metrics

    monkeypatch.setattr(module, "next_token_loss", poisoned)
    states = []
    step = Loader.step
    monkeypatch.setattr(Loader, "step", lambda self: states.append(self.state["n_taken"]) or step(self))
    outcome = pretrain(settings(save_every=3, max_bad_steps=3, eval_tokens=1))
    log = read_log(outcome.model.parent / "log.jsonl")
    assert [line["step"] for line in log if line["kind"] == "skipped"] == [8, 9, 10]
    assert [line["reason"] for line in log if line["kind"] == "rewind"] == ["back to step 6"]
    assert [line["step"] for line in log if line["kind"] == "step"] == [*range(1, 11), *range(7, 13)]
    assert len(set(states)) == len(states)  # no batch was read twice


def test_too_many_bad_steps_end_the_run(settings, monkeypatch):
    monkeypatch.setattr(module, "next_token_loss", lambda m, b: (module_loss(m, b) * float("nan"), 1, {}))
    with pytest.raises(TrainingError, match="5 bad steps in a row .* no checkpoint to go back to"):
        pretrain(settings())


def module_loss(model, batch):
    return model(batch.tokens).sum()


def test_a_full_disk_is_one_error_and_loses_nothing(settings):
    config = settings(max_steps=10, save_every=5)
    pretrain(config)
    newest = sorted((config.out / "checkpoints").glob("step-*"))[-1]
    size = sum(file.stat().st_size for file in newest.rglob("*"))
    more = config.model_copy(update={"max_steps": 30})

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = (newest / "state" / "00000.safetensors").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    said = finish(launch(more, "--resume", preexec_fn=small_disk), expected=2)
    assert "a checkpoint could not be written" in said and "Traceback" not in said
    assert said.count("llama2: error:") == 1 and said.splitlines()[-1].startswith("llama2: error:")
    assert sum(file.stat().st_size for file in newest.rglob("*")) == size
    assert not list((config.out / "checkpoints").glob(".step*"))
    pretrain(more.model_copy(update={"resume": True}))
    assert sorted((config.out / "checkpoints").glob("step-*"))[-1].name == "step-00000030"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"data": ()}, ConfigError, "name token shards with --data"),
        ({"data": ("nowhere",)}, DataError, "nowhere holds no token shards"),
        ({"out": None}, ConfigError, "--out"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"micro_batch_size": 3}, ConfigError, "micro_batch_size=3: does not divide the 8 rows"),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 3}, ConfigError, "is not batch_size=8"),
        ({"learning_rate": -1.0}, ConfigError, "learning_rate=-1.0"),
        ({"adam_beta2": 1.0}, ConfigError, "adam_beta2=1.0"),
        ({"dim": None}, ConfigError, "dim missing"),
        ({"dim": None, "n_layers": None, "n_heads": None}, ConfigError, "which model"),
        ({"model": "llama2-7b"}, ConfigError, "exclude each other"),
        ({"n_heads": 3}, ConfigError, "n_heads"),
        ({"sequence_length": 64, "context_length": 32}, ConfigError, "context_length=32"),
        ({"weights": (1.0, 2.0)}, ConfigError, "2 weights for 1 data sets"),
        ({"eval_data": "nowhere"}, DataError, "nowhere"),
        ({"rope_scaling": "yarn"}, ConfigError, "init_from"),
        ({"rope_factor": 2.0}, ConfigError, "needs rope_scaling"),
        ({"n_epochs": 3.0}, ConfigError, "say different things"),
        ({"warmup_steps": 12}, ConfigError, "leaves nothing of the 12 steps"),
        ({"sample_tokens": 0}, ConfigError, "sample_tokens=0"),
        ({"device": "gpu"}, TrainingError, "device='gpu' is none to train on"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(settings, changes, error, said):
    config = settings().model_copy(update=changes)
    with pytest.raises(error, match=said):
        pretrain(config.model_validate(config.model_dump()))
    assert config.out is None or not config.out.exists()


def test_another_tokenizers_shards_are_refused(settings, shards, tmp_path):
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", shards, other], check=True)
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(DataError, match="another tokenizer"):
        pretrain(settings(data=(shards, other)))
    first = pretrain(settings("first"))
    (other / "index.json").write_text(json.dumps(index | {"n_vocab": 999}))
    none = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"))
    with pytest.raises(DataError, match="999 token ids, the model vocab_size=260"):
        pretrain(settings("second", data=(other,), init_from=str(first.model), **none))


def test_an_occupied_or_unwritable_folder_is_refused(settings, tmp_path):
    config = settings()
    pretrain(config)
    with pytest.raises(TrainingError, match="is not empty; add --resume"):
        pretrain(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file"):
        pretrain(settings("file"))
    with pytest.raises(llama2.Llama2Error, match="cannot"):
        pretrain(config.model_copy(update={"out": tmp_path / "file" / "run"}))


def test_data_of_another_tokenizer_is_refused_for_a_trained_model(settings, tmp_path):
    """As many pieces, but other ones."""
    folder, pocket = tmp_path / "other", pocket_tokenizer().vocabulary
    pieces = (*pocket.pieces[:3], *pocket.pieces[3:259][::-1], pocket.pieces[259])
    other = Tokenizer(dataclasses.replace(pocket, pieces=pieces))
    folder.mkdir()
    with ShardWriter(folder, "00000", dtype=token_dtype(260)) as writer:
        writer.add(other.encode("Once upon a time", bos=True, eos=True), 16)
    write_index(folder, other, [writer.entry])
    first = pretrain(settings("first"))
    none = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads"))
    with pytest.raises(DataError, match="another tokenizer than .* id 3 is '<0xFF>' in the data"):
        pretrain(settings("second", data=(folder,), init_from=str(first.model), **none))


def test_a_finished_run_is_left_alone(settings, report):
    config = settings()
    first = pretrain(config)
    before = {
        path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.suffix in (".html", ".safetensors")
    }
    again = pretrain(config.model_copy(update={"resume": True}))
    assert again.evaluation == first.evaluation and again.n_steps == 12
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_one_rank_that_is_asked_to_stop_stops_all(settings):
    """With tensor parallelism the ranks share no data group."""
    config = settings(max_steps=100_000, tensor_parallel=2)
    process = launch(config, n=2)
    while len(read_log(config.out / "log.jsonl")) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(max(map(int, children)), signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    last = [line["step"] for line in read_log(config.out / "log.jsonl") if line["kind"] == "step"][-1]
    assert (config.out / "checkpoints" / f"step-{last:08}" / "run.json").is_file(), said


def test_a_run_cannot_become_another_on_its_way(settings):
    config = settings()
    pretrain(config)
    others = {"batch_size": 4, "seed": 1, "optimizer": "muon", "dtype": "float64", "rope_theta": 5.0, "n_heads": 2}
    for name, value in others.items():
        with pytest.raises(CheckpointError, match=f"(was trained with|is a model with) {name}="):
            pretrain(config.model_copy(update={"resume": True, "max_steps": 20, name: value}))
        assert "max_steps = 12" in (config.out / "run.toml").read_text()  # nothing was changed


def test_a_broken_checkpoint_is_named(settings):
    config = settings()
    out = pretrain(config).model.parent
    (file,) = out.glob("checkpoints/*/state/00000.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="00000.safetensors is broken"):
        pretrain(config.model_copy(update={"resume": True, "max_steps": 20}))


def test_settings_come_from_defaults_file_and_flags_in_this_order(settings, here):
    config = settings(max_steps=3)
    done = here("pretrain", "--config", write_toml(config), "--max-steps", "2", "--no-packing")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    resolved = (config.out / "run.toml").read_text()
    assert "max_steps = 2" in resolved and "packing = false" in resolved and "dim = 16" in resolved


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat = 1", "'learning_rat' is not a setting, did you mean 'learning_rate'?"),
        ("learning_rate = 'fast'", "learning_rate='fast'"),
        ("learning_rate = ", "cannot be read as TOML"),
        ("optimizer = 'adam'", "optimizer='adam'"),
    ],
)
def test_a_wrong_file_is_one_line(here, tmp_path, text, said):
    path = tmp_path / "run.toml"
    path.write_text(text)
    done = here("pretrain", "--config", path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--learning-rate", "fast"), "--learning-rate fast: input should be a valid number"),
        (("--learning-rat", "1"), "Did you mean --learning-rate?"),
        (("--optimizer", "adam"), "--optimizer"),
    ],
)
def test_a_wrong_flag_is_one_line(here, flags, said):
    done = here("pretrain", *flags)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.count("\n") == 1 and "pydantic" not in done.stderr
