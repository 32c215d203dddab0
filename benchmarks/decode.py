#!/usr/bin/env python3
"""`make bench-decode`: decoding against transformers and against the bandwidth bound, as ratios within this process.

Protocol: same weights, greedy tokens equal first, runs in turns, medians; a step's time is the difference of two lengths, so
that the prompt's pass cancels. A ratio above 1 says how many times faster xalign is; R is bound / step, where the bound reads
all weights but the embedding once at the bandwidth of a sum over 256 MB.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import RESULTS, interleaved, pair
from tqdm import tqdm
from transformers import LlamaForCausalLM

from xalign import AutoregressiveWrapper

PROMPT = 32
FULL = {"top_k": 50, "top_p": 0.9, "min_p": 0.05, "seed": 0}
PURE = {"top_p": 0.9, "seed": 0}


def bandwidth() -> float:
    """Bytes a second that a sum over 256 MB reads."""
    weight = torch.randn(16384, 4096)
    return weight.nbytes / min(timed(weight.sum) for _ in range(10))


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def steps(runs: dict[str, Callable[[int], object]], short: int, long: int, repeats: int) -> dict[str, float]:
    """Median milliseconds a step of each, taken in turns: the long run less the short one."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in tqdm(range(repeats + 1), desc=" against ".join(runs), leave=False):
        for name, run in runs.items():
            seconds = timed(lambda run=run: run(long)) - timed(lambda run=run: run(short))
            if repeat:
                values[name].append(1e3 * seconds / (long - short))
    return {name: statistics.median(v) for name, v in values.items()}


def ours(wrapper: AutoregressiveWrapper, prompt: torch.Tensor, **options: object) -> Callable[[int], torch.Tensor]:
    return lambda n: wrapper.generate(prompt, n, **(options or {"temperature": 0.0}))


def theirs(model: LlamaForCausalLM, prompt: torch.Tensor, **options: object) -> Callable[[int], torch.Tensor]:
    return lambda n: model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n,
                                    pad_token_id=0, **({"do_sample": False} | options))[:, prompt.shape[1]:]


def rows_of(vocab: int, short: int, long: int, repeats: int) -> list[dict]:
    """Greedy in fp32 and bf16, and what the sampler adds, at B = 1 and 8."""
    net, peer = pair(12, vocab)
    wrapper, half = AutoregressiveWrapper(net), AutoregressiveWrapper(copy.deepcopy(net).bfloat16())
    peer_half = copy.deepcopy(peer).bfloat16()
    sharp = copy.deepcopy(net)
    with torch.no_grad():  # random weights leave a nucleus of most of the vocabulary; language models' hold 10 to 300 tokens
        sharp.to_logits.weight.mul_(10.0)
    sharp = AutoregressiveWrapper(sharp)
    weights = sum(p.nbytes for name, p in net.named_parameters() if name != "token_emb.weight")
    found = []
    for b in (1, 8):
        prompt = torch.randint(vocab, (b, PROMPT))
        assert torch.equal(ours(wrapper, prompt)(long), theirs(peer, prompt)(long)), "greedy tokens differ"
        bound = 1e3 * weights / bandwidth()
        ms = steps({"xalign": ours(wrapper, prompt), "transformers": theirs(peer, prompt), "xalign bf16": ours(half, prompt),
                    "transformers bf16": theirs(peer_half, prompt)}, short, long, repeats)
        what = f"12 x 512, V = {vocab}, B = {b}"
        found += [{"what": f"greedy step, {what}", "ms": ms["xalign"], "peer": ms["transformers"], "R": bound / ms["xalign"]},
                  {"what": f"greedy step, bf16 against their fp32, {what}", "ms": ms["xalign bf16"], "peer": ms["transformers"],
                   "R": bound / 2 / ms["xalign bf16"]},
                  {"what": f"greedy step, bf16 against their bf16, {what}", "ms": ms["xalign bf16"],
                   "peer": ms["transformers bf16"]}]
        ms = steps({"greedy": ours(sharp, prompt), "full": ours(sharp, prompt, **FULL), "pure": ours(sharp, prompt, **PURE),
                    "flat": ours(wrapper, prompt, **PURE)}, short, long, repeats)
        samplers = {"full": "top-k 50, top-p .9, min-p .05", "pure": "top-p .9", "flat": "top-p .9 of a flat head"}
        found += [{"what": f"{name}, tax over greedy, {what}", "ms": ms[key], "tax": ms[key] / ms["greedy"] - 1}
                  for key, name in samplers.items()]
    return found


def shared(repeats: int) -> list[dict]:
    """What several rows of one prompt cost."""
    net, peer = pair(12, 32_000)
    wrapper = AutoregressiveWrapper(net)
    prompt = torch.randint(32_000, (1, 512))
    four = prompt.expand(4, -1).contiguous()
    ms = steps({"beams": lambda n: wrapper.beam_search(prompt, n, beams=4), "greedy": ours(wrapper, four)}, 8, 40, repeats)
    found = [{"what": "beam 4 over a greedy batch of 4, prompt 512, tax", "ms": ms["beams"],
              "tax": ms["beams"] / ms["greedy"] - 1}]
    prompt = torch.randint(32_000, (1, 1024))
    seconds = interleaved({
        "xalign": lambda: wrapper.generate(prompt, 64, num_samples=8, **FULL),
        "transformers": lambda: theirs(peer, prompt, do_sample=True, num_return_sequences=8, top_k=50, top_p=0.9,
                                       min_p=0.05)(64),
    }, repeats)
    return [*found, {"what": "8 samples of 64 tokens, prompt 1024, whole call", "ms": 1e3 * seconds["xalign"],
                     "peer": 1e3 * seconds["transformers"]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = bandwidth()
    rows = [row for v in options.vocabularies for row in rows_of(v, 16, 64, options.repeats)] + shared(options.repeats)
    print("| what | xalign, ms | transformers, ms | ratio | R | tax |\n|---|---|---|---|---|---|")
    for row in rows:
        ratio = f"{row['peer'] / row['ms']:.2f}" if "peer" in row else ""
        print(f"| {row['what']} | {row['ms']:.1f} | {row.get('peer', float('nan')):.1f} | {ratio} | "
              f"{row.get('R', float('nan')):.2f} | {row.get('tax', float('nan')):.1%} |".replace("nan%", "").replace("nan", ""))
    about = {"torch": torch.__version__, "threads": options.threads, "processor": platform.processor() or platform.machine(),
             "bandwidth_gb_s": [round(b / 1e9, 1) for b in (before, bandwidth())]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decode.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    print(f"bandwidth before and after: {about['bandwidth_gb_s']} GB/s; written to {Path('benchmarks/results/decode.json')}")


if __name__ == "__main__":
    main()
