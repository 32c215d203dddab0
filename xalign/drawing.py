"""The draw of a decoding loop, and the penalties before it, at the cost of the tokens that survive.

The draw is what `sampling`'s operations give one after the other. Top-k, top-p and min-p keep few tokens, so only the `WIDTH`
largest logits are looked at, and noise is made for those alone. Where they don't settle a row (a wider nucleus, many ties) that
row takes the long way; which way a row takes depends on its own logits only, and both give the same token. The short way reads
flags on the host, which costs nothing on a CPU; elsewhere every row takes the long way, which never does.
"""

import math
from collections.abc import Callable
from functools import lru_cache
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
ONES, LEAST = 2**64 - 1, np.finfo(np.float32).min
GOLDEN, MIX1, MIX2 = (n & ONES for n in (sampling.GOLDEN, sampling.MIX1, sampling.MIX2))
CHUNK = 2**17  # logits whose noise is made at a time on a CPU: 8 bytes each, which its caches hold
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
        if self.width:
            one, given = torch.zeros(1), {"top_k": math.inf, "top_p": 1.0, "min_p": 0.0} | self.options
            # of all requests, or of each: ranks, shares of the mass, what those weigh at least, ratios
            k, p, ratio = (sampling.per_row(given[name], one, low, high, dtype).numpy() for name, low, high, dtype in (
                ("top_k", 1, math.inf, torch.float32), ("top_p", 0, 1, torch.float64), ("min_p", 0, 1, torch.float32)))
            enough = np.where(p < 1, (sampling.UNITS >> sampling.SLACK) + 1.0, sampling.EVERYTHING)
            self.limits = [np.trunc(k), p, enough, ratio * np.float32(1 - sampling.ROUNDING)]

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
        found = self.survivors(logits, rows) if self.width and not torch.compiler.is_compiling() else None
        if found is None:
            return self.long_way(logits, keys, position, rows)
        scaled, index, settled = found
        scaled = scaled + gumbel(keys, position, index)
        token = np.where(scaled < scaled.max(1, keepdims=True), logits.shape[-1], index).min(1)  # of equals the lowest
        token = torch.from_numpy(token)
        if settled.all():
            return token
        left = torch.from_numpy(np.flatnonzero(~settled))
        again = self.long_way(logits[left], keys[left], position[left], left if rows is None else rows[left])
        return token.index_copy(0, left, again)

    def long_way(self, logits: Tensor, keys: Tensor, position: Tensor, rows: Tensor | None) -> Tensor:
        x, v = self.filtered(logits, rows), logits.shape[-1]
        each = max(1, CHUNK // v) if x.device.type == "cpu" else len(x)
        parts = zip(x.split(each), keys.split(each), position.split(each), strict=True)
        return torch.cat([(some + sampling.gumbel(key, at, v)).argmax(-1) for some, key, at in parts])

    def survivors(self, logits: Tensor, rows: Tensor | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The largest logits (b, k) of each row, scaled and -inf where filtered out, their tokens, and whether that is all.

        None where that is so of no row, and where the largest of a row is infinite. The maths are those of `sampling`'s
        operations, in numpy but for exp, and few calls: each is slow where the weights have just passed through the caches.
        """
        x, v = logits.detach(), logits.shape[-1]
        if "temperature" in self.options:
            x = sampling.temperature(x, of_rows(self.options["temperature"], rows))
        limits = self.limits
        if rows is not None and any(t.ndim for t in limits):
            limits = [t[rows.numpy()] if t.ndim else t for t in limits]
        top_k, top_p, enough, min_p = limits
        k = min(self.width + SPARE, v)
        scaled, index = largest(x.numpy(), k)
        if not all(map(math.isfinite, scaled[:, 0].tolist())):
            return None
        last, top = np.maximum(scaled[:, -1:], LEAST), torch.from_numpy(scaled[:, :1])
        settled: Any = "top_k" not in self.options or top_k < k
        if top_k.ndim:
            scaled = np.where(np.arange(k) < top_k, scaled, NEG_INF)
        elif top_k < k:
            scaled, index = scaled[:, : int(top_k)], index[:, : int(top_k)]
        ratio = (torch.from_numpy(scaled) - top).exp_().numpy()
        if "top_p" in self.options:
            weight = np.rint(ratio * float(sampling.UNITS))
            upto = weight.cumsum(1, dtype=np.float64)
            total = upto[:, -1:]
            if "top_k" not in self.options:
                total = (x - top).exp_().mul_(sampling.UNITS).round_().sum(-1, keepdim=True, dtype=torch.float64).numpy()
            missing = np.maximum(np.ceil(top_p * total), enough) - (upto - weight)
            scaled = np.where(missing > weight * 2.0**-sampling.SLACK, scaled, NEG_INF)
        if "min_p" in self.options:
            scaled = np.where(ratio >= min_p, scaled, NEG_INF)
        # what is not here is no larger than the last column: if that and its equals are out, so is the rest
        settled = (settled & (scaled != last)).all(1) if k < v else np.ones(len(x), bool)
        return (scaled, index, settled) if settled.any() else None


def largest(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` largest of each row (b, v), downwards, ties by the lower index, and where they are.

    Which of several equal to the last one are taken is left open. The row is split into blocks, each of every n-th entry; an
    entry among the k largest lies in one of the k blocks with the largest maxima, so the others need not be looked at.
    """
    row, size, n, offsets, rest = _blocks(*x.shape, k)
    most = np.maximum.reduce(x[:, : size * n].reshape(-1, size, n), 1)
    few = min(k, n)
    index = (most.argpartition(-few)[:, None, -few:] + offsets).reshape(len(x), -1)
    if rest.size:
        index = np.concatenate((index, rest), 1)
    values = x[row, index]
    chosen = values.argpartition(-k)[:, -k:]
    values, index = values[row, chosen], index[row, chosen]
    order = np.lexsort((index, -values))
    return values[row, order], index[row, order]


@lru_cache(16)
def _blocks(b: int, v: int, k: int) -> tuple[np.ndarray, int, int, np.ndarray, np.ndarray]:
    """Of `largest`: row numbers (b, 1), entries of a block, blocks, where a block's entries lie, and what is in none (b, m)."""
    size = 2 ** (math.isqrt(v // k).bit_length() - 1)  # about as many blocks as entries in the blocks that are chosen
    n = v // size
    return np.arange(b)[:, None], size, n, np.arange(0, size * n, n)[:, None], np.arange(size * n, v)[None].repeat(b, 0)


def gumbel(keys: Tensor, position: Tensor, index: np.ndarray) -> np.ndarray:
    """`sampling.gumbel` for token ids (b, k) on the CPU, by fewer calls of torch."""
    each = [_hash64(k + _hash64(n + GOLDEN & ONES) + GOLDEN & ONES) + GOLDEN & ONES
            for k, n in zip(keys.tolist(), position.tolist(), strict=True)]
    state = index.view(np.uint64) * GOLDEN + np.array(each, np.uint64)[:, None]
    minus = ((_hash64(state) >> 24).astype(np.float32) + 0.5) * -(2.0**-40)
    return -torch.from_numpy(np.maximum(minus, 2.0**-24 - 1)).log1p_().neg_().log_().numpy()


def _hash64(x: Any) -> Any:
    """`sampling.hash64` of whole numbers below 2**64, or of an array of them."""
    x = (x ^ x >> 30) * MIX1 & ONES
    x = (x ^ x >> 27) * MIX2 & ONES
    return x ^ x >> 31
