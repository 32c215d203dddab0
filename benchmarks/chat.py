"""Time to the first token of each turn of a conversation, with the cache that is kept between turns and without.

    python benchmarks/chat.py             # prints a table; `make bench` doesn't run it

A random model answers ten messages of equal length greedily; its head knows small letters alone, so that a reply is
tokenised again as it was written. Each figure is the least of three conversations.
"""

import torch

from xalign import Decoder, TransformerWrapper
from xalign.backends.base import SamplingParams
from xalign.backends.native import NativeBackend
from xalign.chat import Session, Speaker
from xalign.nn.cache import Kept
from xalign.tokenizers import ByteTokenizer

TURNS, MESSAGE, REPLY = 10, 64, 64  # tokens


def conversation(model: TransformerWrapper, keep: bool) -> list[tuple[float, int, int]]:
    """Of each turn: seconds to the first token, tokens of the prompt, and how many of them were run."""
    speaker = Speaker(NativeBackend(model, ByteTokenizer()), "random")
    session = Session([speaker], SamplingParams(temperature=0, max_new_tokens=REPLY, min_new_tokens=REPLY))
    found = []
    for turn in range(TURNS):
        if not keep:
            speaker.backend.kept = Kept()
        reply = session.ask(chr(97 + turn) * MESSAGE, [lambda piece: None])[0]
        found.append((reply.first, reply.prompt, reply.prompt - reply.reused))
    return found


def main() -> None:
    torch.manual_seed(0)
    layers = Decoder(dim=512, depth=8, heads=8, rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True)
    model = TransformerWrapper(num_tokens=259, max_seq_len=2048, attn_layers=layers).eval()
    with torch.no_grad():
        model.to_logits.weight[:97] = model.to_logits.weight[123:] = 0
    kept, anew = ([min(turn) for turn in zip(*(conversation(model, keep) for _ in range(3)), strict=True)]
                  for keep in (True, False))
    print(f"{'turn':>4} {'prompt':>7} {'run':>5} {'kept':>9} {'run':>6} {'anew':>9} {'ratio':>6}")
    for n, ((a, size, new), (b, _, all)) in enumerate(zip(kept, anew, strict=True), 1):
        print(f"{n:4} {size:7} {new:5} {1000 * a:6.1f} ms {all:6} {1000 * b:6.1f} ms {b / a:6.1f}")


if __name__ == "__main__":
    main()
