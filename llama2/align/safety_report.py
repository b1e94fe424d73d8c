"""How safe a model is, how helpful, and how often it refuses what it should answer: by amount of safety data.

Refusals and harm are told by `storyworld.safety`: exactly in that world; elsewhere refusals by how they begin, and
nothing tells harm. Answers are the likeliest ones.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama2.align.lessons import by_first, is_there, model_of, read_lines, write_lines
from llama2.align.rollout import Prompts, Sampling, sample
from llama2.align.safety_config import SafetyConfig
from llama2.align.safety_prompts import GROUPS, group_of, question_of, reward_of, tag_of
from llama2.align.scoring import Reward, shared
from llama2.align.task import GRADE
from llama2.data.dialogues.prompts import AskedPrompt
from llama2.data.interval import wilson
from llama2.data.storyworld.safety import is_harmful, is_refusal
from llama2.parallel.mesh import World
from llama2.train.report import render_plot

Line = dict[str, Any]


def answer(
    config: SafetyConfig,
    model: str | Path,
    judged: Sequence[AskedPrompt],
    folder: Path,
    world: World,
    console: Console,
) -> list[Line]:
    """Return what a model answers to the prompts that judge, with what the judges say, unless it is there already."""
    path = folder / "answers.jsonl"
    if not is_there(path, world):
        llm = model_of(config, model, world)
        prompts = Prompts(
            [each.messages for each in judged],
            llm.tokenizer,
            context_length=llm.config.context_length,
            max_new_tokens=config.max_new_tokens,
            chat_format=config.chat_format,
            too_long=config.too_long,
            name="prompts to judge by",
        )
        sampling = Sampling(config.max_new_tokens, 0.0)
        found = sample(llm.model, prompts, range(len(prompts)), sampling, seed=config.seed, world=world)
        texts = {prompts.conversations[each.number]: each.text for each in found}
        some = [each for each in judged if each.messages in texts]
        if len(some) < len(judged):
            console.print(f"{len(judged) - len(some):,} prompts to judge by left out (too long)")
        told = lines(config, some, [texts[each.messages] for each in some], llm.tokenizer, world)
        by_first(world, lambda: write_lines(path, told))
    return read_lines(path)


def lines(
    config: SafetyConfig, asked: Sequence[AskedPrompt], texts: Sequence[str], tokenizer, world: World = World()
) -> list[Line]:
    """Return each answer with its prompt's tags and what the judges say."""
    found: list[Line] = [
        {
            "prompt": each.messages[-1].content, "answer": text, "group": group_of(each),
            "category": tag_of(each, "category"), "vector": tag_of(each, "vector"), "is_refusal": is_refusal(text),
            "is_harmful": is_harmful(text) if question_of(each) else None, "safety_reward": None, "helpfulness": None,
        }
        for each, text in zip(asked, texts, strict=True)
    ]  # fmt: skip
    helpful_by = config.helpfulness_reward
    unsafe = [i for i, line in enumerate(found) if line["group"] == "unsafe"]
    others = [i for i, line in enumerate(found) if line["group"] != "unsafe"]
    if helpful_by is None and others and all(question_of(asked[i]) for i in others):
        helpful_by = GRADE
    for name, setting, spec, numbers in (
        ("safety_reward", "safety_reward", config.safety_reward, unsafe),
        ("helpfulness", "helpfulness_reward", helpful_by, others),
    ):
        if spec is not None and numbers:
            reward: Reward = shared(reward_of(setting, spec, [asked[i] for i in numbers], tokenizer), world)
            given = reward([asked[i].messages for i in numbers], [texts[i] for i in numbers])
            for i, number in zip(numbers, given, strict=True):
                found[i][name] = float(number)
    return found


def share(found: Sequence[Line], is_so: Callable[[Line], bool]) -> Line | None:
    """Return a share of lines with Wilson's 95 % interval; None of no lines."""
    if not found:
        return None
    n = sum(map(is_so, found))
    low, high = wilson(n, len(found))
    return {"share": n / len(found), "low": low, "high": high, "n": len(found)}


def mean(found: Sequence[Line], name: str) -> float | None:
    numbers = [line[name] for line in found if line[name] is not None]
    return sum(numbers) / len(numbers) if numbers else None


def summary(found: Sequence[Line]) -> Line:
    """Return what the answers of one model are: by group, and by category and vector within the groups."""
    groups = {name: [line for line in found if line["group"] == name] for name in GROUPS}

    def harms(line: Line) -> bool:
        return line["is_harmful"]

    def refused(**tags: str) -> Line:
        kept = [line for line in found if all(line[key] == value for key, value in tags.items())]
        some = {name: [line for line in kept if line["group"] == name] for name in ("unsafe", "borderline")}
        return {name: share(lines, lambda line: line["is_refusal"]) for name, lines in some.items()}

    return {
        "refused": {name: share(some, lambda line: line["is_refusal"]) for name, some in groups.items()},
        "harmful": share([line for line in groups["unsafe"] if line["is_harmful"] is not None], harms),
        "safety_reward": mean(found, "safety_reward"),
        "helpfulness": mean(found, "helpfulness"),
        **{f"by_{key}": {tag: refused(**{key: tag}) for tag in sorted({line[key] for line in found} - {""})}
           for key in ("category", "vector")},
    }  # fmt: skip


def write_report(
    config: SafetyConfig,
    judged: Sequence[AskedPrompt],
    answered: Mapping[float, Sequence[Line]],
    n_examples: int,
    out: Path,
    console: Console,
) -> None:
    """Write report.json, curves.json and, of several amounts, curves.png; print before and after."""
    found = {amount: summary(some) for amount, some in answered.items()}
    before, after = found[0.0], found[max(found)]
    (out / "report.json").write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n")
    curves = [point(amount, each) for amount, each in sorted(found.items())]
    (out / "curves.json").write_text(json.dumps({"n_examples": n_examples, "amounts": curves}, indent=1) + "\n")
    if len(config.amounts) > 1:
        (out / "curves.png").write_bytes(draw_curves(curves))
    for table in tables(before, after):
        console.print(table)


def point(amount: float, found: Line) -> Line:
    """Return the numbers of one amount that a curve is drawn of."""
    shares = {"refused": found["refused"]["unsafe"], "harmful": found["harmful"],
              "false_refusals": found["refused"]["borderline"]}  # fmt: skip
    return {"amount": amount, **shares, "safety_reward": found["safety_reward"], "helpfulness": found["helpfulness"]}


def tables(before: Line, after: Line) -> list[Table]:
    """Return what is printed: all over, and refusals by category and by vector."""
    over_all = Table("", "before", "after", box=None, header_style="bold", pad_edge=False)
    for name, get in {
        "unsafe prompts refused": lambda each: each["refused"]["unsafe"],
        "unsafe prompts answered with harm": lambda each: each["harmful"],
        "borderline prompts refused": lambda each: each["refused"]["borderline"],
        "ordinary prompts refused": lambda each: each["refused"]["ordinary"],
        "mean safety reward": lambda each: each["safety_reward"],
        "mean helpfulness": lambda each: each["helpfulness"],
    }.items():
        if get(before) is not None or (name.endswith("harm") and before["refused"]["unsafe"]):
            over_all.add_row(name, told(get(before)), told(get(after)))
    found = [over_all]
    for key in ("category", "vector"):
        groups = ("unsafe", "borderline")
        columns = ["unsafe: before", "after", "borderline: before", "after"]
        table = Table(f"refused, by {key}", *columns, box=None, header_style="bold", pad_edge=False)
        for tag, some in before[f"by_{key}"].items():
            cells = [told(each[group], digits=0) for group in groups for each in (some, after[f"by_{key}"][tag])]
            table.add_row(tag, *cells)
        if before[f"by_{key}"]:
            found.append(table)
    return found


def told(value: Line | float | None, *, digits: int = 1) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, dict):
        share, low, high = (f"{100 * value[name]:.{digits}f}" for name in ("share", "low", "high"))
        return f"{share} % ({low} to {high})"
    return f"{value:.3f}"


def draw_curves(curves: Sequence[Line]) -> bytes:
    """Return the plot as a PNG: shares on the left axis, with rewards that lie from 0 to 1, others on the right one."""
    amounts = [each["amount"] for each in curves]

    def draw(axes) -> None:
        for name, label, colour in (
            ("refused", "unsafe refused", "#4a8fd4"),
            ("false_refusals", "borderline refused", "#d9812f"),
        ):
            some: list[Line] = [each[name] for each in curves]
            if all(some):
                axes.plot(amounts, [each["share"] for each in some], "o-", color=colour, markersize=3.5, label=label)
                low, high = ([each[end] for each in some] for end in ("low", "high"))
                axes.fill_between(amounts, low, high, color=colour, alpha=0.15)
        axes.set_ylim(-0.02, 1.02)
        rewards = axes.twinx()
        for name, label, colour in (
            ("safety_reward", "safety reward", "#3f9b6c"),
            ("helpfulness", "helpfulness", "#8a63b8"),
        ):
            values = [each[name] for each in curves]
            if all(value is not None for value in values):
                is_share = all(0 <= value <= 1 for value in values)
                label = label if is_share else f"{label} (right)"
                (axes if is_share else rewards).plot(amounts, values, "o--", color=colour, markersize=3.5, label=label)
        rewards.tick_params(labelsize=8)
        rewards.yaxis.set_visible(bool(rewards.get_lines()))
        axes.set_xlabel("percent of the safety data", fontsize=8)
        axes.set_title("Safety and helpfulness", fontsize=10, loc="left")
        lines = [*axes.get_lines(), *rewards.get_lines()]
        axes.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=7)

    return render_plot(draw, "png")
