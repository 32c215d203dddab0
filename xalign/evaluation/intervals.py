"""Intervals of shares, in closed form; those of means over prompts are `metrics.estimate`'s, by bootstrap."""

import math

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (low, high), within [0, 1], of the probability behind `successes` in `n` independent trials.

    `successes` may hold halves, ties of a comparison, say: the interval is then rather too wide. `z` standard errors on each
    side: 95 % by default. Unlike p ± z √(p (1 - p) / n) it is right for few trials and at 0 and 1 (Wilson 1927, JASA 22:209;
    Brown, Cai and DasGupta 2001). Raises `ValueError` unless 0 <= successes <= n, n > 0 and z >= 0.
    """
    if not (0 <= successes <= n and n > 0 and z >= 0):
        raise ValueError(f"{successes} successes in {n} trials, z {z}: allowed are 0 <= successes <= n, n > 0, z >= 0")
    share, square = successes / n, z * z / n
    middle, spread = share + square / 2, math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (middle - spread) / (1 + square)), min(1.0, (middle + spread) / (1 + square))
