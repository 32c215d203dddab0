"""`xalign annotate`: completions.jsonl to annotated.jsonl, by a scorer or a judge; a start judges only what is missing.

A scorer is anything with `score(prompts, responses)` that gives a number for each, higher for better. Its number is the
overall score. A judge gives annotations of four aspects, a critique and an overall score; all its replies, also those that
could not be parsed, stay in `parts.jsonl`.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xalign import backends, scoring
from xalign.backends.base import Backend, SamplingParams
from xalign.backends.opening import as_spec
from xalign.collect import from_json
from xalign.collect_config import AnnotateConfig
from xalign.data.files import raw_records
from xalign.data.records import Message, Text
from xalign.errors import DataError
from xalign.journal import Journal, claimed, write_lines
from xalign.judge import (
    ASPECTS,
    MAX_NEW_TOKENS,
    aspect_prompt,
    critique_prompt,
    fine_grained,
    order,
    read_critique,
    read_ratings,
)
from xalign.scoring import Scorer

PARTS, RESULT = "parts.jsonl", "annotated.jsonl"
TOGETHER = 64  # instructions that are judged at a time
Record = dict[str, Any]


def run_annotate(config: AnnotateConfig) -> None:
    """The program."""
    options = config.annotate
    rows = list(tqdm(read_completions(options.completions), desc="read", unit="instruction", delay=5, mininterval=1))
    folder = Path(options.output_dir)
    whole = hashlib.sha256()
    for row in rows:
        whole.update(repr([row["instruction"], *(c["response"] for c in row["completions"])]).encode("utf-8", "replace"))
    settings = {"completions": options.completions, "content": whole.hexdigest()[:16], "annotator": options.annotator,
                "seed": options.seed}
    with claimed(folder, settings, options.overwrite, (PARTS, RESULT)):
        journal = Journal(folder / PARTS, len(rows), 1)
        try:
            missing = [row for row in range(len(rows)) if journal.missing[row, 0]]
            with tqdm(total=len(rows), initial=len(rows) - len(missing), desc="annotate", unit="instruction",
                      mininterval=1) as bar:
                if missing and options.annotator.startswith("judge:"):
                    spec = as_spec(options.annotator.removeprefix("judge:")) | {"unsupported": "warn"}
                    if spec["backend"] == "openai":
                        spec |= {"concurrency": options.concurrency}
                        spec |= {"base_url": options.base_url} if options.base_url else {}
                    judge_rows(backends.open(spec), rows, missing, journal, bar, options.seed, options.reask)
                elif missing:
                    score_rows(scoring.open(options.annotator), rows, missing, journal, bar)
            write_lines(folder / RESULT, (annotated(rows[i], journal.read(i, 0) or {}) for i in range(len(rows))))
            failed = int(journal.failed.sum())
        finally:
            journal.close()
    print(
        f"{folder / RESULT}: {len(rows):,} instructions"
        + f", {failed:,} of them not wholly judged (the same command asks again)" * (failed > 0),
        file=sys.stderr,
    )


def read_completions(path: str) -> Iterable[Record]:
    """The records of a file of completions, checked. Raises `DataError` with `path:line`."""
    for where, record in raw_records(path):
        completions = record.get("completions")
        if not isinstance(completions, list) or not all(isinstance(c, dict) and "response" in c for c in completions):
            raise DataError(f"{where}: no completions, each with a response; allowed: what xalign collect writes")
        from_json(record.get("instruction"), where)
        yield record


def answered(record: Record) -> list[int]:
    """The places of completions that didn't fail."""
    return [i for i, c in enumerate(record["completions"]) if isinstance(c["response"], str)]


def score_rows(scorer: Scorer, rows: Sequence[Record], missing: Sequence[int], journal: Journal, bar: Any) -> None:
    """Score the completions of these rows."""
    for group in (missing[at : at + TOGETHER] for at in range(0, len(missing), TOGETHER)):
        asked = [(row, i) for row in group for i in answered(rows[row])]
        prompts = [from_json(rows[row]["instruction"], "") for row, _ in asked]
        if scorer.chat:  # it has a chat template: a question is a user's message, a continued text isn't
            prompts = [(Message("user", p),) if isinstance(p, str) and rows[row].get("text") is not True else p
                       for p, (row, _) in zip(prompts, asked, strict=True)]
        replies = [rows[row]["completions"][i]["response"] for row, i in asked]
        found = scorer.score(prompts, replies).tolist() if asked else []
        scores = {pair: float(value) for pair, value in zip(asked, found, strict=True)}
        for row in group:
            journal.add(row, 0, False, {"overall": [scores.get((row, i)) for i in range(len(rows[row]["completions"]))]})
            bar.update()


def judge_rows(backend: Backend, rows: Sequence[Record], missing: Sequence[int], journal: Journal, bar: Any, seed: int,
               reask: int) -> None:
    """Let a judge rate the completions of these rows; what it can't be brought to do is a failure of the row."""
    for group in (missing[at : at + TOGETHER] for at in range(0, len(missing), TOGETHER)):
        work: dict[int, Any] = {
            row: {
                "overall": [None] * len(rows[row]["completions"]),
                "critique": [None] * len(rows[row]["completions"]),
                "annotations": [{} for _ in rows[row]["completions"]],
                "raw": {},
                "errors": {},
            }
            for row in group
        }
        tasks: dict[tuple[int, str], Text] = {}
        shown: dict[tuple[int, str], list[int]] = {}
        for row in group:
            places = answered(rows[row])
            for name in ASPECTS if places else ():
                shown[row, name] = [places[i] for i in order(len(places), seed, row, name)]
                texts = [rows[row]["completions"][i]["response"] for i in shown[row, name]]
                tasks[row, name] = aspect_prompt(name, rows[row], texts)
            tasks |= {(row, f"critique {i}"): critique_prompt(rows[row], rows[row]["completions"][i]) for i in places}

        def take(task: tuple[int, str], reply: str, work: dict[int, Any] = work, shown: Any = shown) -> None:
            row, name = task
            if name in ASPECTS:
                for place, fields in zip(shown[task], read_ratings(name, reply, len(shown[task])), strict=True):
                    work[row]["annotations"][place][name] = fields
            else:
                place = int(name.split()[1])
                work[row]["critique"][place], work[row]["overall"][place] = read_critique(reply)

        for attempt in range(reask + 1):
            params = SamplingParams(temperature=0.0 if attempt == 0 else 0.7, max_new_tokens=MAX_NEW_TOKENS)
            replies = backend.generate(list(tasks.values()), params) if tasks else []
            again = {}
            for (task, prompt), (reply, *_) in zip(tasks.items(), replies, strict=True):
                row, name = task
                work[row]["raw"].setdefault(name, []).append(reply.text if reply.error is None else {"error": reply.error})
                try:
                    if reply.error is not None:
                        raise ValueError(reply.error)
                    take(task, reply.text)
                    work[row]["errors"].pop(name, None)
                except ValueError as error:
                    work[row]["errors"][name] = str(error)
                    again[task] = prompt
            tasks = again
        for row in group:
            journal.add(row, 0, bool(work[row]["errors"]), work[row])
            bar.update()


def annotated(record: Record, found: Record) -> Record:
    """A record with what was found of its completions."""
    completions = []
    for i, completion in enumerate(record["completions"]):
        notes = found["annotations"][i] if "annotations" in found else {}
        critique = found["critique"][i] if "critique" in found else None
        completions.append({**completion, "annotations": notes, "critique": critique, "overall_score": found["overall"][i],
                            "fine-grained_score": fine_grained(notes)})
    return {**record, "completions": completions}
