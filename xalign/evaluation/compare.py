"""Policy against reference on held-out pairs: everything that the report shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from xalign.backends.base import Completion
from xalign.data import toyworld
from xalign.data.chat_template import render_prompt
from xalign.data.collate import EncodedPair
from xalign.data.records import PreferencePair, Text
from xalign.dpo import DPO
from xalign.evaluation import metrics
from xalign.evaluation.metrics import Estimate, estimate
from xalign.nn.transformer import TransformerWrapper
from xalign.tokenizers import Tokenizer


@dataclass
class Comparison:
    """Rows of the table (name -> model -> estimate), numbers for evaluation.json, and texts and values for pictures."""

    table: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    prompts: list[Text] = field(default_factory=list)
    texts: dict[str, list[list[str]]] = field(default_factory=dict)
    gold: dict[str, list[list[float]]] = field(default_factory=dict)
    lengths: dict[str, list[list[int]]] = field(default_factory=dict)

    def add(self, row: str, model: str, value: Estimate, key: str = "") -> None:
        self.table.setdefault(row, {})[model] = value
        if key:
            self.numbers[key] = value.value
            self.numbers[f"{key}_interval"] = [value.low, value.high]


def compare(dpo: DPO, untrained: TransformerWrapper | None, tokenizer: Tokenizer, pairs: Sequence[PreferencePair],
            encoded: Sequence[EncodedPair], *, gold_known: bool, prompts: int, samples: int, max_new_tokens: int,
            seed: int) -> Comparison:
    """Compare `dpo.policy_model` with its reference: likelihoods on held-out pairs, and samples on their prompts.

    Where the gold reward is known, win rate, well-formedness and consistency are added, and what `untrained` scores.
    """
    policy, reference = dpo.policy_model, dpo.ref_model
    assert isinstance(policy, TransformerWrapper) and isinstance(reference, TransformerWrapper)
    result = Comparison()
    result.numbers["pairs"] = len(encoded)
    for name, model in (("reference", reference), ("policy", policy)):
        result.add("perplexity of held-out responses", name, metrics.perplexity(model, encoded, tokenizer.pad_id),
                   f"perplexity_{name}")
    logps = [metrics.pairs_logps(dpo, m, encoded, tokenizer.pad_id) for m in (policy, reference)]
    correct = estimate(metrics.accuracies(logps[0], logps[1]))
    result.add("preference accuracy", "policy", correct, "preference_accuracy")

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


def _add_gold(result: Comparison, pairs: Sequence[PreferencePair]) -> None:
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
    limit = toyworld.preference_limit(
        {"prompt": str(p.prompt), "chosen": str(p.chosen), "rejected": str(p.rejected)} for p in pairs)
    result.numbers["preference_accuracy_limit"] = limit
    result.numbers["preference_accuracy_share"] = metrics.label_noise_share(result.numbers["preference_accuracy"], limit)


def _mean(rows: Sequence[Sequence[float]]) -> Estimate:
    return estimate([float(np.sum(row)) for row in rows], [len(row) for row in rows])


@torch.no_grad()
def quick(dpo: DPO, encoded: Sequence[EncodedPair], reference: tuple[torch.Tensor, torch.Tensor],
          pad_id: int) -> dict[str, float]:
    """Held-out loss, accuracy and margin of the implicit reward, for the log during training."""
    policy = metrics.pairs_logps(dpo, dpo.policy_model, encoded, pad_id)  # type: ignore[arg-type]
    chosen, rejected = (torch.tensor([float(len(getattr(pair, side))) for pair in encoded]) for side in ("chosen", "rejected"))
    loss = dpo.pair_losses(*policy, *reference, chosen, rejected)
    win, lose = (dpo.beta * (a - b) for a, b in zip(policy, reference, strict=True))
    return {"eval/loss": float(loss.mean()), "eval/rewards/accuracies": float(np.mean(metrics.accuracies(policy, reference))),
            "eval/rewards/chosen": float(win.mean()), "eval/rewards/rejected": float(lose.mean()),
            "eval/rewards/margins": float((win - lose).mean())}
