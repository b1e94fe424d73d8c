"""How sure a number is that a sample gave: 95 % intervals of shares, and of anything by resampling."""

import math
from collections.abc import Callable

import numpy as np

N_RESAMPLES = 1000


def wilson(k: int, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of k successes in n trials; z = 1.96 for 95 %."""
    assert 0 <= k <= n and n > 0
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    n: int, statistic: Callable[[np.ndarray], float], *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the middle 95 % of a statistic over samples drawn with replacement (Efron 1979, percentiles).

    `statistic` is given the indices [n] of a sample's items, each from 0 to n - 1.
    """
    assert n > 0
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(n, size=n)) for _ in range(n_resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
