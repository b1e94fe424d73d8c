"""Loading a checkpoint: seconds and memory, beside transformers.

    python -m benchmarks.load [--model tinyllama-1.1b] [--rounds 5]

A folder of random bfloat16 weights is written once and read once, so that it lies in the page cache for both.
Then each side opens it in a fresh process, in turn. Memory is counted above what the process held after its
imports, from /proc/self/smaps_rollup: private is what no other process shares (pages of the mapped file that
were touched among them), dirty the part of it that cannot be given back without being written somewhere.
Since mapped weights are paged in when first used, everything is measured again after a first token.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

PROMPT = list(range(3, 35))
MIB = 1 << 20


def memory() -> dict[str, float]:
    """Return this process's memory in MiB."""
    kib = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        kib[name] = int(value.split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "private_mib": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024,
        "dirty_mib": kib["Private_Dirty"] / 1024,
        "peak_rss_mib": peak / 1024,
    }


def ours(folder: str) -> tuple[Callable[[], object], Callable[[object], object]]:
    """Import what is needed; return how to load and how to get a first token."""
    from llama2.infer.engine import Engine
    from llama2.infer.request import Request, SamplingParams
    from llama2.llm import load

    request = Request("r", tuple(PROMPT), SamplingParams(max_new_tokens=1, temperature=0.0))
    return lambda: load(folder, device="cpu"), lambda llm: Engine(llm.model).generate([request])


def theirs(folder: str) -> tuple[Callable[[], object], Callable[[object], object]]:
    """The same for transformers."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)

    def first_token(model) -> object:
        return model.generate(torch.tensor([PROMPT]), generation_config=config)

    return lambda: LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), first_token


SIDES = {"ours": ours, "theirs": theirs}


def measure_here(side: str, folder: str) -> dict[str, float]:
    """Load in this process and return what it took."""
    start = time.perf_counter()
    load, first_token = SIDES[side](folder)
    imported, before = time.perf_counter(), memory()
    model = load()
    loaded, after_load = time.perf_counter(), memory()
    first_token(model)
    answered, after_token = time.perf_counter(), memory()
    values = {"import_s": imported - start, "load_s": loaded - imported, "load_and_first_token_s": answered - imported}
    values |= {f"load_{name}": after_load[name] - before[name] for name in before}
    return values | {f"first_token_{name}": after_token[name] - before[name] for name in before}


def run(name: str, n_rounds: int) -> list[dict[str, object]]:
    """Write the checkpoint, let both sides load it in turn, return the medians."""
    from benchmarks.measure import Company, report

    taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        subprocess.run([sys.executable, "-m", "benchmarks.load", "--write", str(folder), "--model", name], check=True)
        os.sync()  # pages not yet on the disk would count as dirty
        size = 0
        for file in sorted(folder.iterdir()):
            with file.open("rb") as stream:
                while chunk := stream.read(16 * MIB):
                    size += len(chunk)
        company = Company()
        for number in range(n_rounds + 1):
            for side in SIDES:
                command = [sys.executable, "-m", "benchmarks.load", "--side", side, "--folder", str(folder)]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                if number:
                    taken[side].append(json.loads(printed.splitlines()[-1]))
        others = company.share()
    medians = {side: {key: median(each[key] for each in rows) for key in rows[0]} for side, rows in taken.items()}
    values: dict[str, object] = {
        "model": name,
        "dtype": "bfloat16",
        "file_mib": round(size / MIB, 1),
        "others_cpu": others,
    }
    for side, numbers in medians.items():
        values[side] = {key: round(value, 3 if key.endswith("_s") else 1) for key, value in numbers.items()}
    ratios = {
        f"theirs/ours {key}": round(medians["theirs"][key] / medians["ours"][key], 3)
        for key in ("load_s", "load_and_first_token_s", "first_token_private_mib", "first_token_peak_rss_mib")
    }
    return [report("load", {**values, **ratios, "rounds": n_rounds})]


def write(name: str, folder: str) -> None:
    import torch

    import llama2
    from llama2.model.family import family_config
    from llama2.model.transformer import build

    llama2.save(build(family_config(name), dtype=torch.bfloat16), folder)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyllama-1.1b", help="a name of llama2's FAMILY")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        write(options.model, options.write)
    elif options.side:
        print(json.dumps(measure_here(options.side, options.folder)))
    else:
        run(options.model, options.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
