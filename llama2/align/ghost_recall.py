"""How long an instruction is kept in mind: shares of obedient answers by turn (arXiv:2307.09288 table 30).

The instruction stands in the first question alone; every answer is the model's own, the likeliest one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama2.align.ghost_config import GhostConfig
from llama2.align.instructed import Check, Instructed
from llama2.align.lessons import by_first, is_there, model_of
from llama2.align.rollout import Sampling
from llama2.align.talk import Talk, carry_on
from llama2.data.interval import wilson
from llama2.parallel.mesh import World
from llama2.train.report import render_plot

COLOURS = {"before": "#d9812f", "after": "#4a8fd4"}


def write_recall(
    config: GhostConfig,
    models: Mapping[str, str | Path],
    dialogues: Sequence[Instructed],
    check: Check,
    out: Path,
    world: World,
    console: Console,
) -> None:
    """Write recall.json and recall.png of some models, unless they are there, and print the table."""
    path = out / "recall.json"
    if not is_there(path, world):
        found = {name: recall(config, model, dialogues, check, world) for name, model in models.items()}
        by_first(world, lambda: path.write_text(json.dumps(found, indent=1) + "\n"))
    found = json.loads(path.read_text())
    by_first(world, lambda: (out / "recall.png").write_bytes(draw_recall(found)))
    tell(config, found, console)


def recall(
    config: GhostConfig, model: str | Path, dialogues: Sequence[Instructed], check: Check, world: World = World()
) -> list[dict[str, Any]]:
    """Return for each turn how many dialogues reach it, and how many of its answers obey."""
    talks = [Talk(each.in_first[: max(config.recall_turns)], each.system) for each in dialogues]
    sampling = Sampling(config.max_new_tokens, temperature=0.0)
    llm = model_of(config, model, world)
    carry_on(llm, talks, sampling, seed=config.seed, chat_format=config.chat_format, world=world)
    found = []
    for turn in range(1, max(talk.n_turns for talk in talks) + 1):
        answers = [
            (each.instruction, talk.answers[turn - 1])
            for each, talk in zip(dialogues, talks, strict=True)
            if len(talk.answers) >= turn
        ]
        obeyed = world.gather([check(*answers[i]) for i in world.share(len(answers))])
        n_asked = sum(talk.n_turns >= turn for talk in talks)
        counts = {"turn": turn, "n": len(answers), "n_left_out": n_asked - len(answers)}
        found.append(counts | shares(sum(obeyed), len(answers)))
    return found


def shares(n_obedient: int, n: int) -> dict[str, Any]:
    """Return a share with Wilson's 95 % interval; of nothing there is none."""
    low, high = wilson(n_obedient, n) if n else (None, None)
    return {"n_obedient": n_obedient, "share": n_obedient / n if n else None, "low": low, "high": high}


def tell(config: GhostConfig, found: Mapping[str, Sequence[Mapping[str, Any]]], console: Console) -> None:
    """Print the shares at the turns that were asked for."""
    table = Table("turn", *found, "dialogues", box=None, header_style="bold", pad_edge=False)
    turns = [turn for turn in config.recall_turns if turn <= len(next(iter(found.values())))]
    for turn in turns:
        rows = [some[turn - 1] for some in found.values()]
        told = [
            f"{100 * row['share']:.0f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})" if row["n"] else "-"
            for row in rows
        ]
        table.add_row(str(turn), *told, ", ".join(dict.fromkeys(str(row["n"]) for row in rows)))
    console.print("answers that obey an instruction given in the first turn, with 95 % intervals:")
    console.print(table)
    for name, some in found.items():
        if n_left_out := max(row["n_left_out"] for row in some):
            console.print(f"{name}: up to {n_left_out:,} dialogues outgrew the context, and count as far as they went")
    if len(turns) < len(config.recall_turns):
        console.print(f"no dialogue is as long as {max(config.recall_turns)} turns: give longer ones, --eval-dialogues")


def draw_recall(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Return the plot as a PNG."""

    def draw(axes) -> None:
        for name, rows in found.items():
            some = [row for row in rows if row["n"]]
            turns, colour = [row["turn"] for row in some], COLOURS[name]
            axes.plot(turns, [row["share"] for row in some], "o-", color=colour, markersize=3.5, label=name)
            low, high = ([row[end] for row in some] for end in ("low", "high"))
            axes.fill_between(turns, low, high, color=colour, alpha=0.15)
        axes.set_ylim(-0.02, 1.02)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("turn", fontsize=8)
        axes.set_title("Answers that obey what was said in the first turn", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8)

    return render_plot(draw, "png")
