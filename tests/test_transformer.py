"""The model: every option gives the same logits cached, uncached, padded, branched and split; parity with Llama."""

import math

import pytest
import torch
from conftest import LLAMA, ids, llama, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from xalign import AutoregressiveWrapper, Decoder, TransformerWrapper
from xalign.nn.cache import Prefix
from xalign.nn.rotary import rotary_angles, rotate
from xalign.nn.transformer import RMSNorm

OPTIONS = {
    "defaults": {},
    "llama": LLAMA,
    "absolute off": {"use_abs_pos_emb": False},
    "grouped queries": LLAMA | {"attn_kv_heads": 2},
    "one kv head": {"attn_kv_heads": 1},
    "partial rotary": {"rotary_pos_emb": True, "rotary_dim": 4, "rotary_base": 500.0},
    "alibi": {"alibi_pos_bias": True},
    "alibi, 3 heads, grouped": {"alibi_pos_bias": True, "heads": 6, "attn_kv_heads": 3},
    "qk norm": LLAMA | {"attn_qk_norm": True},
    "biases": {"attn_qkv_bias": True, "attn_out_bias": True},
    "parallel": LLAMA | {"parallel_residual": True},
    "tied": LLAMA | {"tie_embedding": True},
    "glu without swish": {"ff_glu": True, "ff_mult": 2.5},
    "exact width": {"ff_inner_dim": 50, "norm_eps": 1e-3},
    "flash": {"attn_flash": True},
    "flash alibi": {"attn_flash": True, "alibi_pos_bias": True},
    "tanh gelu": {"ff_gelu_tanh": True, "ff_glu": True},
    "window": LLAMA | {"attn_sliding_window": 4},
    "window of one": {"attn_sliding_window": 1},
    "window wider than the text": LLAMA | {"attn_sliding_window": 40},
    "window with alibi, grouped": {"attn_sliding_window": 3, "alibi_pos_bias": True, "attn_kv_heads": 2, "attn_flash": True},
    "linear rotary": LLAMA | {"rotary_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3 rotary, window": LLAMA | {"attn_sliding_window": 5, "rotary_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "yarn, partial": LLAMA | {"rotary_dim": 6, "rotary_base": 50.0, "rotary_scaling": {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "original_max_position_embeddings": 8}},
    "dynamic rotary": LLAMA | {"rotary_scaling": {"rope_type": "dynamic", "factor": 2.0,
                                                  "original_max_position_embeddings": 25}},
    "dropouts, in eval": {"emb_dropout": 0.1, "attn_dropout": 0.2, "ff_dropout": 0.3},
}
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def close(a, b):
    torch.testing.assert_close(a, b, **CLOSE)


def pad(tokens, left, right, garbage=3):
    """Tokens between `left` and `right` pads, and the mask."""
    b, n = tokens.shape
    padded = torch.full((b, left + n + right), garbage)
    padded[:, left : left + n] = tokens
    mask = torch.zeros_like(padded, dtype=torch.bool)
    mask[:, left : left + n] = True
    return padded, mask


# ---- one text, however it is run

@EVERY
def test_the_future_is_unseen(options):
    model, tokens = tiny(**options), ids(2, 9)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 17
    close(model(tokens)[:, :6], model(changed)[:, :6])
    assert (model(tokens)[:, 6] - model(changed)[:, 6]).abs().max() > 1e-3


@EVERY
def test_split_at_any_point(options):
    """trap 16: every option is cache-exact."""
    model, tokens = tiny(**options), ids(2, 9)
    whole = model(tokens)
    for cut in range(10):
        first, cache = model(tokens[:, :cut], return_intermediates=True)
        second, grown = model(tokens[:, cut:], cache=cache, input_not_include_cache=True, return_intermediates=True)
        close(torch.cat((first, second), 1), whole)
        assert cache.length == cut and grown.length == 9
        close(model(tokens, cache=cache), whole[:, cut:])  # x-transformers' way: the tokens hold the cached ones


@EVERY
def test_token_by_token_through_both_caches(options):
    """trap 16, trap 14: cached steps see one token and equal the uncached run."""
    model, tokens = tiny(**options), ids(3, 8)
    whole, cache, outs = model(tokens), None, []
    for t in range(8):
        out, cache = model(tokens[:, t : t + 1], cache=cache, input_not_include_cache=True, return_intermediates=True)
        outs.append(out)
    close(torch.cat(outs, 1), whole)
    with torch.no_grad():
        for static in (False, True):
            buffer = model.decode_buffer(3, 8, static=static)
            close(torch.stack([model.step(tokens[:, t], buffer) for t in range(8)], 1), whole)


@EVERY
def test_padding_on_either_side_changes_nothing(options):
    model, tokens = tiny(**options), ids(2, 7)
    whole = model(tokens)
    for left, right in ((3, 0), (0, 4), (2, 2)):
        padded, mask = pad(tokens, left, right)
        out = model(padded, mask=mask)
        assert out.isfinite().all()
        close(out[:, left : left + 7], whole)


@EVERY
def test_rows_of_unequal_length_padded_and_cached_at_any_split(options):
    model = tiny(**options)
    rows = [ids(1, n, seed=n) for n in (1, 4, 7)]
    alone = [model(r)[0] for r in rows]
    for side in ("left", "right"):
        padded = [pad(r, *((7 - r.shape[1], 0) if side == "left" else (0, 7 - r.shape[1]))) for r in rows]
        tokens, mask = (torch.cat(t) for t in zip(*padded, strict=True))
        real = [m.nonzero()[:, 0] for m in mask]
        for cut in range(8):
            a, cache = model(tokens[:, :cut], mask=mask[:, :cut], return_intermediates=True)
            b = model(tokens[:, cut:], mask=mask[:, cut:], cache=cache, input_not_include_cache=True)
            for i, out in enumerate(torch.cat((a, b), 1)):
                close(out[real[i]], alone[i])
            close(model(tokens, mask=mask, cache=cache), b)


@EVERY
@pytest.mark.parametrize("static", [False, True])
def test_rows_of_unequal_length_go_on_side_by_side_in_a_buffer(options, static):
    """Each from its own length, some standing still for a while; what stood in the buffer before is of no meaning."""
    model = tiny(**options)
    rows = [ids(1, n, seed=n) for n in (9, 5, 7, 6)]
    alone, filled = [model(r)[0] for r in rows], [3, 0, 5, 2]
    with torch.no_grad():
        buffer = model.decode_buffer(4, 10, static=static)
        for t in (*buffer.keys, *buffer.values):
            t.fill_(1e4)
        for i, n in enumerate(filled):
            _, prefix = model(torch.cat((rows[i][:, :n], ids(1, 2)), 1), return_intermediates=True)  # and what is no part of it
            buffer.fill(torch.tensor([i]), prefix, torch.tensor([n]))
        at = list(filled)
        for step in range(12):
            buffer.high, buffer.even = max(at), len(set(at)) == 1
            live = torch.tensor([(step + i) % 3 > 0 and at[i] < rows[i].shape[1] for i in range(4)])
            out = model.step(torch.tensor([r[0, min(a, r.shape[1] - 1)] for r, a in zip(rows, at, strict=True)]), buffer, live)
            for i in range(4):
                if live[i]:
                    close(out[i], alone[i][at[i]])
                    at[i] += 1
    assert at == [9, 5, 7, 6] and buffer.lengths.tolist() == at


@EVERY
@pytest.mark.parametrize("padded", [False, True])
def test_branches_of_a_prefix(options, padded):
    """b = p * s rows continue p prefixes, each serving s neighbours, prefix or continuation padded or not."""
    model, p, s = tiny(**options), 2, 3
    prompts, replies = ids(p, 5), ids(p * s, 4, seed=1)
    mask = reply_mask = None
    if padded:
        mask = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
        reply_mask = torch.ones(p * s, 4, dtype=torch.bool)
        reply_mask[1, 2:] = reply_mask[4, :1] = False
    _, cache = model(prompts, mask=mask, return_intermediates=True)
    out = model(replies, mask=reply_mask, cache=cache, input_not_include_cache=True)
    again = model(replies, mask=reply_mask, cache=cache, input_not_include_cache=True)
    assert torch.equal(out, again), "a prefix that was continued has changed"
    for i in range(p * s):
        prompt = prompts[i // s] if mask is None else prompts[i // s][mask[i // s]]
        real = slice(None) if reply_mask is None else reply_mask[i]
        close(out[i][real], model(torch.cat((prompt, replies[i][real]))[None])[0, len(prompt) :])


@EVERY
def test_gradients_through_a_prefix_are_the_full_runs(options):
    model, s = tiny(**options), 2
    prompts, replies = ids(2, 5), ids(4, 4, seed=1)
    weight = torch.randn(4, 4, 17)

    def grads(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    _, cache = model(prompts, return_intermediates=True)
    shared = grads((model(replies, cache=cache, input_not_include_cache=True) * weight).sum())
    full = grads((model(torch.cat((prompts.repeat_interleave(s, 0), replies), 1))[:, 5:] * weight).sum())
    for name, g in full.items():
        torch.testing.assert_close(shared[name], g, atol=1e-4 * max(1.0, float(g.abs().max())), rtol=1e-4, msg=name)
    assert sum(float(g.abs().sum()) for g in full.values()) > 1


def test_two_continuations_of_one_prefix_do_not_see_each_other():
    model = tiny(**LLAMA)
    _, cache = model(ids(1, 5), return_intermediates=True)
    keys = [k.clone() for k in cache.keys]
    a, grown = model(ids(1, 3, seed=1), cache=cache, input_not_include_cache=True, return_intermediates=True)
    b = model(ids(1, 3, seed=2), cache=cache, input_not_include_cache=True)
    assert torch.equal(a, model(ids(1, 3, seed=1), cache=cache, input_not_include_cache=True)) and not torch.equal(a, b)
    _, other = model(ids(1, 3, seed=2), cache=cache, input_not_include_cache=True, return_intermediates=True)
    close(model(ids(1, 2, seed=3), cache=other, input_not_include_cache=True),
          model(torch.cat((ids(1, 5), ids(1, 3, seed=2), ids(1, 2, seed=3)), 1))[:, 8:])
    assert cache.length == 5 and all(torch.equal(x, y) for x, y in zip(keys, cache.keys, strict=True))
    close(model(ids(1, 2, seed=3), cache=grown, input_not_include_cache=True),
          model(torch.cat((ids(1, 5), ids(1, 3, seed=1), ids(1, 2, seed=3)), 1))[:, 8:])


@settings(max_examples=25)
@given(st.sampled_from(sorted(OPTIONS)), st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 10**6))
def test_any_chain_of_chunks_with_any_mask(name, chunks, seed):
    """Holes in the mask, chunks of nothing, rows that begin late: real tokens' logits are the compacted row's."""
    model, n = tiny(**OPTIONS[name]), sum(chunks)
    tokens = ids(3, n, seed=seed)
    mask = torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) < 0.7
    cache, outs, start = None, [], 0
    for k in chunks:
        out, cache = model(tokens[:, start : start + k], mask=mask[:, start : start + k], cache=cache,
                           input_not_include_cache=True, return_intermediates=True)
        outs.append(out)
        start += k
    for row, m, out in zip(tokens, mask, torch.cat(outs, 1), strict=True):
        if m.any():
            close(out[m], model(row[m][None])[0])


def test_a_window_hides_what_is_further_back():
    """One layer: a token sees itself and the window - 1 before it, counted in real tokens, wherever the padding is."""
    model, tokens = tiny(**LLAMA, depth=1, attn_sliding_window=3), ids(1, 8)
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 17
    moved = (model(tokens) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, True, True, True, False, False, False]
    holes = torch.tensor([[True, True, True, False, True, False, False, True]])
    moved = (model(tokens, mask=holes) - model(changed, mask=holes)).abs().amax(-1)[0] > 1e-6
    assert moved[holes[0]].tolist() == [False, False, True, True, True]


def test_no_mask_is_built_while_all_fits_in_the_window():
    """The fast path: attention gets a mask only where the window (or padding) hides something."""
    layers = tiny(**LLAMA, attn_sliding_window=4).attn_layers
    cache = Prefix([torch.zeros(1)], [torch.zeros(1)], None, 3)
    for n, behind, masked in ((4, None, False), (5, None, True), (4, cache, False), (5, cache, True)):
        context = layers.context(torch.arange(n)[None], None, behind)
        assert (context.bias is not None) == masked
        assert context.causal == (behind is None and not masked)


# ---- numbers

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_angles_stay_fp32_in_a_half_precision_model(dtype):
    """trap 13: x-transformers casts the frequencies, and 4096 positions have 769 distinct angles."""
    model = tiny(**LLAMA).to(dtype)
    rotation = model.attn_layers.context(torch.arange(4096)[None], None, None).rotation
    assert rotation[0].dtype == torch.float32
    assert rotation[0].shape == (1, 1, 4096, 8) and torch.equal(rotation[0][..., :4], rotation[0][..., 4:])
    angles = torch.atan2(rotation[1], rotation[0])[0, 0]
    assert angles[:, 4].unique().numel() == 4096
    assert torch.cat(rotation, -1)[0, 0].unique(dim=0).shape[0] == 4096
    exact = (torch.arange(4096).double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8))
    assert (torch.cos(exact) - rotation[0][0, 0, :, 4:]).abs().max() < 5e-4


def test_rotary_angles_by_hand():
    cos, sin = rotary_angles(torch.tensor([[0, 1, 2]]), 4, 100.0)
    right = torch.tensor([[0, 0], [math.sin(1), math.sin(0.1)], [math.sin(2), math.sin(0.2)]])
    torch.testing.assert_close(sin[0], torch.cat((-right, right), -1))
    torch.testing.assert_close(cos[0], (1 - right.square()).sqrt().repeat(1, 2).copysign(cos[0]))
    assert cos[0, 2, 0] < 0 < cos[0, 2, 1]


@pytest.mark.parametrize("r", [2, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_a_product_of_complex_numbers(r, dtype):
    """Features i and i + r / 2 as the parts of a number, (Su et al. 2021) eq. 34; values, gradients, what passes through."""
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 5, 6).to(dtype), torch.randint(50, (2, 5))
    rotation = rotary_angles(positions, r, 100.0)
    angles = positions[..., None].double() * 100.0 ** (-torch.arange(0, r, 2).double() / r)
    turn, weight = torch.polar(torch.ones_like(angles), angles)[:, None], torch.randn(2, 3, 5, 6)

    def exact(x):
        pairs = torch.complex(x[..., : r // 2].double(), x[..., r // 2 : r].double()) * turn
        return torch.cat((pairs.real, pairs.imag, x[..., r:].double()), -1)

    grads = []
    for function, tolerance in ((exact, 0), (lambda x: rotate(x, tuple(t[:, None] for t in rotation), torch.float32), 1e-5)):
        mine = x.clone().requires_grad_()
        out = function(mine)
        torch.testing.assert_close(out.double(), exact(x), atol=tolerance, rtol=tolerance)
        grads += torch.autograd.grad((out * weight).sum(), mine)
    torch.testing.assert_close(grads[1], grads[0])
    assert torch.equal(x, mine), "in place, but for its input"


@pytest.mark.parametrize("options", [LLAMA, {"alibi_pos_bias": True}, {}], ids=["rotary", "alibi", "absolute"])
def test_half_precision_is_near_full_precision(options):
    model, tokens = tiny(sharp=1.0, **options), ids(2, 12)
    whole = model(tokens)
    model.bfloat16()
    assert (model(tokens).float() - whole).abs().max() < 0.05 * whole.abs().max() + 0.01
    padded, mask = pad(tokens, 2, 1)
    assert model(padded, mask=mask).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "grouped queries", "alibi", "one kv head"])
def test_flash_on_and_off_are_equal(name):
    on, off = (tiny(**(OPTIONS[name] | {"attn_flash": flash})) for flash in (True, False))
    tokens = ids(2, 9)
    close(on(tokens), off(tokens))
    padded, mask = pad(tokens, 2, 3)
    close(on(padded, mask=mask)[:, 2:-3], off(padded, mask=mask)[:, 2:-3])


def test_grouped_queries_equal_repeated_key_heads():
    few, many = tiny(**LLAMA, attn_kv_heads=2), tiny(**LLAMA)
    state = few.state_dict()
    for name in state:
        if "to_k" in name or "to_v" in name:
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    many.load_state_dict(state)
    close(few(ids(2, 9)), many(ids(2, 9)))


@pytest.mark.parametrize("name", ["llama", "grouped queries", "alibi", "defaults"])
def test_gradient_checkpointing_gives_equal_gradients(name):
    model, tokens = tiny(**(OPTIONS[name] | {"ff_dropout": 0.3, "attn_dropout": 0.3})).train(), ids(2, 9)
    grads = []
    for flag in (False, True):
        model.attn_layers.gradient_checkpointing = flag
        model.zero_grad()
        torch.manual_seed(1)
        (model(tokens).square().sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout", ["emb_dropout", "attn_dropout", "ff_dropout"])
def test_dropout_acts_in_training_only(dropout):
    model, tokens = tiny(**{dropout: 0.5}), ids(1, 9)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("heads, expected", [(4, [1 / 4, 1 / 16, 1 / 64, 1 / 256]), (1, [1 / 256]),
                                             (3, [1 / 16, 1 / 256, 1 / 4])])
def test_alibi_slopes(heads, expected):
    from xalign.nn.attention import alibi_slopes
    assert alibi_slopes(heads).tolist() == expected


def test_a_tied_head_is_the_embedding():
    tied = tiny(**LLAMA, tie_embedding=True)
    assert not any("to_logits" in n for n in tied.state_dict())
    assert "to_logits.weight" in tiny(**LLAMA).state_dict()
    close(tied.logits(torch.eye(32)), tied.token_emb.weight.T)


def test_rotary_and_alibi_switch_the_absolute_positions_off():
    assert tiny().pos_emb is not None
    for options in ({"rotary_pos_emb": True}, {"alibi_pos_bias": True}, {"use_abs_pos_emb": False}):
        assert tiny(**options).pos_emb is None


def test_hidden_states_before_the_head():
    model, tokens = tiny(**LLAMA), ids(2, 6)
    hidden = model(tokens, return_embeddings=True)
    assert hidden.shape == (2, 6, 32)
    close(model.logits(hidden), model(tokens))


def test_autocast_in_bf16():
    model, tokens = tiny(**LLAMA, sharp=1.0), ids(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
        with torch.no_grad():
            buffer = model.decode_buffer(2, 6)
            parts = [model.step(tokens[:, t], buffer) for t in range(6)]
    assert (torch.stack(parts, 1).float() - out.float()).abs().max() < 0.05
    assert (out.float() - model(tokens)).abs().max() < 0.05


# ---- what is refused

@pytest.mark.parametrize("call, message", [
    (lambda: Decoder(dim=8, depth=1, rotary_pos_embed=True), "did you mean 'rotary_pos_emb'"),
    (lambda: Decoder(dim=8, depth=1, attn_flsh=True), "did you mean 'attn_flash'"),
    (lambda: Decoder(dim=8, depth=1, zzz=1), "has no option 'zzz'$"),
    (lambda: TransformerWrapper(num_token=3, num_tokens=3, max_seq_len=4, attn_layers=Decoder(dim=8, depth=1)), "num_tokens"),
    (lambda: TransformerWrapper(num_tokens=3, max_seq_len=4, attn_layers=Decoder(dim=8, depth=1), tie_embeddings=True),
     "did you mean 'tie_embedding'"),
])
def test_an_unknown_option_is_a_type_error_with_its_nearest_neighbour(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def scaled(kind="linear", rotary_pos_emb=True, **fields):
    return {"rotary_pos_emb": rotary_pos_emb, "rotary_scaling": {"rope_type": kind, "factor": 2.0} | fields}


@pytest.mark.parametrize("fields, words", [
    ({"factor": 2.0}, "rope_type is None"), ({"rope_type": "linear"}, "factor is missing"),
    ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings is missing"),
    ({"rope_type": "linear", "factor": 2.0, "fctor": 1}, "did you mean 'factor'")])
def test_rotary_scaling_names_a_missing_or_unknown_field(fields, words):
    with pytest.raises(ValueError, match=words):
        Decoder(dim=8, depth=1, rotary_pos_emb=True, rotary_scaling=fields)


@pytest.mark.parametrize("options, word", [
    ({"heads": 4, "attn_kv_heads": 3}, "divisor"), ({"attn_kv_heads": 0}, "attn_kv_heads"), ({"depth": 0}, "depth"),
    ({"dim": 0}, "dim"), ({"dim": 8.5}, "dim"), ({"heads": -1}, "heads"), ({"attn_dim_head": 0}, "attn_dim_head"),
    ({"attn_dropout": 1.0}, "attn_dropout"), ({"ff_dropout": -0.1}, "ff_dropout"), ({"attn_dropout": math.nan}, "attn_dropout"),
    ({"rotary_pos_emb": True, "rotary_dim": 5}, "even"), ({"rotary_pos_emb": True, "rotary_dim": 66}, "rotary_dim"),
    ({"rotary_pos_emb": True, "alibi_pos_bias": True}, "one of them"), ({"ff_mult": 0}, "ff_mult"),
    ({"rotary_pos_emb": True, "attn_dim_head": 7}, "even"), ({"ff_inner_dim": 0}, "ff_inner_dim"),
    ({"norm_eps": 0.0}, "norm_eps"),
    ({"rotary_base": -1.0}, "rotary_base"), ({"attn_sliding_window": 0}, "attn_sliding_window"),
    ({"ff_swish": True, "ff_gelu_tanh": True}, "one of them"), (scaled(rotary_pos_emb=False), "allowed is both"),
    (scaled("longrope"), "rope_type is 'longrope'"), (scaled(factor=None), "factor is None"),
    (scaled(factor=0.5), "factor is 0.5"), (scaled(factor=math.inf), "factor is inf"), (scaled(factor=True), "factor is True"),
    (scaled("dynamic", original_max_position_embeddings=8.0), "original_max_position_embeddings is 8.0"),
    (scaled("yarn", original_max_position_embeddings=8, beta_fast=1, beta_slow=2), "beta_fast is 1, allowed is a number > "),
    (scaled("yarn", original_max_position_embeddings=8, truncate=1), "truncate is 1, allowed is True or False"),
    (scaled("yarn", original_max_position_embeddings=8, mscale=-1), "mscale is -1"),
    (scaled("yarn", original_max_position_embeddings=8) | {"rotary_base": 1.0}, "rotary_base is 1.0"),
])
def test_configuration_errors_name_the_option_and_what_is_allowed(options, word):
    with pytest.raises(ValueError, match=word) as error:
        Decoder(**({"dim": 8, "depth": 1} | options))
    assert "allowed is" in str(error.value)


def test_call_errors():
    model = tiny()
    with pytest.raises(ValueError, match="token id 17, allowed is 0 to 16"):
        model(torch.tensor([[1, 17]]))
    with pytest.raises(ValueError, match="token id -1"):
        model(torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match="mask has shape"):
        model(ids(2, 4), mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="33 tokens, but max_seq_len is 32"):
        model(ids(1, 33))
    padded, mask = pad(ids(1, 32), 4, 0)
    assert model(padded, mask=mask).shape == (1, 36, 17)  # 32 positions are in use
    assert tiny(**LLAMA)(ids(1, 40)).shape == (1, 40, 17)  # only absolute positions end
    _, cache = model(ids(2, 4), return_intermediates=True)
    with pytest.raises(ValueError, match="3 rows can't continue 2 prefixes"):
        model(ids(3, 2), cache=cache, input_not_include_cache=True)
    buffer = model.decode_buffer(2, 3)
    with pytest.raises(RuntimeError, match="no_grad"):
        model.step(ids(2, 1)[:, 0], buffer)
    with torch.no_grad():
        for wrong in (ids(3, 1)[:, 0], ids(2, 1)):
            with pytest.raises(ValueError, match=r"tokens have shape .*allowed is one for each row of this decode"):
                model.step(wrong, buffer)
        with pytest.raises(ValueError, match="4 tokens, but this decode buffer has room for 3"):
            for _ in range(4):
                model.step(ids(2, 1)[:, 0], buffer)


# ---- the loss around it

def test_wrapper_loss_is_the_mean_cross_entropy():
    model, tokens = tiny(**LLAMA), ids(3, 8)
    wrapped = AutoregressiveWrapper(model)
    expected = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].reshape(-1, 17), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(wrapped(tokens), expected)
    ignored = tokens.clone()
    ignored[:, 5:] = -100
    torch.testing.assert_close(wrapped(ignored), wrapped(tokens[:, :5]))
    other = AutoregressiveWrapper(model, ignore_index=-7)
    torch.testing.assert_close(other(ignored.masked_fill(ignored == -100, -7)), wrapped(ignored))


def test_training_wrapper_all_ignored_is_zero_and_not_nan():
    """trap, Training wrapper: an all-ignored batch gives NaN in x-transformers."""
    wrapped = AutoregressiveWrapper(tiny(**LLAMA))
    loss = wrapped(torch.full((2, 5), -100))
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in wrapped.parameters() if p.grad is not None)
    assert wrapped(ids(2, 1)) == 0  # nothing to predict


@pytest.mark.parametrize("left, right", [(0, 3), (3, 0), (2, 2), (30, 30)])
@pytest.mark.parametrize("name", ["llama", "defaults", "alibi"])
def test_training_wrapper_masked_pads_do_not_count(name, left, right):
    """trap, Training wrapper: pads count in x-transformers' loss unless they are -100."""
    wrapped, tokens = AutoregressiveWrapper(tiny(**OPTIONS[name])), ids(2, 7)
    padded, mask = pad(tokens, left, right)
    torch.testing.assert_close(wrapped(padded, mask=mask), wrapped(tokens))
    hole = torch.tensor([[True, True, False, True, True, True, True]])
    torch.testing.assert_close(wrapped(tokens[:1], mask=hole), wrapped(tokens[:1][hole][None]))


# ---- the peer

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_equal_llamas(tied, kv_heads):
    theirs, ours = llama(tied, kv_heads)
    tokens = ids(2, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    padded, mask = pad(tokens, 4, 0)
    mask[1, 4:7] = False  # a shorter second row
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    out = theirs(padded, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(ours(padded, mask=mask)[mask], out[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 512), (512,), (1, 96), (2, 1, 64)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_the_norm_of_one_row_is_torchs(dtype, shape, scale, monkeypatch):
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], eps=1e-5, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    x, taken = (scale * torch.randn(shape)).to(dtype), []
    own = torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda *args: taken.append(1) or own(*args))
    with torch.no_grad():
        found = norm(x)
    expected = torch.nn.functional.rms_norm(x, (shape[-1],), norm.weight, 1e-5)
    tolerance = {torch.float32: 4e-7, torch.bfloat16: 0.0}[dtype]  # fp32: another order of the sum
    assert ((found - expected).abs() <= tolerance * expected.abs()).all() and len(taken) == (shape[0] != 2)
