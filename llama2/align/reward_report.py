"""How right a reward model is: by rating, with intervals, and whether its certainty is deserved.

accuracy.json     pairs in the right order, for each rating and over all
calibration.png   of pairs of which it is p certain, p should be in the right order
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llama2.checkpoint import store
from llama2.data.interval import wilson
from llama2.data.preferences.loader import in_order
from llama2.data.preferences.pair import RATINGS
from llama2.data.preferences.sets import PairSet
from llama2.model.heads import at_ends, read_head
from llama2.model.losses import hidden_states
from llama2.train.report import render_plot

N_BINS = 10


@dataclass(frozen=True)
class Accuracy:
    """Pairs in the right order; a tie is half right."""

    rating: str
    share: float
    low: float
    """95 % interval, Wilson's."""
    high: float
    n: int


def write_accuracy(model: Path, held_out: PairSet, console: Console) -> list[Accuracy]:
    """Judge a reward model's folder by held-out pairs; print a table, write accuracy.json and calibration.png."""
    gaps = gaps_of(model, held_out)
    found = list(accuracies(gaps, held_out))
    (model.parent / "accuracy.json").write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    (model.parent / "calibration.png").write_bytes(render_plot(calibration(gaps), "png"))
    table = Table("rating", "pairs in the right order", "pairs", box=None, header_style="bold", pad_edge=False)
    for each in found:
        share = f"{100 * each.share:.1f} % ({100 * each.low:.1f} to {100 * each.high:.1f})"
        table.add_row(each.rating, share, f"{each.n:,}")
    console.print(table)
    return found


@torch.no_grad()
def gaps_of(model: Path, pairs: PairSet, *, batch_size: int = 32) -> Tensor:
    """Return for each pair by how much the chosen answer's score is above the rejected one's, [N]."""
    scorer = store.load_scored(model, dtype="float32").eval()
    gaps = []
    for batch in in_order(pairs, batch_size):
        ends = at_ends(hidden_states(scorer, batch.rows), batch.ends)[batch.sides]
        chosen, rejected = read_head(scorer, "score", ends).chunk(2)
        gaps.append(chosen - rejected)
    return torch.cat(gaps)


def accuracies(gaps: Tensor, pairs: PairSet) -> Iterator[Accuracy]:
    """Yield the accuracy for each rating that occurs, the clearest first, and over all pairs."""
    ratings = torch.from_numpy(pairs.ratings)
    for name, code in [*RATINGS.items(), ("without a rating", -1), ("all", None)]:
        some = gaps if code is None else gaps[ratings == code]
        if len(some):
            right = float((some > 0).sum()) + 0.5 * float((some == 0).sum())
            low, high = wilson(round(right), len(some))
            yield Accuracy(name, right / len(some), low, high, len(some))


def calibration(gaps: Tensor):
    """Return a function that draws how often the model is right against how certain it is, sigmoid(|gap|)."""
    certain, is_right = gaps.abs().sigmoid(), (gaps > 0).float()
    which = ((certain - 0.5) * 2 * N_BINS).long().clamp_max(N_BINS - 1)
    bins = [(certain[which == i], is_right[which == i]) for i in range(N_BINS)]
    points = [(float(p.mean()), float(r.mean()), len(p)) for p, r in bins if len(p)]

    def draw(axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color="#8a94a0", linewidth=0.8, linestyle="--", label="as certain as right")
        xs, ys, sizes = zip(*points, strict=True)
        axes.plot(xs, ys, color="#4a8fd4", linewidth=1.2, label="this model")
        axes.scatter(xs, ys, s=[12 + 120 * n / max(sizes) for n in sizes], color="#4a8fd4", alpha=0.8)
        axes.set_title("Right, against how certain (size: pairs)", fontsize=10, loc="left")
        axes.set_xlabel("certainty", fontsize=8)
        axes.legend(frameon=False, fontsize=8)

    return draw
