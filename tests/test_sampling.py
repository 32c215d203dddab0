"""The filters against their definitions and against transformers' processors; the draws against their distribution."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from xalign import sampling as S

INF = float("inf")
CPU = torch.device("cpu")


def kept(x):
    return (x > -INF).tolist()


def row(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def probs(*values):
    return torch.tensor(values).log()


# ---- by hand

def test_temperature_by_hand():
    x = row(1.0, 2.0, -4.0)
    assert torch.equal(S.temperature(x, 2.0), row(0.5, 1.0, -2.0))
    assert torch.equal(S.temperature(x, 1.0), x)
    assert torch.equal(S.temperature(x, 0.0), row(-INF, 0.0, -INF))
    assert torch.equal(S.temperature(row(3.0, 3.0), 0), row(0.0, -INF))  # ties to the lower index


def test_top_k_by_hand():
    x = row(1.0, 3.0, 2.0, 3.0, 0.0)
    assert kept(S.top_k(x, k=1)) == [False, True, False, False, False]
    assert kept(S.top_k(x, k=2)) == [False, True, False, True, False]
    assert kept(S.top_k(x, k=3)) == [False, True, True, True, False]
    assert torch.equal(S.top_k(x, k=5), x) and torch.equal(S.top_k(x, k=99), x)
    assert kept(S.top_k(x)) == [False, True, False, False, False]  # the default keeps ceil(.1 * 5)
    assert sum(kept(S.top_k(x, frac_num_tokens=0.5))) == 3


def test_top_p_by_hand():
    x = probs(0.5, 0.25, 0.125, 0.125)
    assert kept(S.top_p(x, 0.0)) == [True, False, False, False]
    assert kept(S.top_p(x, 0.4)) == [True, False, False, False]
    assert kept(S.top_p(x, 0.6)) == [True, True, False, False]
    assert kept(S.top_p(x, 0.8)) == [True, True, True, False]
    assert kept(S.top_p(x.flip(0), 0.8)) == [True, False, True, True]  # ties to the lower index
    assert torch.equal(S.top_p(x, 1.0), x)


def test_top_p_at_an_exact_border_keeps_the_smallest_set():
    """trap 11: x-transformers keeps one token too many at an exact tie."""
    x = probs(0.5, 0.25, 0.125, 0.125)
    assert kept(S.top_p(x, 0.5)) == [True, False, False, False]
    assert kept(S.top_p(x, 0.75)) == [True, True, False, False]
    assert kept(S.top_p(x, 0.875)) == [True, True, True, False]


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12, unique=True), st.randoms(use_true_random=False))
def test_top_p_at_any_exact_border(weights, random):
    """trap 11: a mass that equals the threshold but for rounding has reached it."""
    total, keep = sum(weights), 1 + random.randrange(len(weights))
    largest = sorted(weights, reverse=True)[:keep]
    p = sum(largest) / total
    if p < 1:
        out = S.top_p(torch.tensor(weights, dtype=torch.float).log(), p)
        assert survivors(out) == {i for i, w in enumerate(weights) if w in largest}


def test_top_p_of_one_changes_nothing():
    """trap 11: in x-transformers the fp32 sum passes 1 and tokens are dropped."""
    torch.manual_seed(0)
    x = torch.randn(64, 3000) * 4
    assert torch.equal(S.top_p(x, 1.0), x)
    assert torch.equal(S.top_p(x, torch.ones(64)), x)


def test_min_p_by_hand():
    x = probs(0.5, 0.25, 0.2, 0.05)
    assert kept(S.min_p(x, 0.5)) == [True, True, False, False]  # a border of exactly half stays
    assert kept(S.min_p(x, 0.3)) == [True, True, True, False]
    assert kept(S.min_p(x, 1.0)) == [True, False, False, False]
    assert torch.equal(S.min_p(x, 0.0), x)


def test_top_a_by_hand():
    x = probs(0.5, 0.25, 0.2, 0.05)
    assert kept(S.top_a(x, 2.0, 0.02)) == [True] * 4  # the limit is .005
    assert kept(S.top_a(x, 2.0, 0.9)) == [True, True, False, False]  # .225
    assert kept(S.top_a(x, 0.0, 1.0)) == [True, False, False, False]  # a limit above the largest spares it


def test_repetition_penalty_by_hand():
    x = torch.tensor([[2.0, -2.0, 1.0, 0.0], [4.0, 3.0, -1.0, -INF]])
    seen = torch.tensor([[0, 1, 1], [3, 2, 0]])
    assert torch.equal(S.repetition_penalty(x, seen, 2.0), torch.tensor([[1.0, -4, 1, 0], [2, 3, -2, -INF]]))
    assert torch.equal(S.repetition_penalty(x, seen, 1.0), x)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert torch.equal(S.repetition_penalty(x, seen, 2.0, mask), torch.tensor([[2.0, -4, 1, 0], [4, 3, -2, -INF]]))
    per_row = S.repetition_penalty(x, seen, torch.tensor([1.0, 4.0]))
    assert torch.equal(per_row, torch.tensor([[2.0, -2, 1, 0], [1, 3, -4, -INF]]))


def test_a_penalty_never_removes_a_token():
    x = row(-100.0, -3.0, 60000.0, dtype=torch.float16)
    for penalty in (1e4, 1e30, 1e-30):
        out = S.repetition_penalty(x, torch.arange(3), penalty)
        assert out.isfinite().all() and out.dtype == torch.float16


# ---- definitions, on adversarial rows

def brute_top_k(x, k):
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    return set(order[:k])


def brute_top_p(x, p):
    """The smallest set of largest tokens that reaches p, by exact-enough fp64 sums."""
    weights = torch.tensor(x, dtype=torch.float64).softmax(0).tolist()
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    mass, keep = 0.0, set()
    for i in order:
        if keep and mass >= p - 5e-7:
            break
        keep.add(i)
        mass += weights[i]
    return keep


VALUE = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -INF, 80.0, -80.0, 1e4, -1e4]),
                  st.floats(-20, 20, width=16))
ROW = st.one_of(
    st.lists(VALUE, min_size=1, max_size=12),
    st.integers(1, 12).map(lambda n: [0.5] * n),  # flat
    st.integers(1, 12).map(lambda n: [3.0] + [-INF] * (n - 1)),  # one-hot
).filter(lambda r: max(r) > -INF)
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def survivors(out):
    return {i for i, v in enumerate(out.tolist()) if v > -INF}


@given(ROW, DTYPE, st.integers(1, 14), st.booleans())
def test_top_k_is_its_definition(values, dtype, k, as_tensor):
    x = row(*values, dtype=dtype)
    before = x.clone()
    out = S.top_k(x, k=torch.tensor(k) if as_tensor else k)
    keep = brute_top_k(x.tolist(), k)
    assert survivors(out) == keep & survivors(x)
    assert out.dtype == dtype and torch.equal(x, before)
    assert all(out[i] == x[i] for i in keep)


@given(ROW, DTYPE, st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), st.booleans())
def test_top_p_is_its_definition(values, dtype, p, as_tensor):
    x = row(*values, dtype=dtype)
    before = x.clone()
    out = S.top_p(x, torch.tensor(p) if as_tensor else p)
    p = float(torch.tensor(p))
    if p == 1:
        assert torch.equal(out, x)
    else:
        # a threshold within fp32 rounding of a border may fall on either side
        assert any(survivors(out) == brute_top_p(x.tolist(), q) & survivors(x) for q in (p, p - 1e-6, p + 1e-6))
    assert out.dtype == dtype and torch.equal(x, before)


def top_p_by_rule(x, p):
    """Our own rule to the letter, in Python's whole numbers: each token is asked by itself what stands before it."""
    weights = [int(w) for w in ((x.float() - x.float().max()).exp() * 2.0**34).round().tolist()]
    limit = max(math.ceil(p * sum(weights)), 2**14 + 1) if p < 1 else INF
    keep, before = set(), 0
    for i in sorted(range(len(weights)), key=lambda i: (-x[i].item(), i)):
        if before + (weights[i] >> 20) < limit and x[i] > -INF:
            keep.add(i)
        before += weights[i]
    return keep


P = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.75, 0.9, 1 - 2**-24, 1.0]))


@given(ROW, DTYPE, P, st.booleans())
def test_top_p_is_its_rule_exactly(values, dtype, p, as_tensor):
    x = row(*values, dtype=dtype)
    p = torch.tensor(p) if as_tensor else p
    assert survivors(S.top_p(x, p)) == top_p_by_rule(x, float(p))


WIDE = {
    "plain": lambda x: x, "sharp": lambda x: 8 * x, "tied": lambda x: (2 * x).round(), "bf16": lambda x: (3 * x).bfloat16(),
    "flat": torch.zeros_like, "negative": lambda x: x - 1e4, "tiny": lambda x: x * 1e-40,
    "signed zeros": lambda x: x.sign() * 0.0,
    "one hot": lambda x: torch.full_like(x, -1e4).index_fill(0, torch.tensor(len(x) - 1), 50.0),
    "holes": lambda x: (4 * x).where(x > 0, -INF), "two heights": lambda x: torch.where(x > 0, 1.0, 1.0 - 2.0**-23),
}


@pytest.mark.parametrize("kind", WIDE)
def test_top_k_and_top_p_of_wide_rows_are_their_rules_exactly(kind):
    torch.manual_seed(0)
    x = WIDE[kind](torch.randn(3000))
    for p in (0.0, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0):
        assert survivors(S.top_p(x, p)) == top_p_by_rule(x, p)
    for k in (1, 2, 50, 1499, 2999, 3000):
        assert survivors(S.top_k(x, k=k)) == brute_top_k(x.tolist(), k) & survivors(x)
    many = x.expand(2, 2, -1)
    ks, ps = torch.tensor([[1, 70], [1500, 3000]]), torch.tensor([[0.0, 0.25], [0.9, 1.0]])
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(S.top_k(many, k=ks)[i, j], S.top_k(x, k=int(ks[i, j])))
        assert torch.equal(S.top_p(many, ps)[i, j], S.top_p(x, float(ps[i, j])))


def test_a_logit_of_plus_infinity_is_kept():
    x = row(1.0, INF, 2.0)
    for out in (S.top_k(x, k=1), S.top_p(x, 0.5), S.min_p(x, 0.1), S.top_k(row(1.0, INF, INF), k=1)[:3]):
        assert kept(out) == [False, True, False]


def test_filters_pass_gradients_to_what_they_keep():
    x = torch.randn(50).requires_grad_()
    for f in (S.top_p, S.top_k, S.min_p):
        out = f(x)
        (gradient,) = torch.autograd.grad(out.softmax(0).max(), x)
        assert torch.equal(gradient != 0, out > -INF)


@given(ROW, DTYPE, st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), st.booleans())
def test_min_p_is_its_definition(values, dtype, p, as_tensor):
    x = row(*values, dtype=dtype)
    out = S.min_p(x, torch.tensor(p) if as_tensor else p)
    ratio = (x.double() - x.double().max()).exp().tolist()
    p = float(torch.tensor(p))

    def keep(q):
        return {i for i in survivors(x) if ratio[i] >= q}

    assert keep(p * (1 + 1e-5)) <= survivors(out) <= keep(p * (1 - 1e-5))
    assert int(x.argmax()) in survivors(out) and out.dtype == dtype


@given(ROW, DTYPE, st.one_of(st.sampled_from([0.0, 1e-45, 1e-40, 1e-5, 1e-3, 1.0, 1e3, 1e30, 3e38]), st.floats(0.01, 100)),
       st.booleans())
def test_temperature_gives_the_distribution_of_its_definition(values, dtype, t, as_tensor):
    """trap 12: x-transformers crashes for fp16 at 1e-5 and for 1e-40."""
    x = row(*values, dtype=dtype)
    before = x.clone()
    out = S.temperature(x, torch.tensor(t) if as_tensor else t)
    assert out.dtype == dtype and torch.equal(x, before) and not out.isnan().any() and not (out == INF).any()
    assert out.max() > -INF
    t32 = float(torch.tensor(t, dtype=torch.float32))
    gap = x.double() - x.double().max()
    if t32 < 1e-37:  # subnormal: zero to some hardware, so only the limit is promised
        assert survivors(out) <= {i for i, g in enumerate(gap.tolist()) if g == 0}
        return
    # the quotient is rounded to the dtype: an error of an exponent is one of a probability
    top = abs(float(x.max())) / t32
    tolerance = 4 * torch.finfo(dtype).eps * (30 + (top if top <= torch.finfo(dtype).max else 0))
    assert (out.double().softmax(0) - (gap / t32).softmax(0)).abs().max() < tolerance


@given(ROW, DTYPE, st.floats(0, 4), st.floats(0, 1))
def test_top_a_is_its_definition(values, dtype, power, ratio):
    x = row(*values, dtype=dtype)
    out = S.top_a(x, power, ratio)
    p = x.double().softmax(0)
    limit = float(p.max()) ** power * ratio
    low = {i for i in survivors(x) if p[i] >= min(limit * (1 + 1e-4), float(p.max()))}
    high = {i for i in survivors(x) if p[i] >= limit * (1 - 1e-4)} | {i for i in range(len(p)) if p[i] >= p.max() * (1 - 1e-6)}
    assert low - {i for i in low if p[i] < 1e-30} <= survivors(out) <= high
    assert survivors(out)


OPS = {
    "temperature": lambda x: S.temperature(x, 0.7), "greedy": lambda x: S.temperature(x, 0),
    "temperature tensor": lambda x: S.temperature(x, torch.full(x.shape[:-1], 0.7)),
    "top_k": lambda x: S.top_k(x, k=3), "top_k fraction": S.top_k,
    "top_k tensor": lambda x: S.top_k(x, k=torch.full(x.shape[:-1], 3)),
    "top_p": lambda x: S.top_p(x, 0.6), "top_p tensor": lambda x: S.top_p(x, torch.full(x.shape[:-1], 0.6)),
    "min_p": lambda x: S.min_p(x, 0.2), "min_p tensor": lambda x: S.min_p(x, torch.full(x.shape[:-1], 0.2)),
    "top_a": S.top_a,
    "repetition": lambda x: S.repetition_penalty(x, torch.zeros(*x.shape[:-1], 2, dtype=torch.long), 1.3),
    "repetition tensor": lambda x: S.repetition_penalty(x, torch.zeros(*x.shape[:-1], 2, dtype=torch.long),
                                                        torch.full(x.shape[:-1], 1.3)),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_leading_dimensions_row_by_row_nothing_mutated(op, dtype):
    """trap 12: x-transformers' filters are 2-D."""
    f = OPS[op]
    x = (torch.randn(2, 3, 11) * 3).to(dtype)
    before, out = x.clone(), f(x)
    assert torch.equal(x, before) and out.dtype == dtype and out.shape == x.shape
    assert ((out > -INF).sum(-1) >= 1).all()
    for i in range(2):
        assert torch.equal(f(x[i]), out[i])
        for j in range(3):
            assert torch.equal(f(x[i, j]), out[i, j])
    assert torch.equal(f(x.transpose(0, 1)), out.transpose(0, 1))  # no contiguity needed


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("v", [1, 2])
def test_the_smallest_vocabularies(op, v):
    out = OPS[op](torch.zeros(2, v))
    assert (out > -INF).any(-1).all() and out.shape == (2, v)


@pytest.mark.parametrize("call, word", [
    (lambda x: S.top_k(x, k=0), "top_k"), (lambda x: S.top_k(x, k=-1), "top_k"), (lambda x: S.top_k(x, k=1.5), "top_k"),
    (lambda x: S.top_k(x, k=True), "top_k"), (lambda x: S.top_k(x, k=INF), "top_k"),
    (lambda x: S.top_k(x, k=math.nan), "top_k"),
    (lambda x: S.top_k(x, 1.5), "frac_num_tokens"), (lambda x: S.top_k(x, -0.1), "frac_num_tokens"),
    (lambda x: S.top_p(x, -0.1), "top_p"), (lambda x: S.top_p(x, 1.1), "top_p"), (lambda x: S.top_p(x, math.nan), "top_p"),
    (lambda x: S.min_p(x, -0.1), "min_p"), (lambda x: S.min_p(x, 1.1), "min_p"), (lambda x: S.min_p(x, math.nan), "min_p"),
    (lambda x: S.temperature(x, -1.0), "temperature"), (lambda x: S.temperature(x, INF), "temperature"),
    (lambda x: S.temperature(x, math.nan), "temperature"),
    (lambda x: S.top_a(x, -1.0), "min_p_pow"), (lambda x: S.top_a(x, 2.0, 1.5), "min_p_ratio"),
    (lambda x: S.repetition_penalty(x, torch.zeros(1, 1).long(), 0.0), "repetition_penalty"),
    (lambda x: S.repetition_penalty(x, torch.zeros(1, 1).long(), -1.0), "repetition_penalty"),
    (lambda x: S.repetition_penalty(x, torch.zeros(1, 1).long(), math.nan), "repetition_penalty"),
])
def test_bad_numbers_are_named(call, word):
    """trap 12: an empty support or a broken temperature is refused, with the value and what is allowed."""
    with pytest.raises(ValueError, match=f"{word} is .*allowed"):
        call(torch.zeros(1, 4))


def test_tensors_are_clamped():
    x = torch.randn(6, 9)
    bad = torch.tensor([-3.0, 0.0, 0.5, 2.0, INF, math.nan])
    for f in (S.top_p, S.min_p, S.temperature, lambda x, t: S.repetition_penalty(x, torch.zeros(6, 1).long(), t),
              lambda x, t: S.top_k(x, k=t)):
        out = f(x, bad)
        assert (out > -INF).any(-1).all() and not out.isnan().any() and (out < INF).all()
    assert torch.equal(S.top_p(x, bad)[3:], x[3:])
    assert (S.top_p(x, bad)[:2] > -INF).sum(-1).tolist() == [1, 1]
    assert (S.top_k(x, k=torch.tensor([-1, 0, 1, 8, 9, 1000])) > -INF).sum(-1).tolist() == [1, 1, 1, 8, 9, 9]
    assert (S.top_k(x, k=bad) > -INF).sum(-1).tolist() == [1, 1, 1, 2, 9, 9]
    assert (S.min_p(x, bad)[:2] > -INF).all() and (S.min_p(x, bad)[3:] > -INF).sum(-1).tolist() == [1, 1, 1]
    assert (S.temperature(x, bad)[:2] > -INF).sum(-1).tolist() == [1, 1]


def test_per_row_parameters_equal_the_rows_alone():
    """trap 12: x-transformers has no per-row temperature."""
    x = torch.randn(4, 15)
    for f, values in ((S.temperature, [0.0, 0.5, 1.0, 2.0]), (S.top_p, [0.1, 0.5, 0.9, 1.0]), (S.min_p, [0.0, 0.1, 0.5, 1.0]),
                      (lambda x, k: S.top_k(x, k=k), [1, 2, 7, 15])):
        together = f(x, torch.tensor(values))
        alone = torch.stack([f(x[i], value) for i, value in enumerate(values)])
        assert torch.equal(together, alone)


# ---- the peers

@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
def test_parity_with_transformers(scale):
    from transformers.generation import logits_process as hf

    torch.manual_seed(0)
    x, seen = torch.randn(32, 300) * scale, torch.randint(300, (32, 20))
    for t in (0.3, 1.0, 1.7):
        assert torch.equal(S.temperature(x, t), hf.TemperatureLogitsWarper(t)(None, x))
    for k in (1, 2, 17, 299, 300):
        assert torch.equal(S.top_k(x, k=k), hf.TopKLogitsWarper(k)(None, x.clone()))
    for p in (0.01, 0.3, 0.77, 0.9, 0.999):
        assert torch.equal(S.top_p(x, p), hf.TopPLogitsWarper(p)(None, x.clone()))
    for p in (0.001, 0.1, 0.5, 0.9):
        assert torch.equal(S.min_p(x, p), hf.MinPLogitsWarper(p)(None, x.clone()))
    for penalty in (0.5, 1.0, 1.3):
        expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(seen, x.clone())
        assert torch.equal(S.repetition_penalty(x, seen, penalty), expected)


def test_a_thousand_rows_are_cut_as_transformers_cuts_them():
    """Where we differ, the mass, or the ratio, is at its border up to the rounding of their fp32 sums and exponentials."""
    from transformers.generation import logits_process as hf

    torch.manual_seed(0)
    differing = 0
    for rows, v in ((400, 1000), (300, 8000), (250, 32_000), (50, 128_000)):
        x = torch.randn(rows, v) * (0.3 + 6 * torch.rand(rows, 1))
        for k in (1, 50, v // 2):
            assert torch.equal(S.top_k(x, k=k), hf.TopKLogitsWarper(k)(None, x.clone()))
        probs = x.double().softmax(-1)
        for p in (0.3, 0.9, 0.99):
            ours, theirs = S.top_p(x, p) > -INF, hf.TopPLogitsWarper(p)(None, x.clone()) > -INF
            for i in (ours != theirs).any(-1).nonzero()[:, 0].tolist():
                differing += 1
                assert abs(float(probs[i][ours[i] & theirs[i]].sum()) - p) < 1e-7
        for p in (0.001, 0.05, 0.5):
            ours, theirs = S.min_p(x, p) > -INF, hf.MinPLogitsWarper(p)(None, x.clone()) > -INF
            for i in (ours != theirs).any(-1).nonzero()[:, 0].tolist():
                differing += 1
                ratios = probs[i][ours[i] != theirs[i]] / probs[i].max()
                assert bool(((ratios / p - 1).abs() < 2e-6).all())
    assert differing <= 3  # of 9,000 comparisons


def test_parity_with_x_transformers_where_it_is_right():
    from x_transformers import autoregressive_wrapper as xt

    x = torch.randn(32, 300) * 3
    assert torch.equal(S.top_k(x), xt.top_k(x)) and torch.equal(S.top_k(x, k=7), xt.top_k(x, k=7))
    assert torch.equal(S.top_a(x), xt.top_a(x)) and torch.equal(S.min_p(x), xt.min_p(x))
    assert torch.equal(S.top_p(x, 0.7), xt.top_p(x.clone(), 0.7))


# ---- chains

def test_filters_compose_by_name_function_and_list():
    """trap 12: x-transformers' filters do not chain."""
    x = torch.randn(2, 20)

    def chained(*args):
        out = x
        for f in S.compose(*args):
            out = f(out)
        return out

    assert torch.equal(chained(None), x)
    assert torch.equal(chained("top_p", {"thres": 0.5}), S.top_p(x, 0.5))
    assert torch.equal(chained(S.top_k, {"k": 4}), S.top_k(x, k=4))
    assert torch.equal(chained(["top_k", S.min_p], [{"k": 4}, {"min_p": 0.3}]), S.min_p(S.top_k(x, k=4), 0.3))
    assert torch.equal(chained([lambda t: -t, "top_k"]), S.top_k(-x))
    with pytest.raises(ValueError, match="did you mean 'top_k'"):
        S.compose("topk")
    with pytest.raises(ValueError, match="2 filters but 1"):
        S.compose(["top_k", "top_p"], [{}])


# ---- the draws

def chi_square(draws, p):
    """The p-value of `draws` under probabilities `p` (zero-probability tokens must not appear)."""
    counts = torch.bincount(draws.flatten(), minlength=len(p)).double()
    assert not counts[p == 0].any()
    counts, p = counts[p > 0], p[p > 0].double() / p.double().sum()
    return stats.chisquare(counts.numpy(), (p * counts.sum()).numpy()).pvalue


LOGITS = torch.tensor([1.0, 0.0, -INF, 2.5, -1.0, -3.0, 0.3, -INF, 1.2])


def test_sample_draws_the_softmax():
    draws = S.sample(LOGITS.expand(40_000, -1), torch.Generator().manual_seed(0))
    assert chi_square(draws, LOGITS.softmax(0)) > 1e-3
    assert torch.equal(draws, S.sample(LOGITS.expand(40_000, -1), torch.Generator().manual_seed(0)))
    assert S.sample(LOGITS.expand(2, 3, 4, -1)).shape == (2, 3, 4) and S.sample(LOGITS).shape == ()
    assert S.sample(LOGITS.bfloat16().expand(9, -1)).dtype == torch.long


def gumbel_draws(keys, positions):
    return (LOGITS + S.gumbel(keys, positions, len(LOGITS))).argmax(-1)


def test_counter_noise_draws_the_softmax_across_positions_rows_samples_and_seeds():
    n, one = 40_000, torch.ones(40_000, dtype=torch.long)
    p = LOGITS.softmax(0)
    views = {
        "positions of one row": (S.row_keys(0, 1, 1, CPU).expand(n), torch.arange(n)),
        "rows of one seed": (S.row_keys(0, n, 1, CPU), one),
        "samples of one row": (S.row_keys(0, 1, n, CPU), one),
        "seeds of their own": (S.row_keys(torch.arange(n), n, 1, CPU), one),
        "consecutive int seeds": (torch.cat([S.row_keys(s, 1, 1, CPU) for s in range(n // 2)]), one[: n // 2]),
        "large seeds": (S.row_keys(torch.arange(n) * (2**48 + 1), n, 1, CPU), one),
    }
    for name, (keys, positions) in views.items():
        assert chi_square(gumbel_draws(keys, positions), p) > 1e-3, name


def test_counter_noise_is_gumbel_noise():
    noise = S.gumbel(S.row_keys(1, 200, 1, CPU), torch.arange(200), 500).flatten()
    assert noise.isfinite().all() and noise.dtype == torch.float32
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_noise_of_different_rows_positions_tokens_and_samples_is_independent():
    n = 20_000
    base = S.row_keys(0, n, 1, CPU)
    first = gumbel_draws(base, torch.full((n,), 5))
    others = {"next position": (base, 6), "next row": (base.roll(1), 5), "next seed": (S.row_keys(1, n, 1, CPU), 5),
              "next sample": (S.row_keys(0, n, 2, CPU)[1::2], 5)}
    for name, (keys, position) in others.items():
        second = gumbel_draws(keys, torch.full((n,), position))
        table = torch.bincount(first * len(LOGITS) + second, minlength=len(LOGITS) ** 2).view(len(LOGITS), -1).double()
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3, name


def test_keys_do_not_collide():
    keys = torch.cat([S.row_keys(seed, 300, 20, CPU) for seed in range(30)])
    assert keys.unique().numel() == keys.numel()
    own = S.row_keys(torch.arange(-5000, 5000), 10_000, 3, CPU)
    assert torch.cat((own, keys)).unique().numel() == own.numel() + keys.numel()
    states = S.fold(own[:100, None], torch.arange(500))
    assert states.unique().numel() == states.numel()


def test_a_rows_noise_depends_on_nothing_but_its_key_and_position():
    keys = S.row_keys(3, 8, 2, CPU)
    noise = S.gumbel(keys, torch.arange(16), 50)
    assert torch.equal(noise[5], S.gumbel(keys[5:6], torch.tensor([5]), 50)[0])
    assert torch.equal(noise[:, :20], S.gumbel(keys, torch.arange(16), 20))
    assert torch.equal(S.row_keys(3, 100, 2, CPU)[:16], keys)
    assert torch.equal(S.row_keys(3, 8, 9, CPU).view(8, 9)[:, :2].reshape(-1), keys)
    assert torch.equal(S.row_keys(torch.tensor([9, 3]), 2, 1, CPU).flip(0), S.row_keys(torch.tensor([3, 9]), 2, 1, CPU))


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5, -(2**70)])
def test_any_integer_is_a_seed(seed):
    assert S.row_keys(seed, 2, 1, CPU).shape == (2,)


def test_a_seed_for_the_wrong_number_of_rows():
    with pytest.raises(ValueError, match="seed has shape"):
        S.row_keys(torch.arange(3), 2, 1, CPU)
