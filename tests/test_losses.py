"""Every preference loss: against its formula at 60 digits, against trl's own code, and by what is known of it.

Where trl differs on purpose or by mistake (1.16), and so isn't compared:
- sigmoid ignores `label_smoothing`; ours is cDPO.
- cpo and orpo add the NLL as a mean over the batch's tokens, and orpo's counts the prompt's tokens too; ours is each
  pair's own mean over the completion, the same for completions of one length.
- exo_pair has its smoothing in fp32, whatever the log-probabilities.
- orpo is NaN for a text of probability 1, discopop and forward_kl are not finite for beta d below -88; ours are.
- alpha-divergence is cut off at an exponent of 80 (and has no fp64); ours goes on as a tangent from 30 on.
"""

import inspect
import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import mpmath
import pytest
import torch
from conftest import LLAMA, ids, tiny
from hypothesis import given
from hypothesis import strategies as st

from xalign import DPO, losses
from xalign.errors import ConfigError
from xalign.logprobs import scored_logprobs

mp = mpmath.mp.clone()
mp.dps = 60
mpf = mp.mpf
LN2 = math.log(2)
PAIR = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
LENGTHS = ["chosen_lengths", "rejected_lengths"]
ARGUMENTS = dict.fromkeys(losses.LOSSES, PAIR) | {
    "ipo": PAIR + LENGTHS, "sigmoid_norm": PAIR + LENGTHS, "simpo": PAIR[:2] + LENGTHS, "cpo": PAIR[:2] + LENGTHS,
    "orpo": PAIR[:2] + LENGTHS, "unlikelihood": PAIR[:2] + LENGTHS, "sft": ["policy_chosen", "chosen_lengths"]}


def vectors(*columns, dtype=torch.double):
    """Leaves (b,) with gradients, one a column of numbers."""
    return [torch.tensor(c, dtype=dtype, requires_grad=True) for c in columns]


def give(name, v, **options):
    """The loss called by name with whichever of the six vectors in `v` it takes."""
    return losses.LOSSES[name](**{k: v[k] for k in ARGUMENTS[name]}, **options)


# ---- the formulas of losses.md, for one pair, at 60 digits

def s(x):
    return 1 / (1 + mp.exp(-x))


def ls(x):
    """ln s(x); far out to the left its series' first term, which 1 + exp(-x) would swallow the 1 of at 60 digits."""
    return -mp.log1p(mp.exp(-x)) if x > -1000 else x


def odds(m):
    return m - mp.log(-mp.expm1(min(m, mpf(-1e-6))))  # the documented clamp


def smoothed(z, e):
    return -(1 - e) * ls(z) - e * ls(-z)


FORMULAS = {
    "sigmoid": lambda p, beta, label_smoothing=0: smoothed(beta * p.d, label_smoothing),
    "robust": lambda p, beta, label_smoothing=0: (
        (-(1 - label_smoothing) * ls(beta * p.d) + label_smoothing * ls(-beta * p.d)) / (1 - 2 * label_smoothing)),
    "hinge": lambda p, beta: max(mpf(0), 1 - beta * p.d),
    "ipo": lambda p, beta: (p.a / p.nw - p.b / p.nl - 1 / (2 * beta)) ** 2,
    "ipo_sum": lambda p, beta: (p.d - 1 / (2 * beta)) ** 2,
    "exo_pair": lambda p, beta, label_smoothing=0.001: (
        s(beta * p.d) * (ls(beta * p.d) - mp.log(1 - label_smoothing))
        + s(-beta * p.d) * (ls(-beta * p.d) - mp.log(label_smoothing))),
    "nca_pair": lambda p, beta: -ls(beta * p.a) - ls(-beta * p.a) / 2 - ls(-beta * p.b) / 2,
    "bco_pair": lambda p, beta: -ls(beta * p.a) - ls(-beta * p.b),
    "sppo_hard": lambda p, beta: (p.a - 1 / (2 * beta)) ** 2 + (p.b + 1 / (2 * beta)) ** 2,
    "apo_zero": lambda p, beta: 1 - s(beta * p.a) + s(beta * p.b),
    "apo_down": lambda p, beta: s(beta * p.a) + 1 - s(beta * p.d),
    "discopop": lambda p, beta, tau=0.05: (
        -ls(beta * p.d) * (1 - s(beta * p.d / tau)) + mp.exp(-beta * p.d) * s(beta * p.d / tau)),
    "sigmoid_norm": lambda p, beta: -ls(beta * (p.a / p.nw - p.b / p.nl)),
    "simpo": lambda p, beta, gamma=0.5: -ls(beta * (p.pc / p.nw - p.pr / p.nl) - gamma),
    "cpo": lambda p, beta: -ls(beta * (p.pc - p.pr)) - p.pc / p.nw,
    "unlikelihood": lambda p, alpha=0.5: alpha * p.pr / p.nl - p.pc / p.nw,
    "orpo": lambda p, beta: -p.pc / p.nw - beta * ls(odds(p.pc / p.nw) - odds(p.pr / p.nl)),
}
CASES = [(name, {} if name == "unlikelihood" else {"beta": 0.1}) for name in FORMULAS] + [("unlikelihood", {"alpha": 0.0}),
    ("sigmoid", {"beta": 0.5, "label_smoothing": 0.2}), ("robust", {"beta": 0.5, "label_smoothing": 0.2}),
    ("exo_pair", {"beta": 1.0, "label_smoothing": 0.3}), ("discopop", {"beta": 0.1, "tau": 0.7}),
    ("discopop", {"beta": 0.05, "tau": 1.0}), ("simpo", {"beta": 2.0, "gamma": 1.5}), ("sigmoid_norm", {"beta": 5.0}),
    ("sppo_hard", {"beta": 0.001}), ("ipo_sum", {"beta": 2.0}), ("orpo", {"beta": 1.0}), ("hinge", {"beta": 1.0})]


WITHOUT_BETA = ("sft", "unlikelihood")


def exact(name, row, options):
    """Loss and its four gradients of one pair (pc, pr, rc, rr, nw, nl), by central differences of the formula."""
    *logps, nw, nl = map(mpf, row)
    options = {k: mpf(v) for k, v in options.items()}

    def f(pc, pr, rc, rr):
        a, b = pc - rc, pr - rr
        return FORMULAS[name](SimpleNamespace(pc=pc, pr=pr, a=a, b=b, d=a - b, nw=nw, nl=nl), **options)

    h = mpf(10) ** -20
    moved = [[x + h * (i == j) for j, x in enumerate(logps)] for i in range(4)], [
        [x - h * (i == j) for j, x in enumerate(logps)] for i in range(4)]
    return float(f(*logps)), [float((f(*up) - f(*down)) / (2 * h)) for up, down in zip(*moved, strict=True)]


def rows(beta):
    """Pairs (pc, pr, rc, rr, nw, nl): ordinary, |beta d| = 1e4 in each way, equal vectors, length 1, probability 1."""
    g = torch.Generator().manual_seed(0)
    ref = -torch.rand(10, 2, generator=g) * 150 - 1
    policy = (ref + torch.randn(10, 2, generator=g) * torch.tensor([1.0, 12.0]).repeat(5)[:, None]).clamp(max=-0.5)
    lengths = torch.randint(1, 60, (10, 2), generator=g)
    far = 1e4 / beta
    return [
        *torch.cat([policy, ref, lengths], 1).tolist(),
        [-3, -5, -3 - far, -5, 7, 4], [-3 - far, -5, -3, -5, 7, 4], [-3, -5, -3, -5 - far, 7, 4],
        [-3, -5 - far, -3, -5, 7, 4], [-3, -5, -3 - far, -5 - far, 1, 9], [-3 - far, -5 - far, -3, -5, 1, 9],
        [-40, -50, -40, -50, 11, 3], [-6, -6, -6, -6, 5, 5], [-0.25, -2.5, -0.5, -2, 1, 1], [-9, -0.125, -8, -1, 1, 6],
        [0, -3, -1, -2, 2, 2], [-3, 0, -2, -1, 2, 2], [0, 0, 0, 0, 1, 1], [-1e-4, -2e-4, -1, -1, 10, 10]]


def untied(rows):
    """Moved so that no two ranks are equal: ties have no order, and so no one gradient."""
    return [[x - i * step for x, step in zip(row, (0.1371, 0.0917, 0.2113, 0.0531, 0, 0), strict=True)]
            for i, row in enumerate(rows)]


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_and_gradients_are_the_formulas(name, options, dtype):
    columns = vectors(*zip(*rows(options.get("beta", 0.1)), strict=True), dtype=dtype)
    v = dict(zip(PAIR + LENGTHS, [*columns[:4], *(n.detach().long() for n in columns[4:])], strict=True))
    loss = give(name, v, **options)
    assert loss.dtype == dtype and loss.shape == columns[0].shape
    loss.sum().backward()
    value, slopes = zip(*(exact(name, row, options) for row in torch.stack(columns, 1).tolist()), strict=True)
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.double else {"rtol": 1e-4, "atol": 2e-4}
    torch.testing.assert_close(loss.double(), torch.tensor(value, dtype=torch.double), **close)
    for k, slope in zip(PAIR, zip(*slopes, strict=True), strict=True):
        grad = v[k].grad.double() if k in ARGUMENTS[name] else torch.zeros(len(slope), dtype=torch.double)
        torch.testing.assert_close(grad, torch.tensor(slope, dtype=torch.double), **close, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_finite_far_out(name, beta, dtype):
    """In fp32 too, where peers give NaN: every combination of the sides at 0 and at +-1e4 / beta, one token or many."""
    far = 1e4 / beta
    grid = torch.cartesian_prod(*[torch.tensor([0.0, -1.0, -80 / beta, -far])] * 4, torch.tensor([1.0, 700.0])).to(dtype)
    columns = [c.clone().requires_grad_() for c in grid.unbind(1)]
    v = dict(zip(PAIR + LENGTHS, [*columns, columns[4]], strict=True))
    loss = give(name, v, **({} if name in WITHOUT_BETA else {"beta": beta}))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(v[k].grad.isfinite().all() for k in ARGUMENTS[name] if k in PAIR)


# ---- names, signatures, hyperparameters

def test_names_and_signatures():
    """`DPO` picks arguments by their names, so the names are the contract; hyperparameters are keywords with defaults."""
    assert " ".join(losses.LOSSES) == ("sigmoid robust hinge ipo ipo_sum exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired "
                                       "apo_zero apo_down discopop sigmoid_norm simpo cpo orpo sft unlikelihood")
    assert losses.LOSSES["sigmoid"] is losses.dpo
    for name, loss in losses.LOSSES.items():
        given = inspect.signature(loss).parameters.values()
        assert [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD] == ARGUMENTS[name]
        assert all(p.default is not p.empty for p in given if p.kind is p.KEYWORD_ONLY)
        assert name in ("sigmoid", loss.__name__) and loss.__doc__


def options_of(loss):
    return {p.name: p.default for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY}


def test_defaults():
    """Those of docs/losses.md, which any change must change with them."""
    special = {"exo_pair": {"label_smoothing": 1e-3}, "discopop": {"tau": 0.05}, "sigmoid_norm": {"beta": 5.0},
               "simpo": {"beta": 2.0, "gamma": 0.5}, "sft": {"tokens_per_pair": None},
               "unlikelihood": {"alpha": 0.5}}
    for name, loss in losses.LOSSES.items():
        assert options_of(loss) == ({} if name in WITHOUT_BETA else {"beta": 0.1}) | dict.fromkeys(
            ["label_smoothing"] if name in ("sigmoid", "robust", "aot", "aot_unpaired") else [], 0.0) | special.get(name, {})
    assert options_of(losses.kto) == {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert options_of(losses.bradley_terry) == {"margin": None, "center": 0.0}


BAD = {"beta": [0, -0.1, math.inf, math.nan], "label_smoothing": [-0.1, 0.5, 1, math.nan], "tau": [0, -1, 1.01, math.nan],
       "alpha": [-0.1, 1, math.nan], "gamma": [-0.1, math.inf, math.nan], "tokens_per_pair": [0, -1, math.nan, math.inf],
       "center": [-1, math.nan, math.inf],
       "desirable_weight": [-1, math.nan, math.inf], "undesirable_weight": [-1, math.nan, math.inf]}
WRONG = [(name, option, value) for name, loss in losses.LOSSES.items() for option in options_of(loss) for value in BAD[option]]


@pytest.mark.parametrize(("name", "option", "value"), [*WRONG, ("exo_pair", "label_smoothing", 0.0)])
def test_a_bad_hyperparameter_is_told_at_once(name, option, value):
    """Also when there is nothing to compute yet."""
    with pytest.raises(ConfigError, match=rf"^{option} is {value!r}, allowed is a .*number"):
        losses.LOSSES[name](*[torch.zeros(0)] * len(ARGUMENTS[name]), **{option: value})


@pytest.mark.parametrize(("call", "option", "value"), [
    (partial(losses.kto, torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0.0), o, v)
    for o in ("beta", "desirable_weight", "undesirable_weight") for v in BAD[o]] + [
    (partial(losses.bradley_terry, torch.zeros(0), torch.zeros(0)), "center", v) for v in BAD["center"]] + [
    (partial(losses.divergence, torch.zeros(0), kind), "alpha", v) for kind in ("alpha", "js") for v in (math.nan, math.inf)])
def test_a_bad_hyperparameter_of_the_others(call, option, value):
    with pytest.raises(ConfigError, match=rf"^{option} is {value!r}, allowed is a finite number"):
        call(**{option: value})


def test_bounds_that_are_allowed():
    x = torch.zeros(1)
    assert losses.discopop(x, x, x, x, tau=1.0) == pytest.approx(LN2 / 2 + 0.5)
    assert losses.simpo(x, x, x + 1, x + 1, gamma=0.0) == pytest.approx(LN2)
    assert losses.kto(x, x, x == 0, 0.0, desirable_weight=0.0) == 0


# ---- what is known of them

E = 1e-3
AT_REST = {"sigmoid": LN2, "robust": LN2, "hinge": 1, "ipo": 25, "ipo_sum": 25, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2,
           "exo_pair": -LN2 - (math.log(1 - E) + math.log(E)) / 2, "sppo_hard": 50, "aot": LN2, "aot_unpaired": LN2,
           "apo_zero": 1, "apo_down": 1, "discopop": LN2 / 2 + 0.5, "sigmoid_norm": LN2}


@pytest.mark.parametrize("name", AT_REST)
def test_policy_equal_to_reference(name):
    chosen, rejected = torch.tensor([-3.0, -40.0, -7.5]), torch.tensor([-9.0, -40.0, -1.0])
    lengths = torch.tensor([3, 1, 20])
    v = dict(zip(PAIR + LENGTHS, [chosen, rejected, chosen, rejected, lengths, lengths.flip(0)], strict=True))
    torch.testing.assert_close(give(name, v, beta=0.1), torch.full((3,), float(AT_REST[name])))


FOUR = st.lists(st.floats(-60, 60), min_size=4, max_size=4)
BETAS = st.sampled_from([0.05, 0.3, 1.0])


@given(FOUR, BETAS, st.sampled_from([0.0, 0.2, 0.45]))
def test_swapped_pairs(values, beta, e):
    """loss(c, r) - loss(r, c) = -beta d, times 1 - 2e where smoothed; of robust it is -beta d again, over 1 - 2e times 1."""
    pc, pr, rc, rr = torch.tensor(values, dtype=torch.double)[:, None]
    z = beta * ((pc - rc) - (pr - rr))

    def gap(loss, **options):
        return loss(pc, pr, rc, rr, beta=beta, **options) - loss(pr, pc, rr, rc, beta=beta, **options)

    torch.testing.assert_close(gap(losses.dpo), -z)
    torch.testing.assert_close(gap(losses.dpo, label_smoothing=e), -(1 - 2 * e) * z)
    torch.testing.assert_close(gap(losses.robust, label_smoothing=e), -z / (1 - 2 * e))


@given(FOUR, BETAS, st.sampled_from([0.0, 0.1, 0.4]))
def test_robust_is_unbiased_under_flips(values, beta, e):
    pc, pr, rc, rr = torch.tensor(values, dtype=torch.double)[:, None]
    kept = losses.robust(pc, pr, rc, rr, beta=beta, label_smoothing=e)
    flipped = losses.robust(pr, pc, rr, rc, beta=beta, label_smoothing=e)
    torch.testing.assert_close((1 - e) * kept + e * flipped, losses.dpo(pc, pr, rc, rr, beta=beta))


def test_robust_is_unbounded_below():
    zero = torch.zeros(1)
    assert losses.robust(zero + 1e4, zero, zero, zero, beta=1.0, label_smoothing=0.1) == pytest.approx(-1250)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_minima_of_the_squares(beta):
    """ipo at a / n_w - b / n_l = 1 / 2 beta, ipo_sum at d = 1 / 2 beta, sppo at a = -b = 1 / 2 beta."""
    half, lengths = 0.5 / beta, (torch.tensor([4.0]), torch.tensor([5.0]))
    for loss, chosen, rejected, more in ((losses.ipo, 4 * (half - 3), -15.0, lengths), (losses.ipo_sum, half - 3, -3.0, ()),
                                         (losses.sppo_hard, half, -half, ())):
        pc, pr, rc, rr = vectors([chosen - 2], [rejected - 3], [-2.0], [-3.0])
        value = loss(pc, pr, rc, rr, *more, beta=beta)
        value.sum().backward()
        assert value.item() == pytest.approx(0, abs=1e-20)
        assert pc.grad.item() == pytest.approx(0, abs=1e-12) and pr.grad.item() == pytest.approx(0, abs=1e-12)
        pc.grad = None
        loss(pc + 1, pr, rc, rr, *more, beta=beta).sum().backward()
        assert pc.grad.item() > 0  # one step further the loss pulls back, as sigmoid never does


@pytest.mark.parametrize("e", [1e-3, 0.2])
def test_limits_and_minimum_of_exo(e):
    def loss(z):
        return losses.exo_pair(*vectors([z], [0.0], [0.0], [0.0]), beta=1.0, label_smoothing=e).item()

    assert loss(1e4) == pytest.approx(-math.log(1 - e)) and loss(-1e4) == pytest.approx(-math.log(e))
    best = math.log((1 - e) / e)
    assert loss(best) == pytest.approx(0, abs=1e-12) and min(loss(best + 0.1), loss(best - 0.1)) > 1e-7


def test_limits_of_apo():
    far = torch.tensor([1e4, -1e4, 1e4, -1e4]), torch.tensor([1e4, 1e4, -1e4, -1e4])
    zero = torch.zeros(4)
    assert losses.apo_zero(*far, zero, zero, beta=1.0).tolist() == [1, 2, 0, 1]
    assert losses.apo_down(*far, zero, zero, beta=1.0).tolist() == [1.5, 1, 1, 0.5]
    assert losses.apo_down(zero - 1e4, zero - 2e4, zero, zero, beta=1.0).tolist() == [0] * 4  # both down, the rejected more


def test_lengths_of_one_turn_means_into_sums():
    v = dict(zip(PAIR, vectors([-3.0, -8.0], [-5.0, -2.0], [-4.0, -4.0], [-3.0, -3.0]), strict=True))
    v |= dict.fromkeys(LENGTHS, torch.ones(2, dtype=torch.long))
    for mean, total in (("ipo", "ipo_sum"), ("sigmoid_norm", "sigmoid")):
        torch.testing.assert_close(give(mean, v, beta=0.3), give(total, v, beta=0.3))


# ---- aot

def ranked(name, rows, beta, e):
    """The formula of aot at 60 digits: sorted lists, one loss a rank."""
    k = (1, 2, 3) if name == "aot" else (2, 1, 3)
    left, right = zip(*((r[0] - r[k[0]], r[k[1]] - r[k[2]]) for r in rows), strict=True)
    return [smoothed(beta * (x - y), e) for x, y in zip(sorted(left), sorted(right), strict=True)]


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("e", [0.0, 0.2])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_formula_on_ranks(name, e, dtype):
    columns = vectors(*zip(*untied(rows(0.5)), strict=True), dtype=dtype)[:4]
    loss = losses.LOSSES[name](*columns, beta=0.5, label_smoothing=e)
    loss.sum().backward()
    known = [list(map(mpf, row)) for row in torch.stack(columns, 1).tolist()]
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.double else {"rtol": 1e-4, "atol": 2e-4}
    values = torch.tensor([float(x) for x in ranked(name, known, mpf(0.5), e)], dtype=torch.double)
    torch.testing.assert_close(loss.double(), values, **close)
    h, slopes = mpf(10) ** -20, torch.zeros(4, len(known), dtype=torch.double)
    for i in range(len(known)):
        for j in range(4):
            known[i][j] += h
            up = mp.fsum(ranked(name, known, mpf(0.5), e))
            known[i][j] -= 2 * h
            slopes[j, i] = float((up - mp.fsum(ranked(name, known, mpf(0.5), e))) / (2 * h))
            known[i][j] += h
    torch.testing.assert_close(torch.stack([c.grad for c in columns]).double(), slopes, **close)


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_aot_under_permutations(one, other):
    """Pairs in any order; and texts may change partners: policy and reference for aot (each keeps its pair), sides unpaired."""
    pc, pr, rc, rr = torch.tensor(rows(0.1)[:6], dtype=torch.double).T[:4]
    whole, unpaired = losses.aot(pc, pr, rc, rr), losses.aot_unpaired(pc, pr, rc, rr)
    torch.testing.assert_close(losses.aot(pc[one], pr[one], rc[other], rr[other]), whole)
    torch.testing.assert_close(losses.aot_unpaired(pc[one], pr[other], rc[one], rr[other]), unpaired)


def test_aot_of_one_pair_is_dpo_and_micro_batches_differ():
    """Documented: ranks are those of a micro-batch, so the mean over two halves is not the whole batch's."""
    g = torch.Generator().manual_seed(0)
    four = torch.randn(4, 6, generator=g, dtype=torch.double) * 9
    for loss in (losses.aot, losses.aot_unpaired):
        single = torch.cat([loss(*x, label_smoothing=0.1) for x in four.split(1, dim=1)])
        torch.testing.assert_close(single, losses.dpo(*four, label_smoothing=0.1))
        halves = torch.cat([loss(*four[:, :3]), loss(*four[:, 3:])]).mean()
        assert abs(halves - loss(*four).mean()) > 1e-3


# ---- sft

def test_sft_is_the_token_mean_however_the_batch_is_split():
    logps, lengths = torch.tensor([-9.0, -2.0, -30.0, -1.0]), torch.tensor([4, 1, 20, 2])
    token_mean = 42 / 27
    assert losses.sft(logps, lengths).mean() == pytest.approx(token_mean)
    for cut in (1, 2, 3):  # weights are pairs, as in every other loss
        parts = [losses.sft(a, n, tokens_per_pair=27 / 4) for a, n in
                 zip(logps.split([cut, 4 - cut]), lengths.split([cut, 4 - cut]), strict=True)]
        assert sum(p.mean() * len(p) / 4 for p in parts) == pytest.approx(token_mean)
        assert sum(losses.sft(a, n).mean() * len(a) / 4 for a, n in
                   zip(logps.split([cut, 4 - cut]), lengths.split([cut, 4 - cut]), strict=True)) != pytest.approx(token_mean)
    x = logps.double().requires_grad_()
    losses.sft(x, lengths).mean().backward()
    torch.testing.assert_close(x.grad, torch.full((4,), -1 / 27, dtype=torch.double))


# ---- kto and the reward model

def exact_kto(r, z0, desirable, beta, wd, wu):
    z0 = max(z0, 0)
    return wd * (1 - s(beta * (r - z0))) if desirable else wu * (1 - s(beta * (z0 - r)))


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("kl", [0.0, 3.5, -2.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.4)])
def test_kto_is_the_formula(kl, weights, dtype):
    ratios = [-1e5, -30.0, -1.0, 0.0, 2.5, 40.0, 1e5]
    policy, ref = vectors(ratios * 2, [0.0] * 14, dtype=dtype)
    labels = torch.arange(14) < 7
    loss = losses.kto(policy, ref, labels, torch.tensor(kl, dtype=dtype), beta=0.1, desirable_weight=weights[0],
                      undesirable_weight=weights[1])
    loss.sum().backward()

    def f(r, wanted):
        return exact_kto(r, mpf(kl), wanted, mpf(0.1), *weights)

    known = [(mpf(r), wanted) for wanted in (True, False) for r in ratios]
    h = mpf(10) ** -20
    slopes = [float((f(r + h, wanted) - f(r - h, wanted)) / (2 * h)) for r, wanted in known]
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.double else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss.double(), torch.tensor([float(f(*x)) for x in known], dtype=torch.double), **close)
    torch.testing.assert_close(policy.grad.double(), torch.tensor(slopes, dtype=torch.double), **close)
    torch.testing.assert_close(ref.grad, -policy.grad)


def test_kto_holds_its_point_of_reference():
    """No gradient through kl, a negative estimate counts as 0, a number will do; far out the losses are 0 and the weights."""
    policy, ref, kl = vectors([1.0, -2.0], [0.0, 0.0], 2.0)
    labels = torch.tensor([True, False])
    losses.kto(policy, ref, labels, kl).sum().backward()
    assert kl.grad is None
    torch.testing.assert_close(losses.kto(policy, ref, labels, -7.0), losses.kto(policy, ref, labels, 0.0))
    assert losses.kto(policy, ref, labels, 0.1).equal(losses.kto(policy, ref, labels, torch.tensor(0.1, dtype=torch.double)))
    far = torch.tensor([1e5, -1e5, 1e5, -1e5])
    loss = losses.kto(far, 0 * far, torch.tensor([True, True, False, False]), 0.0, desirable_weight=2, undesirable_weight=3)
    assert loss.tolist() == [0, 2, 3, 0]


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.sampled_from([None, 0.7]), st.sampled_from([0.0, 0.01]))
def test_bradley_terry_is_the_formula(chosen, rejected, margin, center):
    w, r = vectors([chosen], [rejected])
    loss = losses.bradley_terry(w, r, margin=None if margin is None else torch.tensor([margin], dtype=w.dtype), center=center)
    loss.sum().backward()
    z = mpf(chosen) - mpf(rejected) - mpf(margin or 0)
    total = mpf(chosen) + mpf(rejected)
    pull = 2 * mpf(center) * total
    assert loss.item() == pytest.approx(float(-ls(z) + center * total**2), rel=1e-9, abs=1e-9)
    assert w.grad.item() == pytest.approx(float(-s(-z) + pull), rel=1e-9, abs=1e-9)
    assert r.grad.item() == pytest.approx(float(s(-z) + pull), rel=1e-9, abs=1e-9)


# ---- modifiers

DIVERGENCES = {"reverse_kl": lambda a, alpha: a, "forward_kl": lambda a, alpha: 1 - mp.exp(-a),
               "js": lambda a, alpha: mp.log(2) + ls(a), "alpha": lambda a, alpha: (mp.exp((alpha - 1) * a) - 1) / (alpha - 1)}
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 0.9), ("alpha", 0.0), ("alpha", 1.5)]


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_divergences_are_the_formulas(kind, alpha):
    values = [-29.0, -8.0, -1.0, -1e-6, 0.0, 1e-6, 0.5, 12.0, 29.0]
    (x,) = vectors(values)
    out = losses.divergence(x, kind, alpha)
    out.sum().backward()
    h = mpf(10) ** -20
    for i, a in enumerate(map(mpf, values)):
        def f(a):
            return DIVERGENCES[kind](a, mpf(alpha))
        assert out[i].item() == pytest.approx(float(f(a)), rel=1e-9, abs=1e-15)
        assert x.grad[i].item() == pytest.approx(float((f(a + h) - f(a - h)) / (2 * h)), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_divergences_far_out(kind, alpha, dtype):
    """Rising and finite in value and slope for |log-ratio| up to 1e5, that is |beta d| = 1e4; so are losses on top of them."""
    a, b = vectors([1e5, 1e4, 100.0, 0.0, -100.0, -1e4, -1e5], [-1e5, 1e5, 0.0, 0.0, 50.0, -1e4, 1e5], dtype=dtype)
    fa, fb = losses.divergence(a, kind, alpha), losses.divergence(b, kind, alpha)
    assert fa.isfinite().all() and (fa.diff() <= 0).all() and abs(fa[3]) < 1e-6
    zero = torch.zeros_like(fa)
    for loss in (losses.dpo, losses.hinge, losses.ipo_sum, losses.exo_pair, losses.discopop, losses.robust):
        value = loss(fa, fb, zero, zero)
        grads = torch.autograd.grad(value.sum(), (a, b), retain_graph=True)
        assert value.isfinite().all() and all(g.isfinite().all() for g in grads)
    (slope,) = torch.autograd.grad(fa.sum(), a)
    assert (slope**2).isfinite().all() and (kind == "js" or (slope[-1:] > 0).all() or alpha > 1)


def test_the_tangent_joins_smoothly():
    x = torch.tensor([-30 + 1e-6, -30.0, -30 - 1e-6, -31.0], dtype=torch.double, requires_grad=True)
    y = losses.divergence(x, "forward_kl")
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4,), math.exp(30), dtype=torch.double), rtol=2e-6, atol=0)
    assert y[3].item() == pytest.approx(1 - 2 * math.exp(30), rel=1e-9)


def test_divergences_by_alpha_and_by_a_wrong_name():
    x = torch.linspace(-3, 3, 7)
    assert losses.divergence(x) is x and losses.divergence(x, "alpha", 1.0) is x
    torch.testing.assert_close(losses.divergence(x, "alpha", 0.0), losses.divergence(x, "forward_kl"))
    with pytest.raises(ConfigError, match=r"no divergence 'forwardkl', did you mean 'forward_kl'\?; allowed are .*alpha, js"):
        losses.divergence(x, "forwardkl")


# ---- a world small enough to know the optimum of

def world():
    """Six texts: reference, rewards, all ordered pairs, and the chance that the first is preferred (Bradley and Terry)."""
    g = torch.Generator().manual_seed(1)
    ref, reward = torch.randn(2, 6, generator=g, dtype=torch.double)
    ref = ref.log_softmax(0)
    i, j = (~torch.eye(6, dtype=torch.bool)).nonzero().T
    return ref, reward, i, j, torch.sigmoid(reward[i] - reward[j])


@pytest.mark.parametrize(("name", "flips"), [("sigmoid", 0.0), ("robust", 0.0), ("robust", 0.3)])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_optimum_is_the_reference_tilted_by_the_reward(name, flips, beta):
    """p* = ref exp(r / beta) up to its norm; robust finds it although labels are flipped, which sigmoid does not."""
    ref, reward, i, j, chance = world()
    chance = (1 - flips) * chance + flips * (1 - chance)
    best = (ref + reward / beta).log_softmax(0)

    def slope(loss, logits, **options):
        logits = logits.clone().requires_grad_()
        p = logits.log_softmax(0)
        (chance * loss(p[i], p[j], ref[i], ref[j], beta=beta, **options)).mean().backward()
        return logits.grad.abs().max().item()

    options = {"label_smoothing": flips} if flips else {}
    assert slope(losses.LOSSES[name], best, **options) < 1e-12
    assert slope(losses.LOSSES[name], ref, **options) > 1e-3
    if flips:
        assert slope(losses.dpo, best) > 1e-3

    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12,
                                  tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        p = logits.log_softmax(0)
        value = (chance * losses.LOSSES[name](p[i], p[j], ref[i], ref[j], beta=beta, **options)).mean()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().log_softmax(0), best, rtol=0, atol=1e-5)


# ---- trl's own code, run on given log-probabilities

class Accelerator:
    """One process: gathering is nothing."""

    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather


def trainer(**attributes):
    """What trl's loss methods read of their trainer."""
    return SimpleNamespace(**{"accelerator": Accelerator(), "aux_loss_enabled": False, "_metrics": defaultdict(partial(
        defaultdict, list)), "_total_train_tokens": 0, "_tp_size": 1, "model": SimpleNamespace(training=True),
        "precompute_ref_logps": True, "use_weighting": False, "ld_alpha": None, "label_smoothing": 0.0, "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5} | attributes)


def spread(logps, lengths):
    """Completion mask (b, 1 + longest) after a prompt of one token, and token log-probabilities: all is on the first."""
    mask = torch.arange(int(lengths.max()) + 1) <= lengths[:, None]
    mask[:, 0] = False
    return mask.long(), torch.nn.functional.pad(logps[:, None], (0, mask.shape[1] - 2))


class Policy:
    """A model whose outputs are given log-probabilities, token by token."""

    def __init__(self, token_logps, squares=None):
        zero = torch.zeros_like(token_logps)
        self.outputs = SimpleNamespace(log_probs=token_logps, entropy=zero, mean_logits=zero, is_top1=zero.bool(),
                                       log_sum_sq_probs=squares)

    def __call__(self, **inputs):
        return self.outputs


def trl_dpo(v, name, beta, **attributes):
    """The mean loss of `DPOTrainer._compute_loss` on the six vectors."""
    from trl import DPOTrainer

    mask, logps = spread(torch.cat([v["policy_chosen"], v["policy_rejected"]]),
                         torch.cat([v["chosen_lengths"], v["rejected_lengths"]]))
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": v["ref_chosen"], "ref_rejected_logps": v["ref_rejected"]}
    me = trainer(loss_types=[name], beta=beta, args=SimpleNamespace(discopop_tau=attributes.pop("tau", 0.05)), **attributes)
    return DPOTrainer._compute_loss(me, Policy(logps), inputs, False)


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def batch(beta, dtype=torch.float, far=True):
    chosen = [r for i, r in enumerate(untied(rows(beta))) if far or i < 10 or 16 <= i < 20]
    columns = vectors(*zip(*chosen, strict=True), dtype=dtype)
    return dict(zip(PAIR + LENGTHS, [*columns[:4], *(n.detach().long() for n in columns[4:])], strict=True))


def same(ours, theirs, v, dtype):
    """Mean losses and the gradients of all vectors are equal."""
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.double else {"rtol": 1e-4, "atol": 1e-5}
    leaves = [t for t in v.values() if t.requires_grad]
    mine, his = (torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, **close)
    for a, b in zip(mine, his, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, **close)


APART = {"ipo_sum", "simpo", "cpo", "orpo", "discopop", "exo_pair", "sft", "unlikelihood"}
TRL = [(name, {}) for name in losses.LOSSES if name not in APART] + [
    ("robust", {"label_smoothing": 0.2}), ("exo_pair", {"label_smoothing": 1e-3}), ("exo_pair", {"label_smoothing": 0.3}),
    ("aot", {"label_smoothing": 0.2}), ("aot_unpaired", {"label_smoothing": 0.2})]


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("name", "options"), TRL)
def test_losses_equal_trls(trl, name, options, beta, dtype):
    """Also at |beta d| = 1e4."""
    v = batch(beta, dtype)
    ours, theirs = give(name, v, beta=beta, **options).mean(), trl_dpo(v, name, beta, **options)
    same(ours, theirs, v, torch.float if name == "exo_pair" else dtype)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_discopop_equals_trls_where_that_is_finite(trl, tau, dtype):
    v = batch(0.1, dtype, far=False)
    same(give("discopop", v, beta=0.1, tau=tau).mean(), trl_dpo(v, "discopop", 0.1, tau=tau), v, dtype)
    v = batch(0.1, torch.float)
    theirs = trl_dpo(v, "discopop", 0.1, tau=tau)
    assert not theirs.isfinite(), "trl has mended discopop: compare it far out as well"


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_sft_equals_trls(trl, dtype):
    """The mean of ours over the batch is trl's mean over its tokens."""
    v = batch(0.1, dtype)
    same(give("sft", v).mean(), trl_dpo(v, "sft", 0.1), v, dtype)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "apo_zero"])
def test_weighted_losses_equal_trls(trl, loss):
    """WPO, from token log-probabilities and sums of squares that a model of ours gives."""
    from trl import DPOTrainer

    model = tiny(**LLAMA)
    chosen, rejected = ids(3, 9), ids(3, 7, seed=1)
    dpo = DPO(model, loss=loss, use_weighting=True)
    ref = [torch.randn(3, generator=torch.Generator().manual_seed(side)) - 20 for side in (0, 1)]
    ours = dpo(chosen, rejected, prompt_mask=torch.ones(3, 2, dtype=torch.bool), ref_logps=tuple(ref))
    tokens = torch.cat((chosen, torch.nn.functional.pad(rejected, (0, 2))))
    mask = torch.ones_like(tokens)
    mask[:, :2] = mask[3:, 7:] = 0
    logps, _, squares = scored_logprobs(model, tokens, mask.bool(), squares=True)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
    me = trainer(loss_types=[loss], beta=dpo.beta, args=SimpleNamespace(), use_weighting=True)
    theirs = DPOTrainer._compute_loss(me, Policy(logps, squares), inputs, False)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"])
def test_divergences_equal_trls(trl, name, kind):
    theirs = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}
    dtype = torch.float if kind == "alpha" else torch.double  # trl knows no fp64 there
    v = batch(0.1, dtype, far=False)
    f = {"policy_chosen": losses.divergence(v["policy_chosen"] - v["ref_chosen"], kind),
         "policy_rejected": losses.divergence(v["policy_rejected"] - v["ref_rejected"], kind)}
    zero = torch.zeros_like(v["ref_chosen"])
    ours = give(name, v | f | {"ref_chosen": zero, "ref_rejected": zero}, beta=0.1).mean()
    same(ours, trl_dpo(v, name, 0.1, f_divergence_type=theirs[kind]), v, dtype)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_reference_free_losses_equal_trls_cpo_trainer(trl, name, dtype):
    """With completions of one length; cpo whole, simpo without the NLL, which is cpo's (`cpo_alpha=0` in trl's terms)."""
    from trl.experimental.cpo import CPOTrainer

    v = batch(0.4, dtype) | dict.fromkeys(LENGTHS, torch.full((24,), 7))
    means = (v["policy_chosen"] / 7, v["policy_rejected"] / 7)
    logps = means if name == "simpo" else (v["policy_chosen"], v["policy_rejected"])
    me = trainer(alpha=0.0, loss_type={"cpo": "sigmoid", "simpo": "simpo"}[name], simpo_gamma=0.9, beta=0.4,
                 cpo_alpha=float(name == "cpo"))
    me.concatenated_forward = lambda model, batch: (*logps, *means, -v["policy_chosen"].sum() / (7 * 24))
    me.cpo_loss = partial(CPOTrainer.cpo_loss, me)
    options = {"gamma": 0.9} if name == "simpo" else {}
    same(give(name, v, beta=0.4, **options).mean(), CPOTrainer.get_batch_loss_metrics(me, None, {})[0], v, dtype)


def test_orpo_equals_trls(trl):
    """With completions of one length and nothing of the prompt in the NLL; trl casts to fp32."""
    from trl.experimental.orpo import ORPOTrainer

    def theirs(v):
        me = trainer(beta=0.4)
        means = (v["policy_chosen"] / 7, v["policy_rejected"] / 7)
        me.concatenated_forward = lambda model, batch: (*means, *means, -v["policy_chosen"].mean() / 7)
        me.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, me)
        return ORPOTrainer.get_batch_loss_metrics(me, None, {})[0]

    lengths = dict.fromkeys(LENGTHS, torch.full((14,), 7))
    v = batch(0.4, far=False) | lengths
    same(give("orpo", v, beta=0.4).mean(), theirs(v), v, torch.float)
    v |= {"policy_chosen": torch.zeros(14), "policy_rejected": torch.zeros(14)}
    assert theirs(v).isnan() and give("orpo", v, beta=0.4).isfinite().all()


@pytest.mark.parametrize("kl", [4.0, -3.0])
def test_kto_equals_trls(trl, kl):
    """trl puts desirable texts first and takes the mean; both halves are its `_compute_loss`."""
    from trl import KTOTrainer

    policy, ref = vectors([-9.0, -4e4, -30.0, -2.0, -55.0], [-4e4, -8.0, -33.0, -2.0, -40.0])
    labels, lengths = torch.tensor([True, False, True, False, True]), torch.tensor([3, 9, 1, 4, 20])
    mask, logps = spread(policy, lengths)
    me = trainer(beta=0.2, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.5, calculate_KL=True,
                 _compute_kl_logps=lambda model, batch: torch.tensor([kl - 1, kl + 1]) - 5)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "label": labels, "ref_logps": ref, "ref_KL_logps": torch.tensor([-5.0, -5.0])}
    theirs = KTOTrainer._compute_loss(me, Policy(logps), inputs, False)
    ours = losses.kto(policy, ref, labels, kl, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    same(ours.mean(), theirs, {"policy": policy, "ref": ref}, torch.double)


@pytest.mark.parametrize("margin", [None, [0.5, 2.0, 0.0, 1.0]])
@pytest.mark.parametrize("center", [None, 0.01])
def test_bradley_terry_equals_trls_reward_trainer(trl, margin, center):
    from trl import RewardTrainer

    chosen, rejected = vectors([3.0, -1e4, 40.0, 0.0], [1.0, 1e4, -7.0, 0.0])
    inputs = {"attention_mask": torch.ones(8, 1)} | ({} if margin is None else {"margin": torch.tensor(margin)})
    me = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    rewards = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    theirs = RewardTrainer.compute_loss(me, lambda **inputs: rewards, inputs)
    ours = losses.bradley_terry(chosen, rejected, margin=inputs.get("margin"), center=center or 0.0)
    same(ours.mean(), theirs, {"chosen": chosen, "rejected": rejected}, torch.double)
