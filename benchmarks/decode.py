#!/usr/bin/env python3
"""`make bench-decode`: decoding against transformers, x-transformers and the bandwidth bound, as ratios within this process.

Protocol: the same random weights everywhere; first the same tokens, then times; runs in turns, medians of the rounds (a
ratio's is that of the rounds' ratios); a step's time is the difference of two lengths, so that the prompt's pass cancels; the
machine's ceilings before and after each section, which is marked where they moved. A ratio above 1 says how many times faster
xalign is. R is bound / step; the bound reads every weight but the embedding's, and the keys and values, once, at the bandwidth
of that round. A tax is what a step takes more than the same engine's greedy one. Results of sections that are not run are
kept, with their dates, as long as machine and versions are the same. `--device cuda` runs the table of a GPU instead (gpu.py).
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import clock
import gpu
import latency
import picture
import throughput
import torch
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results"
SECTIONS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "greedy": (latency.greedy, latency.show_greedy), "sampler": (latency.sampler, latency.show_sampler),
    "beams": (latency.beams, latency.show_beams), "throughput": (throughput.run, throughput.show)}


def machine(options: argparse.Namespace) -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {"processor": torch.cuda.get_device_name() if options.device == "cuda" else names[0], "threads": options.threads,
            "depth": options.depth, **{name: version(name) for name in ("torch", "transformers", "x-transformers")}}


def revision() -> str:
    """Of the working tree, with a + where it has been changed since."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def ceilings_of(section: dict[str, Any]) -> str:
    each = "; ".join(f"{name}: {section['before'][name]:.0f}, {section['after'][name]:.0f}" for name in section["before"])
    moved = section["drift"]
    return f"{each}. They moved by {moved:.0%}" + (": MORE THAN 10 %, TO BE RUN AGAIN." if moved > clock.DRIFT else ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="the sections to run; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median is taken")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000], metavar="V")
    parser.add_argument("--depth", type=int, default=12, help="layers, of width 512")
    parser.add_argument("--lengths", type=int, nargs=2, default=[8, 48], help="new tokens of the short run and of the long one")
    parser.add_argument("--prompts", type=int, default=1000, help="prompts of the throughput section")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where decode.json and decode.png are written")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=gpu.SHAPES, default=["1b"], help="models of the GPU's table")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 184], help="batch sizes of the GPU's table")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    sections = SECTIONS
    if options.device == "cuda":
        sections = {shape: (lambda o, s=shape: gpu.run(o, s), gpu.show) for shape in options.shapes}  # type: ignore[misc]
    path, about = options.results / ("decode.json" if options.device == "cpu" else "decode-cuda.json"), machine(options)
    kept = json.loads(path.read_text()) if path.exists() else {}
    results = kept["sections"] if kept.get("machine") == about else {}
    chosen = sections if options.only is None or options.device == "cuda" else options.only
    for name in chosen:
        run, show = sections[name]
        torch.manual_seed(0)
        started, before = time.time(), clock.ceilings(options.device)
        found = run(options)
        after = clock.ceilings(options.device)
        results[name] = {
            "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)), "revision": revision(),
            "minutes": round((time.time() - started) / 60, 1), "repeats": options.repeats, "lengths": options.lengths,
            "before": before, "after": after, "drift": clock.drift(before, after), **found}
        print(f"\n## {name}\n")
        show(results[name])
        print(f"\nCeilings, before and after: {ceilings_of(results[name])}", flush=True)
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, "sections": results}, indent=2) + "\n")
    if options.device == "cpu":
        picture.draw(path)
    print(f"\nWritten to {path}" + f" and {path.with_suffix('.png')}." * (options.device == "cpu"))
    for name in results.keys() - set(chosen):
        print(f"In them, {name} is of an earlier run: {results[name]['when']}, revision {results[name]['revision']}.")


if __name__ == "__main__":
    main()
