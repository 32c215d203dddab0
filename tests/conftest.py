"""Settings and small models that all tests share."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from xalign import AutoregressiveWrapper, Decoder, TransformerWrapper
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS
from xalign.hf import from_hf
from xalign.tokenizers import train_sentencepiece

torch.set_num_threads(1)  # the models are so small that a second thread only waits: 90 s become 10
settings.register_profile("xalign", deadline=None, max_examples=60, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("xalign")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where a script began all this in the background: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

LLAMA = {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True, "ff_no_bias": True, "attn_flash": True}
WRAPPER = {"num_tokens", "max_seq_len", "emb_dropout", "use_abs_pos_emb", "tie_embedding"}


def tiny(seed: int = 0, sharp: float = 5.0, **options) -> TransformerWrapper:
    """A random two-layer model in eval mode; options go to whichever class knows them.

    Weights are N(0, .02 sharp), whatever the model's own initialisation, so that attention and logits are far from flat.
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
                parameter.normal_(std=0.02 * sharp)
    return model.eval()


def tiny_ar(seed: int = 0, pad_value: int = 0, **options) -> AutoregressiveWrapper:
    """`tiny`, Llama-shaped unless said otherwise, in its generation wrapper."""
    return AutoregressiveWrapper(tiny(seed, **(LLAMA | options)), pad_value=pad_value)


def ids(b: int, n: int, v: int = 17, seed: int = 0) -> Tensor:
    """Random token ids (b, n)."""
    return torch.randint(v, (b, n), generator=torch.Generator().manual_seed(seed))


def llama(tied=False, kv_heads=4, vocab=17, depth=2, seed=0, window=64):
    """A random transformers Llama and ours with its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=depth, num_attention_heads=4,
                         num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=window, tie_word_embeddings=tied,
                         initializer_range=0.3, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs, imported(theirs)


def imported(theirs) -> TransformerWrapper:
    """Ours with the weights of a transformers model."""
    ours, layout = from_hf(theirs.config.to_dict(), "a test")
    found = {layout.canonical(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({k: v for e in layout.entries for k, v in zip(e.ours, e.split(found[e.file]), strict=True)})
    return ours.eval()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A small SentencePiece tokenizer of the toy world with role markers and our chat template."""
    lines = (Path(__file__).parent.parent / "data/corpus.txt").read_text(encoding="utf-8").split("\n")[:300]
    made = train_sentencepiece(lines, 400, user_defined_symbols=ROLE_MARKERS)
    made.chat_template = DEFAULT_TEMPLATE
    return made


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
