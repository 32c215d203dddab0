#!/usr/bin/env python3
"""`make bench-losses`: each main preference loss on the embedded world, where the gold reward is known, from one reference.

The reference is made once, as `make demo` makes it but with fewer epochs of imitation, and each loss starts from it with the
settings of `BASE` and its own of `SETTINGS`; both are what docs/losses.md documents. Prints the table of docs/losses.md: gold
reward of samples (temperature 1, unfiltered) before and after with 95 % intervals over prompts, win rate against the
reference's samples, KL to it, and the share of well-formed samples. Runs that are finished are not made again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# of data/demo.json, for one epoch; no evaluation in between
BASE: dict[str, Any] = {"max_length": 128, "bf16": True, "batch_size": 16, "learning_rate": 3e-4, "num_train_epochs": 1,
                        "eval_max_new_tokens": 112, "eval_steps": 0, "save_steps": 0}
# what each loss has of its own, by the name of its line in the table
SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.5},
    "cDPO": {"loss_type": "sigmoid", "beta": 0.5, "label_smoothing": 0.1},
    "robust": {"beta": 0.5, "label_smoothing": 0.1},
    "hinge": {"beta": 0.5},
    "ipo": {"beta": 5.0},
    "sigmoid_norm": {},
    "apo_zero": {"beta": 0.5},
    "sppo_hard": {},  # 1 / 2β is what it asks of each side: .1 makes 5 nats
    "kto": {"beta": 0.5},
    "simpo": {},
    "cpo": {},
    "orpo": {},
}


def train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run train_dpo.py in `folder`; gives its evaluation.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(settings, indent=2) + "\n")
    command = [sys.executable, str(ROOT / "train_dpo.py"), "--config", str(config), "--output-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder.name}: {done.stderr[-2000:]}")
    return json.loads((folder / "evaluation.json").read_text())


def make_reference(folder: Path, sft_epochs: float) -> Path:
    """The model that all losses begin with: data/demo.json's imitation (one step of DPO follows, which is no part of it)."""
    settings = json.loads((ROOT / "data/demo.json").read_text()) | {"sft_epochs": sft_epochs, "max_steps": 1, "eval_steps": 0,
                                                                    "eval_prompts": 1, "eval_samples": 1}
    train(folder, settings)
    return folder / "reference"


def align(name: str, reference: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Train the loss of a line of the table from `reference`."""
    given = {"model": str(reference), "reference_cache": str(folder / "reference-cache"), "loss_type": name}
    return train(folder / name, {**BASE, **given, **SETTINGS[name], **changes})


def head(name: str) -> str:
    """How a line of the table begins: the loss, and what it has of its own."""
    own = SETTINGS[name]
    short = {"beta": "β", "label_smoothing": "ε"}
    told = [f"{sign} {own[setting]:g}" for setting, sign in short.items() if setting in own]
    return f"| `{own.get('loss_type', name)}` | {', '.join(told) or 'none'} |"


def line(name: str, n: dict[str, Any]) -> str:
    """A line of the table."""
    (low, high), won = n["gold_policy_interval"], n["win_rate_interval"]
    return (f"{head(name)} {n['gold_policy']:.2f} [{low:.2f}, {high:.2f}] | {n['win_rate']:.2f} [{won[0]:.2f}, {won[1]:.2f}] | "
            f"{n['kl']:.1f} | {n['well_formed_policy']:.2f} | {n['length_policy']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/losses", help="where the runs are (default: %(default)s)")
    parser.add_argument("--reference", type=Path, help="folder of a reference that is there already")
    parser.add_argument("--sft-epochs", type=float, default=2.0, help="epochs of imitation of the reference (%(default)s)")
    parser.add_argument("--prompts", type=int, default=150, help="prompts to sample from (%(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="samples a prompt (%(default)s)")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="lines of the table (default: all)")
    options = parser.parse_args()
    reference = options.reference or make_reference(options.folder / "made", options.sft_epochs)
    print("| loss | settings | gold reward after | win rate | KL, nats | well-formed | tokens |\n" + "|---" * 7 + "|")
    for name in options.only:
        numbers = align(name, reference.resolve(), options.folder, eval_prompts=options.prompts, eval_samples=options.samples)
        print(line(name, numbers), flush=True)
    low, high = numbers["gold_reference_interval"]
    print(f"before: gold {numbers['gold_reference']:.2f} [{low:.2f}, {high:.2f}], well-formed "
          f"{numbers['well_formed_reference']:.2f}, {numbers['length_reference']:.0f} tokens")


if __name__ == "__main__":
    main()
