"""The pictures of `xalign evaluate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xalign.evaluation.figures import Comparison
from xalign.evaluation.intervals import WinRate
from xalign.evaluation.report import draw_samples, pyplot, save_figure

MARKS = ("o", "s", "^", "D", "v", "P")


def draw_evaluation(folder: Path, result: Comparison) -> list[tuple[str, str]]:
    """Draw the pictures into `folder`; gives (file, caption), nothing where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return []
    pictures: list[tuple[str, str]] = []
    for draw in (_wins, _temperatures, _margins, _ratios):
        pictures += draw(plt, folder, result)
    return pictures + draw_samples(plt, folder, result)


def _wins(plt: Any, folder: Path, result: Comparison) -> list[tuple[str, str]]:
    if not result.wins:
        return []
    figure, axis = plt.subplots(figsize=(6.5, 1.4 + 0.7 * len(result.wins)))
    kinds: tuple[tuple[str, Callable[[WinRate], Any], str, str], ...] = (
        ("as it is", lambda w: w.rate, "o", "tab:orange"), ("at equal lengths", lambda w: w.controlled, "D", "tab:green"))
    for k, (label, part, mark, colour) in enumerate(kinds):
        told = [part(w) for w in result.wins.values()]
        places = [i + 0.22 * (k - 0.5) for i in range(len(told))]
        spread = [[max(0.0, e.value - e.low) for e in told], [max(0.0, e.high - e.value) for e in told]]
        axis.errorbar([e.value for e in told], places, xerr=spread, fmt=mark, color=colour, capsize=3, label=label)
    axis.axvline(0.5, color="0.5", ls=":")
    axis.set(xlim=(0, 1), ylim=(len(result.wins) - 0.4, -0.6), xlabel="win rate of the policy")
    axis.set_yticks(range(len(result.wins)), [_plain(name) for name in result.wins])
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="lower left" if sum(w.rate.value - 0.5 for w in result.wins.values()) > 0 else "lower right")
    return [save_figure(plt, folder, figure, "wins.png", "Win rate of the policy by judge, with 95 % intervals over prompts.")]


def _temperatures(plt: Any, folder: Path, result: Comparison) -> list[tuple[str, str]]:
    if not any(len(at) > 1 for at in result.temperatures.values()):
        return []
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    for i, (judge, at) in enumerate(result.temperatures.items()):
        for name, line in (("policy", "-"), ("reference", "--")):
            told = [(t, w[name].rate) for t, w in at.items() if name in w]
            if not told:
                continue
            spread = [[max(0.0, e.value - e.low) for _, e in told], [max(0.0, e.high - e.value) for _, e in told]]
            axis.errorbar([t for t, _ in told], [e.value for _, e in told], yerr=spread, fmt=f"{MARKS[i % len(MARKS)]}{line}",
                          color=f"C{i}", capsize=3, alpha=0.8, label=f"{name}, by {_plain(judge)}")
    axis.axhline(0.5, color="0.5", ls=":")
    axis.set(xlabel="temperature", ylabel="win rate", ylim=(0, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return [save_figure(plt, folder, figure, "temperature.png", "Win rate against the temperature of sampling.")]


def _margins(plt: Any, folder: Path, result: Comparison) -> list[tuple[str, str]]:
    if not result.margins:
        return []
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    _, edges, bars = axis.hist(result.margins, bins=40, color="tab:green", alpha=0.7)
    for left, bar in zip(edges, bars, strict=False):
        if left + bar.get_width() / 2 < 0:
            bar.set_color("tab:red")
    axis.axvline(0, color="0.3", lw=1)
    axis.axvline(sum(result.margins) / len(result.margins), color="0.3", lw=1.5, ls="--")
    axis.set(xlabel="log-ratio of the policy less the reference's, nats", ylabel="pairs")
    caption = ("How much more than the reference the policy prefers the chosen side of held-out pairs; right of 0 the "
               "alignment inequality holds, dashed is the mean.")
    return [save_figure(plt, folder, figure, "margins.png", caption)]


def _ratios(plt: Any, folder: Path, result: Comparison) -> list[tuple[str, str]]:
    flat = [v for row in result.ratios for v in row]
    if not flat:
        return []
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    axis.hist(flat, bins=40, color="tab:orange", alpha=0.7)
    axis.axvline(0, color="0.3", lw=1)
    axis.axvline(sum(flat) / len(flat), color="0.3", lw=1.5, ls="--")
    axis.set(xlabel="log policy / reference of the policy's own samples, nats", ylabel="samples")
    caption = "Log-ratio of the policy's samples; the mean, dashed, is its KL divergence from the reference."
    return [save_figure(plt, folder, figure, "kl.png", caption)]


def _plain(name: str) -> str:
    return (name if len(name) <= 28 else f"...{name[-25:]}").replace("$", r"\$")
