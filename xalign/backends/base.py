"""What every engine takes and gives: `generate(prompts, params) -> completions`."""

import math
from dataclasses import dataclass

from xalign.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How to draw; without any of these: temperature 1, unfiltered. Raises `ConfigError` for values that make no sense.

    A `seed` makes a prompt's draws depend on its index alone, whatever the batches.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens with this mass."""
    min_p: float | None = None
    """Keep tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens seen; 1 changes nothing."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens written already."""
    frequency_penalty: float = 0.0
    """Subtract this, times how often, from the logits of tokens written already."""
    min_new_tokens: int = 0
    """Tokens of a completion before its end may come."""
    max_new_tokens: int = 256
    """Length of a completion at most."""
    n: int = 1
    """Completions a prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion (and are no part of it)."""
    seed: int | None = None
    """Seed of the draws; none: another text each time."""
    beams: int = 1
    """Beam search of this width instead of sampling."""
    length_penalty: float = 1.0
    """Exponent of the length in a beam's score."""

    def __post_init__(self) -> None:
        limits = {"temperature": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (1e-6, math.inf),
                  "presence_penalty": (-1e30, math.inf), "frequency_penalty": (-1e30, math.inf), "top_k": (1, math.inf),
                  "max_new_tokens": (0, math.inf), "min_new_tokens": (0, math.inf), "n": (1, math.inf), "beams": (1, math.inf)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and value < math.inf):
                allowed = f"in [{low}, {high}]" if high == 1 else f">= {low}"
                raise ConfigError(f"{name} is {value}, allowed is a number {allowed}")
        if self.beams > 1:
            plain = SamplingParams(max_new_tokens=self.max_new_tokens)
            for name in ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
                         "min_new_tokens", "n", "stop", "seed"):
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
