"""Engines behind one call: `backends.open(spec)` (see `xalign.backends.opening`), then `generate`, `stream`, `refresh`."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "open":
        return import_module("xalign.backends.opening").open
    raise AttributeError(f"module 'xalign.backends' has no attribute {name!r}")
