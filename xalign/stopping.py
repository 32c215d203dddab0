"""Where a text ends: stop-token sequences on tensors, and stop strings on text that arrives in pieces."""

import codecs
from collections.abc import Sequence

import torch
from torch import Tensor

from xalign.errors import ConfigError

UNFINISHED = "\ufffd"
"""What decoders write for the bytes of a character that is not whole: dropped where a text was cut off at its length."""


class Endings:
    """Tells which of m sequences of token ids a text ends with, in a fixed number of operations; no value is read."""

    def __init__(self, sequences: Sequence[Sequence[int]], device: torch.device):
        n = max(map(len, sequences), default=0)
        rows = [[0] * (n - len(s)) + [int(t) for t in s] for s in sequences]
        self.ids = torch.tensor(rows, dtype=torch.long, device=device).reshape(len(rows), n)
        self.sizes = torch.tensor([len(s) for s in sequences], dtype=torch.long, device=device)
        self.columns = torch.arange(-n, 0, device=device)
        self.free = self.columns < -self.sizes[:, None]  # the columns before a sequence shorter than the longest

    def __call__(self, text: Tensor, lengths: Tensor, within: Tensor) -> Tensor:
        """True where the newest `within` (b,) of the `lengths` (b,) tokens of a row of `text` (b, w) end so; (b, m)."""
        last = text.gather(1, (lengths[:, None] + self.columns).clamp(min=0))
        return ((last[:, None] == self.ids) | self.free).all(-1) & (self.sizes <= within[:, None])


class StopTokens:
    """Tells which rows have just ended, by an end token or by a sequence of token ids.

    `eos` is an id or several; `stop` holds id sequences. Only generated tokens are looked at, so that
    neither an end token in the prompt nor a sequence that begins in it ends a row.
    """

    def __init__(self, eos: int | Sequence[int] | Tensor | None, stop: Sequence[Sequence[int]] | None, device: torch.device):
        if any(isinstance(s, (int, str)) for s in stop or []):
            raise ConfigError(f"stop is {stop!r}, allowed is a list of token-id sequences")
        if any(not len(s) for s in stop or []):
            raise ConfigError("stop holds an empty sequence, allowed are sequences of at least one token id")
        self.eos = torch.as_tensor([] if eos is None else eos, dtype=torch.long, device=device).reshape(-1)
        self.endings = Endings([*self.eos[:, None].tolist(), *(stop or [])], device)

    def __bool__(self) -> bool:
        return len(self.endings.sizes) > 0

    def hits(self, text: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Tensor:
        """True where a row of `text` (b, w), `lengths` (b,) tokens of which `prompt_lengths` (b,) were given, ended; (b,)."""
        return self.endings(text, lengths, lengths - prompt_lengths).any(-1)


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
