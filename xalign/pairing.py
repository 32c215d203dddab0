"""Scored completions of a prompt to what is learnt from them: a pair, the best, or what the best of N would give. No torch."""

import math
from collections.abc import Sequence
from random import Random

RULES = ("max_min", "max_random", "max_max", "random", "length_penalised")


def usable(texts: Sequence[str], rewards: Sequence[float | None], ended: Sequence[bool]) -> list[int]:
    """The completions that can be learnt from: not blank, with a finite reward, `ended`, and of equal texts the first."""
    seen: set[str] = set()
    kept = []
    for i, (text, reward, whole) in enumerate(zip(texts, rewards, ended, strict=True)):
        if text.strip() and reward is not None and math.isfinite(reward) and whole and text not in seen:
            seen.add(text)
            kept.append(i)
    return kept


def pair(texts: Sequence[str], rewards: Sequence[float], rule: str, rng: Random,
         len_penalty: float = 0.0) -> tuple[int, int, float] | str:
    """(chosen, rejected, margin) of K different texts, or why there is none. The rules are those of RLHFlow's online DPO:

    `max_min` the best against the worst, `max_random` against any other, `max_max` against the second, `random` the first two,
    which are as good as any; `length_penalised` is max_min by reward - len_penalty * characters, and the order by it is final
    (theirs swaps the sides back where the bare rewards disagree). Of several best the first is taken. A tie makes no pair.
    """
    assert rule in RULES, rule
    if len(texts) < 2:
        return "fewer than two usable completions"
    values = [r - len_penalty * len(t) for r, t in zip(rewards, texts, strict=True)] if len_penalty else list(rewards)
    best = max(range(len(values)), key=values.__getitem__)
    others = [i for i in range(len(values)) if i != best]
    if rule == "random":
        best, worse = (0, 1) if values[0] >= values[1] else (1, 0)
    elif rule == "max_random":
        worse = rng.choice(others)
    elif rule == "max_max":
        worse = max(others, key=values.__getitem__)
    else:
        worse = min(others, key=values.__getitem__)
    margin = values[best] - values[worse]
    return (best, worse, margin) if margin > 0 else "tie"


def best_of(rewards: Sequence[float], values: Sequence[float], n: int) -> float:
    """The expected value of the completion with the highest reward among `n` drawn from the K that are given, n <= K.

    The mean over all subsets, so it is unbiased: with the rewards in order the i-th is the best of C(i-1, n-1) of C(K, n).
    """
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    total = math.comb(len(order), n)
    return sum(math.comb(i, n - 1) / total * values[k] for i, k in enumerate(order))


def best_of_kl(n: int) -> float:
    """KL of best-of-n to the policy that it draws from, nats: ln n - (n-1)/n (exact where no two rewards are equal)."""
    return math.log(n) - (n - 1) / n
