"""`report.md`, `report.html` and `evaluation.json` of a comparison, and the pictures of a preference run."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xalign.data.records import Text
from xalign.disk import write_atomically
from xalign.evaluation.figures import Comparison
from xalign.evaluation.page import CONTROL, write_page
from xalign.runs import METRICS, read_jsonl, strict

MODELS = ("untrained", "reference", "policy")
SHOWN = 10


def write_report(folder: Path, title: str, result: Comparison, settings: dict[str, Any]) -> str:
    """The report of a preference run; see `write`."""
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
    return write(folder, title, result, notes, draw(folder, result), settings)


def write(folder: Path, title: str, result: Comparison, notes: Sequence[str], pictures: Sequence[tuple[str, str]],
          settings: dict[str, Any]) -> str:
    """Write evaluation.json, report.html and report.md (last, so that its presence means all is there); give the table.

    `pictures` are (file in the folder, caption).
    """
    write_atomically(folder / "evaluation.json", json.dumps(strict(result.numbers), indent=2) + "\n")
    head, rows = table_rows(result)
    table = markdown(head, rows)
    write_page(folder / "report.html", title, result, head, rows, notes,
               [((folder / name).read_bytes(), text) for name, text in pictures], settings)
    parts = [f"# {title}", *(f"**Warning**: {alert}." for alert in result.alerts), table, "\n\n".join(notes), "## Pictures"]
    parts += [f"![{text}]({name})\n\n*{text}*" for name, text in pictures]
    if not pictures:
        parts.append("(none: matplotlib is not installed; `pip install xalign[plots]` and run again with --overwrite)")
    for section in result.sections:
        parts += [f"## {section.title}", markdown(section.head, section.rows), section.note]
    parts += ["## Samples", "First sample of each model; report.html has more, side by side.", *_samples(result)]
    parts += ["## Settings", "```json\n" + json.dumps(settings, indent=2) + "\n```"]
    write_atomically(folder / "report.md", "\n\n".join(filter(None, parts)) + "\n")
    return table


def table_rows(result: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of all figures, a column for each model; who wins comes first."""
    models = [m for m in MODELS if any(m in row for row in result.table.values())]
    rows = sorted(result.table.items(), key=lambda row: not row[0].startswith("win rate"))
    return ["", *models], [[row, *(str(values.get(m, "")) for m in models)] for row, values in rows]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells may hold a user's names."""
    cells = [[" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in (head, *rows)]
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _samples(result: Comparison) -> list[str]:
    parts = []
    for i, prompt in enumerate(result.prompts[:SHOWN]):
        lines = [f"**{i + 1}.** {prose(prompt)}"]
        for name in (m for m in MODELS[1:] if m in result.texts):
            score = f" ({result.score_name} {result.scores[name][i][0]:+.2f})" if name in result.scores else ""
            lines.append(f"- *{name}*{score}: {prose(result.texts[name][i][0])}")
        parts.append("\n".join(lines))
    return parts


def prose(text: Text) -> str:
    """Text for one Markdown line: a quoted model must not make headings, links or tables of ours."""
    whole = text if isinstance(text, str) else " ".join(f"[{m.role}] {m.content}" for m in text)
    clean = CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(whole.split()))
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

    return pictures + draw_samples(plt, folder, result)


def draw_samples(plt: Any, folder: Path, result: Comparison) -> list[tuple[str, str]]:
    """Scores and lengths of the samples of both models."""
    pictures = []
    colours = {"reference": "tab:blue", "policy": "tab:orange"}
    gold = result.score_name == "gold"
    what = ((result.scores, "gold.png" if gold else "scores.png", "gold reward" if gold else f"score by {result.score_name}"),
            (result.lengths, "lengths.png", "tokens a sample"))
    for values, name, title in what:
        shown = {m: flat for m in colours if (flat := [v for row in values.get(m, []) for v in row if math.isfinite(v)])}
        if not shown:
            continue
        figure, axis = plt.subplots(figsize=(6.5, 3.8))
        low, high = min(min(v) for v in shown.values()), max(max(v) for v in shown.values())
        for model, flat in shown.items():
            axis.hist(flat, bins=24, range=(low, high + 1e-9), alpha=0.55, label=model, color=colours[model], density=True)
            axis.axvline(sum(flat) / len(flat), color=colours[model], lw=1.5)
        axis.set(title=title.replace("$", r"\$"), ylabel="density")
        axis.legend()
        caption = f"{title[0].upper()}{title[1:]}: the samples before and after; lines are the means."
        pictures.append(save_figure(plt, folder, figure, name, caption))
    return pictures
