"""`xalign score`: one reply, a file of them, or a server; and the resumable file of results that rewardbench has too."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from xalign import scoring
from xalign.complete import as_prompt
from xalign.config import flatten
from xalign.data.files import raw_records
from xalign.data.replies import HOLDS_REPLY, Replies, renamed, to_replies
from xalign.data.sources import column_names
from xalign.disk import write_atomically, writing
from xalign.errors import ConfigError, DataError, NotFinite
from xalign.evaluation.report import pyplot, save_figure
from xalign.nn.quantize import quantize
from xalign.prepare import data_digest, say
from xalign.runs import METRICS, RunFolder, read_json, read_jsonl, strict
from xalign.score_config import RewardBenchConfig, ScoreConfig, ScoreOptions, refuse
from xalign.scoring import Scorer
from xalign.stages import choose_device, quantisation, quantised

T = TypeVar("T")
CHUNK = 512  # records whose results are written together; a resumed file goes on at such a border, to the same numbers
SCORES, SUMMARY, PICTURE = "scores.jsonl", "summary.json", "histogram.png"
VOLATILE = ("output_dir", "overwrite", "batch_size", "device")  # settings that may differ when scoring goes on
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def run_score(config: ScoreConfig) -> None:
    """Serve, or score --prompt and --response, or a --dataset."""
    given = [f"--{name}" for name, value in (("serve", config.serve.serve), ("dataset", config.score.dataset),
                                             ("prompt", config.score.prompt)) if value not in (None, False)]
    if len(given) != 1:
        raise ConfigError(f"{' and '.join(given) or 'nothing'} given to score, allowed is one of --prompt with --response, "
                          "--dataset, and --serve")
    for options, names, flag in ((config.score, ("response",), "--prompt"), (config.serve, vars(config.serve), "--serve"),
                                 (config.score, ("columns", "limit", "output_dir", "overwrite"), "--dataset")):
        if given != [flag]:
            refuse(options, names, f"goes with {flag}")
    if config.score.output_dir is None:
        refuse(config.score, ("overwrite",), "goes with --output-dir")
    if config.serve.serve:
        refuse(config.score, ("chat", "system"), "doesn't go with --serve: a request's messages say it")
        return _serve(config)
    if config.score.prompt is not None:
        if config.score.response is None:
            raise ConfigError("--prompt needs --response")
        prompt = as_prompt(config.score.prompt, config.score, "the prompt")
        reward = float(load(config).score([prompt], [config.score.response])[0])
        print(repr(round(reward, 6)))
        return all_finite(not math.isfinite(reward), 1)
    return _score_file(config)


def load(config: ScoreConfig | RewardBenchConfig) -> Scorer:
    """The scorer that the settings name, its weights quantised where they say so."""
    options, device = config.scorer, choose_device(config.scorer.device)
    bits, method, group = quantisation(config.quant, device)
    settings = {k: v for k, v in vars(options).items() if k not in ("model", "normalize", "device")}
    normalize = {"auto": None, "always": True, "never": False}[options.normalize]
    scorer = scoring.open(options.model, normalize=normalize, device=device, **settings)
    if bits:
        networks = getattr(scorer, "networks", [])
        if not networks:
            raise ConfigError(f"--load-in-{bits}bit with --model {options.model}, which has no weights here: allowed is a "
                              "reward model or a policy")
        for network in networks:
            quantize(network, bits, group_size=group, head=config.quant.quant_head, method=method)
        say(f"{options.model}: {quantised(networks[0]).partition(', bf16')[0]}, the rest bfloat16")
    return scorer


def all_finite(lost: int, scores: int) -> None:
    """Raise `NotFinite` where scores are lost; what could be computed is written by then."""
    if lost:
        raise NotFinite(f"{lost:,} of {scores:,} scores {'is' if lost == 1 else 'are'} not finite (null in files), allowed are "
                        "a model and texts that give numbers")


def _serve(config: ScoreConfig) -> None:
    from xalign.serve import ServeLimits, listen, serve

    options = config.serve
    with listen(options.host, options.port) as listening:  # before the model is loaded: a taken port is told at once
        scorer = load(config)
        if not isinstance(scorer, scoring.GoldScorer | scoring.RewardScorer | scoring.ImplicitScorer):
            raise ConfigError(f"--serve with --model {config.scorer.model}, which is served already: allowed is a model")
        serve(scorer, listening, ServeLimits(config.scorer.batch_size, options.queue_size, options.max_bytes,
                                                          options.body_seconds, options.append_eos))


def _score_file(config: ScoreConfig) -> None:
    options = config.score
    total = sum(1 for _ in _records(options))  # reads all once: a bad record ends the program before anything is scored
    if options.output_dir is None:
        rewards, scorer = [], load(config)
        for rows in chunked(_records(options), lambda part: _rows(scorer, part), None, "", total, scorer):
            for row in rows:
                print(json.dumps(strict(row), ensure_ascii=False, default=str))
                rewards.append(_rewards(row))
        found = summary(rewards, getattr(scorer, "cut", 0))
        say(_told(found, rewards))
        return all_finite(found["not_finite"], found["scores"])
    with RunFolder(options.output_dir) as run:
        claim(run, "score", config, [str(options.dataset)], options.overwrite)
        if (run.path / SUMMARY).exists():
            say(f"{run.path} is finished (--overwrite scores it anew); the scores are in")
            print(run.path / SCORES)
            found = read_json(run.path / SUMMARY)
            return all_finite(found["not_finite"], found["scores"])
        scorer = load(config)
        parts = chunked(_records(options), lambda part: _rows(scorer, part), run, SCORES, total, scorer)
        rewards = [_rewards(row) for rows in parts for row in rows]
        found = summary(rewards, texts_cut(run))
        _draw(run.path, [r for row in rewards for r in row if math.isfinite(r)], f"rewards by {config.scorer.model}")
        about = {"model": config.scorer.model, "dataset": options.dataset}
        write_atomically(run.path / SUMMARY, json.dumps(strict(about | found), indent=2) + "\n")
        say(_told(found, rewards))
        print(run.path / SCORES)
        return all_finite(found["not_finite"], found["scores"])


def claim(run: RunFolder, program: str, config: Any, files: Sequence[str], overwrite: bool) -> None:
    """Take a folder for results of this configuration on these files; see `RunFolder.claim`."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items() if k not in VOLATILE}
    run.claim({"program": program, **settings, "data_sha256": data_digest(files)}, overwrite)


def _records(options: ScoreOptions) -> Iterator[tuple[dict[str, Any], Replies]]:
    columns = column_names(options.columns) or {}
    for name in columns:
        if name not in (allowed := ("prompt", *HOLDS_REPLY)):
            raise ConfigError(f"--columns has {name!r}, allowed names are {', '.join(allowed)}")
    for where, record in itertools.islice(raw_records(str(options.dataset)), options.limit):
        if missing := [theirs for theirs in columns.values() if theirs not in record]:
            raise DataError(f"{where}: no column {missing[0]!r}, only {', '.join(map(repr, record))}"[:300])
        told = to_replies(renamed(record, columns), where)
        yield record, Replies(as_prompt(told.prompt, options, where), told.replies, told.several, where)


def _rows(scorer: Scorer, part: list[tuple[dict[str, Any], Replies]]) -> list[dict[str, Any]]:
    """Records with their `reward`, or `rewards` where there are several replies."""
    prompts, replies = [t.prompt for _, t in part for _ in t.replies], [r for _, t in part for r in t.replies]
    try:
        found = iter(scorer.score(prompts, replies).tolist())
    except DataError as error:
        raise DataError(f"{part[0][1].where} to {part[-1][1].where}: {error}") from None
    rows = []
    for record, told in part:
        rewards = [next(found) for _ in told.replies]
        kept = {k: v for k, v in record.items() if v is not None}
        rows.append(kept | ({"rewards": rewards} if told.several else {"reward": rewards[0]}))
    return rows


def _rewards(row: dict[str, Any]) -> list[float]:
    rewards = row["rewards"] if "rewards" in row else [row["reward"]]
    return [math.nan if r is None else r for r in rewards]


def chunked(items: Iterable[T], work: Callable[[list[T]], list[dict[str, Any]]], run: RunFolder | None, name: str, total: int,
            scorer: Any) -> Iterator[list[dict[str, Any]]]:
    """What `work` makes of `items`, a JSON object each, `CHUNK` at a time; a run keeps it in its file `name` and goes on there.

    The file holds whole chunks, so that what is still to do is batched as it would have been; how many texts `scorer` cut is in
    metrics.jsonl.
    """
    items = iter(items)
    done = 0
    if run is not None:
        for rows in _kept(run.path / name):
            done += len(rows)
            yield rows
        next(itertools.islice(items, done, done), None)  # skips them
        run.rewind(done)
    with tqdm(total=total, initial=done, desc="score", unit="record", mininterval=1) as bar:
        while part := list(itertools.islice(items, CHUNK)):
            before = getattr(scorer, "cut", 0)
            rows = work(part)
            assert len(rows) == len(part)
            done += len(rows)
            if run is not None:
                run.log(METRICS, {"step": done, "texts_cut": getattr(scorer, "cut", 0) - before})
                with writing(path := run.path / name), open(path, "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(strict(row), ensure_ascii=False, default=str) + "\n" for row in rows))
                    file.flush()
                    os.fsync(file.fileno())
            bar.update(len(rows))
            yield rows


def texts_cut(run: RunFolder) -> int:
    """How many texts were cut to the limit in a run, before and after it was stopped."""
    path = run.path / METRICS
    return sum(line["texts_cut"] for line in read_jsonl(path)) if path.exists() else 0


def _kept(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The whole chunks of a file of results; what is behind them, cut off by a kill, goes."""
    if not path.exists():
        return
    with writing(path), open(path, "r+b") as file:
        border = 0
        while True:
            part = list(itertools.islice(file, CHUNK))
            if len(part) < CHUNK or not part[-1].endswith(b"\n"):
                file.truncate(border)
                return
            border += sum(map(len, part))
            yield [json.loads(line) for line in part]


def summary(rewards: Sequence[Sequence[float]], cut: int) -> dict[str, Any]:
    """Numbers of all rewards, and how many texts were cut; `top_1` is the mean of the best of each prompt."""
    flat = np.array([r for row in rewards for r in row], dtype=np.float64)
    finite = flat[np.isfinite(flat)]
    found: dict[str, Any] = {"records": len(rewards), "scores": len(flat), "not_finite": len(flat) - len(finite),
                             "texts_cut": cut}
    if len(finite):
        found |= {"mean": float(finite.mean()), "std": float(finite.std()), "min": float(finite.min()),
                  "max": float(finite.max()),
                  "quantiles": {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(finite, QUANTILES), strict=True)}}
        if any(len(row) > 1 for row in rewards):
            found["top_1"] = float(np.mean([best for row in rewards if math.isfinite(best := max(row))]))
    return found


def _draw(folder: Path, values: Sequence[float], title: str) -> None:
    """The distribution with its mean; nothing where matplotlib is missing, or where there is no value."""
    plt = pyplot()
    if plt is None or not values:
        return
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    axis.hist(values, bins=40, alpha=0.7)
    axis.axvline(sum(values) / len(values), color="0.3", lw=1.5)
    axis.set(title=title.replace("$", r"\$"), ylabel="replies")
    save_figure(plt, folder, figure, PICTURE, title)


def _told(found: dict[str, Any], rewards: Sequence[Sequence[float]]) -> str:
    parts = [f"{found['scores']:,} scores of {found['records']:,} records"]
    parts += [f"{found['not_finite']:,} not finite"] if found["not_finite"] else []
    parts += [f"{found['texts_cut']:,} texts cut to the limit"] if found["texts_cut"] else []
    if "mean" in found:
        parts += [f"mean {found['mean']:.4f}", f"standard deviation {found['std']:.4f}"]
        parts += [f"top-1 {found['top_1']:.4f}"] if "top_1" in found else []
    return "\n".join([", ".join(parts), *histogram([r for row in rewards for r in row if math.isfinite(r)])])


def histogram(values: Sequence[float], bins: int = 12, width: int = 40) -> list[str]:
    """Lines that draw a distribution: the bin's lower border, a bar, the count."""
    if not len(values):
        return []
    if min(values) == max(values):
        return [f"{values[0]:>10.3f} {'█' * width} {len(values):,}"]
    counts, borders = np.histogram(values, bins=bins)
    return [f"{border:>10.3f} {'█' * round(width * count / counts.max()):{width}} {count:,}"
            for border, count in zip(borders, counts.tolist(), strict=False)]

