"""`xalign rewardbench`: rows to scores, and these to RewardBench's numbers, its own result files and a report."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xalign.backends.base import SamplingParams
from xalign.backends.opening import as_spec
from xalign.backends.opening import open as open_backend
from xalign.data.sources import column_names, refuse_twice
from xalign.disk import write_atomically
from xalign.errors import ConfigError, DataError
from xalign.evaluation import rewardbench as bench
from xalign.evaluation.judge import Judge
from xalign.evaluation.rewardbench import PRIOR, PRIOR_SETS, PUBLISHED, ROWS, SECTIONS, SUBSETS_2, BenchRow, as_messages
from xalign.prepare import say
from xalign.runs import RunFolder, read_json, strict
from xalign.score import SUMMARY, all_finite, chunked, claim, load, texts_cut
from xalign.score_config import BenchOptions, RewardBenchConfig, ScorerOptions, refuse
from xalign.scoring import Scorer

RESULTS, REPORT = "rows.jsonl", "report.md"
JUDGES = ("batch_size", "dtype", "device")  # the settings of a scorer that a judge has too
FOLDERS = {"1": "", "prior": "pref-sets", "2": "rewardbench2"}


def run_rewardbench(config: RewardBenchConfig) -> None:
    """Score all rows (going on where a killed run stopped), write the results, print the tables."""
    options = config.bench
    prior = column_names(options.prior_sets, "--prior-sets", "shp=FILE") or {}
    for name in prior:
        if name not in PRIOR_SETS:
            raise ConfigError(f"--prior-sets has {name!r}, allowed are {', '.join(PRIOR_SETS)}, each =FILE")
    if options.judge:
        refuse(config.scorer, [name for name in vars(config.scorer) if name not in JUDGES], "doesn't go with --judge")
        refuse(config.quant, ("load_in_8bit", "load_in_4bit"), "doesn't go with --judge")
        refuse(options, ("chat",), "doesn't go with --judge")
    else:
        refuse(options, ("judge_max_new_tokens",), "goes with --judge")
    if not options.dataset and not prior:
        raise ConfigError("no rows are given, allowed are --dataset FILE ... and --prior-sets NAME=FILE ...")
    files: list[tuple[str, str | None]] = [(file, None) for file in options.dataset]
    files += [(file, name) for name, file in prior.items()]
    refuse_twice(file for file, _ in files)
    rows = [row for file, name in files for row in itertools.islice(bench.read_rows(file, name), options.limit)]
    for id, count in Counter(row.id for row in rows if row.counts_together).items():
        if count > 1:
            raise DataError(f"{count} rows of Ties have the id {id}, allowed is one: is a file another's copy?")
    name = options.run_name or name_of(options.judge or config.scorer.model)
    if name.startswith("/") or ".." in name.split("/"):
        raise ConfigError(f"--run-name is {name}, allowed is a name such as owner/model")
    with RunFolder(options.output_dir or Path("runs") / "rewardbench" / name) as run:
        claim(run, "rewardbench", config, [file for file, _ in files], options.overwrite)
        if (run.path / SUMMARY).exists():
            say(f"{run.path} is finished (--overwrite measures it anew). From its report:")
            print((run.path / REPORT).read_text(encoding="utf-8"))
            return _end(options, rows, read_json(run.path / SUMMARY))
        measure = _Judged(options, config.scorer) if options.judge else _Scored(load(config), options)
        found = [row for part in chunked(rows, measure, run, RESULTS, len(rows), measure.scorer) for row in part]
        summary = _summary(rows, found) | {"texts_cut": texts_cut(run)}
        about = {"model": name, "model_type": _type(options.judge, config.scorer.model),
                 "chat_template": "tokenizer" if measure.chat else "none"}
        for file, content in official(rows, found, summary["subsets"], about, measure.chat).items():
            target = run.path / f"{file}/{name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, json.dumps(strict(content), indent=4, sort_keys=True))
        report = _report(name, rows, summary)
        write_atomically(run.path / REPORT, report)
        write_atomically(run.path / SUMMARY, json.dumps(strict(about | summary), indent=2) + "\n")
        print(report)
        return _end(options, rows, summary)


def _end(options: BenchOptions, rows: Sequence[BenchRow], summary: Mapping[str, Any]) -> None:
    """End with an error where a model's scores are lost; a judge's missing ratings are verdicts that it didn't give."""
    if not options.judge:
        all_finite(summary["not_finite"], sum(len(row.replies) for row in rows))


class _Scored:
    """Rows to the scores of their replies."""

    def __init__(self, scorer: Scorer, options: BenchOptions):
        self.scorer = scorer
        self.chat = scorer.chat if options.chat == "auto" else options.chat == "always"

    def __call__(self, rows: list[BenchRow]) -> list[dict[str, Any]]:
        prompts = [as_messages(row.prompt) if self.chat else row.prompt for row in rows for _ in row.replies]
        flat = iter(self.scorer.score(prompts, [reply for row in rows for reply in row.replies]).tolist())
        scores = [[next(flat) for _ in row.replies] for row in rows]
        return [{"scores": given, "result": bench.won(row, given)} for row, given in zip(rows, scores, strict=True)]


class _Judged:
    """Rows to a judge's verdicts; those of Ties to its ratings."""

    chat = True

    def __init__(self, options: BenchOptions, scorer: ScorerOptions):
        spec = as_spec(str(options.judge))
        if spec["backend"] in ("native", "transformers"):
            spec |= {name: getattr(scorer, name) for name in JUDGES}
        self.scorer = None
        self.judge = Judge(open_backend(spec), SamplingParams(temperature=0, max_new_tokens=options.judge_max_new_tokens),
                           options.seed)

    def __call__(self, rows: list[BenchRow]) -> list[dict[str, Any]]:
        return judged(self.judge, rows)


def judged(judge: Judge, rows: Sequence[BenchRow]) -> list[dict[str, Any]]:
    """What a judge makes of rows: a win, a loss, or, without a verdict, one n-th of a win; of Ties the ratings."""
    ties = [row for row in rows if row.counts_together]
    rest = [row for row in rows if not row.counts_together]
    asked = [(row.prompt, reply) for row in ties for reply in row.replies]
    flat = iter(judge.score([prompt for prompt, _ in asked], [reply for _, reply in asked]).tolist() if asked else [])
    rated: Iterator[dict[str, Any]] = iter([{"scores": [next(flat) for _ in r.replies], "result": None} for r in ties])
    chosen = iter(judge.choose([r.prompt for r in rest], [r.replies for r in rest], [f"{r.subset}:{r.id}" for r in rest])
                  if rest else [])
    found: list[dict[str, Any]] = []
    for row in rows:
        if row.counts_together:
            found.append(next(rated))
            continue
        best, text = next(chosen)
        found.append({"scores": None, "result": 1 / len(row.replies) if best is None else float(best < row.num_correct),
                      "judgement": text})
    return found


def _summary(rows: Sequence[BenchRow], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [[math.nan if s is None else s for s in row["scores"] or []] for row in found]
    subsets = bench.subset_scores(rows, [row["result"] for row in found], scores)
    sections = bench.section_scores(subsets.get("1", {}))
    prior = bench.prior_score(subsets.get("prior", {}))
    whole = sections | ({} if prior is None else {PRIOR: prior})
    lost = sum(score is None or not math.isfinite(score) for row in found for score in row["scores"] or [])
    if lost and lost == sum(len(row["scores"] or []) for row in found):
        raise DataError("not one score is a finite number, allowed is a model that gives some")
    unread = sum(row["scores"] is None and row["result"] not in (0, 1) for row in found)
    return {"rows": len(rows), "no_verdict": unread, "not_finite": lost, "subsets": subsets, "sections": whole,
            "overall": bench.overall(whole), "overall_2": bench.overall_2(subsets.get("2", {}))}


def official(rows: Sequence[BenchRow], found: Sequence[Mapping[str, Any]], subsets: Mapping[str, Mapping[str, float]],
             about: Mapping[str, Any], chat: bool) -> dict[str, dict[str, Any]]:
    """RewardBench's own result files by folder: accuracies by subset, and the columns of all rows with their scores."""
    files: dict[str, dict[str, Any]] = {}
    for kind, folder in FOLDERS.items():
        own = [(row, told) for row, told in zip(rows, found, strict=True) if row.kind == kind]
        if not own:
            continue
        names = ("pref-sets", "pref-sets-scores") if kind == "prior" else ("eval-set", "eval-set-scores")
        accuracies, table = (f"{folder}/{n}" if kind == "2" else n for n in names)
        files[accuracies] = {**about, **subsets[kind]}
        columns: dict[str, list[Any]] = {"id": [r.id for r, _ in own], "subset": [r.subset for r, _ in own],
                                         "results": [t["result"] for _, t in own]}
        if kind == "2":
            columns |= {"text": [[_text(r.prompt, reply, chat) for reply in r.replies] for r, _ in own],
                        "scores": [t["scores"] for _, t in own], "num_correct": [r.num_correct for r, _ in own]}
        else:
            for i, side in enumerate(("chosen", "rejected")):
                columns[f"text_{side}"] = [_text(r.prompt, r.replies[i], chat) for r, _ in own]
                columns[f"scores_{side}"] = [None if t["scores"] is None else t["scores"][i] for _, t in own]
        files[table] = {**about, **columns}
    return files


def _text(prompt: Any, reply: str, chat: bool) -> Any:
    if isinstance(prompt, str) and not chat:
        return prompt + reply
    return [*({"role": m.role, "content": m.content} for m in as_messages(prompt)), {"role": "assistant", "content": reply}]


def name_of(spec: str) -> str:
    """A model's name from what names it: at most the last two parts of each path, as in owner/name."""
    kind, colon, rest = spec.partition(":")
    if kind in ("http", "https"):
        return rest.strip("/").split("/")[0].replace(":", "-")
    paths = (rest if colon else spec).split(",")
    return "_".join(([kind] if colon else []) + ["-".join(Path(p).parts[-2:]).strip("-/.") for p in paths]) or "model"


def _type(judge: str | None, spec: str) -> str:
    kind = spec.partition(":")[0]
    return ("Generative RM" if judge else "DPO" if kind == "dpo" else "DPO Ref. Free" if kind in ("sum", "avg")
            else "Custom Classifier" if spec == "gold" else "Seq. Classifier")


def _report(name: str, rows: Sequence[BenchRow], summary: Mapping[str, Any]) -> str:
    parts = [f"# RewardBench: {name}"]
    subsets = summary["subsets"]
    if "1" in subsets or "prior" in subsets:
        columns = [*SECTIONS, PRIOR]
        lines = ["| model | numbers | overall |" + _cells(columns), "|---|---|---|" + "---|" * len(columns)]
        shown = [(name, "measured", summary["sections"])] + [(who, "*published*", told) for who, told in PUBLISHED.items()]
        for who, how, told in shown:
            values = [_percent(told.get(c)) for c in columns]
            lines.append(f"| {who} | {how} | {_percent(bench.overall(told))} |" + _cells(values))
        parts += ["\n".join(lines), "Percent. Prior sets count one half; a section that has no row here is left out of the "
                                    "overall number. Rows marked *published* are others' figures, not measured here."]
    if "2" in subsets:
        values = [_percent(subsets["2"].get(c)) for c in SUBSETS_2]
        lines = ["| model | mean |" + _cells(SUBSETS_2), "|---|---|" + "---|" * len(values),
                 f"| {name} | {_percent(summary['overall_2'])} |" + _cells(values)]
        parts += ["## RewardBench 2", "\n".join(lines)]
    lines = ["| subset | rows | official | score |", "|---|---|---|---|"]
    for kind, scores in subsets.items():
        expected = {"1": ROWS, "2": SUBSETS_2}.get(kind, {})
        for subset, value in scores.items():
            count = sum((row.kind, row.subset) == (kind, subset) for row in rows)
            lines.append(f"| {subset} | {count:,} | {expected.get(subset, '')} | {_percent(value)} |")
    parts += ["## Subsets", "\n".join(lines)]
    if summary["no_verdict"]:
        parts.append(f"{summary['no_verdict']:,} judgements held no verdict: each counts as a draw.")
    if summary["not_finite"]:
        parts.append(f"Scores that were no finite number: {summary['not_finite']:,}; their rows are lost.")
    if summary["texts_cut"]:
        parts.append(f"{summary['texts_cut']:,} texts were longer than the limit and were cut.")
    return "\n\n".join(parts) + "\n"


def _cells(values: Iterable[str]) -> str:
    return "".join(f" {value} |" for value in values)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
