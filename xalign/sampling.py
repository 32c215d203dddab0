"""Logits in, logits out: filters for sampling, and the draw itself. Nothing here knows a model.

Every operation takes logits of shape (..., v) with any number of leading dimensions, keeps their
dtype, computes in fp32, removes a token by writing -inf, leaves at least one token, and never
writes to its input. A parameter is a number or a tensor that broadcasts against the leading
dimensions: a bad number raises `ValueError`, a tensor is clamped into its range and never read on
the host, so that every operation can be captured in a CUDA graph.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xalign.errors import ConfigError, nearest

# Ratios of fp32 exponentials are good to a few units in the last place; so close to a limit they count as having reached it.
ROUNDING = 2.0**-22
# Weights of tokens are whole numbers, 2**34 for the likeliest, so that every order of summation in fp64 or int64 gives one sum.
# A token of which less than 2**-20 is needed to reach a threshold is not needed: (.5, .25, .25) at .75 keeps two.
UNITS, SLACK, EVERYTHING = 2**34, 20, 2**62
NEG_INF = float("-inf")


def _scalar(name: str, value: float, low: float, high: float, allowed: str) -> None:
    if not isinstance(value, (int, float)) or not low <= value <= high or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}, allowed is {allowed}")


def per_row(value: float | Tensor, logits: Tensor, low: float, high: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter as a floating tensor that broadcasts against (..., v); numbers were checked before."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=logits.device)
    value = value.to(logits.device, dtype).nan_to_num(nan=high).clamp(low, high)
    return value[..., None] if value.ndim else value


def temperature(logits: Tensor, t: float | Tensor) -> Tensor:
    """Divide the logits by `t`; `t = 0` keeps only the largest logit (greedy).

    `t` is a finite number >= 0 (else `ValueError`) or a tensor. A `t` so small that the quotient
    overflows the dtype gives the quotient shifted by a constant a row, which no softmax can see.
    """
    may_be_greedy = isinstance(t, Tensor) or t == 0
    if not isinstance(t, Tensor):
        _scalar("temperature", t, 0.0, torch.finfo(torch.float32).max, "a finite number >= 0")
    x = logits.float()
    top, t = x.amax(-1, keepdim=True), per_row(t, logits, 0.0, torch.finfo(torch.float32).max)
    safe = t.clamp(min=torch.finfo(torch.float32).tiny)
    overflows = ~((top / safe).abs() <= torch.finfo(logits.dtype).max / 2)
    scaled = (x - torch.where(overflows, top.clamp(min=torch.finfo(torch.float32).min), 0.0)) / safe
    if may_be_greedy:
        first = x.argmax(-1, keepdim=True)
        scaled = torch.minimum(scaled, torch.where(t == 0, NEG_INF, math.inf))
        scaled = scaled.scatter(-1, first, torch.where(t == 0, 0.0, scaled.gather(-1, first)))
    return scaled.to(logits.dtype)


def _keep(logits: Tensor, kept: Tensor) -> Tensor:
    """The logits where `kept` is 1, -inf where it is 0; without a branch for each entry, unlike `torch.where`."""
    return torch.minimum(logits, kept.to(logits.dtype).sub_(0.5).mul_(math.inf))


def weights(x: Tensor) -> Tensor:
    """How likely each token of fp32 logits (..., v) is against the likeliest, which weighs `UNITS`: whole numbers, fp32."""
    # exp and not the faster exp2, whose last bit depends on where in a tensor an entry stands
    x = x.detach()
    return (x - x.amax(-1, keepdim=True)).exp_().nan_to_num_(nan=1.0).mul_(UNITS).round_()


def mass_limit(p: float | Tensor, total: Tensor) -> Tensor:
    """What a nucleus of mass `p` must weigh where all tokens weigh `total` (..., 1) fp64; int64, `EVERYTHING` where p is 1."""
    p = per_row(p, total, 0.0, 1.0, torch.float64)
    # the likeliest token is in every nucleus
    return (p * total).ceil().clamp(min=(UNITS >> SLACK) + 1).masked_fill(p >= 1, EVERYTHING).long()


def downwards(x: Tensor) -> Tensor:
    """An int32 for each fp32 logit, the less the larger the logit; equal where logits are equal."""
    image = (x.detach() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return image ^ (image >> 31).bitwise_and_(2**31 - 1).bitwise_not_()


def foremost(x: Tensor, amount: Tensor, limit: Tensor) -> Tensor:
    """1 for the tokens of x (..., v) before which, largest first and ties by the lower index, stands less than a limit; else 0.

    `amount` (..., v), whole numbers >= 0, equal where x is equal, is added up; `limit` (..., 1) int64 >= 1 is what it is held
    against; a token of whose own amount less than 2**-`SLACK` is missing is left out. Nothing is sorted: three histograms, of
    11, 11 and 10 bits, find the border in the integer image of the logits. Comparisons are made in place, as 0 and 1, because
    torch writes booleans several times slower.
    """
    order = downwards(x)
    unsigned, inside, level = order ^ -(2**31), amount.long(), torch.zeros_like(limit)
    before = level
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        digit = (unsigned >> shift).bitwise_and_(2**bits - 1).long()
        counts = torch.zeros(*x.shape[:-1], 2**bits, dtype=torch.int64, device=x.device).scatter_add_(-1, digit, inside)
        upto = before + counts.cumsum(-1)
        here = (upto < limit).sum(-1, keepdim=True).clamp(max=2**bits - 1)  # the first bin that reaches the limit
        level, last = (level << bits) + here, counts.gather(-1, here)
        before = upto.gather(-1, here) - last
        inside = digit.eq_(here).mul_(inside)
    level = (level - 2**31).int()
    tied = order.clone().eq_(level)
    rank = tied.cumsum(-1, dtype=torch.int32)
    each = (last // rank[..., -1:].clamp(min=1)).clamp(min=1)
    room = ((limit - before - (each >> SLACK) + each - 1) // each).clamp(max=x.shape[-1]).int()
    return order.lt_(level).add_(rank.le_(room).mul_(tied))


def top_k(logits: Tensor, frac_num_tokens: float = 0.1, k: int | Tensor | None = None) -> Tensor:
    """Keep exactly the `k` largest logits, ties to the lower index (Fan et al. 2018, arXiv 1805.04833).

    `k` is an int >= 1 or a tensor; without it, `ceil(frac_num_tokens * v)` are kept.
    """
    v = logits.shape[-1]
    if k is None:
        _scalar("frac_num_tokens", frac_num_tokens, 0.0, 1.0, "a number in [0, 1]")
        k = max(1, math.ceil(frac_num_tokens * v))
    if not isinstance(k, Tensor):
        if isinstance(k, bool) or not 1 <= k < math.inf or k != int(k):
            raise ConfigError(f"top_k is {k!r}, allowed is a whole number >= 1")
        k = min(int(k), v)
    limit = per_row(k, logits, 1, v, torch.float64).long().expand(*logits.shape[:-1], 1)
    one = torch.ones((), dtype=torch.int64, device=logits.device).expand(logits.shape)
    return _keep(logits, foremost(logits.float(), one, limit))


def top_p(logits: Tensor, thres: float | Tensor = 0.9) -> Tensor:
    """Keep the smallest set of largest logits whose mass reaches `thres` (Holtzman et al. 2020, arXiv 1904.09751).

    `thres` in [0, 1]; 1 changes nothing, 0 keeps the largest. Ties go to the lower index.
    """
    if not isinstance(thres, Tensor):
        _scalar("top_p", thres, 0.0, 1.0, "a number in [0, 1]")
    x = logits.float()
    weight = weights(x)
    limit = mass_limit(thres, weight.sum(-1, keepdim=True, dtype=torch.float64))
    return _keep(logits, foremost(x, weight, limit))


def min_p(logits: Tensor, min_p: float | Tensor = 0.1) -> Tensor:
    """Keep the tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    if not isinstance(min_p, Tensor):
        _scalar("min_p", min_p, 0.0, 1.0, "a number in [0, 1]")
    x = logits.detach().float()
    ratio = (x - x.amax(-1, keepdim=True)).exp_().nan_to_num_(nan=1.0)
    return _keep(logits, ratio.ge_(per_row(min_p, logits, 0.0, 1.0) * (1 - ROUNDING)))


def top_a(logits: Tensor, min_p_pow: float = 2.0, min_p_ratio: float = 0.02) -> Tensor:
    """Keep the tokens whose probability is at least `max_prob ** min_p_pow * min_p_ratio`."""
    _scalar("min_p_pow", min_p_pow, 0.0, 1e6, "a finite number >= 0")
    _scalar("min_p_ratio", min_p_ratio, 0.0, 1.0, "a number in [0, 1]")
    probs = logits.float().softmax(-1)
    top = probs.amax(-1, keepdim=True)
    # where the power exceeds 1 / max_prob ** ..., the limit could pass the top itself: it always survives
    return logits.masked_fill((probs < top.pow(min_p_pow) * min_p_ratio) & (probs < top), NEG_INF)


def _seen(logits: Tensor, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits with one more column, where the `tokens` (..., n) go that don't count, and the columns of `tokens`."""
    columns = tokens if mask is None else tokens.where(mask, logits.shape[-1])
    return torch.cat((logits, logits[..., :1]), -1), columns


def repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Divide the positive and multiply the negative logits of the `tokens` seen (Keskar et al. 2019, arXiv 1909.05858).

    `tokens` (..., n) are token ids, `mask` (..., n) is True where they count, `penalty` > 0 (1 changes nothing).
    """
    if not isinstance(penalty, Tensor):
        _scalar("repetition_penalty", penalty, torch.finfo(torch.float32).tiny, 1e30, "a finite number > 0")
    factor = per_row(penalty, logits, torch.finfo(torch.float32).tiny, 1e30)
    padded, columns = _seen(logits, tokens, mask)
    x = padded.gather(-1, columns).float()
    big = torch.finfo(logits.dtype).max  # a finite logit stays finite, lest the penalty remove tokens, or all of them
    penalised = torch.where(x > 0, x / factor, x * factor).clamp(-big, big).where(x.isfinite(), x)
    return padded.scatter(-1, columns, penalised.to(logits.dtype))[..., :-1]


def count_penalty(logits: Tensor, tokens: Tensor, presence: float | Tensor = 0.0, frequency: float | Tensor = 0.0,
                  mask: Tensor | None = None) -> Tensor:
    """Subtract `presence` from the logits of the `tokens` (..., n) seen, and `frequency` times how often they were.

    As OpenAI's API defines them; `mask` (..., n) is True where tokens count, 0 changes nothing.
    """
    for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
        if not isinstance(value, Tensor):
            _scalar(name, value, -1e30, 1e30, "a finite number")
    padded, columns = _seen(logits, tokens, mask)
    one = torch.ones((), device=logits.device).expand(columns.shape)
    counts = torch.zeros_like(padded, dtype=torch.float32).scatter_add_(-1, columns, one).gather(-1, columns)
    x, big = padded.gather(-1, columns).float(), torch.finfo(logits.dtype).max
    less = per_row(presence, logits, -1e30, 1e30) + per_row(frequency, logits, -1e30, 1e30) * counts
    penalised = (x - less).clamp(-big, big).where(x.isfinite(), x)
    return padded.scatter(-1, columns, penalised.to(logits.dtype))[..., :-1]


FILTERS: dict[str, Callable[..., Tensor]] = {
    "top_k": top_k, "top_p": top_p, "min_p": min_p, "top_a": top_a, "temperature": temperature,
}


def compose(filters: str | Callable | Sequence | None, kwargs: dict | Sequence[dict] = {}) -> list[Callable]:  # noqa: B006
    """Turn a filter, or a list of them, and its keyword arguments into functions (..., v) -> (..., v)."""
    if filters is None:
        return []
    chain: list = list(filters) if isinstance(filters, (list, tuple)) else [filters]
    options: list = list(kwargs) if isinstance(kwargs, (list, tuple)) else [kwargs] * len(chain)
    if len(options) != len(chain):
        raise ConfigError(f"{len(chain)} filters but {len(options)} filter_kwargs, allowed is one dict each")
    return [_bind(f, dict(o)) for f, o in zip(chain, options, strict=True)]


def _bind(function: str | Callable, options: dict[str, Any]) -> Callable:
    if isinstance(function, str):
        if function not in FILTERS:
            raise ConfigError(f"no filter {function!r}{nearest(function, FILTERS)}; allowed are {', '.join(FILTERS)}")
        function = FILTERS[function]
    return lambda logits: function(logits, **options)


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token a row, (..., v) -> (...), by the Gumbel-max trick; -inf is never drawn."""
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    # Gumbel noise is -log of exponential noise; a draw of exactly 0 would be infinite
    return (logits.float() - noise.clamp(min=torch.finfo(torch.float32).tiny).log()).argmax(-1)


# Counter-based noise: a pure function of integers, so a row's draws depend on nothing but its own key and position.
GOLDEN, MIX1, MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's, as signed int64


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift of int64, which torch has only as an arithmetic one."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def hash64(x: Tensor) -> Tensor:
    """Mix int64 to int64 by the finaliser of splitmix64 (Steele et al. 2014), wrapping around."""
    x = (x ^ _shift(x, 30)).mul_(MIX1)
    x = x.bitwise_xor_(_shift(x, 27)).mul_(MIX2)
    return x.bitwise_xor_(_shift(x, 31))


def fold(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key from a key and an integer, both int64 and broadcast together."""
    return hash64(key + (hash64(torch.as_tensor(data, device=key.device) + GOLDEN)) + GOLDEN)


def row_keys(seed: int | Tensor, rows: int, samples: int = 1, device: torch.device | None = None) -> Tensor:
    """Keys (rows * samples,) of the draws: of (seed, row) for an int, of the seed alone for seeds (rows,)."""
    if isinstance(seed, Tensor) and seed.ndim:
        if seed.shape != (rows,):
            raise ConfigError(f"seed has shape {tuple(seed.shape)}, allowed is an int or one seed a row, ({rows},)")
        key = hash64(seed.to(device, torch.int64))
    else:
        seed = seed if isinstance(seed, Tensor) else (int(seed) + 2**63) % 2**64 - 2**63  # any int, wrapped
        base = torch.as_tensor(seed, dtype=torch.int64, device=device)
        key = fold(hash64(base), torch.arange(rows, device=device))
    return fold(key[:, None], torch.arange(samples, device=device)).reshape(-1)


def gumbel(key: Tensor, position: Tensor, tokens: int | Tensor) -> Tensor:
    """Gumbel noise, fp32, for row keys (b,) and positions (b,): a hash of (key, position, token).

    `tokens` is the vocabulary's size, which gives (b, v), or token ids (b, k), which gives the same numbers for those alone.
    """
    ids = torch.arange(tokens, device=key.device) if isinstance(tokens, int) else tokens
    state = ids * GOLDEN + (fold(key, position) + GOLDEN)[:, None]
    # 40 bits make the uniform's small values, hence the noise's large ones, exact to full fp32 precision
    minus = _shift(hash64(state), 24).float().add_(0.5).mul_(-(2.0**-40)).clamp_(min=2.0**-24 - 1)
    return minus.log1p_().neg_().log_().neg_()
