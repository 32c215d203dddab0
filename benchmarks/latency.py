"""The time of a step: greedy in each number format, with samplers, and for several rows of one prompt."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import clock
import models
import torch
from models import FORMATS, SAMPLERS
from report import judged, parity, table, thousands
from torch import Tensor

from xalign import AutoregressiveWrapper, TransformerWrapper, sampling

PROMPT, ROWS, WRITTEN = 32, (1, 8), 128  # tokens of a prompt, rows of a batch, greedy tokens that must be equal
TRANSFORMERS, HALF, X_TRANSFORMERS = "transformers fp32", "transformers bf16", "x-transformers fp32"
# what is asked for: ratios against both peers' fp32, by number format and rows; against transformers' bf16; taxes; samples
ASKED = {("fp32", 1): 1.5, ("fp32", 8): 1.3, ("bf16", 1): 2.5, ("bf16", 8): 3.0, ("int8", 1): 4.0}
ASKED_BF16, ASKED_BEAMS, ASKED_SAMPLES = 1.5, 0.15, 3.0
NUCLEUS = (10, 90, 300)  # tokens of a language model's .9-nucleus: at least, typically, at most
NEAR = 1e-4  # logits closer than this may change places by rounding


def asked_tax(vocab: int) -> float:
    return 0.05 if vocab <= 32_000 else 0.1


@torch.no_grad()
def check_equal(net: TransformerWrapper, prompt: Tensor, ours: Tensor, theirs: Tensor, who: str) -> str:
    """Say that tokens (b, n) are equal, or end here; where two logits are as good as equal, a row need not go on alike."""
    same = (ours == theirs).long().cumprod(1).sum(1).tolist()
    forks = [(row, t) for row, t in enumerate(same) if t < ours.shape[1]]
    for row, t in forks:
        logits = net(torch.cat((prompt[row], ours[row, :t]))[None])[0, -1]
        gap = float((logits[ours[row, t]] - logits[theirs[row, t]]).abs())
        if gap > NEAR:
            raise SystemExit(f"{who}: tokens differ in row {row} at step {t}, where their logits are {gap:.2g} apart")
    return f"{sum(same)} tokens" + "".join(f" (row {r} forks at step {t}, where two logits are equal)" for r, t in forks)


@torch.no_grad()
def error(net: TransformerWrapper, exact: TransformerWrapper, tokens: Tensor) -> float:
    """How far the logits are off: root mean square by their own standard deviation."""
    right = exact(tokens)
    return float((net(tokens).float() - right).square().mean().sqrt() / right.std())


# ---- greedy

def greedy(options: argparse.Namespace) -> dict[str, Any]:
    rows, same = [], {}
    for vocab in options.vocabularies:
        peer = models.llama(vocab, options.depth)
        net, xt, half = models.ours_of(peer), models.x_transformers_of(peer), models.half(peer)
        wrappers = models.formats_of(net)
        for b in ROWS:
            prompt = torch.randint(vocab, (b, PROMPT))
            ours = {f"xalign {name}": models.xalign(w, prompt) for name, w in wrappers.items()}
            peers = {TRANSFORMERS: models.transformers(peer, prompt), X_TRANSFORMERS: models.x_transformers(xt, prompt),
                     HALF: models.transformers(half, prompt)}
            written, where = ours["xalign fp32"](WRITTEN), f"V = {thousands(vocab)}, B = {b}"
            for who in (TRANSFORMERS, X_TRANSFORMERS):
                same[f"{who}, {where}"] = check_equal(net, prompt, written, peers[who](WRITTEN), who)
            times = clock.steps(ours | peers, options.lengths, options.repeats, f"greedy, {where}", "cpu")
            for who in ours | peers:
                dtype = who.split()[-1]
                least = clock.least_bytes(wrappers[dtype].net, b, PROMPT + sum(options.lengths) / 2) / 1e9
                row: dict[str, Any] = {"v": vocab, "b": b, "engine": who, "ms": times.median(who),
                                       "bound_ms": least * times.median(clock.READ), "R": least * times.ratio(clock.READ, who)}
                if who in ours:
                    row["against"] = {other: {
                        "ratio": times.ratio(other, who), "quartiles": times.quartiles(other, who),
                        "asked": ASKED_BF16 if other == HALF else ASKED.get((dtype, b))}
                        for other in peers if other != HALF or dtype == "bf16"}
                    row["logits_off"] = error(wrappers[dtype].net, net, prompt)
                    row["parts_ms"] = clock.parts(ours[who], options.lengths, min(3, options.repeats), f"parts, {who}, {where}")
                    row["products_alone_ms"] = clock.products_alone(wrappers[dtype].net, b)
                rows.append(row)
    return {"rows": rows, "parity": same}


def show_greedy(section: dict[str, Any]) -> None:
    lines, where, off = [], [], {name: 0.0 for name in FORMATS}
    for row in section["rows"]:
        name = [thousands(row["v"]), row["b"], row["engine"], f"{row['ms']:.2f}"]
        against = [row.get("against", {}).get(other) for other in (TRANSFORMERS, X_TRANSFORMERS, HALF)]
        lines.append([*name, *("" if a is None else judged(a["ratio"], a["asked"], "{:.2f}x") for a in against),
                      f"{row['bound_ms']:.2f}", f"{row['R']:.2f}"])
        if "parts_ms" in row:
            parts = [f"{row['parts_ms'][part]:.2f}" for part in clock.PARTS]
            where.append([*name, *parts, f"{row['products_alone_ms']:.2f}"])
            off[row["engine"].split()[-1]] = row["logits_off"]
    against = [f"against {other}" for other in (TRANSFORMERS, X_TRANSFORMERS, HALF)]
    table(["V", "B", "engine", "ms/step", *against, "bound, ms", "R"], lines)
    print("\nWhere a step's time goes, ms. Looking at the clock takes time: the parts may come to more than the step.\n")
    table(["V", "B", "engine", "ms/step", *clock.PARTS, "all products alone"], where)
    parity(section["parity"])
    print("Logits are off by, of their standard deviation: " + ", ".join(f"{name} {x:.1%}" for name, x in off.items())
          + " (random weights make the most of each rounding).")


# ---- the sampler's tax

@torch.no_grad()
def nucleus(net: TransformerWrapper, text: Tensor, first: int, scale: float = 1.0) -> list[int]:
    """Tokens in the .9-nucleus at up to 64 positions of text (b, n) from `first` on, sorted."""
    hidden = net(text, return_embeddings=True)[:, first:].flatten(0, 1)
    hidden = hidden[torch.linspace(0, len(hidden) - 1, min(64, len(hidden))).long()]
    return sorted((sampling.top_p(net.logits(hidden).float() * scale, 0.9) > float("-inf")).sum(-1).tolist())


def calibrated(net: TransformerWrapper, vocab: int) -> float:
    """What the head must be multiplied by for a nucleus of a language model's size; random weights leave most of the words."""
    text = torch.randint(vocab, (2, PROMPT))
    low, high = 1.0, 256.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        sizes = nucleus(net, text, 1, middle)
        low, high = (middle, high) if sizes[len(sizes) // 2] > NUCLEUS[1] else (low, middle)
    return high


def sampler(options: argparse.Namespace) -> dict[str, Any]:
    rows, heads = [], {}
    few = (2, max(4, options.lengths[1] // 4))  # the peers' steps take long, and so do their taxes
    for vocab in options.vocabularies:
        flat, peer = models.ours_of(models.llama(vocab, options.depth)), models.llama(vocab, options.depth)
        scale = calibrated(flat, vocab)
        peer.lm_head.weight.mul_(scale)
        sharp, xt = models.ours_of(peer), models.x_transformers_of(peer)
        wrapper, flat_wrapper = AutoregressiveWrapper(sharp), AutoregressiveWrapper(flat)
        text = torch.randint(vocab, (8, PROMPT))
        sizes = {name: nucleus(w.net, torch.cat((text, w.generate(text, 32, top_p=0.9, seed=1)), 1), PROMPT)
                 for name, w in (("sharp", wrapper), ("flat", flat_wrapper))}
        heads[str(vocab)] = {"scale": scale, "nucleus": {
            name: {"10%": found[len(found) // 10], "median": found[len(found) // 2], "90%": found[-1 - len(found) // 10]}
            for name, found in sizes.items()}}
        for b in ROWS:
            prompt = text[:b]
            where, steps = f"V = {thousands(vocab)}, B = {b}", options.lengths[1]
            measured = {}
            with wrapper._decoding(), flat_wrapper._decoding():
                ours = {name: partial(models.stepping, wrapper, prompt, steps, name if name in SAMPLERS else None)
                        for name in ("greedy", *SAMPLERS)}
                ours["pure top-p, flat head"] = partial(models.stepping, flat_wrapper, prompt, steps, "pure top-p")
                measured["xalign"] = clock.alternating(ours, options.lengths, options.repeats, f"sampler, xalign, {where}")
            peers: list[tuple[str, Callable[..., models.Run], Any]] = [
                ("transformers", models.transformers, peer), ("x-transformers", models.x_transformers, xt)]
            for who, make, model in peers:
                runs = {"greedy": make(model, prompt), **{name: make(model, prompt, name) for name in SAMPLERS}}
                measured[who] = clock.steps(runs, few, options.repeats, f"sampler, {who}, {where}")
            rows += [{"v": vocab, "b": b, "engine": who, "sampler": name, "ms": times.median(name),
                      "greedy_ms": times.median("greedy"), "tax": times.ratio(name, "greedy") - 1,
                      "quartiles": [x - 1 for x in times.quartiles(name, "greedy")],
                      "asked": asked_tax(vocab) if who == "xalign" else None}
                     for who, times in measured.items() for name in times if name != "greedy"]
    return {"rows": rows, "heads": heads}


def show_sampler(section: dict[str, Any]) -> None:
    table(["V", "B", "engine", "sampler", "greedy, ms", "sampled, ms", "tax", "quartiles"],
          [[thousands(r["v"]), r["b"], r["engine"], r["sampler"], f"{r['greedy_ms']:.2f}", f"{r['ms']:.2f}",
            judged(r["tax"], r["asked"], "{:.1%}", at_least=False), "{:.1%} to {:.1%}".format(*r["quartiles"])]
           for r in section["rows"]])
    print("\nSamplers, at temperature 1: " + "; ".join(f"{k}: {v or 'no filter'}" for k, v in SAMPLERS.items()) + ".")
    for vocab, head in section["heads"].items():
        found = head["nucleus"].items()
        sizes = "; ".join(f"{kind} head {s['median']} (most {s['10%']} to {s['90%']})" for kind, s in found)
        print(f"V = {thousands(int(vocab))}, tokens in the .9-nucleus: {sizes}; sharp is flat times {head['scale']:.1f}.")


# ---- several rows of one prompt

def beams(options: argparse.Namespace) -> dict[str, Any]:
    rows, same = [], {}
    for vocab in options.vocabularies:
        peer = models.llama(vocab, options.depth)
        wrapper = AutoregressiveWrapper(models.ours_of(peer))
        search = {"num_beams": 4, "early_stopping": "never"}
        prompt = torch.randint(vocab, (2, PROMPT))
        for what, ends in (("", []), (" with end tokens", list(range(1, vocab, 64)))):
            found = models.texts(wrapper.beam_search(prompt, WRITTEN // 2, beams=4, eos_token=ends), ends)
            theirs = models.transformers(peer, prompt, **search, eos_token_id=ends or None)(WRITTEN // 2)
            if found != models.texts(theirs, ends):
                raise SystemExit(f"beam search{what} gives {found}, transformers {theirs.tolist()}")
            same[f"beam search{what}, V = {thousands(vocab)}"] = f"{sum(map(len, found))} tokens"

        prompt, lengths = torch.randint(vocab, (4, 512)), (options.lengths[0], sum(options.lengths) // 2)
        runs: dict[str, dict[str, Callable[[int], object]]] = {
            "xalign": {"beams": lambda n, w=wrapper, p=prompt[:1]: w.beam_search(p, n, beams=4),  # type: ignore[misc]
                       "greedy": models.xalign(wrapper, prompt)},
            "transformers": {"beams": models.transformers(peer, prompt[:1], **search),
                             "greedy": models.transformers(peer, prompt)}}
        for who, pair in runs.items():
            repeats = options.repeats * (2 if who == "xalign" else 1)
            times = clock.steps(pair, lengths, repeats, f"beams, {who}, V = {thousands(vocab)}")
            rows.append({"v": vocab, "what": "beams", "engine": who, "ms": times.median("beams"),
                         "greedy_ms": times.median("greedy"), "tax": times.ratio("beams", "greedy") - 1,
                         "quartiles": [x - 1 for x in times.quartiles("beams", "greedy")],
                         "asked": ASKED_BEAMS if who == "xalign" else None})
        prompt = torch.randint(vocab, (1, 1024))
        whole = {"xalign": models.xalign(wrapper, prompt, "full", num_samples=8),
                 "transformers": models.transformers(peer, prompt, "full", num_return_sequences=8)}
        times = clock.calls(whole, 64, options.repeats, f"8 samples, V = {thousands(vocab)}")
        rows.append({"v": vocab, "what": "samples", "engine": "xalign", "ms": times.median("xalign"),
                     "peer_ms": times.median("transformers"), "ratio": times.ratio("transformers", "xalign"),
                     "quartiles": times.quartiles("transformers", "xalign"), "asked": ASKED_SAMPLES})
    return {"rows": rows, "parity": same}


def show_beams(section: dict[str, Any]) -> None:
    print("4 beams of a prompt of 512 tokens against a greedy batch of 4:\n")
    table(["V", "engine", "greedy, ms/step", "beams, ms/step", "tax", "quartiles"],
          [[thousands(r["v"]), r["engine"], f"{r['greedy_ms']:.2f}", f"{r['ms']:.2f}",
            judged(r["tax"], r["asked"], "{:.1%}", at_least=False), "{:.1%} to {:.1%}".format(*r["quartiles"])]
           for r in section["rows"] if r["what"] == "beams"])
    print("\n8 samples of 64 tokens of a prompt of 1,024 tokens, whole calls:\n")
    table(["V", "xalign, s", "transformers, s", "ratio", "quartiles"],
          [[thousands(r["v"]), f"{r['ms'] / 1e3:.2f}", f"{r['peer_ms'] / 1e3:.2f}", judged(r["ratio"], r["asked"], "{:.2f}x"),
            "{:.2f} to {:.2f}".format(*r["quartiles"])] for r in section["rows"] if r["what"] == "samples"])
    parity(section["parity"])
