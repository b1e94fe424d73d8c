"""What happened in a run, as one page that needs nothing else, and as PNG plots."""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2.train.metrics import read_log

INK = "#123457"
"""Stands for the page's own text colour in the drawings; replaced by currentColor."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #5b6675; --line: #d9dee5; --ground: #fff; --card: #f5f7fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --faint: #9aa5b3; --line: #323a45; --ground: #14181d; --card: #1c2229 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p { color: var(--faint) }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem }
.plots svg { width: 100%; height: auto; color: var(--ink) }
table { border-collapse: collapse } td { padding: .15rem 1.5rem .15rem 0; border-bottom: 1px solid var(--line) }
td:first-child { color: var(--faint) } td { font-variant-numeric: tabular-nums }
blockquote { background: var(--card); margin: .5rem 0; padding: .6rem 1rem; border-radius: .4rem;
  white-space: pre-wrap }
blockquote b { color: var(--faint); font-weight: normal } small { color: var(--faint) }
details { margin-top: 1rem } pre { background: var(--card); padding: 1rem; border-radius: .4rem; overflow: auto }
"""

JUDGED = ("#d9812f", "#3f9b6c")
"""Colours of the sets that are judged by: the held-out one, and earlier data."""

PLOTS = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
}


def write_report(
    out: Path, *, title: str, facts: Mapping[str, str], settings: str, plots: Mapping[str, str] | None = None
) -> Path:
    """Write OUT/report.html and a PNG per plot from OUT/log.jsonl; return the page.

    plots: quantities of the log's steps to draw besides the usual ones, with titles.
    """
    log = read_log(out / "log.jsonl")
    steps = list({line["step"]: line for line in log if line["kind"] == "step"}.values())
    evaluations = list({(line["step"], line["of"]): line for line in log if line["kind"] == "evaluation"}.values())
    drawings = []
    for name, label in {**PLOTS, **(plots or {})}.items():
        draw = _curve(steps, evaluations if name == "loss" else [], name, label)
        (out / f"{name}.png").write_bytes(render_plot(draw, "png"))
        drawings.append(render_plot(draw, "svg").decode("utf-8").replace(INK, "currentColor"))
    page = out / "report.html"
    page.write_text(_page(title, facts, settings, drawings, log), encoding="utf-8")
    return page


def _curve(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], name: str, label: str):
    """Return a function that draws one quantity over the steps."""
    good = [line for line in steps if not line.get("skipped")]
    bad = [line["step"] for line in steps if line.get("skipped")]

    def draw(axes) -> None:
        told = [line for line in good if name in line]
        xs, ys = [line["step"] for line in told], [line[name] for line in told]
        axes.plot(xs, ys, color="#9cc1ea" if name == "loss" else "#4a8fd4", linewidth=0.9, label="train")
        if name == "loss":
            axes.plot(xs, _smooth(ys), color="#4a8fd4", linewidth=1.6, label="train, smoothed")
            for of, color in zip(dict.fromkeys(line["of"] for line in evaluations), JUDGED, strict=False):
                found = [(line["step"], line["loss"]) for line in evaluations if line["of"] == of]
                axes.plot(*zip(*found, strict=True), "o-", color=color, markersize=3.5, linewidth=1.4, label=of)
            axes.legend(frameon=False, fontsize=8)
        for step in bad[:200]:
            axes.axvline(step, color="#c0392b", linewidth=0.6, alpha=0.6)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        judged = [line["loss"] for line in evaluations]
        axes.set_ylim(*_limits([*ys, *judged], name))

    return draw


def _limits(ys: Sequence[float], name: str) -> tuple[float, float | None]:
    """Leave out the few most extreme values, which hide everything else; the learning rate has none.

    What is never negative begins at 0, but for the loss.
    """
    if not ys:
        return 0.0, 1.0
    ordered = sorted(ys)
    if ordered[0] < 0 and name != "loss":  # then either end may have them
        few = len(ordered) // 200
        low, top = ordered[few], ordered[-1 - few]
    else:
        low = ordered[0] if name == "loss" else 0.0
        top = ordered[-1] if name == "learning_rate" else ordered[int(0.995 * (len(ordered) - 1))]
    room = top - low or abs(top)
    return low - 0.03 * room, top + 0.08 * room + 1e-12


def _smooth(ys: Sequence[float], share: float = 0.05) -> list[float]:
    result: list[float] = []
    keep = max(0.0, 1 - 1 / max(1.0, share * len(ys)))
    total = weight = 0.0
    for y in ys:
        total, weight = keep * total + y, keep * weight + 1
        result.append(total / weight)
    return result


def render_plot(draw: Callable[[Any], None], format: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    ink = INK if format == "svg" else "#1c2430"
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({**dict.fromkeys(keys, ink), "svg.hashsalt": "llama2", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.patch.set_alpha(0)
        draw(axes)
        buffer = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else None
        figure.savefig(buffer, format=format, dpi=150, transparent=format == "svg", metadata=metadata)
    text = buffer.getvalue()
    return text[text.index(b"<svg") :] if format == "svg" else text


def _page(title: str, facts: Mapping[str, str], settings: str, drawings: Sequence[str], log: Sequence[Mapping]) -> str:
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    samples = [line for line in log if line["kind"] == "sample"]
    events = [line for line in log if line["kind"] in ("skipped", "rewind", "stopped", "resumed")]
    told = "".join(
        f"<small>step {line['step']}</small><blockquote><b>{html.escape(line['prompt'])}</b>"
        f"{html.escape(line['text'])}</blockquote>"
        for line in samples[-12:]
    )
    happened = "".join(
        f"<tr><td>step {line['step']}</td><td>{html.escape(line['kind'])}</td>"
        f"<td>{html.escape(str(line.get('reason', '')))}</td></tr>"
        for line in events[:50]
    )
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<h2>Outcome</h2><table>{rows}</table>",
        f'<h2>Curves</h2><div class="plots">{"".join(drawings)}</div>',
        f"<h2>Samples</h2>{told}" if told else "",
        f"<h2>Events</h2><table>{happened}</table>" if happened else "",
        f"<details><summary>Settings</summary><pre>{html.escape(settings)}</pre></details>",
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
