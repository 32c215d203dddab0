"""Encoded records on disk: token ids in flat files that are read row by row, so that no data set has to fit in memory.

A store is a folder: `ids.bin` (all rows' ids one after the other, uint16 where they fit, else uint32), `lengths.bin`
(uint32, one line of part lengths a row) and `meta.json`. It appears under its name only when it is whole, and it is used
only for the `key` that it was written for, so a killed or changed run writes it anew. In memory stay about 20 bytes a row.
"""

import array
import hashlib
import itertools
import json
import os
import shutil
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from xalign.data.collate import EncodedExample, EncodedLabelled, EncodedPair, EncodedRanked
from xalign.disk import writing

IDS, LENGTHS, META = "ids.bin", "lengths.bin", "meta.json"
VERSION = 1  # part of what a store must agree with: raise it when the layout changes
R = TypeVar("R", EncodedPair, EncodedLabelled, EncodedRanked, EncodedExample)


def _parts(row: EncodedPair | EncodedExample) -> tuple[Sequence[int], ...]:
    """What is written of a row; a mask is told by the lengths of its runs, of which the first is not scored, a label by that
    of the last part, a margin as the bits of an fp32 number."""
    if isinstance(row, EncodedRanked):
        return row.prompt, row.chosen, row.rejected, struct.unpack("<2H", struct.pack("<f", row.margin))
    if isinstance(row, EncodedPair):
        return row.prompt, row.chosen, row.rejected, *([[0] * row.label] if isinstance(row, EncodedLabelled) else [])
    runs = [(scored, sum(1 for _ in run)) for scored, run in itertools.groupby(row.loss_mask)]
    return row.ids, [0] * bool(runs and runs[0][0]) + [length for _, length in runs]


class _Ids:
    """A file of numbers, of which `read` gives a part. Not a memory map: what was once read of it would count as our memory."""

    def __init__(self, path: Path, dtype: str):
        self.file, self.dtype = os.open(path, os.O_RDONLY), np.dtype(dtype)
        weakref.finalize(self, os.close, self.file)
        self.size = os.fstat(self.file).st_size // self.dtype.itemsize

    def read(self, start: int, count: int) -> np.ndarray:
        width = self.dtype.itemsize
        return np.frombuffer(os.pread(self.file, count * width, start * width), self.dtype)


class Store(Sequence[R], Generic[R]):
    """The rows of a store; `store[i]` reads one (without its `where`), `store[a:b]` is a view."""

    def __init__(self, kind: type[R], ids: _Ids, parts: np.ndarray, starts: np.ndarray):
        self.kind: type[R] = kind
        self._ids, self._row_parts, self._starts = ids, parts, starts

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row as its `length` counts them, compactly."""
        first, rest = self._row_parts[:, 0], self._row_parts[:, 1:]
        return array.array("I", (first if self.kind is EncodedExample else first + rest.max(1)).tobytes())

    @property
    def labels(self) -> np.ndarray:
        """Of labelled completions which are desirable, (rows,) bool."""
        assert self.kind is EncodedLabelled
        return self._row_parts[:, 3] > 0

    def digest(self) -> str:
        """A hash of all rows."""
        whole = hashlib.sha256(self._row_parts.tobytes())
        for start, size in zip(self._starts.tolist(), self._row_parts.sum(1, dtype=np.int64).tolist(), strict=True):
            whole.update(self._ids.read(start, size).astype(np.uint32).tobytes())
        return whole.hexdigest()

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> "Store[R]": ...
    def __getitem__(self, index: int | slice) -> "R | Store[R]":
        if isinstance(index, slice):
            return Store(self.kind, self._ids, self._row_parts[index], self._starts[index])
        lengths = self._row_parts[index].tolist()
        start = int(self._starts[index])
        flat = self._ids.read(start, sum(lengths)).tolist()
        ends = list(itertools.accumulate(lengths))
        parts = [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        if self.kind is EncodedLabelled:
            return EncodedLabelled(parts[0], parts[1], parts[2], label=bool(parts[3]))  # type: ignore[return-value]
        if self.kind is EncodedRanked:
            [margin] = struct.unpack("<f", struct.pack("<2H", *parts[3]))
            return EncodedRanked(parts[0], parts[1], parts[2], margin=margin)  # type: ignore[return-value]
        if self.kind is EncodedPair:
            return EncodedPair(*parts)  # type: ignore[return-value]
        mask = [bool(number % 2) for number, length in enumerate(parts[1]) for _ in range(length)]
        return EncodedExample(parts[0], mask)  # type: ignore[return-value]


def open_store(path: Path, key: dict[str, Any], kind: type[R]) -> tuple[Store[R], str] | None:
    """The store in `path` and the note that it was written with; None where there is no whole one for this `key`."""
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        if meta["key"] != _normal(key, kind):
            return None
        parts = np.fromfile(path / LENGTHS, dtype=np.uint32).reshape(meta["rows"], meta["parts"])
        sums = parts.sum(1, dtype=np.int64)
        starts = np.cumsum(sums) - sums
        ids = _Ids(path / IDS, meta["dtype"])
    except (OSError, ValueError, LookupError, TypeError):
        return None  # nothing there, or damaged: it is made from the data again
    if not len(sums) or ids.size != starts[-1] + sums[-1]:
        return None
    return Store(kind, ids, parts, starts), meta["note"]


def write_store(path: Path, key: dict[str, Any], kind: type[R], rows: Iterable[R], limit: int,
                note: Callable[[], str] = str) -> None:
    """Write `rows` to the folder `path`, whole or not at all; it replaces an older store.

    All ids and run lengths are below `limit`. `note` is asked at the end. No row at all is an `AssertionError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    code, dtype = ("H", "uint16") if limit <= 2**16 else ("I", "uint32")
    count = width = 0
    try:
        with (writing(path), open(temporary / IDS, "wb", 1 << 20) as ids,
              open(temporary / LENGTHS, "wb", 1 << 16) as lengths):
            for row in rows:
                parts = _parts(row)
                for part in parts:
                    ids.write(array.array(code, part).tobytes())
                lengths.write(array.array("I", map(len, parts)).tobytes())
                count, width = count + 1, len(parts)
            for file in (ids, lengths):
                file.flush()
                os.fsync(file.fileno())
        assert count, "a store without rows"
        meta = {"key": _normal(key, kind), "rows": count, "parts": width, "dtype": dtype, "note": note()}
        (temporary / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _normal(key: dict[str, Any], kind: type) -> dict[str, Any]:
    """A key as JSON gives it back."""
    return json.loads(json.dumps({"version": VERSION, "kind": kind.__name__, **key}))
