"""What preparing did, in numbers: `report.json` and a table for people."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2.data.corpus.clean import CHANGES
from llama2.data.corpus.extract import CONTAMINATED, EMPTY
from llama2.data.corpus.quality import DROPS
from llama2.data.corpus.tally import Tally


def extract_report(parts: list[Path]) -> dict[str, Any]:
    """Add up what the first stage counted, part by part in order."""
    sums = {name: Tally() for name in ("read", "problems", "changes", "drops", "kept")}
    seconds = 0.0
    for part in parts:
        counts = json.loads((part / "counts.json").read_text(encoding="utf-8"))
        seconds += counts["seconds"]
        for name, tally in sums.items():
            tally.merge(counts[name])
    found: dict[str, Any] = {name: tally.plain([*CHANGES, EMPTY, *DROPS, CONTAMINATED]) for name, tally in sums.items()}
    for name in ("read", "kept"):
        for values in found[name].values():
            del values["examples"]
    return {**found, "seconds": round(seconds, 3)}


def total(rules: dict[str, dict]) -> dict[str, int]:
    return {key: sum(values[key] for values in rules.values()) for key in ("documents", "characters")}


def nothing_left(report: dict[str, Any]) -> str:
    """Say why no document is left."""
    n_read = total(report["read"])["documents"]
    reasons = {**report["problems"], **report["drops"]}
    why = ", ".join(f"{rule} {values['documents']}" for rule, values in reasons.items())
    examples = next((values["examples"] for values in reasons.values() if values["examples"]), [""])
    return f"nothing is left of {n_read} documents ({why or 'there were none'}); for example {examples[0]}"


def print_report(report: dict[str, Any]) -> None:
    """Print tables of what the rules did and what came of each input to standard error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    width = max(Console(stderr=True).width, 110)
    console = Console(stderr=True, width=width)
    rules = Table("stage", "rule", title=f"prepared {escape(report['out'])}", title_justify="left", width=width)
    for name in ("documents", "characters"):
        rules.add_column(name, justify="right", no_wrap=True)
    rules.add_column("example", no_wrap=True, overflow="ellipsis", ratio=1)
    for stage, rule, values in _rows(report):
        example = (values.get("examples") or [""])[0]
        numbers = [f"{values[key]:,}" if key in values else "" for key in ("documents", "characters")]
        rules.add_row(stage, rule, *numbers, escape(example))
    console.print(rules)
    sources = Table("source")
    for name in ("documents", "tokens"):
        sources.add_column(name, justify="right")
    for source, values in report["sources"].items():
        sources.add_row(escape(source), f"{values['documents']:,}", f"{values['tokens']:,}")
    console.print(sources)
    for name in ("train", "heldout"):
        if held := report[name]:
            said = (
                f"{held['n_tokens']:,} tokens in {held['n_documents']:,} documents, {held['n_bytes']:,} bytes of text"
            )
            console.print(f"{name}: {said}", highlight=False)


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    extract = report["extract"]
    yield f"extract, {extract['seconds']} s", "read", dict(total(extract["read"]))
    if report["n_other_files"]:
        yield "", "files of other kinds", {"documents": report["n_other_files"]}
    for group, word in (("problems", ""), ("changes", "changed: "), ("drops", "dropped: ")):
        for rule, values in extract[group].items():
            yield "", word + rule, values
    yield "", "kept", dict(total(extract["kept"]))
    yield f"dedup, {report['dedup']['seconds']} s", "", {}
    for rule, values in report["dedup"]["drops"].items():
        if values:
            yield "", f"dropped: {rule}", values
    yield f"tokenise, {report['tokenise']['seconds']} s", "", {}
