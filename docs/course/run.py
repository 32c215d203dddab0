"""Run pages of the course: each one's code from top to bottom, in a namespace of its own.

    .venv/bin/python docs/course/run.py docs/course/3-dpo.md       # prints what the page prints, and writes 3-dpo.png here

Where a ```text block follows a ```python block directly, it is what the block prints: words must agree, numbers to `NEAR` or
two units of the last digit, since another CPU rounds otherwise.
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
NEAR = 0.05


def blocks(text: str) -> list[tuple[int, str, str | None]]:
    """The code blocks of a page: the line that each begins at, its code, and what it should print (None: anything)."""
    return [(text.count("\n", 0, found.start(1)), found[1], found[2]) for found in BLOCK.finditer(text)]


def agrees(told: str, printed: str) -> bool:
    """Whether what a block printed is what the page tells."""
    pairs = list(zip(NUMBER.findall(told), NUMBER.findall(printed), strict=False))
    close = all(abs(float(a) - float(b)) <= max(NEAR * abs(float(a)), "." in a and 2.01 * 10.0 ** -len(a.partition(".")[2]))
                for a, b in pairs)
    return NUMBER.sub("#", told).split() == NUMBER.sub("#", printed).split() and close


def run(page: Path) -> None:
    """Run a page's code; its picture goes into the working directory. Raises `AssertionError` where it prints another thing."""
    names = {"__name__": page.stem}
    for line, code, told in blocks(page.read_text(encoding="utf-8")):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile("\n" * line + code, str(page), "exec"), names)  # a traceback then names the page's line
        sys.stdout.write(shown.getvalue())
        if told is not None and not agrees(told, shown.getvalue()):
            raise AssertionError(f"{page}:{line}: the page tells\n{told}\nand its code printed\n{shown.getvalue()}")


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    for name in sys.argv[1:]:
        run(Path(name))
