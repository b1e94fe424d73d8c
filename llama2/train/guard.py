"""Watches for steps that would hurt: a loss or gradient that is no number, or far above the last ones.

Source of the idea: PaLM (arXiv:2204.02311 sec. 5.1) restarts before a loss spike and skips the batches that
came with it.
"""

import math
from typing import Any

N_REMEMBERED = 128
N_NEEDED = 32
"""Steps before anything counts as an outlier: early losses fall too fast to tell.

The deviation counts as at least 1 % of the mean loss and half of the mean gradient norm: norms have long tails, and
clipping already takes the harm out of one that is twice the usual.
"""


class Guard:
    """Remembers the losses and gradient norms of good steps. `state` is plain numbers, for the checkpoint."""

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.state: dict[str, Any] = {"losses": [], "norms": [], "n_bad": 0}

    @property
    def n_bad(self) -> int:
        """Bad steps in a row."""
        return self.state["n_bad"]

    def judge(self, loss: float, norm: float) -> str:
        """Return why a step must be left out, or an empty string for a good one; remembers it then."""
        reason = self._reason(loss, norm)
        self.state["n_bad"] = self.n_bad + 1 if reason else 0
        if not reason:
            self.state["losses"] = [*self.state["losses"], loss][-N_REMEMBERED:]
            self.state["norms"] = [*self.state["norms"], norm][-N_REMEMBERED:]
        return reason

    def _reason(self, loss: float, norm: float) -> str:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self.sigma and len(self.state["losses"]) >= N_NEEDED:
            for name, value, key, least in (("loss", loss, "losses", 0.01), ("gradient norm", norm, "norms", 0.5)):
                mean, deviation = _moments(self.state[key])
                if value > mean + self.sigma * max(deviation, least * abs(mean)):
                    return f"{name} {value:.4g} is more than {self.sigma:g} standard deviations above {mean:.4g}"
        return ""


def _moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
