"""Rows of tokens without padding, of which those that begin alike share their beginning."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xalign.nn.attention import Attention, Context
from xalign.nn.linear import products
from xalign.nn.rotary import rotate

DENSE = 1.06  # up to so many places a token, padding costs less than moving every token to its place


class Grid:
    """`count` tokens that fill (rows, width) places row by row: all of them, or those listed in `place` (count,)."""

    def __init__(self, tokens: Tensor, start: Tensor, end: Tensor, width: int, count: int):
        columns = start[:, None] + torch.arange(width, device=tokens.device)
        self.rows, self.width = len(start), width
        self.place: Tensor | None = None
        self.tokens, self.positions = tokens.gather(1, columns.clamp(max=tokens.shape[1] - 1)).flatten(), columns.flatten()
        if self.rows * width > DENSE * count:
            self.place = (columns < end[:, None]).flatten().nonzero()[:, 0]
            self.tokens, self.positions = self.tokens[self.place], self.positions[self.place]

    def spread(self, x: Tensor) -> Tensor:
        """Flat (count, h, e) -> padded with zeros, (rows, h, width, e)."""
        padded = x if self.place is None else _Spread.apply(x, self.place, self.rows * self.width)
        return padded.unflatten(0, (self.rows, self.width)).transpose(1, 2)

    def flat(self, x: Tensor) -> Tensor:
        """Padded (rows, h, width, e) -> (count, h, e)."""
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat if self.place is None else _Gather.apply(flat, self.place)


class _Spread(torch.autograd.Function):
    """index_copy into zeros; torch's own gradient of `_Gather` adds up, as if places could be the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


class Branches:
    """r = sides * b rows of tokens (r, n), in which rows i, b + i, ... are alike in their first `begin[i]` columns.

    Flat, as `tokens` and `positions` (t,), they are the b beginnings, `shared` tokens, and then columns begin <= c < end
    of all r rows, the branches. Only attention sees rows, and there alone is padding; where hardly any is needed,
    it is there from the start and nothing has to be moved.
    """

    def __init__(self, tokens: Tensor, begin: Tensor, end: Tensor, sides: int):
        self.sides, b = sides, len(tokens) // sides
        lengths = end - begin
        # the only values that are read on the host
        wide, long, head, tail = torch.stack((begin.max(), lengths.max(), begin[:b].sum(), lengths.sum())).tolist()
        self.heads = Grid(tokens[:b], torch.zeros_like(begin[:b]), begin[:b], wide, head) if wide else None
        self.tails = Grid(tokens, begin, end, long, tail)
        self.begin, self.lengths = begin, lengths
        self.tokens, self.positions, self.shared = self.tails.tokens, self.tails.positions, 0
        if self.heads is not None:
            self.tokens = torch.cat((self.heads.tokens, self.tokens))
            self.positions = torch.cat((self.heads.positions, self.positions))
            self.shared = len(self.heads.tokens)

    def places(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where a row's column (of its branch) lies among the flat branches."""
        before = rows * self.tails.width if self.tails.place is None else (self.lengths.cumsum(0) - self.lengths)[rows]
        return before + columns - self.begin[rows]

    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the branches: positions of queries (r, n), of keys (r, m), beginnings first, and who sees whom, (r, 1, n, m)."""
        own, head = (torch.arange(w, device=self.begin.device) for w in (self.tails.width, self.keys - self.tails.width))
        queries, r = self.begin[:, None] + own, len(self.begin)
        allowed = torch.cat(((head < self.begin[:, None])[:, None].expand(-1, len(own), -1),
                             (own <= own[:, None]).expand(r, -1, -1)), 2)
        return queries, torch.cat((head.expand(r, -1), queries), 1), allowed[:, None]

    @property
    def keys(self) -> int:
        return self.tails.width + (self.heads.width if self.heads is not None else 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, run: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Tensor:
        """Attention of flat queries (t, h, e), or those of the branches alone, to keys and values (t, h, e); flat.

        `run(q, k, v, branches)` attends in a padded batch (b, h, n, e), of the beginnings or of the branches.
        """
        branches = self.tails.spread(q[len(q) - len(self.tails.tokens) :])
        own = [self.tails.spread(x[self.shared :]) for x in (k, v)]
        if self.heads is None:
            return self.tails.flat(run(branches, own[0], own[1], True))
        held = [self.heads.spread(x[: self.shared]) for x in (k, v)]
        both = [torch.cat((h.repeat(self.sides, 1, 1, 1), x), 2) for h, x in zip(held, own, strict=True)]
        out = self.tails.flat(run(branches, both[0], both[1], True))
        if len(q) < len(k):
            return out
        return torch.cat((self.heads.flat(run(self.heads.spread(q[: self.shared]), held[0], held[1], False)), out))


@dataclass
class BranchContext(Context):
    """What layers share in a pass over flat tokens: the fields are those of the branches, `first` is the beginnings'."""

    branches: Branches
    first: Context


def attend_branches(layer: Attention, x: Tensor, context: BranchContext, unused: int) -> Tensor:
    """The layer's attention over flat tokens x (1, t, d): (1, t, d), or (1, t - unused, d) without the beginnings."""
    if unused:
        q, k, v = layer.to_q(x[:, unused:]), *products(x, (layer.to_k, layer.to_v))
    else:
        q, k, v = products(x, (layer.to_q, layer.to_k, layer.to_v))
    q, k, v = (t.unflatten(-1, (-1, layer.dim_head)).transpose(1, 2) for t in (q, k, v))  # (1, t, h * e) -> (1, h, t, e)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    dtype = q.dtype
    if context.rotation is not None:
        cos, sin = context.rotation
        q, k = rotate(q, (cos[..., unused:, :], sin[..., unused:, :]), dtype), rotate(k, context.rotation, dtype)

    def run(q: Tensor, k: Tensor, v: Tensor, branches: bool) -> Tensor:
        return layer.attend(q, k, v, context if branches else context.first)

    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    out = context.branches.attend(q, k, v, run)
    return layer.to_out(out.to(dtype).flatten(1)[None])
