"""Log-probabilities of tokens: the one place of the next-token shift, the loss mask and the fp32 log-sum-exp."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each next token, nats, fp32: logits (b, n, v), tokens (b, n) -> (b, n - 1).

    Column t holds log p(tokens[t + 1] | tokens[: t + 1]); the softmax is fp32 whatever the logits' dtype.
    """
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits are {tuple(logits.shape)} but tokens {tuple(tokens.shape)}, allowed is (b, n, v) and (b, n)")
    if logits.shape[1] < 2:
        return logits.new_zeros(logits.shape[0], 0, dtype=torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        # rolling the tokens instead of cutting the logits copies no logits; the last column is nobody's and goes
        flat = F.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten(), reduction="none")
    return -flat.view_as(tokens)[:, :-1]


def compact(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Move each row's real columns to the left in their order, padding to the right: (b, n) each.

    A causal model then needs no mask, and a token's predecessor is always the real one before it.
    """
    order = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices
    return [t.gather(1, order) for t in (mask, *tensors)]


def scored_logprobs(model: nn.Module, tokens: Tensor, loss_mask: Tensor, mask: Tensor | None = None, *,
                    sides: int = 1, packed: bool = True, squares: bool = False) -> tuple[Tensor, ...]:
    """Per-token log-probabilities of one forward pass and which of them are scored, both (b, n - 1).

    `loss_mask` (b, n) is True on tokens to score and `mask` (b, n) on real ones (None: all). Padding may lie
    anywhere and have any id. A row's first real token has nothing before it and is never scored.

    A model of ours runs without padding and gives log-probabilities to scored tokens alone, the others are 0; with
    `sides` > 1, what rows i, b / sides + i, ... have in common before their first scored token is run once. With `packed`
    False, as with other models, all rows go through the model as they are. With `squares` there is a third, without
    gradients: the log of the sum over the vocabulary of the squared probabilities, where a token is scored.
    """
    n, loss_mask = tokens.shape[1], loss_mask.bool()
    if mask is not None:
        mask, tokens, loss_mask = compact(mask.bool(), tokens, loss_mask)
        tokens, loss_mask = tokens.masked_fill(~mask, 0), loss_mask & mask
    scored = loss_mask[:, 1:]
    if packed and hasattr(model, "branch_logprobs"):
        logps, *twice = _packed_logprobs(model, tokens, scored, sides, squares)
        return logps, scored, *twice
    if mask is not None:
        longest = max(1, int(mask.sum(1).max()))  # further right all is padding, which costs nothing and fills no window
        tokens = tokens[:, :longest]
    logits = model(tokens)
    found = [token_logprobs(logits, tokens)]
    if squares:
        with torch.no_grad():
            found.append((2 * logits[:, :-1].float().log_softmax(-1)).logsumexp(-1))
    logps, *twice = (F.pad(t, (0, n - tokens.shape[1])) for t in found)
    return logps, scored, *twice


def _packed_logprobs(model: Any, tokens: Tensor, scored: Tensor, sides: int, squares: bool) -> list[Tensor]:
    columns = torch.arange(1, tokens.shape[1], device=tokens.device)
    # inputs 0 <= c < end give all that is scored; column c scores token c + 1
    end = torch.where(scored, columns, 0).amax(1) if len(columns) else tokens.new_zeros(len(tokens))
    first = torch.where(scored, columns - 1, tokens.shape[1]).amin(1) if len(columns) else end
    begin = torch.zeros_like(end)
    if sides > 1:
        several = tokens.view(sides, -1, tokens.shape[1])
        alike = (several == several[0]).all(0).long().cumprod(1).sum(1)
        begin = torch.minimum(alike, torch.minimum(first, end).view(sides, -1).amin(0)).repeat(sides)
    logps = torch.zeros(scored.shape, device=tokens.device)
    rows, at = scored.nonzero(as_tuple=True)
    if not len(rows):  # a token, for nothing: its gradient may be asked for, and of a sharded model all processes run a pass
        nothing = tokens.new_zeros(1)
        one = model.branch_logprobs(tokens[:1, :1], nothing, nothing + 1, 1, nothing, nothing, tokens[0, :1])
        return [logps + 0 * one.sum(), *[logps] * squares]
    found = model.branch_logprobs(tokens, begin, end, sides, rows, at, tokens[rows, at + 1], squares)
    return [logps.index_put((rows, at), t) for t in (found if squares else [found])]


def sequence_logprobs(model: nn.Module, tokens: Tensor, loss_mask: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-probability of the scored tokens of each row, summed over loss_mask[:, 1:], nats, fp32: (b,)."""
    logps, scored = scored_logprobs(model, tokens, loss_mask, mask)
    return logps.masked_fill(~scored, 0.0).sum(1)


@torch.no_grad()
def best_logprobs(model: Any, hidden: Tensor, targets: Tensor, held: int = 1 << 23) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, nats, fp32, and whether no token is likelier (of equals the first): (m,) each.

    `hidden` (m, d) are final hidden states, which `model.logits` turns into logits, no more than `held` at a time.
    """
    logps, best = [], []
    for part, wanted in zip(*(t.split(max(1, held // model.num_tokens)) for t in (hidden, targets)), strict=True):
        logits = model.logits(part).float()
        logps.append(-F.cross_entropy(logits, wanted, reduction="none"))
        best.append(logits.argmax(-1) == wanted)
    return torch.cat(logps), torch.cat(best)
