"""Ablations: a run is a frozen dataclass of settings, a grid is a named function that returns runs. No torch.

A grid of one's own is a function in a file, `--grid mygrid.py:name`, made of the same parts:

    from dataclasses import replace
    from xalign.grids import ExactRun

    def name():
        base = ExactRun(method="sigmoid")
        return [replace(base, beta=beta, seed=seed) for beta in (0.3, 1.0) for seed in range(3)]
"""

import dataclasses
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from xalign.errors import ConfigError, XalignError, nearest


@dataclass(frozen=True)
class Run:
    """What runs of both worlds have: a loss by name (as --loss-type; or best_of), or as a function of a file, loss.py:name."""

    world: ClassVar[str]
    letters: ClassVar[dict[str, str]] = {"beta": "β", "n": "n", "alpha": "α", "label_smoothing": "ε", "gamma": "γ"}

    method: str = "sigmoid"
    beta: float | None = None
    seed: int = 0
    label_smoothing: float = 0.0
    gamma: float | None = None
    alpha: float | None = None
    """What unlikelihood subtracts of the rejected's log-likelihood, in [0, 1); none: .5."""
    rounds: int = 1
    """More than 1 is online: each round draws its share of the pairs from the policy as it is."""
    n: int = 1
    """Draws that best_of chooses from."""
    fraction: float = 1.0
    """Part of the pairs that are trained on."""
    noise: float = 0.0
    """Part of the labels that are flipped."""

    def __post_init__(self) -> None:
        for name, fits, allowed in (("fraction", 0 < self.fraction <= 1, "a number in (0, 1]"), ("n", self.n >= 1, "n >= 1"),
                                    ("noise", 0 <= self.noise <= 0.5, "a number in [0, .5]")):
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed is {allowed}")

    @property
    def label(self) -> str:
        """The loss or baseline as a table names it."""
        return "online " * (self.rounds > 1) + ":".join(Path(self.method).name.rsplit(":", 1)).replace(".py:", ":")

    @property
    def own(self) -> dict[str, Any]:
        """Settings that are not the default, but method and seed, by name."""
        given = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {k: value for k, (value, default) in given.items() if value != default and k not in ("method", "seed")}

    def told(self, settings: Mapping[str, Any]) -> str:
        """Settings for a person: "β 0.3, noise 0.1"."""
        return ", ".join(f"{self.letters.get(k, k)} {v:g}" if isinstance(v, int | float) else f"{k} {v}"
                         for k, v in settings.items())

    @property
    def setting(self) -> str:
        """The same of those that are not the default."""
        return self.told(self.own)

    @property
    def name(self) -> str:
        """A name for files."""
        settings = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.own.items())
        return "-".join([self.label.replace(":", ".").replace(" ", "-"), *settings, f"seed={self.seed}"]).replace("/", "_")


@dataclass(frozen=True)
class ExactRun(Run):
    """A run in the world of `exact`: 8,000 times 4 draws of the reference, labelled in pairs, and a tiny transformer."""

    world: ClassVar[str] = "exact"

    labels: Literal["bradley-terry", "deterministic"] = "bradley-terry"
    draws: int = 8000
    samples: int = 4
    steps: int = 600
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    dim: int = 32
    evaluations: int = 10


@dataclass(frozen=True)
class TextRun(Run):
    """A run on the toy world by `xalign dpo`'s own stages, from one reference that imitates the corpus (data/demo.json)."""

    world: ClassVar[str] = "text"

    learning_rate: float = 3e-4
    batch_size: int = 16
    epochs: float = 1.0
    sft_epochs: float = 2.0
    """Epochs of imitation of the reference; 7 is the demo's. All runs of a grid share it."""
    prompts: int = 150
    """Held-out prompts to sample from."""
    samples: int = 3


Grid = Callable[[], Sequence[Run]]
GRIDS: dict[str, Grid] = {}
BETAS, SEEDS = (0.1, 0.3, 1.0, 3.0), range(3)


def grid(function: Grid) -> Grid:
    """Register a grid under its name."""
    GRIDS[function.__name__.replace("_", "-")] = function
    return function


def crossed(base: Run, **axes: Sequence[Any]) -> list[Any]:
    """Runs for all combinations of these settings, in order."""
    runs = [base]
    for name, values in axes.items():
        runs = [replace(run, **{name: value}) for run in runs for value in values]
    return runs


@grid
def exact() -> list[Run]:
    """Losses and baselines against the known optimum: Bradley-Terry labels, and DPO with deterministic ones."""
    base = ExactRun()
    return [
        *crossed(base, beta=BETAS, seed=SEEDS),
        *crossed(replace(base, method="best_of"), n=(2, 4, 16, 64)),
        *crossed(replace(base, method="sft"), seed=SEEDS),
        *crossed(replace(base, method="unlikelihood"), alpha=(0.3, 0.6), seed=SEEDS),
        *crossed(replace(base, labels="deterministic"), beta=BETAS, seed=SEEDS),
        *crossed(replace(base, rounds=10), beta=BETAS, seed=SEEDS),
        *crossed(base, method=("ipo_sum", "kto", "simpo", "orpo"), beta=BETAS, seed=SEEDS),
    ]


@grid
def exact_data() -> list[Run]:
    """How many labels DPO needs, and what flipped ones do: with and without the loss being told."""
    base = ExactRun(beta=1.0)
    return [
        *crossed(base, fraction=(0.03, 0.1, 0.3, 1.0), seed=SEEDS),
        *crossed(replace(base, noise=0.2), seed=SEEDS),
        *crossed(replace(base, noise=0.2, label_smoothing=0.2), method=("sigmoid", "robust"), seed=SEEDS),
    ]


TEXT_BETAS, TEXT_LOSSES = (0.05, 0.1, 0.3, 1.0), ("sigmoid", "ipo_sum", "kto", "simpo", "orpo")


def text_baselines(base: TextRun) -> list[Run]:
    """Preferred fine-tuning, unlikelihood, best of n."""
    return [
        *crossed(replace(base, method="sft"), seed=SEEDS),
        *crossed(replace(base, method="unlikelihood"), alpha=(0.1, 0.3), seed=SEEDS),
        *crossed(replace(base, method="best_of"), n=(2, 4, 16), seed=SEEDS),
    ]


@grid
def text() -> list[Run]:
    """The frontier on the toy world, whose gold reward is known: five losses, four strengths, three seeds; baselines."""
    return [
        *crossed(TextRun(), method=TEXT_LOSSES, beta=TEXT_BETAS, seed=SEEDS),
        *crossed(TextRun(rounds=3), beta=(0.1, 0.3), seed=SEEDS),
        *text_baselines(TextRun()),
    ]


@grid
def text_small() -> list[Run]:
    """The same with a third of the pairs, so that a laptop is done within the hour."""
    base = TextRun(fraction=0.33)
    return [
        *crossed(base, method=TEXT_LOSSES, beta=TEXT_BETAS, seed=SEEDS),
        *crossed(replace(base, rounds=3), beta=(0.1, 0.3), seed=SEEDS),
        *text_baselines(base),
    ]


def load(spec: str, what: str) -> Any:
    """The object `name` of file.py:name, which is run. Raises `ConfigError`."""
    file, _, name = spec.rpartition(":")
    try:
        found = runpy.run_path(file)
    except XalignError:
        raise
    except Exception as error:  # of a user's file any
        raise ConfigError(f"{what} {spec}: {type(error).__name__}: {error}") from error
    if not callable(found.get(name)):
        raise ConfigError(f"{what} {spec}: the file has no function {name!r}{nearest(name, found)}")
    return found[name]


def runs_of(name: str) -> list[Run]:
    """The runs of a named grid, or of a file's (file.py:name). Raises `ConfigError`."""
    if ".py:" in name:
        function = load(name, "--grid")
    elif name in GRIDS:
        function = GRIDS[name]
    else:
        raise ConfigError(f"--grid {name}: no such grid{nearest(name, GRIDS)}; allowed are {', '.join(GRIDS)}, or FILE.py:NAME")
    try:
        runs = list(function())
    except XalignError:
        raise
    except Exception as error:  # of a user's function any
        raise ConfigError(f"--grid {name}: {type(error).__name__}: {error}; allowed is a function that returns runs") from error
    if not runs or not all(isinstance(run, Run) for run in runs) or len({type(run) for run in runs}) > 1:
        raise ConfigError(f"--grid {name}: allowed is a list of ExactRun, or one of TextRun, with a run at least")
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise ConfigError(f"--grid {name}: the run {run.name} is there twice")
        seen.add(run.name)
    return runs


@dataclass(frozen=True)
class AblateOptions:
    """What to run, and where."""

    grid: str = "exact"
    """A named grid (exact, exact-data, text, text-small), or a function of your own that returns runs: mygrid.py:name."""
    output_dir: str | None = None
    """Folder of the runs and of the report; none: runs/ablate/<grid>. The same command goes on where it was stopped."""
    jobs: int = 2
    """Runs at a time, each a process on one thread."""
    reference: str | None = None
    """Folder of the model that all runs of a text grid begin with; none: one is trained first."""
    limit: int | None = None
    """Runs that this start makes at most, in the grid's order."""
    overwrite: bool = False
    """Start anew in a folder that holds a grid's runs."""
    dry_run: bool = False
    """List the runs, and which are finished, then stop."""


@dataclass(frozen=True)
class AblateConfig:
    """Train a grid of ablations in a world whose best is known, and report means with intervals over seeds."""

    ablate: AblateOptions = field(default_factory=AblateOptions)
