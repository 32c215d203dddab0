#!/usr/bin/env python3
"""Continue prompts with a trained model: the same as `xalign generate`.

    python generate.py -p "Once a brave girl called Lily lived by the sea. One evening Hugo the goat brought her a sled."
    python generate.py --prompts prompts.jsonl --json -n 4 --temperature 0.8 --top-p 0.9

The program is `xalign/complete.py`, the decoding loop `xalign/nn/autoregressive.py`.
"""

from xalign.cli import main

if __name__ == "__main__":
    main(command="generate")
