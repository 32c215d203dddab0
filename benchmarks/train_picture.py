#!/usr/bin/env python3
"""train.json as a picture: how many times faster xalign is; what was asked for is a black line."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from clock import DRIFT
from matplotlib.axes import Axes
from picture import LIGHT, OURS, THEIRS, XT, Row, asked, bar, framed, named
from report import thousands

COLOURS = {"plain": "#999999", "x-transformers": XT, "TRL": THEIRS, "TRL, head compacted": LIGHT, "xalign": OURS}
TITLES = {"long-prompts": "long prompts, short completions: P, C = ",
          "long-completions": "short prompts, long completions: P, C = ", "hh": "pairs of real lengths: "}


def broken(name: str) -> str:
    return name.replace(", ", ",\n").replace(" in the", "\nin the").replace(" not ", "\nnot ").replace(" bf16", "\nbf16")


def speed(axes: Axes, section: Row, title: str) -> None:
    """Seconds of a step; each bar says how many times faster xalign is."""
    rows = section["rows"]
    framed(axes, title, "s a step")
    named(axes, [broken(r["engine"]) for r in rows])
    ours = next(r for r in rows if r["engine"] == "xalign")
    for x, row in enumerate(rows):
        colour = COLOURS.get(row["engine"], OURS)
        than = "" if row is ours else f"\n{row['ratio']:.1f} ×" + (f", asked {row['asked']:.1f}" if row["asked"] else "")
        bar(axes, x, row["s"], 0.7, colour, f"{row['s']:.2f} s{than}\nU = {row['U']:.0%}")
        if row["asked"]:
            asked(axes, x - 0.35, x + 0.35, row["asked"] * ours["s"])
    axes.margins(y=0.2)


def ratios(axes: Axes, section: Row, title: str, skipped: str) -> None:
    """How many times slower each is than the one that is skipped; groups by shape."""
    cases = list(dict.fromkeys(r["case"] for r in section["rows"]))
    names = [n for n in dict.fromkeys(r["engine"] for r in section["rows"]) if n != skipped]
    framed(axes, title, f"× the time of {skipped}")
    named(axes, [broken(n) for n in names])
    for row in section["rows"]:
        if row["engine"] == skipped:
            continue
        place, first = cases.index(row["case"]), row["case"] == cases[0]
        width = 0.8 / len(cases)
        x = names.index(row["engine"]) + width * (place - (len(cases) - 1) / 2)
        bar(axes, x, row["ratio"], width, OURS if first else "#56b4e9", f"{row['ratio']:.2f}\n{row['s']:.2f} s")
        if row["asked"]:
            asked(axes, x - width / 2, x + width / 2, row["asked"], "asked")
    axes.axhline(1, color="black", linewidth=0.6)
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in (OURS, "#56b4e9")],
                ["P, C = " + ", ".join(c.split(", ")[:2]) for c in cases], fontsize=7, frameon=False)
    axes.margins(y=0.2)


def memory(axes: Axes, section: Row) -> None:
    framed(axes, "the most memory of a process at P, C = 256, 64,\nabove its libraries'", "GB")
    named(axes, [f"{r['engine']}\nV = {thousands(r['v'])}" for r in section["rows"]])
    for x, row in enumerate(section["rows"]):
        share = f"\nxalign: {row['share']:.2f} of it" if "share" in row else ""
        bar(axes, x, row["bytes"] / 1e9, 0.7, COLOURS[row["engine"]], f"{row['bytes'] / 1e9:.2f} GB{share}")
        if "share" in row:
            asked(axes, x - 1.35, x - 0.65, row["asked"] * row["bytes"] / 1e9, "asked")
    axes.margins(y=0.2)


def draw(path: Path) -> None:
    results = json.loads(path.read_text())
    sections = results["sections"]
    figure = plt.figure(figsize=(16, 10.5), layout="constrained")
    top, bottom, feet = figure.subfigures(3, 1, height_ratios=[4.5, 4.5, 1.3])
    top.suptitle("A whole optimizer step of DPO, 8 pairs: how many times faster xalign is", fontsize=11, weight="bold")
    for axes, (name, title) in zip(top.subplots(1, 3), TITLES.items(), strict=True):
        if sections.get(name, {}).get("rows"):
            speed(axes, sections[name], title + sections[name]["rows"][0]["case"])
        else:
            absent(axes, name)
    bottom.suptitle("Half precision, each economy switched off, and memory", fontsize=11, weight="bold")
    for axes, name in zip(bottom.subplots(1, 3), ("bf16", "economies", "memory"), strict=True):
        if name not in sections:
            absent(axes, name)
        elif name == "memory":
            memory(axes, sections[name])
        elif name == "bf16":
            ratios(axes, sections[name], "bfloat16 (autocast): the time of others", "xalign bf16")
        else:
            ratios(axes, sections[name], "xalign without some of what it does, fp32", "xalign")
    feet.text(0.01, 0.95, told(results), fontsize=8, va="top")
    figure.savefig(path.with_suffix(".png"), dpi=100)
    plt.close(figure)


def absent(axes: Axes, name: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, f"{name}: not run", ha="center")


def told(results: Row) -> str:
    about = results["machine"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", "x-transformers", "trl"))
    lines = [f"{about['depth']} layers of width 512, 8 heads, V = {thousands(about['vocab'])}, fp32 unless said; "
             f"the same random weights, losses and gradient norms for all. {about['processor']}, {about['threads']} threads; "
             f"{versions}.",
             "U: three times the products of a forward pass that runs each prompt once, at the fastest product of that dtype. "
             "The reference's log-probabilities are known before, but for plain, x-transformers and 'in the step'."]
    for name, s in results["sections"].items():
        moved = f"ceilings of the machine moved by {s['drift']:.0%}" + ": TO BE RUN AGAIN" * (s["drift"] > DRIFT)
        lines.append(f"{name}: {s['when']}, revision {s['revision']}, {s['repeats']} rounds, {s['minutes']} minutes, {moved}")
    return "\n".join(lines)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "train.json")
