"""Writing files: whole or not at all, by one process at a time, and with a name when the disk is full."""

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from xalign.errors import CheckpointError

LOCK = ".lock"


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Name `path` in an `OSError` of the block: the system names none when the disk is full.

    Of torch, which tells of a place in its source instead, the error of the file that it was given is raised.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        cause.filename = cause.filename or str(path)
        raise cause from None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, there whole or not at all: a temporary neighbour is renamed onto `path` when the block ends."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def lock(folder: Path) -> IO[str]:
    """Hold a folder, which is made where it isn't there, for this process as long as the file that is given stays open.

    Raises `CheckpointError` where another process holds it, or where it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = open(folder / LOCK, "w")  # noqa: SIM115  held, hence locked, until the caller closes it
    except OSError as error:
        raise CheckpointError(f"{folder} can't be written ({error.strerror})") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise CheckpointError(f"{folder} is in use by another process, allowed is one at a time") from None
    return held


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any], ignored: Collection[str] = ()) -> None:
    """Raise `CheckpointError` for the first setting by which a folder's results would become a mixture."""
    for key in sorted({*before, *now} - {*ignored}):
        if before.get(key) != now.get(key):
            raise CheckpointError(
                f"{folder} was made with {key} = {before.get(key)!r:.200}, now it is {now.get(key)!r:.200}: allowed is the "
                "same configuration (it resumes), another --output-dir, or --overwrite")
