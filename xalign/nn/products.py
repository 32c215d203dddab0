"""The matrix products of training: y = x W^T with its gradients, and a head's log-probabilities without all logits.

On a CPU fp32 products go to oneDNN, forward and backward: where MKL runs its slow path (AMD), that is 2 to 2.5 times as fast
(docs/log.md), and elsewhere no slower. Everything else is torch's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1 << 20  # multiplications up to which torch's own product takes less time
HELD = 1 << 25  # logits that are held at once
CACHED = 1 << 19  # logits that are turned into fp32 at a time, so that they stay in cache
PIECE = 1 << 14  # of the vocabulary, for a head's gradients: oneDNN copies what is transposed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., i) times weight (o, i), plus bias (o,): (..., o); as `F.linear`."""
    if weight.dtype != torch.float32 or x.dtype != torch.float32 or x.numel() * len(weight) < SMALL or not _onednn(x):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _onednn(x: Tensor) -> bool:
    return (x.device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        flat = grad.flatten(0, -2)
        dw = _product(flat.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return dx, dw, flat.sum(0) if ctx.needs_input_grad[2] else None


def target_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, held: int = HELD,
                    squares: bool = False) -> Any:
    """log softmax(W h)[target] of each row, nats, fp32: hidden (m, d), weight (v, d), targets (m,) -> (m,).

    With `squares` also the log of the sum over the vocabulary of the squared probabilities, (m,), without gradients.

    No more than `held` logits lie in memory at a time: the last rows' are kept for the backward pass, and those before, where
    there are so many, computed once more. Under autocast products are in its dtype; log-sum-exp and gradients' sums are fp32.
    """
    auto = torch.is_autocast_enabled(hidden.device.type)
    hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type) if auto else weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = -(-len(hidden) * weight.shape[0] // held)  # of equal size: all but one are computed twice
        found = _TargetLogprobs.apply(hidden, weight, targets, bias, max(1, -(-len(hidden) // max(1, parts))), squares)
        return found if squares else found[0]


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, size: int,
                squares: bool) -> tuple[Tensor, Tensor | None]:
        out, sums, twice, logits, original, weight = [], [], [], None, weight, weight.to(hidden.dtype)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True):
            logits = linear(h, weight, bias)
            chosen, whole = logits.gather(1, t[:, None])[:, 0].float(), _logsumexp(logits)
            out.append(chosen - whole)
            sums.append(whole)
            if squares:
                twice.append(_logsumexp(logits, 2) - 2 * whole)
        ctx.size, ctx.dtype = size, original.dtype  # the weight's own, which under autocast its gradient is not rounded below
        ctx.save_for_backward(hidden, weight, targets, bias, torch.cat(sums) if sums else hidden.new_zeros(0))
        # no output and no input: kept by hand, for one backward pass, which writes into it
        ctx.logits = logits if any(ctx.needs_input_grad) else None
        none = hidden.new_zeros(0, dtype=torch.float32)
        square = (torch.cat(twice) if twice else none.clone()) if squares else None
        if square is not None:
            ctx.mark_non_differentiable(square)
        return torch.cat(out) if out else none, square

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, sums = ctx.saved_tensors
        new = torch.empty_like if len(hidden) else torch.zeros_like  # the first product is written there, the others are added
        dh = new(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        dw = new(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        db = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        starts = range(0, len(hidden), ctx.size)
        for start in reversed(starts):
            rows = slice(start, start + ctx.size)
            h, g, t = hidden[rows], grad[rows, None], targets[rows, None]
            logits, ctx.logits = ctx.logits, None
            if logits is None:
                logits = linear(h, weight, bias)
            # d logp / d logits = onehot - softmax, times what comes from above; in place
            d = _softmax_(logits, sums[rows], g)
            at_target = torch.arange(len(d), device=d.device), t[:, 0]
            d[at_target] += g[:, 0].to(d.dtype)  # scatter_add_ copies all of d, twice
            for at in range(0, len(weight), PIECE):
                piece, some = slice(at, at + PIECE), d[:, at : at + PIECE]
                if dh is not None:
                    _add(dh[rows], _times(some, weight[piece]), first=at == 0)
                if dw is not None:
                    _add(dw[piece], _times(some.t(), h), first=start == starts[-1])
            if db is not None:
                db += d.sum(0)
        dh = None if dh is None else dh.to(hidden.dtype)
        return dh, None if dw is None else dw.to(ctx.dtype), None, None if db is None else db.to(bias.dtype), None, None


def _add(to: Tensor, product: Tensor, first: bool) -> None:
    to.copy_(product) if first else to.add_(product)


def _logsumexp(logits: Tensor, times: int = 1) -> Tensor:
    """In fp32, as few rows at a time as stay in cache."""
    parts = (part.float() for part in logits.split(_few(logits)))
    return torch.cat([(part if times == 1 else part * times).logsumexp(-1) for part in parts])


def _few(logits: Tensor) -> int:
    return max(16, CACHED // logits.shape[1])


def _softmax_(logits: Tensor, sums: Tensor, grad: Tensor) -> Tensor:
    """-grad * exp(logits - sums), written over the logits."""
    for part, whole, g in zip(*(x.split(_few(logits)) for x in (logits, sums[:, None], grad)), strict=True):
        part.copy_((part.float() - whole).exp_().mul_(-g))
    return logits


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) @ b (k, n)."""
    return _product(a, b.t()) if a.dtype == torch.float32 and _onednn(a) else a @ b
