"""Shares, means and win rates with 95 % intervals, in numpy alone.

What is resampled, or taken for independent, is a prompt: samples of one prompt are alike, and an interval over samples would be
too narrow.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
RIDGE = 0.01  # keeps the length-controlled fit finite where length alone tells who won
DRAWN = 2**22  # resampled values that are in memory at a time
Rows = Sequence[Sequence[float]]  # a value for each sample, or comparison, of each prompt


@dataclass(frozen=True)
class Estimate:
    """A mean (or a function of one) and its 95 % interval, over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(sums: Sequence[float], counts: Sequence[float] | None = None,
             transform: Callable[[np.ndarray], np.ndarray] = lambda x: x, seed: int = 0) -> Estimate:
    """The estimate of transform(sum(sums) / sum(counts)), with a bootstrap interval.

    Entry i belongs to prompt i, prompts are resampled together. The resampling is seeded.
    """
    s = np.asarray(sums, dtype=np.float64)
    c = np.ones_like(s) if counts is None else np.asarray(counts, dtype=np.float64)
    draw, n = np.random.default_rng(seed), len(s)
    at_once = max(1, DRAWN // n)
    resampled = []
    for at in range(0, RESAMPLES, at_once):
        rows = draw.integers(0, n, (min(at_once, RESAMPLES - at), n))
        resampled.append(s[rows].sum(1) / c[rows].sum(1))
    low, high = np.quantile(transform(np.concatenate(resampled)), (0.025, 0.975))
    return Estimate(float(transform(s.sum() / c.sum())), float(low), float(high))


def mean_of(rows: Rows) -> Estimate:
    """The mean over all samples of all prompts."""
    return estimate([float(np.sum(row)) for row in rows], [len(row) for row in rows])


def by_prompt(prompts: Sequence[object], values: Iterable[float]) -> tuple[list[float], list[float]]:
    """Sums and counts of values by prompt, for `estimate`."""
    sums: dict[object, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        sums.setdefault(prompt, []).append(float(value))
    return [sum(v) for v in sums.values()], [float(len(v)) for v in sums.values()]


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


def monte_carlo_error(rows: Rows) -> float:
    """The standard error of the mean of prompts' means that comes from drawing samples, these prompts given.

    Prompts with a single sample say nothing about that; where they all have one it is the error over prompts.
    """
    means = np.array([np.mean(row) for row in rows])
    within = [float(np.var(row, ddof=1)) / len(row) for row in rows if len(row) > 1]
    if not within:
        return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return math.sqrt(float(np.mean(within)) / len(means))


# -- win rates ------------------------------------------------------------------------------------------------------


def wins(policy: Rows, reference: Rows) -> list[float]:
    """Each prompt's share of pairs (policy sample, reference sample) that the policy wins by scores; a tie counts one half."""
    return [float(np.mean(row)) for row in all_wins(policy, reference)]


def all_wins(policy: Rows, reference: Rows) -> list[list[float]]:
    """1, 1/2 or 0 for each pair (policy sample i, reference sample j) of each prompt, at place i * samples + j.

    A score that is not a number loses against any other.
    """
    rows = []
    for ours, theirs in zip(policy, reference, strict=True):
        a, b = (np.nan_to_num(np.asarray(side, dtype=np.float64), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
                for side in (ours, theirs))
        rows.append(((a[:, None] > b) + 0.5 * (a[:, None] == b)).ravel().tolist())
    return rows


def differences(policy: Rows, reference: Rows) -> list[list[float]]:
    """Policy less reference for the pairs of `all_wins`."""
    return [np.subtract.outer(ours, theirs).ravel().tolist() for ours, theirs in zip(policy, reference, strict=True)]


@dataclass(frozen=True)
class WinRate:
    """How often one side wins: the mean of prompts' means. `wilson` takes a prompt for one trial, so that it is rather too wide
    where prompts have several comparisons; `controlled` is what the rate would be at equal lengths; `ties` is a share."""

    rate: Estimate
    wilson: Estimate
    controlled: Estimate
    prompts: int
    comparisons: int
    ties: float


def win_rate(rows: Rows, lengths: Rows) -> WinRate:
    """The win rate of comparisons by prompt: 1 won, 0 lost, or anything between; prompts without any are left out.

    `lengths` are the winner-to-be's less its opponent's, for each comparison. Swapping the sides (1 - wins, -lengths) gives one
    minus each value.
    """
    judged = [(w, d) for w, d in zip(rows, lengths, strict=True) if len(w)]
    means = [float(np.mean(w)) for w, _ in judged]
    flat = [v for w, _ in judged for v in w]
    rate = estimate(means)
    return WinRate(rate, Estimate(rate.value, *wilson(sum(means), len(means))), length_controlled(*zip(*judged, strict=True)),
                   len(means), len(flat), sum(v == 0.5 for v in flat) / len(flat))


def length_controlled(rows: Rows, lengths: Rows) -> Estimate:
    """What the win rate would be if all replies had the length of what they are compared with.

    A logistic regression, P(win) = s(a + b tanh(d / sd(d))), of each comparison on the difference d of lengths, evaluated at
    d = 0, hence s(a): AlpacaEval 2's (Dubois et al. 2024, arXiv 2404.04475) without its term for the difficulty of an
    instruction, which is known from many models' answers only. Prompts count alike. The interval is a cluster-robust Wald
    interval of a (prompts are the clusters). Where one side won all, no length explains anything: it is Wilson's.
    """
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    y, d = (np.concatenate([np.asarray(row, dtype=np.float64) for row in told]) for told in (rows, lengths))
    if y.min() == y.max() and y[0] in (0, 1):
        return Estimate(float(y[0]), *wilson(float(y[0]) * len(rows), len(rows)))
    weight = 1 / np.bincount(owner)[owner]
    spread = math.sqrt(float((weight * d * d).sum() / weight.sum() - ((weight * d).sum() / weight.sum()) ** 2))
    x = np.stack([np.ones_like(d), np.tanh(d / spread) if spread else np.zeros_like(d)], 1)
    at = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ at))
        curvature = (x * (weight * p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, x.T @ (weight * (y - p)) - RIDGE * at)
        at = at + step * min(1.0, 2.0 / max(1e-300, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-10:
            break
    scores = np.zeros((len(rows), 2))
    np.add.at(scores, owner, x * (weight * (y - p))[:, None])
    bread = np.linalg.inv(curvature)
    error = Z95 * math.sqrt(float((bread @ (scores.T @ scores) @ bread)[0, 0]))
    value, low, high = 1 / (1 + np.exp(-(at[0] + np.array([0.0, -error, error]))))
    return Estimate(float(value), float(low), float(high))
