"""The exact world: so few texts that all are enumerated; reward, KL and the best that can be reached are known.

A text is a prompt (the symbol 0) and 6 more of 5 symbols: 15,625 texts. A distribution over them is a vector of
log-probabilities, nats, fp64, in the order of `World.texts`; that of a model is one pass over its 3,125 longest prefixes. The
gold reward of a text is sigmoid(.9 sum of weights), a weight for each symbol at each place.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from xalign.errors import ConfigError
from xalign.nn.decoding import evaluating

SYMBOLS, LENGTH = 5, 6
TEXTS = SYMBOLS**LENGTH
SHARPNESS = 4.0  # Bradley-Terry labels: P(y beats y') = sigmoid(4 (r(y) - r(y')))


class World:
    """All texts (15625, 7), prompt first, and their gold reward (15625,), in (0, 1); no two texts have the same."""

    def __init__(self, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        digits = SYMBOLS ** torch.arange(LENGTH - 1, -1, -1)
        symbols = torch.arange(TEXTS)[:, None] // digits % SYMBOLS
        self.texts = torch.cat([torch.zeros(TEXTS, 1, dtype=torch.long), symbols], 1)
        self.values = torch.linspace(-1, 1, SYMBOLS, dtype=torch.float64)
        # The places differ a little, so that rewards have no ties. With weights up to 1 the sigmoid bends so much that a tiny
        # policy, which learns what places add up to, ends beside DPO's optimum (docs/ablate.md).
        self.weights = 0.45 * (self.values + 0.1 * torch.randn(LENGTH, SYMBOLS, generator=draw, dtype=torch.float64))
        self.reward = torch.sigmoid(0.9 * self.weights[torch.arange(LENGTH), symbols].sum(1))
        self._seed = seed

    @torch.no_grad()
    def logps(self, model: nn.Module) -> Tensor:
        """The model's distribution (15625,): it must have exactly the 5 symbols as its vocabulary."""
        with evaluating(model):
            # (3125, 6, 5): a row for each of the longest prefixes
            steps = model(self.texts[::SYMBOLS, :LENGTH]).double().log_softmax(-1)
        if steps.shape[-1] != SYMBOLS:
            raise ConfigError(f"the model has {steps.shape[-1]} symbols, allowed are the exact world's {SYMBOLS}")
        after = self.texts[::SYMBOLS, 1:LENGTH, None]
        return (steps[:, :-1].gather(2, after).sum((1, 2))[:, None] + steps[:, -1]).flatten()

    def corpus(self) -> Tensor:
        """The distribution (15625,) of the texts that the reference imitates: a Markov chain that likes what has low reward."""
        draw = torch.Generator().manual_seed(self._seed + 1)
        chain = (0.3 * torch.randn(SYMBOLS, SYMBOLS, generator=draw, dtype=torch.float64) - 0.65 * self.values).log_softmax(-1)
        return chain[self.texts[:, :-1], self.texts[:, 1:]].sum(1)


def expected(logps: Tensor, values: Tensor) -> float:
    """The mean of `values` (15625,) under a distribution."""
    return float(logps.exp() @ values)


def kl(logps: Tensor, ref: Tensor) -> float:
    """KL(distribution || reference), nats."""
    return float(logps.exp() @ (logps - ref).where(logps > -math.inf, 0.0))


def tilted(ref: Tensor, values: Tensor, scale: float) -> Tensor:
    """ref e^(scale values), normalised: with the reward and 1 / beta the optimum of E[r] - beta KL, hence the frontier."""
    return (ref + scale * values).log_softmax(0)


def best_of(ref: Tensor, reward: Tensor, n: int) -> Tensor:
    """The distribution of the best of n draws of the reference; of equal rewards each draw is as likely to be taken.

    Its KL is ln n - (n - 1) / n where no single text weighs much (`best_of_kl`), and never more (Beirami et al. 2024,
    arXiv 2401.01879).
    """
    levels, level = reward.unique(return_inverse=True)
    mass = torch.zeros(len(levels), dtype=ref.dtype).index_add_(0, level, ref.exp())
    upto = mass.cumsum(0).clamp(max=1)
    won = upto**n - (upto - mass).clamp(min=0) ** n
    return ref + (won / mass).log()[level]


def best_of_kl(n: int) -> float:
    """ln n - (n - 1) / n, nats."""
    return math.log(n) - (n - 1) / n


def wins(ref: Tensor, reward: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """P(text beats a draw of the reference) under Bradley-Terry labels, (15625,)."""
    p, rows = ref.exp(), reward.split(1000)
    return torch.cat([torch.sigmoid(sharpness * (some[:, None] - reward)) @ p for some in rows])


@dataclass(frozen=True)
class Frontier:
    """What can be had in a world from a reference: `ref` and `reward` (15625,)."""

    ref: Tensor
    reward: Tensor
    sharpness: float = SHARPNESS

    @cached_property
    def start(self) -> float:
        """The reference's reward."""
        return expected(self.ref, self.reward)

    def point(self, logps: Tensor) -> tuple[float, float]:
        """Reward and KL of a distribution."""
        return expected(logps, self.reward), kl(logps, self.ref)

    def oracle(self, budget: float) -> float:
        """The largest reward that a distribution with this KL, nats, can have."""
        low, high = -20.0, 20.0  # logarithm of the scale
        for _ in range(60):
            middle = (low + high) / 2
            below = kl(tilted(self.ref, self.reward, math.exp(middle)), self.ref) < budget
            low, high = (middle, high) if below else (low, middle)
        return expected(tilted(self.ref, self.reward, math.exp(low)), self.reward)

    def efficiency(self, reward: float, budget: float) -> float:
        """(reward - reference's) / (oracle's at the same KL - reference's); nan at a KL of 0."""
        return (reward - self.start) / (self.oracle(budget) - self.start) if budget > 1e-9 else math.nan

    @cached_property
    def wins(self) -> Tensor:
        return wins(self.ref, self.reward, self.sharpness)

    def optimum(self, method: str, beta: float | None = None, alpha: float | None = None) -> Tensor | None:
        """Where a loss ends with pairs without end of the reference's texts and Bradley-Terry labels; None where not known.

        sigmoid: beta times the log-ratio is the labels' log-odds (arXiv 2305.18290, eq. 6), hence ref e^(4 r / beta).
        ipo_sum: the log-ratio is the chance to win / beta (arXiv 2310.12036, eq. 8 with the identity). With w that chance: sft
        imitates ref w, and unlikelihood, which subtracts alpha of the rejected's, ref (w - alpha (1 - w)) where it is positive.
        """
        if method in ("sigmoid", "ipo_sum"):
            assert beta is not None
            values = self.sharpness * self.reward if method == "sigmoid" else self.wins
            return tilted(self.ref, values, 1 / beta)
        if method in ("sft", "unlikelihood"):
            taken = 0.0 if method == "sft" else 0.5 if alpha is None else alpha
            return (self.ref + (self.wins - taken * (1 - self.wins)).clamp(min=0).log()).log_softmax(0)
        return None


def draw_pairs(logps: Tensor, reward: Tensor, groups: int, samples: int, seed: int, labels: str = "bradley-terry",
               noise: float = 0.0, sharpness: float = SHARPNESS) -> tuple[Tensor, Tensor]:
    """Chosen and rejected texts, by index, (pairs,): all pairs of `samples` draws, group after group.

    Labels "bradley-terry" prefer y to y' with chance sigmoid(sharpness (r(y) - r(y'))), "deterministic" the larger reward; with
    chance `noise` a label is then flipped. A text may be drawn twice in a group; such a pair says nothing.
    """
    draw = torch.Generator().manual_seed(seed)
    texts = torch.multinomial(logps.exp(), groups * samples, replacement=True, generator=draw).view(groups, samples)
    first, second = torch.triu_indices(samples, samples, 1)
    a, b = texts[:, first].flatten(), texts[:, second].flatten()
    gap = reward[a] - reward[b]
    chance = torch.sigmoid(sharpness * gap) if labels == "bradley-terry" else (gap > 0).double()
    chance = chance * (1 - noise) + (1 - chance) * noise
    won = torch.rand(len(a), generator=draw, dtype=torch.float64) < chance
    return torch.where(won, a, b), torch.where(won, b, a)
