"""xalign: a small decoder transformer and everything that aligns it with preferences.

Names are imported on first use (PEP 562), so that `import xalign` costs nothing and `--help` never loads torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "TransformerWrapper": "nn.transformer",
    "Decoder": "nn.transformer",
    "AutoregressiveWrapper": "nn.autoregressive",
    "RewardModel": "checkpoint",
    "DPO": "dpo",
    "load_pretrained": "checkpoint",
    "save_pretrained": "checkpoint",
}
_MODULES = {"sampling": "sampling", "losses": "losses", "logprobs": "logprobs", "stopping": "stopping",
            "toyworld": "data.toyworld"}

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"xalign.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"xalign.{_MODULES[name]}")
    raise AttributeError(f"module 'xalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
