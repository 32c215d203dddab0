"""Preference losses: log-probabilities in, one loss a pair out.

The four vectors (b,) are log-probabilities of whole completions, summed over tokens, in nats; a loss comes
back per pair, (b,), unreduced. One function a loss, each with its own hyperparameters.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from xalign.errors import ConfigError


def dpo(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *,
        beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), nats a pair, (b,).

    -log sigmoid(beta d), d = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)). With label smoothing e in
    [0, .5), the probability that a label is flipped: (1 - e) of it plus e of the loss of the swapped pair (cDPO,
    Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3).
    """
    if not 0 < beta < math.inf:
        raise ConfigError(f"beta is {beta!r}, allowed is a finite number > 0")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing is {label_smoothing!r}, allowed is a number in [0, .5)")
    z = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": dpo}
