"""The models that are compared: one set of random Llama weights in transformers, in xalign and in x-transformers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from xalign import AutoregressiveWrapper, TransformerWrapper, hf
from xalign.nn.quantize import quantize

Run = Callable[[int], Tensor]  # number of new tokens -> tokens (b, n)
FORMATS = ("fp32", "bf16", "int8", "int4")
SAMPLERS: dict[str, dict[str, Any]] = {
    "full": {"top_k": 50, "top_p": 0.9, "min_p": 0.05}, "pure top-p": {"top_p": 0.9}, "plain": {}}


def llama(vocab: int, depth: int = 12, dim: int = 512, inner: int = 1376, heads: int = 8, kv_heads: int | None = None,
          tied: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama of transformers; without an end token, so that none of its steps looks for one.

    Its norms' epsilon is next to nothing, as x-transformers' is: the weights then give the same logits in all three. With
    matrices of N(0, .05) instead of the usual .02 greedy texts go on and on, instead of repeating themselves after a few words.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=kv_heads or heads,
        intermediate_size=inner, vocab_size=vocab, max_position_embeddings=2048, tie_word_embeddings=tied, rms_norm_eps=1e-12,
        initializer_range=0.05,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def ours_of(theirs: LlamaForCausalLM) -> TransformerWrapper:
    """xalign's model with these weights, which it shares: no second copy."""
    tensors = theirs.state_dict()
    with torch.device("meta"):
        ours, layout = hf.from_hf(theirs.config.to_dict(), "benchmarks")
    ours.load_state_dict({e.ours[0]: tensors[e.file] for e in layout.entries}, assign=True)
    return ours.eval().requires_grad_(False)


def x_transformers_of(theirs: LlamaForCausalLM) -> Any:
    """x-transformers' AutoregressiveWrapper with these weights.

    It rotates neighbouring features, Llama the halves of a head: the rows of queries and keys are put in that order. It adds
    1 to the scale of a norm.
    """
    import x_transformers

    c, found = theirs.config, theirs.state_dict()
    dim, heads = c.hidden_size, c.num_attention_heads
    e = dim // heads
    model = x_transformers.TransformerWrapper(
        num_tokens=c.vocab_size, max_seq_len=c.max_position_embeddings, attn_layers=x_transformers.Decoder(
            dim=dim, depth=c.num_hidden_layers, heads=heads, attn_dim_head=e, rotary_pos_emb=True, rotary_emb_dim=e,
            use_rmsnorm=True, attn_flash=True, ff_glu=True, ff_swish=True, ff_no_bias=True, ff_mult=c.intermediate_size / dim))

    def pairs(weight: Tensor) -> Tensor:
        return weight.view(heads, 2, e // 2, dim).transpose(1, 2).reshape(dim, dim)

    state = {"token_emb.emb.weight": found["model.embed_tokens.weight"], "to_logits.weight": found["lm_head.weight"],
             "attn_layers.final_norm.g": found["model.norm.weight"] - 1}
    for i in range(c.num_hidden_layers):
        here, attn, ff = f"model.layers.{i}.", f"attn_layers.layers.{2 * i}.", f"attn_layers.layers.{2 * i + 1}."
        state |= {
            attn + "0.0.g": found[here + "input_layernorm.weight"] - 1,
            attn + "1.to_q.weight": pairs(found[here + "self_attn.q_proj.weight"]),
            attn + "1.to_k.weight": pairs(found[here + "self_attn.k_proj.weight"]),
            attn + "1.to_v.weight": found[here + "self_attn.v_proj.weight"],
            attn + "1.to_out.weight": found[here + "self_attn.o_proj.weight"],
            ff + "0.0.g": found[here + "post_attention_layernorm.weight"] - 1,
            ff + "1.ff.0.proj.weight": torch.cat([found[here + f"mlp.{name}_proj.weight"] for name in ("up", "gate")]),
            ff + "1.ff.0.proj.bias": torch.zeros(2 * c.intermediate_size),
            ff + "1.ff.2.weight": found[here + "mlp.down_proj.weight"]}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and not [name for name in missing if "inv_freq" not in name], (missing, unknown)
    return x_transformers.AutoregressiveWrapper(model).eval()


def half(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(model).bfloat16()


def formats_of(net: TransformerWrapper) -> dict[str, AutoregressiveWrapper]:
    """The same weights in FORMATS."""
    nets = (net, copy.deepcopy(net).bfloat16(), quantize(copy.deepcopy(net), 8), quantize(copy.deepcopy(net), 4))
    return {name: AutoregressiveWrapper(n) for name, n in zip(FORMATS, nets, strict=True)}


def texts(rows: Tensor, ends: list[int]) -> list[list[int]]:
    """Rows of new tokens, each up to its first end: what stands behind differs."""
    ended = torch.isin(rows, torch.tensor(ends))
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, rows.shape[1]).tolist()
    return [row[:n] for row, n in zip(rows.tolist(), lengths, strict=True)]


def xalign(wrapper: AutoregressiveWrapper, prompt: Tensor, sampler: str | None = None, **options: Any) -> Run:
    """Greedy where no sampler is named."""
    options |= {"temperature": 0.0} if sampler is None else {"seed": 0, **SAMPLERS[sampler]}
    return lambda n: wrapper.generate(prompt, n, **options)


def stepping(wrapper: AutoregressiveWrapper, prompt: Tensor, steps: int, sampler: str | None = None) -> Iterator[None]:
    """`xalign`'s run, a step at each `next`; in `wrapper._decoding()`."""
    options: dict[str, Any] = {"temperature": 0.0} if sampler is None else {"seed": 0, **SAMPLERS[sampler]}
    return wrapper._engine(prompt, steps, **options).run()


def transformers(model: LlamaForCausalLM, prompt: Tensor, sampler: str | None = None, **options: Any) -> Run:
    if sampler is None:
        options |= {"do_sample": False}
    else:
        options |= {"do_sample": True, "top_k": 0, **SAMPLERS[sampler]}
    options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    return lambda n: model.generate(prompt, max_new_tokens=n, **options)[:, prompt.shape[1] :]


def x_transformers(wrapper: Any, prompt: Tensor, sampler: str | None = None) -> Run:
    from x_transformers.autoregressive_wrapper import min_p, top_k, top_p

    filters = {"top_k": lambda x, k: top_k(x, k=k), "top_p": lambda x, p: top_p(x, thres=p), "min_p": lambda x, p: min_p(x, p)}

    def filtered(logits: Tensor) -> Tensor:
        for name, value in SAMPLERS[sampler or "plain"].items():
            logits = filters[name](logits, value)
        return logits

    return lambda n: wrapper.generate(prompt, n, temperature=float(sampler is not None), filter_logits_fn=filtered)
