"""How aligned a policy is: win rate, KL, perplexity, preference accuracy, each with a 95 % interval over prompts."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from xalign.backends.base import Completion, SamplingParams
from xalign.backends.native import NativeBackend
from xalign.data.chat_template import render_prompt
from xalign.data.collate import (
    EncodedExample,
    EncodedLabelled,
    EncodedPair,
    ExampleBatch,
    PairBatch,
    RankedBatch,
    collate_examples,
    collate_pairs,
)
from xalign.data.records import Text
from xalign.dpo import DPO, unwrap
from xalign.evaluation.intervals import Estimate, estimate
from xalign.logprobs import scored_logprobs
from xalign.nn.decoding import evaluating
from xalign.nn.transformer import TransformerWrapper
from xalign.objectives import pair_masks
from xalign.tokenizers import Tokenizer

SCORED_LOGITS = 2**28  # of one forward pass, for one side of pairs: 1 GiB in fp32, so that a large vocabulary fits
Batch = TypeVar("Batch", PairBatch, RankedBatch, ExampleBatch)


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
    sums, _ = chosen_logps(model, pairs, tokenizer.pad_id)
    flat = iter(sums)
    return [[next(flat) for _ in row] for row in completions]


@torch.no_grad()
def each_batch(model: nn.Module, lengths: Sequence[int] | np.ndarray, collate: Callable[[list[int]], Batch],
               use: Callable[[list[int], Batch], None], size: int = 32, progress: str = "") -> None:
    """Show all rows to `use`, `size` at a time and rows of similar length together; the model is in eval mode.

    `collate(rows)` makes the batch of the rows with these indices, which goes to the model's device. A batch is smaller
    where its logits would be more than `SCORED_LOGITS`.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    device = next(model.parameters()).device
    vocab = getattr(unwrap(model), "num_tokens", 1) if getattr(model, "makes_logits", True) else 1
    with evaluating(model), tqdm(total=len(order), desc=progress, unit="pair", disable=not progress, mininterval=1) as bar:
        at = 0
        while at < len(order):
            rows = order[at : at + size].tolist()
            rows = rows[: max(1, SCORED_LOGITS // (vocab * int(lengths[rows[-1]])))]
            use(rows, collate(rows).to(device))
            at += len(rows)
            bar.update(len(rows))


def chosen_logps(model: TransformerWrapper, pairs: Sequence[EncodedPair], pad_id: int, size: int = 32,
                 progress: str = "") -> tuple[list[float], list[int]]:
    """Summed log-probability, nats, of each pair's chosen side given the prompt, and how many tokens that has."""
    sums, counts = [0.0] * len(pairs), [0] * len(pairs)

    def use(rows: list[int], batch: PairBatch) -> None:
        logps, scored = scored_logprobs(model, batch.chosen, batch.chosen_mask & ~batch.chosen_prompt_mask)
        for i, s, c in zip(rows, logps.masked_fill(~scored, 0.0).sum(1).tolist(), scored.sum(1).tolist(), strict=True):
            sums[i], counts[i] = s, c

    each_batch(model, [len(p.prompt) + len(p.chosen) for p in pairs],
               lambda rows: collate_pairs([pairs[i] for i in rows], pad_id), use, size, progress)
    return sums, counts


def sides_logps(model: TransformerWrapper, pairs: Sequence[EncodedPair], pad_id: int,
                progress: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probabilities, nats, of both sides of pairs (of labelled texts: the one) given their prompts, and how many
    tokens these have, EOS included: (sides, pairs) each.
    """
    both = [*pairs, *(EncodedPair(p.prompt, p.rejected, []) for p in pairs if not isinstance(p, EncodedLabelled))]
    sums, counts = (np.asarray(column).reshape(-1, len(pairs)) for column in chosen_logps(model, both, pad_id, 32, progress))
    return sums, counts


def perplexity(model: TransformerWrapper, pairs: Sequence[EncodedPair], pad_id: int) -> Estimate:
    """Perplexity of held-out completions (of pairs: both) given their prompts: exp of nats a token, EOS included."""
    sums, counts = sides_logps(model, pairs, pad_id)
    return estimate(-sums.sum(0), counts.sum(0), np.exp)


def pairs_logps(dpo: DPO, model: TransformerWrapper, pairs: Sequence[EncodedPair], pad_id: int, size: int = 32,
                progress: str = "", rows: Sequence[int] | np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of pairs' completions under `model`: (chosen, rejected), fp32 on the CPU.

    All pairs in their order, or only those of `rows` in the order of `rows`.
    """
    wanted = range(len(pairs)) if rows is None else rows
    chosen, rejected = torch.zeros(len(wanted)), torch.zeros(len(wanted))

    def use(found: list[int], batch: PairBatch) -> None:
        logps = dpo.logps(model, batch.chosen, batch.rejected, **pair_masks(batch))
        chosen[found], rejected[found] = logps[0].cpu(), logps[1].cpu()

    lengths = np.fromiter((len(pair.prompt) + len(pair.chosen) for pair in (pairs[i] for i in wanted)), np.int64, len(wanted))
    each_batch(model, lengths, lambda found: collate_pairs([pairs[wanted[i]] for i in found], pad_id), use, size,
               progress)
    return chosen, rejected


def example_logps(model: nn.Module, examples: Sequence[EncodedExample], pad_id: int,
                  progress: str = "") -> tuple[list[float], list[int]]:
    """Summed log-probability, nats, of each example's scored tokens, and how many they are."""
    sums, counts = [0.0] * len(examples), [0] * len(examples)

    def use(rows: list[int], batch: ExampleBatch) -> None:
        logps, scored = scored_logprobs(model, batch.tokens, batch.loss_mask)
        for i, s, c in zip(rows, logps.masked_fill(~scored, 0.0).sum(1).tolist(), scored.sum(1).tolist(), strict=True):
            sums[i], counts[i] = s, c

    each_batch(model, [e.length for e in examples], lambda rows: collate_examples([examples[i] for i in rows], pad_id), use,
               progress=progress)
    return sums, counts


def mean_nll(model: nn.Module, examples: Sequence[EncodedExample], pad_id: int) -> float:
    """Cross-entropy of the scored tokens, nats a token."""
    sums, counts = example_logps(model, examples, pad_id)
    return -math.fsum(sums) / max(1, sum(counts))


def accuracies(chosen: Tensor, rejected: Tensor) -> list[float]:
    """Per pair 1 where its reward (n,) prefers the chosen side, 1/2 at a tie, else 0."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).tolist()


def label_accuracies(rewards: Tensor, labels: Tensor) -> list[float]:
    """Per desirable text the share of all undesirable ones that have a lower reward, a tie 1/2; their mean is the AUC.

    `rewards` (n,), `labels` (n,) bool. [] where all labels are the same.
    """
    good, bad = rewards[labels], rewards[~labels].sort().values
    if not len(good) or not len(bad):
        return []
    below = torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)
    return (below / (2 * len(bad))).tolist()


def label_noise_share(accuracy: float, limit: float) -> float:
    """How much of what the labels' noise leaves to be known is known: (accuracy - 1/2) / (limit - 1/2)."""
    return (accuracy - 0.5) / (limit - 0.5) if limit > 0.5 else math.nan
