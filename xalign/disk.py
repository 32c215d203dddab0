"""Writing files: whole or not at all, and with a name when the disk is full."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file whole or not at all: a temporary neighbour is renamed onto it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path), open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
