"""Preference losses: log-probabilities in, one loss a pair out. One function a loss, each with its own hyperparameters.

The vectors `policy_chosen`, `policy_rejected`, `ref_chosen`, `ref_rejected` (b,) are log-probabilities of whole
completions, *summed* over tokens, in nats; `chosen_lengths`, `rejected_lengths` (b,) count those tokens, at least one a
row. A loss comes back per pair, (b,), unreduced, in the dtype of the vectors. A function asks only for what it reads: one
without `ref_chosen` needs no reference model, one without lengths compares sums. Hyperparameters are keywords; a value
that is not allowed is a `ConfigError`, whatever the vectors hold. Values and gradients are finite in fp32 wherever
|beta d| <= 1e4.

In the docstrings y_w is chosen, y_l rejected, n_w and n_l their lengths, p policy, q reference, a = log p(y_w) - log q(y_w),
b = log p(y_l) - log q(y_l), d = a - b, e = label_smoothing, s the sigmoid and ls its logarithm. docs/losses.md compares them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xalign.errors import ConfigError, nearest

_NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "a finite number >= 0")
_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda x: 0 < x < math.inf, "a finite number > 0"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "a number in [0, .5)"),
    "tau": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "tokens_per_pair": (lambda x: 0 < x < math.inf, "a finite number > 0"),
    "alpha": (math.isfinite, "a finite number"),
    "gamma": _NOT_NEGATIVE, "center": _NOT_NEGATIVE, "desirable_weight": _NOT_NEGATIVE, "undesirable_weight": _NOT_NEGATIVE,
}


def _check(**given: float) -> None:
    for name, value in given.items():
        fits, allowed = _ALLOWED[name]
        if not fits(value):
            raise ConfigError(f"{name} is {value!r}, allowed is {allowed}")


def _margin(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def _smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def dpo(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
        beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), nats a pair, (b,).

    -ls(beta d). With label smoothing e in [0, .5), the probability that a label is flipped: (1 - e) of it plus e of the
    loss of the swapped pair (cDPO, Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3).
    """
    _check(beta=beta, label_smoothing=label_smoothing)
    return _smoothed(beta * _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected), label_smoothing)


def robust(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
           beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO (Ray Chowdhury et al. 2024, arXiv 2403.00409), (b,): its mean over labels flipped with chance e is DPO's loss.

    [-(1 - e) ls(beta d) + e ls(-beta d)] / (1 - 2e), e in [0, .5). Unbounded below for e > 0; for e = 0 it is DPO.
    """
    _check(beta=beta, label_smoothing=label_smoothing)
    z = beta * _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (label_smoothing * F.logsigmoid(-z) - (1 - label_smoothing) * F.logsigmoid(z)) / (1 - 2 * label_smoothing)


def hinge(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
          beta: float = 0.1) -> Tensor:
    """Hinge on the margin (Zhao et al. 2023, SLiC-HF, arXiv 2305.10425; with a reference: RSO, arXiv 2309.06657), (b,).

    relu(1 - beta d): no gradient once the margin is reached.
    """
    _check(beta=beta)
    return torch.relu(1 - beta * _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected))


def ipo(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, chosen_lengths: Tensor,
        rejected_lengths: Tensor, *, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17), on means over tokens, nats^2, (b,).

    (a / n_w - b / n_l - 1 / (2 beta))^2; beta is the paper's tau. The paper sums; means are what its authors ran and what
    trl computes. `ipo_sum` is the equation as printed.
    """
    _check(beta=beta)
    a, b = (policy_chosen - ref_chosen) / chosen_lengths, (policy_rejected - ref_rejected) / rejected_lengths
    return (a - b - 0.5 / beta) ** 2


def ipo_sum(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
            beta: float = 0.1) -> Tensor:
    """Identity preference optimisation on sums (arXiv 2310.12036, eq. 17, as printed), nats^2 a pair, (b,).

    (d - 1 / (2 beta))^2.
    """
    _check(beta=beta)
    return (_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected) - 0.5 / beta) ** 2


def exo_pair(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
             beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """Efficient exact optimisation of pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16), nats a pair, (b,).

    s(beta d) [ls(beta d) - ln(1 - e)] + s(-beta d) [ls(-beta d) - ln e]: the reverse KL from the policy's preference to
    the labels (1 - e, e). 0 is its minimum, at s(beta d) = 1 - e; it runs to -ln(1 - e) and -ln e for beta d = +-inf.
    e in (0, .5), 1e-3 as in the paper: at 0 the loss of every pair is infinite.
    """
    _check(beta=beta, label_smoothing=label_smoothing)
    if label_smoothing == 0:
        raise ConfigError(f"label_smoothing is {label_smoothing!r}, allowed is a number in (0, .5) for exo_pair")
    z = beta * _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
            + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing)))


def nca_pair(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
             beta: float = 0.1) -> Tensor:
    """Noise contrastive alignment of pairs (Chen et al. 2024, arXiv 2402.05369), nats a pair, (b,).

    -ls(beta a) - ls(-beta a) / 2 - ls(-beta b) / 2: absolute, so that the chosen's likelihood can't fall with the rejected's.
    """
    _check(beta=beta)
    a, b = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return -F.logsigmoid(a) - 0.5 * (F.logsigmoid(-a) + F.logsigmoid(-b))


def bco_pair(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
             beta: float = 0.1) -> Tensor:
    """Binary classifier of chosen and rejected (Jung et al. 2024, BCO, arXiv 2404.04656), nats a pair, (b,).

    -ls(beta a) - ls(-beta b), without the paper's reward shift, the running mean of rewards.
    """
    _check(beta=beta)
    return -F.logsigmoid(beta * (policy_chosen - ref_chosen)) - F.logsigmoid(-beta * (policy_rejected - ref_rejected))


def sppo_hard(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
              beta: float = 0.1) -> Tensor:
    """Self-play preference optimisation (Wu et al. 2024, arXiv 2405.00675, eq. 4.7), nats^2 a pair, (b,).

    (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2: the winner's probability of winning is 1, the loser's 0.
    """
    _check(beta=beta)
    return (policy_chosen - ref_chosen - 0.5 / beta) ** 2 + (policy_rejected - ref_rejected + 0.5 / beta) ** 2


def aot(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
        beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Alignment via optimal transport, paired (Melnyk et al. 2024, arXiv 2406.05882), nats a rank, (b,).

    log p(y_w) - log p(y_l) and the reference's are sorted over the batch, each apart, and DPO's (or cDPO's) loss falls on
    the differences of equal rank. Entry i is rank i, not pair i, and the loss of a batch is not the mean of its
    micro-batches' losses: a micro-batch (and a process) ranks its own pairs only.
    """
    _check(beta=beta, label_smoothing=label_smoothing)
    policy, ref = (policy_chosen - policy_rejected).sort().values, (ref_chosen - ref_rejected).sort().values
    return _smoothed(beta * (policy - ref), label_smoothing)


def aot_unpaired(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
                 beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Alignment via optimal transport, unpaired (arXiv 2406.05882), nats a rank, (b,): `aot` on a and b, sorted apart.

    Chosen and rejected texts need not share prompts. As with `aot`, ranks are those of one micro-batch.
    """
    _check(beta=beta, label_smoothing=label_smoothing)
    a, b = (policy_chosen - ref_chosen).sort().values, (policy_rejected - ref_rejected).sort().values
    return _smoothed(beta * (a - b), label_smoothing)


def apo_zero(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
             beta: float = 0.1) -> Tensor:
    """Anchored preference optimisation, zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7), in [0, 2], (b,).

    1 - s(beta a) + s(beta b): raises the chosen, lowers the rejected.
    """
    _check(beta=beta)
    return torch.sigmoid(-beta * (policy_chosen - ref_chosen)) + torch.sigmoid(beta * (policy_rejected - ref_rejected))


def apo_down(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
             beta: float = 0.1) -> Tensor:
    """Anchored preference optimisation, down (arXiv 2408.06266, eq. 8), in [0, 2], (b,).

    s(beta a) + 1 - s(beta d): lowers both, the rejected more.
    """
    _check(beta=beta)
    a, d = policy_chosen - ref_chosen, _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return torch.sigmoid(beta * a) + torch.sigmoid(-beta * d)


def discopop(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
             beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """The loss that a language model found (Lu et al. 2024, DiscoPOP, arXiv 2406.08414, eq. 5), (b,).

    With z = beta d and m = s(z / tau), tau in (0, 1]: -ls(z) (1 - m) + exp(-z) m.
    """
    _check(beta=beta, tau=tau)
    z = beta * _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    # exp(-z) overflows where m underflows; their product, one exponential, vanishes there for tau < 1 and is 1 for tau = 1
    return -F.logsigmoid(z) * torch.sigmoid(-z / tau) + torch.exp(F.logsigmoid(z / tau) - z)


def sigmoid_norm(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
                 chosen_lengths: Tensor, rejected_lengths: Tensor, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO (Lambert et al. 2024, Tülu 3, arXiv 2411.15124), nats a pair, (b,).

    -ls(beta (a / n_w - b / n_l)). beta is Tülu's 5: means over tokens are smaller than sums by the lengths.
    """
    _check(beta=beta)
    a, b = (policy_chosen - ref_chosen) / chosen_lengths, (policy_rejected - ref_rejected) / rejected_lengths
    return -F.logsigmoid(beta * (a - b))


def simpo(policy_chosen: Tensor, policy_rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *,
          beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    """Simple preference optimisation, without a reference (Meng et al. 2024, arXiv 2405.14734, eq. 6), nats a pair, (b,).

    -ls(beta (log p(y_w) / n_w - log p(y_l) / n_l) - gamma); gamma >= 0 is the margin asked for, outside of beta.
    """
    _check(beta=beta, gamma=gamma)
    return -F.logsigmoid(beta * (policy_chosen / chosen_lengths - policy_rejected / rejected_lengths) - gamma)


def cpo(policy_chosen: Tensor, policy_rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *,
        beta: float = 0.1) -> Tensor:
    """Contrastive preference optimisation, without a reference (Xu et al. 2024, arXiv 2401.08417, eq. 3), nats, (b,).

    -ls(beta (log p(y_w) - log p(y_l))) - log p(y_w) / n_w: sums in the preference, the pair's own token mean in the NLL.
    `rejected_lengths` is not read.
    """
    _check(beta=beta)
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected)) - policy_chosen / chosen_lengths


def orpo(policy_chosen: Tensor, policy_rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *,
         beta: float = 0.1) -> Tensor:
    """Odds ratio preference optimisation, without a reference (Hong et al. 2024, arXiv 2403.07691, eqs. 6 and 7), nats, (b,).

    With m = log p(y) / n: -m_w - beta ls(log odds(m_w) - log odds(m_l)), log odds(m) = m - ln(1 - exp(m)); beta is the
    paper's lambda. ln(1 - exp(m)) is taken at min(m, -1e-6), so that a text of probability 1 keeps a finite loss and
    a gradient (of the odds' part, at most 1e6 beta).
    """
    _check(beta=beta)
    chosen, rejected = policy_chosen / chosen_lengths, policy_rejected / rejected_lengths
    odds_chosen, odds_rejected = (m - torch.log(-torch.expm1(m.clamp(max=-1e-6))) for m in (chosen, rejected))
    return -chosen - beta * F.logsigmoid(odds_chosen - odds_rejected)


def sft(policy_chosen: Tensor, chosen_lengths: Tensor, *, tokens_per_pair: float | None = None) -> Tensor:
    """Negative log-likelihood of the chosen, nats, (b,), whose *mean over pairs* is the mean over tokens.

    -log p(y_w) / tokens_per_pair; without a value the batch's own mean length. Where a step has several micro-batches or
    processes, give the mean length over the whole step: the mean over all its pairs is then sum NLL / sum n_w, however
    they were split. (The mean of -log p(y_w) / n_w would weigh the tokens of short texts more.)
    """
    if tokens_per_pair is None:
        return -policy_chosen / chosen_lengths.to(policy_chosen.dtype).mean()
    _check(tokens_per_pair=tokens_per_pair)
    return -policy_chosen / tokens_per_pair


def unlikelihood(policy_chosen: Tensor, policy_rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *,
                 alpha: float = 0.5) -> Tensor:
    """Unlikelihood, a baseline of the DPO paper (arXiv 2305.18290, section 6; Welleck et al. 2019, arXiv 1908.04319), (b,).

    -log p(y_w) / n_w + alpha log p(y_l) / n_l, alpha in [0, 1). Unbounded below where nothing in the data is chosen that is
    also rejected.
    """
    if not 0 <= alpha < 1:
        raise ConfigError(f"alpha is {alpha!r}, allowed is a number in [0, 1): from 1 on the loss has no minimum")
    return alpha * policy_rejected / rejected_lengths - policy_chosen / chosen_lengths


LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": dpo} | {
    loss.__name__: loss for loss in (robust, hinge, ipo, ipo_sum, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
                                     apo_zero, apo_down, discopop, sigmoid_norm, simpo, cpo, orpo, sft, unlikelihood)}


def kto(policy: Tensor, ref: Tensor, labels: Tensor, kl: Tensor | float, *, beta: float = 0.1,
        desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """Kahneman-Tversky optimisation of single texts (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7), a text, (b,).

    With r = log p(y) - log q(y) from `policy` and `ref` (b,) and z the scalar `kl`, detached, at least 0: where `labels` (b,)
    bool, desirable, holds desirable_weight (1 - s(beta (r - z))), else undesirable_weight (1 - s(beta (z - r))). `kl` is
    the mean log-ratio of *mismatched* texts, another row's for each prompt: estimated per batch, so micro-batches that
    should share it must be given the same value.
    """
    _check(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    if desirable_weight == undesirable_weight == 0:
        raise ConfigError("desirable_weight and undesirable_weight are both 0, allowed is at least one above")
    z = beta * (policy - ref - torch.as_tensor(kl, dtype=policy.dtype).detach().clamp(min=0))
    return torch.where(labels, desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z))


def bradley_terry(chosen: Tensor, rejected: Tensor, *, margin: Tensor | float | None = None, center: float = 0.0) -> Tensor:
    """Loss of a reward model on the rewards (b,) of both sides (Bradley and Terry 1952), nats a pair, (b,).

    -ls(r_w - r_l - margin) + center (r_w + r_l)^2: `margin` (b,) is how much better the chosen is (Llama 2, arXiv
    2307.09288, eq. 2), `center` >= 0 pulls rewards to mean 0 (Eisenstein et al. 2023, arXiv 2312.09244, eq. 2).
    """
    _check(center=center)
    return -F.logsigmoid(chosen - rejected - (0 if margin is None else margin)) + center * (chosen + rejected) ** 2


def logexp(chosen: Tensor, rejected: Tensor, *, center: float = 0.0) -> Tensor:
    """ln(1 + e^(r_l - r_w)) + center (r_w + r_l)^2, nats a pair, (b,): OpenRLHF's LogExpLoss.

    The same function as `bradley_terry` without a margin (Askell et al. 2021, arXiv 2112.00861, write it so).
    """
    _check(center=center)
    return F.softplus(rejected - chosen) + center * (chosen + rejected) ** 2


def divergence(log_ratio: Tensor, kind: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """What stands for a log-ratio a or b when the reference is held by another f-divergence: f'(exp(log_ratio)), (b,).

    Wang et al. 2023, arXiv 2309.16240: reverse_kl a (DPO itself), forward_kl 1 - exp(-a), js ln 2 + ls(a), alpha
    (exp((alpha - 1) a) - 1) / (alpha - 1), which is reverse_kl at 1 and forward_kl at 0. Give f(a), f(b) as `policy_chosen`,
    `policy_rejected` with a reference of zeros to a loss that reads differences. Beyond an exponent of 30 the
    exponential goes on as its tangent: value and gradient stay finite, and so do their squares.
    """
    _check(alpha=alpha)
    if kind == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    powers = {"reverse_kl": 1.0, "forward_kl": 0.0, "alpha": alpha}
    if kind not in powers:
        raise ConfigError(f"no divergence {kind!r}{nearest(kind, [*powers, 'js'])}; allowed are {', '.join(powers)}, js")
    power = powers[kind] - 1
    if power == 0:
        return log_ratio
    x = power * log_ratio
    return (torch.expm1(x.clamp(max=30)) + math.exp(30) * torch.relu(x - 30)) / power
