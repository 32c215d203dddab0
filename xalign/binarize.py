"""`xalign binarize`: annotated completions to preference pairs (JSONL, and parquet where pyarrow is), and a report on them."""

import hashlib
import io
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from xalign.annotate import read_completions
from xalign.collect import as_json, from_json
from xalign.collect_config import BinarizeConfig, BinarizeOptions
from xalign.disk import write_atomically
from xalign.errors import DataError
from xalign.evaluation.report import pyplot, save_figure
from xalign.journal import write_lines
from xalign.judge import fine_grained

PAIRS, PARQUET, REPORT = "pairs.jsonl", "pairs.parquet", "report.md"
Record = dict[str, Any]


@dataclass
class Tally:
    """What the report tells: why instructions gave no pair, scores by model and by principle, margins, and who won."""

    left_out: Counter[str] = field(default_factory=Counter)
    by_model: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    by_principle: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    margins: list[float] = field(default_factory=list)
    wins: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))


def run_binarize(config: BinarizeConfig) -> None:
    """The program."""
    options, tally = config.binarize, Tally()
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} can't be written ({error.strerror})") from error
    rows = tqdm(read_completions(options.annotated), desc="binarize", unit="instruction", delay=5, mininterval=1)
    made: list[Record] = []

    def pairs() -> Iterator[Record]:
        for pair in binarized(rows, options, tally):
            made.append(pair)
            yield pair
        if not made:  # what an earlier start wrote stays
            raise DataError(f"{options.annotated}: no pair can be made ({_reasons(tally)})")

    count = write_lines(folder / PAIRS, pairs())
    if lacking := _write_parquet(folder / PARQUET, made):
        (folder / PARQUET).unlink(missing_ok=True)
    write_atomically(folder / REPORT, report(tally, count, options, draw(folder, tally)))
    print(f"{folder / PAIRS}: {count:,} pairs ({_reasons(tally) or 'of all instructions'})"
          + (f"; no parquet: {lacking}" if lacking else ""), file=sys.stderr)


def binarized(rows: Any, options: BinarizeOptions, tally: Tally) -> Iterator[Record]:
    """A pair of each instruction that gives one; what is drawn depends on the seed and the instruction's place alone."""
    for number, record in enumerate(rows):
        if record.get("source") in options.exclude_sources:
            tally.left_out["source excluded"] += 1
            continue
        scored = [(value, c) for c in record["completions"] if isinstance(c["response"], str) and c["response"].strip()
                  and (value := score(c, options)) is not None]
        for i, (value, c) in enumerate(scored):
            tally.by_model[str(c.get("model"))].append(value)
            tally.by_principle[str(c.get("principle") or "none")].append(value)
            for other, d in scored[:i]:
                win = (value > other) + 0.5 * (value == other)
                tally.wins[str(c.get("model")), str(d.get("model"))].append(win)
                tally.wins[str(d.get("model")), str(c.get("model"))].append(1 - win)
        pair = chosen_rejected(scored, options, random.Random(f"{options.seed}:{number}"))
        if isinstance(pair, str):
            tally.left_out[pair] += 1
            continue
        (high, chosen), (low, rejected) = pair
        tally.margins.append(high - low)
        yield as_pair(record, chosen, rejected, high, low)


def score(completion: Record, options: BinarizeOptions) -> float | None:
    """A completion's score, None where it has none."""
    notes = completion.get("annotations") or {}
    fine = fine_grained({name: a[0] if isinstance(a, list) else a for name, a in notes.items()}) if notes else None
    value = fine if options.score == "mean" else completion.get("overall_score")
    if value is None:
        return None
    if options.fix_tens and options.score == "overall" and value == 10 and fine is not None and fine <= 4:
        return 1.0 if fine <= 2 else None
    return float(value)


def chosen_rejected(scored: Sequence[tuple[float, Record]], options: BinarizeOptions, rng: random.Random) -> Any:
    """The two (score, completion), or why there is no pair. The first of several best is chosen, as H4's data has it."""
    if len(scored) < 2:
        return "fewer than two scored completions"
    best = max(range(len(scored)), key=lambda i: scored[i][0])
    others = [i for i in range(len(scored)) if i != best and scored[i][1]["response"] != scored[best][1]["response"]]
    if options.rejected == "lower":
        others = [i for i in others if scored[i][0] < scored[best][0]]
    if not others:
        return "no completion differs from the best"
    worse = min(others, key=lambda i: scored[i][0]) if options.rejected == "lowest" else rng.choice(others)
    margin = scored[best][0] - scored[worse][0]
    if not margin and options.ties == "drop":
        return "tie"
    if margin < options.min_margin:
        return "margin too small"
    return scored[best], scored[worse]


def as_pair(record: Record, chosen: Record, rejected: Record, high: float, low: float) -> Record:
    """TRL's record with an explicit prompt: messages, one of them in each completion; of continued texts the plain strings."""
    prompt = from_json(record["instruction"], "instruction")
    turns: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*as_json(prompt)]
    text = record.get("text") is True

    def side(completion: Record) -> Any:
        return completion["response"] if text else [{"role": "assistant", "content": completion["response"]}]

    told = prompt if isinstance(prompt, str) else "\n".join(m.content for m in prompt)
    return {
        "prompt": prompt if text else turns,
        "prompt_id": hashlib.sha256(told.encode("utf-8", "replace")).hexdigest(),
        "chosen": side(chosen),
        "rejected": side(rejected),
        "score_chosen": high,
        "score_rejected": low,
        "source": record.get("source"),
        "chosen_model": chosen.get("model"),
        "rejected_model": rejected.get("model"),
    }


def _write_parquet(path: Path, pairs: list[Record]) -> str:
    """Write the pairs as parquet; gives why that isn't possible, "" if it is."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return "pyarrow is missing (pip install 'xalign[parquet]')"
    if len({type(p["chosen"]) for p in pairs}) > 1:
        return "a column has one type, and here are texts to continue beside conversations"
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(pairs), buffer)
    write_atomically(path, buffer.getvalue())
    return ""


def _reasons(tally: Tally) -> str:
    return ", ".join(f"{reason}: {n:,}" for reason, n in tally.left_out.most_common())


def report(tally: Tally, count: int, options: BinarizeOptions, pictures: Sequence[tuple[str, str]]) -> str:
    """The report as Markdown."""
    models = sorted(tally.by_model)
    parts = [
        "# Preference pairs",
        f"{count:,} pairs. Left out: {_reasons(tally) or 'none'}.",
        f"Chosen is the completion with the highest {options.score} score; rejected: {options.rejected}; ties: {options.ties}. "
        f"Margins: mean {mean(tally.margins):.3f}, least {min(tally.margins):.3f}, largest {max(tally.margins):.3f}.",
    ]
    for title, groups in (("model", tally.by_model), ("principle", tally.by_principle)):
        lines = [f"| {title} | completions | mean score | least | largest |", "|---|---|---|---|---|"]
        lines += [
            f"| {_cell(n)} | {len(v):,} | {mean(v):.3f} | {min(v):.3f} | {max(v):.3f} |" for n, v in sorted(groups.items())
        ]
        parts += [f"## Scores by {title}", "\n".join(lines)]
    lines = ["| wins of, over | " + " | ".join(map(_cell, models)) + " |", "|---|" + "---|" * len(models)]
    for a in models:
        cells = [f"{mean(tally.wins[a, b]):.2f}" if tally.wins.get((a, b)) else "" for b in models]
        lines.append(f"| {_cell(a)} | " + " | ".join(cells) + " |")
    parts += [
        "## Which model beats which",
        "The share of instructions with both where the row's completion scores higher; ties count one half.",
        "\n".join(lines),
    ]
    parts += [f"![{text}]({name})\n\n*{text}*" for name, text in pictures] or ["(no pictures: pip install 'xalign[plots]')"]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def draw(folder: Path, tally: Tally) -> list[tuple[str, str]]:
    """Draw the pictures; gives (file, caption), nothing where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return []
    pictures = []
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for axis, groups, title in (
        (axes[0], tally.by_model, "scores by model"),
        (axes[1], tally.by_principle, "scores by principle"),
    ):
        values = [v for group in groups.values() for v in group]
        for name, group in sorted(groups.items()):
            axis.hist(group, bins=20, range=(min(values), max(values) + 1e-9), histtype="step", label=name[:24])
        axis.set(title=title, ylabel="completions")
        axis.legend(fontsize=7)
    axes[2].hist(tally.margins, bins=20)
    axes[2].set(title="margins of the pairs", ylabel="pairs")
    caption = "Scores of the completions by model and by principle, and the pairs' margins."
    pictures.append(save_figure(plt, folder, figure, "scores.png", caption))

    models = sorted(tally.by_model)
    size = 3 + 0.5 * len(models)
    figure, axis = plt.subplots(figsize=(size + 1, size))
    table = [[mean(tally.wins[a, b]) if tally.wins.get((a, b)) else float("nan") for b in models] for a in models]
    image = axis.imshow(table, vmin=0, vmax=1, cmap="RdBu")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value == value:
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if abs(value - 0.5) > 0.3 else "black")
    axis.set(xticks=range(len(models)), yticks=range(len(models)), title="wins of the row over the column")
    axis.set_xticklabels([m[:20] for m in models], rotation=45, ha="right")
    axis.set_yticklabels([m[:20] for m in models])
    figure.colorbar(image)
    caption = "How often the row's model scores higher than the column's on the same instruction."
    pictures.append(save_figure(plt, folder, figure, "wins.png", caption))
    return pictures

