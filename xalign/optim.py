"""Parameter groups, AdamW, and learning-rate schedules as plain functions of the step."""

import math

import torch
from torch import nn

from xalign.errors import ConfigError, nearest

SCHEDULES = ("cosine", "linear", "constant")


def adamw(module: nn.Module, learning_rate: float, weight_decay: float = 0.0,
          betas: tuple[float, float] = (0.9, 0.95), epsilon: float = 1e-8) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); matrices decay, embeddings, norms and biases do not."""
    free = {p for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("the model has no weight that can be trained (is it quantised?), allowed is one as it was loaded")
    decays = [p for p in trained if p.ndim >= 2 and p not in free]
    rest = [p for p in trained if p.ndim < 2 or p in free]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def schedule(step: int, *, total: int, warmup: int, kind: str) -> float:
    """The factor of the learning rate for the 0-based `step`: linear warmup, then cosine or linear to 0, or constant."""
    if kind not in SCHEDULES:
        raise ConfigError(f"lr_scheduler_type is {kind!r}{nearest(kind, SCHEDULES)}; allowed are {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    left = 1 - (step - warmup) / max(1, total - warmup)
    return left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left))
