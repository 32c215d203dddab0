"""What every engine takes and gives: `generate(prompts, params) -> completions`."""

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from xalign.data.records import Text
from xalign.errors import ConfigError, DataError


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
    """One completion: its text without the end, all its token ids, how it ended, and their summed logps (nats).

    `finish_reason` is "stop", "length", or "error": then there is no text, and `error` says why in a line. `token_ids` is empty
    and `logps` None where an engine doesn't tell. `seconds` passed from the request until this one ended.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logps: float | None = None
    seconds: float | None = None
    model: str | None = None
    error: str | None = None


def failure(error: str, model: str | None = None, seconds: float | None = None) -> Completion:
    """What stands in the place of a completion that can't be had."""
    return Completion("", (), "error", None, seconds, model, " ".join(error.split()))


Done = Callable[[int, list[Completion]], None]


class Backend(ABC):
    """What every engine offers. `name` is the model's; `supports` are the fields of `SamplingParams` that it honours.

    `unsupported` says what a request is that it can't honour: an "error" before anything runs, or a named warning ("warn").
    `template` is a chat template (jinja) in the place of the model's own.
    """

    name: str = ""
    supports: frozenset[str] = frozenset(SamplingParams.__dataclass_fields__)
    unsupported: str = "error"
    template: str | None = None
    ended: bool = True
    """Whether the newest stream came to its own end, not to its length; true where an engine doesn't tell."""

    @abstractmethod
    def generate(self, prompts: Sequence[Text], params: SamplingParams, progress: str = "", *,
                 seeds: Sequence[int] | None = None, done: Done | None = None) -> list[list[Completion]]:
        """`params.n` completions of each prompt (text, or messages), in the prompts' order; a prompt that can't be answered
        has an "error" in their place, and the rest goes on.

        `progress` names a progress bar. `seeds`, one a prompt, take the place of `params.seed` and the prompt's index. `done`
        is told a prompt's index and completions as soon as they are there, in any order.
        """

    @abstractmethod
    def stream(self, prompt: Text, params: SamplingParams) -> Iterator[str]:
        """The text of one completion in pieces as they come; stop strings and unfinished characters never show."""

    def refresh(self, checkpoint: str) -> None:
        """Take the weights of another checkpoint (of the same shape), for training that samples as it goes."""
        raise ConfigError(f"{self.name}: this backend can't take other weights; allowed are native, transformers and vllm")

    def close(self) -> None:  # noqa: B027  there may be nothing
        """Give back what the engine holds."""

    def checked(self, params: SamplingParams) -> SamplingParams:
        """The same params, without what this engine doesn't honour (a warning each), or `ConfigError` (see `unsupported`)."""
        default = SamplingParams()
        for name in SamplingParams.__dataclass_fields__:
            value = getattr(params, name)
            if name not in self.supports and value != getattr(default, name):
                self.refuse(name, f"is {value}, which this backend doesn't honour; it knows {', '.join(sorted(self.supports))}")
                params = dataclasses.replace(params, **{name: getattr(default, name)})
        return params

    def refuse(self, name: str, why: str) -> None:
        """Tell of a parameter that isn't honoured, as `unsupported` says."""
        if self.unsupported == "error":
            raise ConfigError(f"{self.name}: {name} {why} (unsupported: warn goes on without it)")
        print(f"warning: {self.name}: {name} {why}; it goes on without it", file=sys.stderr)


def fit(prompt_tokens: int, params: SamplingParams, context: int | None) -> int:
    """How many tokens of a prompt are kept, its newest, so that its answer has room in a context of so many.

    Room is for `max_new_tokens`, and for half of the context at most. Raises `DataError` for a prompt longer than the context.
    """
    if context is None:
        return prompt_tokens
    if prompt_tokens > context:
        raise DataError(f"the prompt has {prompt_tokens} tokens, allowed is up to the model's {context}")
    return min(prompt_tokens, max(1, context - min(params.max_new_tokens, context // 2)))
