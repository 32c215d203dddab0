"""Settings and small models that all tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from xalign import AutoregressiveWrapper, Decoder, TransformerWrapper

torch.set_num_threads(2)
settings.register_profile("xalign", deadline=None, max_examples=60, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("xalign")

LLAMA = {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True, "ff_no_bias": True, "attn_flash": True}
WRAPPER = {"num_tokens", "max_seq_len", "emb_dropout", "use_abs_pos_emb", "tie_embedding"}


def tiny(seed: int = 0, sharp: float = 5.0, **options) -> TransformerWrapper:
    """A random two-layer model in eval mode; options go to whichever class knows them.

    Weights are `sharp` times larger than an untrained model's, so that attention and logits are far from flat.
    """
    torch.manual_seed(seed)
    outer = {"num_tokens": 17, "max_seq_len": 32} | {k: v for k, v in options.items() if k in WRAPPER}
    inner = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8} | {k: v for k, v in options.items() if k not in WRAPPER}
    model = TransformerWrapper(**outer, attn_layers=Decoder(**inner))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(sharp)
    return model.eval()


def tiny_ar(seed: int = 0, pad_value: int = 0, **options) -> AutoregressiveWrapper:
    """`tiny`, Llama-shaped unless said otherwise, in its generation wrapper."""
    return AutoregressiveWrapper(tiny(seed, **(LLAMA | options)), pad_value=pad_value)


def ids(b: int, n: int, v: int = 17, seed: int = 0) -> Tensor:
    """Random token ids (b, n)."""
    return torch.randint(v, (b, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
