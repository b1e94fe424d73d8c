"""How near answers are to the right ones; every number from 0 to 100, with a 95 % interval.

    accuracy, exact    share of right answers                       Wilson's interval
    macro F1           mean over labels of 2 tp / (2 tp + fp + fn)  bootstrap over the items, as below
    ROUGE-1, -2, -L    F1 of words, pairs, common subsequence       Lin 2004, sec. 2 and 3.1; mean over the items
    chrF, BLEU         of the corpus, by sacrebleu                  pip install 'llama2[eval]'

ROUGE takes words without case, not stemmed; each Chinese character is a word.
"""

import importlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama2.data.interval import bootstrap, wilson
from llama2.errors import RequestError

_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Measure:
    """A number with its interval."""

    name: str
    value: float
    low: float
    high: float


def share(name: str, hits: Sequence[bool]) -> Measure:
    """Return how many of 100 are right."""
    low, high = wilson(sum(hits), len(hits))
    return Measure(name, 100 * sum(hits) / len(hits), 100 * low, 100 * high)


def is_same(answer: str, right: str) -> bool:
    """Tell whether two texts are equal but for white space."""
    return " ".join(answer.split()) == " ".join(right.split())


def macro_f1(right: Sequence[str], said: Sequence[str]) -> Measure:
    """Return the mean F1 of the labels that occur, as right ones or as answers."""
    names = sorted({*right, *said})
    pairs = np.array([[names.index(a), names.index(b)] for a, b in zip(right, said, strict=True)])

    def statistic(items: np.ndarray) -> float:
        chosen = pairs[items]
        table = np.zeros((len(names), len(names)))
        np.add.at(table, (chosen[:, 0], chosen[:, 1]), 1)
        both = table.sum(0) + table.sum(1)
        return 100 * float((2 * table.diagonal()[both > 0] / both[both > 0]).mean())

    return _measured("macro F1", len(right), statistic)


def rouge(right: Sequence[str], said: Sequence[str]) -> list[Measure]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L."""
    both = [(words(a), words(b)) for a, b in zip(right, said, strict=True)]
    values = {
        "ROUGE-1": [rouge_n(a, b, 1) for a, b in both],
        "ROUGE-2": [rouge_n(a, b, 2) for a, b in both],
        "ROUGE-L": [rouge_l(a, b) for a, b in both],
    }
    return [_mean(name, 100 * np.array(found)) for name, found in values.items()]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, each Chinese character for itself."""
    return _WORD.findall(text.lower())


def rouge_n(right: Sequence[str], said: Sequence[str], n: int) -> float:
    """Return the F1 of runs of n words, each counted as often as it occurs in both."""
    grams = [Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (right, said)]
    return _f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def rouge_l(right: Sequence[str], said: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of words."""
    row = [0] * (len(said) + 1)
    for word in right:
        before = row
        row = [0]
        for j, other in enumerate(said):
            row.append(before[j] + 1 if word == other else max(row[j], before[j + 1]))
    return _f1(row[-1], len(right), len(said))


def _f1(common: int, n_right: int, n_said: int) -> float:
    return 2 * common / (n_right + n_said) if common else 0.0


def corpus_scores(right: Sequence[str], said: Sequence[str], *, language: str | None) -> list[Measure]:
    """Return chrF and BLEU; `language` is that of the texts: Chinese is cut into characters for BLEU."""
    metrics = require_sacrebleu()
    tokenize = "zh" if language == "zh" else "13a"
    return [
        _of_corpus(name, metric, right, said)
        for name, metric in (("chrF", metrics.CHRF()), ("BLEU", metrics.BLEU(tokenize=tokenize)))
    ]


def require_sacrebleu():
    """Return sacrebleu's metrics. Raises RequestError unless it is installed."""
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise RequestError(
            f"chrF and BLEU need sacrebleu, which is not installed ({error}); run: pip install 'llama2[eval]'"
        ) from None


def _of_corpus(name: str, metric, right: Sequence[str], said: Sequence[str]) -> Measure:
    # Counts of each item, which add up to those of any sample: 1,000 samples cost no more than one look at the texts.
    counts = np.array(metric._extract_corpus_statistics(said, [right]), dtype=np.float64)
    return _measured(name, len(right), lambda items: metric._compute_score_from_stats(counts[items].sum(0)).score)


def _mean(name: str, values: np.ndarray) -> Measure:
    return _measured(name, len(values), lambda items: float(values[items].mean()))


def _measured(name: str, n: int, statistic) -> Measure:
    return Measure(name, statistic(np.arange(n)), *bootstrap(n, statistic))
