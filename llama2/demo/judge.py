"""What the demo's models can do, by the exact judges of the story world."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from llama2.align.measure import measure, show
from llama2.align.scoring import load_reward
from llama2.data.interval import wilson
from llama2.data.storyworld.grade import Grade, grade
from llama2.data.storyworld.questions import questions
from llama2.data.storyworld.stories import Story, stories
from llama2.data.storyworld.words import LANGUAGES, Language
from llama2.llm import LLM, load
from llama2.tasks.evaluate import evaluate_tasks
from llama2.tasks.items import Item

MEASURES = {"answer": "exact", "title": "exact", "sentiment": "accuracy", "summarise": "ROUGE-L", "translate": "chrF"}
"""The one measure of each task that the demo shows; `llama2 task evaluate` shows all."""
LANGUAGE_NAMES = {"en": "English", "es": "Spanish", "zh": "Chinese"}


def show_stories(llm: LLM, console: Console, n: int) -> None:
    """Print a story of each language, and how good all of them are."""
    table = Table("language", "stories", "well formed", "and consistent", box=None, header_style="bold", pad_edge=False)
    for language in LANGUAGES:
        told = tell(llm, language, n)
        text, _ = next(((text, found) for text, found in told if found.is_consistent), told[0])
        console.print(f"\n{text}", markup=False)
        shares = [sum(each) for each in zip(*((g.is_well_formed, g.is_consistent) for _, g in told), strict=True)]
        table.add_row(LANGUAGE_NAMES[language], str(n), *(percent(share, n) for share in shares))
    console.print("\nOf such stories, by the exact judge of the story world (95 % intervals):\n")
    console.print(table)


def tell(llm: LLM, language: Language, n: int, *, seed: int = 1) -> list[tuple[str, Grade]]:
    """Let the model finish n held-out stories at temperature 0.8, and judge each, its opening included."""
    begun: list[Story] = list(stories(0, n, split="heldout"))
    openings = [each.opening(language) for each in begun]
    room = llm.config.context_length - max(len(llm.prompt_ids(text)) for text in openings)
    ends = llm.generate(openings, max_new_tokens=room, temperature=0.8, top_p=1.0, seed=range(seed * n, seed * n + n))
    texts = [opening + end for opening, end in zip(openings, ends, strict=True)]
    grades = [grade(text, language) for text in texts]
    return [
        (text, Grade(g.is_well_formed, g.is_well_formed and g.is_consistent, g.n_sentences, g.problem))
        for text, g in zip(texts, grades, strict=True)
    ]


def percent(k: int, n: int) -> str:
    low, high = wilson(k, n)
    return f"{100 * k / n:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def show_tasks(llm: LLM, console: Console, items: Sequence[Item]) -> None:
    """Print how well a model does what the held-out tasks ask for."""
    table = Table("task", "language", "measure", "score", "items", box=None, header_style="bold", pad_edge=False)
    for found in evaluate_tasks(llm, items, temperature=0.0):
        if MEASURES[found.task] != found.metric:
            continue
        score = f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f})"
        table.add_row(found.task, found.language or "", found.metric, score, str(found.n))
    console.print(table)


def show_alignment(before: str, after: str, reward: str, console: Console, n: int) -> None:
    """Print how well held-out questions are answered by a model and by what was made of it."""
    asked = list(questions(0, n, split="heldout"))
    found = {"before": measure(before, asked), "aligned": measure(after, asked, reference=before)}
    show(found, console)
    kinds = sorted(found["before"].by_kind)
    table = Table("grade of answers to", *found, box=None, header_style="bold", pad_edge=False)
    for kind in kinds:
        table.add_row(kind, *(f"{100 * each.by_kind[kind]:.0f}" for each in found.values()))
    console.print(table)
    one = next((each for each in asked if each.kind == "unsafe"), asked[0])
    scorer = load_reward(reward)
    for name, model in (("before", before), ("aligned", after)):
        answer = load(model).complete(one.prompt, max_new_tokens=60, temperature=0).text.strip()
        (score,) = scorer([one.prompt], [answer])
        console.print(f"\n... {one.prompt[-1].content[-160:]}\n  {name}, reward {score:.2f}: {answer}", markup=False)
