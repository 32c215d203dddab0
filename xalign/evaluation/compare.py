"""Policy against reference on held-out pairs: everything that the report shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xalign.backends.base import Completion
from xalign.data import toyworld
from xalign.data.chat_template import render_prompt
from xalign.data.collate import EncodedLabelled, EncodedPair
from xalign.data.records import Labelled, PreferencePair, Text
from xalign.dpo import DPO
from xalign.evaluation import metrics
from xalign.evaluation.metrics import Estimate, estimate
from xalign.nn.transformer import TransformerWrapper
from xalign.tokenizers import Tokenizer

Logps = tuple[Tensor, Tensor]  # of chosen and rejected texts, or of labelled and mismatched ones


@dataclass
class Comparison:
    """Rows of the table (name -> model -> estimate), numbers for evaluation.json, and texts and values for pictures."""

    table: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    prompts: list[Text] = field(default_factory=list)
    texts: dict[str, list[list[str]]] = field(default_factory=dict)
    gold: dict[str, list[list[float]]] = field(default_factory=dict)
    lengths: dict[str, list[list[int]]] = field(default_factory=dict)
    labelled: bool = False

    def add(self, row: str, model: str, value: Estimate, key: str = "") -> None:
        self.table.setdefault(row, {})[model] = value
        if key:
            self.numbers[key] = value.value
            self.numbers[f"{key}_interval"] = [value.low, value.high]


def compare(dpo: DPO, reference: TransformerWrapper, untrained: TransformerWrapper | None, tokenizer: Tokenizer,
            pairs: Sequence[PreferencePair | Labelled], encoded: Sequence[EncodedPair], *, gold_known: bool, prompts: int,
            samples: int, max_new_tokens: int, seed: int) -> Comparison:
    """Compare `dpo.policy_model` with `reference`: likelihoods on held-out pairs, and samples on their prompts.

    Instead of pairs there may be labelled completions, `encoded` as well. Where the gold reward is known, win rate,
    well-formedness and consistency are added, and what `untrained` scores.
    """
    policy = dpo.policy_model
    assert isinstance(policy, TransformerWrapper)
    result = Comparison(labelled=any(isinstance(p, Labelled) for p in pairs))
    result.numbers["pairs"] = len(encoded)
    for name, model in (("reference", reference), ("policy", policy)):
        result.add("perplexity of held-out responses", name, metrics.perplexity(model, encoded, tokenizer.pad_id),
                   f"perplexity_{name}")
    logps = [metrics.pairs_logps(dpo, m, encoded, tokenizer.pad_id) for m in (policy, reference)]
    correct = _accuracies(dpo, encoded, *logps)[1]
    if correct:
        result.add("preference accuracy", "policy", estimate(correct), "preference_accuracy")

    # a text that outgrows the window would be drawn from another distribution than the one that is scored
    room = policy.max_seq_len - max_new_tokens
    unique = {str(p.prompt): p.prompt for p in pairs}
    fitting = [p for p in unique.values() if len(render_prompt(tokenizer, p).ids) <= room]
    result.prompts = fitting[:prompts]
    result.numbers |= {"prompts": len(result.prompts), "prompts_too_long": len(unique) - len(fitting)}
    if not result.prompts:
        return result
    models = {"reference": (reference, samples), "policy": (policy, samples)}
    if untrained is not None:
        models = {"untrained": (untrained, 1), **models}
    completions: dict[str, list[list[Completion]]] = {}
    for name, (model, n) in models.items():
        completions[name] = metrics.sample(model, tokenizer, result.prompts, n, max_new_tokens, seed + (name == "policy"),
                                           f"sample {name}")
        result.texts[name] = [[c.text for c in row] for row in completions[name]]
        result.lengths[name] = [[len(c.token_ids) for c in row] for row in completions[name]]
        result.add("tokens a sample", name, _mean(result.lengths[name]), f"length_{name}")
        flat = [text for row in result.texts[name] for text in row]
        result.numbers[f"distinct_{name}"] = len(set(flat)) / len(flat)
    ours, theirs = (metrics.completion_logps(m, tokenizer, result.prompts, completions["policy"]) for m in (policy, reference))
    ratios = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(ours, theirs, strict=True)]
    result.add("KL to the reference, nats a sequence", "policy", _mean(ratios), "kl")
    if gold_known:
        _add_gold(result, pairs)
    return result


def _add_gold(result: Comparison, pairs: Sequence[PreferencePair | Labelled]) -> None:
    checks = {"well_formed": toyworld.is_well_formed, "consistent": toyworld.is_consistent}
    for name, rows in result.texts.items():
        told = list(zip([str(p) for p in result.prompts], rows, strict=True))
        result.gold[name] = [[toyworld.gold_reward(p, text) for text in row] for p, row in told]
        result.add("gold reward", name, _mean(result.gold[name]), f"gold_{name}")
        for check, passes in checks.items():
            result.add(check.replace("_", "-"), name, _mean([[float(passes(p, t)) for t in row] for p, row in told]),
                       f"{check}_{name}")
    won = estimate(metrics.wins(result.gold["policy"], result.gold["reference"]))
    result.add("win rate by gold reward", "policy", won, "win_rate")
    told_apart = [p for p in pairs if isinstance(p, PreferencePair)]
    if not told_apart:
        return
    limit = toyworld.preference_limit(
        {"prompt": str(p.prompt), "chosen": str(p.chosen), "rejected": str(p.rejected)} for p in told_apart)
    result.numbers["preference_accuracy_limit"] = limit
    result.numbers["preference_accuracy_share"] = metrics.label_noise_share(result.numbers["preference_accuracy"], limit)


def _mean(rows: Sequence[Sequence[float]]) -> Estimate:
    return estimate([float(np.sum(row)) for row in rows], [len(row) for row in rows])


def _accuracies(dpo: DPO, encoded: Sequence[EncodedPair], policy: Logps,
                reference: Logps | None) -> tuple[tuple[Tensor, Tensor], list[float]]:
    """Implicit rewards of chosen and rejected (desirable and undesirable) texts, and how often they order two of them right."""
    lengths = [torch.tensor([float(len(getattr(row, side))) for row in encoded]) for side in ("chosen", "rejected")]
    first, second = dpo.rewards(policy, reference or (None, None), lengths)
    if not all(isinstance(row, EncodedLabelled) for row in encoded):
        return (first, second), metrics.accuracies(first, second)
    labels = _labels(encoded)
    return (first[labels], first[~labels]), metrics.label_accuracies(first, labels)


def _labels(encoded: Sequence[EncodedPair]) -> Tensor:
    return torch.tensor([isinstance(row, EncodedLabelled) and row.label for row in encoded])


@torch.no_grad()
def quick(dpo: DPO, encoded: Sequence[EncodedPair], reference: Logps | None, pad_id: int) -> dict[str, float]:
    """Held-out loss, and accuracy and margin of the implicit reward, for the log during training.

    `reference` are its log-probabilities, None where the loss asks for none. For kto `encoded` are `EncodedLabelled`; z0 is
    of all of them together, and the accuracy is over all pairs of a desirable and an undesirable text.
    """
    policy = metrics.pairs_logps(dpo, dpo.policy_model, encoded, pad_id)  # type: ignore[arg-type]
    (win, lose), correct = _accuracies(dpo, encoded, policy, reference)
    told = {}
    if dpo.labelled:
        assert reference is not None
        kl = (policy[1] - reference[1]).mean().clamp(min=0)
        loss = dpo.text_losses(policy[0], reference[0], _labels(encoded), kl)
        told["eval/z0"] = float(kl)
    else:
        chosen, rejected = (torch.tensor([float(len(getattr(p, side))) for p in encoded]) for side in ("chosen", "rejected"))
        ref_chosen, ref_rejected = reference or (None, None)
        loss = dpo.pair_losses(*policy, ref_chosen, ref_rejected, chosen, rejected)
    means = {"chosen": float(win.mean()), "rejected": float(lose.mean()), "accuracies": float(np.mean(correct or math.nan)),
             "margins": float(win.mean() - lose.mean())}
    return {"eval/loss": float(loss.mean()), **told, **{f"eval/rewards/{k}": v for k, v in means.items() if math.isfinite(v)}}
