"""`xalign annotate`: completions.jsonl to annotated.jsonl, by a scorer or a judge; a start judges only what is missing.

A scorer is anything with `score(prompts, responses)` that gives a number for each, higher for better. Its number is the
overall score. A judge gives annotations of four aspects, a critique and an overall score; all its replies, also those that
could not be parsed, stay in `parts.jsonl`.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xalign import backends, scoring
from xalign.backends.base import Backend, Completion, SamplingParams
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
from xalign.runs import strict
from xalign.scoring import Scorer

PARTS, RESULT = "parts.jsonl", "annotated.jsonl"
TOGETHER = 512  # replies that are scored, or requests to a judge, at a time
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
    judged = options.annotator.startswith("judge:")
    slots = [asked_of(row) if judged else [0] for row in rows]
    with claimed(folder, settings, options.overwrite, (PARTS, RESULT)):
        journal = Journal(folder / PARTS, len(rows), max(s[-1] + 1 if s else 1 for s in slots))
        try:
            total, todo = sum(map(len, slots)), [(r, s) for r, of in enumerate(slots) for s in of if journal.missing[r, s]]
            with tqdm(total=total, initial=total - len(todo), desc="annotate", unit="request" if judged else "instruction",
                      mininterval=1) as bar:
                if todo and judged:
                    spec = as_spec(options.annotator.removeprefix("judge:")) | {"unsupported": "warn"}
                    if spec["backend"] == "openai":
                        spec |= {"concurrency": options.concurrency}
                        spec |= {"base_url": options.base_url} if options.base_url else {}
                    judge_rows(backends.open(spec), rows, todo, journal, bar, options.seed, options.reask)
                elif todo:
                    score_rows(scoring.open(options.annotator), rows, [row for row, _ in todo], journal, bar)
            made = (judgements if judged else scores)(rows, journal, options.seed)
            write_lines(folder / RESULT, (annotated(row, *found) for row, found in zip(rows, made, strict=True)))
            failed = int(journal.failed.any(1).sum())
        finally:
            journal.close()
    print(
        f"{folder / RESULT}: {len(rows):,} instructions"
        + f", {failed:,} of them not wholly judged (the same command asks again)" * (failed > 0),
        file=sys.stderr,
    )


def read_completions(path: str) -> Iterator[Record]:
    """The records of a file of completions, checked. Raises `DataError` with `path:line`."""
    for where, record in raw_records(path):
        completions = record.get("completions")
        if not isinstance(completions, list) or not all(isinstance(c, dict) and "response" in c for c in completions):
            raise DataError(f"{where}: no completions, each with a response; allowed: what xalign collect writes")
        from_json(record.get("instruction"), where)
        for completion in completions:
            _check_notes(completion, where)
        yield record


def _check_notes(completion: Record, where: str) -> None:
    value, notes = completion.get("overall_score"), completion.get("annotations")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e300):
        raise DataError(f"{where}: an overall_score is {value!r:.40}, allowed is a number")
    known = notes.values() if isinstance(notes, dict) else [notes] if notes else []
    if not all(isinstance(note[0] if isinstance(note, list) and note else note, dict) for note in known):
        raise DataError(f"{where}: annotations are {notes!r:.60}, allowed is an object of {{aspect: {{Rating: ...}}}}")


def answered(record: Record) -> list[int]:
    """The places of completions that didn't fail."""
    return [i for i, c in enumerate(record["completions"]) if isinstance(c["response"], str)]


def score_rows(scorer: Scorer, rows: Sequence[Record], missing: Sequence[int], journal: Journal, bar: Any) -> None:
    """Score the completions of these rows."""
    lost = 0
    for group in (missing[at : at + TOGETHER] for at in range(0, len(missing), TOGETHER)):
        asked = [(row, i) for row in group for i in answered(rows[row])]
        prompts = [from_json(rows[row]["instruction"], "") for row, _ in asked]
        if scorer.chat:  # it has a chat template: a question is a user's message, a continued text isn't
            prompts = [(Message("user", p),) if isinstance(p, str) and rows[row].get("text") is not True else p
                       for p, (row, _) in zip(prompts, asked, strict=True)]
        replies = [rows[row]["completions"][i]["response"] for row, i in asked]
        found = scorer.score(prompts, replies).tolist() if asked else []
        values = dict(zip(asked, strict(found), strict=True))
        lost += sum(value is None for value in values.values())
        for row in group:
            journal.add(row, 0, False, {"overall": [values.get((row, i)) for i in range(len(rows[row]["completions"]))]})
            bar.update()
    if lost:
        print(f"warning: {lost:,} scores are no finite numbers: these completions have none", file=sys.stderr)


def asked_of(record: Record) -> list[int]:
    """A judge's requests for a record, as slots of the journal: one for each aspect, then one for each text."""
    places = answered(record)
    return [*range(len(ASPECTS)), *(len(ASPECTS) + place for place in places)] if places else []


def name_of(slot: int) -> str:
    return [*ASPECTS][slot] if slot < len(ASPECTS) else f"critique {slot - len(ASPECTS)}"


def shown(record: Record, seed: int, row: int, slot: int) -> list[int]:
    """The places of the texts that a request shows, in its order."""
    if slot >= len(ASPECTS):
        return [slot - len(ASPECTS)]
    places = answered(record)
    return [places[i] for i in order(len(places), seed, row, name_of(slot))]


def request(record: Record, places: Sequence[int], slot: int) -> Text:
    if slot >= len(ASPECTS):
        return critique_prompt(record, record["completions"][places[0]])
    return aspect_prompt(name_of(slot), record, [record["completions"][i]["response"] for i in places])


def judge_rows(backend: Backend, rows: Sequence[Record], todo: Sequence[tuple[int, int]], journal: Journal, bar: Any, seed: int,
               reask: int) -> None:
    """Ask a judge for these (row, slot); each reply is in the journal at once, with those before it that were of no use."""
    for at in range(0, len(todo), TOGETHER):
        group = list(todo[at : at + TOGETHER])
        raw = {pair: list((journal.read(*pair) or {"raw": []})["raw"]) for pair in group}
        for _ in range(reask + 1):
            warm = [any(isinstance(reply, str) for reply in raw[pair]) for pair in group]
            for temperature in (0.0, 0.7):
                asked = [pair for pair, again in zip(group, warm, strict=True) if again == (temperature > 0)]
                places = [shown(rows[row], seed, row, slot) for row, slot in asked]

                def keep(i: int, completions: list[Completion], asked: Any = asked, places: Any = places,
                         raw: Any = raw) -> None:
                    (row, slot), reply = asked[i], completions[0]
                    raw[row, slot].append(reply.text if reply.error is None else {"error": reply.error})
                    why = reply.error or _flaw(slot, reply.text, len(places[i]))
                    journal.add(row, slot, why is not None, {"request": name_of(slot), "raw": raw[row, slot]}
                                | ({"error": why} if why is not None else {}))
                    bar.update(why is None)

                if asked:
                    prompts = [request(rows[row], p, slot) for (row, slot), p in zip(asked, places, strict=True)]
                    backend.generate(prompts, SamplingParams(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS), done=keep)
            group = [pair for pair in group if journal.failed[pair]]


def _flaw(slot: int, reply: str, texts: int) -> str | None:
    """What is wrong with a reply, None for one in the form that was asked for."""
    try:
        read_ratings(name_of(slot), reply, texts) if slot < len(ASPECTS) else read_critique(reply)
    except ValueError as error:
        return str(error)
    return None


Found = tuple[list[dict[str, Any]], list[str | None], list[float | None]]  # annotations, critique, overall of each completion


def scores(rows: Sequence[Record], journal: Journal, seed: int) -> Iterator[Found]:
    """What a scorer found of each record."""
    for row, record in enumerate(rows):
        n = len(record["completions"])
        yield [{} for _ in range(n)], [None] * n, (journal.read(row, 0) or {})["overall"]


def judgements(rows: Sequence[Record], journal: Journal, seed: int) -> Iterator[Found]:
    """What a judge found of each record, read again from its replies; nothing where it failed."""
    for row, record in enumerate(rows):
        n = len(record["completions"])
        notes: list[dict[str, Any]] = [{} for _ in range(n)]
        critiques: list[str | None] = [None] * n
        overall: list[float | None] = [None] * n
        for slot in asked_of(record):
            if journal.missing[row, slot]:
                continue
            reply, places = (journal.read(row, slot) or {})["raw"][-1], shown(record, seed, row, slot)
            if slot < len(ASPECTS):
                for place, fields in zip(places, read_ratings(name_of(slot), reply, len(places)), strict=True):
                    notes[place][name_of(slot)] = fields
            else:
                critiques[places[0]], overall[places[0]] = read_critique(reply)
        yield notes, critiques, overall


def annotated(record: Record, notes: Sequence[Any], critiques: Sequence[Any], overall: Sequence[Any]) -> Record:
    """A record with what was found of its completions."""
    return {**record, "completions": [
        {**completion, "annotations": note, "critique": critique, "overall_score": value,
         "fine-grained_score": fine_grained(note)}
        for completion, note, critique, value in zip(record["completions"], notes, critiques, overall, strict=True)]}
