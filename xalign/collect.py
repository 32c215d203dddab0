"""`xalign collect`: a plan to completions.jsonl in UltraFeedback's record shape; a start asks only for what is missing.

Each completion is appended to `parts.jsonl` as soon as it is there. When all are, or have failed for good, the records are put
together in the instructions' order. One model of the pool is loaded at a time.
"""

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xalign import backends
from xalign.backends import opening
from xalign.backends.base import Backend, Completion, failure
from xalign.collect_config import CollectConfig
from xalign.data.records import Message, Text
from xalign.errors import ConfigError, DataError
from xalign.formats import tidy
from xalign.journal import Journal, claimed, write_lines
from xalign.plan import Drawn, Instruction, Plan, as_prompt, draw, load_plan, row_seed, system_text

PARTS, RESULT = "parts.jsonl", "completions.jsonl"
CHUNK = 8192  # prompts that are written out in memory at a time


def run_collect(config: CollectConfig) -> None:
    """The program: plan, draw, ask, write."""
    options = config.collect
    if options.plan is None:
        raise ConfigError("--plan is needed: a YAML or JSON file with instructions and models (docs/collect.md)")
    plan = load_plan(options.plan)
    instructions = list(tqdm(plan.instructions(), desc="read", unit="instruction", delay=5, mininterval=1))
    drawn = draw(plan, [i.source for i in instructions])
    if options.dry_run:
        print(preview(plan, instructions, drawn))
        return
    folder = Path(options.output_dir)
    settings = {**plan.digest(), "content": content(instructions)}
    with claimed(folder, settings, options.overwrite, (PARTS, RESULT)):
        journal = Journal(folder / PARTS, *drawn.models.shape)
        try:
            collect(plan, instructions, drawn, journal, options.retry_failed)
            write_lines(folder / RESULT, records(plan, instructions, drawn, journal))
        finally:
            journal.close()
        failed = int(journal.failed.sum())
        print(f"{folder / RESULT}: {len(instructions):,} instructions, {drawn.models.size:,} completions"
              + f", of which {failed:,} failed (the same command asks for them again)" * (failed > 0), file=sys.stderr)


def collect(plan: Plan, instructions: Sequence[Instruction], drawn: Drawn, journal: Journal, retry_failed: bool = True) -> None:
    """Ask for all completions that are missing, model by model; each is in the journal at once."""
    missing = journal.missing if retry_failed else journal.at < 0
    total, done = drawn.models.size, drawn.models.size - int(missing.sum())
    for number, model in enumerate(plan.models):  # all before the first request
        if (missing & (drawn.models == number)).any():
            opening.check({**model.spec, "name": model.name}, model.params)
    with tqdm(total=total, initial=done, desc="collect", unit="completion", mininterval=1) as bar:
        for number, model in enumerate(plan.models):
            tasks = np.argwhere(missing & (drawn.models == number))
            if not len(tasks):
                continue
            backend = backends.open({**model.spec, "name": model.name})
            began, counts = time.monotonic(), Counter[str]()
            try:
                for at in range(0, len(tasks), CHUNK):
                    _ask(backend, plan, instructions, drawn, journal, number, tasks[at : at + CHUNK], bar, counts, began)
            finally:
                backend.close()
            totals = getattr(backend, "totals", None)
            tqdm.write(f"{model.name}: {_pace(counts, began)}" + (f"; {totals()}" if totals else ""), file=sys.stderr)


def _pace(counts: Counter[str], began: float) -> str:
    seconds = max(time.monotonic() - began, 1e-9)
    return f"{counts['done']:,} completions, {counts['failed']:,} failed, {counts['done'] / seconds:.1f} a second"


def _ask(backend: Backend, plan: Plan, instructions: Sequence[Instruction], drawn: Drawn, journal: Journal, number: int,
         tasks: np.ndarray, bar: Any, counts: Counter[str], began: float) -> None:
    """One model's completions of some (row, slot)."""
    model = plan.models[number]
    prompts: list[Text] = []
    asked: list[tuple[int, int]] = []

    def keep(i: int, completions: list[Completion]) -> None:
        (row, slot), completion = asked[i], completions[0]
        bad = completion.error is not None
        record = {"model": model.name, "response": None if bad else tidy(completion.text, model.format),
                  "finish_reason": completion.finish_reason, "seconds": round(completion.seconds or 0.0, 3)}
        journal.add(row, slot, bad, record | ({"error": completion.error} if bad else {}))
        counts.update(done=1, failed=int(bad))
        bar.set_postfix_str(
            f"{model.name}: {counts['done'] / max(time.monotonic() - began, 1e-9):.1f}/s, {counts['failed']} failed",
            refresh=False,
        )
        bar.update()

    for row, slot in tasks.tolist():
        asked.append((row, slot))
        try:
            prompts.append(as_prompt(instructions[row], model, system_text(plan, drawn, row, slot)))
        except DataError as error:
            keep(len(asked) - 1, [failure(str(error), model.name)])
            asked.pop()
    backend.generate(prompts, model.params, seeds=[row_seed(plan, *pair) for pair in asked], done=keep)


def records(plan: Plan, instructions: Sequence[Instruction], drawn: Drawn, journal: Journal) -> Iterator[dict[str, Any]]:
    """UltraFeedback's records, in the instructions' order; `text` says that answers go on where the prompt ends."""
    for row, instruction in enumerate(tqdm(instructions, desc="write", unit="instruction", delay=5, mininterval=1)):
        completions = []
        for slot in range(plan.completions):
            found = journal.read(row, slot)
            assert found is not None, f"{journal.path}: nothing for row {row}, slot {slot}"
            principle = int(drawn.principles[row, slot])
            completions.append({
                "model": found["model"], "principle": None if principle < 0 else drawn.names[principle],
                "custom_system_prompt": system_text(plan, drawn, row, slot) or None, "response": found["response"],
                **{k: v for k, v in found.items() if k in ("finish_reason", "seconds", "error")}})
        yield {"source": instruction.source, "instruction": as_json(instruction.prompt),
               "models": [c["model"] for c in completions], "correct_answers": list(instruction.correct),
               "incorrect_answers": list(instruction.incorrect), "completions": completions,
               "text": all(m.format.text for m in plan.models)}


def as_json(prompt: Text) -> str | list[dict[str, str]]:
    """A prompt as JSON has it."""
    return prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]


def from_json(prompt: Any, where: str) -> Text:
    """A prompt of a record. Raises `DataError`."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
        raise DataError(f"{where}: 'instruction' must be text or a list of messages")
    try:
        return tuple(Message(m["role"], m["content"]) for m in prompt)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def content(instructions: Sequence[Instruction]) -> str:
    """A hash of all instructions: a folder never goes on with others under a file's name."""
    whole = hashlib.sha256()
    for i in instructions:
        whole.update(repr((i.prompt, i.source, i.correct, i.incorrect)).encode("utf-8", "replace"))
    return whole.hexdigest()[:16]


def preview(plan: Plan, instructions: Sequence[Instruction], drawn: Drawn) -> str:
    """What a plan draws: how often each model and principle, and one prompt of each model."""
    lines = [f"{len(instructions):,} instructions, {plan.completions} completions each"]
    for number, model in enumerate(plan.models):
        where = np.argwhere(drawn.models == number)
        lines.append(f"{model.name} ({model.spec['backend']}): {len(where):,} completions")
        if len(where):
            row, slot = where[0].tolist()
            lines.append(f"    {as_json(as_prompt(instructions[row], model, system_text(plan, drawn, row, slot)))!r:.500}")
    for number, name in enumerate(drawn.names):
        if count := int((drawn.principles == number).sum()):
            lines.append(f"principle {name}: {count:,}")
    return "\n".join(lines)
