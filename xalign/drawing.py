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

WIDTH = 320  # how many of the largest logits are looked at
PART = 8  # entries looked at together, where one of them may be among the largest
CLOSE = 2.0**-16  # of itself, by which `mass` may be off: 100 roundings of fp32, and those to whole numbers
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
        found = largest(x, min(self.width, v))
        if found is None:
            return None
        scaled, index, counts, whole = found
        top, column = torch.from_numpy(scaled[:, :1]), np.arange(scaled.shape[1])
        kept: Any = column < np.minimum(top_k, counts)
        # fp32 exp is torch's: numpy's gives other bits
        ratio = np.where(kept, (torch.from_numpy(scaled) - top).exp_().numpy(), np.float32(0))
        if "top_p" in self.options:
            weight = np.rint(ratio * float(sampling.UNITS))
            upto = weight.cumsum(1, dtype=np.float64)

            def nucleus(total: np.ndarray) -> np.ndarray:
                return np.maximum(np.ceil(top_p * total), enough) - (upto - weight) > weight * 2.0**-sampling.SLACK

            if "top_k" in self.options:
                kept &= nucleus(upto[:, -1:])
            else:
                total = mass(x, index[:, 0])
                inside = nucleus(total * (1 - CLOSE))
                open_ = (inside != nucleus(total * (1 + CLOSE))).any(1)
                if open_.any():
                    some = torch.from_numpy(np.flatnonzero(open_))
                    total[open_] = sampling.weights(x[some]).sum(-1, keepdim=True, dtype=torch.float64).numpy()
                    inside = np.where(open_[:, None], nucleus(total), inside)
                kept &= inside
        if "min_p" in self.options:
            kept &= ratio >= min_p
        # they are kept in this order: if not all that are here are, nothing of the rest is
        number = kept.sum(1, keepdims=True)
        settled = (whole | (top_k <= counts if "top_k" in self.options else number < counts))[:, 0]
        if not settled.any():
            return None
        width = int(number.max())
        return np.where(kept[:, :width], scaled[:, :width], NEG_INF), index[:, :width], settled


def mass(x: Tensor, top: np.ndarray) -> np.ndarray:
    """What all tokens of x (b, v) weigh in `sampling.UNITS` of the likeliest, `top` (b,): (b, 1), fp64, `CLOSE` to the sum.

    The softmax is one pass; its own sum is off by more, but that of its results is torch's, in cascades.
    """
    p = x.softmax(-1)
    return (p.sum(-1).double() / p[torch.arange(len(x)), torch.from_numpy(top)]).mul_(sampling.UNITS).numpy()[:, None]


def largest(x: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """The `k` largest of each row (b, v), or more, downwards, ties by the lower index: values (b, m), where they are, how many
    of each row's m are real, and whether those are all that it has (but for -inf), (b, 1) both.

    The k-th largest of the maxima of blocks, each of every n-th entry, is no larger than the k-th largest entry; few lie
    between. What equals it is taken too, unless much does: then there may be fewer than k. None for rows that are flat, and for
    one whose largest is infinite or no number.
    """
    b, v = x.shape
    size = 2 ** max(0, (v // (2 * k)).bit_length() - 1)
    n, bits, part = v // size, v.bit_length(), min(size, PART)
    parts, within = n * (size // part), n * size  # each block's entries lie in several parts, of every `parts`-th entry
    finer = x[:, :within].view(b, part, parts).amax(1)
    most = finer.view(b, size // part, n).amax(1).numpy()
    if not all(map(math.isfinite, most.max(1).tolist())) or b << bits > 2**32:
        return None
    least = np.partition(most, n - k, 1)[:, n - k, None] if n >= k else np.full((b, 1), NEG_INF, np.float32)
    border, limit = np.maximum(least, LEAST), 4 * b * k + 64

    def entries(over: np.ufunc) -> tuple[np.ndarray, np.ndarray] | None:
        """What of x is (greater than, or at least) the border, and where; None if in more places than `limit`."""
        found = np.flatnonzero(over(finer.numpy(), border))
        if len(found) > limit:
            return None
        row = found // parts
        places = np.add.outer(np.arange(0, within, parts), found + row * (v - parts))
        values = x.numpy().ravel().take(places)
        hits = np.flatnonzero(over(values, border.ravel().take(row)))
        flat, values = places.ravel().take(hits), values.ravel().take(hits)
        if within < v:
            row, column = over(x.numpy()[:, within:], border).nonzero()
            flat = np.concatenate((flat, row * v + column + within))
            values = np.concatenate((values, x.numpy()[row, column + within]))
        return (values, flat) if len(flat) <= limit else None

    taken = entries(np.greater_equal) or entries(np.greater)  # many may be equal to it: then those above it, fewer than k
    if taken is None:
        return None
    values, flat = taken[0] + np.float32(0), taken[1]  # of -0 and 0 the lower index comes first
    image = values.view(np.uint32).astype(np.uint64)
    row, index = np.divmod(flat, v) if b > 1 else (np.zeros_like(flat), flat)
    counts = np.bincount(row, minlength=b)[:, None]
    whole = (least == NEG_INF) | (counts == v)
    if not counts.all():
        return None
    # ascending: the row, its values downwards (fp32's bits, turned round), the index
    keys = (image ^ (image >> 31) - 1 & 0x7FFFFFFF) << bits | index.astype(np.uint64) | row.astype(np.uint64) << 32 + bits
    keys.sort()
    index, image = (keys & (1 << bits) - 1).astype(np.int64), (keys >> bits).astype(np.uint32)
    values = (image ^ (image >> 31) - np.uint32(1) & np.uint32(0x7FFFFFFF)).view(np.float32)
    if b == 1:
        return values[None], index[None], counts, whole
    column = np.arange(counts.max())
    place = np.minimum(counts.cumsum()[:, None] - counts + column, len(index) - 1)
    return np.where(column < counts, values[place], NEG_INF), index[place], counts, whole


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
