"""`xalign data inspect FILE`: what a file of records holds, and what training on it would drop, cut and see.

The file is streamed. In memory stay numbers: of every record its lengths, three hashes and its place (about 64 bytes,
and as much again while they are summed up).
A bad record, which would stop training, is counted and shown here, and the others are looked at all the same. The first
record says of what kind a file is; one of another kind that only `xalign sft` reads is told apart from a bad one.
"""

import array
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from xalign.config import InspectConfig
from xalign.data.chat_template import render_prompt
from xalign.data.files import Path
from xalign.data.records import Example, Labelled, PreferencePair, Text
from xalign.data.shapes import NAMES, Empty, ReadReport, Record, shape_of, to_example, to_labelled, to_pair, to_prompt
from xalign.data.sources import column_names, iter_records
from xalign.display import Paint, excerpt, histogram, show_text, show_tokens, table, visible
from xalign.errors import ConfigError, DataError
from xalign.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # its module needs torch, which is loaded only where tokens are counted
    from xalign.data.collate import TruncationReport

Kind = Literal["pairs", "labelled", "examples", "prompts"]
Item = PreferencePair | Labelled | Example | Text
Sides = list[tuple[str, list[int], list[bool]]]  # name, ids and mask
PERCENTILES = (5, 50, 95, 99)
COLORS = {"chosen": "green", "rejected": "red", "desirable": "green", "undesirable": "red"}


@dataclass
class Inspection:
    """What was found in a file; `str(report)` of the reader, and everything that `describe` writes about."""

    path: str
    kind: Kind = "pairs"
    shapes: Counter[str] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)
    unread: dict[str, None] = field(default_factory=dict)
    """Names of columns that no program reads, in the order of their appearance."""
    report: ReadReport = field(default_factory=ReadReport)
    bad: ReadReport = field(default_factory=ReadReport)
    """Records that training would refuse, by what is wrong."""
    mixed: ReadReport = field(default_factory=ReadReport)
    """Records of another kind, which `xalign sft` reads, but not what the file's kind is for."""
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    """Records by their number of messages; plain text has 0."""
    unit: str = "characters"
    lengths: dict[str, "array.array[int]"] = field(default_factory=dict)
    """Tokens (or characters) of every kept record's parts: prompt, chosen, rejected, ..., total."""
    margins: "array.array[float]" = field(default_factory=lambda: array.array("d"))
    keys: "array.array[int]" = field(default_factory=lambda: array.array("q"))
    """Four numbers a kept record: hashes of the whole, of the whole with the sides swapped, of the prompt; its place."""
    max_length: int | None = None
    truncation: "TruncationReport | None" = None
    """What the maximum would cut and drop, where there is one."""
    example: tuple[Item, Sides] | None = None
    """The first kept record and, with a tokenizer, its sides as training sees them."""
    files: list[str] = field(default_factory=list)

    def place(self, row: int) -> str:
        """`path:N` of a kept record."""
        file, number = divmod(self.keys[4 * row + 3], 1 << 40)
        return f"{self.files[file]}:{number}"


class Inspector:
    """Takes records one by one and keeps count in an `Inspection`."""

    def __init__(self, path: Path, tokenizer: Tokenizer | None = None, max_length: int | None = None,
                 mode: Literal["keep_end", "keep_start"] | None = None, empty: Empty = "error"):
        if max_length is not None and tokenizer is None:
            raise ConfigError(f"--max-length {max_length} counts tokens: it needs --tokenizer FOLDER")
        self.found = Inspection(str(path), unit="tokens" if tokenizer else "characters", max_length=max_length)
        self.tokenizer, self.mode, self.empty = tokenizer, mode, empty

    def add(self, record: Record, where: str) -> None:
        """Count one raw record."""
        found = self.found
        found.report.records += 1
        found.columns.update(name for name, value in record.items() if name in NAMES and value is not None)
        if len(found.unread) < 100:
            found.unread |= dict.fromkeys(name for name in record if name not in NAMES)
        try:
            kind, shape = shape_of(record, where)
            if not found.shapes:
                found.kind = kind
            found.shapes[shape] += 1
            item = self._read(record, where, kind, shape)
            if item is None:
                return
            parts, sides = self._encoded(item, self.tokenizer) if self.tokenizer else (_characters(item), [])
        except DataError as error:
            return self._bad(where, error)
        if found.example is None and (sides or self.tokenizer is None):
            found.example = item, sides
        found.report.kept += 1
        for name, length in parts.items():
            found.lengths.setdefault(name, array.array("q")).append(length)
        self._count(item, where)

    def add_bad(self, where: str, error: DataError) -> None:
        """Count one record that could not be read at all."""
        self.found.report.records += 1
        self._bad(where, error)

    def _bad(self, where: str, error: DataError) -> None:
        bad, message = self.found.bad, str(error).removeprefix(f"{where}: ")
        bad.count(message if len(bad.flaws) < 100 else "other mistakes", where)

    def _read(self, record: Record, where: str, own: Kind, shape: str) -> Item | None:
        """The record as the file's kind is read, or, where its own is another that only sft reads, None."""
        report, kind, empty = self.found.report, self.found.kind, self.empty
        if (kind == "pairs" and own in ("labelled", "examples")) or (kind == "labelled" and own == "examples"):
            to_example(record, where, report, True, empty)
            stops = "xalign dpo stops at it" if kind == "pairs" else "it has no label"
            self.found.mixed.count(f"of another kind, {shape}: xalign sft reads it, {stops}", where)
            return None
        if kind == "pairs":
            return to_pair(record, where, report, empty=empty)
        if kind == "labelled":
            labelled = to_labelled(record, where, report, empty=empty)
            return labelled[0] if labelled else None
        return to_example(record, where, report, True, empty) if kind == "examples" else to_prompt(record, where, report)

    def _count(self, item: Item, where: str) -> None:
        """Roles, turns, margins, and the hashes by which records are the same."""
        found = self.found
        file, _, number = where.rpartition(":")
        if not found.files or found.files[-1] != file:
            found.files.append(file)
        prompt, *sides = _texts(item)
        whole = (prompt, *sides, item.label) if isinstance(item, Labelled) else (prompt, *sides)
        opposite: tuple[object, ...] = (prompt, *reversed(sides))
        if isinstance(item, Labelled):
            opposite = (prompt, *sides, not item.label)
        # a tuple's and a text's hash have 64 bits: two among ten million are equal by accident in 1 of 400,000 files
        found.keys.extend((hash(whole), hash(opposite), hash(prompt), (len(found.files) - 1 << 40) + int(number)))
        messages = [m for text in (prompt, *sides[:1]) if isinstance(text, tuple) for m in text]
        found.turns[len(messages)] += 1
        found.roles.update(message.role for message in messages)
        if isinstance(item, PreferencePair) and item.margin is not None:
            found.margins.append(item.margin)

    def _encoded(self, item: Item, tokenizer: Tokenizer) -> tuple[dict[str, int], Sides]:
        """Tokens of a record's parts, and the record as it is after truncation (no sides, if it is dropped)."""
        from xalign.data import collate

        found = self.found
        if found.truncation is None and found.max_length is not None:
            found.truncation = collate.TruncationReport()
        limit = sys.maxsize if found.max_length is None else found.max_length
        if isinstance(item, PreferencePair):
            pair = collate.encode_pair(item, tokenizer)
            parts = {"prompt": len(pair.prompt), "chosen": len(pair.chosen), "rejected": len(pair.rejected),
                     "prompt + longer": pair.length}
            cut = collate.truncate_pair(pair, limit, self.mode or "keep_end", found.truncation)
            both = [("chosen", cut.chosen), ("rejected", cut.rejected)] if cut else []
            return parts, [(name, cut.prompt + side, [False] * len(cut.prompt) + [True] * len(side))  # type: ignore[union-attr]
                           for name, side in both]
        if isinstance(item, Example | Labelled):
            turns = collate.encode_turns(Example(item.prompt, item.completion, item.where), tokenizer)
            scored, whole = sum(sum(turn.loss_mask) for turn in turns), sum(turn.length for turn in turns)
            parts = {"scored": scored, "whole record": whole}
            if isinstance(item, Labelled):
                parts = {"prompt": whole - scored, _label(item): scored, "whole record": whole}
            cuts = [cut for turn in turns
                    for cut in collate.truncate_example(turn, limit, self.mode or "keep_start", found.truncation)]
            name = _label(item) if isinstance(item, Labelled) else ""
            return parts, [(name, one.ids, one.loss_mask) for one in cuts[:1]]
        ids = render_prompt(tokenizer, item).ids
        if found.truncation is not None:
            found.truncation.total += 1
            found.truncation.prompt_cut += len(ids) > limit
        return {"prompt": len(ids)}, [("", ids, [False] * len(ids))]


def inspect(path: Path, *, columns: Mapping[str, str] | None = None, tokenizer: Tokenizer | None = None,
            max_length: int | None = None, mode: Literal["keep_end", "keep_start"] | None = None,
            empty: Empty = "error", limit: int | None = None, progress: bool = False) -> tuple[Inspection, DataError | None]:
    """Look at a file's records, at most `limit` sound ones; also gives the error that ended the reading, if one did.

    `empty` says what training does with empty replies, `mode` how records over `max_length` tokens are cut; None: as each
    program does by default.
    """
    inspector = Inspector(path, tokenizer, max_length, mode, empty)
    records = itertools.islice(iter_records(path, columns, inspector.add_bad), limit)
    try:
        for where, record in tqdm(records, unit=" records", delay=10, disable=not progress, leave=False):
            inspector.add(record, where)
    except DataError as error:
        return inspector.found, error
    return inspector.found, None


def _texts(item: Item) -> tuple[Text, ...]:
    """Prompt and sides."""
    if isinstance(item, PreferencePair):
        return item.prompt, item.chosen, item.rejected
    return (item.prompt, item.completion) if isinstance(item, Example | Labelled) else (item,)


def _characters(item: Item) -> dict[str, int]:
    def count(text: Text, scored: bool = False) -> int:
        return len(text) if isinstance(text, str) else sum(len(m.content) for m in text if not scored or m.role == "assistant")

    prompt, *sides = map(count, _texts(item))
    if isinstance(item, PreferencePair):
        return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1], "prompt + longer": prompt + max(sides)}
    if isinstance(item, Labelled):
        return {"prompt": prompt, _label(item): sides[0], "whole record": prompt + sides[0]}
    if isinstance(item, Example):
        return {"scored": count(item.completion, True), "whole record": prompt + sides[0]}
    return {"prompt": prompt}


def _label(item: Labelled) -> str:
    return "desirable" if item.label else "undesirable"


def run_inspect(config: InspectConfig) -> None:
    """Write what a file holds to standard output; bad records are shown, and then are the program's error."""
    options = config.data
    if options.dataset is None:
        raise ConfigError("no file is given: xalign data inspect FILE")
    tokenizer = None
    if options.tokenizer is not None and (tokenizer := load_tokenizer(options.tokenizer)) is None:
        raise ConfigError(f"--tokenizer {options.tokenizer}: the folder holds no tokenizer")
    found, error = inspect(options.dataset, columns=column_names(options.columns), tokenizer=tokenizer,
                           max_length=options.max_length, mode=options.truncation_mode, empty=options.empty,
                           limit=options.limit, progress=True)
    if found.report.records:
        for line in describe(found, Paint(options.color), tokenizer):
            print(line)
    if error is not None:
        raise error
    if found.bad.flaws:
        raise DataError(f"{found.path}: {sum(found.bad.flaws.values()):,} bad records, which training refuses, the first: "
                        f"{next(iter(found.bad.first.values()))}: {next(iter(found.bad.flaws))}")
    if not found.report.kept:
        raise DataError(f"{found.path}: no record is kept ({found.report})")


def describe(found: Inspection, paint: Paint, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """The lines of the report."""
    def row(name: str, text: str, *styles: str) -> str:
        return paint(f"{name:13}", "bold") + paint(text, *styles)

    report, total = found.report, found.report.records
    shapes = [shape + (f" ({count:,})" if len(found.shapes) > 1 else "") for shape, count in found.shapes.most_common()]
    yield row(found.kind, visible(found.path))
    yield row("format", "; ".join(shapes), *["yellow"] * (len(shapes) > 1))
    yield row("records", f"{total:,} read, {report.kept:,} kept")
    for flaws, style in ((report, "yellow"), (found.mixed, "yellow"), (found.bad, "red")):
        shown = sorted(flaws.flaws.items(), key=lambda entry: -entry[1])
        for flaw, count in shown[:10]:
            bad = "bad, training stops: " if flaws is found.bad else ""
            yield row("", f"{count:,} {bad}{visible(flaw)} (first: {visible(flaws.first[flaw])})", style)
        if len(shown) > 10:
            yield row("", f"... and {len(shown) - 10} other kinds of bad records", style)
    yield row("columns", ", ".join(name + (f" ({n:,})" if n < total else "") for name, n in found.columns.items()))
    if found.unread:
        yield row("not read", visible(excerpt(", ".join(found.unread), 200)))
    if not report.kept:
        return
    if found.roles:
        yield row("roles", ", ".join(f"{role} {count:,}" for role, count in found.roles.most_common()))
        common = found.turns.most_common(8)
        turns = [f"{n:,} records of {count or 'text'}" for count, n in sorted(common)]
        others = found.report.kept - sum(n for _, n in common)
        yield row("messages", ", ".join(turns) + (f", {others:,} of other numbers" if others else ""))
    yield from _quality(found, row)
    if found.truncation is not None:
        lost = found.truncation.dropped + found.truncation.completion_cut + found.truncation.prompt_cut
        yield row("truncation", f"to {found.max_length} tokens: {found.truncation}", *["yellow"] * bool(lost))
    yield ""
    lengths = {name: np.frombuffer(values, np.int64) for name, values in found.lengths.items()}
    rows = [(name, [v.min(), *np.percentile(v, PERCENTILES), v.max(), v.mean()]) for name, v in lengths.items()]
    heads = ["min", *(f"{p} %" if p != 50 else "median" for p in PERCENTILES), "max", "mean"]
    yield from table(found.unit, heads, rows, paint)
    yield ""
    drawn = {name: (v, COLORS.get(name, "cyan")) for name, v in lengths.items() if name in COLORS}
    drawn = drawn or {name: (v, "cyan") for name, v in list(lengths.items())[-1:]}
    yield row("lengths", f"{' and '.join(drawn)}, in {found.unit}")
    yield from histogram(drawn, paint)
    if found.example is not None:
        yield ""
        yield from _example(found.example, paint, tokenizer)


def _quality(found: Inspection, row: Any) -> Iterator[str]:
    """Scores, who is longer, and what comes twice."""
    keys = np.frombuffer(found.keys, np.int64).reshape(-1, 4)
    if len(found.margins):
        margins = np.frombuffer(found.margins)
        wrong = int((margins < 0).sum())
        yield row("margins", f"{margins.min():g} to {margins.max():g}, median {np.median(margins):g}"
                  + (f"; {wrong:,} are negative: the rejected side has the better score" if wrong else ""),
                  *["yellow"] * bool(wrong))
    lengths = {name: np.frombuffer(values, np.int64) for name, values in found.lengths.items()}
    if found.kind == "pairs":
        more = (lengths["chosen"] > lengths["rejected"]).mean()
        less = (lengths["chosen"] < lengths["rejected"]).mean()
        yield row("length bias", f"chosen is longer in {more:.1%}, shorter in {less:.1%}, as long in {1 - more - less:.1%}")
    elif found.kind == "labelled":
        yield row("labels", ", ".join(f"{name} {len(lengths.get(name, ())):,}" for name in ("desirable", "undesirable")))
    whole, opposite, prompts = keys[:, 0], keys[:, 1], keys[:, 2]
    contrary = np.flatnonzero(np.isin(opposite, whole) & (opposite != whole) & (found.kind in ("pairs", "labelled")))
    lines = []
    if again := _repeats(whole):
        lines.append(f"the same as an earlier record: {again[0]:,} ({found.place(again[1])} is {found.place(again[2])})")
    if found.kind != "prompts" and np.any(lengths.get("prompt", 0)) and (again := _repeats(prompts)):
        lines.append(f"the prompt of an earlier record: {again[0]:,} ({found.place(again[1])} has {found.place(again[2])}'s)")
    if len(contrary):
        first = int(contrary[0])
        twin = int(np.flatnonzero(whole == opposite[first])[0])
        what = "the same two sides the other way round" if found.kind == "pairs" else "the same completion, labelled otherwise"
        lines.append(f"contradict another record: {len(contrary):,} ({found.place(first)} and {found.place(twin)}: {what})")
    for i, line in enumerate(lines or ["none"]):
        yield row("" if i else "duplicates", line, *["yellow"] * bool(lines))


def _repeats(values: np.ndarray) -> tuple[int, int, int] | None:
    """How many rows have the value of an earlier one, the first of them, and the earlier one."""
    order = np.argsort(values, kind="stable")
    again = order[1:][values[order][1:] == values[order][:-1]]
    if not len(again):
        return None
    first = int(again.min())
    return len(again), first, int(np.flatnonzero(values == values[first])[0])


def _example(example: tuple[Item, Sides], paint: Paint, tokenizer: Tokenizer | None) -> Iterator[str]:
    """One record: as training sees it, or, without a tokenizer, its text by role."""
    item, sides = example
    where = "" if isinstance(item, str | tuple) else item.where
    if tokenizer is None:
        yield paint("example", "bold") + f"      {visible(where)}"
        prompt, *completions = _texts(item)
        names = ("chosen", "rejected") if isinstance(item, PreferencePair) else ("completion",)
        if prompt:
            yield paint("prompt", "inverse")
            yield show_text(prompt, paint, "dim")
        for name, text in zip(names, completions, strict=False):
            yield paint(f"{name}" + (f" ({_label(item)})" if isinstance(item, Labelled) else ""), "inverse")
            yield show_text(text, paint, COLORS.get(name, "green"))
        return
    key = "scored green, special inverse, every other token underlined" if paint.on else "scored between ⟦ and ⟧"
    yield paint("example", "bold") + f"      {visible(where)} ({key})"
    for name, ids, mask in sides:
        yield paint(f"{name or 'record'}: {len(ids):,} tokens, {sum(mask):,} scored", "bold")
        yield show_tokens(tokenizer, ids, mask, paint)
