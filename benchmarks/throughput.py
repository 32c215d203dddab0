"""Many prompts of mixed lengths: prompts a second, each engine at its best batch size."""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import models
import torch
from report import judged, table
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from xalign import AutoregressiveWrapper

VOCAB, NEW = 32_000, 128
LENGTHS = (8, 256)  # of prompts, log-uniform
ENDS = list(range(1, VOCAB, 64))  # tokens that end a text: lengths are then about geometric, with a mean of 64 but for NEW
OURS, PADDED, MIXED, BATCHED = ("xalign", "transformers, padded, sorted", "transformers, padded, unsorted",
                                "transformers, generate_batch")
SIZES, BATCHED_SIZES = {OURS: (64, 128), PADDED: (32, 64, 128)}, (32, 64)  # rows at once that are tried
TRIED = 16  # new tokens of a trial, at most
PAGE = 32  # tokens of a page of generate_batch's cache
ASKED = 2.0
EQUAL = 0.98  # of the texts at least: logits that are equal but for rounding may fork a few

Texts = list[list[int]]
Engine = Callable[[list[Tensor], int, int, tqdm], Texts]  # prompts, rows at once, new tokens at most, progress


def workload(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    low, high = (math.log(n) for n in LENGTHS)
    lengths = (low + (high - low) * torch.rand(count, generator=generator)).exp().round().long().tolist()
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def ours(wrapper: AutoregressiveWrapper) -> Engine:
    return lambda prompts, size, new, bar: models.texts(
        wrapper.generate(prompts, new, ENDS, temperature=0.0, batch_size=size, progress=bar.update), ENDS)


def padded(model: LlamaForCausalLM, ordered: bool) -> Engine:
    """transformers' `generate`, batch by batch, padded on the left; prompts by their length if `ordered`, longest first."""

    def run(prompts: list[Tensor], size: int, new: int, bar: tqdm) -> Texts:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) * ordered)
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            width = max(len(prompts[i]) for i in chosen)
            tokens, mask = (torch.zeros(len(chosen), width, dtype=torch.long) for _ in range(2))
            for row, i in enumerate(chosen):
                tokens[row, width - len(prompts[i]) :], mask[row, width - len(prompts[i]) :] = prompts[i], 1
            rows = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=ENDS,
                                  pad_token_id=0)
            found |= zip(chosen, models.texts(rows[:, width:], ENDS), strict=True)
            bar.update(len(chosen))
        return [found[i] for i in range(len(prompts))]

    return run


def batched(model: LlamaForCausalLM) -> Engine:
    """transformers' continuous batching; its cache has room for `size` requests (its own choice is most of the memory)."""

    def run(prompts: list[Tensor], size: int, new: int, bar: tqdm) -> Texts:
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=ENDS, pad_token_id=0)
        pages = size * math.ceil((LENGTHS[1] + NEW) / PAGE)
        room = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=2048, max_requests_per_batch=size)
        found = model.generate_batch([p.tolist() for p in prompts], generation_config=config, continuous_batching_config=room)
        if len(found) < len(prompts):
            raise RuntimeError(f"{len(found)} of {len(prompts)} requests came back")
        bar.update(len(prompts))
        return [request.generated_tokens for request in found.values()]

    return run


def spread(prompts: list[Tensor], size: int) -> list[Tensor]:
    """About a quarter of the prompts: every fourth of the batches that they make in the order of their length."""
    ordered = sorted(prompts, key=len, reverse=True)
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [prompt for batch in batches[(min(len(batches), 4) - 1) // 2 :: 4] for prompt in batch]


def run(options: argparse.Namespace) -> dict[str, Any]:
    prompts = workload(options.prompts)
    quarter = prompts[: max(1, len(prompts) // 4)]
    peer = models.llama(VOCAB, options.depth)
    engines = {OURS: ours(AutoregressiveWrapper(models.ours_of(peer))), PADDED: padded(peer, True), MIXED: padded(peer, False),
               BATCHED: batched(peer)}
    trials: list[dict[str, Any]] = []

    def measure(who: str, some: list[Tensor], size: int, new: int) -> tuple[Texts, float]:
        with tqdm(total=len(some), desc=f"{who}, {size} rows", unit="prompt", leave=False) as bar:
            started = time.perf_counter()
            found = engines[who](some, size, new, bar)
            return found, len(some) / (time.perf_counter() - started)

    def tried(who: str, size: int) -> None:
        some = spread(prompts, size) if who == PADDED else quarter
        trials.append({"engine": who, "size": size, "per_s": measure(who, some, size, TRIED)[1]})

    def best(*whose: str) -> dict[str, Any]:
        return max((trial for trial in trials if trial["engine"] in whose), key=lambda trial: trial["per_s"])

    for who, sizes in SIZES.items():
        for size in sizes:
            tried(who, size)
    tried(MIXED, best(PADDED)["size"])
    failed = None
    try:
        for size in BATCHED_SIZES:
            tried(BATCHED, size)
    except Exception as error:  # made for GPUs and still young: why it fails is a result
        failed = f"{type(error).__name__}: {error}"

    rows = []
    final = [(best(OURS), prompts), (best(PADDED, MIXED), prompts), *([] if failed else [(best(BATCHED), quarter)])]
    for choice, some in final:
        found, rate = measure(choice["engine"], some, choice["size"], NEW)
        row = {"engine": choice["engine"], "size": choice["size"], "prompts": len(some), "per_s": rate}
        if not rows:
            ours_found, ours_rate = found, rate
        else:
            row |= {"ratio": ours_rate / rate, "asked": None if choice["engine"] == BATCHED else ASKED,
                    "equal": sum(a == b for a, b in zip(found, ours_found, strict=False))}
            if row["equal"] < EQUAL * len(some):
                raise SystemExit(f"{row['engine']}: only {row['equal']} of {len(some)} texts are xalign's")
        rows.append(row)
    lengths = sorted(len(text) for text in ours_found)
    return {"rows": rows, "trials": trials, "failed": failed, "asked_prompts": 1000, "texts": {
        "mean": sum(lengths) / len(lengths), "10%": lengths[len(lengths) // 10], "median": lengths[len(lengths) // 2],
        "90%": lengths[-1 - len(lengths) // 10]}}


def show(section: dict[str, Any]) -> None:
    rows, text = section["rows"], section["texts"]
    table(["engine", "rows at once", "prompts", "prompts/s", "xalign / this", "texts equal to xalign's"],
          [[r["engine"], r["size"], r["prompts"], f"{r['per_s']:.2f}",
            judged(r["ratio"], r["asked"], "{:.2f}x") if "ratio" in r else "", r.get("equal", "")] for r in rows])
    if section["failed"]:
        print(f"\n{BATCHED} fails: {section['failed']}")
    if rows[0]["prompts"] < section["asked_prompts"]:
        print(f"\nTHESE ARE {rows[0]['prompts']} PROMPTS, not the {section['asked_prompts']} that are asked for.")
    print(f"\nPrompts of {LENGTHS[0]} to {LENGTHS[1]} tokens, log-uniform; V = 32k, fp32, greedy. {len(ENDS)} tokens end a "
          f"text: {text['mean']:.0f} tokens on average (median {text['median']}, most {text['10%']} to {text['90%']}), at most "
          f"{NEW}.")
    print(f"The rows at once were chosen on a quarter of the prompts with at most {TRIED} new tokens, prompts/s: "
          + "; ".join(f"{r['engine']}, {r['size']} rows: {r['per_s']:.1f}" for r in section["trials"]) + ".")
