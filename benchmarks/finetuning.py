"""Does fine-tuning teach, and what does it cost what was known before? On the story world; one JSON line per variant.

    python -m benchmarks.finetuning [DEMO] [--items 1000] [--stories 2000] [--only lora,qlora,no-replay]

DEMO is the folder of a finished `llama2 demo`, made anew if not given: its base model is taught the tasks by an
adapter of rank 8, in the settings of the demo but for four minutes of two cores where that takes three; then held-out
tasks are done greedily, and held-out stories judged.
"""

import argparse
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import report
from llama2.data.storyworld.files import line
from llama2.data.storyworld.stories import stories
from llama2.data.storyworld.tasks import TASKS, tasks
from llama2.data.storyworld.words import LANGUAGES
from llama2.demo.judge import tell
from llama2.demo.run import demo, taught
from llama2.demo.size import FULL
from llama2.kernels.memory import keep_freed_memory
from llama2.llm import load
from llama2.tasks.evaluate import evaluate_tasks
from llama2.tasks.items import Item, read_items
from llama2.train.finetune import finetune
from llama2.train.finetune_config import FinetuneConfig

MEASURES = {"answer": "exact", "title": "exact", "sentiment": "accuracy", "translate": "chrF", "summarise": "ROUGE-L"}
N_STEPS = 1350
OF_REPLAY = ("replay", "replay_share", "replay_eval")
VARIANTS = {
    "lora": {},
    "qlora": {"method": "qlora"},
    "no-replay": {name: FinetuneConfig.model_fields[name].default for name in OF_REPLAY},
}


def held_out(kind: str, n: int, folder: Path) -> list[Item]:
    """Return n items of a task, the languages going round; of translations n of each pair, the pairs going round."""
    made = (
        line(asdict(each))
        for number, told in enumerate(stories(0, 10**6, split="heldout"))
        for language in ([LANGUAGES[number % 3]] if kind != "translate" else LANGUAGES)
        for each in tasks(told, language)
        if each.task == kind
    )
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(islice(made, n * (6 if kind == "translate" else 1))), encoding="utf-8")
    return read_items(path)


def consistency(model: Path, n_stories: int) -> float:
    """Return the share of held-out stories that are well formed and consistent."""
    llm = load(str(model), device="cpu", max_batch=64)
    n = n_stories // len(LANGUAGES)
    told = [found for language in LANGUAGES for _, found in tell(llm, language, n, seed=7)]
    return sum(found.is_consistent for found in told) / len(told)


def run(made: Path, variant: str, folder: Path, n_items: int, n_stories: int, before: float) -> None:
    long = {"max_steps": N_STEPS, "eval_every": 0, "save_every": 0, "resume": False, "out": folder / variant}
    settings = {**FULL.finetuning, **long, **VARIANTS[variant]}
    began = time.perf_counter()
    outcome = finetune(taught(made, settings))
    seconds = time.perf_counter() - began
    assert outcome.model is not None
    llm = load(str(outcome.model), device="cpu", max_batch=64)
    values: dict[str, object] = {"finetune_s": round(seconds, 1)}
    for kind in TASKS:
        items = held_out(kind, n_items, folder)
        for group in [items[i::6] for i in range(6)] if kind == "translate" else [items]:
            found = [score for score in evaluate_tasks(llm, group, temperature=0.0) if score.metric == MEASURES[kind]]
            n = sum(score.n for score in found)
            name = kind if kind != "translate" else f"translate {found[0].language}"
            values[name] = round(sum(score.value * score.n for score in found) / n, 2)
            values[f"{name} intervals"] = {
                str(score.language): [round(score.low, 1), round(score.high, 1)] for score in found
            }
    after = consistency(outcome.model, n_stories)
    values |= {"stories before": round(before, 4), "stories after": round(after, 4), "drop": round(before - after, 4)}
    report("finetuning", {"model": "demo", "dtype": variant, "items": n_items, "stories": n_stories, **values})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="?")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--stories", type=int, default=2000)
    parser.add_argument("--only", default=",".join(VARIANTS))
    options = parser.parse_args(arguments)
    keep_freed_memory()  # as our commands do
    with TemporaryDirectory() as folder:
        made = options.demo or Path(folder) / "demo"
        if options.demo is None:
            demo(made, size=FULL)
        before = consistency(made / "run" / "model", options.stories)
        for variant in options.only.split(","):
            run(made, variant, Path(folder), options.items, options.stories, before)


if __name__ == "__main__":
    main(sys.argv[1:])
