"""Files to pairs, examples, labelled completions and prompts: each record as `data.shapes` takes it, counted in a report.

`columns` gives standard names to a file's own: `{"chosen": "better"}`.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeVar

from xalign.data.files import OnBad, Path, keys_of, raw_records
from xalign.data.records import Example, Labelled, PreferencePair, Text
from xalign.data.shapes import (
    NAMES,
    Empty,
    Identical,
    ReadReport,
    Record,
    to_example,
    to_labelled,
    to_pair,
    to_prompt,
)
from xalign.errors import ConfigError, DataError, nearest

T = TypeVar("T")


def read_pairs(path: Path, *, identical: Identical = "drop", empty: Empty = "error", columns: Mapping[str, str] | None = None,
               limit: int | None = None, report: ReadReport | None = None) -> list[PreferencePair]:
    """The preference pairs of a file, at most `limit`; see `iter_pairs`."""
    pairs = iter_pairs(path, identical=identical, empty=empty, columns=columns, report=report)
    return list(itertools.islice(pairs, limit))


def iter_pairs(path: Path, *, identical: Identical = "drop", empty: Empty = "error", columns: Mapping[str, str] | None = None,
               report: ReadReport | None = None) -> Iterator[PreferencePair]:
    """Yield a file's preference pairs, one record in memory at a time (.json: all), and count into `report`.

    `identical` says what to do with chosen == rejected, `empty` with a blank reply (HH-RLHF's are always dropped),
    `columns` which column of the file bears a standard name.
    Raises `DataError` for a bad record or a file without a pair, `ConfigError` for an unknown standard name.
    """
    return _read(path, partial(to_pair, identical=identical, empty=empty), "preference pair", columns, report)


def read_examples(path: Path, *, every_turn: bool = False, empty: Empty = "error", columns: Mapping[str, str] | None = None,
                  limit: int | None = None, report: ReadReport | None = None) -> list[Example]:
    """The examples to imitate of a file, at most `limit`; see `iter_examples`."""
    examples = iter_examples(path, every_turn=every_turn, empty=empty, columns=columns, report=report)
    return list(itertools.islice(examples, limit))


def iter_examples(path: Path, *, every_turn: bool = False, empty: Empty = "error", columns: Mapping[str, str] | None = None,
                  report: ReadReport | None = None) -> Iterator[Example]:
    """Yield a file's examples, streamed as in `iter_pairs`; of a pair its chosen side, of labelled ones the desirable.

    `every_turn` is `pair_to_example`'s. Raises as `iter_pairs` does.
    """
    return _read(path, partial(to_example, every_turn=every_turn, empty=empty), "example", columns, report)


def read_labelled(path: Path, *, identical: Identical = "drop", empty: Empty = "error",
                  columns: Mapping[str, str] | None = None, limit: int | None = None,
                  report: ReadReport | None = None) -> list[Labelled]:
    """The labelled completions of a file, at most `limit`; see `iter_labelled`."""
    labelled = iter_labelled(path, identical=identical, empty=empty, columns=columns, report=report)
    return list(itertools.islice(labelled, limit))


def iter_labelled(path: Path, *, identical: Identical = "drop", empty: Empty = "error",
                  columns: Mapping[str, str] | None = None, report: ReadReport | None = None) -> Iterator[Labelled]:
    """Yield a file's labelled completions, streamed as in `iter_pairs`; of a pair chosen (True), then rejected (False).

    Raises as `iter_pairs` does.
    """
    read = partial(to_labelled, identical=identical, empty=empty)
    return itertools.chain.from_iterable(_read(path, read, "labelled completion", columns, report))


def read_prompts(path: Path, *, columns: Mapping[str, str] | None = None,
                 limit: int | None = None, report: ReadReport | None = None) -> list[Text]:
    """The prompts of a file, at most `limit`; see `iter_prompts`."""
    return list(itertools.islice(iter_prompts(path, columns=columns, report=report), limit))


def iter_prompts(path: Path, *, columns: Mapping[str, str] | None = None,
                 report: ReadReport | None = None) -> Iterator[Text]:
    """Yield a file's prompts: a line of a .txt, `prompt`, `messages` or `instruction` of a record, a pair's prompt.

    Raises as `iter_pairs` does.
    """
    return _read(path, to_prompt, "prompt", columns, report)


def _read(path: Path, read: Callable[[Record, str, ReadReport], T | None], what: str,
          columns: Mapping[str, str] | None, report: ReadReport | None) -> Iterator[T]:
    """Yield what `read` makes of every record of a file; raises where that is nothing at all."""
    report = ReadReport() if report is None else report
    kept = 0
    for where, record in iter_records(path, columns):
        report.records += 1
        if (item := read(record, where, report)) is not None:
            kept, report.kept = kept + 1, report.kept + 1
            yield item
    if not kept:
        raise DataError(f"{path}: no usable {what} ({report})")


def column_names(settings: Iterable[str], flag: str = "--columns",
                 example: str = "chosen=better") -> dict[str, str] | None:
    """`("chosen=better",)` as {"chosen": "better"}: a standard name, and the file's; None where there are none."""
    names: dict[str, str] = {}
    for setting in settings:
        ours, equals, theirs = setting.partition("=")
        if not (ours and equals and theirs) or ours in names or theirs in names.values():
            raise ConfigError(f"{flag} has {setting!r}, allowed are settings like {example}, each name once")
        names[ours] = theirs
    return names or None


def refuse_twice(paths: Iterable[Path], instead: str = "") -> None:
    """Raise `ConfigError` for a file that is given twice, by whatever path: its records would count twice, unasked."""
    seen: set[str] = set()
    for path in paths:
        if (real := os.path.realpath(path)) in seen:
            raise ConfigError(f"{path} is given twice, allowed is once{instead}")
        seen.add(real)


def columns_by_file(settings: Iterable[str], paths: Iterable[Path]) -> dict[Path, dict[str, str] | None]:
    """The `columns` of each of a run's files: None for one whose first record has none of them, unless no file's has any."""
    columns = column_names(settings)
    paths = list(dict.fromkeys(paths))
    if not columns:
        return dict.fromkeys(paths)
    heads = {path: next(raw_records(path, (*NAMES, *columns.values())))[1] for path in paths}
    bearing = [path for path, head in heads.items() if not head.keys().isdisjoint(columns.values())] or paths
    return {path: columns if path in bearing else None for path in paths}


def iter_records(path: Path, columns: Mapping[str, str] | None = None,
                 on_bad: OnBad | None = None) -> Iterator[tuple[str, Record]]:
    """Yield `path:line` and every raw record under its standard names, for the functions below; `on_bad`: see `raw_records`."""
    columns = columns or {}
    for name in columns:
        if name not in NAMES:
            raise ConfigError(f"columns: no standard name {name!r}{nearest(name, NAMES)}; allowed: {', '.join(NAMES)}")
    own = set(columns.values())
    for where, record in raw_records(path, (*NAMES, *own), on_bad):
        if columns:
            missing = next(((name, theirs) for name, theirs in columns.items() if theirs not in record), None)
            if missing:
                error = DataError(f"{where}: no column {missing[1]!r} to take as {missing[0]!r}, only {keys_of(record)}")
                if on_bad is None:
                    raise error
                on_bad(where, error)
                continue
            # the file's names make way, as a renamed column does
            rest = {name: value for name, value in record.items() if name not in own}
            record = rest | {name: record[theirs] for name, theirs in columns.items()}
        yield where, record
