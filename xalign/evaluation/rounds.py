"""Online rounds measured and told: reward against gold, KL, length and well-formedness, round by round."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xalign.data import toyworld
from xalign.data.replies import as_text
from xalign.disk import write_atomically
from xalign.evaluation.intervals import Estimate, estimate, wins
from xalign.evaluation.report import SHOWN, prose, pyplot, save_figure
from xalign.pairing import best_of, best_of_kl
from xalign.scoring import Scorer
from xalign.watch import warn

Record = dict[str, Any]
GOLD_NAMES = ("gold", "well_formed", "consistent")
ROWS = (("reward", "reward"), ("gold", "gold"), ("gold_gain", "gold, gain over the round before"),
        ("reward_win_rate", "win rate against round 0, by reward"), ("gold_win_rate", "win rate against round 0, by gold"),
        ("kl", "KL to round 0, nats a sequence"), ("tokens", "tokens a sample"), ("finished", "samples that end"),
        ("well_formed", "well-formed"), ("consistent", "consistent"))


def measure(rows: Sequence[Record], first: Sequence[Record], before: Sequence[Record]) -> dict[str, Any]:
    """Numbers of a round's samples, each with its 95 % interval over prompts; `first` are round 0's, `before` the last one's.

    A row has a prompt's `rewards`, `log_ratios`, `tokens`, `finish_reasons`, `responses`, and `gold` where it is known.
    """
    numbers: dict[str, Any] = {"prompts": len(rows), "samples": sum(len(row["responses"]) for row in rows)}

    def add(name: str, value: Estimate) -> None:
        numbers[name], numbers[f"{name}_interval"] = value.value, [value.low, value.high]

    values = {"kl": [row["log_ratios"] for row in rows], "tokens": [row["tokens"] for row in rows],
              "finished": [[float(reason == "stop") for reason in row["finish_reasons"]] for row in rows]}
    prompts = [as_text(row["prompt"]) for row in rows]
    if all(isinstance(p, str) and toyworld.read_prompt(p) is not None for p in prompts):
        for name, passes in (("well_formed", toyworld.is_well_formed), ("consistent", toyworld.is_consistent)):
            values[name] = [[float(passes(str(p), text)) for text in row["responses"]]
                            for p, row in zip(prompts, rows, strict=True)]
    for name, per_prompt in values.items():
        add(name, _mean(per_prompt))
    for kind, name in (("rewards", "reward"), ("gold", "gold")):
        if kind not in rows[0]:
            continue
        now, then, last = ({json.dumps(r["prompt"]): _finite(r[kind]) for r in some} for some in (rows, first, before))
        add(name, _mean(list(now.values())))
        shared = [p for p in now if now[p] and then.get(p) and last.get(p)]  # a prompt that failed once is in no comparison
        if shared:
            add(f"{name}_gain", estimate([float(np.mean(now[p]) - np.mean(last[p])) for p in shared]))
            add(f"{name}_win_rate", estimate(wins([now[p] for p in shared], [then[p] for p in shared])))
    flat = [text for row in rows for text in row["responses"]]
    return numbers | {"distinct": len(set(flat)) / len(flat)}


def _finite(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _mean(rows: Sequence[Sequence[float]]) -> Estimate:
    return estimate([float(np.sum(row)) for row in rows], [len(row) for row in rows])


def hacked(lines: Sequence[Record]) -> list[str]:
    """Rounds in which the reward rose and gold fell, both beyond their intervals: the policy learns the reward's mistakes."""
    found = []
    for line in lines:
        reward, gold = line.get("reward_gain_interval"), line.get("gold_gain_interval")
        if reward and gold and reward[0] > 0 > gold[1]:
            found.append(f"round {line['step']}: the reward rose by {line['reward_gain']:.2f} and gold fell by "
                         f"{-line['gold_gain']:.2f}; the policy over-optimises the reward model, and round "
                         f"{line['step'] - 1}'s is better")
    return found


def best_of_rows(rows: Sequence[Record], gold: Scorer | None) -> list[Record]:
    """What choosing the best of N = 1, 2, 4, ... by reward gives on scored completions, over prompts with a full K of them."""
    whole = [row for row in rows if len(_finite(row["rewards"])) == len(row["rewards"])]
    sizes = [2**i for i in range(20) if whole and 2**i <= min(len(row["rewards"]) for row in whole)]
    known: list[list[float]] = []
    if gold is not None and sizes:
        told = [(as_text(row["prompt"]), text) for row in whole for text in row["responses"]]
        scores = iter(gold.score([p for p, _ in told], [t for _, t in told], progress="score (best of N)").tolist())
        known = [[next(scores) for _ in row["responses"]] for row in whole]
    lines = []
    for n in sizes:
        line: Record = {"n": n, "kl": best_of_kl(n)}
        for name, values in (("reward", [row["rewards"] for row in whole]), ("gold", known)):
            if values:
                value = estimate([best_of(row["rewards"], v, n) for row, v in zip(whole, values, strict=True)])
                line |= {name: value.value, f"{name}_interval": [value.low, value.high]}
        lines.append(line)
    return lines


# -- the report -----------------------------------------------------------------------------------------------------


def write_rounds(folder: Path, lines: Sequence[Record], best: Sequence[Record], first: Sequence[Record], last: Sequence[Record],
                 settings: dict[str, Any]) -> str:
    """Write the pictures and report.md (last, so that its presence means all is there) of a run's rounds; give the table."""
    measured = [line for line in lines if "kl" in line]
    warnings = hacked(measured)
    for text in warnings:
        warn(text)
    head = "| |" + "".join(f" round {line['step']} |" for line in lines) + "\n|---|" + "---|" * len(lines)
    table = "\n".join([head, *(f"| {title} |{'|'.join(_cell(line, name) for line in lines)}|" for name, title in ROWS
                               if any(name in line for line in lines)),
                       f"| distinct samples |{'|'.join(_plain(line, 'distinct', '.3f') for line in lines)}|",
                       f"| completions drawn |{'|'.join(_plain(line, 'drawn', ',') for line in lines)}|",
                       f"| their mean reward, and of each prompt's best |{'|'.join(_drawn(line) for line in lines)}|",
                       f"| records learnt from |{'|'.join(_plain(line, 'learnt', ',') for line in lines)}|"])
    about = measured[-1]
    parts = [f"# Online rounds of {prose(str(settings['model']))}", table,
             f"Round 0 is the first policy. Each policy wrote {about['samples']:,} samples to the same {about['prompts']:,} "
             "held-out prompts, with the same seeds. In brackets: 95 % intervals, by bootstrap over prompts; a gain is of the "
             "same prompts. The KL is the mean of log policy - log round 0 over the policy's own samples. What a round drew "
             "came from the policy before it.", *(f"**Warning.** {prose(text)}." for text in warnings)]
    if best:
        rows = [f"| {b['n']} | {b['kl']:.2f} | {_cell(b, 'reward')} | {_cell(b, 'gold') or ' '} |" for b in best]
        parts += ["## Best of N", "Choosing by reward among N completions of round 0, over the prompts of round 1: no "
                  "training, N times the cost of an answer. The KL is ln N - (N-1)/N.",
                  "\n".join(["| N | KL, nats | reward | gold |", "|---|---|---|---|", *rows])]
    parts += ["## Pictures", *(f"![{text}]({name})\n\n*{text}*" for name, text in draw(folder, measured, best))]
    if last:
        parts += ["## Samples", f"First sample of round 0 and of round {about['step']}."]
        ours = {json.dumps(row["prompt"]): row for row in last}
        for i, row in enumerate(first[:SHOWN]):
            lines_of = [f"**{i + 1}.** {prose(as_text(row['prompt']))}"]
            for name, one in (("round 0", row), (f"round {about['step']}", ours.get(json.dumps(row["prompt"])))):
                if one is not None:
                    told = [f"{k} {one[key][0]:+.2f}" for k, key in (("reward", "rewards"), ("gold", "gold"))
                            if one.get(key) and one[key][0] is not None]
                    lines_of.append(f"- *{name}* ({', '.join(told)}): {prose(one['responses'][0])}")
            parts.append("\n".join(lines_of))
    parts += ["## Settings", "```json\n" + json.dumps(settings, indent=2) + "\n```"]
    write_atomically(folder / "report.md", "\n\n".join(parts) + "\n")
    return table + "".join(f"\nwarning: {text}" for text in warnings)


def _cell(line: Record, name: str) -> str:
    if name not in line or (name.endswith("_gain") and line.get("step") == 0):
        return " "
    low, high = line[f"{name}_interval"]
    return f" {line[name]:.3f} [{low:.3f}, {high:.3f}] "


def _plain(line: Record, name: str, form: str) -> str:
    return f" {line[name]:{form}} " if name in line else " "


def _drawn(line: Record) -> str:
    return f" {line['drawn_reward']:.3f}, {line['drawn_top_1']:.3f} " if "drawn" in line else " "


def draw(folder: Path, lines: Sequence[Record], best: Sequence[Record]) -> list[tuple[str, str]]:
    """Draw the rounds into `folder`; gives (file, caption), nothing where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return []
    colours = {"reward": "tab:blue", "gold": "tab:orange"}
    pictures: list[tuple[str, str]] = []

    def points(axis: Any, some: Sequence[Record], x: list[float], name: str, **style: Any) -> None:
        shown = [(at, line) for at, line in zip(x, some, strict=True) if name in line]
        y = [line[name] for _, line in shown]
        spread = [[v - line[f"{name}_interval"][0] for v, (_, line) in zip(y, shown, strict=True)],
                  [line[f"{name}_interval"][1] - v for v, (_, line) in zip(y, shown, strict=True)]]
        if shown:
            axis.errorbar([at for at, _ in shown], y, yerr=np.maximum(0, spread), capsize=3, **style)

    if len(lines) > 1:
        steps = [float(line["step"]) for line in lines]
        figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.2))
        for name in colours:
            points(axes[0, 0], lines, steps, name, label=name, color=colours[name], marker="o")
            points(axes[0, 1], lines, [math.sqrt(max(0.0, line["kl"])) for line in lines], name, label=name,
                   color=colours[name], marker="o")
            points(axes[0, 1], best, [math.sqrt(b["kl"]) for b in best], name, label=f"{name}, best of N", color=colours[name],
                   marker="x", ls=":", alpha=0.7)
        axes[0, 0].set(title="what is optimised, and what is meant", xlabel="round")
        axes[0, 1].set(title="the same against the way gone", xlabel="√KL to round 0, √nats")
        points(axes[1, 0], lines, steps, "tokens", color="tab:green", marker="o", label="tokens a sample")
        axes[1, 0].set(title="length", xlabel="round", ylim=(0, 1.15 * max(line["tokens_interval"][1] for line in lines)))
        for name, label in (("well_formed", "well-formed"), ("consistent", "consistent"), ("finished", "ends")):
            points(axes[1, 1], lines, steps, name, label=label, marker="o")
        axes[1, 1].plot(steps, [line["distinct"] for line in lines], label="distinct", marker="x", ls="--")
        axes[1, 1].set(title="shares of the samples", xlabel="round")
        low = min(min(line.get(k, 1.0) for k in ("well_formed", "consistent", "finished", "distinct")) for line in lines)
        axes[1, 1].set_ylim(max(0.0, low - 0.1), 1.02)
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        for axis in (axes[0, 0], axes[1, 0], axes[1, 1]):
            axis.set_xticks(steps)
        pictures.append(save_figure(plt, folder, figure, "rounds.png", "Reward and gold by round and by the KL that they cost, "
                                    "length, and what the samples are; bars are 95 % intervals. Reward up and gold down is "
                                    "over-optimisation."))
    elif best:
        figure, axis = plt.subplots(figsize=(6.5, 4.2))
        for name in colours:
            points(axis, best, [b["kl"] for b in best], name, label=name, color=colours[name], marker="o")
        for b in best:
            axis.annotate(f"N = {b['n']}", (b["kl"], b["reward"]), xytext=(4, -12), textcoords="offset points", fontsize=8)
        axis.set(title="best of N by reward", xlabel="KL, nats: ln N - (N-1)/N")
        axis.grid(alpha=0.3)
        axis.legend()
        pictures.append(save_figure(plt, folder, figure, "best_of_n.png", "What choosing the best of N by the reward gives."))
    return pictures
