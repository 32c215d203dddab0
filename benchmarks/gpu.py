"""The table of a GPU: random bf16 models of usual shapes, against transformers with a static cache and torch.compile.

Parity first, on two fp32 layers of the same shape. The engine's default is used, a CUDA graph of the whole step.
"""

import argparse
from typing import Any

import clock
import models
import torch
from latency import WRITTEN, check_equal
from report import parity, table

from xalign import AutoregressiveWrapper

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"vocab": 128_256, "depth": 16, "dim": 2048, "inner": 8192, "heads": 32, "kv_heads": 8, "tied": True},
    "7b": {"vocab": 32_000, "depth": 32, "dim": 4096, "inner": 11008, "heads": 32}}
PROMPT, LENGTHS, BEAM_PROMPT = 128, (16, 80), 512
STATIC = {"cache_implementation": "static"}  # on a GPU transformers then compiles its step


def same_tokens(shape: dict[str, Any], device: str) -> dict[str, str]:
    peer = models.llama(**shape | {"depth": 2}, device=device)
    net, same = models.ours_of(peer), {}
    wrapper = AutoregressiveWrapper(net)
    for b in (1, 8):
        prompt = torch.randint(shape["vocab"], (b, PROMPT), device=device)
        ours, theirs = models.xalign(wrapper, prompt)(WRITTEN), models.transformers(peer, prompt)(WRITTEN)
        same[f"2 layers in fp32, B = {b}"] = check_equal(net, prompt, ours, theirs, "transformers")
    return same


def run(options: argparse.Namespace, name: str) -> dict[str, Any]:
    shape, device = SHAPES[name], options.device
    same = same_tokens(shape, device)
    peer = models.llama(**shape, device=device, dtype=torch.bfloat16)
    net = models.ours_of(peer)
    wrapper, rows = AutoregressiveWrapper(net), []
    for b in options.batches:
        prompt = torch.randint(shape["vocab"], (b, PROMPT), device=device)
        runs = {"greedy": models.xalign(wrapper, prompt), "full": models.xalign(wrapper, prompt, "full"),
                "theirs": models.transformers(peer, prompt, **STATIC),
                "theirs, full": models.transformers(peer, prompt, "full", **STATIC)}
        failed = None
        try:
            runs["theirs"](LENGTHS[1])  # compiles
        except Exception as error:  # a GPU's compiler may be missing or out of memory: that is told, ours is measured
            failed = f"{type(error).__name__}: {str(error)[:200]}"
            runs = {who: each for who, each in runs.items() if not who.startswith("theirs")}
        times = clock.steps(runs, LENGTHS, options.repeats, f"{name}, B = {b}", device)
        least = clock.least_bytes(net, b, PROMPT + sum(LENGTHS) / 2) / 1e9
        row = {"b": b, "ms": times.median("greedy"), "per_s": 1e3 * b / times.median("greedy"),
               "full_per_s": 1e3 * b / times.median("full"), "tax": times.ratio("full", "greedy") - 1, "failed": failed,
               "bound_ms": least * times.median(clock.READ), "R": least * times.ratio(clock.READ, "greedy")}
        if failed is None:
            row |= {"theirs_ms": times.median("theirs"), "ratio": times.ratio("theirs", "greedy"),
                    "full_ratio": times.ratio("theirs, full", "full"),
                    "theirs_tax": times.ratio("theirs, full", "theirs") - 1}
        rows.append(row)
    prompt = torch.randint(shape["vocab"], (4, BEAM_PROMPT), device=device)
    runs = {"beams": lambda n: wrapper.beam_search(prompt[:1], n, beams=4), "greedy": models.xalign(wrapper, prompt)}
    times = clock.steps(runs, LENGTHS, options.repeats, f"{name}, beams")
    return {"rows": rows, "parity": same, "beams": {
        "ms": times.median("beams"), "greedy_ms": times.median("greedy"), "tax": times.ratio("beams", "greedy") - 1}}


def show(section: dict[str, Any]) -> None:
    def shown(row: dict[str, Any], key: str, form: str) -> str:
        return form.format(row[key]) if key in row else ""

    table(["B", "greedy, ms/step", "tokens/s", "bound, ms", "R", "full sampler, tokens/s", "tax", "transformers, ms/step",
           "ratio, greedy", "ratio, full sampler", "transformers' tax"],
          [[r["b"], f"{r['ms']:.2f}", f"{r['per_s']:.0f}", f"{r['bound_ms']:.2f}", f"{r['R']:.2f}", f"{r['full_per_s']:.0f}",
            f"{r['tax']:.1%}", shown(r, "theirs_ms", "{:.2f}"), shown(r, "ratio", "{:.2f}x"), shown(r, "full_ratio", "{:.2f}x"),
            shown(r, "theirs_tax", "{:.1%}")] for r in section["rows"]])
    for row in section["rows"]:
        if row["failed"]:
            print(f"\ntransformers' compiled step at B = {row['b']} fails: {row['failed']}")
    beams = section["beams"]
    print(f"\n4 beams of a prompt of {BEAM_PROMPT} tokens: {beams['ms']:.2f} ms/step, tax over a greedy batch of 4 "
          f"{beams['tax']:.1%}.")
    parity(section["parity"])
