"""The floors of the house: a folder imports only from floors below, a file only from files that do not import it."""

import ast
from pathlib import Path

import pytest

import llama2

ROOT = Path(llama2.__file__).parent
FLOORS = [
    {"errors"},
    {"kernels", "files"},
    {"model", "tokenizer"},
    {"parallel"},
    {"checkpoint", "infer", "chat"},
    {"data", "llm"},
    {"train", "evaluate", "tasks", "serve", "plan"},
    {"align", "compress"},
    {"demo", "tutorial"},
    {"cli"},
]
FREE = {"__init__", "__main__"}
"""The package's own front doors, which point everywhere."""


def modules() -> dict[str, Path]:
    """Dotted name below llama2 -> file."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: import from the package's root, not relatively"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("llama2.") for name in names if name.removeprefix("llama2.") in known}
    return found


ARROWS = {name: imported(path, set(modules())) for name, path in modules().items() if name not in FREE}


def floor(module: str) -> int:
    room = module.split(".")[0]
    return next(number for number, rooms in enumerate(FLOORS, 1) if room in rooms)


@pytest.mark.parametrize("module", ARROWS)
def test_imports_run_down(module):
    room = module.split(".")[0]
    for target in ARROWS[module] - FREE:
        if target.split(".")[0] != room:
            assert floor(target) < floor(module), f"{module} (floor {floor(module)}) imports {target}"


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for target in ARROWS.get(module, set()):
            visit(target, (*trail, module))
        done.add(module)

    for module in ARROWS:
        visit(module, ())


def test_no_drawer_for_odds_and_ends():
    names = {part for module in ARROWS for part in module.split(".")}
    assert not names & {"utils", "util", "common", "base", "manager", "helpers", "misc"}


def test_every_module_says_what_it_is_for():
    for name, path in modules().items():
        if path.stat().st_size and path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), name


def test_source_is_ascii():
    assert [name for name, path in modules().items() if not path.read_text(encoding="utf-8").isascii()] == []


def test_public_names_are_sorted_and_exist():
    assert llama2.__all__ == sorted(llama2.__all__)
    for name in llama2.__all__:
        assert getattr(llama2, name) is not None
    assert set(llama2.__all__) <= set(dir(llama2))


def test_the_stub_names_the_same():
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    imports = {
        alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imports == llama2._HOME


def test_tests_mirror_the_package():
    here = Path(__file__).parent
    for folder in ROOT.iterdir():
        if folder.is_dir() and any(folder.glob("[a-z]*.py")):
            assert (here / folder.name).is_dir(), f"tests/{folder.name} is missing"
