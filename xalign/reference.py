"""The reference's log-probabilities of all pairs: computed once, kept on disk, found again by what they depend on."""

import hashlib
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from xalign import __version__, distributed
from xalign.data.collate import EncodedPair
from xalign.data.store import Store
from xalign.disk import write_atomically
from xalign.dpo import DPO
from xalign.evaluation.metrics import pairs_logps
from xalign.prepare import say
from xalign.watch import warn

VERSION = 1  # part of the key: raise it when other numbers come out of the same weights and tokens
BLOCK = 8192  # pairs after which what is known is saved: an interrupted pass loses no more


def cache_key(model: nn.Module, pairs: Store[EncodedPair], **settings: Any) -> str:
    """A hash of weights (with dtypes, without LoRA adapters), tokens (as they were cut), versions, and all `settings`."""
    whole = hashlib.sha256(f"{VERSION} {__version__} {torch.__version__} {sorted(settings.items())}".encode())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted((name.replace(".base.", "."), tensor) for name, tensor in tensors.items()
                               if not name.endswith((".lora_a", ".lora_b"))):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    whole.update(pairs.digest().encode())
    return whole.hexdigest()[:24]


def reference_logps(dpo: DPO, reference: nn.Module, pairs: Store[EncodedPair], visited: Tensor, pad_id: int, folder: Path,
                    **settings: Any) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (chosen, rejected) by pair index, nats; NaN for pairs that are False in `visited` and unknown.

    Whatever `folder` knows already is read from there, and what is missing is added, block by block. Of several processes
    each runs its share. `settings` are all that changes the numbers besides weights and tokens, such as bf16.
    """
    path = distributed.once(lambda: folder / f"{cache_key(reference, pairs, **settings)}.safetensors")

    def read() -> Tensor | None:
        try:
            found = safetensors.torch.load_file(path)["logps"]
        except FileNotFoundError:
            return None
        except (OSError, KeyError, safetensors.SafetensorError):
            warn(f"{path} is damaged, it is made again")
            return None
        return found if found.shape == (2, len(pairs)) else None

    known = distributed.once(read)
    logps = torch.full((2, len(pairs)), math.nan) if known is None else known
    missing = (visited & logps[0].isnan()).nonzero()[:, 0]
    if known is not None:
        say(f"reference: {int(visited.sum()) - len(missing):,} pairs known from {path}")
    for block in missing.split(BLOCK) if len(missing) else ():
        mine = block[distributed.rank() :: distributed.size()]
        some = pairs_logps(dpo, reference, pairs, pad_id, progress="reference", rows=mine.numpy())  # type: ignore[arg-type]
        found = torch.zeros(2, len(block))
        found[:, distributed.rank() :: distributed.size()] = torch.stack(some)
        logps[:, block] = distributed.total(found)

        def save() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, safetensors.torch.save({"logps": logps}))

        distributed.once(save)
    return logps[0], logps[1]
