"""A scalar head on a decoder: the value of a text is read at its last real token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xalign.logprobs import compact
from xalign.nn.transformer import TransformerWrapper


class RewardModel(nn.Module):
    """tokens (b, n) -> rewards (b,): a head one wide on the hidden state of the last real token, in fp32.

    `mask` (b, n) is True on real tokens and decides alone which one is last: padding may lie on either side, and its
    id may be the EOS token's. The head starts as in OpenRLHF, N(0, 1 / (d + 1)) without a bias.
    """

    def __init__(self, model: TransformerWrapper):
        super().__init__()
        self.net = getattr(model, "net", model)  # inside an AutoregressiveWrapper
        dim = self.net.attn_layers.dim
        self.score = nn.Linear(dim, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / (dim + 1))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rewards (b,), fp32. Raises `ValueError` for a row without a real token."""
        if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
            shapes = tuple(tokens.shape), None if mask is None else tuple(mask.shape)
            raise ValueError(f"tokens and mask have shapes {shapes}, allowed is (b, n) for both")
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        mask, tokens = compact(mask, tokens)
        last = mask.sum(1) - 1
        if not bool((last >= 0).all()):
            raise ValueError(f"row {int((last < 0).nonzero()[0])} has no real token, allowed is at least one")
        hidden = self.net(tokens.masked_fill(~mask, 0), return_embeddings=True)
        final = hidden[torch.arange(len(tokens), device=tokens.device), last]
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(final.float(), self.score.weight.float())[:, 0]
