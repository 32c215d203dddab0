"""Files to raw records: `(path:N, dict)` from JSON lines, JSON, text and parquet, one record in memory at a time.

A file is known by its name: .jsonl, .json and .txt (each also with .gz) or .parquet; `owner/name` is a dataset of the
Hugging Face hub. N counts from 1: lines of .jsonl and .txt, records of a .json list, rows of a parquet. Of a parquet
only one row group's wanted columns are in memory, of a .json list (unless it is JSON lines by another name) all.
What the records mean is `data.shapes`' part. Anything wrong is a `DataError` that begins with the file.
"""

import codecs
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from xalign.errors import DataError

Path = str | os.PathLike[str]
OnBad = Callable[[str, DataError], None]
KINDS = (".jsonl", ".json", ".txt", ".parquet")
ALLOWED = ".jsonl, .json, .txt (each also with .gz), .parquet"
LINE_LIMIT = 64 * 2**20
"""Bytes of a line at most: a longer one is a file of another kind, or a broken one, and is not read into memory."""
_ROWS = 64  # rows of a parquet that become Python objects at once


def raw_records(path: Path, wanted: Collection[str] = (),
                on_bad: OnBad | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `path:N` and the object of every record of a file, or of every file of a hub dataset.

    Of a parquet only the columns of `wanted` are read (all, if it is empty); the value of the others is None. A .json
    file may hold a single record, if it has one of `wanted`. `on_bad` is told the place and the error of a line that is
    no JSON, and of a record that is no object, and the next ones are read; without it they are raised.
    """
    name = os.fspath(path)
    found = False

    def bad(where: str, error: DataError) -> None:
        nonlocal found
        found = True
        if on_bad is None:
            raise error
        on_bad(where, error)

    for file in data_files(name):
        for number, value in _values(file, wanted, bad):
            where = f"{file}:{number}"
            if not isinstance(value, dict):
                bad(where, DataError(f"{where}: a record must be a JSON object, not {type(value).__name__}"))
                continue
            found = True
            yield where, value
    if not found:
        raise DataError(f"{name}: the file holds no record")


def keys_of(record: dict[str, Any]) -> str:
    """The keys of a record in words, for an error's line."""
    return f"the keys {', '.join(map(repr, record))}"[:200] if record else "no keys"


def data_files(path: Path) -> list[str]:
    """The file itself, or those of the hub dataset `owner/name`, for which the network is asked."""
    name = os.fspath(path)
    if os.path.isdir(name):
        raise DataError(f"{name}: can't be read (Is a directory); allowed: a file {ALLOWED}")
    if os.path.exists(name) and not os.path.isfile(name):  # a pipe would be waited for, and can't be read twice
        raise DataError(f"{name}: can't be read (a pipe or device); allowed: a file {ALLOWED}")
    if _kind(name) in KINDS:
        return [name]
    if os.path.exists(name):
        raise DataError(f"{name}: a file of unknown kind; allowed: {ALLOWED}")
    from xalign import hub

    if hub.is_hub_name(name.partition(":")[0]):
        return [os.fspath(file) for file in hub.dataset_files(name)]
    raise DataError(f"{name}: can't be read (No such file or directory)")


def _kind(name: str) -> str:
    lower = name.lower()
    return os.path.splitext(lower.removesuffix(".gz"))[1] if not lower.endswith(".parquet.gz") else ".gz"


def _values(name: str, wanted: Collection[str], bad: OnBad) -> Iterator[tuple[int, Any]]:
    """Yield line, record or row numbers and what is there."""
    kind = _kind(name)
    if kind == ".parquet":
        yield from _parquet(name, wanted)
    elif kind == ".json":
        yield from _json(name, wanted, bad)
    else:
        lines = ((number, line) for number, line in _lines(name) if line and not line.isspace())
        if kind == ".txt":
            yield from ((number, {"text": line.rstrip("\r\n")}) for number, line in lines)
        else:
            yield from _json_lines(lines, name, bad)


def _json_lines(lines: Iterable[tuple[int, str]], name: str, bad: OnBad) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        try:
            value = _parse(line, name, number)
        except DataError as error:
            bad(f"{name}:{number}", error)
        else:
            yield number, value


def _json(name: str, wanted: Collection[str], bad: OnBad) -> Iterator[tuple[int, Any]]:
    """A list of records, `{"data": [...]}`, one record, or JSON lines, which are common under the name .json as well."""
    lines = ((number, line) for number, line in _lines(name) if line.strip())
    head = list(itertools.islice(lines, 2))
    if len(head) == 2 and _is_whole(head[0][1]):
        yield from _json_lines(itertools.chain(head, lines), name, bad)
        return
    del lines, head
    text = "".join(line for _, line in _lines(name))
    value = _parse(text, name, 1) if text.strip() else []
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict) and not value.keys().isdisjoint(wanted):
        value = [value]
    if not isinstance(value, list):
        keys = keys_of(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(f'{name}:1: holds {keys}; allowed: a list of records, {{"data": [...]}}, or one record')
    yield from enumerate(value, 1)


def _is_whole(line: str) -> bool:
    """Whether a line is a JSON value by itself."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, name: str, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass  # said again below, without the end of the line, which is no line of its own
    except RecursionError:
        raise DataError(f"{name}:{number}: not usable JSON: nested too deeply") from None
    except ValueError:  # Python's own limit
        raise DataError(f"{name}:{number}: not usable JSON: a whole number of thousands of digits") from None
    try:
        return json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        where = f"{name}:{number + error.lineno - 1}"
        raise DataError(f"{where}: not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a UTF-8 file, gzipped if its name says so; only \\n ends a line."""
    number = 0
    try:
        with open(name, "rb") as plain:
            # a GzipFile alone reads its lines in Python, a BufferedReader around it in C
            file = io.BufferedReader(gzip.GzipFile(fileobj=plain), 2**17) if name.lower().endswith(".gz") else plain
            while raw := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(raw) > LINE_LIMIT:
                    raise DataError(f"{name}:{number}: a line of more than {LINE_LIMIT >> 20} MB; allowed: up to that")
                yield number, (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except EOFError:
        raise DataError(f"{name}:{number + 1}: the gzip file is cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}:{number + 1}: not a sound gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error.strerror or error})") from None


def _parquet(name: str, wanted: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet as plain Python objects, one row group's wanted columns in memory at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{name}: reading parquet needs pyarrow: pip install 'xalign[parquet]'") from None

    number = 0
    try:
        # without pre-buffering and threads a row group is read page by page, not whole
        with parquet.ParquetFile(name, pre_buffer=False, buffer_size=2**20) as file:
            columns = file.schema_arrow.names
            used = [column for column in columns if not wanted or column in wanted]
            if wanted and not used:
                raise DataError(f"{name}: none of the columns {', '.join(map(repr, columns))}"[:300]
                                + f" is one that is read; allowed: {', '.join(wanted)}")
            if twice := [column for column in used if columns.count(column) > 1]:
                raise DataError(f"{name}: two columns are called {twice[0]!r}; allowed: each name once")
            empty = dict.fromkeys(columns)
            for batch in file.iter_batches(_ROWS, columns=used, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, empty | row
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{number + 1}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except (pyarrow.ArrowException, OSError) as error:
        where, what = (f"{name}:{number + 1}" if number else name), " ".join(str(error).split())
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{name}: can't be read (No such file or directory)") from None
        raise DataError(f"{where}: not a sound parquet file, perhaps cut short ({what[:150]})") from None
