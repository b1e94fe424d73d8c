"""How sure a share is."""

import math


def wilson(k: int, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of k successes in n trials; z = 1.96 for 95 %."""
    assert 0 <= k <= n and n > 0
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
