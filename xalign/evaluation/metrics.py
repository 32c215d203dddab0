"""How aligned a policy is: win rate, KL, perplexity, preference accuracy, each with a 95 % interval over prompts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from xalign.backends.base import Completion, SamplingParams
from xalign.backends.native import NativeBackend
from xalign.data.chat_template import render_prompt
from xalign.data.collate import EncodedPair, collate_pairs
from xalign.data.records import Text
from xalign.dpo import DPO
from xalign.logprobs import scored_logprobs
from xalign.nn.decoding import evaluating
from xalign.nn.transformer import TransformerWrapper
from xalign.objectives import pair_masks
from xalign.tokenizers import Tokenizer

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean (or a function of one) and its 95 % bootstrap interval, resampled over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(sums: Sequence[float], counts: Sequence[float] | None = None,
             transform: Callable[[np.ndarray], np.ndarray] = lambda x: x, seed: int = 0) -> Estimate:
    """The estimate of transform(sum(sums) / sum(counts)); entry i belongs to prompt i, prompts are resampled together.

    So samples of one prompt, which are alike, do not make the interval too narrow. The resampling is seeded.
    """
    s = np.asarray(sums, dtype=np.float64)
    c = np.ones_like(s) if counts is None else np.asarray(counts, dtype=np.float64)
    draw = np.random.default_rng(seed)
    resampled = [s[rows].sum() / c[rows].sum() for rows in (draw.integers(0, len(s), len(s)) for _ in range(RESAMPLES))]
    value = float(transform(s.sum() / c.sum()))
    low, high = np.quantile(transform(np.array(resampled)), (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def wins(policy: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> list[float]:
    """Each prompt's share of pairs (policy sample, reference sample) that the policy wins; a tie counts one half."""
    rates = []
    for ours, theirs in zip(policy, reference, strict=True):
        a, b = np.asarray(ours)[:, None], np.asarray(theirs)[None]
        rates.append(float(((a > b) + 0.5 * (a == b)).mean()))
    return rates


def sample(model: TransformerWrapper, tokenizer: Tokenizer, prompts: Sequence[Text], n: int, max_new_tokens: int,
           seed: int, progress: str = "") -> list[list[Completion]]:
    """`n` completions a prompt at temperature 1, unfiltered."""
    params = SamplingParams(n=n, max_new_tokens=max_new_tokens, seed=seed)
    return NativeBackend(model, tokenizer, batch_size=128).generate(prompts, params, progress)


def completion_logps(model: TransformerWrapper, tokenizer: Tokenizer, prompts: Sequence[Text],
                     completions: Sequence[Sequence[Completion]]) -> list[list[float]]:
    """Summed log-probability, nats, of each completion's tokens after its prompt."""
    pairs = [EncodedPair(render_prompt(tokenizer, prompt).ids, list(c.token_ids), []) for prompt, row in
             zip(prompts, completions, strict=True) for c in row]
    sums, _ = _chosen_logps(model, pairs, tokenizer.pad_id)
    flat = iter(sums)
    return [[next(flat) for _ in row] for row in completions]


@torch.no_grad()
def _chosen_logps(model: TransformerWrapper, pairs: Sequence[EncodedPair], pad_id: int,
                  size: int = 32) -> tuple[list[float], list[int]]:
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].chosen))
    sums, counts = [0.0] * len(pairs), [0] * len(pairs)
    device = model.token_emb.weight.device
    with evaluating(model):
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            batch = collate_pairs([pairs[i] for i in rows], pad_id).to(device)
            logps, scored = scored_logprobs(model, batch.chosen, batch.chosen_mask & ~batch.chosen_prompt_mask)
            for i, s, c in zip(rows, logps.masked_fill(~scored, 0.0).sum(1).tolist(), scored.sum(1).tolist(), strict=True):
                sums[i], counts[i] = s, c
    return sums, counts


def perplexity(model: TransformerWrapper, pairs: Sequence[EncodedPair], pad_id: int) -> Estimate:
    """Perplexity of both completions of held-out pairs given their prompts: exp of nats a token, EOS included."""
    both = [*pairs, *(EncodedPair(p.prompt, p.rejected, []) for p in pairs)]
    sums, counts = _chosen_logps(model, both, pad_id)
    n = len(pairs)
    return estimate([-(sums[i] + sums[n + i]) for i in range(n)], [counts[i] + counts[n + i] for i in range(n)], np.exp)


@torch.no_grad()
def pairs_logps(dpo: DPO, model: TransformerWrapper, pairs: Sequence[EncodedPair], pad_id: int, size: int = 32,
                progress: str = "") -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of all pairs' completions under `model`, in order: (chosen, rejected), fp32 on the CPU."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].chosen))
    chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    device = model.token_emb.weight.device
    with evaluating(model), tqdm(total=len(pairs), desc=progress, unit="pair", disable=not progress, mininterval=1) as bar:
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            batch = collate_pairs([pairs[i] for i in rows], pad_id).to(device)
            logps = dpo.logps(model, batch.chosen, batch.rejected, **pair_masks(batch))
            chosen[rows], rejected[rows] = logps[0].cpu(), logps[1].cpu()
            bar.update(len(rows))
    return chosen, rejected


def accuracies(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> list[float]:
    """Per pair 1 where the implicit reward prefers the chosen side, 1/2 at a tie, else 0."""
    margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).tolist()


def label_noise_share(accuracy: float, limit: float) -> float:
    """How much of what the labels' noise leaves to be known is known: (accuracy - 1/2) / (limit - 1/2)."""
    return (accuracy - 0.5) / (limit - 0.5) if limit > 0.5 else math.nan
