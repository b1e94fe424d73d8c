"""Write the parts of the documentation that follow from the code: `docs/cli.md` and the family table of both READMEs.

python -m docs.build            write what changed
python -m docs.build --check    change nothing; exit code 1 and a list where something is out of date
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from llama2.cli.main import COMMANDS, make_app
from llama2.model.config import ModelConfig
from llama2.model.family import FAMILY

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- family: written by python -m docs.build -->", "<!-- family ends -->"
WIDTH = 100

_COLUMNS = {
    "README.md": ("name", "parameters", "dim", "layers", "heads / kv", "vocabulary", "context"),
    "README.zh.md": ("名称", "参数量", "维度", "层数", "注意力头 / KV 头", "词表", "上下文"),
}


def help_text(*command: str) -> str:
    """Return what `llama2 COMMAND --help` prints on a plain terminal of WIDTH columns."""
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True, force_terminal=False, _environ={"TERM": "dumb"})
    make_app().help_print([*command], console=console)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    return "\n".join(line.rstrip() for line in lines).strip()


def cli_page() -> str:
    """Return docs/cli.md."""
    parts = [
        "# The command line",
        "This page is what `--help` prints; it is written by `python -m docs.build`, so change the code instead.",
        "Results go to standard output, everything else to standard error. A mistake is one line on standard error "
        "and exit code 2; `--debug` shows the traceback. Ctrl-C exits with code 130.",
        f"## llama2\n\n```text\n{help_text()}\n```",
        *(f"## llama2 {name}\n\n```text\n{help_text(name)}\n```" for name in COMMANDS),
    ]
    return "\n\n".join(parts) + "\n"


def _shapes() -> Iterator[tuple[str, ModelConfig]]:
    """Yield the names that share a shape, and the shape."""
    names: dict[ModelConfig, list[str]] = {}
    for name, config in FAMILY.items():
        names.setdefault(config, []).append(name)
    for config, same in names.items():
        stem = same[0]
        short = [f"`{name.removeprefix(stem)}`" if name.startswith(stem) else f"`{name}`" for name in same[1:]]
        yield ", ".join([f"`{stem}`", *short]), config


def family_table(columns: tuple[str, ...]) -> str:
    """Return the family as a Markdown table, one row for each shape."""
    rows = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    rows += [
        f"| {names} | {c.n_parameters:,} | {c.dim} | {c.n_layers} | {c.n_heads} / {c.n_kv_heads} | {c.vocab_size} "
        f"| {c.context_length} |"
        for names, c in _shapes()
    ]
    return "\n".join(rows)


def with_family(text: str, columns: tuple[str, ...]) -> str:
    """Return a README with a fresh table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"the marks {BEGIN} and {END} are missing"
    return f"{before}{BEGIN}\n\n{family_table(columns)}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """Return every generated page and what it should say."""
    found = {ROOT / "docs/cli.md": cli_page()}
    for name, columns in _COLUMNS.items():
        found[ROOT / name] = with_family((ROOT / name).read_text(encoding="utf-8"), columns)
    return found


def out_of_date() -> list[Path]:
    """Return the pages that do not say what they should."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main(arguments: list[str]) -> int:
    """Write, or with --check only report; return the exit code."""
    stale = out_of_date()
    if arguments == ["--check"]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run: python -m docs.build", file=sys.stderr)
        return 1 if stale else 0
    if arguments:
        print("usage: python -m docs.build [--check]", file=sys.stderr)
        return 2
    for path, text in pages().items():
        if path in stale:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
