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

# A sum of fp32 probabilities is good to about one unit in the last place of 1: a mass this close
# to a threshold counts as having reached it, so that (.5, .25, .25) at .75 keeps two tokens.
ROUNDING = 2.0**-22
NEG_INF = float("-inf")


def _scalar(name: str, value: float, low: float, high: float, allowed: str) -> None:
    if not isinstance(value, (int, float)) or not low <= value <= high or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}, allowed is {allowed}")


def per_row(value: float | Tensor, logits: Tensor, low: float, high: float) -> Tensor:
    """A parameter as an fp32 tensor that broadcasts against (..., v); numbers were checked before."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float32, device=logits.device)
    value = value.to(logits.device, torch.float32).nan_to_num(nan=high).clamp(low, high)
    return value[..., None] if value.ndim else value


def _descending_ranks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sort (..., v) downwards, ties by the lower index; give (values, order)."""
    return torch.sort(x, dim=-1, descending=True, stable=True)


def temperature(logits: Tensor, t: float | Tensor) -> Tensor:
    """Divide the logits by `t`; `t = 0` keeps only the largest logit (greedy).

    `t` is a finite number >= 0 (else `ValueError`) or a tensor. A `t` so small that the quotient
    overflows the dtype gives the quotient shifted by a constant a row, which no softmax can see.
    """
    if not isinstance(t, Tensor):
        _scalar("temperature", t, 0.0, torch.finfo(torch.float32).max, "a finite number >= 0")
    tiny, big = torch.finfo(torch.float32).tiny, torch.finfo(logits.dtype).max / 2
    t = per_row(t, logits, 0.0, torch.finfo(torch.float32).max)
    x = logits.float()
    top = x.amax(-1, keepdim=True)
    safe = t.clamp(min=tiny)
    scaled = x / safe
    shifted = (x - top.clamp(min=torch.finfo(torch.float32).min)) / safe
    overflows = ~(scaled.amax(-1, keepdim=True).abs() <= big)
    greedy = torch.where(_is_argmax(x), 0.0, NEG_INF)
    return torch.where(t == 0, greedy, torch.where(overflows, shifted, scaled)).to(logits.dtype)


def _is_argmax(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-1], device=x.device) == x.argmax(-1, keepdim=True)


def top_k(logits: Tensor, frac_num_tokens: float = 0.1, k: int | Tensor | None = None) -> Tensor:
    """Keep exactly the `k` largest logits, ties to the lower index (Fan et al. 2018, arXiv 1805.04833).

    `k` is an int >= 1 or a tensor; without it, `ceil(frac_num_tokens * v)` are kept.
    """
    v = logits.shape[-1]
    if k is None:
        _scalar("frac_num_tokens", frac_num_tokens, 0.0, 1.0, "a number in [0, 1]")
        k = max(1, math.ceil(frac_num_tokens * v))
    x = logits.float()
    if not isinstance(k, Tensor):
        if isinstance(k, bool) or not 1 <= k < math.inf or k != int(k):
            raise ConfigError(f"top_k is {k!r}, allowed is a whole number >= 1")
        k = min(int(k), v)
        border = x.topk(k, dim=-1).values[..., -1:]
    else:
        rows = k.to(logits.device).nan_to_num(nan=v).clamp(1, v).long()
        k = rows[..., None] if rows.ndim else rows
        ordered, _ = _descending_ranks(x)
        border = ordered.gather(-1, (k - 1).expand(*x.shape[:-1], 1))
    above, level = x > border, x == border
    room = k - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (level & (level.cumsum(-1) <= room))), NEG_INF)


def top_p(logits: Tensor, thres: float | Tensor = 0.9) -> Tensor:
    """Keep the smallest set of largest logits whose mass reaches `thres` (Holtzman et al. 2020, arXiv 1904.09751).

    `thres` in [0, 1]; 1 changes nothing, 0 keeps the largest. Ties go to the lower index.
    """
    if not isinstance(thres, Tensor):
        _scalar("top_p", thres, 0.0, 1.0, "a number in [0, 1]")
    p = per_row(thres, logits, 0.0, 1.0)
    ordered, order = _descending_ranks(logits.float())
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    keep = (before < p - ROUNDING) | (p >= 1)
    keep[..., 0] = True
    return logits.masked_fill(~torch.empty_like(keep).scatter_(-1, order, keep), NEG_INF)


def min_p(logits: Tensor, min_p: float | Tensor = 0.1) -> Tensor:
    """Keep the tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    if not isinstance(min_p, Tensor):
        _scalar("min_p", min_p, 0.0, 1.0, "a number in [0, 1]")
    x = logits.float()
    ratio = (x - x.amax(-1, keepdim=True)).exp()
    return logits.masked_fill(ratio < per_row(min_p, logits, 0.0, 1.0) * (1 - ROUNDING), NEG_INF)


def top_a(logits: Tensor, min_p_pow: float = 2.0, min_p_ratio: float = 0.02) -> Tensor:
    """Keep the tokens whose probability is at least `max_prob ** min_p_pow * min_p_ratio`."""
    _scalar("min_p_pow", min_p_pow, 0.0, 1e6, "a finite number >= 0")
    _scalar("min_p_ratio", min_p_ratio, 0.0, 1.0, "a number in [0, 1]")
    probs = logits.float().softmax(-1)
    top = probs.amax(-1, keepdim=True)
    # where the power exceeds 1 / max_prob ** ..., the limit could pass the top itself: it always survives
    return logits.masked_fill((probs < top.pow(min_p_pow) * min_p_ratio) & (probs < top), NEG_INF)


def _counts(logits: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """How often each token of the vocabulary is among `tokens` (..., n) where `mask` is True: (..., v), fp32."""
    ones = torch.ones_like(tokens, dtype=torch.float32) if mask is None else mask.float()
    return torch.zeros_like(logits, dtype=torch.float32).scatter_add(-1, tokens, ones)


def repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Divide the positive and multiply the negative logits of the `tokens` seen (Keskar et al. 2019, arXiv 1909.05858).

    `tokens` (..., n) are token ids, `mask` (..., n) is True where they count, `penalty` > 0 (1 changes nothing).
    """
    if not isinstance(penalty, Tensor):
        _scalar("repetition_penalty", penalty, torch.finfo(torch.float32).tiny, 1e30, "a finite number > 0")
    factor, counts = per_row(penalty, logits, torch.finfo(torch.float32).tiny, 1e30), _counts(logits, tokens, mask)
    x = logits.float()
    big = torch.finfo(logits.dtype).max  # a finite logit stays finite, lest the penalty remove tokens, or all of them
    penalised = torch.where(x > 0, x / factor, x * factor).clamp(-big, big)
    return torch.where((counts > 0) & x.isfinite(), penalised, x).to(logits.dtype)


def count_penalty(logits: Tensor, tokens: Tensor, presence: float | Tensor = 0.0, frequency: float | Tensor = 0.0,
                  mask: Tensor | None = None) -> Tensor:
    """Subtract `presence` from the logits of the `tokens` (..., n) seen, and `frequency` times how often they were.

    As OpenAI's API defines them; `mask` (..., n) is True where tokens count, 0 changes nothing.
    """
    for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
        if not isinstance(value, Tensor):
            _scalar(name, value, -1e30, 1e30, "a finite number")
    counts = _counts(logits, tokens, mask)
    less = per_row(presence, logits, -1e30, 1e30) * (counts > 0) + per_row(frequency, logits, -1e30, 1e30) * counts
    big = torch.finfo(logits.dtype).max
    x = logits.float()
    return torch.where((counts > 0) & x.isfinite(), (x - less).clamp(-big, big), x).to(logits.dtype)


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
_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's, as signed int64


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift of int64, which torch has only as an arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash64(x: Tensor) -> Tensor:
    """Mix int64 to int64 by the finaliser of splitmix64 (Steele et al. 2014), wrapping around."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def fold(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key from a key and an integer, both int64 and broadcast together."""
    return hash64(key + (hash64(torch.as_tensor(data, device=key.device) + _GOLDEN)) + _GOLDEN)


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
    state = fold(key, position)[:, None] + (ids + 1) * _GOLDEN
    # 40 bits make the uniform's small values, hence the noise's large ones, exact to full fp32 precision
    uniform = (_shift(hash64(state), 24).float() + 0.5) * 2.0**-40
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))
