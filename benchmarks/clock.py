"""How things are timed: ceilings of the machine, a step as the difference of two lengths, and where a step's time goes."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from xalign import TransformerWrapper
from xalign.drawing import Draw, Penalties
from xalign.nn import attention, transformer
from xalign.nn.cache import DecodeBuffer
from xalign.nn.linear import Linear, Packed, product, products
from xalign.nn.quantize import QuantizedLinear

DRIFT = 0.1  # by which a ceiling may move during a section
NUMBERS = {"cpu": 2**26, "cuda": 2**29}  # fp32 numbers that are read, many times what a cache holds


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call, on a GPU until all of its work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def fastest(run: Callable[[], object], repeats: int = 100) -> float:
    return min(timed(run) for _ in range(repeats))


def ceilings(device: str = "cpu") -> dict[str, float]:
    """What the machine can do: GB/s that a sum reads and a copy moves; GFLOP/s of many rows by a feed-forward weight."""
    numbers = torch.randn(NUMBERS[device], device=device)
    other = torch.empty_like(numbers)
    found = {"read, GB/s": numbers.nbytes / fastest(numbers.sum) / 1e9,
             "copy, GB/s": 2 * numbers.nbytes / fastest(lambda: other.copy_(numbers)) / 1e9}
    rows, dim = (256, 512) if device == "cpu" else (4096, 4096)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x, w = (torch.randn(n, dim, device=device).to(dtype) for n in (rows, 4 * dim))
        found[f"mm {name}, GFLOP/s"] = 8 * rows * dim * dim / fastest(lambda x=x, w=w: x @ w.T) / 1e9
    return found


def drift(before: dict[str, float], after: dict[str, float]) -> float:
    return max(abs(after[name] / before[name] - 1) for name in before)


class Times(dict[str, list[float]]):
    """Milliseconds of each name, one a round.

    A ratio is the median of those of the rounds, in which both were timed by turns: the machine may change between rounds.
    """

    def median(self, name: str) -> float:
        return statistics.median(self[name])

    def ratios(self, above: str, below: str) -> list[float]:
        return sorted(a / b for a, b in zip(self[above], self[below], strict=True))

    def ratio(self, above: str, below: str) -> float:
        return statistics.median(self.ratios(above, below))

    def quartiles(self, above: str, below: str) -> list[float]:
        each = self.ratios(above, below)
        return [each[len(each) // 4], each[-1 - len(each) // 4]]


def rounds(runs: dict[str, Callable[[], float]], repeats: int, title: str) -> Times:
    """What each gives, in turns, after a round of warm-up."""
    times = Times((name, []) for name in runs)
    bar = tqdm(total=(repeats + 1) * len(runs), desc=title, leave=False)
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            bar.set_postfix_str(name)
            milliseconds = run()
            if repeat:
                times[name].append(milliseconds)
            bar.update()
    bar.close()
    return times


READ = "read"


def steps(runs: Mapping[str, Callable[[int], object]], lengths: Sequence[int], repeats: int, title: str,
          device: str | None = None) -> Times:
    """Milliseconds a step: the long run less the short one, so that the prompt's pass and the packing of weights cancel.

    With a `device` also READ, the milliseconds in which its memory gives a GB, in each round: on a machine that is shared it
    may change from one minute to the next.
    """
    short, long = lengths

    def step(run: Callable[[int], object]) -> float:
        return 1e3 * (timed(lambda: run(long)) - timed(lambda: run(short))) / (long - short)

    timers = {name: partial(step, run) for name, run in runs.items()}
    if device is not None:
        numbers = torch.randn(NUMBERS[device], device=device)
        timers[READ] = lambda: 1e12 * fastest(numbers.sum, 20) / numbers.nbytes
    return rounds(timers, repeats, title)


def alternating(runs: Mapping[str, Callable[[], Iterator[object]]], lengths: Sequence[int], repeats: int, title: str) -> Times:
    """Milliseconds a step of runs that go on together, each by a step in its turn; a round is the median of the steps between
    the two lengths, and begins anew.

    A machine that is slower for a while is so for all of them: differences of a hundredth can be seen.
    """
    times = Times((name, []) for name in runs)
    for repeat in tqdm(range(repeats + 1), desc=title, leave=False):
        each: dict[str, list[float]] = {name: [] for name in runs}
        going = {name: run() for name, run in runs.items()}
        for _ in range(lengths[1]):
            for name, run in going.items():
                each[name].append(1e3 * timed(partial(next, run)))
        for name, values in each.items() if repeat else ():
            times[name].append(statistics.median(values[lengths[0] :]))
    return times


def calls(runs: Mapping[str, Callable[[int], object]], length: int, repeats: int, title: str) -> Times:
    """Milliseconds of whole calls."""
    return rounds({name: lambda run=run: 1e3 * timed(lambda: run(length)) for name, run in runs.items()}, repeats, title)


def least_bytes(net: TransformerWrapper, rows: int, length: float) -> float:
    """What a step must read: every weight but those of an embedding that is no head, and the rows' keys and values."""
    tied = net.to_logits is None
    tensors = [*net.named_parameters(), *net.named_buffers()]
    weights = sum(t.nbytes for name, t in tensors if tied or not name.startswith("token_emb"))
    one = net.decode_buffer(1, 1)
    return weights + rows * length * sum(t.nbytes for t in (*one.keys, *one.values))


# ---- where the time of a step goes

LAYERS, HEAD, ATTENTION, NORMS, MODEL, DRAW, LOOP = PARTS = (
    "products of the layers", "product of the head", "attention and its cache", "norms and RoPE", "rest of the model", "draw",
    "rest of the loop")
WATCHED: list[tuple[Any, str, str]] = [
    (attention, "products", LAYERS), (transformer, "products", LAYERS), (Linear, "forward", LAYERS),
    (QuantizedLinear, "forward", LAYERS), (TransformerWrapper, "logits", HEAD), (attention, "attend_one", ATTENTION),
    (DecodeBuffer, "extend", ATTENTION), (attention, "rotate", NORMS), (nn.RMSNorm, "forward", NORMS),
    (transformer.Decoder, "step_context", NORMS), (TransformerWrapper, "step", MODEL), (Draw, "__call__", DRAW),
    (Penalties, "__call__", DRAW)]


@contextmanager
def watching() -> Iterator[dict[str, float]]:
    """Count the seconds in WATCHED functions, by label; what one of them calls counts for it (the model's step excepted)."""
    spent, busy = dict.fromkeys(PARTS, 0.0), [False]

    def watched(function: Callable, label: str) -> Callable:
        opens = label == MODEL

        def call(*args: Any, **kwargs: Any) -> Any:
            if busy[0]:
                return function(*args, **kwargs)
            busy[0] = not opens
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[label] += time.perf_counter() - started
                busy[0] = False

        return call

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in WATCHED]
    try:
        for owner, name, label in WATCHED:
            setattr(owner, name, watched(getattr(owner, name), label))
        yield spent
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def parts(run: Callable[[int], object], lengths: Sequence[int], repeats: int, title: str) -> dict[str, float]:
    """Milliseconds a step in each of PARTS, medians; in eager mode on a CPU, where a function's time is its work's.

    Looking at the clock takes about half a microsecond a call, some 60 microseconds a step of 12 layers.
    """
    each: list[dict[str, float]] = []
    for _ in tqdm(range(repeats), desc=title, leave=False):
        found = []
        for n in lengths:
            with watching() as spent:
                spent[LOOP] = timed(partial(run, n))
            found.append(spent)
        per_step = {k: 1e3 * (found[1][k] - found[0][k]) / (lengths[1] - lengths[0]) for k in PARTS}
        per_step[LOOP] -= per_step[MODEL] + per_step[DRAW]
        per_step[MODEL] -= sum(per_step[k] for k in (LAYERS, HEAD, ATTENTION, NORMS))
        each.append(per_step)
    return {k: statistics.median(e[k] for e in each) for k in PARTS}


@torch.no_grad()
def products_alone(net: TransformerWrapper, rows: int, repeats: int = 15) -> float:
    """Milliseconds of all matrix products of a step, one after the other and nothing else."""
    groups = [group for m in net.modules() if hasattr(m, "grouped") for group in m.grouped()]  # type: ignore[operator]
    dtype = net.token_emb.weight.dtype
    inputs = [torch.randn(rows, 1, getattr(g[0], "in_features", net.attn_layers.dim)).to(dtype) for g in groups]

    def run() -> None:
        for x, group in zip(inputs, groups, strict=True):
            products(x, group) if len(group) > 1 else product(x, group[0]) if group[0] is net.token_emb else group[0](x)

    with Packed(net):
        return 1e3 * statistics.median(timed(run) for _ in range(repeats))
