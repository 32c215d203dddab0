"""`DPO`: a policy that is trained and the frozen reference that it is compared with."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xalign.errors import ConfigError, nearest
from xalign.logprobs import scored_logprobs
from xalign.losses import LOSSES

Mask = Tensor | None


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside an `AutoregressiveWrapper`, or the model itself."""
    net = getattr(model, "net", None)
    return net if isinstance(net, nn.Module) else model


def outer_padding(tokens: Tensor, pad_id: int | None) -> Tensor:
    """True (b, n) on real tokens: all but the runs of `pad_id` at a row's two ends."""
    if pad_id is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    real = (tokens != pad_id).long()
    return (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)


def prompt_columns(prompt_mask: Mask, tokens: Tensor, name: str) -> Tensor:
    """Widen a prompt mask (b, k), k <= n, to (b, n); missing columns belong to the response."""
    if prompt_mask is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    b, n = tokens.shape
    if prompt_mask.ndim != 2 or prompt_mask.shape[0] != b or prompt_mask.shape[1] > n:
        raise ValueError(f"prompt_mask has shape {tuple(prompt_mask.shape)}, allowed is ({b}, k) with k <= {n}, "
                         f"the width of {name}")
    return F.pad(prompt_mask.bool(), (0, n - prompt_mask.shape[1]))


class DPO(nn.Module):
    """Direct preference optimisation and its relatives (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    `policy_model` is the model given, `ref_model` a frozen copy in eval mode that shares no storage with it, or
    the model given as `ref_model`. `loss` is a name in `losses.LOSSES` or a function with their signature.
    `reduction="sum"` compares summed log-probabilities, as the paper does; `"mean"` per-token averages, as
    x-transformers does. `pad_id` marks the outer run of pads as padding; where the pad is the EOS token, give
    masks to the call instead. `parameters()`, `named_parameters()` and `state_dict()` are the policy's own.
    """

    def __init__(self, model: nn.Module, beta: float = 0.1, pad_id: int | None = None, ref_model: nn.Module | None = None,
                 loss: str | Callable[..., Tensor] = "sigmoid", label_smoothing: float = 0.0, reduction: str = "sum"):
        super().__init__()
        if isinstance(loss, str) and loss not in LOSSES:
            raise ConfigError(f"no loss {loss!r}{nearest(loss, LOSSES)}; allowed are {', '.join(LOSSES)}")
        if reduction not in ("sum", "mean"):
            raise ConfigError(f"reduction is {reduction!r}, allowed is 'sum' or 'mean'")
        self.loss_function = LOSSES[loss] if isinstance(loss, str) else loss
        self._takes = set(inspect.signature(self.loss_function).parameters)
        if label_smoothing and "label_smoothing" not in self._takes:
            raise ConfigError(f"label_smoothing is {label_smoothing}, but the loss {loss!r} has none: allowed is 0")
        self.options = {"beta": beta, "label_smoothing": label_smoothing}
        self.beta, self.pad_id, self.reduction = beta, pad_id, reduction
        self.policy_model = unwrap(model)
        self._reference = (self._freeze(ref_model),)  # in a tuple, so that it is no submodule
        zero = torch.zeros(1)
        self.pair_losses(zero, zero, zero, zero, torch.ones(1), torch.ones(1))  # bad hyperparameters are told now

    def _freeze(self, ref_model: nn.Module | None) -> nn.Module | None:
        if ref_model is None and "ref_chosen" not in self._takes:
            return None
        reference = copy.deepcopy(self.policy_model) if ref_model is None else unwrap(ref_model)
        trained = {t.untyped_storage().data_ptr() for t in self.policy_model.parameters()}
        if any(t.untyped_storage().data_ptr() in trained for t in reference.parameters()):
            raise ConfigError("ref_model shares weights with the policy, allowed is an independent model (or None)")
        return reference.eval().requires_grad_(False)

    @property
    def ref_model(self) -> nn.Module | None:
        return self._reference[0]

    def _apply(self, fn: Callable, recurse: bool = True) -> "DPO":
        if self.ref_model is not None:
            self.ref_model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.policy_model.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.policy_model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.policy_model.load_state_dict(*args, **kwargs)

    def logps(self, model: nn.Module, preferred_seq: Tensor, unpreferred_seq: Tensor, *,
              prompt_mask: Mask | tuple[Mask, Mask] = None, preferred_seq_mask: Mask = None,
              unpreferred_seq_mask: Mask = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Summed response log-probabilities under `model` and response lengths of both sides, four (b,), one pass."""
        prompts = prompt_mask if isinstance(prompt_mask, (tuple, list)) else (prompt_mask, prompt_mask)
        sides = []
        for name, tokens, mask, prompt in (("preferred_seq", preferred_seq, preferred_seq_mask, prompts[0]),
                                           ("unpreferred_seq", unpreferred_seq, unpreferred_seq_mask, prompts[1])):
            if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
                masked = "" if mask is None else f", its mask {tuple(mask.shape)}"
                raise ValueError(f"{name} has shape {tuple(tokens.shape)}{masked}, allowed is (b, n) for both")
            mask = outer_padding(tokens, self.pad_id) if mask is None else mask.bool()
            sides.append((tokens, mask, mask & ~prompt_columns(prompt, tokens, name)))
        if preferred_seq.shape[0] != unpreferred_seq.shape[0]:
            raise ValueError(f"{preferred_seq.shape[0]} preferred but {unpreferred_seq.shape[0]} unpreferred rows, "
                             "allowed is as many of both")
        width = max(preferred_seq.shape[1], unpreferred_seq.shape[1])
        tokens, mask, loss_mask = (torch.cat([F.pad(t, (0, width - t.shape[1])) for t in side])
                                   for side in zip(*sides, strict=True))
        logps, scored = scored_logprobs(model, tokens, loss_mask, mask)
        lengths = scored.sum(1)
        if not bool((lengths > 0).all()):
            row = int((lengths == 0).nonzero()[0])
            side, row = ("unpreferred_seq", row - len(preferred_seq)) if row >= len(preferred_seq) else ("preferred_seq", row)
            raise ValueError(f"row {row} of {side} has no response token to score, allowed is at least one after the "
                             "prompt (and one token before it)")
        sums = logps.masked_fill(~scored, 0.0).sum(1)
        return (*sums.chunk(2), *lengths.chunk(2))  # type: ignore[return-value]

    def pair_losses(self, policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor | None,
                    ref_rejected: Tensor | None, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
        """The loss of each pair, (b,), from summed log-probabilities, nats, and response lengths, (b,) each."""
        vectors = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected,
                   "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        if self.reduction == "mean":
            vectors = {k: None if t is None else t / lengths[k.split("_")[1] + "_lengths"] for k, t in vectors.items()}
        given = {**vectors, **lengths, **self.options}
        return self.loss_function(**{k: v for k, v in given.items() if k in self._takes})

    def forward(self, preferred_seq: Tensor, unpreferred_seq: Tensor, *, prompt_mask: Mask | tuple[Mask, Mask] = None,
                preferred_seq_mask: Mask = None, unpreferred_seq_mask: Mask = None,
                ref_logps: tuple[Tensor, Tensor] | None = None, return_metrics: bool = False) -> Any:
        """The mean loss over pairs, a scalar in nats; with `return_metrics` (loss, dict of detached scalars).

        Sequences (b, n_w) and (b, n_l) hold prompt and response; `prompt_mask` (b, k), or one a side, is True on
        prompt tokens; the masks are True on real tokens, and padding never changes a value. `ref_logps` are the
        reference's summed log-probabilities (b,) of both sides where they are known already.
        Raises `ValueError` for a row without response tokens.
        """
        batch: dict[str, Any] = {"prompt_mask": prompt_mask, "preferred_seq_mask": preferred_seq_mask,
                                 "unpreferred_seq_mask": unpreferred_seq_mask}
        chosen, rejected, n_chosen, n_rejected = self.logps(self.policy_model, preferred_seq, unpreferred_seq, **batch)
        ref_chosen = ref_rejected = None
        if ref_logps is not None:
            ref_chosen, ref_rejected = ref_logps
        elif self.ref_model is not None:
            with torch.no_grad():
                ref_chosen, ref_rejected, _, _ = self.logps(self.ref_model, preferred_seq, unpreferred_seq, **batch)
        loss = self.pair_losses(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected).mean()
        if not return_metrics:
            return loss
        with torch.no_grad():
            metrics = {"logps/chosen": chosen.mean(), "logps/rejected": rejected.mean()}
            if ref_chosen is not None and ref_rejected is not None:
                win, lose = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
                # a tie counts one half, so that the untrained policy starts at .5 and not at 0
                accuracies = (win > lose).float() + 0.5 * (win == lose).float()
                metrics |= {"rewards/chosen": win.mean(), "rewards/rejected": lose.mean(),
                            "rewards/accuracies": accuracies.mean(), "rewards/margins": (win - lose).mean()}
        return loss, {k: v.detach() for k, v in metrics.items()}
