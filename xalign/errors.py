"""The errors that xalign raises for a user's mistake; the programs print them as one line and exit with status 2.

Each inherits the builtin that a caller would expect, so that library code can be wrapped in plain
`except ValueError` as well. Broken invariants of our own are `assert`s, never one of these.
"""

import difflib
from collections.abc import Iterable


class XalignError(Exception):
    """Something outside xalign (data, a file, a flag) is wrong; the message says what and what is allowed."""

    exit_status = 2


class DataError(XalignError, ValueError):
    """A record, dataset or text can't be used; the message starts with `path:line` where there is one."""


class ConfigError(XalignError, ValueError):
    """A setting has a value that is not allowed."""


class CheckpointError(XalignError, OSError):
    """A checkpoint or run folder can't be read, written or used."""


class Diverged(XalignError, ArithmeticError):
    """Training met a loss or gradient that is not finite; the message names the step and the last good checkpoint."""

    exit_status = 1


class NotFinite(XalignError, ArithmeticError):
    """Scores are not finite numbers; the message says how many, and what could be computed is written."""

    exit_status = 1


class RunsFailed(XalignError):
    """Some runs of a grid failed; the message says which, and the report has the others."""

    exit_status = 1


class Interrupted(XalignError):
    """A signal stopped the run after its state was saved; the message says how to go on."""

    exit_status = 130


class ProcessLost(XalignError):
    """Another process of a run by torchrun has ended; the message says how to go on."""

    exit_status = 1


class UnknownOption(XalignError, TypeError):
    """A keyword argument that does not exist."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Give `, did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def reject_unknown(where: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise `UnknownOption` for the first of `unknown`, naming its nearest neighbour among `known`."""
    known = list(known)
    for name in unknown:
        raise UnknownOption(f"{where} has no option {name!r}{nearest(name, known)}")
