"""The state of decoding: rows of text that grow by a token a step, and the model's window onto them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xalign.nn.attention import BranchedBuffer, DecodeBuffer
from xalign.nn.transformer import TransformerWrapper

Prompts = Tensor | Sequence[Tensor]


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


def left_padded(prompts: Prompts, prompt_lens: Tensor | Sequence[int] | None, device: torch.device) -> tuple[Tensor, list[int]]:
    """Prompts as one left-padded tensor (b, n) and their lengths; a tensor with `prompt_lens` is right-padded."""
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2):
            raise ValueError(f"prompts have shape {tuple(prompts.shape)}, allowed is (b, n), (n,) or a list of (n,)")
        rows = list(prompts.to(device) if prompts.ndim == 2 else prompts.to(device)[None])
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
    lengths = [len(row) for row in rows]
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long, device=device)
    for i, row in enumerate(rows):
        padded[i, padded.shape[1] - len(row) :] = row
    return padded, lengths


def window_start(length: int, size: int) -> int:
    """Where the model's window begins in a text of `length` tokens: 0 until `size` is passed, then cut to the newest half.

    It depends on the length alone, so going on from a partial text sees the same windows as writing it in one go.
    """
    step = size + 1 - max(1, size // 2)
    return 0 if length <= size else -((size - length) // step) * step


class Decoding:
    """Rows of real tokens behind left padding, `text[:, :end]`; gives the logits of the next token of each.

    Each of p prompts is continued by `copies` neighbouring rows, which hold its cache once while the window stands still.
    """

    def __init__(self, net: TransformerWrapper, prompts: Tensor, lengths: list[int], steps: int, cached: bool = True,
                 copies: int = 1):
        self.net, self.cached, self.copies = net, cached, copies
        prompts, self.lengths = prompts.repeat_interleave(copies, 0), [n for n in lengths for _ in range(copies)]
        self.first_width = self.end = prompts.shape[1]
        self.final = self.end + steps
        self.text = torch.cat((prompts, prompts.new_zeros(prompts.shape[0], steps)), 1)
        self.columns = torch.arange(self.final, device=prompts.device)
        self.paddings = [self.end - n for n in self.lengths]
        self.real = self.columns >= torch.tensor(self.paddings, device=prompts.device)[:, None]
        # the number of real tokens in each row before the first step, on the device
        self.prompt_lengths = torch.tensor(self.lengths, device=prompts.device)
        self.buffer: DecodeBuffer | None = None
        self.until = -1  # the last number of written tokens with which no row's window moves

    def logits(self) -> Tensor:
        """Logits (b, v) of the next token; the model runs on the newest token, or on the window where it moved."""
        written = self.end - self.first_width
        if self.buffer is not None and written <= self.until:
            return self.net(self.text[:, self.end - 1 : self.end], cache=self.buffer, input_not_include_cache=True)[:, -1]
        first, self.buffer, size = self.until < 0, None, self.net.max_seq_len
        own = [window_start(n + written, size) for n in self.lengths]
        self.until = min(start + size - n for start, n in zip(own, self.lengths, strict=True))
        starts = [start + pad for start, pad in zip(own, self.paddings, strict=True)]
        low = min(starts)
        tokens, mask = self.text[:, low : self.end], None
        if any(s != low for s in starts):
            mask = self.columns[low : self.end] >= torch.tensor(starts, device=tokens.device)[:, None]
        capacity = min(size, self.final - low)
        if first and self.cached and self.copies > 1:
            mask = None if mask is None else mask[:: self.copies]
            hidden, prefix = self.net(tokens[:: self.copies], mask=mask, return_intermediates=True, return_embeddings=True)
            self.buffer = BranchedBuffer(prefix, len(tokens), max(0, capacity - tokens.shape[1]))
            return self.net.logits(hidden[:, -1]).repeat_interleave(self.copies, 0)
        if self.cached:
            self.buffer = self.net.decode_buffer(len(tokens), capacity)
        hidden = self.net(tokens, mask=mask, cache=self.buffer, input_not_include_cache=True, return_embeddings=True)
        return self.net.logits(hidden[:, -1])

    def append(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Write the next token of each row; with `rows`, row i first goes on from the text of row `rows[i]`.

        Rows may only be exchanged among those that share a prompt.
        """
        if rows is not None:
            self.text[:, self.first_width : self.end] = self.text[rows, self.first_width : self.end]
            if self.buffer is not None:
                self.buffer.reorder(rows)
        self.text[:, self.end] = tokens
        self.end += 1
