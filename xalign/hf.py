"""Hugging Face's names: our configurations and tensors to theirs and back. The only place that knows them.

A Llama-shaped model becomes a `LlamaForCausalLM` folder; any other shape is kept under our own names with
`"model_type": "xalign"`. The configuration is written in the spelling of transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and of 5 (`rope_parameters`, `dtype`): the one read without the other is silently wrong.
"""

from typing import Any

import torch
from torch import Tensor

from xalign.errors import CheckpointError
from xalign.nn.transformer import Decoder, TransformerWrapper

_LLAMA_LAYER = {
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
    "attn.to_q": "self_attn.q_proj", "attn.to_k": "self_attn.k_proj", "attn.to_v": "self_attn.v_proj",
    "attn.to_out": "self_attn.o_proj", "ff.gate": "mlp.gate_proj", "ff.up": "mlp.up_proj", "ff.down": "mlp.down_proj",
}
_LLAMA_TOP = {"token_emb.weight": "model.embed_tokens.weight", "attn_layers.final_norm.weight": "model.norm.weight",
              "to_logits.weight": "lm_head.weight"}


def is_llama(model: TransformerWrapper) -> bool:
    """Whether transformers' Llama computes the same function (dropout apart)."""
    c = model.attn_layers.config
    return bool(c["rotary_pos_emb"] and c["rotary_dim"] in (None, c["attn_dim_head"]) and c["use_rmsnorm"] and c["ff_glu"]
                and c["ff_swish"] and c["attn_qkv_bias"] == c["attn_out_bias"] and not c["attn_qk_norm"]
                and not c["parallel_residual"])


def _llama_names(model: TransformerWrapper) -> dict[str, str]:
    """Our parameter names -> theirs."""
    names = {}
    for name in model.state_dict():
        if name in _LLAMA_TOP:
            names[name] = _LLAMA_TOP[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            names[name] = f"model.layers.{layer}.{_LLAMA_LAYER[module]}.{kind}"
    return names


def to_hf(model: TransformerWrapper, tokenizer: Any = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The folder's config.json and tensors of a model, under Hugging Face's names where a family fits."""
    dtype = str(model.token_emb.weight.dtype).removeprefix("torch.")
    ids = {k: getattr(tokenizer, k.replace("token_", ""), None) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config: dict[str, Any] = {"vocab_size": model.num_tokens, "max_position_embeddings": model.max_seq_len,
                              "torch_dtype": dtype, "dtype": dtype, **ids}
    if not is_llama(model):
        options = {**model.config, "attn_layers": model.attn_layers.config}
        return {"architectures": ["XalignForCausalLM"], "model_type": "xalign", **config, "xalign": options}, model.state_dict()
    c = model.attn_layers.config
    config |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": c["dim"], "num_hidden_layers": c["depth"], "num_attention_heads": c["heads"],
        "num_key_value_heads": model.attn_layers.kv_heads, "head_dim": c["attn_dim_head"],
        "intermediate_size": model.attn_layers.inner_dim, "hidden_act": "silu",
        "rms_norm_eps": c["norm_eps"], "attention_bias": c["attn_qkv_bias"], "mlp_bias": not c["ff_no_bias"],
        "attention_dropout": c["attn_dropout"], "tie_word_embeddings": model.to_logits is None, "use_cache": True,
        "rope_theta": c["rotary_base"], "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": c["rotary_base"]}, "initializer_range": 0.02,
    }
    names = _llama_names(model)
    return config, {names[k]: v for k, v in model.state_dict().items()}


def from_hf(config: dict[str, Any], where: str) -> tuple[TransformerWrapper, dict[str, str]]:
    """An untrained model of a config.json, and the map from our parameter names to the folder's."""
    family = config.get("model_type")
    if family == "xalign":
        options = dict(config["xalign"])
        model = TransformerWrapper(**{**options, "attn_layers": Decoder(**options["attn_layers"])})
        return model, {k: k for k in model.state_dict()}
    if family != "llama":
        raise CheckpointError(f"{where}: model_type is {family!r}, allowed is 'llama' or 'xalign'")
    spellings = [config.get("rope_scaling") or {}, config.get("rope_parameters") or {}]
    for kind in (rope.get("rope_type", rope.get("type", "default")) for rope in spellings):
        if kind != "default":
            raise CheckpointError(f"{where}: rope type is {kind!r}, allowed is 'default'")
    bases = {b for b in (config.get("rope_theta"), *(rope.get("rope_theta") for rope in spellings)) if b is not None}
    if len(bases) > 1:
        raise CheckpointError(f"{where}: rope_theta is {min(bases)} in one place and {max(bases)} in another")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {config['hidden_act']!r}, allowed is 'silu'")
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    bias = bool(config.get("attention_bias", False))
    layers = Decoder(
        dim=dim, depth=config["num_hidden_layers"], heads=heads, attn_dim_head=config.get("head_dim") or dim // heads,
        attn_kv_heads=config.get("num_key_value_heads", heads), attn_dropout=config.get("attention_dropout", 0.0),
        attn_flash=True, attn_qkv_bias=bias, attn_out_bias=bias, rotary_pos_emb=True,
        rotary_base=min(bases, default=10000.0), use_rmsnorm=True,
        norm_eps=config.get("rms_norm_eps", 1e-6), ff_inner_dim=config["intermediate_size"], ff_glu=True, ff_swish=True,
        ff_no_bias=not config.get("mlp_bias", False))
    model = TransformerWrapper(num_tokens=config["vocab_size"], max_seq_len=config.get("max_position_embeddings", 2048),
                               tie_embedding=bool(config.get("tie_word_embeddings", False)), attn_layers=layers)
    return model, _llama_names(model)


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by torch's name ('bfloat16'), one of the short names, or None."""
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if name is None or isinstance(name, torch.dtype):
        return name
    dtype = getattr(torch, short.get(name, name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"dtype is {name!r}, allowed is float32, bfloat16 or float16")
    return dtype
