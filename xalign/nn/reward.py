"""A scalar head on a decoder: the value of a text is read at its last real token."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from xalign.data.collate import TruncationMode, encode_scored
from xalign.data.records import Message, Text
from xalign.errors import ConfigError, DataError
from xalign.logprobs import compact
from xalign.nn.decoding import evaluating
from xalign.nn.transformer import TransformerWrapper
from xalign.tokenizers import Tokenizer

Side = Literal["left", "right"]
Turns = Sequence[Message | Mapping[str, str]]  # a conversation: messages, or {"role": ..., "content": ...}


class RewardModel(nn.Module):
    """tokens (b, n) -> rewards (b,): a head one wide on the hidden state of the last real token, in fp32.

    `mask` (b, n) is True on real tokens and decides alone which one is last: padding may lie on either side, and its
    id may be the EOS token's. The head starts as in OpenRLHF, N(0, 1 / (d + 1)) without a bias. `score` rates texts.
    `mean` and `std` are of rewards on held-out texts; `normalize_reward` says whether `score` counts in them by itself.
    """

    makes_logits: ClassVar[bool] = False  # as a language model does: what counts memory or operations asks
    # of `xalign.checkpoint`, which puts them here: this file knows no files
    from_pretrained: ClassVar[Callable[..., "RewardModel"]]
    save_pretrained: ClassVar[Callable[..., None]]

    def __init__(self, model: nn.Module, tokenizer: Tokenizer | None = None):
        super().__init__()
        inner: Any = getattr(model, "net", model)  # inside an AutoregressiveWrapper
        self.net: TransformerWrapper = inner
        dim = self.net.attn_layers.dim
        self.head = nn.Linear(dim, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / (dim + 1))
        self.tokenizer, self.mean, self.std, self.normalize_reward = tokenizer, 0.0, 1.0, False
        self.truncated = 0  # texts that the last `score` cut

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rewards (b,), fp32, not normalised. Raises `ValueError` for a row without a real token."""
        mask, tokens, last = self._rows(tokens, mask)
        hidden = self.net(tokens, return_embeddings=True)
        return self._value(hidden[torch.arange(len(tokens), device=tokens.device), last])

    def branch_rewards(self, tokens: Tensor, mask: Tensor | None = None, sides: int = 2) -> Tensor:
        """The same, without running padding, and what rows i, b / sides + i, ... begin with only once."""
        mask, tokens, last = self._rows(tokens, mask)
        several = tokens.view(sides, -1, tokens.shape[1])
        alike = (several == several[0]).all(0).long().cumprod(1).sum(1)
        begin = torch.minimum(alike, last.view(sides, -1).amin(0)).repeat(sides) if sides > 1 else torch.zeros_like(last)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self._value(self.net.branch_hidden(tokens, begin, last + 1, sides, rows, last))

    def _rows(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mask and tokens (b, n) with the real ones first, and where the last of them is, (b,)."""
        if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
            shapes = tuple(tokens.shape), None if mask is None else tuple(mask.shape)
            raise ValueError(f"tokens and mask have shapes {shapes}, allowed is (b, n) for both")
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        mask, tokens = compact(mask, tokens)
        last = mask.sum(1) - 1
        if not bool((last >= 0).all()):
            raise ValueError(f"row {int((last < 0).nonzero()[0])} has no real token, allowed is at least one")
        return mask, tokens.masked_fill(~mask, 0), last

    def _value(self, final: Tensor) -> Tensor:
        with torch.autocast(final.device.type, enabled=False):
            return F.linear(final.float(), self.head.weight.float())[:, 0]

    # -- texts ------------------------------------------------------------------------------------------------------

    def score(self, prompts: Sequence[str | Turns], responses: Sequence[str | Turns], batch_size: int = 16,
              max_length: int | None = None, truncation_side: Side = "left", normalize: bool | None = None,
              progress: str = "") -> Tensor:
        """Rewards (b,) of responses to prompts, fp32 on the CPU, the same for any `batch_size` (in fp32, to 1e-5).

        Prompts are texts or lists of messages, responses texts (or lists of one assistant message), rendered as training
        renders them: one BOS, and the EOS or end of turn that closes a reply. Longer ones than `max_length` tokens (None:
        the model's positions) are cut as `encode_scored` says, and counted in `self.truncated`. `normalize` gives
        (reward - mean) / std; None: if the checkpoint says so. `progress` is a bar's title.
        Raises `DataError` for texts that can't be rendered, `ConfigError` for settings and a model without a tokenizer.
        """
        rows, self.truncated = self.encode(prompts, responses, max_length, truncation_side)
        rewards = self.score_ids(rows, batch_size, progress)
        return (rewards - self.mean) / self.std if (self.normalize_reward if normalize is None else normalize) else rewards

    def encode(self, prompts: Sequence[str | Turns], responses: Sequence[str | Turns], max_length: int | None = None,
               truncation_side: Side = "left") -> tuple[list[list[int]], int]:
        """The ids of each text that is rated, and how many texts were cut; arguments as in `score`."""
        if self.tokenizer is None:
            raise ConfigError("no tokenizer to score with: allowed is RewardModel(model, tokenizer), or a folder with one")
        alone = isinstance(prompts, str) or isinstance(responses, str)
        if alone or len(prompts) != len(responses):
            said = "a text" if alone else f"{len(prompts)} and {len(responses)}"
            raise DataError(f"prompts and responses are {said}, allowed are two lists of the same length")
        if truncation_side not in ("left", "right"):
            raise ConfigError(f"truncation_side is {truncation_side!r}, allowed is 'left' or 'right'")
        mode: TruncationMode = "keep_end" if truncation_side == "left" else "keep_start"
        limit = self.net.max_seq_len if max_length is None else min(max_length, self.net.max_seq_len)
        rows, cut = [], 0
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            where = f"text {i + 1}"
            first = _text(prompt, where)
            second = (Message("assistant", response),) if isinstance(response, str) and not isinstance(first, str) else (
                _text(response, where))
            if isinstance(first, str) != isinstance(second, str):
                raise DataError(f"{where}: the prompt is a text and the response messages, allowed are two texts or messages")
            head, ids, was_cut = encode_scored(first, second, self.tokenizer, limit, mode, where)
            rows.append(head + ids)
            cut += was_cut
        return rows, cut

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]], batch_size: int = 16, progress: str = "") -> Tensor:
        """Rewards (b,) of token ids, fp32 on the CPU, not normalised, the longest first and `batch_size` at a time."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, allowed is 1 or more")
        texts = list(dict.fromkeys(map(tuple, rows)))  # each once: its last bit may depend on the batch, and a tie is a tie
        found, device = torch.zeros(len(texts)), self.head.weight.device
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        with evaluating(self), tqdm(total=len(texts), desc=progress, unit="text", disable=not progress, mininterval=1) as bar:
            for at in range(0, len(order), batch_size):
                some = order[at : at + batch_size]
                tokens = pad_sequence([torch.tensor(texts[i], dtype=torch.long) for i in some], batch_first=True)
                mask = torch.arange(tokens.shape[1]) < torch.tensor([len(texts[i]) for i in some])[:, None]
                found[some] = self(tokens.to(device), mask.to(device)).cpu()
                bar.update(len(some))
        place = {text: i for i, text in enumerate(texts)}
        return found[[place[tuple(row)] for row in rows]]


def _text(given: str | Turns, where: str) -> Text:
    if isinstance(given, str):
        return given
    try:
        return tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in given)
    except (LookupError, TypeError):
        raise DataError(f"{where} is {given!r:.60}, allowed is a text or a list of messages with role and content") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
