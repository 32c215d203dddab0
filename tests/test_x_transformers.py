"""x-transformers' users change the import only: its calls run here, with its numbers where it is right, and not its traps.

Traps 1 to 17 are those of reference/traps.md; a test of ours for each is here or in the file of its subject, and
`test_every_trap_has_a_test` counts them. The divergences are listed in docs/x-transformers.md.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ids
from torch import nn

import xalign
from xalign import sampling

x_transformers = pytest.importorskip("x_transformers")
BOTH = pytest.mark.parametrize("lib", [xalign, x_transformers], ids=["xalign", "x_transformers"])
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def build(lib, outer=(), **inner):
    torch.manual_seed(0)
    return lib.TransformerWrapper(**({"num_tokens": 17, "max_seq_len": 32} | dict(outer)),
                                  attn_layers=lib.Decoder(**({"dim": 64, "depth": 2, "heads": 2} | inner)))


# ---- the README's calls, import apart

OPTIONS = {
    "plain": {}, "rotary": {"rotary_pos_emb": True}, "alibi": {"alibi_pos_bias": True}, "rmsnorm": {"use_rmsnorm": True},
    "swiglu": {"ff_glu": True, "ff_swish": True, "ff_no_bias": True}, "grouped": {"attn_kv_heads": 1},
    "flash": {"attn_flash": True}, "dropout": {"attn_dropout": 0.1, "ff_dropout": 0.1}, "qk norm": {"attn_qk_norm": True},
    "width": {"ff_mult": 2, "attn_dim_head": 32},
}


@BOTH
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_construct_train_and_generate(lib, options):
    model = lib.TransformerWrapper(
        num_tokens=32,
        max_seq_len=24,
        emb_dropout=0.1,
        attn_layers=lib.Decoder(dim=64, depth=2, heads=2, **options),
    )
    x = torch.randint(0, 32, (2, 24))
    assert model(x).shape == (2, 24, 32)
    wrapped = lib.AutoregressiveWrapper(model)
    loss = wrapped(x)
    loss.backward()
    assert loss.shape == () and 2 < loss.item() < 6
    sample = wrapped.generate(prompts=x[:, :5], seq_len=9, temperature=0.9, cache_kv=True)
    assert sample.shape == (2, 9)


@BOTH
@pytest.mark.parametrize("outer", [{"tie_embedding": True}, {"use_abs_pos_emb": False}, {"emb_dropout": 0.1}])
def test_wrapper_options(lib, outer):
    assert build(lib, outer)(ids(2, 8)).shape == (2, 8, 17)


@BOTH
def test_masks_and_intermediates(lib):
    model, x = build(lib, rotary_pos_emb=True).eval(), ids(1, 8)
    assert model(x, mask=torch.ones_like(x).bool()).shape == (1, 8, 17)
    logits, cache = model(x, return_intermediates=True)
    again, _ = model(torch.cat((x, x[:, :1]), 1), cache=cache, return_intermediates=True)
    assert logits.shape == (1, 8, 17) and again.shape[0] == 1
    assert model(x, return_embeddings=True).shape == (1, 8, 64)


@BOTH
def test_generate_with_filters(lib):
    filters = sampling if lib is xalign else x_transformers.autoregressive_wrapper
    wrapped, prompts = lib.AutoregressiveWrapper(build(lib)), ids(3, 4)
    for name, kwargs in (("top_k", {"frac_num_tokens": 0.3}), ("top_k", {"k": 4}), ("top_p", {"thres": 0.8}),
                         ("min_p", {"min_p": 0.1}), ("top_a", {"min_p_pow": 2.0, "min_p_ratio": 0.02})):
        for f in (name, getattr(filters, name)):
            assert wrapped.generate(prompts, 5, filter_logits_fn=f, filter_kwargs=kwargs).shape == (3, 5)
    assert wrapped.generate(prompts, seq_len=5, eos_token=3, temperature=0.0).shape[0] == 3
    assert wrapped.generate(prompts[0], 5).shape == (5,)


@BOTH
def test_greedy_is_the_same_with_and_without_the_cache(lib):
    wrapped = lib.AutoregressiveWrapper(build(lib, rotary_pos_emb=True))
    a, b = (wrapped.generate(ids(2, 6), 12, temperature=0.0, cache_kv=cached) for cached in (True, False))
    assert torch.equal(a, b)


@BOTH
def test_key_value_cache_parity(lib):
    """Logits of the last token, cached step by step, are those of the whole text."""
    model, x = build(lib, rotary_pos_emb=True, attn_kv_heads=1).eval(), ids(2, 10)
    _, cache = model(x[:, :4], return_intermediates=True)
    for n in range(5, 11):
        logits, cache = model(x[:, :n], cache=cache, return_intermediates=True)
        torch.testing.assert_close(logits[:, -1], model(x[:, :n])[:, -1], atol=1e-5, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("rotary", [True, False])
def test_left_padding_parity(lib, rotary):
    """What x-transformers calls seq_start_pos: a prompt behind left padding has the logits of the prompt alone."""
    model, x = build(lib, rotary_pos_emb=rotary).eval(), ids(1, 6)
    padded = F.pad(x, (4, 0))
    if lib is xalign:
        out = model(padded, mask=torch.arange(10)[None] >= 4)
    else:
        out = model(padded, seq_start_pos=torch.tensor([4]))
    torch.testing.assert_close(out[:, 4:], model(x), atol=1e-5, rtol=1e-4)


@BOTH
def test_lists_of_prompts(lib):
    wrapped = lib.AutoregressiveWrapper(build(lib, rotary_pos_emb=True))
    prompts = [ids(1, n, seed=n)[0] for n in (3, 7, 5)]
    together = wrapped.generate(prompts, 6, temperature=0.0)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(wrapped.generate(prompt, 6, temperature=0.0), row)
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    assert torch.equal(wrapped.generate(padded, 6, temperature=0.0, prompt_lens=torch.tensor([3, 7, 5])), together)


@BOTH
def test_beam_search_shapes(lib):
    wrapped = lib.AutoregressiveWrapper(build(lib, rotary_pos_emb=True))
    assert wrapped.beam_search(prompts=ids(2, 4), seq_len=6, beams=3).shape == (2, 6)
    assert wrapped.beam_search(ids(1, 4)[0], 6).shape == (6,)
    beams, scores = wrapped.beam_search(ids(2, 4), 6, beams=3, return_beams_and_scores=True)
    assert beams.shape == (3, 2, 6) and scores.shape == (3, 2)
    assert wrapped.beam_search(ids(2, 4), 40, beams=2).shape == (2, 40)  # past the window


@BOTH
def test_dpo(lib):
    dpo = lib.DPO(build(lib), beta=0.2, pad_id=0)
    prompt_mask = (torch.arange(10) < 4).expand(3, -1)
    loss = dpo(ids(3, 10), ids(3, 10, seed=1), prompt_mask=prompt_mask)
    loss.backward()
    assert loss.shape == () and abs(loss.item() - 0.6931) < 1e-3
    optimizer = torch.optim.SGD(dpo.parameters(), lr=0.1)
    optimizer.step()
    assert dpo(ids(3, 10), ids(3, 10, seed=1), prompt_mask=prompt_mask).item() < loss.item()
    assert sum(p.numel() for p in dpo.policy_model.parameters()) == sum(p.numel() for p in dpo.ref_model.parameters())


# ---- the same weights give the same numbers

def translated(theirs, ours):
    """Our model with the weights of theirs. Their RoPE turns neighbours (2i, 2i + 1), ours (i, i + r / 2);

    their query head i reads key head i % kv_heads, ours i // (heads / kv_heads), as transformers has both.
    """
    layers = ours.attn_layers
    r = (layers.rotary or (0,))[0]

    def regroup(rows):
        return rows.view(-1, layers.kv_heads, layers.dim_head, rows.shape[-1]).transpose(0, 1).reshape(rows.shape)

    order = torch.cat((torch.arange(r).view(-1, 2).T.flatten(), torch.arange(r, layers.dim_head)))
    get, state = theirs.state_dict(), ours.state_dict()
    for name in state:
        if name in ("token_emb.weight", "pos_emb.weight"):
            value = get[name.replace(".", ".emb.")]
            value = value * theirs.pos_emb.scale if name.startswith("pos") else value
        elif name == "to_logits.weight":
            value = get[name]
        elif "norm" in name:
            if name.endswith("bias"):
                continue
            key = name.split(".")
            place = "attn_layers.final_norm" if "final_norm" in name else \
                f"attn_layers.layers.{2 * int(key[2]) + (key[3] == 'ff_norm')}.0.0"
            value = get.get(place + ".gamma", get.get(place + ".g")) + float(theirs.get_submodule(place).unit_offset)
        else:
            _, _, layer, part, module, kind = name.split(".")
            if part == "attn":
                value = get[f"attn_layers.layers.{2 * int(layer)}.1.{module}.{kind}"]
                if module in ("to_q", "to_k"):
                    value = value.view(-1, len(order), value.shape[-1])[:, order].reshape(value.shape)
                if module == "to_q":
                    value = regroup(value)
                if module == "to_out":
                    value = regroup(value.T).T
            else:
                place = f"attn_layers.layers.{2 * int(layer) + 1}.1.ff"
                if module == "down":
                    value = get[f"{place}.2.{kind}"]
                elif layers.layers[0].ff.gate is None:
                    value = get[f"{place}.0.0.{kind}"]
                else:
                    value = get[f"{place}.0.proj.{kind}"].chunk(2)[module == "gate"]
        assert value.shape == state[name].shape, name
        state[name] = value
    ours.load_state_dict(state)
    return ours.eval()


PARITY = {"plain": {}, "rotary": {"rotary_pos_emb": True}, "alibi": {"alibi_pos_bias": True}, "rmsnorm": {"use_rmsnorm": True},
          "swiglu": {"ff_glu": True, "ff_swish": True}, "geglu": {"ff_glu": True}, "grouped": {"attn_kv_heads": 2},
          "all": {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True, "attn_kv_heads": 2}}


@pytest.mark.parametrize("options", PARITY.values(), ids=PARITY.keys())
def test_the_same_weights_give_the_same_logits_and_beams(options):
    options = {"heads": 4, "attn_dim_head": 64} | options
    # with ALiBi they keep the absolute positions unless told otherwise
    outer = {"use_abs_pos_emb": "alibi_pos_bias" not in options}
    theirs = build(x_transformers, outer, **options).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    own = {"norm_eps": 1e-12} if "use_rmsnorm" in options else {}
    own |= {"rotary_dim": 32} if "rotary_pos_emb" in options else {}
    ours = translated(theirs, build(xalign, outer, **options, **own))
    torch.testing.assert_close(ours(ids(2, 12)), theirs(ids(2, 12)), atol=2e-4, rtol=1e-4)
    a, b = (lib.AutoregressiveWrapper(m) for lib, m in ((xalign, ours), (x_transformers, theirs)))
    torch.testing.assert_close(a(ids(2, 12)), b(ids(2, 12)), atol=1e-4, rtol=1e-4)
    assert torch.equal(a.generate(ids(2, 5), 8, temperature=0.0), b.generate(ids(2, 5), 8, temperature=0.0))
    beams, scores = a.beam_search(ids(2, 5), 6, beams=3, length_penalty=0.0, return_beams_and_scores=True)
    xbeams, xscores = b.beam_search(ids(2, 5), 6, beams=3, return_beams_and_scores=True)
    best = xscores.argmax(0)
    assert torch.equal(beams[0], xbeams[best, torch.arange(2)])
    torch.testing.assert_close(scores[0], xscores.amax(0), atol=1e-3, rtol=1e-3)


# ---- the traps, counted

def test_every_trap_has_a_test():
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py") if p.name != Path(__file__).name)
    named = {int(n) for n in re.findall(r"trap (\d+)", text)}
    assert named >= set(range(1, 18)), sorted(set(range(1, 18)) - named)
    assert "trap, Training wrapper" in text


# ---- what x-transformers does: each function is True while it still does. It is the reason why ours differs

class Bigram(nn.Module):
    """The least model that both DPOs take."""

    def __init__(self, v=17):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(v, v))

    def forward(self, tokens):
        return self.table[tokens]


def moved(lib, **options):
    """A DPO module of `lib` whose policy has left the reference; its loss as a function."""
    dpo = lib.DPO(Bigram(), **options)
    with torch.no_grad():
        dpo.policy_model.table.add_(torch.randn(17, 17, generator=torch.Generator().manual_seed(1)))
    return dpo


def raises(call):
    try:
        call()
    except Exception:
        return True
    return False


PAIR = ids(2, 8, seed=1).clamp(min=1), ids(2, 8, seed=2).clamp(min=1)
NONE = torch.zeros(2, 8, dtype=torch.bool)


def wrapped(**options):
    outer = {k: options.pop(k) for k in ("max_seq_len", "tie_embedding") if k in options}
    return x_transformers.AutoregressiveWrapper(build(x_transformers, outer, **options))


def trap_1_token_mean():
    """Its loss is our `reduction="mean"`, and not the paper's sum."""
    theirs = moved(x_transformers)(*PAIR, prompt_mask=NONE)
    mean, total = (moved(xalign, reduction=r)(*PAIR, prompt_mask=NONE) for r in ("mean", "sum"))
    torch.testing.assert_close(theirs, mean)
    return not torch.allclose(theirs, total)


def trap_2_mask_off_by_one():
    """Its mask scores the last prompt position's successor wrongly: one column too late."""
    prompt = (torch.arange(8) < 3).expand(2, -1)
    theirs = moved(x_transformers)(*PAIR, prompt_mask=prompt)
    late = moved(xalign, reduction="mean")(*PAIR, prompt_mask=(torch.arange(8) < 4).expand(2, -1))
    torch.testing.assert_close(theirs, late)
    return not torch.allclose(theirs, moved(xalign, reduction="mean")(*PAIR, prompt_mask=prompt))


def trap_3_one_token_response():
    loss = moved(x_transformers)(*PAIR, prompt_mask=(torch.arange(8) < 7).expand(2, -1))
    return abs(loss.item() - 0.693147) < 1e-5


def trap_4_padding_leaks():
    dpo = moved(x_transformers, pad_id=0)
    prompt = (torch.arange(8) < 3).expand(2, -1)
    right = dpo(*(F.pad(t, (0, 2)) for t in PAIR), prompt_mask=F.pad(prompt, (0, 2)))
    left = dpo(*(F.pad(t, (2, 0)) for t in PAIR), prompt_mask=F.pad(prompt, (2, 0), value=True))
    plain = dpo(*PAIR, prompt_mask=prompt)
    return not (torch.allclose(right, plain) and torch.allclose(left, plain))


def trap_5_tied_embedding_is_shared():
    dpo = x_transformers.DPO(build(x_transformers, {"tie_embedding": True}))
    before = dpo.ref_model(PAIR[0])
    with torch.no_grad():
        dpo.policy_model.token_emb.emb.weight.mul_(2)
    return not torch.equal(dpo.ref_model(PAIR[0]), before)


def trap_6_bf16_log_softmax():
    from x_transformers.dpo import log_prob_from_model_and_seq
    return log_prob_from_model_and_seq(Bigram().bfloat16(), PAIR[0]).dtype == torch.bfloat16


def trap_7_parameters_and_wrappers():
    dpo = x_transformers.DPO(build(x_transformers))
    return (raises(lambda: dpo.parameters(recurse=True)) and any("ref_model" in k for k, _ in dpo.named_parameters())
            and raises(lambda: x_transformers.DPO(wrapped())(*PAIR, prompt_mask=NONE))
            and raises(lambda: dpo(PAIR[0], PAIR[1][:, :6], prompt_mask=NONE)))


def trap_8_eos_in_the_prompt():
    out = wrapped().generate(torch.tensor([[3, 1, 2]]), 6, eos_token=3, temperature=0.0)
    return out.shape[1] < 6 or bool((out == 0).all())


def trap_9_nothing_to_do():
    return raises(lambda: wrapped().generate(ids(1, 3), 0)) or raises(lambda: wrapped().generate(torch.zeros(1, 0).long(), 3))


def trap_10_past_the_window():
    return raises(lambda: wrapped(max_seq_len=8).generate([ids(1, 3)[0], ids(1, 6)[0]], 12))


def trap_11_top_p():
    from x_transformers.autoregressive_wrapper import top_p
    torch.manual_seed(0)
    x = torch.randn(64, 3000) * 4
    tie = torch.tensor([[0.5, 0.25, 0.25]]).log()
    return bool((top_p(x.clone(), 1.0) == -torch.inf).any()) or int((top_p(tie.clone(), 0.5) > -torch.inf).sum()) != 1


def trap_12_empty_support():
    model = wrapped()
    return all(raises(lambda o=o: model.generate(ids(1, 3), 3, **o)) for o in
               ({"filter_logits_fn": "top_k", "filter_kwargs": {"k": 0}},
                {"filter_logits_fn": "min_p", "filter_kwargs": {"min_p": 2.0}},
                {"temperature": torch.tensor([0.5, 1.0, 1.5])}, {"temperature": -1.0}))


def trap_13_rotary_in_bf16():
    model = build(x_transformers, rotary_pos_emb=True).bfloat16()
    freqs = model.attn_layers.rotary_pos_emb.forward_from_seq_len(4096)
    freqs = freqs[0] if isinstance(freqs, tuple) else freqs
    return freqs.reshape(4096, -1)[:, 0].unique().numel() < 4096


def trap_14_whole_sequence_embedded_at_each_step():
    model, widths = wrapped(), []
    model.net.token_emb.register_forward_hook(lambda m, args, out: widths.append(args[0].shape[-1]))
    model.generate(ids(1, 4), 5, temperature=0.0)
    return widths[-1] > 1


def trap_15_eval_mode_after_an_exception():
    model = wrapped().train()
    raises(lambda: model.generate(ids(1, 4), 3, filter_logits_fn=lambda t: 1 / 0))
    return not model.training


def trap_17_beam_search():
    model = wrapped()
    return (raises(lambda: model.beam_search(ids(1, 4), 3, eos_token=1))
            and raises(lambda: model.beam_search([ids(1, 4)[0]], 3))
            and raises(lambda: model.beam_search(ids(1, 4), 3, beams=18)))


def trap_wrapper_all_ignored():
    return bool(wrapped()(torch.full((1, 5), -100)).isnan())


TRAPS = [f for name, f in list(globals().items()) if name.startswith("trap_")]


@pytest.mark.parametrize("differs", TRAPS, ids=lambda f: f.__name__)
def test_x_transformers_still_differs(differs):
    if not differs():
        pytest.skip("x-transformers has mended it")
