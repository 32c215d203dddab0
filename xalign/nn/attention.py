"""Causal attention with grouped-query heads, rotary positions, and the two kinds of key/value cache."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xalign.nn.linear import Linear
from xalign.nn.rotary import rotate


class Cache(Protocol):
    """Keys and values of the tokens that came before; `length` slots of which `mask` tells the real ones."""

    length: int
    mask: Tensor | None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...
    def advance(self, mask: Tensor | None, n: int) -> "Cache": ...


class Prefix:
    """An immutable cache: running tokens after it gives a new one, and gradients flow through it.

    Keys and values are (p, k, n, e) a layer, `mask` (p, n) is True on real tokens, None if all are.
    b = p * s rows may continue p prefixes: each prefix then serves s neighbouring rows.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], mask: Tensor | None, length: int):
        self.keys, self.values, self.mask, self.length = keys, values, mask, length
        self._grown: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def empty(cls) -> "Prefix":
        return cls([], [], None, 0)

    def branch(self, rows: int) -> "Prefix":
        """A view of this prefix for `rows` continuing rows; it collects their keys, this one never changes."""
        if not self.length:
            return Prefix([], [], None, 0)
        p = self.keys[0].shape[0]
        if rows % p:
            raise ValueError(f"{rows} rows can't continue {p} prefixes, allowed is a multiple of {p}")
        if rows == p:
            return Prefix(self.keys, self.values, self.mask, self.length)
        keys, values = ([t.repeat_interleave(rows // p, 0) for t in ts] for ts in (self.keys, self.values))
        mask = None if self.mask is None else self.mask.repeat_interleave(rows // p, 0)
        return Prefix(keys, values, mask, self.length)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.length:
            keys = torch.cat((self.keys[layer], keys), -2)
            values = torch.cat((self.values[layer], values), -2)
        self._grown.append((keys, values))
        return keys, values

    def advance(self, mask: Tensor | None, n: int) -> "Prefix":
        keys, values = (list(t) for t in zip(*self._grown, strict=True))
        return Prefix(keys, values, mask, self.length + n)


class DecodeBuffer:
    """A preallocated cache that is written in place, under no_grad; keys and values (b, k, capacity, e) a layer.

    `length` counts all tokens, `before` those that lie elsewhere.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.capacity, self.length, self.before = shape[2], 0, 0
        self.mask: Tensor | None = None

    def branch(self, rows: int) -> "DecodeBuffer":
        if rows != self.keys[0].shape[0]:
            raise ValueError(f"{rows} rows, but this decode buffer holds {self.keys[0].shape[0]}")
        if torch.is_grad_enabled():
            raise RuntimeError("a decode buffer is written in place: use it under torch.no_grad()")
        return self

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write, and give what the buffer holds."""
        start = self.length - self.before
        end = start + keys.shape[-2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens, but this decode buffer has room for {self.capacity}")
        k, v = self.keys[layer], self.values[layer]
        k[:, :, start:end], v[:, :, start:end] = keys, values
        return k[:, :, :end], v[:, :, :end]

    def advance(self, mask: Tensor | None, n: int) -> "DecodeBuffer":
        self.mask, self.length = mask, self.length + n
        return self

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from the keys of row `rows[i]`."""
        end = self.length - self.before
        for t in (*self.keys, *self.values):
            t[:, :, :end] = t[rows, :, :end]


class BranchedBuffer(DecodeBuffer):
    """A decode buffer of b = p * s rows behind p prefixes, which are held once; each serves s neighbouring rows.

    It holds the rows' own keys alone: `attend_branched` knows the prefix. Rows may be exchanged behind the same prefix.
    """

    def __init__(self, prefix: Prefix, rows: int, capacity: int):
        p, kv_heads, _, dim_head = prefix.keys[0].shape
        super().__init__(len(prefix.keys), (rows, kv_heads, capacity, dim_head), prefix.keys[0].dtype, prefix.keys[0].device)
        keys, values = ([t.contiguous() for t in ts] for ts in (prefix.keys, prefix.values))  # else each step would copy them
        self.prefix = Prefix(keys, values, prefix.mask, prefix.length)
        self.length = self.before = prefix.length
        self.mask = None if prefix.mask is None else prefix.mask.repeat_interleave(rows // p, 0)


def attend_branched(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Attention of q (b, h, n, e) to its prefix (p, k, m, e) and its own k, v (b, k, o, e), softmax over both in fp32.

    Rows of one prefix, and heads of one key/value head, become rows of one matrix, so that no key is copied or read twice.
    """
    (b, h, n, e), (p, kv_heads, m, _) = q.shape, prefix_k.shape
    s, g = b // p, h // kv_heads
    rows = q.reshape(p, s, kv_heads, g * n, e).transpose(1, 2).reshape(p, kv_heads, s * g * n, e)
    far = (rows @ prefix_k.transpose(-1, -2)).view(p, kv_heads, s, g * n, m).transpose(1, 2).reshape(b, h, n, m)
    near = (q.reshape(b, kv_heads, g * n, e) @ k.transpose(-1, -2)).view(b, h, n, -1)
    scores = torch.cat((far, near), -1).float() * e**-0.5
    if bias is not None:
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    far, near = scores.softmax(-1).to(q.dtype).split((m, near.shape[-1]), -1)
    far = far.view(p, s, kv_heads, g * n, m).transpose(1, 2).reshape(p, kv_heads, s * g * n, m) @ prefix_v
    far = far.view(p, kv_heads, s, g * n, e).transpose(1, 2).reshape(b, h, n, e)
    return far + (near.reshape(b, kv_heads, g * n, -1) @ v).view(b, h, n, e)


@dataclass
class Context:
    """What all layers share in one forward pass."""

    bias: Tensor | None  # (b | 1, h | 1, n, m): bool, True = attend, or fp32 to add; None = everything, or causal
    causal: bool
    rotation: tuple[Tensor, Tensor] | None  # cosines and sines, (b | 1, 1, n, rotary_dim / 2), fp32
    cache: Cache | None


def alibi_slopes(heads: int) -> Tensor:
    """The slopes (h,) of ALiBi (Press et al. 2021, arXiv 2108.12409); heads past a power of two interleave."""

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    whole = 2 ** math.floor(math.log2(heads))
    return torch.tensor(powers(whole) + powers(2 * whole)[0::2][: heads - whole])


class Attention(nn.Module):
    """Multi-head attention with `kv_heads` key/value heads, each serving heads / kv_heads queries.

    Sources: Vaswani et al. 2017 (arXiv 1706.03762); grouped queries, Ainslie et al. 2023 (arXiv 2305.13245);
    `qk_norm`, an RMS norm with a learnt scale on every head's queries and keys (as in Qwen3).
    """

    def __init__(self, dim: int, layer: int, *, heads: int, kv_heads: int, dim_head: int, dropout: float, flash: bool,
                 qk_norm: bool, qkv_bias: bool, out_bias: bool, norm_eps: float):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.dropout, self.flash = layer, heads, kv_heads, dropout, flash
        self.to_q = Linear(dim, heads * dim_head, bias=qkv_bias)
        self.to_k = Linear(dim, kv_heads * dim_head, bias=qkv_bias)
        self.to_v = Linear(dim, kv_heads * dim_head, bias=qkv_bias)
        self.to_out = Linear(heads * dim_head, dim, bias=out_bias)
        self.q_norm = nn.RMSNorm(dim_head, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(dim_head, eps=norm_eps) if qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = rearrange(self.to_q(x), "b n (h e) -> b h n e", h=self.heads)
        k = rearrange(self.to_k(x), "b n (k e) -> b k n e", k=self.kv_heads)
        v = rearrange(self.to_v(x), "b n (k e) -> b k n e", k=self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        if isinstance(context.cache, BranchedBuffer):
            prefix = context.cache.prefix
            out = attend_branched(q, k, v, context.bias, prefix.keys[self.layer], prefix.values[self.layer])
        else:
            out = self.attend(q, k, v, context)
        return self.to_out(rearrange(out, "b h n e -> b n (h e)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        dropout, gqa = self.dropout if self.training else 0.0, self.heads != self.kv_heads
        # a half-precision ALiBi bias could not tell distant positions apart; and torch's backward pass of half-precision
        # attention on a CPU takes up to four times as long as the fp32 one (docs/log.md). Not only where a gradient is
        # asked for: policy and reference must agree to the last digit
        biased = context.bias is not None and context.bias.dtype != torch.bool
        slow = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-2] > 1
        dtype = torch.float32 if biased or slow else q.dtype
        with nullcontext() if self.flash else sdpa_kernel(SDPBackend.MATH), torch.autocast(q.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), context.bias, dropout, context.causal,
                                                 enable_gqa=gqa)
        return out.to(q.dtype)
