"""The draw of a decoding loop, and the penalties before it, at the cost of the tokens that survive.

The draw is what `sampling`'s operations give one after the other. Top-k, top-p and min-p keep few tokens, so only the `WIDTH`
largest logits are looked at, and noise is made for those alone. Where they don't settle a row (a wider nucleus, many ties) that
row takes the long way; which way a row takes depends on its own logits only, and both give the same token. The short way reads
flags on the host, which costs nothing on a CPU; elsewhere every row takes the long way, which never does.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xalign import sampling
from xalign.errors import ConfigError
from xalign.sampling import NEG_INF
from xalign.stopping import Endings

WIDTH, SPARE = 320, 32  # how many of the largest logits are looked at, and how many more to see ties end
ARGUMENT = {"temperature": "t", "top_k": "k", "top_p": "thres", "min_p": "min_p"}
UNCHANGED = {"temperature": (1,), "top_k": (None,), "top_p": (None, 1), "min_p": (None, 0)}


class Penalties:
    """What changes the logits before the draw, by the text so far: logits (b, v), text (b, w) -> logits.

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
        self.heads = Endings([word[:-1] for word in words], device)
        least = eos[(eos >= 0) & (eos < v)].tolist() if min_new_tokens else []
        self.banned = torch.tensor([word[-1] for word in words] + least, dtype=torch.long, device=device)
        self.least = min_new_tokens
        gone = {word[0] for word in words if len(word) == 1} | set(least)
        if self.bias is not None:
            gone |= set((self.bias == NEG_INF).nonzero()[:, 0].tolist())
        if len(gone) >= v:
            raise ConfigError("logit_bias, bad_words and min_new_tokens leave no token, allowed is at least one")

    def __bool__(self) -> bool:
        return self.repeats or self.counts or self.bias is not None or len(self.banned) > 0

    def __call__(self, logits: Tensor, text: Tensor, lengths: Tensor, prompt_lengths: Tensor,
                 rows: Tensor | None = None) -> Tensor:
        """Penalise; row i's text is `text[i, :lengths[i]]`, of which `prompt_lengths[i]` tokens were given.

        What stands behind is never looked at. Tensor options are those of requests, row i that of request `rows[i]`.
        """
        columns = torch.arange(text.shape[1], device=text.device)
        real, written = columns < lengths[:, None], columns >= prompt_lengths[:, None]
        if self.bias is not None:
            logits = logits + self.bias
        if self.repeats:
            logits = sampling.repetition_penalty(logits, text, of_rows(self.repetition, rows), real)
        if self.counts:
            presence, frequency = of_rows(self.presence, rows), of_rows(self.frequency, rows)
            logits = sampling.count_penalty(logits, text, presence, frequency, real & written)
        if len(self.banned):
            completed, early = self.heads(text, lengths, lengths), (lengths - prompt_lengths < self.least)[:, None]
            hits = torch.cat((completed, early.expand(-1, len(self.banned) - completed.shape[1])), 1)
            ceiling = torch.where(hits, NEG_INF, math.inf).to(logits.dtype)
            logits = logits.scatter_reduce(1, self.banned.expand(len(logits), -1), ceiling, "amin")
        return logits


def of_rows(value: Any, rows: Tensor | None) -> Any:
    """An option as it is, or those values of a tensor (requests,) that belong to `rows` (b,)."""
    return value[rows] if rows is not None and isinstance(value, Tensor) and value.ndim else value


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

    Options are numbers or tensors with a value for each of the `rows` requests; bad numbers are told at once.
    """

    def __init__(self, options: dict[str, Any], filters: list[Callable], rows: int, device: torch.device):
        self.options = {k: v for k, v in options.items() if isinstance(v, Tensor) or v not in UNCHANGED[k]}
        self.filters = filters
        t, top_k = options["temperature"], options["top_k"]
        self.greedy = not isinstance(t, Tensor) and t == 0
        self.filtered(torch.zeros(rows, 2, device=device), probe=True)
        self.width = 0
        if device.type == "cpu" and not filters and self.options.keys() - {"temperature"}:
            ks = torch.tensor([WIDTH]) if top_k is None else sampling.per_row(top_k, torch.zeros(1), 1, math.inf)
            self.width = max([int(k) for k in ks.flatten().tolist() if k <= WIDTH], default=0)

    def filtered(self, logits: Tensor, rows: Tensor | None = None, probe: bool = False) -> Tensor:
        """The long way up to the noise."""
        for name in ARGUMENT:
            if name in self.options:
                logits = getattr(sampling, name)(logits, **{ARGUMENT[name]: of_rows(self.options[name], rows)})
        for function in () if probe else self.filters:
            logits = function(logits)
        return logits

    def __call__(self, logits: Tensor, keys: Tensor, position: Tensor, rows: Tensor | None = None) -> Tensor:
        """Draw; `keys` and `position` (b,) are those of `sampling.gumbel`; row i belongs to request `rows[i]`, or to i."""
        if self.greedy:
            return (self.filtered(logits) if self.filters else logits).argmax(-1)
        found = self.survivors(logits, rows) if self.width else None
        if found is None:
            return self.long_way(logits, keys, position, rows)
        scaled, index, settled = found
        scaled = scaled + sampling.gumbel(keys, position, index)
        token = index.masked_fill(scaled < scaled.amax(-1, keepdim=True), logits.shape[-1]).amin(-1)  # of equals the lowest
        if bool(settled.all()):
            return token
        left = (~settled).nonzero()[:, 0]
        again = self.long_way(logits[left], keys[left], position[left], left if rows is None else rows[left])
        return token.index_copy(0, left, again)

    def long_way(self, logits: Tensor, keys: Tensor, position: Tensor, rows: Tensor | None) -> Tensor:
        return (self.filtered(logits, rows) + sampling.gumbel(keys, position, logits.shape[-1])).argmax(-1)

    def survivors(self, logits: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """The largest logits (b, k) of each row, scaled and -inf where filtered out, their tokens, and whether that is all.

        None where it is certain that no row has so few.
        """
        x, v = logits, logits.shape[-1]
        t, top_k, top_p, min_p = (of_rows(self.options.get(name), rows) for name in ARGUMENT)
        if t is not None:
            x = sampling.temperature(x, t)
        if top_p is not None and top_k is None:
            needed = sampling.mass_limit(top_p, sampling.weights(x).sum(-1, keepdim=True, dtype=torch.float64))
            if v > self.width and bool((needed > self.width * sampling.UNITS).all()):
                return None
        k = min(self.width + SPARE, v)
        values, index = largest(x, k)
        scaled, settled = values, torch.tensor(True)
        if top_k is not None:
            limit = sampling.per_row(top_k, logits, 1, v).trunc()
            scaled, settled = torch.where(torch.arange(k) < limit, values, NEG_INF), limit < k
        if top_p is not None:
            weight = sampling.weights(scaled).double()
            if top_k is not None:
                needed = sampling.mass_limit(top_p, weight.sum(-1, keepdim=True))
            missing = needed - (weight.cumsum(-1) - weight)
            scaled = torch.where(missing > weight * 2.0**-sampling.SLACK, scaled, NEG_INF)
        if min_p is not None:
            scaled = sampling.min_p(scaled, min_p)
        # what is not here is no larger than the last column: if that and its equals are out, so is the rest
        last = values[:, -1:].clamp(min=torch.finfo(torch.float32).min)
        return scaled, index, (settled & (scaled != last)).all(-1) if k < v else torch.ones(len(x), dtype=torch.bool)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row (b, v) on the CPU, downwards, ties by the lower index, and where they are.

    Which of several equal to the last one are taken is left open. The row is split into blocks, each of every n-th entry; an
    entry among the k largest lies in one of the k blocks with the largest maxima, so the others need not be looked at. numpy
    selects and sorts by vector instructions, several times faster than torch.
    """
    v = x.shape[-1]
    size = 2 ** (math.isqrt(v // k).bit_length() - 1)  # about as many blocks as entries in the blocks that are chosen
    n = v // size
    blocks = _indices_of_largest(x[:, : size * n].unflatten(1, (size, n)).amax(1), min(k, n))
    index = (blocks[:, None] + torch.arange(0, size * n, n)[:, None]).flatten(1)
    if size * n < v:
        index = torch.cat((index, torch.arange(size * n, v).expand(len(x), -1)), 1)
    index = index.gather(1, _indices_of_largest(x.gather(1, index), k))
    keys = sampling.downwards(x.gather(1, index)).long() << 32 | index
    index = torch.from_numpy(np.sort(keys.numpy())) & (2**32 - 1)
    return x.gather(1, index), index


def _indices_of_largest(x: Tensor, k: int) -> Tensor:
    return torch.from_numpy(np.argpartition(x.detach().numpy(), x.shape[-1] - k)[:, x.shape[-1] - k :])
