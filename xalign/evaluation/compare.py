"""Policy against reference on held-out pairs, at the end of a preference training: everything that its report shows."""

import math
from collections.abc import Sequence

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
from xalign.evaluation.figures import Comparison, add_divergence, add_gold, add_scores, add_texts, add_wins, chars
from xalign.evaluation.intervals import all_wins, differences, estimate
from xalign.nn.transformer import TransformerWrapper
from xalign.tokenizers import Tokenizer

Logps = tuple[Tensor, Tensor]  # of chosen and rejected texts, or of labelled and mismatched ones


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

    result.prompts, too_long = fitting([p.prompt for p in pairs], tokenizer, policy.max_seq_len - max_new_tokens, prompts)
    result.numbers |= {"prompts": len(result.prompts), "prompts_too_long": too_long}
    if not result.prompts:
        return result
    models = {"reference": (reference, samples), "policy": (policy, samples)}
    if untrained is not None:
        models = {"untrained": (untrained, 1), **models}
    completions: dict[str, list[list[Completion]]] = {}
    for name, (model, n) in models.items():
        completions[name] = metrics.sample(model, tokenizer, result.prompts, n, max_new_tokens, seed + (name == "policy"),
                                           f"sample {name}")
        add_texts(result, name, completions[name])
    ours, theirs = (metrics.completion_logps(m, tokenizer, result.prompts, completions["policy"]) for m in (policy, reference))
    add_divergence(result, ours, theirs, [[c.logps or 0.0 for c in row] for row in completions["reference"]])
    if gold_known:
        scores = {name: [[toyworld.gold_reward(str(p), text) for text in row]
                         for p, row in zip(result.prompts, rows, strict=True)] for name, rows in result.texts.items()}
        add_scores(result, "gold reward", scores)
        add_gold(result, pairs)
        add_wins(result, "gold reward", all_wins(scores["policy"], scores["reference"]),
                 differences(*(chars(result.texts[name]) for name in ("policy", "reference"))))
    return result


def fitting(prompts: Sequence[Text], tokenizer: Tokenizer, room: int, limit: int) -> tuple[list[Text], int]:
    """The first `limit` different prompts that have up to `room` tokens, and how many in all have more.

    A text that outgrows the window would be drawn from another distribution than the one that is scored.
    """
    unique = {str(p): p for p in prompts}
    kept = [p for p in unique.values() if len(render_prompt(tokenizer, p).ids) <= room]
    return kept[:limit], len(unique) - len(kept)


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
