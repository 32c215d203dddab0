"""The draw of a decoding loop, and the penalties before it, at the cost of the tokens that survive.

The draw is what `sampling`'s operations give one after the other. Top-k, top-p and min-p keep few tokens, so only the few
largest logits are looked at, and noise is made for those alone. Where they don't settle a row (a nucleus wider than
`NUCLEUS`, a tie at the border) that row takes the long way; which way a row takes depends on its own logits only. The short
way reads a flag on the host, which costs nothing on a CPU; elsewhere every row takes the long way, which never does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xalign import sampling
from xalign.errors import ConfigError
from xalign.sampling import NEG_INF, ROUNDING

BLOCK, NUCLEUS = 64, 512
ARGUMENT = {"temperature": "t", "top_k": "k", "top_p": "thres", "min_p": "min_p"}
UNCHANGED = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}


class Penalties:
    """What changes the logits before the draw, by the text so far: logits (b, v), tokens (b, n) -> logits.

    In this order, transformers': `logit_bias` (a dict of token ids, or (v,)), repetition penalty (prompt included), presence
    and frequency penalties (generated tokens alone), `bad_words` (id sequences that are never completed), and no `eos`
    before `min_new_tokens`. Bad values are told at once. Raises `ConfigError` where they leave a row no token.
    """

    def __init__(self, v: int, device: torch.device, eos: Tensor, *, repetition: Any = 1.0, presence: Any = 0.0,
                 frequency: Any = 0.0, logit_bias: Any = None, bad_words: Any = None, min_new_tokens: int = 0):
        probe = torch.zeros(1 if not isinstance(repetition, Tensor) else max(1, repetition.numel()), 2, device=device)
        sampling.repetition_penalty(probe, probe.long(), repetition)
        numbers = [0.0 if isinstance(p, Tensor) else p for p in (presence, frequency)]
        sampling.count_penalty(probe[:1], probe[:1].long(), numbers[0], numbers[1])
        self.repetition, self.presence, self.frequency = repetition, presence, frequency
        self.repeats = isinstance(repetition, Tensor) or repetition != 1
        self.counts = any(isinstance(p, Tensor) or p != 0 for p in (presence, frequency))
        self.bias = None if logit_bias is None else _bias(logit_bias, v, device)
        words = [[int(t) for t in word] for word in bad_words or []]
        if any(not word or not all(0 <= t < v for t in word) for word in words):
            raise ConfigError(f"bad_words is {bad_words!r}, allowed are sequences of token ids from 0 to {v - 1}")
        self.words = [(torch.tensor(word[:-1], dtype=torch.long, device=device), word[-1]) for word in words]
        self.eos, self.least = eos[(eos >= 0) & (eos < v)], min_new_tokens
        gone = {word[0] for word in words if len(word) == 1} | (set(self.eos.tolist()) if min_new_tokens else set())
        if self.bias is not None:
            gone |= set((self.bias == NEG_INF).nonzero()[:, 0].tolist())
        if len(gone) >= v:
            raise ConfigError("logit_bias, bad_words and min_new_tokens leave no token, allowed is at least one")

    def __bool__(self) -> bool:
        return self.repeats or self.counts or self.bias is not None or bool(self.words) or self.least > 0

    def __call__(self, logits: Tensor, text: Tensor, real: Tensor, start: int, end: int) -> Tensor:
        """Penalise; row i's text is `text[i, :end]` where `real`, generated from column `start` on."""
        if self.bias is not None:
            logits = logits + self.bias
        if self.repeats:
            logits = sampling.repetition_penalty(logits, text[:, :end], self.repetition, real[:, :end])
        if self.counts and end > start:
            logits = sampling.count_penalty(logits, text[:, start:end], self.presence, self.frequency)
        logits = logits.clone() if self.words else logits
        for head, final in self.words:
            if len(head) <= end:
                last = slice(end - len(head), end)
                complete = ((text[:, last] == head) & real[:, last]).all(-1)
                logits[:, final] = logits[:, final].masked_fill(complete, NEG_INF)
        if end - start < self.least:
            logits = logits.index_fill(-1, self.eos, NEG_INF)
        return logits


def _bias(given: Any, v: int, device: torch.device) -> Tensor:
    """A logit bias (v,) from a dict of token ids or a tensor; -inf bans a token."""
    bias = torch.zeros(v, device=device)
    if isinstance(given, Tensor):
        bias = given.to(device, torch.float32)
    else:
        for token, value in given.items():
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < v:
                raise ConfigError(f"logit_bias names token {token!r}, allowed is a whole number from 0 to {v - 1}")
            bias[token] = value
    if bias.shape != (v,) or not bool(((bias == NEG_INF) | bias.isfinite()).all()):
        raise ConfigError(f"logit_bias has shape {tuple(bias.shape)} or a value that is +inf or NaN, allowed is ({v},), "
                          "finite or -inf")
    return bias


class Draw:
    """Logits (b, v) -> tokens (b,): temperature, top-k, top-p, min-p, further filters, then Gumbel noise.

    Options are numbers or tensors (b,); bad numbers are told at once.
    """

    def __init__(self, options: dict[str, Any], filters: list[Callable], rows: int, device: torch.device):
        self.options = {k: v for k, v in options.items() if isinstance(v, Tensor) or v != UNCHANGED[k]}
        self.filters = filters
        t = options["temperature"]
        self.greedy = not isinstance(t, Tensor) and t == 0
        self.short = device.type == "cpu" and not filters and bool(self.options.keys() - {"temperature"})
        self.filtered(torch.zeros(rows, 2, device=device), probe=True)

    def filtered(self, logits: Tensor, rows: Tensor | None = None, probe: bool = False) -> Tensor:
        """The long way up to the noise, of all rows or of some."""
        for name in ARGUMENT:
            if name in self.options:
                value = self.options[name]
                value = value[rows] if rows is not None and isinstance(value, Tensor) and value.ndim else value
                logits = getattr(sampling, name)(logits, **{ARGUMENT[name]: value})
        for function in () if probe else self.filters:
            logits = function(logits)
        return logits

    def __call__(self, logits: Tensor, keys: Tensor, position: Tensor) -> Tensor:
        """Draw; `keys` and `position` (b,) are those of `sampling.gumbel`."""
        if self.greedy:
            return (self.filtered(logits) if self.filters else logits).argmax(-1)
        if self.short:
            scaled, index, settled = self.survivors(logits)
            best = (scaled + sampling.gumbel(keys, position, index)).argmax(-1, keepdim=True)
            token = index.gather(1, best)[:, 0]
            if bool(settled.all()):
                return token
            rows = (~settled).nonzero()[:, 0]
            left = self.filtered(logits[rows], rows) + sampling.gumbel(keys[rows], position[rows], logits.shape[-1])
            return token.index_copy(0, rows, left.argmax(-1))
        return (self.filtered(logits) + sampling.gumbel(keys, position, logits.shape[-1])).argmax(-1)

    def survivors(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The largest logits (b, k) of each row, scaled and -inf where filtered out, their tokens, and whether that is all."""
        v = logits.shape[-1]
        top_k, top_p, min_p = (self.options.get(name) for name in ("top_k", "top_p", "min_p"))
        k = min(1 + int(NUCLEUS if top_k is None else sampling.per_row(top_k, logits, 1, NUCLEUS).max()), v)
        values, index = largest(logits, k)
        column, first = torch.arange(k, device=logits.device), values[:, :1]
        t = sampling.per_row(self.options.get("temperature", 1.0), logits, 0.0, torch.finfo(torch.float32).max)
        scaled = (values - first) / t.clamp(min=torch.finfo(torch.float32).tiny)
        scaled = scaled.masked_fill((t == 0) & (column > 0), NEG_INF)
        kept = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None:
            limit = sampling.per_row(top_k, logits, 1, v).trunc()
            kept = kept & (column < limit)
            scaled = scaled.masked_fill(~kept, NEG_INF)
        if top_p is not None:
            p = sampling.per_row(top_p, logits, 0.0, 1.0)
            if top_k is None:
                whole = ((logits - first) / t.clamp(min=torch.finfo(torch.float32).tiny)).logsumexp(-1, keepdim=True)
                probs = (scaled - whole).exp()
            else:
                probs = scaled.softmax(-1)
            before = probs.cumsum(-1) - probs
            kept = kept & ((before < p - ROUNDING) | (p >= 1) | (column == 0))
        if min_p is not None:
            kept = kept & (scaled.exp() >= sampling.per_row(min_p, logits, 0.0, 1.0) * (1 - ROUNDING))
        # the last column is there to be seen leaving: then all behind it leave too, if it is no tie
        if k == v:
            return scaled.masked_fill(~kept, NEG_INF), index, kept.any(-1)
        settled = ~kept[:, -1] & ((values[:, -1] < values[:, -2]) | (values[:, -2] == NEG_INF))
        if top_k is not None:
            settled = settled & (limit < k).expand_as(first)[:, 0]
        return scaled.masked_fill(~kept, NEG_INF), index, settled


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row (b, v), downwards, ties by the lower index, and where they are.

    Which of several equal to the last one are taken is left open. An entry among the k largest lies in one of the k blocks
    with the largest maxima, so the others need not be looked at.
    """
    b, v = x.shape
    blocks = v // BLOCK
    if 4 * k > blocks:
        values, index = x.topk(k)
    else:
        whole = x[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
        chosen = whole.amax(-1).topk(k, sorted=False).indices[..., None]
        values = whole.gather(1, chosen.expand(-1, -1, BLOCK)).flatten(1)
        index = (chosen * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(1)
        if v % BLOCK:
            values = torch.cat((values, x[:, blocks * BLOCK :]), 1)
            index = torch.cat((index, torch.arange(blocks * BLOCK, v, device=x.device).expand(b, -1)), 1)
        values, order = values.topk(k)
        index = index.gather(1, order)
    index, order = index.sort()
    values, order = values.gather(1, order).sort(descending=True, stable=True)
    return values, index.gather(1, order)
