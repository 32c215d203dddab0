"""Where messages come from: a person at a terminal, with readline where there is one, or the lines of a script.

And what fits into its columns.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any

from xalign.display import Paint
from xalign.errors import DataError
from xalign.prepare import say

QUOTES = '"""'
NARROW = 60  # columns below which two replies stand one under the other
LINES = 1000  # lines of history that are kept


class Console:
    """Gives messages one by one. With a `person` there is editing, completion and a history that lasts, else no prompt."""

    def __init__(self, history: str | None, commands: Sequence[str], settings: Sequence[str]):
        self.person = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        self.line = 0
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        self.history = Path(os.path.expanduser(history or f"{state}/xalign/history"))
        self.commands, self.settings = list(commands), list(settings)
        self.readline: Any = None
        self.before = 0
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "Console":
        if not self.person:
            return self
        # the history is kept, and the terminal becomes what it was
        self.handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            import readline
        except ImportError:  # not every Python has it
            return self
        self.readline = readline
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
        readline.clear_history()
        try:
            readline.read_history_file(self.history)
        except FileNotFoundError:
            pass
        except OSError as error:
            say(f"warning: {self.history}: {error.strerror or 'not a history'}, what is typed is not kept")
        self.before = readline.get_current_history_length()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.readline is None:
            return
        self.readline.set_completer(None)
        new = self.readline.get_current_history_length() - self.before
        try:
            if new > 0:  # of two that talk at once neither loses the other's
                self.history.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self.history, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                self.readline.set_history_length(LINES)
                self.readline.append_history_file(new, self.history)
        except OSError as failed:
            say(f"warning: {self.history}: {failed.strerror}, what was typed is not kept")

    def _complete(self, text: str, state: int) -> str | None:
        line = self.readline.get_line_buffer()[: self.readline.get_begidx()]
        known = self.commands if not line.strip() else self.settings if line.split() == ["/set"] else []
        found = [name + " " for name in known if name.startswith(text)] if text or line else []
        return found[state] if state < len(found) else None

    def read(self, prompt: str) -> str | None:
        """A line without its end, None behind the last."""
        self.line += 1
        try:
            if self.person:
                return input(prompt)
            raw = b"" if sys.stdin is None else sys.stdin.buffer.readline()
            return raw.decode("utf-8").rstrip("\r\n") if raw else None
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from None

    def message(self, paint: Paint) -> tuple[str | None, bool]:
        """The next message, None behind the last; and whether it stood in triple quotes, and so is no command."""
        line = self.read(self._prompt(">>> ", paint))
        if line is None or not line.lstrip().startswith(QUOTES):
            return line, False
        rest = line.lstrip()[len(QUOTES) :]
        if rest.rstrip().endswith(QUOTES):
            return rest.rstrip()[: -len(QUOTES)], True
        lines, began = [rest] if rest else [], self.line
        while (more := self.read(self._prompt("... ", paint))) is not None:
            if more.rstrip().endswith(QUOTES):
                last = more.rstrip()[: -len(QUOTES)]
                return "\n".join([*lines, last] if last else lines), True
            lines.append(more)
        self.line = began
        raise DataError(f"{QUOTES} begins a message that doesn't end")

    def _prompt(self, text: str, paint: Paint) -> str:
        """With colours in marks, so that readline knows how wide it is."""
        if not paint.on:
            return text
        start, _, end = paint(text, "bold").partition(text)
        return f"\001{start}\002{text}\001{end}\002" if self.readline else start + text + end


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def columns() -> int:
    return max(20, shutil.get_terminal_size((80, 24)).columns)


def table(rows: list[tuple[str, str]]) -> None:
    """Names and values, wrapped to the terminal; on a narrow one a value stands below its name."""
    width = columns()
    indent = max(len(name) for name, _ in rows) + 2
    beside = width - indent >= 30
    for name, value in rows:
        if not beside:
            print(textwrap.shorten(name, width))
        lines = wrapped(value, width - indent if beside else width - 2)
        for i, line in enumerate(lines):
            print((f"{name if i == 0 else '':{indent}}" if beside else "  ") + line)


def cells(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Mn", "Me")
               else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at blanks where there are some."""
    lines: list[str] = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in re.findall(r"\s+|\S+", paragraph):
            if cells(line + word.rstrip()) > width and line.strip():
                lines.append(line.rstrip())
                line, word = "", word.lstrip()
            while cells(word) > width:
                n = next(i for i in range(1, len(word) + 1) if cells(word[: i + 1]) > width)
                lines.append(line + word[:n])
                line, word = "", word[n:]
            line += word
        lines.append(line.rstrip())
    return lines


def side_by_side(parts: list[tuple[str, str, str]], width: int, paint: Paint) -> list[str]:
    """Texts, each with a head and a foot, in columns; below `NARROW` one under the other."""
    several = len(parts) if width >= NARROW else 1
    room = (width - 3 * (several - 1)) // several
    blocks = []
    for head, text, foot in parts:
        head = head if cells(head) <= room else f"{head[:4]}…{head[5 - room :]}"  # a path's end tells more
        block = [(head, ["bold"])] + [(line, []) for line in wrapped(text.strip("\n"), room)]
        blocks.append(block + ([(foot, ["dim"])] if foot else []))
    if several == 1:
        return [paint(line, *style) for block in blocks for line, style in block]
    # the feet stand in one line
    most = max(map(len, blocks))
    feet = [block[-1:] if foot else [] for block, (_, _, foot) in zip(blocks, parts, strict=True)]
    empty: tuple[str, list[str]] = ("", [])
    blocks = [block[: len(block) - len(foot)] + [empty] * (most - len(block)) + foot
              for block, foot in zip(blocks, feet, strict=True)]
    return [" │ ".join(paint(line, *style) + " " * (room - cells(line)) for line, style in row).rstrip()
            for row in zip_longest(*blocks, fillvalue=empty)]
