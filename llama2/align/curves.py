"""How the reward grows with the number of answers that one may choose from (arXiv:2307.09288 fig. 7)."""

import numpy as np

from llama2.train.report import render_plot


def curve_of(rewards: np.ndarray) -> dict:
    """Return the expected best and the median of the first k of K answers, averaged over prompts; rewards [N K].

    The best of k is expected over all choices of k out of the K: sum over the ordered rewards r_(i) of
    C(i - 1, k - 1) / C(K, k).
    """
    n_answers = rewards.shape[1]
    ordered = np.sort(rewards, axis=1).mean(0)
    ks = sorted({k for k in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, n_answers) if k <= n_answers})
    return {
        "k": ks,
        "max": [float(ordered @ _chance_of_best(n_answers, k)) for k in ks],
        "median": [float(np.median(rewards[:, :k], axis=1).mean()) for k in ks],
        "mean": float(rewards.mean()),
        "n_prompts": len(rewards),
    }


def _chance_of_best(n: int, k: int) -> np.ndarray:
    """Return how likely each of n ordered values is the largest of k drawn without putting back."""
    chance = np.zeros(n)
    chance[n - 1] = k / n
    for i in range(n - 2, k - 2, -1):
        chance[i] = chance[i + 1] * (i + 2 - k) / (i + 1)
    return chance


def draw_curve(curve: dict) -> bytes:
    """Return the plot as a PNG."""

    def draw(axes) -> None:
        axes.plot(curve["k"], curve["max"], "o-", color="#4a8fd4", markersize=3.5, linewidth=1.4, label="best of k")
        axes.plot(
            curve["k"], curve["median"], "o-", color="#d9812f", markersize=3.5, linewidth=1.4, label="median of k"
        )
        axes.fill_between(curve["k"], curve["median"], curve["max"], color="#4a8fd4", alpha=0.12)
        axes.set_xlabel("answers to choose from", fontsize=8)
        axes.set_title("Reward against the number of answers", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8)

    return render_plot(draw, "png")
