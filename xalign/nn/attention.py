"""Causal attention with grouped-query heads and rotary positions, behind a cache or not."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xalign.nn.cache import Cache, DecodeBuffer
from xalign.nn.linear import Linear, products
from xalign.nn.rotary import rotate

FEW = 8  # rows


def attend_one(q: Tensor, cache: DecodeBuffer, layer: int, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query a row, q (b, h, 1, e), to k, v (b, k, o, e) and what the cache holds apart; softmax in fp32.

    Heads of one key/value head, and rows of one prompt, become rows of one matrix, so that no key is copied or read twice.
    `bias` (b | 1, h | 1, 1, m) has the far columns first. Products are in the cache's dtype.
    """
    b, h, _, e = q.shape
    _, kv_heads, o, _ = k.shape
    if q.device.type == "cpu" and not cache.far_keys and b <= FEW:  # one call; of more rows products in a batch are faster
        if bias is not None and bias.shape[1] > 1:
            bias = bias.view(-1, kv_heads, h // kv_heads, o).to(k.dtype)  # torch would misread fp32 beside fp64
        q = q.to(k.dtype).view(b, kv_heads, h // kv_heads, e)
        return F.scaled_dot_product_attention(q, k, v, bias).view(b, h, 1, e)
    q = (q.to(k.dtype) * e**-0.5).view(b * kv_heads, h // kv_heads, e)
    scores = torch.bmm(q, k.flatten(0, 1).transpose(1, 2)).view(b, h, 1, o)
    far = cache.far_keys[layer] if cache.far_keys else None
    if far is not None:
        p, _, m, _ = far.shape
        apart = (b // p, kv_heads, h // kv_heads)  # rows of a prompt, heads: by prompt these lie (k, s, g) for the product
        mine = q.view(p, *apart, e).transpose(1, 2).reshape(p * kv_heads, -1, e)
        apart_scores = torch.bmm(mine, far.flatten(0, 1).transpose(1, 2)).view(p, kv_heads, b // p, -1, m)
        scores = torch.cat((apart_scores.transpose(1, 2).reshape(b, h, 1, m), scores), -1)
    scores = scores.float()
    if bias is not None:
        scores = scores.masked_fill_(~bias, float("-inf")) if bias.dtype == torch.bool else scores.add_(bias)
    weights = scores.softmax(-1).to(k.dtype)
    near = weights if far is None else weights[..., m:]
    out = torch.bmm(near.reshape(b * kv_heads, h // kv_heads, o), v.flatten(0, 1)).view(b, h, 1, e)
    if far is not None:
        mine = weights[..., :m].reshape(p, *apart, m).transpose(1, 2).reshape(p * kv_heads, -1, m)
        held = torch.bmm(mine, cache.far_values[layer].flatten(0, 1)).view(p, kv_heads, b // p, -1, e)
        out = out + held.transpose(1, 2).reshape(b, h, 1, e)
    return out


@dataclass
class Context:
    """What all layers share in one forward pass."""

    bias: Tensor | None  # (b | 1, h | 1, n, m): bool, True = attend, or fp32 to add; None = everything, or causal
    causal: bool
    rotation: tuple[Tensor, Tensor] | None  # cosines and signed sines, (b | 1, 1, n, rotary_dim), fp32
    cache: Cache | DecodeBuffer | None


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """The slopes (h,) of ALiBi (Press et al. 2021, arXiv 2108.12409); heads past a power of two interleave."""
    whole = 2 ** math.floor(math.log2(heads))
    step = 8 / whole
    # made on the device: a copy from the host would be no part of a CUDA graph
    powers, between = (torch.arange(n, dtype=torch.float64, device=device) for n in (whole, heads - whole))
    return torch.exp2(-step * torch.cat((powers + 1, between + 0.5))).float()


class Attention(nn.Module):
    """Multi-head attention with `kv_heads` key/value heads, each serving heads / kv_heads queries.

    Sources: Vaswani et al. 2017 (arXiv 1706.03762); grouped queries, Ainslie et al. 2023 (arXiv 2305.13245);
    `qk_norm`, an RMS norm with a learnt scale on every head's queries and keys (as in Qwen3).
    """

    def __init__(self, dim: int, layer: int, *, heads: int, kv_heads: int, dim_head: int, dropout: float, flash: bool,
                 qk_norm: bool, qkv_bias: bool, out_bias: bool, norm_eps: float):
        super().__init__()
        self.layer, self.dim_head, self.dropout, self.flash = layer, dim_head, dropout, flash
        self.heads, self.kv_heads = heads, kv_heads
        self.to_q = Linear(dim, heads * dim_head, bias=qkv_bias)
        self.to_k = Linear(dim, kv_heads * dim_head, bias=qkv_bias)
        self.to_v = Linear(dim, kv_heads * dim_head, bias=qkv_bias)
        self.to_out = Linear(heads * dim_head, dim, bias=out_bias)
        self.q_norm = nn.RMSNorm(dim_head, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(dim_head, eps=norm_eps) if qk_norm else None

    def grouped(self) -> list[list[nn.Module]]:
        return [[self.to_q, self.to_k, self.to_v], [self.to_out]]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # (b, n, h * e) -> (b, h, n, e); while they are packed, queries and keys stay one tensor as long as they can
        qkv = [t.unflatten(-1, (-1, self.dim_head)).transpose(1, 2)
               for t in products(x, (self.to_q, self.to_k, self.to_v), apart=False)]
        if len(qkv) == 1:
            h, kv = self.heads, self.kv_heads
            qkv = qkv[0].split_with_sizes((h + kv, kv) if self.q_norm is None else (h, kv, kv), 1)
        *qk, v = qkv
        if self.q_norm is not None and self.k_norm is not None:
            qk = [self.q_norm(qk[0]), self.k_norm(qk[1])]
        cache, dtype = context.cache, v.dtype
        if context.rotation is not None:
            turned = cache.dtype if isinstance(cache, DecodeBuffer) else dtype  # into an fp32 cache without rounding
            qk = [rotate(t, context.rotation, turned) for t in qk]
        q, k = qk if len(qk) == 2 else qk[0].split_with_sizes((self.heads, self.kv_heads), 1)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if isinstance(cache, DecodeBuffer):
            out = attend_one(q, cache, self.layer, k, v, context.bias)
        else:
            out = self.attend(q, k, v, context)
        return self.to_out(out.to(dtype).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        dropout, gqa = self.dropout if self.training else 0.0, q.shape[1] != k.shape[1]
        # a half-precision ALiBi bias could not tell distant positions apart; and torch's backward pass of half-precision
        # attention on a CPU takes up to four times as long as the fp32 one (docs/log.md). Not only where a gradient is
        # asked for: policy and reference must agree to the last digit
        biased = context.bias is not None and context.bias.dtype != torch.bool
        slow = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if biased or slow else q.dtype
        with nullcontext() if self.flash else sdpa_kernel(SDPBackend.MATH), torch.autocast(q.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), context.bias, dropout, context.causal,
                                                 enable_gqa=gqa)
        return out
