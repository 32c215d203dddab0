"""The state of decoding: prompts take places, rows of text grow by a token a step, and the model's window moves along."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xalign.nn.cache import DecodeBuffer, Kept, Prefix
from xalign.nn.transformer import TransformerWrapper

Prompts = Tensor | Sequence[Tensor]
COMMON = 16  # tokens that all prompts must begin with for a pass of their own
PREFILL = 2048  # tokens of prompts that run together, padding included; more need memory and are no faster


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the time of the block; afterwards every submodule is in the mode it was in, also on an exception."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def as_rows(prompts: Prompts, prompt_lens: Tensor | Sequence[int] | None, device: torch.device) -> list[Tensor]:
    """Prompts as tensors (n,) on the device; of a tensor (b, n) with `prompt_lens` the first so many of each row."""
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2):
            raise ValueError(f"prompts have shape {tuple(prompts.shape)}, allowed is (b, n), (n,) or a list of (n,)")
        if prompts.is_floating_point():
            raise ValueError(f"prompts have dtype {prompts.dtype}, allowed are whole numbers")
        prompts = prompts.to(device, torch.long)
        rows = list(prompts if prompts.ndim == 2 else prompts[None])
        if prompt_lens is not None:
            lens = [int(n) for n in prompt_lens]
            if len(lens) != len(rows) or any(not 0 <= n <= prompts.shape[-1] for n in lens):
                raise ValueError(f"prompt_lens is {lens}, allowed is {len(rows)} numbers from 1 to {prompts.shape[-1]}")
            rows = [row[:n] for row, n in zip(rows, lens, strict=True)]
    else:
        if prompt_lens is not None:
            raise ValueError("prompt_lens goes with a padded tensor of prompts; a list of prompts has its own lengths")
        rows = [torch.as_tensor(p, dtype=torch.long, device=device) for p in prompts]
    if not rows:
        raise ValueError("there are no prompts, allowed is at least one")
    if any(row.ndim != 1 or not len(row) for row in rows):
        empty = next(i for i, row in enumerate(rows) if row.ndim != 1 or not len(row))
        raise ValueError(f"prompt {empty} is empty, allowed is at least one token (the tokenizer's BOS will do)")
    return rows


def window_start(length: int, size: int) -> int:
    """Where the model's window begins in a text of `length` tokens: 0 until `size` is passed, then cut to the newest half.

    It depends on the length alone, so going on from a partial text sees the same windows as writing it in one go.
    """
    step = size + 1 - max(1, size // 2)
    return 0 if length <= size else -((size - length) // step) * step


def room(given: int, steps: int, copies: int, size: int) -> int:
    """Tokens of cache that a prompt of `given` tokens takes with its copies at most, as `Decoding._room` makes the buffers."""
    alone, shared = copies * min(given + steps, size + 1), min(given, size) + copies * (min(steps, size) + 1)
    return alone if copies == 1 else shared if given + steps <= size else max(alone, shared)


class Decoding:
    """Places for prompts, each continued by `copies` neighbouring rows of text that grow by a token a step.

    Rows lie left-aligned: row i's text is `text[i, : lengths[i]]`, of which `prompt_lengths[i]` tokens were given. The newest
    token is never in the cache: a step runs it, whether it was given or written, so that every step is the same. Copies hold
    their prompt's cache once while the window stands still, and what all prompts begin with is run once. If `static`, a step
    is one sequence of kernels on tensors of fixed shapes.
    """

    def __init__(self, net: TransformerWrapper, prompts: list[Tensor], steps: int, *, places: int | None = None,
                 copies: int = 1, cached: bool = True, static: bool = False, kept: Kept | None = None):
        self.net, self.copies, self.cached, self.static, self.size = net, copies, cached, static, net.max_seq_len
        device, self.given = prompts[0].device, [len(p) for p in prompts]
        self.places = len(prompts) if places is None else places
        rows, width = self.places * copies, max(self.given) + steps + 1  # a column behind, for rows that stand still
        self.prompts = pad_sequence(prompts, batch_first=True)
        self.text = torch.zeros(rows, width, dtype=torch.long, device=device)
        self.lengths, self.prompt_lengths = (torch.ones(rows, dtype=torch.long, device=device) for _ in range(2))
        self.steps = steps
        self.buffer: DecodeBuffer | None = None
        # on the host, of each place: its prompt, the tokens of its rows at most, where their window begins and ends
        self.held, self.known = [0] * self.places, [1] * self.places
        self.start, self.until = [0] * self.places, [self.size] * self.places
        if cached:
            net.check_ids(self.prompts)
        self.common = kept.beginning(prompts[0].tolist()) if kept is not None else self._common() if cached else None

    def _common(self) -> Prefix | None:
        """The cache of what all prompts begin with, where that is worth a pass of its own and no window is cut."""
        least = min(self.given) - 1
        if len(self.given) < 2 or max(self.given) > self.size or least < COMMON:
            return None
        n = int((self.prompts[:, :least] == self.prompts[0, :least]).all(0).long().cumprod(0).sum())
        if n < COMMON:
            return None
        return self.net(self.prompts[:1, :n], return_intermediates=True, return_embeddings=True)[1]

    def admit(self, places: list[int], prompts: list[int]) -> None:
        """Let these prompts take these places, whatever was there."""
        device, rows = self.text.device, self.rows_of(places)
        given = self.prompts[to_device(prompts, device)].repeat_interleave(self.copies, 0)
        self.text[rows, : given.shape[1]] = given
        lengths = to_device([self.given[p] for p in prompts], device).repeat_interleave(self.copies)
        self.lengths[rows], self.prompt_lengths[rows] = lengths, lengths
        for place, prompt in zip(places, prompts, strict=True):
            self.held[place], self.known[place] = prompt, self.given[prompt]
        self._refresh(places)

    def rows_of(self, places: list[int]) -> Tensor:
        return to_device([p * self.copies + i for p in places for i in range(self.copies)], self.text.device)

    def _refresh(self, places: list[int]) -> None:
        """Set the windows of these places and run what lies in them but the newest token."""
        for p in places:
            self.start[p] = window_start(self.known[p], self.size)
            self.until[p] = self.start[p] + self.size
        if not self.cached:
            return
        if self.buffer is None:
            self.buffer = self._room(apart=self.copies > 1)
        elif self.buffer.far_keys and any(self.known[p] > self.given[self.held[p]] for p in places):
            self.buffer = None  # copies have gone different ways: from here on each holds its own window
            self.buffer = self._room(apart=False)
            places = list(range(self.places))
        self._run(places, self.buffer)

    def _room(self, apart: bool) -> DecodeBuffer:
        rows, longest = self.places * self.copies, max(self.given)
        if apart:
            return self.net.decode_buffer(rows, min(self.steps, self.size) + 1, groups=self.places, far=min(longest, self.size),
                                          static=self.static)
        return self.net.decode_buffer(rows, min(longest + self.steps, self.size + 1), static=self.static)

    def _run(self, places: list[int], buffer: DecodeBuffer) -> None:
        """Put the windows of these places into the buffer; those of similar length run together."""
        device, apart = self.text.device, bool(buffer.far_keys)
        # what each row (or, of copies that share it, prompt) starts with, and how long that is
        rows = [(p if apart else p * self.copies + i, self.start[p], self.known[p] - self.start[p] - 1)
                for p in places for i in range(1 if apart else self.copies)]
        rows.sort(key=lambda row: -row[2])
        while rows:
            n = rows[0][2]
            count = max(1, PREFILL // max(1, n))
            chunk, rows = rows[:count], rows[count:]
            at, starts, sizes = (to_device(list(t), device) for t in zip(*chunk, strict=True))
            common = self.common if self.common is not None and not any(start for _, start, _ in chunk) else Prefix.empty()
            tokens = self._window(at * self.copies if apart else at, starts, n)[:, common.length :]
            if tokens.shape[1]:
                prefix = self.net(tokens, cache=common, input_not_include_cache=True, return_intermediates=True,
                                  return_embeddings=True)[1]
            else:
                prefix = common.branch(len(chunk))
            buffer.fill(at, prefix, sizes)

    def _window(self, rows: Tensor, starts: Tensor, n: int) -> Tensor:
        """n tokens (r, n) from column `starts` (r,) on; what stands behind a row's end is of no meaning."""
        columns = starts[:, None] + torch.arange(n, device=starts.device)
        return self.text[rows].gather(1, columns.clamp(max=self.text.shape[1] - 1))

    def prepare(self, places: list[int]) -> None:
        """Before a step of these places: move the windows that the newest tokens have outgrown."""
        moved = [p for p in places if self.known[p] > self.until[p]]
        if moved:
            self._refresh(moved)
        if self.buffer is not None:
            base = [self.given[h] if self.buffer.far_keys else s + 1 for h, s in zip(self.held, self.start, strict=True)]
            own = {self.known[p] - base[p] for p in places}
            self.buffer.high, self.buffer.even = max(own), len(own) == 1

    def logits(self, live: Tensor | None = None) -> Tensor:
        """Logits (b, v) of each row's next token; rows that are False in `live` (b,) stand still. `prepare` comes before."""
        if self.buffer is not None:
            return self.net.step(self.text.gather(1, self.lengths[:, None] - 1)[:, 0], self.buffer, live)
        starts = to_device(self.start, self.text.device).repeat_interleave(self.copies)
        n = min(self.size, max(k - s for k, s in zip(self.known, self.start, strict=True)))  # an ended row may be past it
        hidden = self.net(self._window(torch.arange(len(starts), device=starts.device), starts, n), return_embeddings=True)
        last = (self.lengths - starts - 1).clamp(0, n - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self.net.logits(hidden.gather(1, last)[:, 0])

    def append(self, tokens: Tensor, live: Tensor | None = None) -> None:
        """Write the next token of each row; a row that is False in `live` (b,) doesn't grow."""
        self.text.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths += 1 if live is None else live

    def advance(self, places: list[int]) -> None:
        """After a step: the host knows that these places have a token more."""
        for p in places:
            self.known[p] += 1

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from the text of row `rows[i]`, of the same prompt and length."""
        self.text.copy_(self.text[rows])
        if self.buffer is not None:
            self.buffer.reorder(rows)

    def save(self, kept: Kept) -> None:
        """Keep the cache of the one row's text for the next call, unless its window has moved."""
        if self.buffer is not None and not self.start[0]:
            kept.take(self.text[0], self.buffer, self.net.token_emb.weight.dtype)

    def keep(self, places: list[int]) -> None:
        """Drop all places but these."""
        rows = self.rows_of(places)
        self.text, self.lengths, self.prompt_lengths = (t[rows] for t in (self.text, self.lengths, self.prompt_lengths))
        if self.buffer is not None:
            self.buffer.keep(rows, to_device(places, rows.device))
        self.held, self.known, self.start, self.until = (
            [t[p] for p in places] for t in (self.held, self.known, self.start, self.until))
        self.places = len(places)


def to_device(numbers: list[int], device: torch.device) -> Tensor:
    """On a GPU through pinned memory, so that nothing waits."""
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    return torch.tensor(numbers, pin_memory=True).to(device, non_blocking=True)
