"""Tables of the benchmarks, as markdown."""

from typing import Any


def judged(value: float, asked: float | None, form: str, at_least: bool = True) -> str:
    """The value, and where one is asked for, that and whether it is missed."""
    if asked is None:
        return form.format(value)
    missed = value < asked if at_least else value > asked
    return f"{form.format(value)} ({'MISSED, ' if missed else ''}asked {form.format(asked)})"


def thousands(vocab: int) -> str:
    return f"{vocab // 1000}k" if vocab >= 1000 else str(vocab)


def table(header: list[str], rows: list[list[Any]]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def parity(found: dict[str, str]) -> None:
    print("\nThe same tokens: " + "; ".join(f"{who}, {what}" for who, what in found.items()) + ".")
