#!/usr/bin/env python3
"""`make bench-train`: whole optimizer steps of DPO against a plain loop, x-transformers and TRL, as ratios within this process.

Protocol: the same weights, reference and batches everywhere, and at every step the same loss and gradient norm; steps (forward,
backward, clipping, AdamW) in turns, medians of the rounds (a ratio's is that of the rounds' ratios); the machine's ceilings
before and after each section, which is marked where they moved. A ratio above 1 says how many times faster xalign is. U is
3 F_shared / (peak * step): three times the products of a forward pass that runs each prompt once, at the peak of that dtype,
the fastest product at the model's shapes that torch or oneDNN reach. The reference's log-probabilities are known before, but
to the plain loop and to x-transformers; "in the step" is what they cost when spread over one epoch. Results of sections that
are not run are kept, with their dates, as long as machine and versions are the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import clock
import models
import torch
import train_models
import train_picture
from decode import ceilings_of, machine, revision
from report import judged, table, thousands
from tqdm import tqdm
from train_models import COMPACT, ONLINE, OURS, PAIRS, PLAIN, TRL, XT, Case, Models, Step
from transformers.utils import logging

from xalign.nn.products import linear

RESULTS = Path(__file__).parent / "results"
SHAPES = [(256, 64), (64, 192)]  # tokens of prompt and of each completion
# how many times faster than each xalign is asked to be
ASKED: dict[str, dict[str, float]] = {
    "256, 64": {PLAIN: 3.4, TRL: 4.3}, "64, 192": {PLAIN: 1.5, TRL: 2.2}, "HH lengths": {TRL: 2.0}}
ASKED_BF16 = 1.8  # than xalign in fp32
ASKED_MEMORY = {PLAIN: 0.5, TRL: 0.25}
LOSS, NORM = 1e-4, 1e-3  # by which a loss may differ, nats, and a gradient norm, of its size
LOSS_BF16, NORM_BF16 = 0.1, 0.1  # sums of 64 to 192 rounded terms; some peers round logits as well
Row = dict[str, Any]


def ceilings(options: argparse.Namespace) -> dict[str, float]:
    """GB/s that a sum reads; GFLOP/s of the fastest product of the model's shapes, by torch.mm and as xalign's layers do it."""
    numbers, d, inner = torch.randn(clock.NUMBERS["cpu"]), 512, 1376
    found = {"read, GB/s": numbers.nbytes / clock.fastest(numbers.sum, 60) / 1e9}
    shapes = [(2048, d, d), (2048, d, inner), (2048, inner, d), (1024, d, options.vocab)]
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for who, product in (("mm", lambda x, w: torch.mm(x, w.T)), ("linear", linear)):
            rates = []
            for rows, i, o in shapes:
                x, w = torch.randn(rows, i).to(dtype), torch.randn(o, i).to(dtype)
                seconds = clock.fastest(lambda x=x, w=w, product=product: product(x, w), 5 if o > inner else 25)
                rates.append(2 * rows * i * o / seconds / 1e9)
            found[f"{who} {name}, GFLOP/s"] = max(rates)
    return found


def add_bounds(rows: list[Row], *found: dict[str, float]) -> None:
    """U of each row, by the highest of the ceilings in its dtype."""
    for row in rows:
        dtype = "bf16" if "bf16" in row["engine"] else "fp32"
        row["U"] = row["rate"] / (1e9 * max(value for one in found for name, value in one.items() if dtype in name))


def check(name: str, got: tuple[float, float], expected: tuple[float, float], loss: float, norm: float) -> None:
    """Raises `SystemExit` where a loss or a gradient norm is another than it should be."""
    if not (abs(got[0] - expected[0]) <= loss and abs(got[1] / expected[1] - 1) <= norm):
        raise SystemExit(f"{name}: loss {got[0]:.6f} and gradient norm {got[1]:.6f}, expected were {expected[0]:.6f} and "
                         f"{expected[1]:.6f}")


def turns(steps: dict[str, Step], cases: list[Case], options: argparse.Namespace, title: str) -> tuple[clock.Times, Row]:
    """Milliseconds a step, one case a round, and the last round's loss and norm; a round before of one small pair, in which
    optimizers make their state, is for parity alone.

    The first of `steps` is what the others are held against; names with "bf16" may differ from it by rounding.
    """
    times, said = clock.Times((name, []) for name in steps), {}
    small = [cases[0].first()]
    bar = tqdm(total=(1 + options.repeats) * len(steps), desc=title, leave=False)
    for number, one in enumerate(small + [cases[i % len(cases)] for i in range(options.repeats)]):
        expected: tuple[float, float] | None = None
        for name, step in steps.items():
            bar.set_postfix_str(name)
            started = time.perf_counter()
            got = step(one)
            if number:
                times[name].append(1e3 * (time.perf_counter() - started))
            expected = expected or got
            check(f"{title}, {name}", got, expected, *((LOSS_BF16, NORM_BF16) if "bf16" in name else (LOSS, NORM)))
            said[name] = {"loss": got[0], "norm": got[1]}
            bar.update()
    bar.close()
    return times, said


def rows_of(title: str, steps: dict[str, Step], cases: list[Case], made: Models, options: argparse.Namespace,
            reference: str = OURS) -> list[Row]:
    """Of each engine: seconds, pairs a second, how many times faster `reference` is, and what U is made of."""
    times, said = turns(steps, cases, options, title)
    flops = [train_models.least_flops(made.policy.config, [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in
                                              cases[i % len(cases)].pairs]) for i in range(options.repeats)]
    asked = ASKED.get(title, {})
    return [{"case": title, "engine": name, "against": reference, "s": times.median(name) / 1e3,
             "pairs_per_s": 1e3 * PAIRS / times.median(name), "ratio": times.ratio(name, reference),
             "quartiles": times.quartiles(name, reference), "whole": sum(times[name]) / sum(times[reference]),
             "asked": asked.get(name), **said[name],
             "rate": statistics.median(3e3 * f / t for f, t in zip(flops, times[name], strict=True))} for name in steps]


def fixed(prompt: int, completion: int, made: Models) -> list[Case]:
    return [train_models.case(train_models.drawn([(prompt, completion, completion)] * PAIRS, made.vocab), made.reference)]


def peers(made: Models, prompt: int, completion: int, options: argparse.Namespace) -> dict[str, Any]:
    ours, trl = made.xalign(), made.trl()
    steps = {PLAIN: made.plain(), XT: made.x_transformers(), TRL: trl.step(), COMPACT: trl.step(compact=True),
             OURS: ours.step(), ONLINE: ours.step(known=False)}
    return {"rows": rows_of(f"{prompt}, {completion}", steps, fixed(prompt, completion, made), made, options)}


def hh(made: Models, options: argparse.Namespace) -> dict[str, Any]:
    if not train_models.HH.exists():
        return {"rows": [], "failed": f"no {train_models.HH}: not run"}
    lengths = train_models.real_lengths(options.repeats)
    cases = [train_models.case(train_models.drawn(row, made.vocab), made.reference) for row in lengths]
    ours, trl = made.xalign(), made.trl()
    steps = {PLAIN: made.plain(), TRL: trl.step(), COMPACT: trl.step(compact=True), OURS: ours.step(),
             ONLINE: ours.step(known=False)}
    means = [statistics.mean(some) for some in zip(*(one for row in lengths for one in row), strict=True)]
    return {"rows": rows_of("HH lengths", steps, cases, made, options),
            "lengths": dict(zip(("prompt", "chosen", "rejected"), means, strict=True))}


def halves(made: Models, options: argparse.Namespace) -> dict[str, Any]:
    ours, trl, rows = made.xalign(), made.trl(), []
    steps = {OURS: ours.step(), "xalign bf16": ours.step(bf16=True), "plain bf16": made.plain(bf16=True),
             "TRL bf16": trl.step(bf16=True), "TRL bf16, head compacted": trl.step(bf16=True, compact=True)}
    for prompt, completion in options.shapes:
        found = rows_of(f"{prompt}, {completion}, bf16", steps, fixed(prompt, completion, made), made, options, "xalign bf16")
        found[0]["asked"] = ASKED_BF16
        rows += found
    return {"rows": rows}


def economies(made: Models, options: argparse.Namespace) -> dict[str, Any]:
    ours, rows = made.xalign(), []
    steps = {
        OURS: ours.step(), "prompts not shared": ours.step(share_prefix=False),
        "prompts not shared, padded, all logits": ours.step(packed=False), "reference in the step": ours.step(known=False),
        "products by MKL": ours.step(onednn=False),
        "none of them": ours.step(known=False, share_prefix=False, packed=False, onednn=False)}
    for prompt, completion in options.shapes:
        rows += rows_of(f"{prompt}, {completion}, economies", steps, fixed(prompt, completion, made), made, options)
    return {"rows": rows}


def memory(made: Models, options: argparse.Namespace) -> dict[str, Any]:
    """The most that a step takes, in processes of their own."""
    def taken(engine: str, vocab: int) -> int:
        words = [engine, *(str(n) for n in (vocab, options.depth, *options.shapes[0], options.threads))]
        done = subprocess.run([sys.executable, "-c", "import sys, train_models; train_models.peak(*sys.argv[1:])", *words],
                              cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the memory of {engine}, V = {vocab}: {done.stderr[-2000:]}")
        return int(done.stdout.split()[-1])

    rows = []
    for vocab, peer in zip(options.vocabularies, (PLAIN, TRL), strict=True):
        ours, theirs = taken(OURS, vocab), taken(peer, vocab)
        state = 16 * sum(p.numel() for p in models.llama(vocab, options.depth, device="meta").parameters())
        rows += [{"v": vocab, "engine": OURS, "bytes": ours, "state": state},
                 {"v": vocab, "engine": peer, "bytes": theirs, "state": state, "share": ours / theirs, "floor": state / theirs,
                  "beside": (ours - state) / (theirs - state),
                  "asked": ASKED_MEMORY[peer]}]
    return {"rows": rows}


def show(section: dict[str, Any]) -> None:
    if section.get("failed"):
        print(section["failed"])
        return
    table(["P, C", "step", "s", "pairs/s", f"this / {section['rows'][0]['against']}", "quartiles", "of all rounds", "U", "loss",
           "gradient norm"],
          [[r["case"], r["engine"], f"{r['s']:.2f}", f"{r['pairs_per_s']:.2f}", judged(r["ratio"], r["asked"], "{:.2f}x"),
            "{:.2f} to {:.2f}".format(*r["quartiles"]), f"{r['whole']:.2f}x", f"{r['U']:.0%}", f"{r['loss']:.5f}",
            f"{r['norm']:.4f}"] for r in section["rows"]])
    faster = section["after"]["linear fp32, GFLOP/s"] / section["after"]["mm fp32, GFLOP/s"]
    print(f"\nxalign's fp32 products are oneDNN's, {faster:.1f}x as fast as torch.mm's, which are MKL's; U is of the faster.")
    if "lengths" in section:
        print("\nSteps of our schedule over HH, 4 characters a token; mean lengths: "
              + ", ".join(f"{name} {value:.0f}" for name, value in section["lengths"].items()) + ".")


def show_memory(section: dict[str, Any]) -> None:
    table(["V", "step", "GB above its libraries", "of it state", "xalign / this", "its floor", "both without them"],
          [[thousands(r["v"]), r["engine"], f"{r['bytes'] / 1e9:.2f}", f"{r['state'] / 1e9:.2f}",
            *([judged(r["share"], r["asked"], "{:.2f}", at_least=False), f"{r['floor']:.2f}", f"{r['beside']:.2f}"]
              if "share" in r else [""] * 3)]
           for r in section["rows"]])


SECTIONS: dict[str, tuple[Callable[[Models, argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "long-prompts": (lambda made, o: peers(made, *o.shapes[0], o), show),
    "long-completions": (lambda made, o: peers(made, *o.shapes[1], o), show),
    "hh": (hh, show), "bf16": (halves, show), "economies": (economies, show), "memory": (memory, show_memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="the sections to run; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median is taken")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--vocabularies", type=int, nargs=2, default=[32_000, 128_000], metavar="V",
                        help="of the comparison of memory with the plain loop, and of that with TRL")
    parser.add_argument("--depth", type=int, default=4, help="layers, of width 512")
    parser.add_argument("--shapes", type=lambda text: tuple(int(n) for n in text.split(",")), nargs=2, default=SHAPES,
                        metavar="P,C", help="tokens of prompt and completion; the first has long prompts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where train.json and train.png are written")
    options = parser.parse_args()
    options.device = "cpu"
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    path, about = options.results / "train.json", {**machine(options), "trl": version("trl"), "vocab": options.vocab}
    kept = json.loads(path.read_text()) if path.exists() else {}
    results = kept["sections"] if kept.get("machine") == about else {}
    chosen = options.only or list(SECTIONS)
    for name in chosen:
        run, shown = SECTIONS[name]
        made = Models(options.vocab, options.depth)
        started, before = time.time(), ceilings(options)
        found = run(made, options)
        after = ceilings(options)
        if name != "memory":
            add_bounds(found["rows"], before, after)
        results[name] = {
            "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)), "revision": revision(),
            "minutes": round((time.time() - started) / 60, 1), "repeats": options.repeats, "before": before, "after": after,
            "drift": clock.drift(before, after), **found}
        print(f"\n## {name}\n")
        shown(results[name])
        print(f"\nCeilings, before and after: {ceilings_of(results[name])}", flush=True)
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, "sections": results}, indent=2) + "\n")
        train_picture.draw(path)
    print(f"\nWritten to {path} and {path.with_suffix('.png')}.")
    for name in results.keys() - set(chosen):
        print(f"In them, {name} is of an earlier run: {results[name]['when']}, revision {results[name]['revision']}.")


if __name__ == "__main__":
    main()
