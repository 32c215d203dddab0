"""What is known of a policy and its reference, row by row: `Comparison` and the functions that add to it.

They take texts, log-probabilities and comparisons that are there already, from whichever engine or judge, and know no model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xalign.backends.base import Completion
from xalign.data import toyworld
from xalign.data.records import Labelled, PreferencePair, Text
from xalign.evaluation import intervals, metrics
from xalign.evaluation.intervals import Estimate, Rows, WinRate, by_prompt, estimate, mean_of

GRAMS = 4  # words in a row that are repetition when they come again in one text (seq-rep-4, Welleck et al. 2020)


@dataclass
class Section:
    """A further table of the report."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Comparison:
    """Rows of the table (name -> model -> estimate, or text), numbers for evaluation.json, and texts and values for pictures.

    `scores` are those of the first judge that gives any, called `score_name`; `wins` and `margins` are by judge, and by pair.
    """

    table: dict[str, dict[str, Estimate | str]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    prompts: list[Text] = field(default_factory=list)
    texts: dict[str, list[list[str]]] = field(default_factory=dict)
    lengths: dict[str, list[list[int]]] = field(default_factory=dict)
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    score_name: str = ""
    wins: dict[str, WinRate] = field(default_factory=dict)
    won: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    ratios: list[list[float]] = field(default_factory=list)
    temperatures: dict[str, dict[float, dict[str, WinRate]]] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    labelled: bool = False

    def add(self, row: str, model: str, value: Estimate | str, key: str = "") -> None:
        self.table.setdefault(row, {})[model] = value
        if key and isinstance(value, Estimate):
            self.numbers[key] = value.value
            self.numbers[f"{key}_interval"] = [value.low, value.high]


# -- texts ----------------------------------------------------------------------------------------------------------


def add_texts(result: Comparison, name: str, completions: Sequence[Sequence[Completion]]) -> None:
    """Length, variety and repetition of a model's samples."""
    texts = result.texts[name] = [[c.text for c in row] for row in completions]
    result.lengths[name] = [[len(c.token_ids) for c in row] for row in completions]
    flat = [text for row in texts for text in row]
    if any(n for row in result.lengths[name] for n in row):  # another's engine may not tell
        result.add("tokens a sample", name, mean_of(result.lengths[name]), f"length_{name}")
    ends = [[float(c.finish_reason == "length") for c in row] for row in completions]
    result.add("words a sample", name, mean_of([[len(text.split()) for text in row] for row in texts]), f"words_{name}")
    result.add("cut off at the limit", name, mean_of(ends), f"cut_{name}")
    result.add(f"repeated runs of {GRAMS} words", name, mean_of([[repetition(text) for text in row] for row in texts]),
               f"repetition_{name}")
    shares = {"distinct samples": ("distinct", len(set(flat)) / len(flat)),
              "distinct words": ("distinct_1", distinct(flat, 1)), "distinct pairs of words": ("distinct_2", distinct(flat, 2))}
    for row, (key, share) in shares.items():
        result.add(row, name, f"{share:.3f}")
        result.numbers[f"{key}_{name}"] = share


def distinct(texts: Iterable[str], n: int) -> float:
    """Different runs of `n` words among all of them, over all texts (distinct-n, Li et al. 2016); 0 where there is none.

    It falls with the number of texts: compare as many of both models.
    """
    found = [run for text in texts for run in _runs(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def repetition(text: str, n: int = GRAMS) -> float:
    """The share of a text's runs of `n` words that came before in it."""
    runs = _runs(text, n)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


# -- likelihoods ----------------------------------------------------------------------------------------------------


def add_perplexity(result: Comparison, what: str, name: str, key: str, nats: Sequence[float], tokens: Sequence[float]) -> None:
    """Perplexity from the nats and tokens of each text (or prompt), with the nats a token."""
    result.add(f"perplexity of {what}", name, estimate(nats, tokens, np.exp), f"{key}_{name}")
    result.add(f"nats a token of {what}", name, estimate(nats, tokens), f"{key}_nats_{name}")


def add_text(result: Comparison, what: str, logps: Mapping[str, Sequence[float]], tokens: Sequence[float], limit: float) -> str:
    """Perplexity of a watched text under both models, from the summed log-probabilities of its documents; gives the alarm."""
    for name, values in logps.items():
        add_perplexity(result, what, name, "text_perplexity", [-v for v in values], tokens)
    ratio = result.numbers["text_perplexity_policy"] / result.numbers["text_perplexity_reference"]
    result.numbers["text_perplexity_ratio"] = ratio
    told = alarm(ratio, limit, what)
    result.alerts += [told] if told else []
    return told


def alarm(ratio: float, limit: float, what: str) -> str:
    """A warning, or "", about the policy's perplexity of a text as a multiple of the reference's."""
    return "" if not ratio > limit else (
        f"the policy's perplexity of {what} is {ratio:.2f} times the reference's (--perplexity-alert is {limit:g}): it forgets "
        "how to write; try a larger --beta, a lower --learning-rate, or mix in imitation (--loss-type sigmoid,sft)")


def add_divergence(result: Comparison, policy: Rows, reference: Rows, reference_own: Rows | None = None) -> None:
    """KL(policy || reference) by the policy's samples, and entropies, from summed log-probabilities, nats, of each sample.

    `policy` and `reference` score the policy's samples, `reference_own` the reference's own. All must have been drawn at
    temperature 1, unfiltered. The mean log-ratio is the sequences' KL; its standard error is what drawing samples costs, these
    prompts given (`intervals.monte_carlo_error`), while the interval is over prompts.
    """
    result.ratios = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(policy, reference, strict=True)]
    tokens = [float(sum(row)) for row in result.lengths["policy"]]
    result.add("KL to the reference, nats a sequence", "policy", mean_of(result.ratios), "kl")
    result.numbers["kl_standard_error"] = intervals.monte_carlo_error(result.ratios)
    result.add("KL, nats a token", "policy", estimate([sum(row) for row in result.ratios], tokens), "kl_token")
    for name, rows in (("policy", policy), ("reference", reference_own)):
        if rows is not None:
            lengths = [float(sum(row)) for row in result.lengths[name]]
            result.add("entropy, nats a sequence", name, mean_of([[-v for v in row] for row in rows]), f"entropy_{name}")
            result.add("entropy, nats a token", name, estimate([-sum(row) for row in rows], lengths), f"entropy_token_{name}")


def add_log_ratios(result: Comparison, policy: np.ndarray, reference: np.ndarray, tokens: np.ndarray, prompts: Sequence[object],
                   sources: Sequence[str] = (), gold: Sequence[float] = ()) -> None:
    """The preference log-ratio log pi(chosen) / pi(rejected) of both models, and how often the alignment inequality holds: the
    policy's is larger than the reference's (DPO's implicit reward prefers the chosen; arXiv 2305.18290, eq. 5, for any beta).

    `policy`, `reference` and `tokens` are (2, pairs): chosen and rejected, summed nats, response tokens. Slices are by which
    side is longer, by length, and by `sources`. `gold` says how much better the chosen side truly is, where that is known: the
    pairs are then also ordered by it.
    """
    ratios = {"policy": policy[0] - policy[1], "reference": reference[0] - reference[1]}
    margins = ratios["policy"] - ratios["reference"]
    result.margins = margins.tolist()
    for name in ("reference", "policy"):
        told = ratios[name]
        result.add("log-ratio of chosen to rejected, nats", name, estimate(*by_prompt(prompts, told)), f"log_ratio_{name}")
        result.add("chosen is likelier than rejected", name, estimate(*by_prompt(prompts, _signs(told))), f"likelier_{name}")
    result.add("alignment inequality, share of pairs", "policy", estimate(*by_prompt(prompts, _signs(margins))), "alignment")
    if len(gold):
        sign = np.sign(gold)
        ordered = [(p, v) for p, v, s in zip(prompts, _signs(margins * sign), sign, strict=True) if s]
        if ordered:
            share = estimate(*by_prompt(*zip(*ordered, strict=True)))
            result.add("the same, pairs ordered by the gold reward", "policy", share, "alignment_gold")
    result.add("margin of the log-ratios, nats", "policy", estimate(*by_prompt(prompts, margins)), "margin")
    slices = _slices(tokens, sources)
    result.numbers["alignment_slices"] = {}
    rows = []
    for name, chosen in slices.items():
        own = [prompts[i] for i in chosen]
        share, margin = (estimate(*by_prompt(own, values[chosen])) for values in (_signs(margins), margins))
        result.numbers["alignment_slices"][name] = {"pairs": len(chosen), "alignment": share.value, "margin": margin.value,
                                                    "alignment_interval": [share.low, share.high],
                                                    "margin_interval": [margin.low, margin.high]}
        rows.append([name, f"{len(chosen):,}", str(share), str(margin)])
    if rows:
        result.sections.append(Section("Alignment inequality by slice", ["pairs whose", "pairs", "share", "margin, nats"], rows,
                                       "Lengths are tokens of the responses; the pairs of a slice far above the others may be "
                                       "told apart by that alone."))


def _signs(values: np.ndarray) -> np.ndarray:
    return (np.sign(values) + 1) / 2


def _slices(tokens: np.ndarray, sources: Sequence[str]) -> dict[str, np.ndarray]:
    """Indices of pairs by slice; those without a pair, and a single source, are left out."""
    difference, total = tokens[0] - tokens[1], tokens.sum(0)
    low, high = np.quantile(total, (1 / 3, 2 / 3))
    found = {"chosen is longer": difference > 0, "chosen is shorter": difference < 0, "lengths are equal": difference == 0,
             f"responses have up to {low:.0f} tokens together": total <= low,
             f"have up to {high:.0f}": (low < total) & (total <= high), "have more": total > high}
    names = sorted(set(sources))
    if len(names) > 1:
        found |= {f"source is {name}": np.array([s == name for s in sources]) for name in names}
    return {name: np.flatnonzero(mask) for name, mask in found.items() if mask.any()}


# -- who wins -------------------------------------------------------------------------------------------------------


def add_wins(result: Comparison, judge: str, rows: Rows, lengths: Rows) -> WinRate:
    """The policy's win rate by a judge, from its comparisons, each with the difference of lengths; see `intervals.win_rate`.

    The first judge's are the `won` of the samples page and the "win_rate" of evaluation.json.
    """
    found = intervals.win_rate(rows, lengths)
    first = not result.wins
    result.wins[judge] = found
    result.add(f"win rate by {judge}", "policy", found.rate, "win_rate" if first else "")
    result.add(f"win rate by {judge}, Wilson", "policy", found.wilson)
    result.add(f"win rate by {judge}, at equal lengths", "policy", found.controlled)
    result.numbers.setdefault("win_rates", {})[judge] = told = as_json(found)
    if first:
        result.won = [float(np.mean(row)) if len(row) else 0.5 for row in rows]
        result.numbers |= {"win_rate_wilson": told["wilson"], "win_rate_length_controlled": told["length_controlled"],
                           "win_rate_length_controlled_interval": told["length_controlled_interval"]}
    return found


def as_json(found: WinRate) -> dict[str, Any]:
    """A win rate as evaluation.json has it."""
    return {"win_rate": found.rate.value, "interval": [found.rate.low, found.rate.high],
            "wilson": [found.wilson.low, found.wilson.high], "length_controlled": found.controlled.value,
            "length_controlled_interval": [found.controlled.low, found.controlled.high], "prompts": found.prompts,
            "comparisons": found.comparisons, "ties": found.ties}


def add_gold(result: Comparison, pairs: Sequence[PreferencePair | Labelled]) -> None:
    """What the toy world knows of all samples, and how far the labels of pairs can be told at all."""
    checks = {"well_formed": toyworld.is_well_formed, "consistent": toyworld.is_consistent}
    for name, rows in result.texts.items():
        told = list(zip([str(p) for p in result.prompts], rows, strict=True))
        for check, passes in checks.items():
            result.add(check.replace("_", "-"), name, mean_of([[float(passes(p, t)) for t in row] for p, row in told]),
                       f"{check}_{name}")
    told_apart = [p for p in pairs if isinstance(p, PreferencePair)]
    if not told_apart:
        return
    limit = toyworld.preference_limit(
        {"prompt": str(p.prompt), "chosen": str(p.chosen), "rejected": str(p.rejected)} for p in told_apart)
    result.numbers["preference_accuracy_limit"] = limit
    if (accuracy := result.numbers.get("preference_accuracy", result.numbers.get("alignment"))) is not None:
        result.numbers["preference_accuracy_share"] = metrics.label_noise_share(accuracy, limit)


def add_scores(result: Comparison, judge: str, scores: Mapping[str, Rows]) -> None:
    """What a judge that gives scores thinks of each model's samples; the first one's stand on the samples page."""
    for name, rows in scores.items():
        result.add(judge, name, mean_of(rows), f"{judge.removesuffix(' reward')}_{name}")
    if not result.scores:
        result.score_name = judge.removesuffix(" reward")
        result.scores = {name: [list(row) for row in rows] for name, rows in scores.items()}


def chars(texts: Rows | Sequence[Sequence[str]]) -> list[list[int]]:
    """Lengths in characters, which is what AlpacaEval's length control goes by."""
    return [[len(text) for text in row] for row in texts]  # type: ignore[arg-type]
