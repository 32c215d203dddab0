"""Hugging Face's configurations: theirs to our options and back. With `families` (tensors) all that knows their names.

A model becomes a folder of the first family that computes the same function; any other shape is kept under our own names
with `"model_type": "xalign"`. The configuration is written in the spelling of transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and of 5 (`rope_parameters`, `dtype`): the one read without the other is silently wrong.
What we don't compute is refused by name. `attention_dropout` is taken over; the other rates of GPT-2 and GPT-NeoX belong
to their pretraining and are not.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import torch

from xalign.errors import CheckpointError, ConfigError
from xalign.families import Layout, layout, reward_layout
from xalign.nn.reward import RewardModel
from xalign.nn.rotary import ROPE_TYPES
from xalign.nn.transformer import Decoder, TransformerWrapper

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT_NAMES = "float32, bfloat16 or float16 (or float64, to compare with)"
Fields = dict[str, Any]
Options = tuple[Fields, Fields]  # of TransformerWrapper, of Decoder

# Their activations -> ours.
_ACTIVATIONS: dict[str, Fields] = {
    "silu": {"ff_swish": True}, "swish": {"ff_swish": True}, "gelu": {},
    "gelu_new": {"ff_gelu_tanh": True}, "gelu_pytorch_tanh": {"ff_gelu_tanh": True}, "gelu_fast": {"ff_gelu_tanh": True},
}
# Fields that change what a model computes in a way that no family here does, and the values that don't. A false value
# (null, false, 0, an empty list) never does, unless it is the exception in the second table.
_NEUTRAL: dict[str, tuple] = dict.fromkeys((
    "add_cross_attention", "alibi", "attention_chunk_size", "attention_multiplier", "attn_logit_softcapping",
    "attn_output_gate", "attn_temperature_tuning", "clip_qkv", "final_logit_softcapping", "is_encoder_decoder", "kv_lora_rank",
    "moe_intermediate_size", "n_routed_experts", "no_rope_layers", "num_experts", "num_kv_shared_layers", "num_local_experts",
    "per_layer_config", "q_lora_rank", "qk_layernorm", "qk_norm", "quantization_config", "query_pre_attn_scalar",
    "rope_interleave", "rope_interleaved", "rope_local_base_freq", "scale_attn_by_inverse_layer_idx", "sliding_window_pattern",
    "use_bidirectional_attention", "use_mrope", "use_post_norm", "use_qk_layernorm", "use_qk_norm",
    "zero_centered_gamma"), ())
_NEUTRAL |= dict.fromkeys(("embedding_multiplier", "embedding_scale", "logit_scale", "logits_scaling", "residual_multiplier",
                           "scale_depth", "scale_emb", "width_multiplier"), (1,))
# The same for fields that some families here have: for the others only these values will do.
_ELSEWHERE: dict[str, tuple] = {"attention_bias": (), "mlp_bias": (), "partial_rotary_factor": (1,), "rotary_pct": (1,),
                                "sliding_window": (), "use_sliding_window": (), "use_parallel_residual": ()}
_NOT_FALSE = ("is_causal", "scale_attn_weights")
_WHY = {"gemma": "scaled embeddings", "gemma2": "logit softcapping", "gemma3_text": "two kinds of layers",
        "gpt_neo": "local attention", "gptj": "interleaved rotary pairs", "olmo": "norms without weights",
        "olmo2": "norms behind the layers", "phi3": "fused projections", "smollm3": "layers without positions",
        "cohere": "scaled logits", "granite": "scaled residuals", "mixtral": "experts"}


@dataclass(frozen=True)
class Config:
    """The fields of a config.json; what is wrong with one is a `CheckpointError` that begins with `where`."""

    fields: Fields
    where: str
    family: str

    def wrong(self, key: str, value: Any, allowed: Any) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {short(value)}, allowed is {allowed}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise CheckpointError(f"{self.where}: {key} is missing, allowed is a whole number >= 1")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, value, "a whole number >= 1")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, value, "a number")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if value not in (True, False, None):
            raise self.wrong(key, value, "true or false")
        return bool(value)

    def activation(self, key: str, default: str) -> Fields:
        name = self.get(key, default)
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise self.wrong(key, name, ", ".join(_ACTIVATIONS))
        return {"ff_swish": False, "ff_gelu_tanh": False} | _ACTIVATIONS[name]

    def refuse_foreign(self, own: tuple[str, ...]) -> None:
        """Raise for a field that makes another function of the model; `own` are those of `_ELSEWHERE` that are read."""
        foreign = {key: values for key, values in _ELSEWHERE.items() if key not in own}
        for key, neutral in {**_NEUTRAL, **foreign}.items():
            value = self.get(key)
            if value and value not in neutral:
                raise self.wrong(key, value, f"{'1 or null' if neutral else 'none'}: it is not supported")
        for key in _NOT_FALSE:
            if self.get(key, True) is False:
                raise self.wrong(key, False, "true: else is not supported")

    def rope(self, length: int, part: float = 1.0) -> tuple[Fields, float]:
        """Our rotary options and the rotated part of each head, from wherever they are said; they must not contradict."""
        found: Fields = {}
        top = {"rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor",
               "partial_rotary_factor": "partial_rotary_factor"}
        said = [(name, self.get(key)) for key, name in top.items()]
        for spelling in ("rope_scaling", "rope_parameters"):
            its = self.get(spelling) or {}
            if not isinstance(its, dict):
                raise self.wrong(spelling, its, 'null or an object: {"rope_type": "linear", "factor": 2.0}')
            said += [("rope_type" if key == "type" else key, value) for key, value in its.items()]
        for key, value in said:
            if value is not None and found.setdefault(key, value) != value:
                raise CheckpointError(f"{self.where}: {key} is {found[key]!r} in one place and {value!r} in another, "
                                      "allowed is one value")
        kind, base = found.pop("rope_type", "default"), found.pop("rope_theta", 10000.0)
        part = found.pop("partial_rotary_factor", part)
        for key, value in (("rope_theta", base), ("partial_rotary_factor", part)):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise self.wrong(key, value, "a number")
        if not isinstance(kind, str):
            raise self.wrong("rope_type", kind, f"default, {', '.join(ROPE_TYPES)}")
        found.pop("finetuned", None)  # a remark of yarn's authors
        options: Fields = {"rotary_pos_emb": True, "rotary_base": float(base), "rotary_scaling": None}
        if kind == "default":
            for key in sorted(found):
                raise self.wrong(key, found[key], "none where rope_type is 'default'")
            return options, part
        if kind not in ROPE_TYPES:
            raise self.wrong("rope_type", kind, f"default, {', '.join(ROPE_TYPES)}")
        if kind == "linear":
            found.pop("original_max_position_embeddings", None)  # theirs does not look at it either
        else:
            original = self.get("original_max_position_embeddings") if kind != "dynamic" else None
            original = found.setdefault("original_max_position_embeddings", original or length)
            if kind == "dynamic" and original != length:
                raise self.wrong("original_max_position_embeddings", original,
                                 f"max_position_embeddings = {length} where rope_type is 'dynamic'")
        return options | {"rotary_scaling": {"rope_type": kind, **found}}, part

    def window(self) -> int | None:
        """The sliding window of all layers; a mix of kinds of layers is refused."""
        depth, first = self.whole("num_hidden_layers"), 0
        window, free = self.get("sliding_window", 4096) if self.family != "llama" else None, False
        if self.family in ("qwen2", "qwen3"):
            window = window if self.flag("use_sliding_window") else None
            first = self.get("max_window_layers", 28)
            free = window is not None  # the layers' own kinds decide
        rule = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(depth)]
        listed = self.get("layer_types")
        if listed is not None and (not isinstance(listed, list) or len(listed) != depth):
            said = f"a list of {len(listed)} kinds" if isinstance(listed, list) else listed
            raise self.wrong("layer_types", said, f"a list of num_hidden_layers = {depth} kinds")
        kinds, allowed = set(listed or rule), {"full_attention", "sliding_attention"} if free else {rule[0]}
        if kinds - allowed:
            raise self.wrong("layer_types", listed, f"{' or '.join(sorted(allowed))} where sliding_window is {window!r}")
        if len(kinds) > 1:
            key = "layer_types" if listed else "max_window_layers"
            raise self.wrong(key, self.get(key, 28), f"what makes all layers one kind, not {' and '.join(sorted(kinds))}")
        return window if "sliding_attention" in kinds else None


def _activation_name(c: Fields, tanh: str = "gelu_pytorch_tanh") -> str:
    return "silu" if c["ff_swish"] else tanh if c["ff_gelu_tanh"] else "gelu"


def _write_rope(c: Fields) -> Fields:
    """Both spellings; where both stand, transformers 5 takes `rope_scaling`, 4 knows nothing else."""
    base, scaling = float(c["rotary_base"]), dict(c["rotary_scaling"] or {"rope_type": "default"})
    if scaling["rope_type"] == "dynamic":
        del scaling["original_max_position_embeddings"]  # theirs is max_position_embeddings
    return {"rope_theta": base, "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
            "rope_parameters": {"rope_theta": base, **scaling}}


def _read_llama(config: Config) -> Options:
    """Llama and those that differ from it by a few options and defaults."""
    family, heads, dim = config.family, config.whole("num_attention_heads"), config.whole("hidden_size")
    length = config.whole("max_position_embeddings", {"llama": 2048, "mistral": 4096 * 32}.get(family, 32768))
    kv_heads = heads if "num_key_value_heads" in config.fields else {"llama": heads, "mistral": 8}.get(family, 32)
    bias = config.flag("attention_bias", family == "qwen2")
    if family == "qwen2" and not bias:
        raise config.wrong("attention_bias", bias, "true for qwen2")
    rope, part = config.rope(length)
    if part != 1:
        raise config.wrong("partial_rotary_factor", part, f"1 for {family}")
    return {"num_tokens": config.whole("vocab_size"), "max_seq_len": length,
            "tie_embedding": config.flag("tie_word_embeddings")}, {
        "dim": dim, "depth": config.whole("num_hidden_layers"), "heads": heads,
        "attn_dim_head": config.whole("head_dim", 128 if family == "qwen3" else dim // heads),
        "attn_kv_heads": config.whole("num_key_value_heads", kv_heads), "attn_dropout": config.number("attention_dropout", 0.0),
        "attn_qkv_bias": bias, "attn_out_bias": bias and family != "qwen2", "attn_qk_norm": family == "qwen3",
        "attn_sliding_window": config.window(), **rope, "use_rmsnorm": True, "norm_eps": config.number("rms_norm_eps", 1e-6),
        "ff_inner_dim": config.whole("intermediate_size"), "ff_glu": True, **config.activation("hidden_act", "silu"),
        "ff_no_bias": not config.flag("mlp_bias")}


def _write_llama(model: TransformerWrapper, family: str) -> Fields | None:
    c = model.attn_layers.config
    if family == "llama" and c["dim"] % c["heads"]:
        return None  # transformers 5 opens no such Llama
    window = c["attn_sliding_window"]
    fields = {
        "hidden_size": c["dim"], "num_hidden_layers": c["depth"], "num_attention_heads": c["heads"],
        "num_key_value_heads": model.attn_layers.kv_heads, "head_dim": c["attn_dim_head"],
        "intermediate_size": model.attn_layers.inner_dim, "hidden_act": _activation_name(c), "rms_norm_eps": c["norm_eps"],
        "attention_dropout": c["attn_dropout"], **_write_rope(c)}
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = c["attn_qkv_bias"]
    if family == "llama":
        fields["mlp_bias"] = not c["ff_no_bias"]
    else:
        fields["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        kind = "full_attention" if window is None else "sliding_attention"
        fields |= {"use_sliding_window": window is not None, "max_window_layers": c["depth"] if window is None else 0,
                   "layer_types": [kind] * c["depth"]}
    return fields


def _read_gpt2(config: Config) -> Options:
    heads, dim = config.whole("n_head"), config.whole("n_embd")
    return {"num_tokens": config.whole("vocab_size"), "max_seq_len": config.whole("n_positions", 1024), "use_abs_pos_emb": True,
            "tie_embedding": config.flag("tie_word_embeddings", True)}, {
        "dim": dim, "depth": config.whole("n_layer"), "heads": heads, "attn_dim_head": dim // heads,
        "attn_qkv_bias": True, "attn_out_bias": True, "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "ff_inner_dim": config.whole("n_inner", 4 * dim), **config.activation("activation_function", "gelu_new")}


def _write_gpt2(model: TransformerWrapper, family: str) -> Fields | None:
    c = model.attn_layers.config
    return {"n_embd": c["dim"], "n_layer": c["depth"], "n_head": c["heads"], "n_positions": model.max_seq_len,
            "n_inner": model.attn_layers.inner_dim, "activation_function": _activation_name(c, "gelu_new"),
            "layer_norm_epsilon": c["norm_eps"], "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def _read_neox(config: Config) -> Options:
    heads, dim = config.whole("num_attention_heads"), config.whole("hidden_size")
    length, bias = config.whole("max_position_embeddings", 2048), config.flag("attention_bias", True)
    rope, part = config.rope(length, 0.25)
    return {"num_tokens": config.whole("vocab_size"), "max_seq_len": length,
            "tie_embedding": config.flag("tie_word_embeddings")}, {
        "dim": dim, "depth": config.whole("num_hidden_layers"), "heads": heads, "attn_dim_head": dim // heads,
        "attn_qkv_bias": bias, "attn_out_bias": bias, "attn_dropout": config.number("attention_dropout", 0.0),
        **rope, "rotary_dim": int(dim // heads * part), "norm_eps": config.number("layer_norm_eps", 1e-5),
        "ff_inner_dim": config.whole("intermediate_size"), **config.activation("hidden_act", "gelu"),
        "parallel_residual": config.flag("use_parallel_residual", True)}


def _write_neox(model: TransformerWrapper, family: str) -> Fields | None:
    c = model.attn_layers.config
    rotated, head, rope = c["rotary_dim"] or c["attn_dim_head"], c["attn_dim_head"], _write_rope(c)
    part = rotated / head if int(head * (rotated / head)) == rotated else math.nextafter(rotated / head, 1)
    rope["rope_parameters"]["partial_rotary_factor"] = part
    return {"hidden_size": c["dim"], "num_hidden_layers": c["depth"], "num_attention_heads": c["heads"],
            "intermediate_size": model.attn_layers.inner_dim, "hidden_act": _activation_name(c),
            "layer_norm_eps": c["norm_eps"], "attention_bias": c["attn_qkv_bias"], "attention_dropout": c["attn_dropout"],
            "hidden_dropout": 0.0, "use_parallel_residual": c["parallel_residual"], **rope,
            "rotary_emb_base": rope["rope_theta"], "rotary_pct": part}


@dataclass(frozen=True)
class Family:
    """One of their model types: `read` gives our options, `write` its fields (None where it can't), `own` its extras."""

    architecture: str
    read: Callable[[Config], Options]
    write: Callable[[TransformerWrapper, str], Fields | None]
    own: tuple[str, ...] = ()


FAMILIES = {  # in the order in which they are tried for a model of ours
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama, ("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", _read_llama, _write_llama, ("sliding_window",)),
    "qwen2": Family("Qwen2ForCausalLM", _read_llama, _write_llama, ("attention_bias", "sliding_window", "use_sliding_window")),
    "qwen3": Family("Qwen3ForCausalLM", _read_llama, _write_llama, ("attention_bias", "sliding_window", "use_sliding_window")),
    "gpt2": Family("GPT2LMHeadModel", _read_gpt2, _write_gpt2),
    "gpt_neox": Family("GPTNeoXForCausalLM", _read_neox, _write_neox,
                       ("attention_bias", "partial_rotary_factor", "rotary_pct", "use_parallel_residual")),
}


def _function(outer: Fields, inner: Fields) -> Fields:
    """What the options compute, with defaults filled in; equal for equal functions (dropout apart)."""
    filled: Fields = {}
    for kind, options in ((TransformerWrapper, outer), (Decoder, inner)):
        known = inspect.signature(kind).parameters.values()
        filled |= {p.name: p.default for p in known if p.default is not p.empty} | options
    f = {k: v for k, v in filled.items() if not k.endswith("dropout") and k not in ("attn_flash", "attn_layers", "ff_mult")}
    f["attn_kv_heads"] = f["attn_kv_heads"] or f["heads"]
    f["ff_inner_dim"] = f["ff_inner_dim"] or int(f["dim"] * filled["ff_mult"])
    f["rotary_dim"] = (f["rotary_dim"] or f["attn_dim_head"]) if f["rotary_pos_emb"] else None
    f["use_abs_pos_emb"] = f["use_abs_pos_emb"] and not f["rotary_pos_emb"] and not f["alibi_pos_bias"]
    return f


def generation(model: TransformerWrapper, tokenizer: Any = None) -> Fields:
    """The generation_config.json of a model's folder: what it came with, and the tokenizer's ids where it has them."""
    fields = dict(model.generation)
    if tokenizer is not None:
        ids = {k: getattr(tokenizer, k.replace("token_", "")) for k in IDS}
        if more := set(getattr(tokenizer, "stop_ids", ())) - {tokenizer.eos_id}:
            ids["eos_token_id"] = [*([tokenizer.eos_id] if tokenizer.eos_id is not None else []), *sorted(more)]
        fields |= {k: v for k, v in ids.items() if v is not None}
    return {k: v for k, v in fields.items() if k not in IDS or v is not None}


def to_hf(model: TransformerWrapper, tokenizer: Any = None) -> tuple[Fields, Layout]:
    """The config.json of a model's folder and the layout of its tensors, of the first family that fits.

    A family fits if what it reads from the fields that it writes is the model's own function.
    """
    dtype = str(model.token_emb.weight.dtype).removeprefix("torch.")
    drawing = generation(model, tokenizer)
    shared: Fields = {"vocab_size": model.num_tokens, "torch_dtype": dtype, "dtype": dtype, **{k: drawing.get(k) for k in IDS}}
    outer, inner = model.config, model.attn_layers.config
    for name, family in FAMILIES.items():
        fields = family.write(model, name)
        if fields is None:
            continue
        config = {"architectures": [family.architecture], "model_type": name, **shared, **fields, "use_cache": True,
                  "tie_word_embeddings": model.to_logits is None, "initializer_range": 0.02}
        if name != "gpt2":
            config["max_position_embeddings"] = model.max_seq_len
        if _function(*family.read(Config(config, "config.json", name))) == _function(outer, inner):
            return config, layout(name, model)
    return {"architectures": ["XalignForCausalLM"], "model_type": "xalign", "max_position_embeddings": model.max_seq_len,
            **shared, "xalign": {**outer, "attn_layers": inner}}, layout("xalign", model)


def from_hf(config: Fields, where: str) -> tuple[TransformerWrapper, Layout]:
    """An untrained model of a config.json, and the layout of its folder.

    Raises `CheckpointError` for what we don't compute; `where` names the file.
    """
    name = str(config.get("model_type"))
    try:
        if name == "xalign":
            options = dict(config["xalign"])
            outer, inner = options, options.pop("attn_layers")
        else:
            family = FAMILIES.get(name)
            read = Config(config, where, name)
            read.refuse_foreign(family.own if family else tuple(_ELSEWHERE))
            if family is None:
                why = f" ({_WHY[name]})" if name in _WHY else ""
                raise CheckpointError(f"{where}: model_type is {name!r}{why}, allowed is {', '.join(FAMILIES)} or xalign")
            outer, inner = family.read(read)
            inner["attn_flash"] = True
        model = TransformerWrapper(**outer, attn_layers=Decoder(**inner))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return model, layout(name, model)


def is_reward(config: Fields) -> bool:
    """Whether a config.json says that its folder holds a classifier, such as a reward model."""
    named = config.get("architectures")
    return isinstance(named, list) and any(str(name).endswith("ForSequenceClassification") for name in named)


def reward_to_hf(model: RewardModel, tokenizer: Any = None) -> tuple[Fields, Layout]:
    """The same as `to_hf` for a reward model: transformers' `AutoModelForSequenceClassification` with one label.

    It reads the last token that isn't `pad_token_id`, so that must be none that a text ends with: `Tokenizer.padded_apart`.
    """
    config, base = to_hf(model.net, tokenizer)
    name = config["architectures"][0].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    config |= {"architectures": [f"{name}ForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
               "value_head_prefix": "score", "mean": model.mean, "std": model.std, "normalize_reward": model.normalize_reward}
    if tokenizer is not None:  # without such a token they refuse batches, which is better than another token's reward
        config["pad_token_id"] = None if tokenizer.padded_apart() is None else tokenizer.pad_id
    return config, reward_layout(base, "score")


def reward_from_hf(config: Fields, where: str, prefix: str | None = None) -> tuple[RewardModel, Layout]:
    """An untrained reward model of a config.json, and the layout of its folder, whose head is `prefix` (None: as it says).

    `mean`, `std` and `value_head_prefix` are OpenRLHF's fields. Raises as `from_hf` does.
    """
    net, base = from_hf(config, where)
    net.to_logits, net.config["tie_embedding"] = None, True
    model, read = RewardModel(net), Config(config, where, "")
    model.mean, model.std = float(read.number("mean", 0.0)), float(read.number("std", 1.0))
    model.normalize_reward = read.flag("normalize_reward")
    if model.normalize_reward and not {"mean", "std"} <= config.keys():
        raise CheckpointError(f"{where}: normalize_reward is true without mean and std, allowed is all three")
    if not math.isfinite(model.mean) or not 0 < model.std < math.inf:
        raise CheckpointError(f"{where}: mean is {model.mean} and std {model.std}, allowed is a finite mean and std > 0")
    prefix = prefix or config.get("value_head_prefix") or "score"
    if not isinstance(prefix, str):
        raise read.wrong("value_head_prefix", prefix, "the name of a tensor without its .weight")
    return model, reward_layout(base, prefix)


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by torch's name ('bfloat16'), one of the short names, or None."""
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    dtype = getattr(torch, short.get(name, name), None) if isinstance(name, str) else name
    if name is not None and dtype not in FLOATS:
        raise CheckpointError(f"dtype is {name!r}, allowed is {FLOAT_NAMES}")
    return dtype
