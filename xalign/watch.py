"""What a training tells while it lasts: its pace, a profile, the KL of samples, and the field's classic mistakes."""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from xalign.data.collate import EncodedExample, EncodedPair, TruncationReport, collate_examples
from xalign.disk import write_atomically
from xalign.logprobs import sequence_logprobs
from xalign.nn.decoding import evaluating
from xalign.nn.lora import has_lora
from xalign.nn.products import linear
from xalign.nn.transformer import TransformerWrapper

TIMED = ("seconds", "tokens_per_second", "U")  # what a line of the log has from the clock: the rest is resumed to the bit
SHARE = 0.05  # of the records that may lack something before a warning
SAMPLED = 1000  # pairs that are looked at for it, evenly spread
LINES = 8  # of the log that a verdict rests on, at least
ERRORS = 4  # standard errors from which on a slope is one: it is asked for again and again, and noise must not pass once
Record = dict[str, Any]


def warn(message: str) -> None:
    """A warning on stderr; of an empty message nothing."""
    if message:
        print(f"warning: {message}", file=sys.stderr, flush=True)


# -- pace -----------------------------------------------------------------------------------------------------------


def network(model: nn.Module) -> TransformerWrapper:
    """The decoder in a model: itself, or inside a wrapper."""
    return next(m for m in model.modules() if isinstance(m, TransformerWrapper))


def shared_flops(model: nn.Module, lengths: Sequence[Sequence[int]]) -> float:
    """The least FLOPs of a forward pass over rows of (prompt, completion, ...) tokens; a multiply-add is 2.

    Each prompt runs once and its completions behind it, causal attention is counted exactly, of the last layer's prompt
    positions keys and values alone, and the head at the completions' tokens.
    """
    net, layers = network(model), network(model).attn_layers
    d, depth, queries, keys = layers.dim, layers.depth, layers.heads * layers.dim_head, layers.kv_heads * layers.dim_head
    block = 2 * d * (queries + keys) + (3 if layers.config["ff_glu"] else 2) * d * layers.inner_dim
    total = 0.0
    for prompt, *completions in lengths:
        replies = sum(completions)
        total += 2 * block * depth * (prompt + replies) - 2 * (block - 2 * d * keys) * prompt
        seen = sum(c * prompt + c * (c + 1) / 2 for c in completions)
        total += 4 * queries * ((depth - 1) * prompt * (prompt + 1) / 2 + depth * seen)
        total += 2 * d * net.num_tokens * replies * getattr(model, "makes_logits", True)
    return total


@torch.no_grad()
def peak_flops(model: nn.Module, bf16: bool = False, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest product between the model's width and its feed-forward's, tried for about `seconds`."""
    net = network(model)
    weight, inner = net.token_emb.weight, net.attn_layers.inner_dim
    d, device, dtype = weight.shape[1], weight.device, torch.bfloat16 if bf16 else weight.dtype
    rows = 8192 if device.type == "cuda" else min(max(2**30 // (d * inner), 64), 4096)
    own = torch.Generator(device).manual_seed(0)  # the training's draws stay as they are
    x, w = (torch.randn(n, d, device=device, dtype=dtype, generator=own) for n in (rows, inner))
    end, fastest = time.perf_counter() + seconds, math.inf
    while fastest == math.inf or time.perf_counter() < end:
        for product in (linear, F.linear):
            began = time.perf_counter()
            product(x, w)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            fastest = min(fastest, time.perf_counter() - began)
    return 2 * rows * d * inner / fastest


class Pace:
    """Tokens and least FLOPs of steps by wall time, since the last look; U is counted where a peak (FLOP/s) is known."""

    def __init__(self, model: nn.Module, peak: float = 0.0):
        self.model, self.peak = model, peak
        self.passes = 2 if has_lora(model) else 3  # forward, gradients of inputs, and of weights unless these are frozen
        self.tokens = self.flops = self.seconds = 0.0

    def work(self, lengths: Sequence[Sequence[int]]) -> tuple[int, float]:
        """Tokens of rows (prompt, completion, ...), each completion with its prompt, and the least FLOPs of a training step."""
        tokens = sum(prompt * len(completions) + sum(completions) for prompt, *completions in lengths)
        return tokens, self.passes * shared_flops(self.model, lengths) if self.peak else 0.0

    def add(self, tokens: float, flops: float, seconds: float) -> None:
        self.tokens, self.flops, self.seconds = self.tokens + tokens, self.flops + flops, self.seconds + seconds

    def take(self) -> dict[str, float]:
        """`tokens_per_second`, and U, the part of the time that the least FLOPs take at the peak."""
        found: dict[str, float] = {}
        if self.seconds:
            found["tokens_per_second"] = round(self.tokens / self.seconds, 1)
        if self.seconds and self.peak:
            found["U"] = round(self.flops / (self.peak * self.seconds), 4)
        self.tokens = self.flops = self.seconds = 0.0
        return found


class Profile:
    """The third to the fifth step of this process under torch.profiler: a Chrome trace in `path`, and a table on stderr."""

    FIRST, LAST, ROWS = 3, 5, 15

    def __init__(self, path: Path, device: str):
        self.path, self.device = path, device
        self.profiler: torch.profiler.profile | None = None

    def note(self, steps: int, last: bool, pace: Pace) -> None:
        """After a step: `steps` were taken by this process, and no more come after the `last`."""
        if last and steps < self.FIRST:
            warn(f"--profile saw {steps} steps, allowed are {self.FIRST} or more: there is no {self.path}")
        elif steps == self.FIRST - 1:
            pace.take()  # what came before was to warm up
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler is not None and (last or steps == self.LAST):
            profiler = self.profiler
            self.close()
            with tempfile.TemporaryDirectory() as folder:
                profiler.export_chrome_trace(f"{folder}/trace.json")
                write_atomically(self.path, Path(folder, "trace.json").read_bytes())
            order = f"self_{'cuda' if self.device == 'cuda' else 'cpu'}_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=self.ROWS)
            figures = ", ".join(f"{name} {value:,}" for name, value in pace.take().items())
            print(f"{table}\nsteps {self.FIRST} to {steps} of this process, slowed by the profiler: {figures}; peak "
                  f"{pace.peak / 1e9:,.1f} GFLOP/s; trace: {self.path}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None


# -- how far the policy went ----------------------------------------------------------------------------------------


@torch.no_grad()
def sampled_kl(policy: TransformerWrapper, reference: Callable[[], AbstractContextManager[nn.Module]],
               samples: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
    """`eval/kl`: KL(policy || reference), nats a sequence, the mean log-ratio of the policy's own (prompt, completion) ids.

    They are drawn at temperature 1, unfiltered. Those that outgrew the window were drawn from something else than is scored
    here, and are left out; {} if none is left. Each model runs where it is; `reference` is `DPO.reference`.
    """
    rows = [EncodedExample(p + c, [False] * len(p) + [True] * len(c)) for p, c in samples
            if c and len(p) + len(c) <= policy.max_seq_len]
    if not rows:
        return {}
    sums = []
    for asked in (lambda: nullcontext(policy), reference):
        with asked() as model, evaluating(model):
            batch = collate_examples(rows, 0).to(next(model.parameters()).device)
            sums.append(sequence_logprobs(model, batch.tokens, batch.loss_mask, batch.mask).cpu())
    return {"eval/kl": float((sums[0] - sums[1]).mean())}


# -- classic mistakes: of data --------------------------------------------------------------------------------------


def missing_end(pairs: Sequence[EncodedPair], ends: Collection[int]) -> str:
    """A warning, or "", about chosen completions without one of the ids that end a reply (`Rendered.stops`) at their end."""
    some = [pairs[i].chosen for i in range(0, len(pairs), max(1, len(pairs) // SAMPLED))]
    # a template may write a line break behind the end of a turn
    share = sum(set(ends).isdisjoint(ids[-3:]) for ids in some) / max(1, len(some))
    if not ends or share <= SHARE:  # a tokenizer without an end is told elsewhere
        return ""
    return (f"{share:.1%} of the chosen completions have no end (EOS or end of turn), so that the model unlearns to stop: was "
            "their end cut (try a larger --max-length), or does the chat template write none?")


def truncated(report: TruncationReport) -> str:
    """A warning, or "", about records that were cut (or dropped) because of their length."""
    share = (max(report.prompt_cut, report.completion_cut) + report.dropped) / max(1, report.total)
    return "" if share <= SHARE else (f"{share:.1%} of the records are longer than --max-length and were cut ({report}): try a "
                                      "larger one, or leave long records out")


def unbalanced(desirable: int, undesirable: int, desirable_weight: float, undesirable_weight: float) -> str:
    """A warning, or "", about labels that kto's weights (desirable, undesirable) leave far from balance.

    The paper (arXiv 2402.01306) advises n_D w_D / (n_U w_U) in [1, 4/3]; from 1/2 to 2 is let pass here.
    """
    good, bad = desirable * desirable_weight, undesirable * undesirable_weight
    if not good or not bad:
        return f"{desirable:,} texts are desirable, {undesirable:,} undesirable, or a weight is 0: kto needs both kinds"
    return "" if 0.5 <= good / bad <= 2 else (
        f"{desirable:,} texts are desirable, {undesirable:,} undesirable, weighted {good / bad:.2g} to 1: for balance try "
        f"--desirable-weight {bad / desirable:.2g}, or --undesirable-weight {good / undesirable:.2g}")


# -- classic mistakes: of a training, by the lines of its log -------------------------------------------------------


def last_third(records: Sequence[Record], key: str) -> list[float]:
    """The last third of a key's values; none as long as that would be fewer than `LINES`."""
    found = [r[key] for r in records if r.get(key) is not None]
    return found[-(len(found) // 3) :] if len(found) >= 3 * LINES else []


def trend(values: Sequence[float]) -> float:
    """The slope of the line through values (least squares) in its standard errors; 0 for fewer than three."""
    n = len(values)
    if n < 3:
        return 0.0
    mean, at = math.fsum(values) / n, [i - (n - 1) / 2 for i in range(n)]
    spread = math.fsum(a * a for a in at)
    slope = math.fsum(a * (v - mean) for a, v in zip(at, values, strict=True)) / spread
    rest = math.fsum((v - mean - slope * a) ** 2 for a, v in zip(at, values, strict=True))
    return slope / max(math.sqrt(rest / (n - 2) / spread), sys.float_info.min)


def both_falling(records: Sequence[Record], total: int) -> bool:
    """Whether rewards of chosen and of rejected are below 0 and fall: both become less likely than under the reference."""
    sides = [last_third(records, f"rewards/{side}") for side in ("chosen", "rejected")]
    return all(bool(values) and max(values) < 0 and trend(values) < -ERRORS for values in sides)


def accuracy_stuck(records: Sequence[Record], total: int) -> bool:
    """Whether after half of the `total` steps the accuracy is no different from a coin's: within 3 standard errors, by the
    spread of the lines, where these are within .1."""
    values = last_third(records, "rewards/accuracies")
    if not values or 2 * records[-1]["step"] < total:
        return False
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return abs(mean - 0.5) <= 3 * error + 1e-9 and 3 * error < 0.1


def loss_rising(records: Sequence[Record], total: int) -> bool:
    """Whether the loss goes up by more than noise."""
    return trend(last_third(records, "loss")) > ERRORS


CHECKS: dict[Callable[[Sequence[Record], int], bool], str] = {
    both_falling: "the rewards of chosen and rejected both fall, the policy makes what was chosen less likely too: mix in "
                  "imitation (--loss-type sigmoid,sft --loss-weights 1,0.1), or try a larger --beta or a lower --learning-rate",
    accuracy_stuck: "past half of the training the rewards' accuracy is a coin's, .5: look at the pairs (xalign data inspect; "
                    "are the labels noise?), or try a higher --learning-rate",
    loss_rising: "the loss rises: try a lower learning rate or more steps of warmup",
}


class Watch:
    """Sees every line of a training's log and tells each classic mistake once; `records` are the lines before a resume."""

    def __init__(self, title: str, total: int, records: Sequence[Record] = ()):
        self.title, self.total, self.records = title, total, list(records)
        # the rewards of a reward model have no zero
        self.left, self.due = [c for c in CHECKS if c is not both_falling or title != "reward"], 0.0

    def note(self, record: Record) -> None:
        self.records.append(record)
        if len(self.records) < self.due and record["step"] < self.total:
            return
        self.due = 1.05 * len(self.records)  # so that a long log costs no more than a few looks at each line
        for check in [c for c in self.left if c(self.records, self.total)]:
            self.left.remove(check)
            warn(f"{self.title}, step {record['step']}: {CHECKS[check]}")
