"""The tensors of a Hugging Face folder, family by family: their names, and how each holds parameters of ours."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xalign.nn.transformer import TransformerWrapper


def _whole(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _only(parts: Sequence[Tensor]) -> Tensor:
    (tensor,) = parts
    return tensor


@dataclass
class Entry:
    """One tensor of the folder and the parameters of ours that it holds; `split` gives views where it can."""

    file: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = _whole
    join: Callable[[Sequence[Tensor]], Tensor] = _only


@dataclass
class Layout:
    """All tensors of a model's folder, and what else may be found in one."""

    entries: list[Entry]
    prefix: str = ""  # of the base model; its own folders lack it
    aliases: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()  # may be there, and says nothing about the model
    head: str = ""  # of a reward model

    def __post_init__(self) -> None:
        self.files = {entry.file for entry in self.entries}

    def canonical(self, name: str) -> str | None:
        """The name that `entries` have for a tensor found in a folder; None for one without parameters of ours.

        Those are attention masks and rotary frequencies (buffers of old versions) and the head of a tied model.
        So is, in a reward model's folder, the head that predicts tokens. A tensor that nobody knows keeps its name.
        """
        name = self.aliases.get(name, name)
        if name in self.files or self.prefix + name in self.files:
            return name if name in self.files else self.prefix + name
        return None if name in self.ignored or name in self.unused or _BUFFER.search(name) else name


_BUFFER = re.compile(r"(rotary_emb\.inv_freq|\d\.(attn|attention)\.(bias|masked_bias))$")


@dataclass(frozen=True)
class _Names:
    """A family's module names -> ours; in `layer` those below the layers, `fused` queries, keys and values in one."""

    prefix: str
    top: dict[str, str]
    layers: str
    layer: dict[str, str]
    fused: str = ""


_LLAMA = _Names(
    "model.", {"model.embed_tokens": "token_emb", "model.norm": "attn_layers.final_norm", "lm_head": "to_logits"}, "layers", {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
        "self_attn.q_proj": "attn.to_q", "self_attn.k_proj": "attn.to_k", "self_attn.v_proj": "attn.to_v",
        "self_attn.o_proj": "attn.to_out", "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
        "mlp.gate_proj": "ff.gate", "mlp.up_proj": "ff.up", "mlp.down_proj": "ff.down"})
_GPT2 = _Names(
    "transformer.", {"transformer.wte": "token_emb", "transformer.wpe": "pos_emb", "transformer.ln_f": "attn_layers.final_norm",
                     "lm_head": "to_logits"}, "h", {
        "ln_1": "attn_norm", "ln_2": "ff_norm", "attn.c_proj": "attn.to_out", "mlp.c_fc": "ff.up", "mlp.c_proj": "ff.down"},
    fused="attn.c_attn")
_NEOX = _Names(
    "gpt_neox.", {"gpt_neox.embed_in": "token_emb", "gpt_neox.final_layer_norm": "attn_layers.final_norm",
                  "embed_out": "to_logits"}, "layers", {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "attention.dense": "attn.to_out",
        "mlp.dense_h_to_4h": "ff.up", "mlp.dense_4h_to_h": "ff.down"},
    fused="attention.query_key_value")
_NAMES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2, "gpt_neox": _NEOX}


How = tuple[Callable[[Tensor], tuple[Tensor, ...]], Callable[[Sequence[Tensor]], Tensor]]  # split, join


def _transposed(parts: int) -> How:
    """GPT-2's matrices are [in, out]; its queries, keys and values lie one after the other."""
    return lambda t: t.t().chunk(parts), lambda ts: torch.cat(tuple(ts)).t()


def _stacked(parts: int) -> How:
    return lambda t: t.chunk(parts), lambda ts: torch.cat(tuple(ts))


def _interleaved(heads: int) -> How:
    """NeoX has the query, key and value of each head side by side."""
    return (lambda t: tuple(part.flatten(0, 1) for part in t.unflatten(0, (heads, 3, -1)).unbind(1)),
            lambda ts: torch.stack([t.unflatten(0, (heads, -1)) for t in ts], 1).flatten(0, 2))


def layout(family: str, model: TransformerWrapper) -> Layout:
    """The tensors of a folder of this family that holds `model`; 'xalign' has our own names."""
    state = model.state_dict()
    if family == "xalign":
        return Layout([Entry(name, (name,)) for name in state])
    names = _NAMES[family]
    modules = {theirs: [ours] for theirs, ours in names.top.items()}
    for i in range(model.attn_layers.depth):
        theirs, ours = f"{names.prefix}{names.layers}.{i}", f"attn_layers.layers.{i}"
        modules |= {f"{theirs}.{a}": [f"{ours}.{b}"] for a, b in names.layer.items()}
        if names.fused:
            modules[f"{theirs}.{names.fused}"] = [f"{ours}.attn.to_{x}" for x in "qkv"]
    entries = []
    for theirs, parts in modules.items():
        for kind in ("weight", "bias"):
            parameters = tuple(f"{part}.{kind}" for part in parts)
            if parameters[0] not in state:
                continue
            how: How = (_whole, _only)
            if names is _GPT2 and parameters[0].startswith("attn_layers") and state[parameters[0]].ndim == 2:
                how = _transposed(len(parts))
            elif len(parts) > 1:
                how = _interleaved(model.attn_layers.heads) if names is _NEOX else _stacked(len(parts))
            entries.append(Entry(f"{theirs}.{kind}", parameters, *how))
    assert {name for entry in entries for name in entry.ours} == set(state), f"{family} has no place for some parameter"
    head = next(theirs for theirs, ours in names.top.items() if ours == "to_logits") + ".weight"
    return Layout(entries, names.prefix, {"lm_head.weight": head}, () if model.to_logits is not None else (head,))


def reward_layout(base: Layout, prefix: str) -> Layout:
    """The tensors of a reward model's folder, by those of its decoder's: a head `prefix`.weight, and none for logits."""
    logits = [entry.file for entry in base.entries if entry.ours == ("to_logits.weight",)]
    kept = [replace(e, ours=tuple(f"net.{name}" for name in e.ours)) for e in base.entries if e.file not in logits]
    head = f"{prefix}.weight"
    return Layout([*kept, Entry(head, ("head.weight",))], base.prefix, base.aliases, unused=(*logits, *base.ignored), head=head)
