#!/usr/bin/env python3
"""Align a model with preference pairs: the same as `xalign dpo`.

Without flags it runs the whole story on the embedded toy world: it trains a tokenizer and a decoder from scratch,
freezes a reference, trains the policy with DPO, evaluates both, and writes a report to runs/dpo. The stages are
written out in `xalign/train.py`, `run_dpo`; `--help` lists the flags, `--dry-run` shows what would be trained on.
"""

from xalign.cli import main

if __name__ == "__main__":
    main(command="dpo")
