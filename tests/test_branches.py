"""Rows without padding that share their beginnings, products by oneDNN, and a head that never keeps all logits: each equal to
the plain way, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xalign import DPO, AutoregressiveWrapper, Decoder, TransformerWrapper
from xalign.logprobs import scored_logprobs, sequence_logprobs
from xalign.nn import branches as module
from xalign.nn import products
from xalign.nn.branches import Branches

KINDS = {
    "llama": dict(rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True, attn_kv_heads=2),
    "absolute": {},
    "alibi": dict(alibi_pos_bias=True),
    "window": dict(rotary_pos_emb=True, attn_sliding_window=4, attn_qk_norm=True),
    "neox": dict(rotary_pos_emb=True, rotary_dim=4, parallel_residual=True, attn_qkv_bias=True, attn_out_bias=True),
}


def model(kind: str = "llama", depth: int = 3, tied: bool = False, window: int = 64) -> TransformerWrapper:
    torch.manual_seed(0)
    return TransformerWrapper(num_tokens=40, max_seq_len=window, tie_embedding=tied, attn_layers=Decoder(
        dim=32, depth=depth, heads=4, attn_dim_head=8, attn_flash=True, **KINDS[kind]))


def rows(pairs: list[tuple[int, int, int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, loss mask and mask of both sides of pairs with (prompt, chosen, rejected) tokens, padded on changing sides."""
    draw = torch.Generator().manual_seed(seed)
    whole = []
    for side in (1, 2):
        for number, lengths in enumerate(pairs):
            prompt = torch.randint(40, (lengths[0],), generator=torch.Generator().manual_seed(number))
            whole.append((prompt, torch.randint(40, (lengths[side],), generator=draw)))
    width = max(len(p) + len(c) for p, c in whole) + 2
    tokens, mask = torch.full((len(whole), width), -7), torch.zeros(len(whole), width, dtype=torch.bool)
    scored = mask.clone()
    for i, (p, c) in enumerate(whole):
        start = 2 * (i % 2)
        stop = start + len(p) + len(c)
        tokens[i, start:stop], mask[i, start:stop], scored[i, start + len(p) : stop] = torch.cat((p, c)), True, True
    return tokens, scored, mask


def both(net: nn.Module, tokens, scored, mask, **ways):
    """Log-probabilities and the gradient of a sum in which every row counts differently."""
    net.zero_grad()
    logps, real = scored_logprobs(net, tokens, scored, mask, **ways)
    logps = logps.masked_fill(~real, 0.0)
    (logps.sum(1) * torch.linspace(-1, 1, len(tokens))).sum().backward()
    return logps.detach(), [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]


def assert_same(one, other, tolerance: float = 1e-5):
    torch.testing.assert_close(one[0], other[0], atol=tolerance, rtol=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-4)


RAGGED = [(7, 5, 2), (1, 1, 9), (12, 1, 1), (0, 4, 3), (5, 3, 8)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [1, 2])
def test_without_padding_and_with_shared_beginnings_all_is_equal(kind, tied, sides):
    net, batch = model(kind, tied=tied), rows(RAGGED)
    assert_same(both(net, *batch, packed=False), both(net, *batch, sides=sides))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.integers(0, 9))
def test_any_lengths(pairs, seed):
    net, batch = model(depth=2), rows(pairs, seed)
    if not (batch[1][:, 1:] & batch[2][:, :-1]).any():
        return  # nothing is scored: one token a row
    assert_same(both(net, *batch, packed=False), both(net, *batch, sides=2))


def test_a_scored_hole_and_a_scored_prompt():
    """Turns of another in the middle of a completion aren't scored; and where the prompt itself is, nothing there is shared."""
    net, (tokens, scored, mask) = model(), rows(RAGGED)
    holes = scored.clone()
    holes[:, 8:10] = False
    assert_same(both(net, tokens, holes, mask, packed=False), both(net, tokens, holes, mask, sides=2))
    assert_same(both(net, tokens, mask, mask, packed=False), both(net, tokens, mask, mask, sides=2))


def test_identical_completions_and_rows_that_score_nothing():
    net, (tokens, scored, mask) = model(), rows([(4, 3, 3), (6, 2, 2)])
    tokens[2], scored[2], mask[2] = tokens[0], scored[0], mask[0]
    assert_same(both(net, tokens, scored, mask, packed=False), both(net, tokens, scored, mask, sides=2))
    scored[1] = False
    assert_same(both(net, tokens, scored, mask, packed=False), both(net, tokens, scored, mask, sides=2))
    logps, _ = scored_logprobs(net, tokens, scored & False, mask, sides=2)
    assert logps.abs().sum() == 0
    logps.sum().backward()


def test_a_beginning_runs_once_and_the_last_layer_skips_it(monkeypatch):
    net, (tokens, scored, mask) = model(), rows([(6, 2, 3), (6, 2, 3)])
    seen: list[int] = []
    for layer in net.attn_layers.layers:
        layer.ff.register_forward_hook(lambda m, x, y: seen.append(x[0].shape[1]))
    monkeypatch.setattr(module, "DENSE", 1.0)
    scored_logprobs(net, tokens, scored, mask, sides=2)
    own = 2 * (2 + 3)  # of each side: the prompt's last token and all but its own last
    assert seen == [2 * 5 + own, 2 * 5 + own, own]


def test_the_flat_form():
    tokens = torch.tensor([[1, 2, 3, 4, 9], [5, 6, 7, 9, 9], [1, 2, 8, 9, 9], [5, 6, 6, 6, 6]])
    begin, end = torch.tensor([2, 1, 2, 1]), torch.tensor([4, 3, 3, 5])
    flat = Branches(tokens, begin, end, 2)
    assert flat.tokens.tolist() == [1, 2, 5, 3, 4, 6, 7, 8, 6, 6, 6, 6]
    assert flat.positions.tolist() == [0, 1, 0, 2, 3, 1, 2, 2, 1, 2, 3, 4]
    assert flat.shared == 3 and flat.keys == 2 + 4
    assert flat.places(torch.tensor([0, 1, 2, 3, 3]), torch.tensor([3, 1, 2, 1, 4])).tolist() == [1, 2, 4, 5, 8]
    queries, keys, allowed = flat.seen()
    assert queries[0].tolist() == [2, 3, 4, 5] and keys[1].tolist() == [0, 1, 1, 2, 3, 4]
    assert allowed[1, 0].int().tolist() == [[1, 0, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1]]


def test_where_hardly_any_padding_is_needed_nothing_moves():
    tokens = torch.arange(40).view(4, 10)
    flat = Branches(tokens, torch.zeros(4, dtype=torch.long), torch.tensor([10, 10, 9, 10]), 1)
    assert flat.tails.place is None and len(flat.tokens) == 40
    assert Branches(tokens, torch.zeros(4, dtype=torch.long), torch.tensor([10, 10, 4, 10]), 1).tails.place is not None


@pytest.mark.parametrize("dense", [1.0, 1e9])
def test_moved_or_padded_is_the_same(monkeypatch, dense):
    net, batch = model("absolute", window=24), rows(RAGGED)
    plain = both(net, *batch, packed=False)
    monkeypatch.setattr(module, "DENSE", dense)
    assert_same(plain, both(net, *batch, sides=2))


def test_checkpointing_and_dropout_and_training_mode():
    net, batch = model(), rows(RAGGED)
    plain = both(net, *batch, sides=2)
    net.train()
    net.attn_layers.gradient_checkpointing = True
    assert_same(plain, both(net, *batch, sides=2), 1e-6)


def test_bfloat16_models_and_autocast_are_near():
    net, batch = model(), rows(RAGGED)
    plain = both(net, *batch, packed=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert (both(net, *batch, sides=2)[0] - plain).abs().max() < 0.2
    assert (both(net.bfloat16(), *batch, sides=2)[0] - plain).abs().max() < 0.2


def test_errors_are_those_of_the_models_call():
    net = model("absolute", window=8)
    tokens = torch.zeros(2, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="9 tokens, but max_seq_len is 8"):
        scored_logprobs(net, torch.zeros(2, 10, dtype=torch.long), torch.ones(2, 10, dtype=torch.bool))
    scored_logprobs(net, tokens, torch.ones(2, 9, dtype=torch.bool))  # the last token is only a target
    tokens[1, 3] = 40
    with pytest.raises(ValueError, match="token id 40"):
        scored_logprobs(net, tokens[:, :8], torch.ones(2, 8, dtype=torch.bool))
    tokens[1, 3], tokens[1, 7] = 0, 41
    with pytest.raises(ValueError, match="token id 41"):
        scored_logprobs(net, tokens[:, :8], torch.ones(2, 8, dtype=torch.bool))


def test_dpo_shares_and_a_foreign_model_still_works():
    net, (tokens, scored, mask) = model(), rows([(6, 2, 3), (4, 5, 1)])
    dpo = DPO(net)
    prompt = mask & ~scored
    sides = dict(prompt_mask=(prompt[:2], prompt[2:]), preferred_seq_mask=mask[:2], unpreferred_seq_mask=mask[2:])
    tokens = tokens.masked_fill(~mask, 0)
    assert abs(float(dpo(tokens[:2], tokens[2:], **sides)) - math.log(2)) < 1e-6

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, tokens):
            return self.inner(tokens)

    ours, theirs = (sequence_logprobs(m, tokens, scored, mask) for m in (net, Foreign()))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert AutoregressiveWrapper(net)(tokens[:, :5]).isfinite()


# -- products and head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 64, 96), (2, 150, 64, 96), (5, 64, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torchs_in_fp64(shape, bias, monkeypatch):
    monkeypatch.setattr(products, "SMALL", 0)
    *lead, i, o = shape
    torch.manual_seed(0)
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((*lead, i), (o, i), (o,)))
    g = torch.randn(*lead, o)
    used = (x, w, b) if bias else (x, w)
    found = torch.autograd.grad(products.linear(*used), used, g)
    exact = torch.autograd.grad(F.linear(*(t.double() for t in used)), used, g.double())
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a, e.float(), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(products.linear(*(t.detach() for t in used)), F.linear(*used).detach(), atol=1e-4, rtol=1e-4)


def test_linear_takes_gradients_that_lie_across_and_half_precision(monkeypatch):
    monkeypatch.setattr(products, "SMALL", 0)
    x, w = torch.randn(70, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    products.linear(x, w).t().contiguous().t().square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, w).square().sum(), (x, w))
    torch.testing.assert_close((x.grad, w.grad), expected, atol=2e-3, rtol=1e-4)
    assert products.linear(x.bfloat16(), w.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, w).dtype == torch.bfloat16
    assert products.linear(x[:0], w).shape == (0, 48)


@pytest.mark.parametrize("held", [1, 50 * 7, 50 * 16, 50 * 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_the_heads_log_probabilities_in_chunks(held, bias):
    torch.manual_seed(0)
    h, w, b = (torch.randn(*s, requires_grad=True) for s in ((33, 24), (50, 24), (50,)))
    t, g = torch.randint(50, (33,)), torch.randn(33)
    used = (h, w, b) if bias else (h, w)
    exact = F.linear(*(x.double() for x in used)).log_softmax(-1).gather(1, t[:, None])[:, 0]
    found = products.target_logprobs(h, w, t, b if bias else None, held)
    torch.testing.assert_close(found, exact.float(), atol=1e-5, rtol=1e-5)
    ours, theirs = torch.autograd.grad(found, used, g), torch.autograd.grad(exact, used, g.double())
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e.float(), atol=1e-5, rtol=1e-4)


def test_only_what_is_asked_for_gets_a_gradient_and_large_logits_stay_finite():
    h, w, t = torch.randn(9, 8, requires_grad=True), 1e4 * torch.randn(20, 8), torch.randint(20, (9,))
    found = products.target_logprobs(h, w, t)
    assert found.isfinite().all() and torch.autograd.grad(found.sum(), h)[0].isfinite().all()
    assert not products.target_logprobs(h.detach(), w, t).requires_grad
    assert products.target_logprobs(h[:0], w, t[:0]).shape == (0,)


def test_no_more_logits_are_held_than_allowed(monkeypatch):
    most = 0

    def watched(x, weight, bias=None):
        nonlocal most
        out = F.linear(x, weight, bias)
        most = max(most, out.numel())
        return out

    monkeypatch.setattr(products, "linear", watched)
    h, w = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    products.target_logprobs(h, w, torch.randint(100, (64,)), held=1000).sum().backward()
    assert most == 1000
