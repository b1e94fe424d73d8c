"""Fetching from a small hub on the loopback interface; each case is a process of its own, as the hub's
client reads its environment once."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from llama2.checkpoint import hub, store
from llama2.checkpoint.adapter import write_adapter
from llama2.errors import HubError
from llama2.model.config import ModelConfig
from llama2.model.lora import adapter_state, add_adapter
from llama2.model.lora_config import LoraConfig
from llama2.model.transformer import build
from tests.pocket import pocket_tokenizer

COMMIT = "a" * 40
OLDER = "b" * 40


class Hub:
    """Repositories as folders: served whole; `gated/...` and `private/...` are refused as the real hub does."""

    def __init__(self, root: Path):
        self.root, self.requests = root, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(f"{request.command} {request.path}")
        parts = unquote(request.path.partition("?")[0]).strip("/").split("/")
        is_api = parts[0] == "api"
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        rest = parts[4:] if is_api else parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        if not self.may(request, repo, revision):
            return
        commit = OLDER if revision in ("old", OLDER) else COMMIT
        if is_api:
            self.send(request, 200, self.listing(repo, rest, commit), {"Content-Type": "application/json"})
        else:
            self.send_file(request, self.root / repo / "/".join(rest[2:]), commit)

    def send_file(self, request: BaseHTTPRequestHandler, path: Path, commit: str) -> None:
        if path.is_file():
            data = path.read_bytes()
            self.send(request, 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})
        else:
            self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})

    def listing(self, repo: str, rest: list[str], commit: str) -> bytes:
        """Describe a repository: its tree of files, or the short form with names only."""
        files = {
            str(path.relative_to(self.root / repo)): path.read_bytes()
            for path in sorted((self.root / repo).rglob("*"))
            if path.is_file()
        }
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return json.dumps(tree).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode()

    def may(self, request: BaseHTTPRequestHandler, repo: str, revision: str) -> bool:
        if repo.startswith("gated/") and request.headers.get("Authorization") != "Bearer hf_right":
            self.send(request, 403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif repo.startswith("private/"):
            self.send(request, 401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid credentials"})
        elif not (self.root / repo).is_dir():
            self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "old", COMMIT, OLDER):
            self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "repos").mkdir()
    hub = Hub(tmp_path / "repos")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def run(served: Hub, tmp_path: Path):
    """Runs statements in a fresh process that knows this hub; returns what it prints, an error's text included."""

    def run(code: str, **environment: str) -> str:
        program = (
            "import sys\nfrom llama2.errors import HubError\nfrom llama2.checkpoint import hub, store\n"
            f"try:\n    {code}\nexcept HubError as error:\n    print('HubError:', error)\n"
        )
        own = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", program],
            check=False,
            env=kept | own | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def fill(served: Hub, model: Any, repo: str, format: str = "hf") -> Path:
    folder = served.root / repo
    store.save(model(), folder / "x.gguf" if format == "gguf" else folder, format=format)
    if format == "hf":
        (folder / "tokenizer.json").write_text("{}")
        (folder / "pytorch_model.bin").write_bytes(b"twice the same, not to be fetched")
        (folder / "original").mkdir()
        (folder / "original" / "consolidated.00.pth").write_bytes(b"nor this")
    return folder


def test_a_repository_is_fetched_once_and_then_found_offline(served, run, model):
    fill(served, model, "org/name")
    load = "path = hub.resolve('org/name'); print(sorted(p.name for p in path.iterdir()), store.read_config(path).dim)"
    wanted = "['config.json', 'model.safetensors', 'tokenizer.json'] 32"
    assert run(load) == wanted
    n_requests = len(served.requests)
    assert run(load) == wanted and len(served.requests) == n_requests  # the cache is enough
    assert run(load, HF_HUB_OFFLINE="1") == wanted
    assert run("print(hub.pull('org/name').name)") == COMMIT and len(served.requests) > n_requests
    (served.root / "org" / "name" / "config.json").unlink()
    assert run(load, HF_ENDPOINT="http://127.0.0.1:1") == wanted  # no network at all


def test_an_incomplete_snapshot_is_completed(served, run, model):
    fill(served, model, "org/name")
    run("from huggingface_hub import hf_hub_download; hf_hub_download('org/name', 'config.json')")
    assert "32.0" in run("print(store.load(hub.resolve('org/name')).norm.weight.sum().item())")


def test_a_revision_can_be_named(served, run, model):
    fill(served, model, "org/name")
    assert run("print(hub.resolve('org/name', revision='old').name)") == OLDER
    assert run("print(hub.resolve('org/name').name)") == COMMIT
    assert "no revision 'never'" in run("hub.resolve('org/name', revision='never')")


def test_one_gguf_file_can_be_named(served, run, model):
    folder = fill(served, model, "org/one", "gguf")
    assert run("print(store.read_config(hub.resolve('org/one')).dim)") == "32"
    (folder / "y.gguf").write_bytes((folder / "x.gguf").read_bytes())
    said = run("hub.pull('org/one')")
    assert "x.gguf" in said and "y.gguf" in said and said.startswith("HubError")
    for name in ("org/one:y.gguf", "org/one/y.gguf"):
        assert run(f"path = hub.resolve('{name}'); print(path.name, store.read_config(path).dim)") == "y.gguf 32"
    assert "no file 'z.gguf'" in run("hub.resolve('org/one:z.gguf')")


def test_a_repository_in_meta_s_format_is_fetched(served, run, model):
    fill(served, model, "org/meta", "meta")
    assert run("print(store.read_config(hub.resolve('org/meta')).dim)") == "32"


def test_a_gated_repository_says_what_to_do(served, run, model):
    fill(served, model, "gated/name")
    said = run("hub.resolve('gated/name')")
    assert said.startswith("HubError") and "licence" in said and "HF_TOKEN" in said
    assert run("print(hub.resolve('gated/name').name)", HF_TOKEN="hf_right") == COMMIT


@pytest.mark.parametrize(
    "code, environment, said",
    [
        ("hub.resolve('org/nothing')", {}, "not found"),
        ("hub.resolve('private/name')", {}, "not found"),
        ("hub.resolve('org/nothing')", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ("hub.resolve('org/nothing')", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "could not be fetched"),
    ],
)
def test_each_failure_is_one_error_that_says_what_to_do(run, code, environment, said):
    found = run(code, **environment)
    assert found.startswith("HubError") and said in found and "Traceback" not in found


def test_a_repository_without_a_model_is_named(served, run):
    (served.root / "org" / "adapter").mkdir(parents=True)
    (served.root / "org" / "adapter" / "adapter_config.json").write_text("{}")
    assert "adapter" in run("hub.resolve('org/adapter')")


def test_an_adapter_is_fetched_with_its_base(served, run):
    """The adapter's repository names the base's, and holds no weights of a model."""
    made = served.root / "org" / "adapter"
    base = build(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=260, ffn_dim=24), seed=0)
    store.save(base, served.root / "org" / "base", format="hf", tokenizer=pocket_tokenizer())
    adapted = add_adapter(base, LoraConfig(r=2), seed=1)
    tensors = {name: (lambda each=each: each) for name, each in adapter_state(adapted).items()}
    write_adapter(made, tensors, LoraConfig(r=2), base="org/base", model=base.config)
    place = "hub.resolve('org/adapter')"
    assert run(f"print(len(store.layers({place})), *store.load({place}).adapters)") == "2 default"


def test_an_existing_path_is_the_path(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(HubError, match="revision"):
        hub.resolve(tmp_path, revision="main")


@pytest.mark.parametrize(
    "name, said",
    [
        ("llama2-7b", "shape of a model.*llama2 pull"), ("Llama2-7B", "shape of a model"),
        ("llama2-7bb", "did you mean 'llama2-7b'"), ("", "neither"), ("../x", "neither"), ("a/b/c", "neither"),
        ("/no/such/place", "neither"), ("org/na me", "neither"), ("a/..", "neither"), ("a\0b", "neither"),
        ("x" * 5000, "neither"),
    ],
)  # fmt: skip
def test_names_that_are_no_names_are_explained(name, said):
    with pytest.raises(HubError, match=said):
        hub.resolve(name)
