"""`report.md` of a preference run, its pictures and `evaluation.json`."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xalign.data.records import Text
from xalign.disk import write_atomically
from xalign.evaluation.compare import Comparison
from xalign.runs import METRICS, read_jsonl, strict

MODELS = ("untrained", "reference", "policy")
SHOWN = 10


def write_report(folder: Path, title: str, result: Comparison, settings: dict[str, Any]) -> str:
    """Write evaluation.json, the pictures and report.md (last, so that its presence means all is there); give the table."""
    write_atomically(folder / "evaluation.json", json.dumps(strict(result.numbers), indent=2) + "\n")
    table = _table(result)
    pictures = draw(folder, result)
    what = "pairs"
    if result.labelled:
        what = "labelled completions, the accuracy over all pairs of a desirable and an undesirable one"
    notes = [f"Perplexity and accuracy are over {result.numbers.get('pairs', 0):,} held-out {what}; samples are drawn for "
             f"{len(result.prompts):,} of their prompts at temperature 1, unfiltered. In brackets: 95 % intervals, by "
             "bootstrap over prompts. The win rate compares every policy sample with every reference sample of a prompt; "
             "a tie counts one half."]
    if "preference_accuracy_limit" in result.numbers:
        notes.append(f"Labels are noisy: knowing the gold reward itself, accuracy would be "
                     f"{result.numbers['preference_accuracy_limit']:.3f}.")
    parts = [f"# {title}", table, "\n\n".join(notes), "## Pictures"]
    parts += [f"![{text}]({name})\n\n*{text}*" for name, text in pictures]
    if not pictures:
        parts.append("(none: matplotlib is not installed; `pip install xalign[plots]` and run again with --overwrite)")
    parts += ["## Samples", "First sample of each model.", *_samples(result)]
    parts += ["## Settings", "```json\n" + json.dumps(settings, indent=2) + "\n```"]
    write_atomically(folder / "report.md", "\n\n".join(parts) + "\n")
    return table


def _table(result: Comparison) -> str:
    models = [m for m in MODELS if any(m in row for row in result.table.values())]
    lines = ["| |" + "|".join(f" {m} " for m in models) + "|", "|---|" + "---|" * len(models)]
    for row, values in result.table.items():
        lines.append(f"| {row} |" + "|".join(f" {values[m]} " if m in values else " " for m in models) + "|")
    distinct = {m: result.numbers.get(f"distinct_{m}") for m in models}
    lines.append("| distinct samples |" + "|".join("" if d is None else f" {d:.3f} " for d in distinct.values()) + "|")
    return "\n".join(lines)


def _samples(result: Comparison) -> list[str]:
    parts = []
    for i, prompt in enumerate(result.prompts[:SHOWN]):
        lines = [f"**{i + 1}.** {prose(prompt)}"]
        for name in ("reference", "policy"):
            gold = f" (gold {result.gold[name][i][0]:+.2f})" if name in result.gold else ""
            lines.append(f"- *{name}*{gold}: {prose(result.texts[name][i][0])}")
        parts.append("\n".join(lines))
    return parts


def prose(text: Text) -> str:
    """Text for one Markdown line: a quoted model must not make headings, links or tables of ours."""
    whole = text if isinstance(text, str) else " ".join(f"[{m.role}] {m.content}" for m in text)
    clean = " ".join(whole.split())
    for mark in "\\`*_[]<>|#~$&":
        clean = clean.replace(mark, "\\" + mark)
    return clean.replace("://", "\\://").replace("www.", "www\\.")


def pyplot() -> Any:
    """matplotlib's pyplot, without a screen; None where it is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(plt: Any, folder: Path, figure: Any, name: str, caption: str) -> tuple[str, str]:
    """Write a picture, whole or not at all, and give it with its caption."""
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    write_atomically(folder / name, png.getvalue())
    plt.close(figure)
    return name, caption


def plot_lines(axis: Any, log: Sequence[dict[str, Any]], names: Sequence[tuple[str, str]], title: str) -> None:
    """Draw these (key, label) of a training's log over its steps."""
    for key, label in names:
        style = {"marker": "o"} if key.startswith("eval/") else {"marker": ".", "alpha": 0.7}
        points = [(r["step"], r[key]) for r in log if key in r]
        axis.plot(*zip(*points, strict=True) if points else ([], []), label=label, markersize=3, **style)
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)
    axis.legend()


def draw(folder: Path, result: Comparison) -> list[tuple[str, str]]:
    """Draw the pictures into `folder`; gives (file, caption), nothing where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return []
    log = read_jsonl(folder / METRICS)
    colours = {"untrained": "0.7", "reference": "tab:blue", "policy": "tab:orange"}
    pictures: list[tuple[str, str]] = []

    def save(figure: Any, name: str, caption: str) -> None:
        pictures.append(save_figure(plt, folder, figure, name, caption))

    def lines(axis: Any, names: Sequence[tuple[str, str]], title: str) -> None:
        plot_lines(axis, log, names, title)

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    lines(axes[0], [("loss", "training"), ("eval/loss", "held out")], "loss, nats a pair")
    lines(axes[1], [("rewards/accuracies", "training"), ("eval/rewards/accuracies", "held out")], "preference accuracy")
    if "preference_accuracy_limit" in result.numbers:
        axes[1].axhline(result.numbers["preference_accuracy_limit"], color="0.4", ls=":", label="label noise's limit")
        axes[1].legend()
    lines(axes[2], [("rewards/margins", "training"), ("eval/rewards/margins", "held out")], "reward margin, nats")
    save(figure, "training.png", "Loss, preference accuracy and margin over the steps of preference training.")

    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    lines(axis, [("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("eval/rewards/chosen", "chosen, held out"),
                 ("eval/rewards/rejected", "rejected, held out")], "implicit reward β log(π/ref), nats")
    axis.axhline(0, color="0.4", lw=0.8)
    save(figure, "rewards.png", "Implicit reward of chosen and rejected; both falling means that likelihood is lost on both.")

    for values, name, title in ((result.gold, "gold.png", "gold reward"), (result.lengths, "lengths.png", "tokens a sample")):
        if not values:
            continue
        figure, axis = plt.subplots(figsize=(6.5, 3.8))
        shown = {m: [v for row in values[m] for v in row] for m in ("reference", "policy") if m in values}
        low, high = min(min(v) for v in shown.values()), max(max(v) for v in shown.values())
        for model, flat in shown.items():
            axis.hist(flat, bins=24, range=(low, high + 1e-9), alpha=0.55, label=model, color=colours[model], density=True)
            axis.axvline(sum(flat) / len(flat), color=colours[model], lw=1.5)
        axis.set(title=title, ylabel="density")
        axis.legend()
        save(figure, name, f"{title.capitalize()} of the samples before and after; lines are the means.")
    return pictures
