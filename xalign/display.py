"""What a person looks at in a terminal: colours, numbers in a table, histograms, and text with its tokens and mask.

Colours are only paint: whatever they say, the characters say as well. Text from outside is made `visible` first, so that
no dataset can move the cursor or colour the screen.
"""

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from xalign.data.records import Text
from xalign.tokenizers import Tokenizer

ColorMode = Literal["auto", "always", "never"]
_CODES = {"bold": 1, "dim": 2, "underline": 4, "inverse": 7, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
_BLOCKS = " ▏▎▍▌▋▊▉█"


class Paint:
    """Puts ANSI colours around text, or doesn't: `auto` asks the terminal and NO_COLOR (https://no-color.org)."""

    def __init__(self, mode: ColorMode = "auto"):
        terminal = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        terminal = terminal and not os.environ.get("NO_COLOR")
        self.on = terminal if mode == "auto" else mode == "always"

    def __call__(self, text: str, *styles: str) -> str:
        """`text` in `styles`, each line by itself, since pagers forget a colour at the end of a line."""
        if not self.on or not styles:
            return text
        start = "\x1b[" + ";".join(str(_CODES[style]) for style in styles) + "m"
        return "\n".join(f"{start}{line}\x1b[0m" if line else line for line in text.split("\n"))


def visible(text: str) -> str:
    """The text with all that a terminal would obey, and all that can't be seen, spelt out; line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "→" if c == "\t" else ascii(c)[1:-1] for c in text)


def excerpt(text: str, limit: int = 3000) -> str:
    """At most about `limit` characters of a text: its beginning and its end."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def show_text(text: Text, paint: Paint, *styles: str) -> str:
    """A prompt or completion for a person: text, or its turns, each with its role in front; `styles` are the assistant's."""
    if isinstance(text, str):
        return paint(visible(excerpt(text)), *styles)
    turns = ((m.role, visible(excerpt(m.content)), styles if m.role == "assistant" else ["dim"]) for m in text)
    return "\n".join(paint(f"{role}:", "cyan") + " " + paint(content, *style) for role, content, style in turns)


def show_tokens(tokenizer: Tokenizer, ids: Sequence[int], scored: Sequence[bool], paint: Paint, limit: int = 800) -> str:
    """The text of `ids` as the model gets it: unscored dim, scored green, special tokens inverse, others underlined by turns.

    Without colours scored tokens stand between ⟦ and ⟧. What is no text by itself is spelt in bytes (`\\xf0`), a line
    end is shown as ↵. Of more than `limit` tokens the middle is left out.
    """
    names = {id: text for text, id in tokenizer.special_tokens.items()}
    half = limit // 2
    left_out = range(half, len(ids) - half) if len(ids) > limit else range(0)
    shown: list[str] = []
    pending, first, inside = b"", 0, False
    for i, (id, score) in enumerate(zip(ids, scored, strict=True)):
        if i in left_out:
            if i == left_out.start:
                shown.append(f" … {len(left_out):,} tokens … ")
            continue
        if not paint.on and score != inside:
            shown.append("⟦" if score else "⟧")
        inside = score
        if id in names:
            shown.append(paint(visible(names[id]), "inverse", *(["green"] if score else ["dim"])))
            continue
        pending, first = pending + tokenizer.decode_bytes([id]), first if pending else i
        last = i + 1 == len(ids) or i + 1 in left_out or ids[i + 1] in names or scored[i + 1] != score
        try:
            piece = visible(pending.decode("utf-8"))
        except UnicodeDecodeError:
            if len(pending) < 4 and not last:
                continue  # the rest of the character is in the next token
            piece = pending.decode("utf-8", "backslashreplace")
        styles = (["green"] if score else ["dim"]) + ["underline"] * (first % 2)
        shown.append(paint(piece.replace("\n", "↵\n"), *styles))
        pending = b""
    return "".join(shown) + "⟧" * (inside and not paint.on)


def table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], paint: Paint) -> list[str]:
    """Lines of a table: its title and heads, then a name and numbers a row."""
    cells = [(name, [f"{value:,.0f}" for value in values]) for name, values in rows]
    name_width = max(len(title), *(len(name) for name, _ in cells))
    widths = [max(len(head), *(len(row[i]) for _, row in cells)) for i, head in enumerate(heads)]
    lines = [paint(f"{title:{name_width}}", "bold")
             + paint("".join(f"  {h:>{w}}" for h, w in zip(heads, widths, strict=True)), "dim")]
    for name, row in cells:
        lines.append(f"{name:{name_width}}" + "".join(f"  {c:>{w}}" for c, w in zip(row, widths, strict=True)))
    return lines


def histogram(series: Mapping[str, tuple[np.ndarray, str]], paint: Paint, bins: int = 12, width: int = 28) -> list[str]:
    """Lines of a histogram of whole numbers; `series` gives values and colour by name, side by side over the same bins.

    Bins are 1, 2 or 5 times a power of ten wide, so that about 99 % lie in `bins` of them; the last one takes the rest.
    """
    values = np.concatenate([numbers for numbers, _ in series.values()])
    if not len(values):
        return []
    step, least, far, largest = 1, int(values.min()), int(np.percentile(values, 99)), int(values.max())
    while far // step - least // step >= bins:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    low = least // step
    count = min(bins, largest // step - low + 1)
    counts = {name: np.bincount(np.minimum(numbers // step - low, count - 1).astype(np.int64), minlength=count).tolist()
              for name, (numbers, _) in series.items()}
    most = max(max(column) for column in counts.values())
    digits = max(len(f"{number:,}") for column in counts.values() for number in column)
    edges = [f"{(low + i) * step:,}" for i in range(count + 1)]
    label = max(len(f"{a} – {b}") for a, b in itertools.pairwise(edges))
    lines = []
    if len(series) > 1:
        gap = width + digits + 4
        lines = [" " * (label + 2) + "".join(paint(f"{name:{gap}}", color) for name, (_, color) in series.items()).rstrip()]
    for i in range(count):
        more = i == count - 1 and largest >= (low + count) * step
        parts = [f"{edges[i]} –" + (" …" if more else f" {edges[i + 1]}")]
        line = f"{parts[0]:>{label}}  "
        for name, (_, color) in series.items():
            bar = _bar(counts[name][i] / most, width)
            line += paint(f"{bar:{width}}", color) + f" {counts[name][i]:>{digits},}   "
        lines.append(line.rstrip())
    return lines


def _bar(share: float, width: int) -> str:
    """A bar in eighths of a character; whatever isn't zero can be seen."""
    eighths = max(round(share * width * 8), 1 if share else 0)
    return "█" * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")
