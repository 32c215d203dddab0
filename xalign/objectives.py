"""What is minimised: (batch) -> mean loss and metrics, and what one batch weighs in the global mean."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xalign.data.collate import ExampleBatch, PairBatch
from xalign.dpo import DPO
from xalign.logprobs import scored_logprobs


class Objective(Protocol):
    def weight(self, batch: Any) -> int:
        """How much of the global mean the batch is: scored tokens, or pairs."""

    def tokens(self, batch: Any) -> int:
        """Tokens that count, of texts to imitate."""

    def lengths(self, batch: Any) -> list[list[int]]:
        """Of each row how many tokens the prompt has, and each completion."""

    def __call__(self, batch: Any, tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch, and metrics that average by the same weight; `tokens` is the step's tokens / weight."""


class SFT:
    """Next-token cross-entropy of the scored tokens, nats a token."""

    def __init__(self, model: nn.Module):
        self.model = model

    def weight(self, batch: ExampleBatch) -> int:
        return int(batch.loss_mask[:, 1:].sum())

    def tokens(self, batch: ExampleBatch) -> int:
        return self.weight(batch)

    def lengths(self, batch: ExampleBatch) -> list[list[int]]:
        scored = batch.loss_mask[:, 1:].sum(1)
        return torch.stack((batch.mask.sum(1) - scored, scored), 1).tolist()

    def __call__(self, batch: ExampleBatch, tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        logps, scored = scored_logprobs(self.model, batch.tokens, batch.loss_mask)
        return -logps.masked_fill(~scored, 0.0).sum() / scored.sum().clamp(min=1), {}


class Preference:
    """The loss of a `DPO` module, nats a pair; `ref_logps` are the reference's (chosen, rejected), by pair index."""

    def __init__(self, dpo: DPO, ref_logps: tuple[Tensor, Tensor] | None = None):
        self.dpo, self.ref_logps = dpo, ref_logps

    def weight(self, batch: PairBatch) -> int:
        return len(batch)

    def tokens(self, batch: PairBatch) -> int:
        return int((batch.chosen_mask & ~batch.chosen_prompt_mask)[:, 1:].sum())

    def lengths(self, batch: PairBatch) -> list[list[int]]:
        prompt, chosen, rejected = (m.sum(1) for m in (batch.chosen_prompt_mask, batch.chosen_mask, batch.rejected_mask))
        return torch.stack((prompt, chosen - prompt, rejected - prompt), 1).tolist()

    def __call__(self, batch: PairBatch, tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        known = None
        if self.ref_logps is not None:
            known = tuple(t[batch.index.to(t.device)].to(batch.chosen.device) for t in self.ref_logps)
        return self.dpo(batch.chosen, batch.rejected, **pair_masks(batch), ref_logps=known, tokens_per_pair=tokens,
                        return_metrics=True)


def pair_masks(batch: PairBatch) -> dict[str, Any]:
    """A batch's masks under the names that `DPO` gives them."""
    return {"prompt_mask": (batch.chosen_prompt_mask, batch.rejected_prompt_mask),
            "preferred_seq_mask": batch.chosen_mask, "unpreferred_seq_mask": batch.rejected_mask}


@torch.no_grad()
def pair_logps(dpo: DPO, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (b,) of the chosen and the rejected completions under `model`, nats."""
    chosen, rejected, _, _ = dpo.logps(model, batch.chosen, batch.rejected, **pair_masks(batch))
    return chosen, rejected
