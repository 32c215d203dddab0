"""Every Hugging Face family against transformers' own model: values, greedy text, both directions, and what is refused."""

import json

import pytest
import torch
from conftest import LLAMA as OURS
from conftest import ids, imported, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from xalign import AutoregressiveWrapper, load_pretrained, save_pretrained
from xalign.errors import CheckpointError
from xalign.families import layout
from xalign.hf import FAMILIES, from_hf, to_hf
from xalign.nn.rotary import check_scaling, frequencies, magnitude

V = 37
LLAMA = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
QWEN3 = LLAMA | {"head_dim": 16}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
NEOX = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}

# name -> model type and configuration; the original range of the stretched ones is 16 or 32 of 128 positions
PEERS = {
    "llama": ("llama", LLAMA),
    "llama tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "llama own head": ("llama", LLAMA | {"head_dim": 12, "num_key_value_heads": 1}),
    "llama biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    "llama gelu": ("llama", LLAMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama linear": ("llama", LLAMA | {"rope_parameters": LINEAR}),
    "llama llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", LLAMA | {"rope_parameters": YARN}),
    "llama yarn betas": ("llama", LLAMA | {"head_dim": 16, "rope_parameters": YARN | {
        "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3, "truncate": False}}),
    "llama yarn mscales": ("llama", LLAMA | {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.7}}),
    "llama yarn whole": ("llama", LLAMA | {"rope_parameters": YARN | {"original_max_position_embeddings": 128}}),
    "llama dynamic": ("llama", LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0}}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 9}),
    "mistral two": ("mistral", LLAMA | {"sliding_window": 2}),
    "mistral whole": ("mistral", LLAMA | {"sliding_window": None, "head_dim": 10}),
    "mistral yarn": ("mistral", LLAMA | {"sliding_window": 30, "rope_parameters": YARN}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2 tied window": ("qwen2", LLAMA | WINDOW | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", QWEN3),
    "qwen3 bias window": ("qwen3", QWEN3 | WINDOW | {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3 yarn": ("qwen3", QWEN3 | {"rope_parameters": YARN}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu",
                                    "layer_norm_epsilon": 1e-3}),
    "neox": ("gpt_neox", NEOX),
    "neox sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True,
                                            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "neox no bias": ("gpt_neox", NEOX | {"attention_bias": False, "hidden_act": "gelu_fast",
                                         "rope_parameters": LINEAR | {"partial_rotary_factor": 1.0}}),
}
EVERY = pytest.mark.parametrize("name", PEERS)


def peer(model_type, fields, seed=0):
    """A random transformers model in eval mode with logits far from flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **({"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
                                                  "pad_token_id": None} | json.loads(json.dumps(fields))))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def left_padded(lengths, width):
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids(len(lengths), width, V).masked_fill(~mask, 0), mask


def theirs_on(model, tokens, mask):
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return model(tokens, attention_mask=mask.long(), position_ids=positions).logits


def meaning(config):
    """A configuration as transformers understands it."""
    from transformers import AutoConfig

    fields = AutoConfig.for_model(**config).to_dict()
    remarks = ("transformers_version", "architectures", "_name_or_path", "initializer_range", "dtype", "torch_dtype",
               "max_window_layers", "rope_theta")  # layer_types and rope_parameters say the last two
    if "n_embd" in fields:
        fields["n_inner"] = fields["n_inner"] or 4 * fields["n_embd"]
    else:
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    for key in ("hidden_act", "activation_function"):
        if fields.get(key) in ("gelu_pytorch_tanh", "gelu_fast"):  # the same formula
            fields[key] = "gelu_new"
    return {k: v for k, v in fields.items() if k not in remarks and not k.endswith("pdrop")}


@EVERY
def test_logits_and_greedy_text_are_theirs(name):
    """fp32 within 1e-4, at all lengths, left-padded; 64 greedy tokens a row, past the original range."""
    with torch.no_grad():
        theirs = peer(*PEERS[name])
        ours = imported(theirs)
        tokens, mask = left_padded([100, 71, 3], 100)
        expected = theirs_on(theirs, tokens, mask)[mask]
        assert expected.std() > 0.5, "the logits are flat"
        assert (ours(tokens, mask=mask)[mask] - expected).abs().max() < 1e-4
        assert (ours(tokens[:1]) - theirs(tokens[:1]).logits).abs().max() < 1e-4
        tokens, mask = left_padded([20, 13, 4], 20)
        text = theirs.generate(tokens, attention_mask=mask.long(), max_new_tokens=64, min_new_tokens=64, do_sample=False,
                               pad_token_id=0)[:, 20:]
        rows = [row[m] for row, m in zip(tokens, mask, strict=True)]
        assert torch.equal(AutoregressiveWrapper(ours).generate(rows, 64, temperature=0.0), text)
        assert len(text.unique()) > 4


@EVERY
def test_half_precision_logits_are_theirs(name):
    """Within 2e-2 of theirs, and no further from the exact values than theirs are (they rotate in bf16, we in fp32)."""
    with torch.no_grad():
        theirs = peer(*(PEERS[name][0], PEERS[name][1] | {"initializer_range": 0.15}))
        tokens, frequencies = ids(2, 100, V), {k: v.clone() for k, v in theirs.named_buffers() if "inv_freq" in k}
        ours = imported(theirs).bfloat16()
        exact = theirs(tokens).logits
        theirs.bfloat16()
        for key, value in frequencies.items():  # as their from_pretrained leaves them: .bfloat16() rounds them (trap 13)
            theirs.get_submodule(key.rpartition(".")[0]).register_buffer(key.rpartition(".")[2], value, persistent=False)
        expected, out = theirs(tokens).logits.float(), ours(tokens).float()
    assert (out - expected).norm() / expected.norm() < 2e-2
    assert (out - exact).norm() <= 1.05 * (expected - exact).norm()


@EVERY
def test_there_and_back_is_the_same_folder(name, tmp_path):
    """Theirs -> ours -> theirs: tensors byte by byte, and the configuration means the same."""
    from transformers import AutoModelForCausalLM

    theirs = peer(*PEERS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    save_pretrained(load_pretrained(tmp_path / "theirs")[0], tmp_path / "ours")
    (config, tensors), (written, back) = (
        (json.loads((tmp_path / side / "config.json").read_text()), load_file(tmp_path / side / "model.safetensors"))
        for side in ("theirs", "ours"))
    if (name, written["model_type"]) != ("mistral whole", "llama"):  # without a window it is one
        assert written["model_type"] == PEERS[name][0] and meaning(written) == meaning(config)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == back[key].dtype and torch.equal(tensor, back[key]), key
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    tokens = ids(2, 100, V)
    with torch.no_grad():
        off = (again(tokens).logits - theirs(tokens).logits).abs().max()
    assert off <= (1e-5 if "gelu_fast" in PEERS[name][1].values() else 0)  # their three spellings of tanh's GELU round apart


def test_splitting_gives_views_where_it_can():
    """A fused or transposed tensor of a memory-mapped file is not copied by looking at it; NeoX's mix must be."""
    for name in ("gpt2", "llama", "neox"):
        ours, found = from_hf({"model_type": PEERS[name][0]} | PEERS[name][1], "a test")
        state = ours.state_dict()
        for entry in found.entries:
            tensor = entry.join([state[k] for k in entry.ours]).contiguous()
            parts = entry.split(tensor)
            assert all(torch.equal(part, state[k]) for part, k in zip(parts, entry.ours, strict=True))
            if not (name == "neox" and len(entry.ours) > 1):
                assert all(p.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for p in parts)


@pytest.mark.parametrize("name, found, expected", [
    ("gpt2", "h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"),
    ("gpt2", "wte.weight", "transformer.wte.weight"), ("gpt2", "transformer.wte.weight", "transformer.wte.weight"),
    ("gpt2", "h.0.attn.bias", None), ("gpt2", "transformer.h.1.attn.masked_bias", None), ("gpt2", "lm_head.weight", None),
    ("gpt2", "transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias"),
    ("gpt2 untied", "lm_head.weight", "lm_head.weight"), ("gpt2", "h.2.ln_1.weight", "h.2.ln_1.weight"),
    ("llama", "embed_tokens.weight", "model.embed_tokens.weight"), ("llama", "lm_head.weight", "lm_head.weight"),
    ("llama tied", "lm_head.weight", None), ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ("llama", "rotary_emb.inv_freq", None), ("llama", "model.layers.0.self_attn.q_proj.bias",
                                             "model.layers.0.self_attn.q_proj.bias"),
    ("neox", "layers.1.attention.dense.bias", "gpt_neox.layers.1.attention.dense.bias"),
    ("neox", "gpt_neox.layers.0.attention.bias", None), ("neox", "gpt_neox.layers.0.attention.masked_bias", None),
    ("neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", None), ("neox", "lm_head.weight", "embed_out.weight"),
    ("neox sequential", "embed_out.weight", None), ("neox sequential", "lm_head.weight", None),
    ("llama", "score.weight", "score.weight"),
])
def test_names_found_in_folders(name, found, expected):
    _, known = from_hf({"model_type": PEERS[name][0]} | PEERS[name][1], "a test")
    assert known.canonical(found) == expected


# ---- configurations

@settings(max_examples=100)
@given(st.sampled_from([8, 20, 64, 128]), st.sampled_from([100.0, 1e4, 5e5]), st.floats(1, 40), st.integers(8, 10**5),
       st.floats(0.1, 4), st.floats(1.1, 20), st.floats(0.1, 3), st.sampled_from(["linear", "llama3", "yarn", "dynamic"]),
       st.sets(st.sampled_from(["truncate", "beta", "attention_factor", "mscale"])))
def test_frequencies_are_theirs(dim, base, factor, original, low, ratio, mscale, kind, extras):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = original
    if kind == "llama3":
        scaling |= {"low_freq_factor": low, "high_freq_factor": low * ratio}
    if kind == "yarn":
        every = {"truncate": {"truncate": False}, "beta": {"beta_slow": low, "beta_fast": low * ratio},
                 "attention_factor": {"attention_factor": mscale}, "mscale": {"mscale": mscale, "mscale_all_dim": low}}
        scaling |= {k: v for extra in extras for k, v in every[extra].items()}
    check_scaling(scaling, base)
    said = {k: v for k, v in scaling.items() if kind != "dynamic" or "original" not in k}
    config = LlamaConfig(head_dim=dim, max_position_embeddings=original, rope_parameters={"rope_theta": base, **said})
    expected, size = ROPE_INIT_FUNCTIONS[kind](config)
    torch.testing.assert_close(frequencies(dim, base, scaling, torch.device("cpu")), expected, rtol=2e-6, atol=0)
    assert magnitude(scaling) == pytest.approx(size)


NEOX_SHAPE = {"rotary_pos_emb": True, "attn_qkv_bias": True, "attn_out_bias": True}


def v4(config):
    """The same configuration as transformers 4 spells it."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    if "partial_rotary_factor" in rope:
        config |= {"rotary_pct": rope.pop("partial_rotary_factor"), "rotary_emb_base": config.pop("rope_theta")}
    rope["type"] = rope.pop("rope_type")
    return config | {"rope_scaling": None if rope["type"] == "default" else rope}


@pytest.mark.parametrize("name", [n for n in PEERS if "gpt2" not in n])
def test_both_spellings_of_the_rotary_fields(name):
    new = peer(*PEERS[name]).config.to_dict()
    options = [from_hf(c, "a test")[0].attn_layers.config for c in (new, v4(dict(new)))]
    assert options[0] == options[1]
    written = to_hf(from_hf(new, "a test")[0])[0]
    assert written["dtype"] == written["torch_dtype"] == "float32"
    for left_out in ("rope_parameters", "rope_scaling"):  # either spelling alone says it all
        partly = {k: v for k, v in written.items() if k != left_out}
        assert from_hf(partly, "a test")[0].attn_layers.config == options[0]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_missing_fields_have_their_familys_defaults(model_type):
    """A config.json may leave out what equals the default: ours must be theirs (mind Mistral's window and key heads)."""
    from transformers import AutoConfig

    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 32} if model_type == "gpt2" else {
        "hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 32, "intermediate_size": 8}
    bare = {"model_type": model_type, "vocab_size": 5, **sizes}
    full = AutoConfig.for_model(**bare).to_dict()
    with torch.device("meta"):
        ours, whole = (from_hf(c, "a test")[0] for c in (bare, full))
    assert ours.attn_layers.config == whole.attn_layers.config and ours.config == whole.config


def test_rotary_and_dropout_rates_that_are_taken_over():
    assert from_hf({"model_type": "llama", **LLAMA, "attention_dropout": 0.1}, "x")[0].attn_layers.config["attn_dropout"] == 0.1
    for model_type, fields in (("gpt2", GPT2), ("gpt_neox", NEOX | {"hidden_dropout": 0.1})):
        ours = from_hf({"model_type": model_type, **fields}, "x")[0]
        assert not any(v for k, v in (ours.config | ours.attn_layers.config).items() if k.endswith("dropout"))


class Ids:
    bos_id, eos_id, pad_id = 1, 2, 0


def test_special_ids_come_from_the_tokenizer():
    config, _ = to_hf(tiny(), Ids())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)


SHAPES = st.fixed_dictionaries({
    "heads": st.sampled_from([2, 4]), "attn_kv_heads": st.sampled_from([None, 1, 2]), "attn_dim_head": st.sampled_from([8, 16]),
    "attn_qk_norm": st.booleans(), "attn_qkv_bias": st.booleans(), "attn_out_bias": st.booleans(),
    "rotary_pos_emb": st.booleans(), "rotary_dim": st.sampled_from([None, 2, 8]), "use_rmsnorm": st.booleans(),
    "ff_glu": st.booleans(), "ff_swish": st.booleans(), "ff_no_bias": st.booleans(), "parallel_residual": st.booleans(),
    "attn_sliding_window": st.sampled_from([None, None, 5]), "tie_embedding": st.booleans(), "dim": st.sampled_from([32, 24]),
    "alibi_pos_bias": st.sampled_from([False, False, False, True]), "ff_inner_dim": st.sampled_from([None, 20])})


@settings(max_examples=40)
@given(st.sampled_from(["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "any"]), SHAPES)
def test_any_model_of_ours_comes_back(kind, shape):
    """Whatever the options, and transformers agrees where a family is named."""
    from transformers import AutoConfig, AutoModelForCausalLM

    llama = {"rotary_pos_emb": True, "rotary_dim": None, "use_rmsnorm": True, "ff_glu": True, "ff_no_bias": True,
             "parallel_residual": False, "alibi_pos_bias": False, "attn_qk_norm": False, "attn_out_bias": False}
    gpt = {"use_rmsnorm": False, "ff_glu": False, "ff_no_bias": False, "attn_kv_heads": None, "attn_qk_norm": False,
           "attn_qkv_bias": True, "attn_out_bias": True, "attn_sliding_window": None, "heads": 4, "attn_dim_head": 8, "dim": 32,
           "alibi_pos_bias": False}
    shape = shape | {"llama": llama | {"attn_qkv_bias": False}, "qwen2": llama | {"attn_qkv_bias": True},
                     "qwen3": llama | {"attn_qk_norm": True, "attn_qkv_bias": False},
                     "gpt2": gpt | {"rotary_pos_emb": False, "parallel_residual": False},
                     "gpt_neox": gpt | {"rotary_pos_emb": True}, "any": {}}[kind]
    if shape["rotary_pos_emb"] and shape["alibi_pos_bias"]:
        shape["alibi_pos_bias"] = False
    model, tokens = tiny(sharp=8.0, **shape), ids(2, 20)
    config, found = to_hf(model)
    assert kind == "any" or config["model_type"] != "xalign"
    state, again = model.state_dict(), from_hf(json.loads(json.dumps(config)), "a test")[0].eval()
    tensors = {e.file: e.join([state[k] for k in e.ours]) for e in found.entries}
    again.load_state_dict({k: v for e in found.entries for k, v in zip(e.ours, e.split(tensors[e.file]), strict=True)})
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), model(tokens), atol=1e-5, rtol=1e-5)
        if config["model_type"] != "xalign":
            theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
            if config["model_type"] == "gpt_neox":
                tensors = {k.replace("embed_out", "lm_head"): v for k, v in tensors.items()}
            report = theirs.load_state_dict(tensors, strict=False)
            assert not report.unexpected_keys and set(report.missing_keys) <= ({"lm_head.weight"} if shape["tie_embedding"]
                                                                               else set())
            torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


def test_heads_that_do_not_divide_the_width_make_a_mistral():
    """transformers 5 opens no Llama of this shape, though it would compute it; a Mistral without a window is the same."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny(**OURS, dim=32, heads=3)
    config, found = to_hf(model)
    assert config["model_type"] == "mistral" and config["sliding_window"] is None
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    theirs.load_state_dict({e.file: model.state_dict()[e.ours[0]] for e in found.entries})
    torch.testing.assert_close(theirs(ids(2, 9)).logits, model(ids(2, 9)), atol=1e-5, rtol=1e-5)


def test_any_part_of_a_head_that_neox_can_rotate_comes_back():
    for head, part in ((44, 30), (16, 4), (128, 128), (98, 2)):  # 44 * (30 / 44) is 29.999...
        model = tiny(**NEOX_SHAPE, heads=1, dim=head, attn_dim_head=head, rotary_dim=part)
        config, _ = to_hf(model)
        assert config["model_type"] == "gpt_neox" and from_hf(config, "x")[0].attn_layers.config["rotary_dim"] == part


@pytest.mark.parametrize("name", ["xalign", *FAMILIES])
def test_a_layout_covers_every_parameter_once(name):
    model = tiny() if name == "xalign" else from_hf({"model_type": name, **{
        "gpt2": GPT2, "gpt_neox": NEOX}.get(name, LLAMA)}, "a test")[0]
    ours = [k for e in layout(name, model).entries for k in e.ours]
    assert sorted(ours) == sorted(model.state_dict())


# ---- what is refused

@pytest.mark.parametrize("model_type, fields, words", [
    ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("gemma2", {}, "model_type is 'gemma2' (logit softcapping), allowed is llama, mistral, qwen2, qwen3, gpt2, gpt_neox"),
    ("olmo2", {}, "model_type is 'olmo2' (norms behind the layers)"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers is [1, 1, 1, 0]"),
    ("bert", {}, "model_type is 'bert', allowed is llama"), ("None", {}, "model_type is 'None'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ("llama", {"num_local_experts": 8}, "num_local_experts is 8"), ("llama", {"num_experts": 4}, "num_experts is 4"),
    ("llama", {"logit_scale": 0.25}, "logit_scale is 0.25"), ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"), ("llama", {"scale_emb": 12}, "scale_emb"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier"), ("llama", {"attention_multiplier": 0.01}, "attention_mult"),
    ("llama", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"), ("qwen3", {"use_qk_norm": True}, "use_qk_norm"),
    ("llama", {"qk_layernorm": True}, "qk_layernorm"), ("llama", {"clip_qkv": 8.0}, "clip_qkv"),
    ("llama", {"is_causal": False}, "is_causal is False"), ("llama", {"use_bidirectional_attention": True}, "bidirectional"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama", {"sliding_window": 8}, "sliding_window is 8"), ("mistral", {"attention_bias": True}, "attention_bias is True"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias is True"), ("qwen2", {"attention_bias": False}, "attention_bias is False"),
    ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu', allowed is silu, swish, gelu, gelu_new"),
    ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "rope_type is 'longrope'"),
    ("llama", {"rope_scaling": {"type": "su", "factor": 1.0}}, "rope_type is 'su', allowed is default, linear"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2', allowed is a finite number >= 1"),
    ("llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section is [1]"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fats": 3}}, "did you mean 'beta_fast'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
     "high_freq_factor is 4.0"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
     "factor is 2.0 in one place and 4.0 in another"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
     "rope_type is 'linear' in one place and 'default' in another"),
    ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta is 10000.0 in"),
    ("gpt_neox", {"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.5 in"),
    ("gpt_neox", {"rotary_pct": 0.2}, "rotary_dim is 3"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
     "original_max_position_embeddings is 64"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "max_window_layers is 1"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
     "layer_types is ['full_attention', 'sliding_attention']"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types is ['sliding_att"),
    ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, "layer_types is ['full_att"),
    ("llama", {"layer_types": ["linear_attention"] * 2}, "layer_types is ['linear_att"),
    ("mistral", {"sliding_window": -1}, "attn_sliding_window is -1"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', allowed is true or false"),
    ("llama", {"intermediate_size": None}, "intermediate_size is missing, allowed is a whole number >= 1"),
    ("mistral", {"head_dim": 0}, "head_dim is 0"), ("qwen3", {"vocab_size": "9"}, "vocab_size is '9'"),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types is 'a list of 1 kinds', allowed is a list of num"),
    ("llama", {"layer_types": "full_attention"}, "layer_types is 'full_attention', allowed is a list of num_hidden_layers = 2"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear', allowed is null or an object: {\"rope_type\""),
    ("llama", {"rope_parameters": [1]}, "rope_parameters is [1], allowed is null or an object"),
    ("llama", {"rope_theta": "10000"}, "rope_theta is '10000', allowed is a number"),
    ("gpt_neox", {"rotary_pct": "1"}, "partial_rotary_factor is '1', allowed is a number"),
    ("llama", {"rope_scaling": {"rope_type": ["linear"]}}, "rope_type is ['linear'], allowed is default, linear"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act is ['silu'], allowed is silu, swish"),
    ("llama", {"attention_dropout": "a"}, "attention_dropout is 'a', allowed is a number"),
    ("gpt_neox", {"attention_dropout": [0.1]}, "attention_dropout is [0.1], allowed is a number"),
    ("mistral", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', allowed is a number"),
])
def test_what_is_not_computed_is_refused_by_name(model_type, fields, words):
    base = {"gpt2": GPT2, "gpt_neox": NEOX}.get(model_type, LLAMA)
    with pytest.raises(CheckpointError) as error:
        from_hf({"model_type": model_type} | base | fields, "there/config.json")
    message = str(error.value)
    assert message.startswith("there/config.json: ") and words in message and "\n" not in message and len(message) < 250


@pytest.mark.parametrize("model_type, word", [
    ("gemma2", "attn_logit_softcapping"), ("olmo2", "norms behind the layers"), ("smollm3", "no_rope_layers"),
    ("mixtral", "num_local_experts"), ("qwen3_moe", "moe_intermediate_size"), ("gemma", "scaled embeddings"),
    ("cohere", "logit_scale"), ("granite", "attention_multiplier"), ("phi3", "fused projections"), ("gptj", "gptj"),
    ("gpt_neo", "local attention"), ("stablelm", "stablelm"), ("t5", "is_encoder_decoder"), ("falcon", "falcon"),
    ("deepseek_v3", "kv_lora_rank"), ("llama4_text", "attention_chunk_size"), ("bloom", "bloom"), ("glm4", "glm4")])
def test_transformers_other_families_are_refused(model_type, word):
    """Their own default configurations, whole; what is odd about a family is named."""
    from transformers import AutoConfig

    with pytest.raises(CheckpointError) as error:
        from_hf(AutoConfig.for_model(model_type).to_dict(), "there")
    assert word in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=300)
@given(st.sampled_from(sorted(PEERS)), st.data())
def test_a_field_of_a_wrong_kind_never_passes(name, data):
    """A string, list or object where a number or a flag belongs, also among the rotary fields."""
    config = json.loads(json.dumps({"model_type": PEERS[name][0]} | PEERS[name][1]))
    fields = config.get("rope_parameters", config) if data.draw(st.booleans()) else config
    key = data.draw(st.sampled_from(sorted(fields.keys() - {"rope_parameters"})))
    fields[key] = data.draw(st.sampled_from(["x", "", [], {}, [1], {"a": 1}]))
    with torch.device("meta"), pytest.raises((CheckpointError, TypeError, ValueError, AttributeError)):  # one line, in loading
        from_hf(config, "a test")


def test_dynamic_rope_ends_at_its_original_length():
    """Past it transformers' own cached and uncached values differ; ours are refused, padding not counted."""
    ours = from_hf({"model_type": "llama", **LLAMA, "max_position_embeddings": 16,
                    "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "a test")[0].eval()
    assert ours(ids(1, 16, V)).isfinite().all()
    tokens, mask = left_padded([16, 9], 20)
    assert ours(tokens, mask=mask).isfinite().all()
    with pytest.raises(ValueError, match="17 tokens, but dynamic RoPE goes up to its original length, 16"):
        ours(ids(1, 17, V))
    _, cache = ours(ids(1, 16, V), return_intermediates=True)
    with pytest.raises(ValueError, match="17 tokens"):
        ours(ids(1, 1, V), cache=cache, input_not_include_cache=True)
    assert AutoregressiveWrapper(ours).generate(ids(1, 10, V), 30, temperature=0.0).shape == (1, 30)  # the window moves
