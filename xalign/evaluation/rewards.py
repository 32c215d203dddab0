"""How well a reward model tells chosen from rejected on held-out pairs: accuracy, margins, calibration, and its report."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xalign.data import toyworld
from xalign.data.collate import EncodedRanked, RankedBatch, collate_ranked
from xalign.data.records import PreferencePair
from xalign.disk import write_atomically
from xalign.evaluation.intervals import Estimate, by_prompt, estimate, wilson
from xalign.evaluation.metrics import accuracies, each_batch
from xalign.evaluation.report import SHOWN, plot_lines, prose, pyplot, save_figure
from xalign.objectives import Reward
from xalign.runs import METRICS, read_jsonl, strict

BINS = 10


@torch.no_grad()
def pair_rewards(objective: Reward, rows: Sequence[EncodedRanked], pad_id: int, progress: str = "") -> tuple[Tensor, Tensor]:
    """Rewards (n,) of the chosen and of the rejected texts, fp32 on the CPU."""
    found = torch.zeros(2, len(rows))

    def use(some: list[int], batch: RankedBatch) -> None:
        found[:, some] = torch.stack(objective.rewards(batch)).cpu()

    each_batch(objective.model, [row.length for row in rows], lambda some: collate_ranked([rows[i] for i in some], pad_id), use,
               progress=progress)
    return found[0], found[1]


def quick(objective: Reward, rows: Sequence[EncodedRanked], pad_id: int) -> dict[str, float]:
    """Held-out loss, accuracy and margin for the log during training."""
    chosen, rejected = pair_rewards(objective, rows, pad_id)
    loss = objective.pair_losses(chosen, rejected, torch.tensor([row.margin for row in rows])).mean()
    means = {"chosen": chosen, "rejected": rejected, "accuracies": torch.tensor(accuracies(chosen, rejected)),
             "margins": chosen - rejected}
    return {"eval/loss": float(loss), **{f"eval/rewards/{k}": float(v.mean()) for k, v in means.items()}}


@dataclass
class Bin:
    """Pairs whose preferred side is told with about the same confidence: its mean, and how often that side is the chosen."""

    predicted: float
    observed: float
    low: float
    high: float
    pairs: int


def calibration(margins: Tensor, bins: int = BINS) -> list[Bin]:
    """Predicted against observed preference, in `bins` groups of as many pairs, by confidence.

    `margins` (n,) are r_chosen - r_rejected. The side with the higher reward is predicted with s(|margin|), in [.5, 1]; it is
    the chosen one where the margin is positive (a tie counts one half). The interval of what is observed is Wilson's, 95 %.
    """
    margins = margins.double()
    order = margins.abs().argsort()
    found = []
    for part in order.tensor_split(min(bins, len(order))):
        own, n = margins[part], len(part)
        right = float(((own > 0).double() + 0.5 * (own == 0)).sum())
        found.append(Bin(float(torch.sigmoid(own.abs()).mean()), right / n, *wilson(right, n), n))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance of predicted and observed over all pairs (ECE, Naeini et al. 2015)."""
    return sum(b.pairs * abs(b.predicted - b.observed) for b in bins) / sum(b.pairs for b in bins)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; NaN where one is constant."""
    a, b = (_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other))
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


@dataclass
class Judged:
    """What the report shows: numbers, the table's rows, rewards (n,) of both sides, and calibration."""

    numbers: dict[str, Any]
    table: dict[str, str]
    chosen: Tensor
    rejected: Tensor
    bins: list[Bin]


def judge(objective: Reward, pairs: Sequence[PreferencePair], rows: Sequence[EncodedRanked], pad_id: int,
          gold_known: bool) -> Judged:
    """Measure a reward model on held-out pairs, `rows` encoded; pairs of one prompt are resampled together.

    Where the gold reward is known, added are: the accuracy that is expected over the labels' noise, by the known probability
    of each label; the same of the gold reward, which is the limit (Bayes) of what can be reached but by luck, and their
    ratio; the gold reward's accuracy on the labels as they fell; and the rank correlation with it. `pairs` that truncation
    dropped are in no number.
    """
    chosen, rejected = pair_rewards(objective, rows, pad_id, "evaluate")
    by_where = {pair.where: pair for pair in pairs}
    kept = [by_where[row.where] for row in rows]
    numbers: dict[str, Any] = {"pairs": len(rows), "loss": float(objective.pair_losses(
        chosen, rejected, torch.tensor([row.margin for row in rows])).mean())}
    table: dict[str, str] = {}

    def add(name: str, key: str, values: Sequence[float]) -> Estimate:
        found = estimate(*by_prompt([str(pair.prompt) for pair in kept], values))
        numbers.update({key: found.value, f"{key}_interval": [found.low, found.high]})
        table[name] = str(found)
        return found

    add("accuracy", "accuracy", accuracies(chosen, rejected))
    add("margin, chosen - rejected", "margin", (chosen - rejected).tolist())
    both = torch.cat((chosen, rejected)).double()
    bins = calibration(chosen - rejected)
    lengths = [len(row.prompt) + len(getattr(row, side)) for side in ("chosen", "rejected") for row in rows]
    numbers |= {"mean": float(both.mean()), "std": float(both.std()) if len(both) > 1 else math.nan,
                "calibration_error": calibration_error(bins), "spearman_length": spearman(both.tolist(), lengths),
                "calibration": [vars(b) for b in bins]}
    table |= {"loss, nats a pair": f"{numbers['loss']:.3f}",
              "calibration error": f"{numbers['calibration_error']:.3f}",
              "rewards, mean and standard deviation": f"{numbers['mean']:.3f}, {numbers['std']:.3f}",
              "rank correlation with length": f"{numbers['spearman_length']:.3f}"}
    if gold_known:
        texts = [{name: str(getattr(p, name)) for name in ("prompt", "chosen", "rejected")} for p in kept]
        gold = [toyworld.gold_reward(t["prompt"], t[side]) for side in ("chosen", "rejected") for t in texts]
        limit = toyworld.preference_limit(texts)
        right = [toyworld.preference_probability(t["prompt"], t["chosen"], t["rejected"]) for t in texts]
        expected = add("accuracy expected over labels drawn anew", "accuracy_expected",
                       [a * p + (1 - a) * (1 - p) for a, p in zip(accuracies(chosen, rejected), right, strict=True)])
        numbers |= {"accuracy_limit": limit, "accuracy_share": expected.value / limit,
                    "accuracy_gold": float(np.mean(accuracies(*torch.tensor(gold).chunk(2)))),
                    "spearman_gold": spearman(both.tolist(), gold)}
        table |= {"limit of the accuracy by label noise (Bayes)": f"{limit:.3f}",
                  "expected accuracy / limit": f"{numbers['accuracy_share']:.3f}",
                  "accuracy of the gold reward on these labels": f"{numbers['accuracy_gold']:.3f}",
                  "rank correlation with the gold reward": f"{numbers['spearman_gold']:.3f}"}
    return Judged(numbers, table, chosen, rejected, bins)


# -- the report -----------------------------------------------------------------------------------------------------


def write_reward_report(folder: Path, title: str, result: Judged, pairs: Sequence[PreferencePair],
                        rows: Sequence[EncodedRanked], settings: dict[str, Any]) -> str:
    """Write evaluation.json, the pictures and report.md (last, so that its presence means all is there); give the table."""
    write_atomically(folder / "evaluation.json", json.dumps(strict(result.numbers), indent=2) + "\n")
    table = "\n".join(["| held-out pairs | |", "|---|---|", *(f"| {name} | {value} |" for name, value in result.table.items())])
    pictures = _draw(folder, result)
    notes = (f"Over {len(rows):,} held-out pairs. In brackets: 95 % intervals, by bootstrap over prompts; a tie counts half. "
             "Calibration: the side with the higher reward is predicted with probability sigmoid(difference), and observed as "
             "often as it is the chosen one; the error is the mean distance of the two.")
    bins = ["| predicted | observed | pairs |", "|---|---|---|",
            *(f"| {b.predicted:.3f} | {b.observed:.3f} [{b.low:.3f}, {b.high:.3f}] | {b.pairs} |" for b in result.bins)]
    parts = [f"# {title}", table, notes, "## Calibration", "\n".join(bins), "## Pictures"]
    parts += [f"![{text}]({name})\n\n*{text}*" for name, text in pictures]
    if not pictures:
        parts.append("(none: matplotlib is not installed; `pip install xalign[plots]` and run again with --overwrite)")
    parts += ["## The clearest mistakes", *_mistakes(result, pairs, rows)]
    parts += ["## Settings", "```json\n" + json.dumps(settings, indent=2) + "\n```"]
    write_atomically(folder / "report.md", "\n\n".join(parts) + "\n")
    return table


def _mistakes(result: Judged, pairs: Sequence[PreferencePair], rows: Sequence[EncodedRanked]) -> list[str]:
    by_where = {pair.where: pair for pair in pairs}
    margins = result.chosen - result.rejected
    parts: list[str] = []
    for i in margins.argsort()[:SHOWN].tolist():
        if margins[i] >= 0:
            break
        pair = by_where[rows[i].where]
        parts.append(f"**{len(parts) + 1}.** {prose(pair.prompt)}\n"
                     f"- *chosen* ({float(result.chosen[i]):+.2f}): {prose(pair.chosen)}\n"
                     f"- *rejected* ({float(result.rejected[i]):+.2f}): {prose(pair.rejected)}")
    return parts or ["(none)"]


def _draw(folder: Path, result: Judged) -> list[tuple[str, str]]:
    """Draw the pictures into `folder`; gives (file, caption), nothing where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return []
    log = read_jsonl(folder / METRICS)
    pictures = []
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    plot_lines(axes[0], log, [("loss", "training"), ("eval/loss", "held out")], "loss, nats a pair")
    plot_lines(axes[1], log, [("rewards/accuracies", "training"), ("eval/rewards/accuracies", "held out")], "accuracy")
    if "accuracy_limit" in result.numbers:
        axes[1].axhline(result.numbers["accuracy_limit"], color="0.4", ls=":", label="label noise's limit")
        axes[1].legend()
    plot_lines(axes[2], log, [("rewards/margins", "training"), ("eval/rewards/margins", "held out")], "margin")
    pictures.append(save_figure(plt, folder, figure, "training.png", "Loss, accuracy and margin over the steps of training."))

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    sides = {"chosen": result.chosen, "rejected": result.rejected}
    low, high = (float(f(torch.cat(list(sides.values())))) for f in (torch.min, torch.max))
    style = {"bins": 24, "range": (low, high + 1e-9), "alpha": 0.55, "density": True}
    for (name, values), colour in zip(sides.items(), ("tab:orange", "tab:blue"), strict=True):
        axes[0].hist(values.tolist(), label=name, color=colour, **style)
        axes[0].axvline(float(values.mean()), color=colour, lw=1.5)
    axes[0].set(title="reward", ylabel="density")
    axes[0].legend()
    axes[1].hist((result.chosen - result.rejected).tolist(), bins=24, color="0.5")
    axes[1].axvline(0, color="0.2", lw=0.8)
    axes[1].set(title="margin, chosen - rejected", ylabel="pairs")
    pictures.append(save_figure(plt, folder, figure, "rewards.png", "Rewards of held-out texts, their means, and margins."))

    figure, axis = plt.subplots(figsize=(5, 4.6))
    axis.plot([0.5, 1], [0.5, 1], color="0.6", ls=":")
    spread = [[max(0.0, b.observed - b.low) for b in result.bins], [max(0.0, b.high - b.observed) for b in result.bins]]
    axis.errorbar([b.predicted for b in result.bins], [b.observed for b in result.bins], yerr=spread, marker="o", capsize=2)
    axis.set(title="calibration", xlabel="predicted preference", ylabel="observed preference")
    axis.grid(alpha=0.3)
    pictures.append(save_figure(plt, folder, figure, "calibration.png", "Predicted against observed preference; "
                                "below the dotted line the model is too sure."))
    return pictures
