"""Where a text ends: stop-token sequences on tensors, and stop strings on text that arrives in pieces."""

import codecs
from collections.abc import Sequence

import torch
from torch import Tensor

from xalign.errors import ConfigError


class StopTokens:
    """Tells which rows have just ended, by an end token or by a sequence of token ids.

    `eos` is an id or several; `stop` holds id sequences. Only generated tokens are looked at, so that
    neither an end token in the prompt nor a sequence that begins in it ends a row.
    """

    def __init__(self, eos: int | Sequence[int] | Tensor | None, stop: Sequence[Sequence[int]] | None, device: torch.device):
        if any(isinstance(s, (int, str)) for s in stop or []):
            raise ConfigError(f"stop is {stop!r}, allowed is a list of token-id sequences")
        sequences = [[int(t) for t in s] for s in (stop or [])]
        if any(not s for s in sequences):
            raise ConfigError("stop holds an empty sequence, allowed are sequences of at least one token id")
        self.eos = torch.as_tensor([] if eos is None else eos, dtype=torch.long, device=device).reshape(-1)
        self.sequences = [torch.tensor(s, dtype=torch.long, device=device) for s in sequences]

    def __bool__(self) -> bool:
        return bool(len(self.eos) or self.sequences)

    def hits(self, generated: Tensor) -> Tensor:
        """True where a row of `generated` (b, t), t >= 1, ends with a stop; (b,)."""
        hit = torch.isin(generated[:, -1], self.eos)
        for s in self.sequences:
            if len(s) <= generated.shape[1]:
                hit = hit | (generated[:, -len(s) :] == s).all(-1)
        return hit


class StopStrings:
    """Cuts a text that arrives in pieces before the first of `stops`, also when a stop straddles pieces.

    `push` gives the text that is safe to show: never a part of a stop, and as early as possible.
    The stop that is complete first wins, of two complete at once the longer one, so that it makes no difference
    in which pieces the text arrives. Then `stopped` is that string and everything further is dropped.
    """

    def __init__(self, stops: Sequence[str] = ()):
        if isinstance(stops, str) or any(not isinstance(s, str) or not s for s in stops):
            raise ConfigError(f"stop is {stops!r}, allowed is a list of non-empty strings")
        self.stops = tuple(stops)
        self.stopped: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        held = self._held + text
        found = min(((held.find(s) + len(s), held.find(s), s) for s in self.stops if s in held), default=None)
        if found is not None:
            self.stopped, self._held = found[2], ""
            return held[: found[1]]
        keep = next((i for i in range(len(held)) if any(s.startswith(held[i:]) for s in self.stops)), len(held))
        self._held = held[keep:]
        return held[:keep]

    def flush(self) -> str:
        """Give what was held back, once no further text comes."""
        held, self._held = self._held, ""
        return held


class Utf8Stream:
    """Decodes bytes that arrive in pieces; the bytes of an unfinished character are held back."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
