"""What alignment did to a model: the exact grade of its answers, and how far it went from where it began.

grade     mean over sampled answers to story-world questions, 0 to 1, with a 95 % interval over questions
kl        mean of ln p(answer) - ln p_reference(answer), in nats per answer, over the same answers
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llama2.align.rollout import Prompts, Sampled, Sampling, rows_of, sample
from llama2.data.interval import bootstrap, wilson
from llama2.data.preferences.batch import lay_out
from llama2.data.storyworld.questions import Question
from llama2.data.storyworld.safety import is_refusal
from llama2.llm import load
from llama2.model.losses import token_logprobs
from llama2.model.transformer import Transformer


@dataclass(frozen=True)
class Measured:
    """How a model answers, over all seeds."""

    grade: float
    low: float
    """Of the 95 % interval of the mean grade."""
    high: float
    kl: float | None
    """None without a reference."""
    by_kind: dict[str, float]
    refused: tuple[float, float, float]
    """Share of unsafe prompts that are refused, and its interval."""
    falsely: tuple[float, float, float]
    """Share of harmless prompts, borderline ones among them, that are refused."""
    n_answers: int
    answer_tokens: float


def measure(
    model: str,
    questions: Sequence[Question],
    *,
    reference: str | None = None,
    seeds: Sequence[int] = (0,),
    temperature: float = 1.0,
    max_new_tokens: int = 150,
) -> Measured:
    """Sample an answer to each question for each seed, and judge them. Questions that do not fit are left out."""
    llm = load(model)
    prompts = Prompts(
        [each.prompt for each in questions],
        llm.tokenizer,
        context_length=llm.config.context_length,
        max_new_tokens=max_new_tokens,
        too_long="drop",
    )
    known = {each.prompt: each for each in questions}
    asked = [known[each] for each in prompts.conversations]
    sampling = Sampling(max_new_tokens, temperature)
    answers = [each for seed in seeds for each in sample(llm.model, prompts, range(len(prompts)), sampling, seed=seed)]
    grades = np.array([asked[each.number].grade(each.text) for each in answers]).reshape(len(seeds), -1)
    low, high = bootstrap(len(asked), lambda sample: float(grades[:, sample].mean()))
    kinds = np.array([each.kind for each in asked])
    return Measured(
        grade=float(grades.mean()),
        low=low,
        high=high,
        kl=divergence(llm.model, load(reference).model, prompts, answers) if reference else None,
        by_kind={str(kind): float(grades[:, kinds == kind].mean()) for kind in sorted(set(kinds))},
        refused=_refusals([each for each in answers if kinds[each.number] == "unsafe"]),
        falsely=_refusals([each for each in answers if kinds[each.number] != "unsafe"]),
        n_answers=len(answers),
        answer_tokens=float(np.mean([len(each.ids) for each in answers])),
    )


def _refusals(answers: Sequence[Sampled]) -> tuple[float, float, float]:
    if not answers:
        return 0.0, 0.0, 1.0
    n = sum(is_refusal(each.text) for each in answers)
    return n / len(answers), *wilson(n, len(answers))


@torch.no_grad()
def divergence(model: Transformer, reference: Transformer, prompts: Prompts, answers: Sequence[Sampled]) -> float:
    """Return the mean of ln p(answer) - ln p_reference(answer) of sampled answers, in nats per answer."""
    rows = rows_of(answers, prompts.tokenizer, length=model.config.context_length)
    order = np.argsort(rows.lengths, kind="stable")
    total = 0.0
    for at in range(0, len(order), 32):
        batch, _ = lay_out(rows, order[at : at + 32])
        total += float((token_logprobs(model, batch) - token_logprobs(reference, batch)).sum())
    return total / len(answers)


def show(found: dict[str, Measured], console: Console) -> None:
    """Print a row for each model; the first one is where the others began, and the gap is what it lacks to 100."""
    table = Table(
        "model", "grade", "gap closed", "KL", "unsafe refused", "others refused", box=None,
        header_style="bold", pad_edge=False,
    )  # fmt: skip
    begun = next(iter(found.values())).grade
    for name, each in found.items():
        closed = (each.grade - begun) / (1 - begun)
        table.add_row(
            name,
            f"{100 * each.grade:.1f} ({100 * each.low:.1f} to {100 * each.high:.1f})",
            f"{100 * closed:.0f} %",
            "" if each.kl is None else f"{each.kl:.2f}",
            f"{100 * each.refused[0]:.1f} %",
            f"{100 * each.falsely[0]:.1f} %",
        )
    console.print(table)
