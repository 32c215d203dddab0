"""Keys and values of the tokens that came before: an immutable prefix, and the buffer of a decoding loop."""

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """`length` slots of keys and values, of which `mask` tells the real ones."""

    length: int
    mask: Tensor | None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


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
    """A preallocated cache of b rows that grow by a token a step, each from its own length; written in place under no_grad.

    Keys and values are (b, k, capacity, e) a layer; row i's tokens lie in its first `lengths[i]` columns, and a row that stands
    still needs one column more. With `far` columns the prompts of p groups are held once, apart, and each serves b / p
    neighbouring rows, whose own columns come behind it.
    All that a step depends on is in tensors of fixed shape if `static`; else only the columns in use are read.
    """

    def __init__(self, layers: int, rows: int, heads: int, capacity: int, dim: int, dtype: torch.dtype, device: torch.device,
                 *, groups: int = 0, far: int = 0, static: bool = False):
        def room(rows: int, columns: int) -> list[Tensor]:
            return [torch.zeros(rows, heads, columns, dim, dtype=dtype, device=device) for _ in range(layers)]

        self.keys, self.values = room(rows, capacity), room(rows, capacity)
        self.far_keys, self.far_values = (room(groups, far), room(groups, far)) if far else ([], [])
        self.lengths, self.far_lengths = (torch.zeros(n, dtype=torch.long, device=device) for n in (rows, groups))
        self.rows, self.columns = torch.arange(rows, device=device), torch.arange(capacity, device=device)
        self.far_columns = torch.arange(far, device=device)
        self.capacity, self.static, self.dtype = capacity, static, dtype
        self.high, self.even = 0, True  # on the host: the longest row's own length; whether all that matter are so long

    def fill(self, rows: Tensor, prefix: Prefix, lengths: Tensor) -> None:
        """Let row (or group) `rows[i]` hold the first `lengths[i]` tokens of `prefix`'s row i alone.

        `high` and `even` are then the caller's to set.
        """
        n = prefix.length
        for t in (*self.keys, *self.values, *self.far_keys, *self.far_values):
            # a NaN that was there before would be seen through any mask
            t.view(len(self.far_lengths if self.far_keys else self.lengths), -1).index_fill_(0, rows, 0)
        held = (self.far_keys, self.far_values) if self.far_keys else (self.keys, self.values)
        for buffers, news in zip(held, (prefix.keys, prefix.values), strict=True):
            for buffer, new in zip(buffers, news, strict=False):  # an empty prefix has no layers
                buffer[rows, :, :n] = new.to(buffer.dtype)
        if self.far_keys:
            self.far_lengths[rows] = lengths
            self.lengths.view(len(self.far_lengths), -1).index_fill_(0, rows, 0)
        else:
            self.lengths[rows] = lengths

    def positions(self) -> Tensor:
        """Positions (b, 1) of the tokens that come next."""
        own = self.lengths[:, None]
        return own + self.far_lengths.repeat_interleave(len(own) // len(self.far_lengths))[:, None] if self.far_keys else own

    def seen(self) -> tuple[Tensor | None, Tensor]:
        """What the next tokens see, far columns first: a mask (b, m), None if everything; and positions (b | 1, m)."""
        columns = self.columns[: self.capacity if self.static else self.high + 1]
        near, own = columns <= self.lengths[:, None], columns[None]
        if not self.far_keys:
            return (near if self.static or not self.even else None), own
        copies = len(self.lengths) // len(self.far_lengths)
        far = (self.far_columns < self.far_lengths[:, None]).repeat_interleave(copies, 0)
        start = self.far_lengths.repeat_interleave(copies)[:, None]
        return torch.cat((far, near), 1), torch.cat((self.far_columns.expand(len(start), -1), start + own), 1)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a token of each row; give the columns in use."""
        k, v = self.keys[layer], self.values[layer]
        if not self.static and self.high >= self.capacity:
            raise ValueError(f"{self.high + 1} tokens, but this decode buffer has room for {self.capacity}")
        if not self.static and self.even:
            k.select(2, self.high).copy_(keys.select(2, 0))
            v.select(2, self.high).copy_(values.select(2, 0))
        else:
            k[self.rows, :, self.lengths] = keys[:, :, 0].to(k.dtype)
            v[self.rows, :, self.lengths] = values[:, :, 0].to(v.dtype)
        return (k, v) if self.static else (k.narrow(2, 0, self.high + 1), v.narrow(2, 0, self.high + 1))

    def advance(self, live: Tensor | None) -> None:
        """The tokens are in; rows that are False in `live` (b,) stay as they were, and the next token overwrites this one."""
        self.lengths += 1 if live is None else live
        if not self.static:  # a step that is captured or compiled looks at no number that changes
            self.high += 1

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from the own tokens of row `rows[i]`."""
        width = self.capacity if self.static else self.high
        for t in (*self.keys, *self.values):
            t[:, :, :width] = t[rows, :, :width]
        self.lengths.copy_(self.lengths[rows])

    def keep(self, rows: Tensor, groups: Tensor) -> None:
        """Drop all rows but these, in this order."""
        self.keys, self.values = [t[rows] for t in self.keys], [t[rows] for t in self.values]
        self.far_keys, self.far_values = [t[groups] for t in self.far_keys], [t[groups] for t in self.far_values]
        self.lengths, self.far_lengths = self.lengths[rows], self.far_lengths[groups] if self.far_keys else self.far_lengths
        self.rows = self.rows[: len(rows)]


class Kept:
    """The cache of a text that grows from call to call, such as a conversation: what a new text begins with isn't run again.

    It belongs to one model, whose weights stay as they are. Of the text that was run last `reused` tokens were known.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.prefix = Prefix.empty()
        self.reused = 0

    def beginning(self, text: list[int]) -> Prefix:
        """The cache of what a text, without its last token, has in common with the one before."""
        alike = (i for i, (a, b) in enumerate(zip(text[:-1], self.ids, strict=False)) if a != b)
        n = self.reused = next(alike, min(len(text) - 1, len(self.ids)))
        return Prefix([k[:, :, :n] for k in self.prefix.keys], [v[:, :, :n] for v in self.prefix.values], None, n)

    def take(self, text: Tensor, buffer: DecodeBuffer, dtype: torch.dtype) -> None:
        """Hold what the first row of a buffer holds of its `text` (n,); keys and values in `dtype`, the model's own."""
        n = int(buffer.lengths[0])
        keys, values = ([t[:1, :, :n].to(dtype) for t in ts] for ts in (buffer.keys, buffer.values))
        ids, prefix = text[:n].tolist(), Prefix(keys, values, None, n)
        self.ids, self.prefix = ids, prefix  # together: Ctrl-C may come anywhere
