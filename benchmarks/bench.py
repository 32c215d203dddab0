#!/usr/bin/env python3
"""`make bench`: preference training against peers, as ratios within this process.

Protocol: same weights, parity first, runs interleaved, medians; a figure above 1 says how many times faster xalign is.
Shapes are Llama's, fp32. This is a first, small table: the full protocol comes with `bench-train`; `make bench-decode` is the
one of decoding.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from xalign import DPO, TransformerWrapper, hf
from xalign.logprobs import sequence_logprobs

RESULTS = Path(__file__).parent / "results"


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, taken in turns after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in tqdm(range(repeats + 1), desc=" against ".join(runs), leave=False):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def pair(depth: int, vocab: int) -> tuple[TransformerWrapper, LlamaForCausalLM]:
    """A random transformers Llama, width 512, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=512, num_hidden_layers=depth, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1376,
        vocab_size=vocab, max_position_embeddings=2048, tie_word_embeddings=False)).eval()
    ours, layout = hf.from_hf(theirs.config.to_dict(), "bench")
    tensors = theirs.state_dict()
    ours.load_state_dict({e.ours[0]: tensors[e.file] for e in layout.entries})
    return ours.eval(), theirs


def preference(depth: int, vocab: int, prompt: int, completion: int, pairs: int, repeats: int) -> dict:
    """Seconds of loss and gradient with the reference pass, against a plain four-forward step in transformers."""
    ours, theirs = pair(depth, vocab)
    dpo, reference = DPO(ours), LlamaForCausalLM(theirs.config).eval().requires_grad_(False)
    reference.load_state_dict(theirs.state_dict())
    sides = [torch.randint(vocab, (pairs, prompt + completion)) for _ in range(2)]
    sides[1][:, :prompt] = sides[0][:, :prompt]
    mask = torch.ones(pairs, prompt, dtype=torch.bool)
    scored = torch.arange(prompt + completion).expand(pairs, -1) >= prompt

    def us() -> torch.Tensor:
        dpo.zero_grad()
        loss = dpo(*sides, prompt_mask=mask)
        loss.backward()
        return loss.detach()

    def plain() -> torch.Tensor:
        theirs.zero_grad()
        policy = [sequence_logprobs(lambda t: theirs(t).logits, s, scored) for s in sides]  # type: ignore[arg-type]
        with torch.no_grad():
            known = [sequence_logprobs(lambda t: reference(t).logits, s, scored) for s in sides]  # type: ignore[arg-type]
        loss = -torch.nn.functional.logsigmoid(0.1 * (policy[0] - known[0] - policy[1] + known[1])).mean()
        loss.backward()
        return loss.detach()

    assert torch.allclose(us(), plain(), atol=1e-4), "losses differ"
    seconds = interleaved({"xalign": us, "plain transformers": plain}, repeats)
    return {"what": f"preference step, {depth} x 512, V = {vocab}, P, C = {prompt}, {completion}, {pairs} pairs",
            "ms": {k: 1e3 * v for k, v in seconds.items()}, "ratio": seconds["plain transformers"] / seconds["xalign"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [preference(4, 32_000, p, c, 8, options.repeats) for p, c in ((256, 64), (64, 192))]
    print("| what | xalign, ms | peer, ms | ratio |\n|---|---|---|---|")
    for row in rows:
        ours, peer = row["ms"].values()
        print(f"| {row['what']} | {ours:.1f} | {peer:.1f} | {row['ratio']:.2f} |")
    RESULTS.mkdir(exist_ok=True)
    about = {"torch": torch.__version__, "threads": options.threads, "processor": platform.processor() or platform.machine()}
    (RESULTS / "bench.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
