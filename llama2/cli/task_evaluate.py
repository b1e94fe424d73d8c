"""`llama2 task evaluate`: a labelled file to a table."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from llama2.cli.options import LoadOptions
from llama2.cli.task import AsJson, AskOptions, ChooseOptions, Model, Names, WriteOptions
from llama2.errors import RequestError
from llama2.files.staging import make_parent


def evaluate(
    model: Model,
    file: Path,
    /,
    *,
    task: str | None = None,
    labels: Names = (),
    source: Annotated[str | None, Parameter(name="--from")] = None,
    to: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    batch_size: int = 32,
    as_json: AsJson = False,
    sample: WriteOptions = WriteOptions(),
    choose: ChooseOptions = ChooseOptions(),
    ask: AskOptions = AskOptions(),
    load: LoadOptions = LoadOptions(),
) -> None:
    """Score a model on a labelled file: a table by task and language, with 95 % intervals.

    Parameters
    ----------
    file
        JSON lines of task, language, instruction, input and output, as `llama2 world` writes them; or with --task
        text and label, source and target, or a .tsv file of two such columns.
    task
        sentiment, classify, answer, title, summarise or translate: what the file is for, or which task in it to score.
    labels
        A label to choose from, or FILE'S=MODEL'S, as in 1=positive; those that occur in the file if not given.
    source
        Language to translate from, where the file does not tell.
    to
        Language to translate into, where the file does not tell.
    limit
        Take only this many items.
    out
        New file for one line per item, with the model's answer.
    batch_size
        Answers to write at once.
    """
    from llama2.tasks.evaluate import answer_items, score_answers
    from llama2.tasks.items import read_items

    if limit is not None and limit < 1:
        raise RequestError(f"--limit {limit} must be at least 1")
    if out is not None and out.exists():
        raise RequestError(f"--out {out} exists; name a new file, nothing is overwritten")
    renamed = dict(name.split("=", 1) for name in labels if "=" in name)
    chosen = tuple(dict.fromkeys(name.split("=", 1)[-1] for name in labels))
    known = {"language": ask.language, "source_language": source, "target_language": to, "labels": renamed}
    items = read_items(file, task=task, limit=limit, **known)
    shown = [] if ask.examples is None else read_items(ask.examples, task=task, **known)
    options = {**sample.given(), **vars(choose), "instruction": ask.instruction, "style": ask.style}
    llm = load.load(model, max_batch=batch_size)
    answers = answer_items(llm, items, labels=chosen or None, examples=shown, **options)
    answered = list(_written(_track(answers, len(items)), out))
    n_cut = sum(each.finish_reason == "length" for each in answered)
    if n_cut:
        print(f"note: {n_cut} answers were cut off; raise --max-new-tokens for the rest", file=sys.stderr)
    _print_scores(score_answers(answered), as_json)


def _track(answers: Iterable[Any], total: int) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    return track(answers, description="answering", total=total, console=Console(stderr=True))


def _written(answers: Iterable[Any], out: Path | None) -> Iterator[Any]:
    """Pass answers on, each with a line of its own in `out` at once, so that an interruption loses none."""
    if out is None:
        yield from answers
        return
    make_parent(out)
    with out.open("x", encoding="utf-8", newline="\n") as file:
        for each in answers:
            record = {**asdict(each.item), "answer": each.text, "probabilities": each.probabilities}
            file.write(json.dumps(record | {"finish_reason": each.finish_reason}, ensure_ascii=False) + "\n")
            file.flush()
            yield each


def _print_scores(scores: Iterable[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(each) for each in scores], indent=2))
        return
    print(f"{'task':<10} {'language':<8} {'metric':<9} {'value':>6}  {'95 % interval':<15} {'items':>6}")
    for each in scores:
        interval = f"{each.low:.1f} to {each.high:.1f}"
        print(
            f"{each.task:<10} {each.language or '-':<8} {each.metric:<9} {each.value:>6.1f}  {interval:<15} {each.n:>6}"
        )
