"""The report of a grid: a table of means with t-intervals over seeds, the reward-KL frontier, and checks of the exact world."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xalign.disk import write_atomically
from xalign.evaluation.report import pyplot, save_figure
from xalign.exact import Frontier, best_of, kl, tilted
from xalign.grids import ExactRun, Run
from xalign.runs import strict
from xalign.trials import frontier

COLUMNS = {
    "exact": {"reward": "reward", "kl": "KL, nats", "efficiency": "efficiency", "optimum_reward": "optimum: reward",
              "optimum_kl": "optimum: KL"},
    "text": {"reward": "gold reward", "kl": "KL, nats", "win_rate": "win rate", "well_formed": "well-formed",
             "tokens": "tokens"},
}
# .975 quantiles of Student's t for 1, 2, ... degrees of freedom
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
         2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % t-interval of a mean of independent values (seeds); nan for fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan
    # beyond the table the expansion in 1 / df (Abramowitz and Stegun 26.7.5) is right to four digits
    quantile = T_975[n - 2] if n - 2 < len(T_975) else 1.959964 + 2.372272 / (n - 1) + 2.822500 / (n - 1) ** 2
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


@dataclass
class Row:
    """Runs that differ in their seeds alone: the first one, and each figure's values."""

    run: Run
    seeds: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    trajectories: list[list[tuple[int, float, float]]] = field(default_factory=list)
    shared: tuple[str, ...] = ()
    """Settings that all rows of the report have alike."""
    dpo: float = math.nan
    """The reward of plain DPO at this row's KL; nan for DPO itself, and where no strength of it goes as far."""

    @property
    def own(self) -> dict[str, Any]:
        return {k: v for k, v in self.run.own.items() if k not in self.shared}

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.run.label, self.run.told(self.own))))

    def mean(self, name: str) -> float:
        return float(np.mean(self.figures[name])) if self.figures.get(name) else math.nan

    def told(self, name: str) -> str:
        values = self.figures.get(name)
        if not values:
            return ""
        half = half_width(values)
        return f"{self.mean(name):.3f}" + (f" ± {half:.3f}" if half > 1e-9 else "")

    @property
    def line(self) -> tuple[str, str]:
        """Loss and what else is set but the strength: what one line of the picture joins."""
        return self.run.label, self.run.told({k: v for k, v in self.own.items() if k not in ("beta", "n", "rounds", "alpha")})


def rows_of(records: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[Row]:
    """Finished runs by their settings, in the grid's order."""
    rows: dict[tuple[str, str], Row] = {}
    for run, record in records:
        if "result" not in record:
            continue
        row = rows.setdefault((run.label, run.setting), Row(run))
        row.seeds.append(run.seed)
        for name, value in record["result"].items():
            if name == "trajectory":
                row.trajectories.append([tuple(point) for point in value])
            elif value is not None:
                row.figures.setdefault(name, []).append(value)
    found = list(rows.values())
    if len(found) > 1:
        shared = set.intersection(*(set(row.run.own.items()) for row in found))
        for row in found:
            row.shared = tuple(name for name, _ in shared)
    return found


def table(rows: Sequence[Row]) -> str:
    """The table, in Markdown."""
    columns = COLUMNS[rows[0].run.world]
    shown = {k: title for k, title in columns.items() if any(row.figures.get(k) for row in rows)}
    titles = [*shown.values(), *["DPO's reward at this KL"] * any(row.dpo == row.dpo for row in rows)]
    lines = [f"| loss | setting | seeds | {' | '.join(titles)} |", "|---" * (3 + len(titles)) + "|"]
    for row in rows:
        values = [*(row.told(name) for name in shown), "" if math.isnan(row.dpo) else f"{row.dpo:.3f}"][: len(titles)]
        lines.append(f"| {row.run.label} | {row.run.told(row.own)} | {len(row.seeds)} | {' | '.join(values)} |")
    return "\n".join(lines)


# -- against DPO ------------------------------------------------------------------------------------------------------


def hold_against_dpo(rows: Sequence[Row], start: float, known: Frontier | None = None) -> str:
    """Set each row's `dpo`, the reward of offline DPO at its KL, and tell which rows are above it.

    `start` is the reference's reward, `known` the exact world's. Plain DPO differs from what all rows share in its β alone.
    """
    plain = [row for row in rows if row.run.method == "sigmoid" and set(row.own) <= {"beta"}]
    others = [row for row in rows if row not in plain]
    if not plain or not others or math.isnan(start):
        return ""
    groups: dict[str, list[str]] = {"above it, by more than its interval": [], "above it, within its interval": [],
                                    "below it": [], "further from the reference than any β of DPO here": []}
    clear, close, below, beyond = groups.values()
    reach = max(row.mean("kl") for row in plain)
    for row in others:
        if row.mean("kl") > reach:
            beyond.append(f"{row.name} (KL {row.mean('kl'):.1f})")
            continue
        row.dpo = at_kl(plain, start, row.mean("kl"), known)
        gain, half = row.mean("reward") - row.dpo, half_width(row.figures["reward"])
        (below if gain <= 0 else clear if gain > half else close).append(f"{row.name} ({gain:+.3f})")
    return "Reward at equal KL beside DPO's, which is read off between its β:\n\n" + "\n".join(
        f"- {title}: {', '.join(names) or 'none'}" for title, names in groups.items())


# -- what the exact world lets us check ------------------------------------------------------------------------------


def at_kl(rows: Sequence[Row], start: float, budget: float, known: Frontier | None = None) -> float:
    """The reward of a frontier of rows at a KL, between their means in the root of the KL; there rewards are nearly straight.

    Where the oracle is known it is the efficiency that is read off, since between two far points the reward bends.
    """
    name, first = ("efficiency", []) if known else ("reward", [(0.0, start)])
    points = [*first, *sorted((row.mean("kl"), row.mean(name)) for row in rows)]
    roots, values = zip(*((math.sqrt(max(0.0, x)), y) for x, y in points), strict=True)
    found = float(np.interp(math.sqrt(max(0.0, budget)), roots, values))
    return start + found * (known.oracle(budget) - start) if known else found


def checks(rows: Sequence[Row], known: Frontier) -> list[tuple[str, bool]]:
    """What theory says of the exact world, and whether the runs that are there agree."""
    found: list[tuple[str, bool]] = []
    plain = [row for row in rows if set(row.run.own) <= {"beta"} and row.run.method == "sigmoid"]
    plain.sort(key=lambda row: row.run.beta or 0.0)
    if len(plain) > 1:
        seeds = zip(*(row.figures["kl"] for row in plain), strict=False)
        found.append(("DPO's KL falls with β, for every seed", all(list(s) == sorted(s, reverse=True) for s in seeds)))
    for row in plain:
        if row.run.beta in (0.3, 1.0):
            off = [abs(row.mean(name) / row.mean(f"optimum_{name}") - 1) for name in ("reward", "kl")]
            found.append((f"DPO at β {row.run.beta:g} is within 10 % of its population optimum: {off[0]:.1%} of reward, "
                          f"{off[1]:.1%} of KL", max(off) <= 0.1))
    if plain:
        least = min(row.mean("efficiency") for row in plain)
        found.append((f"DPO's efficiency is at least .85 at every β: {least:.3f}", least >= 0.85))
    for row in rows if plain else ():
        if row.run.method in ("sft", "unlikelihood"):
            there = at_kl(plain, known.start, row.mean("kl"), known)
            budget, reward = row.mean("kl"), row.mean("reward")
            told = f"DPO is above {row.name} at its KL of {budget:.3f}: {there:.3f} against {reward:.3f}"
            found.append((told, there > reward))
        elif row.run.method == "best_of" and row.run.n == 16:
            error = abs(row.mean("kl") / row.mean("optimum_kl") - 1)
            found.append((f"the KL of the best of 16 is ln 16 - 15/16: off by {error:.2%}", error < 0.01))
    return found


# -- pictures ---------------------------------------------------------------------------------------------------------


def root_axis(axis: Any) -> None:
    """A KL axis in the root: near the reference rewards of optima rise with it in straight lines."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set_xlim(left=0)
    top = axis.get_xlim()[1]
    axis.set_xticks([x for x in (0, 0.05, 0.2, 0.5, 1, 2, 4, 8, 16, 32, 64) if x <= top])
    axis.set_xticklabels([f"{x:g}" for x in axis.get_xticks()])


def draw_lines(axis: Any, rows: Sequence[Row], name: str, colours: Mapping[tuple[str, str], Any]) -> None:
    """A line for each loss through the means of `name` over KL, with both intervals, and the seeds as small points."""
    for line in dict.fromkeys(row.line for row in rows):
        some = sorted((row for row in rows if row.line == line and row.figures.get(name)), key=lambda row: row.mean("kl"))
        if not some:
            continue
        baseline = some[0].run.method in ("best_of", "sft", "unlikelihood")
        bars = {f"{side}err": [np.nan_to_num(half_width(row.figures[what])) for row in some]
                for side, what in (("x", "kl"), ("y", name))}
        axis.errorbar([row.mean("kl") for row in some], [row.mean(name) for row in some], **bars, color=colours[line], lw=1.2,
                      elinewidth=0.7, marker="s" if baseline else "o", markersize=4, ls=":" if baseline else "-",
                      label=", ".join(filter(None, line)))
        for row in some:
            if len(row.seeds) > 1:
                axis.plot(row.figures["kl"], row.figures[name], ".", color=colours[line], markersize=2.5, alpha=0.6)


def draw(folder: Path, rows: Sequence[Row], known: Frontier | None, start: float) -> list[tuple[str, str]]:
    """The frontier; gives (file, caption), nothing where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return []
    lines = list(dict.fromkeys(row.line for row in rows))
    colours = dict(zip(lines, plt.get_cmap("tab20" if len(lines) > 10 else "tab10").colors, strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2))
    other, title = ("efficiency", "efficiency: share of the oracle's gain at the same KL") if known else \
        ("well_formed", "well-formed samples")
    draw_lines(axes[0], rows, "reward", colours)
    draw_lines(axes[1], rows, other, colours)
    caption = "Reward against KL to the reference: means over seeds with 95 % t-intervals, a line for each loss"
    if known is not None:
        scales = np.geomspace(1e-2, 1e3, 120)
        curve = [known.point(tilted(known.ref, known.reward, scale)) for scale in scales]
        axes[0].plot([x for _, x in curve], [y for y, _ in curve], color="k", lw=1.5, label="oracle", zorder=0)
        marks = sorted({row.run.beta for row in rows if row.run.beta is not None and row.run.method == "sigmoid"})
        stars = [known.point(best) for beta in marks if (best := known.optimum("sigmoid", beta)) is not None]
        axes[0].plot([x for _, x in stars], [y for y, _ in stars], "*", color="k", markersize=9, mfc="none",
                     label="DPO's optima")
        for row in rows:
            if row.run.method in ("sft", "unlikelihood"):
                for path in row.trajectories:
                    axes[0].plot([p[2] for p in path], [p[1] for p in path], color=colours[row.line], lw=0.6, alpha=0.5)
        axes[1].axhline(1, color="k", lw=1.5)
        caption += "; black is the best that any policy can have, stars are where DPO ends with pairs without end"
    axes[0].axhline(start, color="0.6", lw=0.8, ls="--")
    axes[0].set(title="reward", xlabel="KL to the reference, nats")
    axes[1].set(title=title, xlabel="KL to the reference, nats")
    for axis in axes:
        root_axis(axis)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return [save_figure(plt, folder, figure, "frontier.png", caption + ".")]


# -- the report -------------------------------------------------------------------------------------------------------


def write_report(folder: Path, grid: str, records: Sequence[tuple[Run, Mapping[str, Any]]], planned: int) -> str:
    """Write frontier.png, results.json and report.md of the runs that are there; gives the table and the checks."""
    rows = rows_of(records)
    failed = [(run.name, record["error"]) for run, record in records if "error" in record]
    if not rows:
        return f"no run of {planned} is finished" + "".join(f"\n{name} failed: {error}" for name, error in failed)
    exact = isinstance(rows[0].run, ExactRun)
    known = frontier(folder)[2] if exact else None
    checked = checks(rows, known) if known else []
    done = sum(len(row.seeds) for row in rows)
    starts = [value for row in rows for value in row.figures.get("reference_reward", [])]
    start = known.start if known else float(np.mean(starts or [math.nan]))
    compared = hold_against_dpo(rows, start, known)
    shown = "\n\n".join(filter(None, (table(rows), compared)))
    if done < planned:
        shown += f"\n\n{done} of {planned} runs" + "".join(f"\n\n{name} failed: {error}" for name, error in failed)
    if checked:
        shown += "\n\n" + "\n".join(f"- {'yes' if passed else 'NO'}: {text}" for text, passed in checked)
    pictures = draw(folder, rows, known, start)
    revisions = sorted({str(record["revision"]) for _, record in records if "result" in record})
    versions = [json.loads(v) for v in sorted({json.dumps(record["versions"]) for _, record in records if "result" in record})]
    seconds = sum(record["seconds"] for _, record in records if "result" in record)
    reference = {"reward": known.start, "best_of_16": kl(best_of(known.ref, known.reward, 16), known.ref)} if known else {}
    result = {"grid": grid, "world": rows[0].run.world, "runs": done, "planned": planned, "seconds": round(seconds, 1),
              "reference": reference, "revisions": revisions, "versions": versions,
              "rows": [_as_json(row) for row in rows], "checks": [{"text": t, "passed": p} for t, p in checked]}
    write_atomically(folder / "results.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    notes = "Means over seeds ± half of the 95 % t-interval."
    if alike := {k: v for k, v in rows[0].run.own.items() if k in rows[0].shared}:
        notes += f" All runs: {rows[0].run.told(alike)}."
    if known:
        notes += (f" The reference's reward is {known.start:.3f}. Reward and KL are exact, of all 15,625 texts; efficiency is "
                  "the gain of reward over the best at the same KL; the optimum is where the loss ends with pairs without end.")
    parts = [f"# Ablation: {grid}", notes, shown, *(f"![{text}]({name})\n\n*{text}*" for name, text in pictures),
             f"{done} runs, {seconds:.0f} seconds of one thread; revision {', '.join(revisions)}; "
             + "; ".join(", ".join(f"{k} {v}" for k, v in some.items()) for some in versions)
             + ". Each run's settings, revision, versions and figures are in runs/."]
    write_atomically(folder / "report.md", "\n\n".join(parts) + "\n")
    return shown


def _as_json(row: Row) -> Any:
    figures = {name: {"mean": row.mean(name), "half_width": half_width(values), "values": values}
               for name, values in row.figures.items()}
    return strict({"loss": row.run.label, "settings": row.run.own, "seeds": row.seeds, "figures": figures})
