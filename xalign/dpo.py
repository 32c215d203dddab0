"""`DPO`: a policy that is trained and the frozen reference that it is compared with."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xalign import losses
from xalign.errors import ConfigError, nearest
from xalign.logprobs import scored_logprobs
from xalign.losses import LOSSES
from xalign.nn.decoding import evaluating
from xalign.nn.lora import adapters_off, has_lora

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


@dataclass(frozen=True)
class Component:
    """A loss of a mixture: its weight, what it asks for, and its hyperparameters."""

    function: Callable[..., Tensor]
    weight: float
    takes: set[str]
    options: dict[str, Any]


def components(loss: str | Callable[..., Tensor] | Sequence[str | Callable[..., Tensor]], weights: Sequence[float] | None,
               given: dict[str, Any]) -> list[Component]:
    """The losses by name ("sigmoid", "sigmoid,sft" or a list) or as functions, each with those hyperparameters that it has.

    `given` None is a loss's own default. Raises `ConfigError` for an unknown name, weights that don't fit, a hyperparameter
    that none of them has, and for kto, which takes no pairs, among others.
    """
    names: list[Any] = loss.split(",") if isinstance(loss, str) else [loss] if callable(loss) else list(loss)
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names) or not all(math.isfinite(w) for w in weights) or not any(weights):
        raise ConfigError(f"loss weights are {weights} for {len(names)} losses, allowed is a finite number for each, not all 0")
    given = {k: v for k, v in given.items() if v is not None}
    named = LOSSES | {"kto": losses.kto}
    found = []
    for name, weight in zip(names, weights, strict=True):
        name = name.strip() if isinstance(name, str) else name
        if isinstance(name, str) and name not in named:
            raise ConfigError(f"no loss {name!r}{nearest(name, named)}; allowed are {', '.join(named)}")
        function = named[name] if isinstance(name, str) else name
        if function is losses.kto and len(names) > 1:
            raise ConfigError(f"the loss is {loss!r}, but kto takes labelled texts and the others pairs: allowed is kto alone")
        takes = set(inspect.signature(function).parameters)
        found.append(Component(function, weight, takes, {k: v for k, v in given.items() if k in takes}))
    for option in given.keys() - {"beta"}:
        if not any(option in c.options for c in found):
            raise ConfigError(f"{option} is {given[option]}, but the loss {loss!r} has none: allowed is to leave it out")
    return found


class DPO(nn.Module):
    """Direct preference optimisation and its relatives (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    `policy_model` is the model given, `ref_model` a frozen copy in eval mode that shares no storage with it, or
    the model given as `ref_model`, or None where no loss asks for it and where a LoRA policy plays it without its
    adapters. `loss` is a name in `losses.LOSSES`, several
    ("sigmoid,sft", with `loss_weights`), or a function with their signature; hyperparameters besides `beta` (None: the loss's
    own) and `label_smoothing` go into `loss_options`. `reduction="sum"` compares summed log-probabilities, as the paper does;
    `"mean"` per-token averages, as x-transformers does. `divergence` other than reverse_kl (`losses.divergence`) holds
    the policy to the reference in another way; `ld_alpha` counts tokens of the longer side beyond the shorter's length by
    this factor (Liu et al. 2024, LD-DPO, arXiv 2409.06411). `use_weighting` multiplies a pair's loss by the weights of its two
    texts, exp of the mean over tokens of (log p(token) - log sum p^2 over the vocabulary), without gradients (Zhou et al. 2024,
    WPO, arXiv 2406.11827, eq. 2). `pad_id` marks the outer run of pads as padding; where the pad is the EOS token, give masks
    to the call instead. With `share_prefix` what both sides begin with runs once; with
    `packed` False all rows run as they are, padded, and all logits are made. Neither changes a value beyond rounding.
    The loss "kto" takes labelled texts instead of calls with pairs (`objectives.KTO`).
    `parameters()`, `named_parameters()` and `state_dict()` are the policy's own.
    """

    def __init__(self, model: nn.Module, beta: float | None = 0.1, pad_id: int | None = None,
                 ref_model: nn.Module | None = None,
                 loss: str | Callable[..., Tensor] | Sequence[str | Callable[..., Tensor]] = "sigmoid",
                 label_smoothing: float = 0.0, reduction: str = "sum", *, loss_weights: Sequence[float] | None = None,
                 loss_options: dict[str, Any] | None = None, divergence: str = "reverse_kl", divergence_alpha: float = 0.5,
                 ld_alpha: float = 1.0, use_weighting: bool = False, share_prefix: bool = True, packed: bool = True):
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ConfigError(f"reduction is {reduction!r}, allowed is 'sum' or 'mean'")
        if not 0 <= ld_alpha <= 1:
            raise ConfigError(f"ld_alpha is {ld_alpha!r}, allowed is a number in [0, 1]")
        given = {"beta": beta, "label_smoothing": label_smoothing or None, **(loss_options or {})}
        self.components = components(loss, loss_weights, given)
        betas = [inspect.signature(c.function).parameters["beta"].default for c in self.components if "beta" in c.takes]
        self.beta = beta if beta is not None else betas[0] if betas else 1.0
        self.pad_id, self.reduction, self.ld_alpha = pad_id, reduction, ld_alpha
        self.use_weighting, self.share_prefix, self.packed = use_weighting, share_prefix, packed
        if divergence != "reverse_kl" and (not self.compares or any(c.function is losses.aot for c in self.components)):
            raise ConfigError(f"divergence is {divergence!r}, but the loss {loss!r} has no log-ratios: allowed is reverse_kl")
        if self.labelled and (divergence, ld_alpha, reduction, use_weighting) != ("reverse_kl", 1, "sum", False):
            raise ConfigError("the loss kto knows no f_divergence, ld_alpha, use_weighting or per-token means: allowed is to "
                              "leave them out")
        if use_weighting and any(c.function in (losses.aot, losses.aot_unpaired) for c in self.components):
            raise ConfigError(f"use_weighting is on, but the loss {loss!r} ranks texts, not pairs: allowed is to leave it out")
        self.divergence = partial(losses.divergence, kind=divergence, alpha=divergence_alpha)
        self.policy_model = unwrap(model)
        self._reference = (self._freeze(ref_model),)  # in a tuple, so that it is no submodule
        zero, one = torch.zeros(1), torch.ones(1)  # bad hyperparameters are told now
        _ = self.text_losses(zero, zero, one > 0, 0) if self.labelled else self.pair_losses(zero, zero, zero, zero, one, one)

    @property
    def compares(self) -> bool:
        """Whether a loss asks for the reference."""
        return any(not c.takes.isdisjoint(("ref_chosen", "ref")) for c in self.components)

    @property
    def labelled(self) -> bool:
        """Whether the loss is kto, which takes labelled texts and not pairs."""
        return self.components[0].function is losses.kto

    def _freeze(self, ref_model: nn.Module | None) -> nn.Module | None:
        if not self.compares or (ref_model is None and has_lora(self.policy_model)):
            return None
        reference = copy.deepcopy(self.policy_model) if ref_model is None else unwrap(ref_model)
        trained = {t.untyped_storage().data_ptr() for t in self.policy_model.parameters()}
        if any(t.untyped_storage().data_ptr() in trained for t in reference.parameters()):
            raise ConfigError("ref_model shares weights with the policy, allowed is an independent model (or None)")
        return reference.eval().requires_grad_(False)

    @property
    def ref_model(self) -> nn.Module | None:
        return self._reference[0]

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """What plays the reference for the block, in eval mode: `ref_model`, or a LoRA policy without its adapters."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            with evaluating(self.policy_model), adapters_off(self.policy_model):
                yield self.policy_model

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
              unpreferred_seq_mask: Mask = None, weights: bool = False) -> tuple[Tensor, ...]:
        """Summed response log-probabilities under `model` and response lengths of both sides, four (b,), one pass.

        With `weights` a fifth, those of WPO (`use_weighting`), without gradients.
        """
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
        logps, scored, *squares = scored_logprobs(model, tokens, loss_mask, mask, sides=2 if self.share_prefix else 1,
                                                  packed=self.packed, squares=weights)
        lengths = scored.sum(1)
        if not bool((lengths > 0).all()):
            row = int((lengths == 0).nonzero()[0])
            side, row = ("unpreferred_seq", row - len(preferred_seq)) if row >= len(preferred_seq) else ("preferred_seq", row)
            raise ValueError(f"row {row} of {side} has no response token to score, allowed is at least one after the "
                             "prompt (and one token before it)")
        logps = logps.masked_fill(~scored, 0.0)
        agreement = [(logps.detach() - t).masked_fill(~scored, 0.0).sum(1) / lengths for t in squares]
        if self.ld_alpha != 1:
            shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
            logps = torch.where(scored.cumsum(1) <= shorter[:, None], logps, self.ld_alpha * logps)
        return (*logps.sum(1).chunk(2), *lengths.chunk(2), *(torch.add(*t.chunk(2)).exp() for t in agreement))

    def pair_losses(self, policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor | None,
                    ref_rejected: Tensor | None, chosen_lengths: Tensor, rejected_lengths: Tensor,
                    tokens_per_pair: float | None = None) -> Tensor:
        """The weighted loss of each pair, (b,), from summed log-probabilities, nats, and response lengths, (b,) each.

        `tokens_per_pair` is the chosen's mean length over all of a step, for `losses.sft`.
        """
        vectors = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected,
                   "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        total = torch.zeros_like(policy_chosen)
        for c in self.components:
            given = dict(vectors)
            if self.reduction == "mean" and "chosen_lengths" not in c.takes:
                given = {k: None if t is None else t / lengths[k.split("_")[1] + "_lengths"] for k, t in vectors.items()}
            if "ref_chosen" in c.takes and self.divergence.keywords["kind"] != "reverse_kl":
                for side in ("chosen", "rejected"):
                    ratio = given[f"policy_{side}"] - given[f"ref_{side}"]  # type: ignore[operator]
                    given |= {f"policy_{side}": self.divergence(ratio), f"ref_{side}": torch.zeros_like(ratio)}
            arguments = {**given, **lengths, "tokens_per_pair": tokens_per_pair}
            total = total + c.weight * c.function(**{k: v for k, v in arguments.items() if k in c.takes}, **c.options)
        return total

    def text_losses(self, policy: Tensor, ref: Tensor, labels: Tensor, kl: Tensor | float) -> Tensor:
        """The weighted loss of each labelled text, (b,), for the loss kto; arguments as in `losses.kto`."""
        [kto] = self.components
        return kto.weight * kto.function(policy, ref, labels, kl, **kto.options)

    def rewards(self, policy: Sequence[Tensor], ref: Sequence[Tensor | None], lengths: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Implicit rewards of texts, nats, from log-probabilities (b,) of each side: beta times the log-ratio to the reference.

        Where no loss asks for a reference they are what these losses compare: beta times the mean over tokens, or, for cpo and
        for losses that read no lengths, times the sum.
        """
        if self.compares:
            return tuple(self.beta * (p - r) for p, r in zip(policy, ref, strict=True))  # type: ignore[operator]
        sums = any(c.function is losses.cpo or "chosen_lengths" not in c.takes for c in self.components)
        return tuple(self.beta * (p if sums else p / n) for p, n in zip(policy, lengths, strict=True))

    def forward(self, preferred_seq: Tensor, unpreferred_seq: Tensor, *, prompt_mask: Mask | tuple[Mask, Mask] = None,
                preferred_seq_mask: Mask = None, unpreferred_seq_mask: Mask = None,
                ref_logps: tuple[Tensor, Tensor] | None = None, tokens_per_pair: float | None = None,
                return_metrics: bool = False) -> Any:
        """The mean loss over pairs, a scalar in nats; with `return_metrics` (loss, dict of detached scalars).

        Sequences (b, n_w) and (b, n_l) hold prompt and response; `prompt_mask` (b, k), or one a side, is True on
        prompt tokens; the masks are True on real tokens, and padding never changes a value. `ref_logps` are the
        reference's summed log-probabilities (b,) of both sides where they are known already; `tokens_per_pair` as above.
        Raises `ValueError` for a row without response tokens.
        """
        if self.labelled:
            raise ConfigError("the loss is kto, which takes labelled texts: allowed is objectives.KTO, or a loss of pairs")
        batch: dict[str, Any] = {"prompt_mask": prompt_mask, "preferred_seq_mask": preferred_seq_mask,
                                 "unpreferred_seq_mask": unpreferred_seq_mask}
        chosen, rejected, n_chosen, n_rejected, *weights = self.logps(
            self.policy_model, preferred_seq, unpreferred_seq, **batch, weights=self.use_weighting)
        ref_chosen = ref_rejected = None
        if ref_logps is not None:
            ref_chosen, ref_rejected = ref_logps
        elif self.compares:
            with torch.no_grad(), self.reference() as reference:
                ref_chosen, ref_rejected, _, _ = self.logps(reference, preferred_seq, unpreferred_seq, **batch)
        each = self.pair_losses(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, tokens_per_pair)
        loss = math.prod(weights, start=each).mean()
        if not return_metrics:
            return loss
        with torch.no_grad():
            metrics = {"logps/chosen": chosen.mean(), "logps/rejected": rejected.mean(),
                       "lengths/chosen": n_chosen.float().mean(), "lengths/rejected": n_rejected.float().mean()}
            win, lose = self.rewards((chosen, rejected), (ref_chosen, ref_rejected), (n_chosen, n_rejected))
            # a tie counts one half, so that the untrained policy starts at .5 and not at 0
            accuracies = (win > lose).float() + 0.5 * (win == lose).float()
            metrics |= {"rewards/chosen": win.mean(), "rewards/rejected": lose.mean(),
                        "rewards/accuracies": accuracies.mean(), "rewards/margins": (win - lose).mean()}
            if ref_chosen is not None:
                metrics["logps/chosen_change"] = (chosen - ref_chosen).mean()  # falls: likelihood displacement
        return loss, {k: v.detach() for k, v in metrics.items()}
