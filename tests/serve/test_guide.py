"""docs/serving.md says what the code does: its examples run, its tables are complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama2.serve.app import ROUTES
from llama2.serve.config import ServeConfig
from llama2.serve.protocol import ChatRequest, CompletionRequest

PAGE = (Path(__file__).resolve().parents[2] / "docs/serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^<!-- run -->\n```(python|sh)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("language", "code"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(server, language, code):
    code = code.replace("http://127.0.0.1:8000", server.url).replace("my-model", "pocket")
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout and '"error"' not in done.stdout, done.stdout + done.stderr


def test_the_tables_are_complete():
    settings = re.findall(r"`(\w+)`", PAGE.partition("## Settings")[2].partition("## ")[0])
    assert set(ServeConfig.model_fields) <= set(settings)
    routes = PAGE.partition("## Routes")[2].partition("| status")[0]
    known = [path.replace("{name:path}", "NAME") for _, path, _, _ in ROUTES if "page" not in path]
    assert [path for path in known if f" {path}`" not in routes] == []
    extra = [
        name
        for kind in (ChatRequest, CompletionRequest)
        for name, field in kind.model_fields.items()
        if (field.description or "").startswith("extra")
    ]
    assert [name for name in extra if f"`{name}`" not in routes] == []
