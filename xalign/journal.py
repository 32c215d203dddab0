"""Work that is on disk as soon as it is done: a file of JSON lines that only grows, found again by (row, slot)."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xalign.disk import atomic_file, check_same, lock, write_atomically, writing
from xalign.errors import CheckpointError

PART = 64  # rows whose work is done together
HEAD = re.compile(rb'\{"row": (\d+), "slot": (\d+), "failed": (true|false)[,}]')


class Journal:
    """Lines `{"row": , "slot": , "failed": , ...}` for (rows, slots) pieces of work; of several for one the last counts.

    In memory is where each line begins, 8 bytes a piece. A line that a kill cut off is dropped when the file is opened.
    Raises `CheckpointError` for a file with anything else in it.
    """

    def __init__(self, path: Path, rows: int, slots: int):
        self.path, self.at = path, np.full((rows, slots), -1, np.int64)
        self.failed = np.zeros((rows, slots), bool)
        self._lock = threading.Lock()
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.size = self._recover()

    def _recover(self) -> int:
        at = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                head = HEAD.match(line)
                if not line.endswith(b"}\n"):
                    if file.read(1):
                        raise CheckpointError(
                            f"{self.path}:{number}: a line that is none of ours, allowed is an untouched file"
                        )
                    break
                row, slot = (int(head[1]), int(head[2])) if head else (-1, -1)
                if head is None or row >= self.at.shape[0] or slot >= self.at.shape[1]:
                    raise CheckpointError(f"{self.path}:{number}: a line that is none of ours, allowed is an untouched file")
                self.at[row, slot], self.failed[row, slot] = at, head[3] == b"true"
                at += len(line)
        os.ftruncate(self._file, at)
        return at

    @property
    def missing(self) -> np.ndarray:
        """True (rows, slots) where there is no line, or one of a failure."""
        return (self.at < 0) | self.failed

    def add(self, row: int, slot: int, failed: bool, record: dict[str, Any]) -> None:
        """Write a line, whole, before this returns."""
        body = json.dumps({"row": int(row), "slot": int(slot), "failed": bool(failed), **record}, ensure_ascii=False)
        line = (body + "\n").encode("utf-8", "replace")
        with self._lock, writing(self.path):
            written = os.write(self._file, line)
            while written < len(line):  # a disk that is full takes a part, and then raises
                written += os.write(self._file, line[written:])
            self.at[row, slot], self.failed[row, slot] = self.size, failed
            self.size += len(line)

    def read(self, row: int, slot: int) -> dict[str, Any] | None:
        """The record of a piece of work, None where there is none yet."""
        at = int(self.at[row, slot])
        if at < 0:
            return None
        chunks: list[bytes] = []
        size = 1 << 14
        while not chunks or b"\n" not in chunks[-1]:
            chunks.append(os.pread(self._file, size, at + sum(map(len, chunks))))
            if not chunks[-1]:
                raise CheckpointError(f"{self.path}: became shorter while it was read")
        record: dict[str, Any] = json.loads(b"".join(chunks).split(b"\n", 1)[0])
        return record

    def record(self, row: int, slot: int) -> dict[str, Any]:
        """The same of a piece of work that has been done."""
        found = self.read(row, slot)
        assert found is not None, f"{self.path}: nothing for row {row}, slot {slot}"
        return found

    def fill(self, slot: int, work: Callable[[list[int]], list[dict[str, Any]]], title: str) -> None:
        """Do what a slot lacks: `work` gives the records of some rows, `PART` at a time.

        A part that was cut off is done again as a whole, so that rows are batched as they would have been.
        """
        rows = len(self.at)
        with tqdm(total=rows, desc=title, unit="row", delay=2, mininterval=1) as bar:
            for at in range(0, rows, PART):
                part = list(range(at, min(rows, at + PART)))
                if self.missing[part, slot].any():
                    for row, record in zip(part, work(part), strict=True):
                        self.add(row, slot, False, record)
                bar.update(len(part))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)


@contextmanager
def claimed(folder: Path, settings: dict[str, Any], overwrite: bool, owned: tuple[str, ...]) -> Iterator[None]:
    """Hold a folder for one process and one configuration, kept in `settings.json`; `overwrite` drops its `owned` files.

    Raises `CheckpointError` where another process holds it, or where it was made with other settings.
    """
    name = folder / "settings.json"
    with lock(folder):
        settings = json.loads(json.dumps(settings))
        if overwrite:
            for file in (name, *(folder / file for file in owned)):
                file.unlink(missing_ok=True)
        if name.exists():
            try:
                before = json.loads(name.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{name}: no usable JSON ({error})") from None
            check_same(folder, before, settings)
        elif taken := next((file for file in owned if (folder / file).exists()), None):
            raise CheckpointError(f"{folder} holds {taken} but no settings.json, allowed is a new folder or --overwrite")
        else:
            write_atomically(name, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        try:
            yield
        except BaseException:
            if not any((folder / file).exists() and (folder / file).stat().st_size for file in owned):
                for file in (name, *(folder / file for file in owned)):  # nothing came of it: the next try may be another one
                    file.unlink(missing_ok=True)
            raise


def write_lines(path: Path, records: Iterator[dict[str, Any]]) -> int:
    """Write JSON lines whole or not at all, one record in memory at a time; gives their number."""
    count = 0
    with atomic_file(path) as file:
        for record in records:
            count += 1
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    return count
