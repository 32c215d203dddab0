"""The one training loop: accumulation with global means, clipping, logging, evaluation, checkpoints, exact resume."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from xalign import distributed, sharding
from xalign.checkpoint import put_trained
from xalign.errors import Diverged, Interrupted
from xalign.objectives import Moving, Objective
from xalign.optim import adamw, schedule
from xalign.runs import METRICS, RunFolder, read_jsonl
from xalign.tokenizers import Tokenizer
from xalign.watch import Pace, Profile, Watch, peak_flops, warn

MOST_SKIPPED = 20  # steps in a row: after so many, with weights and data as they are, no other will succeed


@dataclass(frozen=True)
class LoopOptions:
    """What the loop needs to know; 0 steps between means never (checkpoints: only the last)."""

    learning_rate: float
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    on_nan: str = "stop"
    bf16: bool = False
    logging_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 0
    profile: bool = False
    parallel: str = "ddp"
    checkpoint_type: str | None = None
    seed: int = 0


@contextlib.contextmanager
def postponed_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying in the middle of a step; a second one is not waited for."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)

    for n in (int(signal.SIGINT), int(signal.SIGTERM)):
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            before[n] = signal.signal(n, note)
    try:
        yield caught
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """bfloat16 matrix products; sums, softmax and the residual stream stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


class Window:
    """Weighted means since the last log line; part of the saved state, so that a resumed run logs the same values."""

    def __init__(self, state: dict[str, tuple[float, float]] | None = None):
        self.sums = dict(state or {})

    def add(self, values: dict[str, float], weight: float) -> None:
        for key, value in values.items():
            total, count = self.sums.get(key, (0.0, 0.0))
            self.sums[key] = (total + weight * value, count + weight)

    def means(self) -> dict[str, float]:
        means, self.sums = {k: total / count if count else 0.0 for k, (total, count) in self.sums.items()}, {}
        return means


def train(model: nn.Module, objective: Objective, batches: Callable[[int], Sequence[Any]], total_steps: int,
          steps_per_epoch: int, options: LoopOptions, run: RunFolder, tokenizer: Tokenizer | None = None, *,
          title: str = "train", evaluate: Callable[[int], dict[str, float]] | None = None,
          reference: nn.Module | None = None, moving: Moving | None = None) -> None:
    """Train `model`'s parameters for `total_steps` optimizer steps, or for what is left of them after a checkpoint.

    `batches(step)` gives this process's micro-batches of a step and depends on nothing but `step`; there may be none, but of
    step 0. Losses are averaged over the step's tokens or pairs together, however they are split over micro-batches and
    processes; all processes take the same step, to the bit. `evaluate(step)` gives metrics for the log; rank 0 evaluates
    while the others wait. With `parallel` "fsdp" and several processes the model, and the `reference` where the objective runs
    one beside it, are sharded; both are whole when rank 0 evaluates or saves, and in the end on rank 0. A `moving` reference,
    which is not sharded, is saved with the model.
    Raises `Diverged` at a loss or gradient that is not finite (with `on_nan` "skip" such a step leaves weights and optimizer
    alone, and only `MOST_SKIPPED` in a row raise), `Interrupted` after a signal, once all is saved.
    """
    device = next(model.parameters()).device
    rank = distributed.rank()
    restored, first, window, skipped, in_row = run.restore(), 0, Window(), 0, 0
    if restored is not None and "files" not in restored[1]:
        put_trained(model, *restored)
    shards = None
    if options.parallel == "fsdp" and distributed.size() > 1:
        distributed.check_same_weights(model, "before they are sharded")
        shards = sharding.Sharded(model, *([] if reference is None else [reference]))
    optimizer = adamw(model, options.learning_rate, options.weight_decay, (options.adam_beta1, options.adam_beta2),
                      options.adam_epsilon)
    if restored is not None:
        held, state = restored
        if "files" in state:
            assert isinstance(held, Path)
            sharding.load_shards(held, model, optimizer, state)
        else:
            sharding.load_optimizer(optimizer, state["optimizer"])
        if moving is not None:
            moving.reference.load_state_dict(state["reference"])
        first, window, (skipped, in_row) = state["step"], Window(state["window"]), state["skipped"]
        others = f", by {len(state['rng'])} processes" * (len(state["rng"]) != distributed.size())
        print(f"{title}: resumed after step {first} of {total_steps}{others}", file=sys.stderr)
    # dropout draws of its own on each process, anew where their number is another one
    torch.manual_seed(options.seed + 1_000_003 * rank + 7919 * first)
    if restored is not None and len(state["rng"]) == distributed.size():
        torch.set_rng_state(state["rng"][rank].clone())
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"][rank].clone(), device)
    run.rewind(first if restored is not None else -1)
    if shards is None:
        distributed.check_same_weights(model, f"before step {first + 1}")

    def whole() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if shards is None else shards.whole()

    def save(step: int) -> str:
        if shards is None:
            distributed.check_same_weights(model, f"after step {step}")
        state = {"step": step, "window": window.sums, "skipped": (skipped, in_row),
                 "rng": distributed.gathered(torch.get_rng_state())}
        if device.type == "cuda":
            state["cuda_rng"] = distributed.gathered(torch.cuda.get_rng_state(device))
        if (options.checkpoint_type or {"fsdp": "sharded"}.get(options.parallel)) == "sharded":
            return str(run.save_by(step, lambda folder: sharding.save_shards(folder, model, optimizer, state)))
        if moving is not None:
            state["reference"] = moving.reference.state_dict()
        state["optimizer"] = sharding.optimizer_state(optimizer)
        with whole():
            return str(run.save(step, model, tokenizer, state))

    def look(step: int) -> None:
        with whole():
            if evaluate is not None and rank == 0:
                log(step, evaluate(step))

    def log(step: int, values: dict[str, float]) -> None:
        run.log(METRICS, {"step": step, "epoch": round(step / steps_per_epoch, 4), **values}, f"{title}/")

    [peak] = distributed.totals([peak_flops(model, options.bf16) if options.profile else 0.0])
    pace, profile = Pace(model, peak), Profile(run.path / "profile.json", device.type)
    lines = run.path / METRICS
    watch = Watch(title, total_steps, read_jsonl(lines) if lines.exists() else ())
    if first == 0 and evaluate is not None and options.eval_steps:
        look(0)
    saved, started = "", time.perf_counter()
    bar = tqdm(total=total_steps, initial=first, desc=title, unit="step", mininterval=1 if sys.stderr.isatty() else 15)
    with postponed_signals() as signals, contextlib.closing(bar), contextlib.closing(profile):
        for step in range(first, total_steps):
            began = time.perf_counter()
            factor = schedule(step, total=total_steps, warmup=options.warmup_steps, kind=options.lr_scheduler_type)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * factor
            parts = batches(step)
            own = pace.work([row for batch in parts for row in objective.lengths(batch)])
            micro = [batch.to(device) for batch in parts]
            weights = [objective.weight(batch) for batch in parts]  # on the host: no device is waited for
            counted = sum(objective.tokens(batch) for batch in parts)
            total, tokens, run_tokens, flops = distributed.totals([sum(weights), counted, *own])
            # a pass of a sharded model is one of all: who has fewer micro-batches runs one more often, and counts it once
            for _ in range((distributed.most(len(parts)) if shards else 1) - len(parts)):
                micro.append((micro or [batch.to(device) for batch in batches(0)])[-1])
                weights.append(0)
            model.train()
            values: dict[str, float] = {}
            for batch, weight in zip(micro, weights, strict=True):
                share = weight / max(1, total)
                with distributed.talking(only=False):
                    with autocast(device, options.bf16):
                        loss, metrics = objective(batch, tokens / max(1, total))
                    (loss * share).backward()
                for key, value in {"loss": loss.detach(), **metrics}.items():
                    values[key] = values.get(key, 0.0) + share * float(value)
            if shards is None:
                distributed.sum_gradients(model.parameters())
            values = dict(zip(values, distributed.totals(list(values.values())), strict=True))
            values["grad_norm"] = sharding.clip(model, options.max_grad_norm)
            done = step + 1
            last = done == total_steps
            if all(math.isfinite(values[key]) for key in ("loss", "grad_norm")):
                optimizer.step()
                if moving is not None:
                    moving.after(done)
                window.add(values, total)
                in_row = 0
            else:
                skipped, in_row = skipped + 1, in_row + 1
                found = f"step {done}: loss is {values['loss']}, gradient norm {values['grad_norm']}"
                if options.on_nan == "stop" or in_row == MOST_SKIPPED:
                    good = saved or next((str(p) for p in run.checkpoints()), "none yet")
                    before = f", as in the {in_row - 1} steps before" * (in_row > 1)
                    raise Diverged(f"{found}{before}; nothing was updated, the last good checkpoint is {good}; try a lower "
                                   "--learning-rate")
                if skipped == 1:
                    warn(f"{title}, {found}: the step is skipped, others like it are counted in the log")
            optimizer.zero_grad(set_to_none=True)
            pace.add(run_tokens, flops, time.perf_counter() - began)
            if options.profile and not rank:
                profile.note(done - first, last, pace)
            if (options.logging_steps and done % options.logging_steps == 0) or last:
                means = objective.told(window.means())
                line = {**means, **({"skipped": skipped} if options.on_nan == "skip" else {}),
                        "learning_rate": options.learning_rate * factor, **pace.take(),
                        "seconds": round(time.perf_counter() - started, 2)}
                log(done, line)
                watch.note({"step": done, **line})
                bar.set_postfix_str(f"loss {means.get('loss', math.nan):.3f}")
            if evaluate is not None and options.eval_steps and (done % options.eval_steps == 0 or last):
                look(done)
            [stop] = distributed.totals([len(signals)])  # a signal to one process stops all after the same step
            if (options.save_steps and done % options.save_steps == 0) or last or stop:
                saved = save(done)
            bar.update()
            if stop:
                raise Interrupted(f"{title}: stopped after step {done} of {total_steps}, all is saved in {saved}; "
                                  "the same command goes on from there")
    if shards is not None:
        shards.join()
