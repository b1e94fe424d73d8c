"""The command line as a user runs it: what it prints where, and how it fails.

What a process alone can show has a real one: streams, imports, encodings. The rest runs in this process: a new one
takes seconds to begin.
"""

import json
import os
import subprocess
import sys

import pytest

import llama2
from llama2.cli.generate import generate
from llama2.cli.main import COMMANDS
from llama2.cli.train_tokenizer import train_tokenizer
from llama2.errors import RequestError, TokenizerError
from llama2.model.family import FAMILY
from llama2.model.transformer import build
from tests.pocket import POCKET, pocket_tokenizer


def run(*arguments, stdin="", **environment):
    command = [sys.executable, "-m", "llama2", *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, input=stdin, env=env, timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    llama2.save(build(POCKET, seed=0), path, tokenizer=pocket_tokenizer())
    return path


def imports_torch(*arguments):
    code = f"""
import sys
sys.argv = ["llama2", *{list(map(str, arguments))!r}]
from llama2.__main__ import main
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout
    return done.stderr.strip().endswith("True")


def test_help_lists_every_command_and_imports_no_torch():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in COMMANDS)
    assert not imports_torch("--help")
    assert run().stdout == done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_a_runnable_example(here, command):
    done = here(command, "--help")
    assert done.returncode == 0
    assert f"  llama2 {command}" in done.stdout.split("Examples:")[1]


def test_info_on_shapes_and_configs_imports_no_torch(here, model, tmp_path):
    assert not imports_torch("info", "llama2-7b")
    assert not imports_torch("info", model)
    llama2.convert(model, tmp_path / "m.gguf", to="gguf")
    llama2.convert(model, tmp_path / "m.bin", to="llama2c")
    llama2.convert(model, tmp_path / "m", to="meta")
    for name in ("m.gguf", "m.bin", "m"):
        assert not imports_torch("info", tmp_path / name)
    for place in (model, model / "config.json", tmp_path / "m.gguf", tmp_path / "m.bin", tmp_path / "m"):
        facts = json.loads(here("info", place, "--json").stdout)
        assert facts["n_parameters"] == POCKET.n_parameters


def test_info_lists_the_family(here):
    lines = here("info").stdout.splitlines()
    assert len(lines) == len(FAMILY) + 1
    assert json.loads(here("info", "--json").stdout)["llama2-7b"]["n_parameters"] == 6_738_415_616
    assert "6,738,415,616" in here("info", "Llama2-7B").stdout


def test_generate_prints_only_the_text(here, assets):
    checkpoint = assets / "checkpoints/stories260K/stories260K.bin"
    expected = json.loads((assets / "checkpoints/expected.json").read_text())["stories260K"][0]["expected"]
    options = ["--max-new-tokens", 200, "--temperature", 0]
    done = run("generate", checkpoint, "--prompt", "", *options)
    assert (done.stdout, done.stderr, done.returncode) == (expected + "\n", "", 0)
    options[1] = 20
    echoed = here("generate", checkpoint, "--prompt", "Once upon a time", *options).stdout
    bare = here("generate", checkpoint, "--prompt", "Once upon a time", "--no-echo", *options).stdout
    assert echoed == "Once upon a time" + bare
    assert run("generate", checkpoint, "--prompt", "-", *options, stdin="Once upon a time").stdout == echoed


def test_generate_repeats_with_a_seed_and_gives_n_answers(here, model):
    options = ["--prompt", "a", "--max-new-tokens", 10, "--temperature", 1, "--seed", 5]
    once = here("generate", model, *options)
    assert once.returncode == 0 and once.stdout == here("generate", model, *options).stdout
    assert here("generate", model, *options, "--n", 3).stdout.startswith(once.stdout)


def test_a_file_of_prompts_is_answered_in_order_and_resumes(here, model, tmp_path):
    records = [{"id": i, "prompt": "x" * i} for i in range(1, 6)]
    records += [{"messages": [{"role": "user", "content": "Hi"}]}]
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(map(json.dumps, records)) + '\n"bare"\n')
    options = ["--prompts", source, "--out", out, "--max-new-tokens", 5, "--temperature", 1, "--seed", 1]
    done = run("generate", model, *options, "--batch-size", 2)
    assert done.returncode == 0 and done.stdout == ""
    whole = out.read_bytes()
    answers = [json.loads(line) for line in whole.decode().splitlines()]
    assert [answer.get("id") for answer in answers] == [1, 2, 3, 4, 5, None, None]
    for answer in answers:
        assert answer["completion"]["n_new_tokens"] <= 5 and isinstance(answer["completion"]["text"], str)
    out.write_bytes(whole[: len(whole) // 2])  # killed in the middle of a line
    resumed = here("generate", model, *options)
    assert "going on" in resumed.stderr
    assert out.read_bytes() == whole
    again = here("generate", model, *options)
    assert again.returncode == 0 and out.read_bytes() == whole
    mixed = here("generate", model, *options, "--top-k", 3)
    assert mixed.returncode == 2 and "same model and options" in mixed.stderr and out.read_bytes() == whole
    source.write_text('{"prompt": "another"}\n')
    refused = here("generate", model, *options)
    assert refused.returncode == 2 and "answers another prompt" in refused.stderr
    assert out.read_bytes() == whole


def test_a_prompt_too_long_stops_a_file_before_any_work(here, model, tmp_path):
    source, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "short"}\n{"prompt": "' + "x" * 400 + '"}\n')
    done = here("generate", model, "--prompts", source, "--out", out)
    assert done.returncode == 2 and "402 tokens" in done.stderr and not out.exists()


def test_convert_takes_the_formats_own_options(here, model, tmp_path):
    assert here("convert", model, tmp_path / "m.bin", "--to", "llama2c", "--version", 0).returncode == 0
    assert here("convert", model, tmp_path / "m", "--to", "meta", "--shards", 2).returncode == 0
    assert (tmp_path / "m" / "consolidated.01.pth").exists()
    refused = here("convert", model, tmp_path / "n", "--to", "hf", "--shards", 2)
    assert refused.returncode == 2 and "shards" in refused.stderr and not (tmp_path / "n").exists()


def test_convert_says_what_was_lost_and_refuses_to_overwrite(here, model, tmp_path):
    done = here("convert", model, tmp_path / "m.gguf", "--to", "gguf", "--dtype", "q8_0")
    assert done.returncode == 0 and done.stdout == "" and "wrote" in done.stderr
    before = (tmp_path / "m.gguf").read_bytes()
    again = here("convert", model, tmp_path / "m.gguf", "--to", "gguf")
    assert again.returncode == 2 and "exists" in again.stderr
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_tokenize(here, assets):
    path = assets / "tokenizers/llama2/tokenizer.model"
    assert json.loads(here("tokenize", path, "Hello world", "--ids").stdout) == [15043, 3186]
    assert here("tokenize", path, "Hello world").stdout.split() == ["15043", "'", "Hello'", "3186", "'", "world'"]
    assert json.loads(here("tokenize", path, "<s>", "--ids", "--special").stdout) == [1]
    assert json.loads(here("tokenize", path, "<s>", "--ids").stdout) == [529, 29879, 29958]


def test_chat_streams_answers_and_obeys_commands(model):
    lines = [
        "/undo",
        "Hi",
        "/stats",
        "Hi again",
        "/undo",
        "/retry",
        "/system Be brief.",
        "/edit",
        "/nope",
        "/help",
        "[INST]",
        "/exit",
    ]
    done = run("chat", model, "--max-new-tokens", 4, "--temperature", 0, stdin="\n".join(lines) + "\n")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) >= 3
    for said in (
        "tokens in",
        "system message set",
        "nothing was asked yet",
        "/nope is not a command",
        "/undo",
        "[INST]",
    ):
        assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_vocabulary_from_a_generated_world(here, tmp_path):
    world, out = tmp_path / "world", tmp_path / "tokenizer"
    assert here("world", "--stories", 200, "--heldout", 2, "--out", world).returncode == 0
    files = [world / "train/stories.en.txt", world / "train/stories.jsonl"]
    done = here("train-tokenizer", *files, "--vocab-size", 900, "--out", out)
    assert done.returncode == 0 and done.stdout == "" and "900 pieces" in done.stderr
    ids = [json.loads(here("tokenize", out / name, "Mia went", "--ids").stdout) for name in TOKENIZERS]
    assert ids[0] == ids[1]
    again = here("train-tokenizer", *files, "--vocab-size", 900, "--out", out)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr


TOKENIZERS = ("tokenizer.model", "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "said"), [('{"text": "a"}\n{}\n', "line 2"), ("x\n", "line 1 is not JSON"), ("", "no text")]
)
def test_a_broken_corpus_is_named(tmp_path, content, said):
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=said):
        train_tokenizer(path, out=tmp_path / "out", vocab_size=300)
    with pytest.raises(TokenizerError, match="none.txt"):
        train_tokenizer(tmp_path / "none.txt", out=tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()


TOLD = ("show_stories", "show_tasks", "walk", "show_alignment")


def test_the_demo_without_a_model(here, tmp_path, monkeypatch):
    """Every stage at a hundredth of its size; the second time everything is there, and is only told again."""
    out = tmp_path / "out"
    done = run("demo", "--quick", "--out", out, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    stages = ("4. Pretraining", "6. Taught", "9. Of two answers", "10. Aligned")
    assert all(stage in done.stdout for stage in stages)
    assert "gap closed" in done.stdout and "aligned, reward" in done.stdout
    assert done.stdout.count("the same story") == 2 and done.stdout.count("% (") == 6
    assert {path.name for path in out.iterdir()} >= {"world", "shards", "readers", "run", "tuned", "chat", "story.gguf"}
    assert (out / "run" / "report.html").is_file() and (out / "run" / "model" / "config.json").is_file()
    assert (out / "tuned" / "model" / "adapter_config.json").is_file()
    assert (out / "aligned" / "model" / "config.json").is_file()
    assert (out / "reward" / "calibration.png").is_file()
    told = []
    for name in TOLD:
        monkeypatch.setattr(f"llama2.demo.run.{name}", lambda *_, name=name: told.append(name))
    again = here("demo", "--quick", "--out", out)
    assert again.returncode == 0, again.stderr
    assert not any(stage in again.stdout for stage in stages) and told == list(TOLD)


def test_the_demo_with_a_model_is_a_chat(model):
    done = run("demo", model, stdin="/exit\n")
    assert done.returncode == 0 and "/help lists commands" in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2 is not JSON"),
        ("3", "line 2 needs either"),
        ("{}", "line 2 needs either"),
        ('{"prompt": "x", "messages": []}', "line 2 needs either"),
        ('{"prompt": 3}', "line 2: the prompt 3"),
        ('{"messages": []}', "line 2: the conversation is empty"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "line 2"),
        ('{"prompt": "x", "completion": "y"}', "line 2 has a field 'completion'"),
    ],
)
def test_a_broken_line_of_prompts_is_named_before_any_work(model, tmp_path, line, said):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(RequestError, match=said):
        generate("no-model", prompts=source, out=tmp_path / "new" / "out.jsonl")
    assert not (tmp_path / "new" / "out.jsonl").exists()


BROKEN = {
    "unknown command": (["generat", "x"], 'Did you mean "generate"'),
    "unknown option": (["generate", "x", "--temprature", "1"], "--temperature"),
    "unknown model": (["generate", "lama2-70b", "--prompt", "x"], "llama2-70b"),
    "a shape is no checkpoint": (["generate", "llama2-7b", "--prompt", "x"], "the shape of a model, not its weights"),
    "missing path": (["generate", "./nothing/here", "--prompt", "x"], "nothing/here"),
    "no prompt": (["generate", "MODEL"], "--prompt"),
    "bad value": (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p=2.0"),
    "too long": (["generate", "MODEL", "--prompt", "x" * 400], "402 tokens"),
    "no device": (["generate", "MODEL", "--prompt", "x", "--device", "quantum"], "quantum"),
    "bad dtype": (["generate", "MODEL", "--prompt", "x", "--dtype", "int3"], "int3"),
    "missing prompts": (["generate", "MODEL", "--prompts", "none.jsonl", "--out", "o.jsonl"], "none.jsonl"),
    "wrong tokenizer": (["generate", "MODEL", "--prompt", "x", "--tokenizer", "none.model"], "none.model"),
    "no answers": (["generate", "MODEL", "--prompt", "x", "--n", "0"], "n=0"),
    "a batch of one": (["generate", "MODEL", "--prompt", "x", "--batch-size", "3"], "--batch-size"),
    "a device is no file": (["convert", "MODEL", "/dev/null", "--to", "gguf"], "/dev/null"),
    "a folder that cannot be": (["convert", "MODEL", "/proc/none/x", "--to", "hf"], "/proc/none"),
    "demo with both": (["demo", "MODEL", "--out", "x"], "--out"),
    "a family name has no revision": (["info", "llama2-7b", "--revision", "x"], "--revision"),
    "bad format": (["convert", "MODEL", "out", "--to", "onnx"], "onnx"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_one_line_on_standard_error(here, model, name):
    arguments, said = BROKEN[name]
    done = here(*[model if argument == "MODEL" else argument for argument in arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("llama2: error: ")
    assert said in done.stderr


def test_debug_shows_the_traceback(model):
    done = run("generate", model, "--prompt", "x", "--top-p", "2", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr and "RequestError" in done.stderr


def test_a_prompt_that_is_not_utf8_is_refused(model):
    command = [sys.executable.encode(), b"-m", b"llama2", b"generate", str(model).encode(), b"--prompt", b"\xff\xfe"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.startswith(b"llama2: error: ") and done.stderr.count(b"\n") == 1
    piped = subprocess.run([*command[:-1], b"-"], input=b"\xff\xfe", capture_output=True)
    assert piped.returncode == 2 and piped.stderr.startswith(b"llama2: error: standard input is not UTF-8")


def test_a_terminal_that_cannot_show_a_character_gets_an_escape(assets):
    path = assets / "tokenizers/llama2/tokenizer.model"
    done = run("tokenize", path, "caf\u00e9", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\xe9" in done.stdout


def test_a_mistyped_path_does_not_go_to_the_hub(model):
    done = subprocess.run(
        [sys.executable, "-m", "llama2", "info", "model/modle"], cwd=model.parent, capture_output=True, text=True
    )
    assert done.returncode == 2 and "there is no model/modle in the folder model" in done.stderr
