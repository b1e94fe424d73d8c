"""A checked configuration and the stages of preparing, each of which skips what is there already.

Knows where everything lies below OUT and whose turn it is; what is done to texts is known by the modules it calls.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama2.data.corpus.decontaminate import contamination_of
from llama2.data.corpus.extract import Options, extract
from llama2.data.corpus.fates import HELDOUT, TRAIN, decide, edge_tasks, write_edges
from llama2.data.corpus.plan import Plan, abandon, make_plan, shard_bytes
from llama2.data.corpus.pool import run_tasks
from llama2.data.corpus.quality import Limits
from llama2.data.corpus.report import extract_report, nothing_left
from llama2.data.corpus.settings import RUNTIME, PrepareConfig, check_names, rules_left_out, threshold_of
from llama2.data.corpus.sources import find_files
from llama2.data.corpus.tokenise import tokenise
from llama2.data.shards import tokenizer_digest, write_index
from llama2.errors import DataError
from llama2.files.staging import staged_file
from llama2.tokenizer.formats import load_tokenizer
from llama2.tokenizer.tokenizer import Tokenizer

_SORTED_AT_ONCE = 1 << 23
_POLL_S = 0.2

Watch = Callable[[str, int, int], None]
"""Told of a stage, how many tasks are done, and of how many."""


class Job:
    """A checked configuration, and its stages."""

    def __init__(self, config: PrepareConfig):
        """Look for every mistake that can be seen before any work."""
        if config.out is None or config.tokenizer is None:
            missing = "out" if config.out is None else "tokenizer"
            raise DataError(f"no {missing} named; give --{missing}")
        if config.rank >= config.world_size:
            raise DataError(f"rank={config.rank} must be below world_size={config.world_size}")
        self.config, self.out = config, config.out
        self.work = self.out / "work"
        self.tokenizer = _checked_tokenizer(config.tokenizer)
        check_names(config)
        evaluation = find_files(list(config.decontaminate))[0] if config.decontaminate else []
        said = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path, _ in evaluation]
        self.separator = (config.document_separator or "").replace("\\n", "\n") or None
        self.plan: Plan = make_plan(
            list(config.raw),
            text_field=config.text_field,
            separator=self.separator,
            more=[tokenizer_digest(self.tokenizer), *said],
        )
        inside = [path for path in config.raw if self.out.resolve() in [path.resolve(), *path.resolve().parents]]
        inside += [path for path in config.raw if path.is_dir() and path.resolve() in self.out.resolve().parents]
        if inside:
            raise DataError(f"--out {self.out} and the raw text {inside[0]} lie in each other; name another --out")
        self._contamination = None
        if evaluation and not self._contamination_file.exists():
            files = [path for path, _ in evaluation]
            self._contamination = contamination_of(
                files,
                n_words=config.decontamination_words,
                text_field=config.text_field,
                separator=self.separator,
            )
        self.settings = config.model_dump(mode="json", exclude=set(RUNTIME), exclude_none=True)
        self.parts = [self.work / "parts" / f"{number:05}" for number in range(len(self.plan.units))]

    @property
    def n_workers(self) -> int:
        if self.config.workers:
            return self.config.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def _contamination_file(self) -> Path:
        return self.work / "contamination.npz"

    def mine(self, tasks: list) -> list:
        return tasks[self.config.rank :: self.config.world_size]

    def extract(self, watch: Watch) -> None:
        """Read, clean and judge this rank's units; then see that all ranks' are there and that something is left."""
        options = self._options()
        for leftover in (self.work / "parts").glob(".*"):  # of a run that was killed
            if any(leftover.name.startswith(f".{part.name}.") for part in self.mine(self.parts)):
                shutil.rmtree(leftover, ignore_errors=True)
        units = list(zip(self.parts, self.plan.units, strict=True))
        tasks = [(part, unit, options) for part, unit in self.mine(units) if not part.exists()]
        self._run("extract", extract, tasks, watch)
        if self.config.rank == 0:
            self._wait("extract", lambda: sum(not part.exists() for part in self.parts))

    def _options(self) -> Options:
        config = self.config
        limits = Limits(config.min_words, config.max_words, config.languages, rules_left_out(config))
        if self._contamination:
            with staged_file(self._contamination_file) as temporary:
                self._contamination.save(temporary)
        file = self._contamination_file if config.decontaminate else None
        return Options(config.text_field, self.separator, limits, threshold_of(config), file)

    def dedup(self, watch: Watch) -> None:
        """Find copies, once for all ranks."""
        place = self.work / "dedup"
        if self.config.rank:
            self._wait("dedup", lambda: int(not (place / "done.json").exists()))
            return
        if not (place / "done.json").exists():
            extracted = extract_report(self.parts)
            if not extracted["kept"]:
                abandon(self.out)
                raise DataError(nothing_left(extracted))
            threshold, partition = threshold_of(self.config), _SORTED_AT_ONCE // self.n_workers
            first, *others = edge_tasks(place, self.parts, threshold, partition)
            write_edges(*first)
            self._run("dedup", write_edges, others, watch)
            decide(place, self.parts, threshold, self.config.heldout_share)

    def tokenise(self, watch: Watch) -> None:
        """Write this rank's shards."""
        tasks = [task for task in self.mine(self._shards()) if not task[0].exists()]
        self._run("tokenise", tokenise, tasks, watch)
        if self.config.rank == 0:
            self._wait("tokenise", lambda: sum(not marker.exists() for marker, *_ in self._shards()))

    def _shards(self) -> list[tuple]:
        """Return the arguments of every `tokenise`, which follow from what stays."""
        done = json.loads((self.work / "dedup" / "done.json").read_text())
        tasks = []
        for split, fate, folder in (("train", TRAIN, self.out), ("heldout", HELDOUT, self.out / "heldout")):
            sizes = [stays[split] for stays in done["stays"]]
            parts = list(zip(self.parts, done["first"][:-1], strict=True))
            for number, group in enumerate(_groups(sizes)):
                name = f"{number:05}"
                marker = self.work / "shards" / f"{split}-{name}.json"
                chosen = tuple(parts[i] for i in group)
                tasks.append((marker, folder, name, chosen, self.work / "dedup" / "fates", fate, self.config.tokenizer))
        return tasks

    def merge(self) -> dict[str, Any]:
        """Write the report and close the sets; index.json of the training set comes last of all."""
        found = [json.loads(marker.read_text()) for marker, *_ in self._shards()]
        splits = [marker.name.split("-")[0] for marker, *_ in self._shards()]
        entries = {
            split: [each["entry"] for each, of in zip(found, splits, strict=True) if of == split]
            for split in ("train", "heldout")
        }
        done = json.loads((self.work / "dedup" / "done.json").read_text())
        report = {
            "out": str(self.out),
            "extract": extract_report(self.parts),
            "dedup": {"drops": done["drops"], "seconds": done["seconds"]},
            "tokenise": {"seconds": round(sum(each["seconds"] for each in found), 3)},
            "sources": self._sources(found),
            "n_other_files": self.plan.n_other_files,
            **{split: _totals(entries[split]) for split in entries},
        }
        with staged_file(self.out / "report.json") as path:
            path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if entries["heldout"]:
            write_index(self.out / "heldout", self.tokenizer, entries["heldout"])
        write_index(self.out, self.tokenizer, entries["train"])
        return report

    def _sources(self, found: list[dict]) -> dict[str, dict[str, int]]:
        """Documents and tokens of each input as it was named."""
        sums = {str(path): {"documents": 0, "tokens": 0} for path in self.config.raw}
        for each in found:
            for source, (n_documents, n_tokens) in each["sources"].items():
                counts = sums[str(self.config.raw[int(source)])]
                counts["documents"] += n_documents
                counts["tokens"] += n_tokens
        return sums

    def _run(self, stage: str, function: Callable, tasks: list[tuple], watch: Watch) -> None:
        n_done = 0

        def on_done(number: int, result: object) -> None:
            nonlocal n_done
            n_done += 1
            watch(stage, n_done, len(tasks))

        watch(stage, 0, len(tasks))
        run_tasks(function, tasks, n_workers=self.n_workers, on_done=on_done)

    def _wait(self, stage: str, n_missing: Callable[[], int]) -> None:
        """Wait for what other ranks do, and say so once."""
        is_said = False
        while n := n_missing():
            if not self.work.exists():
                raise DataError(f"{self.work} is gone: another rank gave up or is done; see what it said")
            if not is_said:
                others = "rank 0" if self.config.rank else "the other ranks"
                print(f"rank {self.config.rank} waits for {others}: {stage}, {n} to do", file=sys.stderr)
                is_said = True
            time.sleep(_POLL_S)


def _checked_tokenizer(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    tokenizer.encode("", bos=True, eos=True)
    return tokenizer


def _groups(sizes: list[int]) -> list[list[int]]:
    """Return numbers of consecutive parts that make a shard each; parts of which nothing stays are in none."""
    wanted = shard_bytes(sum(sizes))
    groups: list[list[int]] = []
    held = wanted
    for number, size in enumerate(sizes):
        if not size:
            continue
        if held >= wanted:
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += size
    return groups


def _totals(entries: list[dict[str, Any]]) -> dict[str, int]:
    names = ("n_documents", "n_tokens", "n_bytes") if entries else ()
    return {name: sum(entry[name] for entry in entries) for name in names}
