"""What every engine takes and gives: `generate(prompts, params) -> completions`."""

import math
from dataclasses import dataclass

from xalign.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How to draw completions. `temperature` 0 is greedy; `top_k`, `top_p`, `min_p` None keep all tokens.

    `n` completions a prompt; `stop` strings end a completion and are no part of it; `beams` > 1 searches instead.
    A `seed` makes a prompt's draws depend on its index alone, whatever the batches. Raises `ConfigError`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    n: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {"temperature": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (1e-6, math.inf),
                  "top_k": (1, math.inf), "max_new_tokens": (0, math.inf), "n": (1, math.inf), "beams": (1, math.inf)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                allowed = f"in [{low}, {high}]" if high == 1 else f">= {low}"
                raise ConfigError(f"{name} is {value}, allowed is a number {allowed}")
        if self.beams > 1:
            plain = SamplingParams(max_new_tokens=self.max_new_tokens)
            for name in ("top_k", "top_p", "min_p", "repetition_penalty", "n", "stop", "seed"):
                if getattr(self, name) != getattr(plain, name):
                    raise ConfigError(f"beams is {self.beams} and {name} is {getattr(self, name)}, allowed is one of them")
            if self.temperature not in (0, 1):
                raise ConfigError(f"beams is {self.beams} and temperature is {self.temperature}, allowed is one of them")


@dataclass(frozen=True)
class Completion:
    """One completion: its text without the end, all its token ids, "stop" or "length", and their summed logps (nats)."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logps: float | None = None
