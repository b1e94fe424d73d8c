"""The pages say what the code does: generated parts are fresh, links resolve, examples run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llama2

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RUN = re.compile(r"^<!-- run -->\n```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """Return a page without its code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_parts_are_in_step_with_the_code():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    assert spec and spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.out_of_date() == [], "run: python -m docs.build"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_both_readmes_have_the_same_skeleton():
    english, chinese = read("README.md"), read("README.zh.md")
    levels = [re.findall(r"^(#+) ", BLOCK.sub("", text), re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    assert len(RUN.findall(english)) == len(RUN.findall(chinese)) > 0
    rows = [len(re.findall(r"^\|", text, re.MULTILINE)) for text in (english, chinese)]
    assert rows[0] == rows[1]


def test_the_changelogs_top_version_is_the_packages():
    versions = re.findall(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == llama2.__version__


def test_the_tour_names_every_module():
    root = ROOT / "llama2"
    modules = [str(path.relative_to(root)) for path in sorted(root.rglob("*.py")) if path.stat().st_size]
    tour = read("docs/tour.md")
    assert [name for name in modules if f"`{name}`" not in tour] == []
    named = re.findall(r"^\d+\. `([\w/.]+)`", tour, re.MULTILINE)
    assert [name for name in named if not (root / name).is_file()] == []
    assert len(named) == len(set(named))


def test_every_public_name_of_an_error_or_verb_is_explained():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    verbs = ["generate", "chat", "complete", "stream", "score", "embed", "load", "save", "convert", "pull"]
    assert [verb for verb in verbs if not re.search(rf"`(llama2\.|llama2 )?{verb}\b", text)] == []


def test_the_option_table_is_complete():
    from llama2.llm import SamplingOptions

    table = re.findall(r"^\| `(\w+)` \|", read("docs/answering.md").partition("## The options")[2], re.MULTILINE)
    assert set(SamplingOptions.__annotations__) <= set(table)


def test_the_pages_name_no_machine():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"\.\./shared|/home/|/root/", text) and str(ROOT) not in text, page.name


@pytest.mark.slow  # a minute; `make check` runs it
def test_marked_examples_run(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    n_expected = 0
    for name in ("README.md", "docs/answering.md", "docs/tasks.md"):
        for language, code in RUN.findall(read(name)):
            command = [sys.executable, "-W", "error", "-c", code] if language == "python" else ["bash", "-euc", code]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{name}:\n{code}\n{done.stdout}\n{done.stderr}"
            for expected in re.findall(r"  # -> (.*)", code):
                assert expected in done.stdout, f"{name}: {expected!r} is not in\n{done.stdout}"
                n_expected += 1
    assert n_expected >= 3
