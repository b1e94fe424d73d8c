"""`llama2 prepare`: raw text to token shards."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llama2.cli.config import settle
from llama2.data.corpus.prepare import PrepareConfig, prepare as prepare_shards
from llama2.data.corpus.report import print_report


def prepare(
    *raw: Path,
    config: Path | None = None,
    settings: Annotated[PrepareConfig, Parameter(name="*", negative_iterable=())] = PrepareConfig(),
) -> None:
    """Read, clean, deduplicate and tokenise raw text; a run that was stopped goes on where it was.

    Parameters
    ----------
    raw
        Files or folders of .txt, .md, .jsonl, .parquet, .html or .warc, each plain or .gz or .zst.
    config
        A TOML file with any of the settings below, in snake_case; flags win over it.
    """
    resolved = settle(settings, config, **({"raw": raw} if raw else {}))
    try:
        with Watch() as watch:
            report = prepare_shards(resolved, watch=watch)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        raise
    if report:
        print_report(report)
    else:
        print(f"rank {resolved.rank} is done; rank 0 will put the shards together", file=sys.stderr)


class Watch:
    """A bar on standard error for every stage, on a terminal; elsewhere a line."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.bars: dict[str, int] = {}

    def __call__(self, stage: str, n_done: int, n: int) -> None:
        if stage not in self.bars:
            self.bars[stage] = self.progress.add_task(stage, total=n)
            if self.progress.disable and n:
                print(f"{stage}: {n} to do", file=sys.stderr)
        self.progress.update(self.bars[stage], completed=n_done)  # pyright: ignore[reportArgumentType]

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.progress.stop()
