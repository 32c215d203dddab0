"""Settings of `xalign collect`, `annotate` and `binarize`. No torch: `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class CollectOptions:
    """What to collect, and where to."""

    plan: str | None = None
    """The plan, a .yaml or .json file: instructions, pool of models, principles, completions, seed (docs/collect.md)."""
    output_dir: str = "runs/collect"
    """Folder of the completions; the same plan on the same folder goes on where it was stopped."""
    retry_failed: bool = True
    """Ask again for what failed in an earlier start."""
    overwrite: bool = False
    """Start anew in a folder that holds completions."""
    dry_run: bool = False
    """Show what the plan draws and one prompt of each model, then stop."""


@dataclass(frozen=True)
class CollectConfig:
    """Draw completions from a pool of models, each instruction from several, with principles in the system prompt."""

    collect: CollectOptions = field(default_factory=CollectOptions)


@dataclass(frozen=True)
class AnnotateOptions:
    """What to judge, and by whom."""

    completions: str = "runs/collect/completions.jsonl"
    """File of completions, as `xalign collect` writes it."""
    annotator: str = "gold"
    """gold (the toy world's known reward), another scorer (a reward model's folder, as for xalign score), or a judge,
    judge:BACKEND:MODEL, such as judge:openai:gpt-4."""
    base_url: str | None = None
    """Address of the judge's server; none: OPENAI_BASE_URL, or OpenAI's own."""
    concurrency: int = 16
    """Requests to a judge's server under way at most."""
    reask: int = 3
    """How often a judge is asked again whose reply can't be parsed."""
    output_dir: str = "runs/annotate"
    """Folder of annotated.jsonl; the same command goes on where it was stopped."""
    seed: int = 0
    """Seed of the order in which a judge sees the texts."""
    overwrite: bool = False
    """Start anew in a folder that holds annotations."""


@dataclass(frozen=True)
class AnnotateConfig:
    """Judge completions: by a reward model, a known reward, or a language model (four aspects, critique, overall score)."""

    annotate: AnnotateOptions = field(default_factory=AnnotateOptions)


@dataclass(frozen=True)
class BinarizeOptions:
    """How pairs are made of annotated completions."""

    annotated: str = "runs/annotate/annotated.jsonl"
    """Annotated completions, as `xalign annotate` writes them, or UltraFeedback's own file."""
    score: Literal["overall", "mean"] = "overall"
    """Which score decides: the overall one, or the mean of the aspects' ratings."""
    rejected: Literal["random", "lowest", "lower"] = "random"
    """Which completion is rejected: any other, the one with the lowest score, or any with a strictly lower one."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs whose scores are equal."""
    min_margin: float = 0.0
    """Least difference of the two scores."""
    exclude_sources: tuple[str, ...] = ()
    """Sources whose instructions are left out, such as truthful_qa."""
    fix_tens: bool = False
    """Mend UltraFeedback's scores of 10 that were a 1: with aspects of 2 or less they become 1, with 4 or less they are left
    out."""
    seed: int = 42
    """Seed of the random choices."""
    output_dir: str = "runs/pairs"
    """Folder of pairs.jsonl, pairs.parquet and report.md."""


@dataclass(frozen=True)
class BinarizeConfig:
    """Make preference pairs of annotated completions, with a report on scores, margins and which model beats which."""

    binarize: BinarizeOptions = field(default_factory=BinarizeOptions)
