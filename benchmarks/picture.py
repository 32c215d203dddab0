#!/usr/bin/env python3
"""decode.json as a picture: what was asked for is a black line, what was reached a bar."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from clock import DRIFT
from matplotlib.axes import Axes
from report import thousands

OURS, THEIRS, XT, LIGHT = "#0072b2", "#e69f00", "#cc79a7", "#f3cf80"
PART_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#f0e442", "#d55e00", "#999999")
FLOOR = 0.01  # the smallest tax that the logarithmic axis shows

Row = dict[str, Any]
Cases = list[tuple[int, int]]


def asked(axes: Axes, left: float, right: float, value: float | None, label: str = "") -> None:
    if value is not None:
        axes.plot([left, right], [value, value], color="black", linewidth=2, solid_capstyle="butt", zorder=4)
        axes.annotate(label, (right, value), (2, 0), "data", textcoords="offset points", va="center", fontsize=7)


def bar(axes: Axes, x: float, value: float, width: float, colour: str, label: str, bottom: float = 0.0) -> None:
    axes.bar(x, value - bottom, 0.94 * width, bottom=bottom, color=colour, zorder=2)
    axes.annotate(label, (x, max(value, bottom)), (0, 2), textcoords="offset points", ha="center", va="bottom",
                  fontsize=7, zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})


def named(axes: Axes, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names, fontsize=8)


def framed(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def panels(part: Any, rows: list[Row], cases: Cases, unit: str) -> Iterator[tuple[Axes, list[Row]]]:
    """Side by side, of one scale: the rows of each (vocabulary, batch size)."""
    for axes, (v, b) in zip(part.subplots(1, len(cases), squeeze=False, sharey=True)[0], cases, strict=True):
        framed(axes, f"V = {thousands(v)}, B = {b}", unit if (v, b) == cases[0] else "")
        yield axes, [row for row in rows if (row["v"], row["b"]) == (v, b)]


def legend(part: Any, labels: dict[str, str], line: str | None = None) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in labels.values()]
    names = list(labels)
    if line is not None:
        handles, names = [*handles, plt.Line2D([], [], color="black", linewidth=2)], [*names, line]
    part.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)


def greedy(part: Any, rows: list[Row], cases: Cases) -> None:
    part.suptitle("Greedy: how many times faster than the peers, by xalign's number format", fontsize=11, weight="bold")
    for axes, here in panels(part, rows, cases, "× faster"):
        ours = [r for r in here if "against" in r]
        named(axes, [r["engine"].split()[-1] for r in ours])
        axes.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
        for x, row in enumerate(ours):
            against, width = row["against"], 0.8 / len(row["against"])
            for i, (a, colour) in enumerate(zip(against.values(), (THEIRS, XT, LIGHT), strict=False)):
                at = x - 0.4 + (i + 0.5) * width
                bar(axes, at, a["ratio"], width, colour, f"{a['ratio']:.1f}")
                asked(axes, at - width / 2, at + width / 2, a["asked"])
    colours = {"transformers fp32": THEIRS, "x-transformers fp32": XT, "transformers bf16": LIGHT}
    legend(part, {f"against {name}": colour for name, colour in colours.items()}, "asked")


def where(part: Any, rows: list[Row], cases: Cases) -> None:
    part.suptitle("Where the time of a step goes, and R = bandwidth bound / step", fontsize=11, weight="bold")
    names: list[str] = []
    for axes, here in panels(part, rows, cases, "ms a step"):
        ours = [r for r in here if "parts_ms" in r]
        named(axes, [r["engine"].split()[-1] for r in ours])
        for x, row in enumerate(ours):
            names, bottom = list(row["parts_ms"]), 0.0
            for value, colour in zip(row["parts_ms"].values(), PART_COLOURS, strict=True):
                axes.bar(x, max(value, 0), 0.7, bottom=bottom, color=colour, zorder=2)
                bottom += max(value, 0)
            axes.annotate(f"R {row['R']:.2f}", (x, bottom), (0, 2), textcoords="offset points", ha="center", fontsize=8)
            asked(axes, x - 0.42, x + 0.42, row["bound_ms"])
    legend(part, dict(zip(names, PART_COLOURS, strict=True)), "bound")


def sampler(part: Any, rows: list[Row], cases: Cases) -> None:
    part.suptitle("What sampling adds to a greedy step", fontsize=11, weight="bold")
    colours = {"xalign": OURS, "transformers": THEIRS, "x-transformers": XT}
    for axes, here in panels(part, rows, cases, "of a greedy step"):
        kinds = list(dict.fromkeys(r["sampler"] for r in here))
        named(axes, [kind.replace(", ", ",\n") for kind in kinds])
        axes.set_yscale("log")
        axes.set_ylim(FLOOR, 6)
        axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1, 3], ["≤ 1 %", "3 %", "10 %", "30 %", "100 %", "300 %"])
        for row in here:
            x = kinds.index(row["sampler"]) + 0.27 * (list(colours).index(row["engine"]) - 1)
            bar(axes, x, max(row["tax"], FLOOR), 0.27, colours[row["engine"]], f"{100 * row['tax']:.0f}", FLOOR)
        asked(axes, -0.5, len(kinds) - 0.5, next((r["asked"] for r in here if r["asked"]), None))
    legend(part, colours, "asked of xalign")


def beams(axes: Axes, rows: list[Row]) -> None:
    rows = [r for r in rows if r["what"] == "beams"]
    vocabularies = list(dict.fromkeys(r["v"] for r in rows))
    framed(axes, "4 beams, prompt of 512 tokens: what they add\nto the step of a greedy batch of 4", "%")
    named(axes, [f"V = {thousands(v)}" for v in vocabularies])
    for row in rows:
        x, colour = vocabularies.index(row["v"]), OURS if row["engine"] == "xalign" else THEIRS
        x += -0.2 if row["engine"] == "xalign" else 0.2
        bar(axes, x, 100 * row["tax"], 0.4, colour, f"{row['engine']}\n{100 * row['tax']:.0f} %")
        if row["asked"]:
            asked(axes, x - 0.2, x + 0.2, 100 * row["asked"], "asked")
    axes.margins(y=0.25)


def samples(axes: Axes, rows: list[Row]) -> None:
    rows = [r for r in rows if r["what"] == "samples"]
    framed(axes, "8 samples of 64 tokens, prompt of 1,024 tokens:\nhow many times faster than transformers", "× faster")
    named(axes, [f"V = {thousands(row['v'])}" for row in rows])
    for x, row in enumerate(rows):
        bar(axes, x, row["ratio"], 0.5, THEIRS, f"{row['ratio']:.1f}")
        asked(axes, x - 0.3, x + 0.3, row["asked"], "asked")
    axes.set_xlim(-0.6, len(rows) - 0.3)
    axes.margins(y=0.15)


def throughput(axes: Axes, rows: list[Row]) -> None:
    framed(axes, f"{rows[0]['prompts']:,} prompts of 8 to 256 tokens, texts of 1 to 128,\neach engine at its best batch size",
           "prompts a second")
    named(axes, [f"{row['engine'].replace(', ', ',' + chr(10), 1)}\n{row['size']} rows" for row in rows])
    for x, row in enumerate(rows):
        than = f"\nxalign is {row['ratio']:.1f} × faster" if x else ""
        bar(axes, x, row["per_s"], 0.6, OURS if x == 0 else THEIRS, f"{row['per_s']:.1f}{than}")
        if row.get("asked"):
            asked(axes, -0.4, 0.4, row["asked"] * row["per_s"], f"asked: {row['asked']:.0f} × padded")
    axes.margins(y=0.2)


def draw(path: Path) -> None:
    results = json.loads(path.read_text())
    sections = results["sections"]
    figure = plt.figure(figsize=(15, 17), layout="constrained")
    parts = figure.subfigures(5, 1, height_ratios=[4, 4, 4, 4, 1.1], hspace=0.03)
    for part, name, function in zip(parts, ("greedy", "greedy", "sampler"), (greedy, where, sampler), strict=False):
        if name in sections:
            rows = sections[name]["rows"]
            function(part, rows, list(dict.fromkeys((r["v"], r["b"]) for r in rows)))
        else:
            part.text(0.5, 0.5, f"{name}: not run", ha="center")
    parts[3].suptitle("Several texts at once", fontsize=11, weight="bold")
    names = ("beams", "beams", "throughput")
    for axes, name, function in zip(parts[3].subplots(1, 3), names, (beams, samples, throughput), strict=True):
        if name in sections:
            function(axes, sections[name]["rows"])
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, f"{name}: not run", ha="center")
    parts[4].text(0.02, 0.95, told(results), fontsize=8, va="top")
    figure.savefig(path.with_suffix(".png"), dpi=100)
    plt.close(figure)


def told(results: Row) -> str:
    about = results["machine"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "x-transformers"))
    lines = [f"{about['depth']} layers of width 512, 8 heads; random Llama weights, the same for all. {about['processor']}, "
             f"{about['threads']} threads; {versions}. V: vocabulary; B: rows of a batch."]
    for name, s in results["sections"].items():
        moved = f"ceilings of the machine moved by {s['drift']:.0%}" + ": TO BE RUN AGAIN" * (s["drift"] > DRIFT)
        lines.append(f"{name}: {s['when']}, revision {s['revision']}, {s['repeats']} rounds, {s['minutes']} minutes, {moved}")
    return "\n".join(lines)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "decode.json")
