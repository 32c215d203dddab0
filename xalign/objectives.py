"""What is minimised: (batch) -> mean loss and metrics, and what one batch weighs in the global mean."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xalign import losses
from xalign.data.collate import ExampleBatch, LabelledBatch, PairBatch, RankedBatch
from xalign.dpo import DPO
from xalign.errors import ConfigError
from xalign.logprobs import scored_logprobs
from xalign.nn.decoding import evaluating
from xalign.nn.reward import RewardModel


class Objective(Protocol):
    def weight(self, batch: Any) -> int:
        """How much of the global mean the batch is: scored tokens, or pairs."""

    def tokens(self, batch: Any) -> int:
        """Tokens that count, of texts to imitate."""

    def lengths(self, batch: Any) -> list[list[int]]:
        """Of each row how many tokens the prompt has, and each completion."""

    def __call__(self, batch: Any, tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch, and metrics that average by the same weight; `tokens` is the step's tokens / weight."""

    def told(self, means: dict[str, float]) -> dict[str, float]:
        """What the log tells of such averages over steps."""


@dataclass(frozen=True)
class Moving:
    """A reference that follows the policy: every `steps` steps ref <- alpha policy + (1 - alpha) ref, alpha in (0, 1].

    TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656, section 3); 1 is its hard update. The reference runs in each step.
    """

    dpo: DPO
    alpha: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"--ref-model-mixup-alpha is {self.alpha!r}, allowed is a number in (0, 1]")
        if self.steps < 1:
            raise ConfigError(f"--ref-model-sync-steps is {self.steps!r}, allowed is at least 1")
        if self.dpo.ref_model is None:
            raise ConfigError("--sync-ref-model: no reference stands beside the policy, allowed is a loss that asks for one, "
                              "without adapters")

    @property
    def reference(self) -> nn.Module:
        assert self.dpo.ref_model is not None
        return self.dpo.ref_model

    @torch.no_grad()
    def after(self, step: int) -> None:
        if step % self.steps == 0:
            for theirs, ours in zip(self.reference.parameters(), self.dpo.policy_model.parameters(), strict=True):
                theirs.lerp_(ours.to(theirs.dtype), self.alpha)


def as_they_are(means: dict[str, float]) -> dict[str, float]:
    return means


class SFT:
    """Next-token cross-entropy of the scored tokens, nats a token."""

    told = staticmethod(as_they_are)

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


class _OfPairs:
    """What objectives of pairs count."""

    told = staticmethod(as_they_are)

    def weight(self, batch: PairBatch) -> int:
        return len(batch)

    def tokens(self, batch: PairBatch) -> int:
        return int((batch.chosen_mask & ~batch.chosen_prompt_mask)[:, 1:].sum())

    def lengths(self, batch: PairBatch) -> list[list[int]]:
        prompt, chosen, rejected = (m.sum(1) for m in (batch.chosen_prompt_mask, batch.chosen_mask, batch.rejected_mask))
        return torch.stack((prompt, chosen - prompt, rejected - prompt), 1).tolist()


class Preference(_OfPairs):
    """The loss of a `DPO` module, nats a pair; `ref_logps` are the reference's (chosen, rejected), by pair index."""

    def __init__(self, dpo: DPO, ref_logps: tuple[Tensor, Tensor] | None = None):
        self.dpo, self.ref_logps = dpo, ref_logps

    def __call__(self, batch: PairBatch, tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.dpo(batch.chosen, batch.rejected, **pair_masks(batch), ref_logps=known_logps(self.ref_logps, batch),
                        tokens_per_pair=tokens, return_metrics=True)

    @torch.no_grad()
    def expected(self, batch: PairBatch) -> Tensor:
        """The loss of a policy that is the reference."""
        chosen, rejected, *lengths, weights = self.dpo.logps(self.dpo.policy_model, batch.chosen, batch.rejected,
                                                             **pair_masks(batch), weights=True)
        losses = self.dpo.pair_losses(chosen, rejected, chosen, rejected, lengths[0], lengths[1])
        return (losses * weights if self.dpo.use_weighting else losses).mean()


class KTO:
    """The loss kto of a `DPO` module, a labelled text; `ref_logps`: the reference's of (completion, mismatched), by row.

    z0, the policy's drift from the reference, is the mean log-ratio of the batch's *mismatched* completions, at least 0: so
    another micro-batch (or another number of processes) is another loss. They run without gradient and without dropout.
    """

    def __init__(self, dpo: DPO, ref_logps: tuple[Tensor, Tensor] | None = None):
        self.dpo, self.ref_logps = dpo, ref_logps

    def weight(self, batch: LabelledBatch) -> int:
        return len(batch)

    def tokens(self, batch: LabelledBatch) -> int:
        return int((batch.chosen_mask & ~batch.chosen_prompt_mask)[:, 1:].sum())

    def lengths(self, batch: LabelledBatch) -> list[list[int]]:
        prompt, completion = batch.chosen_prompt_mask.sum(1), batch.chosen_mask.sum(1)
        return torch.stack((prompt, completion - prompt), 1).tolist()

    def __call__(self, batch: LabelledBatch, tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        dpo, model = self.dpo, self.dpo.policy_model
        policy = self._logps(model, batch.chosen, batch.chosen_mask & ~batch.chosen_prompt_mask)
        with torch.no_grad():  # after the pass with gradients: autocast keeps casts, and those made here would have none
            with evaluating(model):
                drift = self._logps(model, batch.rejected, batch.rejected_mask & ~batch.rejected_prompt_mask)
            known = known_logps(self.ref_logps, batch)
            if known is None:
                with dpo.reference() as reference:
                    known = pair_logps(dpo, reference, batch)
            kl = (drift - known[1]).mean().clamp(min=0)
            [reward] = dpo.rewards([policy.detach()], [known[0]], [])
            metrics = {"kl": kl, "desirable": batch.labels.float().mean()}
            for side, of in (("chosen", batch.labels), ("rejected", ~batch.labels)):  # over all rows: `told` divides
                metrics |= {f"rewards/{side}": (reward * of).mean(), f"logps/{side}": (policy.detach() * of).mean()}
        return dpo.text_losses(policy, known[0], batch.labels, kl).mean(), metrics

    def told(self, means: dict[str, float]) -> dict[str, float]:
        """TRL's names: means over the desirable and over the undesirable texts, where there were any."""
        shares = {"chosen": means.get("desirable", 0.0), "rejected": 1 - means.get("desirable", 1.0)}
        told = {k: v for k, v in means.items() if k != "desirable" and k.split("/")[-1] not in shares}
        for side, share in shares.items():
            if share > 1e-9:
                told |= {f"{what}/{side}": means[f"{what}/{side}"] / share for what in ("rewards", "logps")}
        if "rewards/chosen" in told and "rewards/rejected" in told:
            told["rewards/margins"] = told["rewards/chosen"] - told["rewards/rejected"]
        return told

    @torch.no_grad()
    def expected(self, batch: LabelledBatch) -> Tensor:
        """The loss of a policy that is the reference."""
        equal = torch.zeros(len(batch), device=batch.chosen.device)
        return self.dpo.text_losses(equal, equal, batch.labels, 0.0).mean()

    def _logps(self, model: nn.Module, tokens: Tensor, loss_mask: Tensor) -> Tensor:
        logps, scored = scored_logprobs(model, tokens, loss_mask, packed=self.dpo.packed)
        return logps.masked_fill(~scored, 0.0).sum(1)


class Reward(_OfPairs):
    """Bradley and Terry's loss of a reward model, nats a pair; the loss "logexp" knows no margin.

    With `share_prefix` what both sides of a pair begin with runs once, which changes no value beyond rounding.
    """

    def __init__(self, model: RewardModel, loss: str = "sigmoid", center: float = 0.0, share_prefix: bool = True):
        self.model, self.loss, self.center, self.share_prefix = model, loss, center, share_prefix

    def pair_losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        """The loss of each pair, (b,), from the rewards of both sides and the margins, (b,) each."""
        if self.loss == "logexp":
            return losses.logexp(chosen, rejected, center=self.center)
        return losses.bradley_terry(chosen, rejected, margin=margin, center=self.center)

    def rewards(self, batch: RankedBatch) -> tuple[Tensor, Tensor]:
        """The rewards (b,) of chosen and rejected texts, in one pass."""
        width = max(batch.chosen.shape[1], batch.rejected.shape[1])
        tokens, mask = (torch.cat([F.pad(t, (0, width - t.shape[1])) for t in sides]) for sides in
                        ((batch.chosen, batch.rejected), (batch.chosen_mask, batch.rejected_mask)))
        return self.model.branch_rewards(tokens, mask, 2 if self.share_prefix else 1).chunk(2)  # type: ignore[return-value]

    def __call__(self, batch: RankedBatch, tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = self.rewards(batch)
        loss = self.pair_losses(chosen, rejected, batch.margin).mean()
        with torch.no_grad():
            accuracies = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
            metrics = {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
                       "rewards/accuracies": accuracies.mean(), "rewards/margins": (chosen - rejected).mean()}
        return loss, metrics


def known_logps(ref_logps: tuple[Tensor, Tensor] | None, batch: PairBatch) -> tuple[Tensor, Tensor] | None:
    """The reference's log-probabilities of a batch's rows, where those of all rows are known."""
    if ref_logps is None:
        return None
    chosen, rejected = (t[batch.index.to(t.device)].to(batch.chosen.device) for t in ref_logps)
    return chosen, rejected


def pair_masks(batch: PairBatch) -> dict[str, Any]:
    """A batch's masks under the names that `DPO` gives them."""
    return {"prompt_mask": (batch.chosen_prompt_mask, batch.rejected_prompt_mask),
            "preferred_seq_mask": batch.chosen_mask, "unpreferred_seq_mask": batch.rejected_mask}


@torch.no_grad()
def pair_logps(dpo: DPO, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (b,) of the chosen and the rejected completions under `model`, nats."""
    chosen, rejected, _, _ = dpo.logps(model, batch.chosen, batch.rejected, **pair_masks(batch))
    return chosen, rejected
