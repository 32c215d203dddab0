"""The settings of `xalign evaluate`."""

from dataclasses import dataclass, field
from typing import Literal

from xalign.config import EvaluationOptions


@dataclass(frozen=True)
class ComparedOptions:
    """What is compared."""

    model: str = "runs/demo/policy"
    """The policy: a folder or a name on the hub; or another engine's, transformers:FOLDER, vllm:FOLDER, openai:NAME (its
    address in OPENAI_BASE_URL), of which texts alone are compared."""
    ref_model: str | None = None
    """The reference, named as --model; none: the folder reference/ beside the policy's."""
    revision: str | None = None
    """Branch, tag or commit of a --model from the hub; none: its main branch."""
    allow_pickle: bool = False
    """Also load a model whose weights are pickled (by torch's weights_only reader)."""
    device: str | None = None
    """cpu, cuda, ...; none: a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights; none: the checkpoint's."""
    batch_size: int = 64
    """Rows that run together at most."""


@dataclass(frozen=True)
class ComparedDataOptions:
    """On what."""

    dataset: tuple[str, ...] = ()
    """Held-out preference pairs: files (.jsonl, .json, each also .gz, .parquet) or names on the hub; none: the toy world's test
    pairs, or with --prompts no pairs."""
    prompts: str | None = None
    """File with prompts to sample for: a line each (.txt), or records; none: the pairs'."""
    columns: tuple[str, ...] = ()
    """Names of the pairs' columns where they differ from ours: chosen=better rejected=worse."""
    source_column: str = "source"
    """Column that says where a pair comes from, where the records have it; the alignment inequality is shown by source. Of
    several files without one each is a source."""
    limit: int | None = 5000
    """Pairs at most, the first ones; none: all."""
    chat: bool = False
    """Text prompts are a user's turn, put into the model's chat template."""
    system: str | None = None
    """System turn in front (with --chat)."""
    max_length: int | None = None
    """Tokens of prompt and completion together; none: what the models hold."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which part of a pair's prompt stays that is too long."""
    empty: Literal["error", "drop"] = "error"
    """Pairs with an empty reply."""


@dataclass(frozen=True)
class JudgeOptions:
    """Who says which reply is better, and of what."""

    judge: tuple[str, ...] = ()
    """Judges: gold (the toy world's reward), reward:FOLDER, dpo:POLICY,REFERENCE or http://HOST:PORT (docs/scoring.md), which
    score each reply; pairwise:FOLDER (a model that sees both replies), llm:MODEL (a language model; llm:openai:NAME for a
    server's), human:FILE (choices, blind). none: gold where prompts are the toy world's."""
    judge_max_new_tokens: int = 1024
    """Tokens of a language model's judgement at most."""
    against: Literal["reference", "chosen"] = "reference"
    """What the policy's samples are compared with: the reference's, or the data set's chosen reply (then the reference's are
    compared with it as well)."""
    temperatures: tuple[float, ...] = ()
    """Further temperatures to sample at, for the win rate against temperature: 0 0.5 1."""


@dataclass(frozen=True)
class EvaluateRunOptions:
    """Where the results go."""

    output_dir: str | None = None
    """Folder of evaluation.json, report.md, report.html and samples.jsonl; none: runs/evaluate/<run name>. The same command
    goes on there; with other judges it samples nothing again."""
    run_name: str | None = None
    """Name of the run; none: the last parts of --model."""
    seed: int = 0
    """Seed of the draws."""
    overwrite: bool = False
    """Start anew in a folder that holds results."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Is a policy better than its reference: win rate, preference log-ratio, KL, perplexity, variety, with intervals."""

    compared: ComparedOptions = field(default_factory=ComparedOptions)
    data: ComparedDataOptions = field(default_factory=ComparedDataOptions)
    judges: JudgeOptions = field(default_factory=JudgeOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    run: EvaluateRunOptions = field(default_factory=EvaluateRunOptions)
