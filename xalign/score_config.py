"""The settings of `xalign score` and `xalign rewardbench`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from xalign.config import QuantOptions
from xalign.errors import ConfigError


def refuse(options: Any, names: Iterable[str], why: str) -> None:
    """Refuse settings that nothing would look at: whoever sets one expects something. Raises `ConfigError`."""
    default = type(options)()
    for name in names:
        if (value := getattr(options, name)) != getattr(default, name):
            told = "" if isinstance(value, bool) else " " + (" ".join(value) if isinstance(value, tuple) else str(value))
            raise ConfigError(f"--{name.replace('_', '-')}{told} {why}")


@dataclass(frozen=True)
class ScorerOptions:
    """What scores."""

    model: str = "runs/reward/reward"
    """A reward model's folder or its name on the hub; gold; dpo:POLICY,REFERENCE; sum:POLICY or avg:POLICY (no reference);
    http://HOST:PORT of a server, or several with commas."""
    revision: str | None = None
    """Branch, tag or commit of a model from the hub; none: its main branch."""
    allow_pickle: bool = False
    """Also load a model whose weights are pickled (by torch's weights_only reader)."""
    value_head_prefix: str | None = None
    """Name of the head's weight in others' reward models, without .weight; none: as the folder says, else score."""
    tokenizer: str | None = None
    """Folder of the tokenizer that writes texts for another's server; none: the server writes them itself (ours does)."""
    normalize: Literal["auto", "always", "never"] = "auto"
    """Whether rewards are brought to mean 0 and deviation 1 by the numbers in the reward model's folder; auto: as it says."""
    beta: float = 0.1
    """The beta of dpo."""
    max_length: int | None = None
    """Tokens of prompt and response together; none: what the model holds."""
    truncation_side: Literal["left", "right"] = "left"
    """Where texts are cut that are longer: left takes the prompt's beginning."""
    batch_size: int = 64
    """Texts that run together at most."""
    device: str | None = None
    """cpu, cuda, ...; none: a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights; none: the checkpoint's."""


@dataclass(frozen=True)
class ScoreOptions:
    """What is scored."""

    prompt: str | None = None
    """One prompt (also -p), with --response."""
    response: str | None = None
    """One response to it; its score goes to standard output."""
    chat: bool = False
    """Text prompts are a user's turn, put into the model's chat template."""
    system: str | None = None
    """System turn in front (with --chat)."""
    dataset: str | None = None
    """A file (.jsonl, .json, each also .gz, .parquet) or a name on the hub: prompt and response, prompt and a list of K
    responses, or messages."""
    columns: tuple[str, ...] = ()
    """Names of the file's columns where they differ from ours: prompt=question response=answer."""
    limit: int | None = None
    """Records to score; none: all."""
    output_dir: str | None = None
    """Folder for scores.jsonl, summary.json and histogram.png; the same command goes on where it was stopped. none: the
    scores go to standard output."""
    overwrite: bool = False
    """Start anew in a folder that holds scores."""


@dataclass(frozen=True)
class ServeOptions:
    """Scoring over HTTP, as OpenRLHF's clients ask for it (POST /get_reward)."""

    serve: bool = False
    """Serve instead of scoring something now."""
    host: str = "127.0.0.1"
    """Address to listen on; another machine reaches the server only at another one than this."""
    port: int = 5000
    """Port; 0: any free one, which is told."""
    queue_size: int = 16384
    """Texts that may wait; more are refused (503) until there is room."""
    max_bytes: int = 64 * 2**20
    """Bytes of a request at most (413)."""
    body_seconds: float = 60.0
    """How long a request's body may take to arrive (408), and its head, or a connection to be used again (it is closed)."""
    append_eos: bool = False
    """Queries that don't end with EOS get one; OpenRLHF's clients send it."""


@dataclass(frozen=True)
class ScoreConfig:
    """Score replies with a reward model, a DPO policy, the gold reward or a server; or serve scores over HTTP."""

    scorer: ScorerOptions = field(default_factory=ScorerOptions)
    quant: QuantOptions = field(default_factory=lambda: QuantOptions(quant_head=False))
    score: ScoreOptions = field(default_factory=ScoreOptions)
    serve: ServeOptions = field(default_factory=ServeOptions)


@dataclass(frozen=True)
class BenchOptions:
    """The benchmark's rows."""

    dataset: tuple[str, ...] = ()
    """RewardBench rows, version 1 or 2, and rows of prior sets that name theirs as subset: files (.jsonl, .json, each also .gz,
    .parquet) or names on the hub."""
    prior_sets: tuple[str, ...] = ()
    """Prior sets whose rows don't: anthropic_helpful=FILE anthropic_hhh=FILE shp=FILE summarize=FILE."""
    judge: str | None = None
    """A language model that is asked which reply is better, in the place of --model: a folder or a name on the hub."""
    judge_max_new_tokens: int = 1024
    """Tokens of a judgement at most."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether a prompt of text is a user's turn in the chat template; auto: where the model has one."""
    limit: int | None = None
    """Rows of each file; none: all."""
    seed: int = 0
    """Seed of the order in which a judge sees replies."""
    output_dir: str | None = None
    """Folder of the results, in RewardBench's own files; none: runs/rewardbench/<run name>. The same command goes on there."""
    run_name: str | None = None
    """Name of the model in the results; none: the last parts of --model or --judge."""
    overwrite: bool = False
    """Start anew in a folder that holds results."""


@dataclass(frozen=True)
class RewardBenchConfig:
    """Measure a reward model, a DPO policy or a judge on RewardBench (1 and 2), by its own arithmetic."""

    scorer: ScorerOptions = field(default_factory=ScorerOptions)
    quant: QuantOptions = field(default_factory=lambda: QuantOptions(quant_head=False))
    bench: BenchOptions = field(default_factory=BenchOptions)
