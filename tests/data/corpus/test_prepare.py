"""The whole of `llama2 prepare`, in real processes: killed, restarted, divided, fed with what is broken."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama2.data.corpus import plan
from llama2.data.corpus.prepare import PrepareConfig, prepare
from llama2.data.shards import open_shards
from llama2.data.storyworld.raw import Dirt, write_raw
from llama2.data.storyworld.stories import stories, story
from llama2.errors import DataError, Llama2Error
from llama2.tokenizer.formats import load_tokenizer, save_tokenizer
from llama2.tokenizer.train import train_tokenizer

UNIT_BYTES = 40_000
RUN = f"""
import sys
from llama2.data.corpus import plan
plan.MIN_UNIT_BYTES = {UNIT_BYTES}
plan.MIN_SHARD_BYTES = {2 * UNIT_BYTES}
from llama2.__main__ import main
sys.argv[0] = "llama2"
main()
"""
"""The command, with units small enough that little text makes many."""


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", UNIT_BYTES)
    monkeypatch.setattr(plan, "MIN_SHARD_BYTES", 2 * UNIT_BYTES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [story.text(language) for story in stories(0, 100) for language in ("en", "es", "zh")]
    save_tokenizer(train_tokenizer(texts, vocab_size=1200), folder, format="model")
    return folder / "tokenizer.model"


def essay(rng, n_words=120):
    words = ["the", "of", "and", "to", "in", "that", "was", "it"]
    drawn = [
        rng.choice(words) if rng.random() < 0.4 else "".join(rng.choices("aeioubdglmnrst", k=6)) for _ in range(n_words)
    ]
    return " ".join(drawn) + "."


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """About 1.5 MB in four formats and seventeen files: essays, copies, near copies, dirt."""
    folder = tmp_path_factory.mktemp("raw")
    rng = random.Random(0)
    essays = [essay(rng, rng.randrange(60, 250)) for _ in range(1200)]
    (folder / "a.txt").write_text("\n\n".join(essays[:300]))
    lines = [*essays[300:800], "too short", *essays[:40], *(each + " And more." for each in essays[40:80])]
    lines += [f"{each} Write to someone@example.com." for each in essays[800:900]]
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines) + "{broken\n")
    for number in range(15):
        own = essays[900 + 20 * number : 920 + 20 * number]
        (folder / f"c{number:02}.jsonl.gz").write_bytes(
            gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in own).encode(), mtime=0)
        )
    return folder


def config(raw, tokenizer, out, **more):
    settings = dict(document_separator="\\n\\n", heldout_share=0.1, workers=1)
    return PrepareConfig(raw=(raw,), out=out, tokenizer=tokenizer, **{**settings, **more})


def command(raw, tokenizer, out, *more):
    words = ["prepare", raw, "--tokenizer", tokenizer, "--out", out, "--document-separator", "\\n\\n"]
    return [sys.executable, "-c", RUN, *map(str, words), "--heldout-share", "0.1", *map(str, more)]


@pytest.fixture(scope="module")
def whole(raw, tokenizer, tmp_path_factory):
    """An uninterrupted run of one worker."""
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(raw, tokenizer, out, "--workers", 1), check=True, capture_output=True)
    return out


def contents(out):
    """Every file of a result but the two that hold paths and seconds."""
    names = ("report.json", "prepare.toml")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in names
    }


def report_of(out):
    report = json.loads((out / "report.json").read_text())
    for stage in ("extract", "dedup", "tokenise"):
        del report[stage]["seconds"]
    return {**report, "out": None}


def test_what_goes_in_comes_out_as_tokens(whole, raw, tokenizer):
    shards, heldout = open_shards(whole), open_shards(whole / "heldout")
    vocabulary = load_tokenizer(tokenizer)
    rng = random.Random(0)
    essays = {essay(rng, rng.randrange(60, 250)) for _ in range(1200)}
    found = []
    for each in (shards, heldout):
        for number in range(len(each)):
            ids = each.document(number).tolist()
            assert ids[0] == vocabulary.bos_id and ids[-1] == vocabulary.eos_id
            found.append(vocabulary.decode(ids))
            assert len(found[-1].encode()) == each.n_bytes[number]
    assert len(found) == len(set(found)) == 1200
    plain = {text.replace(" Write to [EMAIL].", "") for text in found}
    assert plain == essays
    assert 80 < len(heldout) < 160
    assert not (whole / "work").exists()
    names = {path.name for path in whole.iterdir()}
    assert {"index.json", "report.json", "prepare.toml", "tokenizer.model", "heldout"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_the_report_adds_up(whole):
    report = json.loads((whole / "report.json").read_text())
    extract, drops = report["extract"], report["dedup"]["drops"]
    n_read, n_kept = (sum(each["documents"] for each in extract[key].values()) for key in ("read", "kept"))
    assert n_read == n_kept + sum(each["documents"] for each in extract["drops"].values())
    assert extract["drops"].keys() == {"too_few_words"} and extract["problems"]["broken_line"]["documents"] == 1
    assert drops["exact_copy"]["documents"] == 40 and drops["near_copy"]["documents"] == 40
    assert "b.jsonl" in drops["near_copy"]["examples"][0] and "a.txt:41:" in drops["near_copy"]["examples"][0]
    assert len(drops["near_copy"]["examples"]) == 3
    assert extract["changes"]["personal_data:EMAIL"]["documents"] == 100
    n_left = n_kept - 80
    assert report["train"]["n_documents"] + report["heldout"]["n_documents"] == n_left == 1200
    (source,) = report["sources"].values()
    assert source["tokens"] == report["train"]["n_tokens"] + report["heldout"]["n_tokens"]
    assert source["documents"] == n_left


def test_two_workers_give_the_same_bytes(whole, raw, tokenizer, tmp_path):
    prepare(config(raw, tokenizer, tmp_path / "out", workers=2))
    assert contents(tmp_path / "out") == contents(whole)
    assert report_of(tmp_path / "out") == report_of(whole)


def test_two_machines_give_the_same_bytes(whole, raw, tokenizer, tmp_path):
    out = tmp_path / "out"
    arguments = ("--workers", 1, "--world-size", 2, "--rank")
    second = subprocess.Popen(command(raw, tokenizer, out, *arguments, 1), stderr=subprocess.PIPE, text=True)
    first = subprocess.run(command(raw, tokenizer, out, *arguments, 0), stderr=subprocess.PIPE, text=True)
    _, said = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "rank 1 waits for rank 0: dedup" in said and "rank 1 is done" in said
    assert contents(out) == contents(whole) and report_of(out) == report_of(whole)


STAGES = {"extract": "parts/0*", "dedup": "dedup/band-0*.npy", "tokenise": "shards/*.json"}


def children_of(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found] + [each for child in found for each in children_of(int(child))]


def run_and_kill(words, work, pattern):
    """Start a command, kill it with signal 9 when the first file of a pattern is there; return what then lay there."""
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not list(work.glob(pattern)):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.01)
    return {path: path.stat().st_mtime_ns for path in work.glob(pattern) if not path.name.startswith(".")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_in_every_stage_and_restarted_it_gives_the_same_bytes(whole, raw, tokenizer, tmp_path, n_workers):
    out = tmp_path / "out"
    words = command(raw, tokenizer, out, "--workers", n_workers, "--keep-work")
    done = {}
    for stage, pattern in STAGES.items():
        assert not list((out / "work").glob(pattern)), f"{stage} was begun too early"
        done |= run_and_kill(words, out / "work", pattern)
        assert not (out / "index.json").exists()
    assert len(done) >= 3
    subprocess.run(words, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished unit was done again"
    shutil.rmtree(out / "work")
    assert contents(out) == contents(whole) and report_of(out) == report_of(whole)


def test_a_finished_preparation_is_not_done_again(whole, raw, tokenizer):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    done = subprocess.run(command(raw, tokenizer, whole, "--workers", 2), capture_output=True, text=True)
    assert done.returncode == 0 and "near_copy" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_another_configuration_in_the_same_folder_is_refused(whole, raw, tokenizer, tmp_path):
    before = contents(whole)
    for change, said in (
        ({"min_words": 51}, "min_words=50, now it is 51"),
        ({"languages": ("en",)}, "languages"),
        ({"heldout_share": 0.2}, "heldout_share"),
    ):
        with pytest.raises(DataError, match=said):
            prepare(config(raw, tokenizer, whole, **change))
    with pytest.raises(DataError, match="raw files"):
        prepare(config(raw / "a.txt", tokenizer, whole))
    other = tmp_path / "tokenizer.model"
    save_tokenizer(train_tokenizer(["another text"] * 3, vocab_size=280), tmp_path, format="model")
    with pytest.raises(DataError, match="tokenizer"):
        prepare(config(raw, other, whole))
    assert contents(whole) == before


def test_two_runs_at_once_in_one_folder_are_refused(raw, tokenizer, tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen(command(raw, tokenizer, out), stderr=subprocess.DEVNULL)
    while not (out / "work" / "rank-0.lock").exists():
        time.sleep(0.002)
    time.sleep(0.05)  # the file is there before it is locked
    first.send_signal(signal.SIGSTOP)  # or it may be done before the second has begun, where the machine is busy
    second = subprocess.run(command(raw, tokenizer, out), capture_output=True, text=True)
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert second.returncode == 2 and "another llama2 prepare" in second.stderr


def test_a_killed_worker_is_one_clear_error_and_can_be_gone_on_from(raw, tokenizer, tmp_path, whole):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(raw, tokenizer, out, "--workers", 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list((out / "work").glob("parts/0*")):
        time.sleep(0.002)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "out of memory" in said and "Traceback" not in said
    assert said.splitlines()[-1].startswith("llama2: error: a worker process ended")
    subprocess.run(command(raw, tokenizer, out, "--workers", 2), check=True, capture_output=True)
    assert contents(out) == contents(whole)


def test_planted_contamination_and_wrong_languages_are_gone(tmp_path, tokenizer):
    told = list(stories(0, 200))
    (tmp_path / "raw.jsonl").write_text(
        "".join(
            json.dumps({"text": " ".join(story.text(lang) for story in told[n : n + 3])}) + "\n"
            for lang in ("en", "es", "zh")
            for n in range(0, 198, 3)
        )
    )
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"q": story.text("en")}) + "\n" for story in told[::30]))
    settings = dict(decontaminate=(tmp_path / "eval.jsonl",), languages="en,zh", heldout_share=0.0, dedup_threshold=1.0)
    settings["skip_rules"] = ("top_run", "repeated_runs")
    report = prepare(config(tmp_path / "raw.jsonl", tokenizer, tmp_path / "out", **settings))
    drops = report["extract"]["drops"]
    assert drops["other_language"]["documents"] == 66
    assert drops["contaminated"]["documents"] >= 7
    shards = open_shards(tmp_path / "out")
    texts = [shards.tokenizer().decode(shards.document(n).tolist()) for n in range(len(shards))]
    assert not [text for text in texts for story in told[::30] if story.text("en") in text]
    assert sum("\u3002" in text for text in texts) == 66
    assert not (tmp_path / "out/heldout").exists()


def test_of_a_dirty_world_the_dirt_is_gone_and_the_stories_stay(tmp_path, tokenizer):
    """Judged by the list of what was planted: every kind, in text, JSON lines, pages and an archive."""
    pytest.importorskip("fastwarc")
    pytest.importorskip("trafilatura")
    n_stories = 60
    dirt = Dirt(contamination=0.04)
    write_raw(tmp_path / "raw", tmp_path / "planted.jsonl", n_stories=n_stories, n_heldout=20, dirt=dirt)
    leaked = [
        story(0, number, split="heldout").text(language) for number in range(20) for language in ("en", "es", "zh")
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in leaked))
    settings = dict(languages=("en", "es", "zh"), min_words=20, heldout_share=0.0, decontamination_words=40)
    settings |= dict(decontaminate=(tmp_path / "eval.jsonl",), workers=2)
    report = prepare(config(tmp_path / "raw", tokenizer, tmp_path / "out", **settings))
    shards = open_shards(tmp_path / "out")
    texts = [shards.tokenizer().decode(shards.document(n).tolist()) for n in range(len(shards))]
    whole = "\n".join(texts)
    plants = [json.loads(line) for line in (tmp_path / "planted.jsonl").read_text().splitlines()]
    assert {plant["kind"] for plant in plants} >= {"exact_duplicate", "contamination", "foreign", "boilerplate"}
    for plant in plants:
        assert not [line for line in plant.get("lines", ()) if line in whole]
        assert not [secret for secret in plant.get("secrets", {}).values() if secret in whole]
    assert not [text for text in leaked if text in whole]
    assert not re.search(
        "[\u00c3\u00c2\u00e2][\u0080-\u00bf\u20ac]|\u00e6\u2014|Il \u00e9tait une fois|Es war einmal", whole
    )
    assert len(texts) == len(set(texts))
    kept = sum(told.text(language) in whole for told in stories(0, n_stories) for language in ("en", "es", "zh"))
    n_near = report["dedup"]["drops"]["near_copy"]["documents"]
    assert kept > 0.9 * 3 * n_stories - n_near


def test_broken_archives_are_counted_and_the_rest_goes_on(tmp_path, tokenizer, assets):
    pytest.importorskip("fastwarc")
    folder = tmp_path / "raw"
    shutil.copytree(assets / "web/warc", folder)
    (folder / "example-bad.warc.gz.bad").rename(folder / "example-bad.warc.gz")
    (folder / "none.jsonl.gz").write_bytes(b"no gzip")
    (folder / "none.parquet").write_bytes(b"no parquet")
    report = prepare(config(folder, tokenizer, tmp_path / "out", min_words=20, document_separator=None))
    broken = report["extract"]["problems"]["broken_file"]
    assert broken["documents"] == 3
    assert [example.split(":")[0] for example in broken["examples"]] == [
        "example-trunc.warc",
        "none.jsonl.gz",
        "none.parquet",
    ]
    assert report["train"]["n_documents"] > 15


def mistakes(tmp_path, raw, tokenizer):
    """Name -> (arguments after `llama2 prepare`, what the error says)."""
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "short.txt").write_text("Nothing much.")
    (tmp_path / "fields.jsonl").write_text('{"body": "x", "title": "y"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "key.toml").write_text("min_wrods = 3\n")
    (tmp_path / "value.toml").write_text('min_words = "many"\n')
    out, good = ["--out", tmp_path / "out"], ["--tokenizer", tokenizer]
    return {
        "a file that does not exist": ([tmp_path / "none.txt", *out, *good], "none.txt does not exist"),
        "an unknown kind": ([tmp_path / "a.pdf", *out, *good], "a.pdf is of an unknown kind"),
        "no raw text": ([*out, *good], "no raw text named"),
        "an empty corpus": ([tmp_path / "empty.txt", *out, *good], "nothing but empty files"),
        "a corpus of blank lines": ([tmp_path / "blank.jsonl", *out, *good], "nothing is left of 0 documents"),
        "a corpus that is all dropped": ([tmp_path / "short.txt", *out, *good], "too_few_words 1"),
        "another field": ([tmp_path / "fields.jsonl", *out, *good], "it has body, title: name one by --text-field"),
        "no tokenizer": ([raw, *out], "no tokenizer named"),
        "no out": ([raw, *good], "no out named"),
        "a missing tokenizer": ([raw, *out, "--tokenizer", tmp_path / "none.model"], "none.model does not exist"),
        "a folder with other files": ([raw, "--out", tmp_path / "full", *good], "not a folder of llama2 prepare"),
        "out within raw": ([raw, "--out", raw / "out", *good], "lie in each other"),
        "a rank too high": ([raw, *out, *good, "--rank", 2, "--world-size", 2], "rank=2 must be below"),
        "an unknown language": ([raw, *out, *good, "--languages", "en,xx"], "languages: 'xx'"),
        "an unknown rule": ([raw, *out, *good, "--skip-rules", "bulets"], "did you mean 'bullets'"),
        "a missing evaluation": (
            [raw, *out, *good, "--decontaminate", tmp_path / "no.jsonl"],
            "no.jsonl does not exist",
        ),
        "an empty evaluation": (
            [raw, *out, *good, "--decontaminate", tmp_path / "blank.jsonl"],
            "blank.jsonl holds no text",
        ),
        "a share of more than all": ([raw, *out, *good, "--heldout-share", "2"], "heldout-share"),
        "an unknown flag": ([raw, *out, *good, "--min-wrods", "3"], "--min-words"),
        "an unknown key": ([raw, *out, *good, "--config", tmp_path / "key.toml"], "did you mean 'min_words'"),
        "a wrong value": ([raw, *out, *good, "--config", tmp_path / "value.toml"], "min_words='many'"),
    }


def test_every_mistake_is_one_clear_error_and_leaves_nothing(tmp_path, raw, tokenizer, monkeypatch, capsys):
    from llama2.cli.main import main

    before = None
    for name, (arguments, said) in mistakes(tmp_path, raw, tokenizer).items():
        before = before or sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["llama2", "prepare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and lines[-1].startswith("llama2: error: "), name
        assert said in lines[-1], (name, lines)
        assert sorted(tmp_path.rglob("*")) == before, name
    assert not (raw / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_refused(tmp_path, raw, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(Llama2Error, match="cannot be read"):
        prepare(config(path, tokenizer, tmp_path / "out"))


def test_settings_come_from_a_file_and_flags_win(tmp_path, raw, tokenizer):
    (tmp_path / "run.toml").write_text(f'raw = ["{raw}/a.txt"]\ntokenizer = "{tokenizer}"\nmin_words = 100\n')
    words = ["prepare", "--config", tmp_path / "run.toml", "--out", tmp_path / "out", "--document-separator", "\\n\\n"]
    done = subprocess.run(
        [sys.executable, "-m", "llama2", *map(str, words), "--min-words", "70"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == ""
    settings = (tmp_path / "out/prepare.toml").read_text()
    assert "min_words = 70" in settings and "extract: 1 to do" in done.stderr


def memory_of(pids):
    """Private and shared memory of processes, each shared page counted once over those that share it."""
    total = 0
    for pid in pids:
        try:
            found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found.group(1)) * 1024 if found else 0
        except OSError:
            continue
    return total


@pytest.mark.evidence
@pytest.mark.timeout(5400)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_gigabytes_are_prepared_in_less_than_one_and_a_half(tmp_path, tokenizer):
    """All processes together, sampled ten times a second from the first to the last."""
    rng = random.Random(0)
    pool = [essay(rng, rng.randrange(5, 30)) for _ in range(20_000)]
    raw = tmp_path / "raw"
    raw.mkdir()
    n_bytes = 0
    with (
        (raw / "a.jsonl").open("w") as lines,
        (raw / "b.txt").open("w") as text,
        gzip.open(raw / "c.jsonl.gz", "wt", 1) as packed,
    ):
        while n_bytes < 2e9:
            document = "\n".join(rng.choices(pool, k=rng.randrange(4, 60)))
            kind = rng.random()
            if kind < 0.6:
                lines.write(json.dumps({"text": document}) + "\n")
            elif kind < 0.9:
                text.write(document + "\n\n")
            else:
                packed.write(json.dumps({"text": document}) + "\n")
            n_bytes += len(document)
    words = ["prepare", raw, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--document-separator", "\\n\\n"]
    words += ["--heldout-share", 0.01]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "llama2", *map(str, words)])
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, memory_of([process.pid, *children_of(process.pid)]))
        except OSError:
            continue
        time.sleep(0.1)
    seconds = time.monotonic() - start
    report = json.loads((tmp_path / "out/report.json").read_text())
    print(f"{n_bytes / 1e9:.2f} GB in {seconds:.0f} s, peak {peak / 1e9:.3f} GB, {report['train']}")
    assert process.returncode == 0 and report["train"]["n_bytes"] > 1e9
    assert peak < 1.5e9
