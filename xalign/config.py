"""The programs' settings: dataclasses in groups, and one parser for flags, `--config` files and `--help`.

No torch here: `--help` answers at once. Flags take `-` or `_`; a JSON file given with `--config` sets defaults
under the same names, and flags win over it.
"""

import contextlib
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from xalign.backends.base import SamplingParams
from xalign.errors import ConfigError, nearest

C = TypeVar("C")
FREE = ("--prompt", "--system")  # flags whose value is any text
COUNT = 2**31 - 1  # no count is larger: larger ones overflow in torch or in a file's 32 bits
# the least and the largest value of a setting; those of the loss and of the draws are told by their own modules
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("batch_size", "sft_batch_size", "gradient_accumulation_steps", "eval_prompts", "limit",
                    "micro_batch_tokens"), (1, COUNT)),
    **dict.fromkeys(("eval_samples", "eval_max_new_tokens", "n", "top_k", "beams"), (1, 10**6)),
    **dict.fromkeys(("dim", "heads", "kv_heads"), (1, 2**20)), "depth": (1, 10_000), "vocab_size": (1, 2**24),
    **dict.fromkeys(("learning_rate", "sft_learning_rate"), (1e-12, 1e12)),
    **dict.fromkeys(("num_train_epochs", "sft_epochs"), (1e-12, COUNT)),
    **dict.fromkeys(("warmup_steps", "sft_warmup_steps", "logging_steps", "eval_steps", "save_steps"), (0, COUNT)),
    "max_new_tokens": (0, 10**6),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), (0, 1e12)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))), "adam_epsilon": (1e-20, 1),
    "dataset_weights": (0, 1000), "seed": (0, 2**63 - 1),
    "max_length": (2, COUNT), "max_seq_len": (2, COUNT), "dropout": (0, 0.999), "max_steps": (-1, COUNT),
}


@dataclass(frozen=True)
class ModelOptions:
    """Which model to start from, or the shape of one trained from scratch."""

    model: str | None = None
    """Folder of a trained model, or its name on the Hugging Face hub; none: a tokenizer and a model are trained from
    scratch first, of the shape below."""
    revision: str | None = None
    """Branch, tag or commit of a model from the hub; none: its main branch."""
    allow_pickle: bool = False
    """Also load a model whose weights are pickled (by torch's weights_only reader)."""
    vocab_size: int = 1024
    """Pieces of the SentencePiece tokenizer that is trained (fewer where the text has fewer), on 10 million characters
    at most, taken evenly from the text."""
    dim: int = 128
    """Width of the hidden states."""
    depth: int = 4
    """Number of layers."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Key/value heads (grouped-query attention); none: as many as heads."""
    dropout: float = 0.0
    """Dropout of embedding, attention and feed-forward while training from scratch."""
    max_seq_len: int = 512
    """Positions of a model from scratch."""


@dataclass(frozen=True)
class SFTOptions:
    """How the imitation stage is trained."""

    sft_learning_rate: float = 4e-3
    """Peak learning rate."""
    sft_epochs: float = 5.0
    """Passes over the text."""
    sft_batch_size: int = 24
    """Documents a step."""
    sft_warmup_steps: int = 50
    """Steps of linear warmup."""


@dataclass(frozen=True)
class PreferenceDataOptions:
    """Preference pairs, and the text for the model from scratch."""

    dataset: str | None = None
    """Preference pairs: a file (.jsonl, .json, each also .gz, .parquet), or a name on the Hugging Face hub (owner/name,
    owner/name:split); none: the embedded toy world."""
    eval_dataset: str | None = None
    """Held-out pairs, the first 5,000 at most; none: the toy world's, or a seeded tenth of the dataset's prompts."""
    sft_dataset: str | None = None
    """Text to imitate before alignment; none: the toy world's corpus, or the chosen side of the pairs."""
    columns: tuple[str, ...] = ()
    """Names of the files' columns where they differ from ours: chosen=better rejected=worse. A file that has none of
    them, where another has, is read under ours."""
    max_length: int = 512
    """Tokens of prompt and completion together (records of over 1,000,000 characters are dropped before)."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which part of a prompt that is too long stays; both sides of a pair keep the same one. A chat turn that keep_end
    cuts loses its role."""
    identical: Literal["drop", "keep"] = "drop"
    """Pairs whose two sides are the same text (counted in any case)."""
    empty: Literal["error", "drop"] = "error"
    """Records with an empty reply; HH-RLHF's are always dropped (and counted)."""


@dataclass(frozen=True)
class LossOptions:
    """The preference loss."""

    loss_type: str = "sigmoid"
    """Name of the loss, or several: sigmoid,sft (docs/losses.md lists them)."""
    loss_weights: str | None = None
    """What each of several losses counts: 1,0.1; none: 1 each."""
    beta: float | None = None
    """Strength of the pull towards the reference, > 0; none: the loss's own (docs/losses.md), .1 for sigmoid."""
    label_smoothing: float = 0.0
    """Probability that a label is flipped, in [0, .5)."""
    gamma: float | None = None
    """Margin that simpo asks for, >= 0; none: .5."""
    tau: float | None = None
    """How sharply discopop changes from one loss to the other, in (0, 1]; none: .05."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence that holds the policy to the reference."""
    f_alpha: float = 0.5
    """The alpha of f_divergence alpha: 1 is reverse_kl, 0 forward_kl."""
    ld_alpha: float = 1.0
    """What tokens of the longer side count beyond the shorter's length, in [0, 1] (LD-DPO)."""
    share_prefix: bool = True
    """Run what both sides of a pair begin with once; changes nothing but time and memory."""
    packed: bool = True
    """Run no padding, and the head for scored tokens alone, in pieces; changes nothing but time and memory."""
    ref_model: str | None = None
    """Folder of the reference, or its name on the hub; none: a frozen copy of the model before training."""
    precompute_ref_log_probs: bool = True
    """Run the reference over all pairs once, before training."""
    reference_cache: str | None = None
    """Folder in which runs share these log-probabilities, found by weights, tokens and precision; none: the run's own, for as
    long as it lasts."""


@dataclass(frozen=True)
class TrainingOptions:
    """The training loop."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    batch_size: int = 16
    """Records a forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step; losses are averaged over all of them together."""
    micro_batch_tokens: int | None = None
    """Tokens of a forward pass: a step's records, the longest first, run together as long as their lengths (of a pair: with its
    longer side) add up to no more; none: batch_size records."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; -1: as the epochs give."""
    warmup_steps: int = 10
    """Steps of linear warmup; the n-th takes n / (warmup_steps + 1) of the rate (transformers: (n - 1) / warmup_steps,
    so that its first step changes nothing)."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule after the warmup."""
    weight_decay: float = 0.0
    """Decay of matrices."""
    adam_beta1: float = 0.9
    """AdamW's memory of gradients, in [0, 1); this and the next two are the imitation stage's too."""
    adam_beta2: float = 0.95
    """AdamW's memory of their squares, in [0, 1); trl's default is 0.999."""
    adam_epsilon: float = 1e-8
    """What AdamW adds to the denominator."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: never."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient norm is not finite: it stops the run, or it changes nothing and is counted
    (20 in a row stop the run)."""
    bf16: bool = False
    """Matrix products in bfloat16 (autocast): faster on GPUs and on CPUs with AVX512-BF16 or AMX."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: int = 0
    """Seed of initialisation, data order and draws."""


@dataclass(frozen=True)
class RunOptions:
    """Where a run lives and what it reports."""

    output_dir: str | None = None
    """Run folder; none: runs/<run name>."""
    run_name: str | None = None
    """Name of the run; none: the program's."""
    logging_steps: int = 10
    """Steps between log lines."""
    eval_steps: int = 50
    """Steps between evaluations on held-out data; 0: none in between."""
    save_steps: int = 50
    """Steps between checkpoints."""
    report_to: Literal["none", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl; WANDB_MODE=offline keeps wandb on this machine."""
    device: str | None = None
    """cpu, cuda, ...; none: a GPU where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""
    resume: bool = False
    """Insist on continuing: fail where the folder has nothing to resume (a same configuration resumes anyway)."""
    overwrite: bool = False
    """Start anew in a folder that holds a run."""
    profile: bool = False
    """Profile steps 3 to 5: profile.json in the run folder (chrome://tracing, ui.perfetto.dev), a table of operations, and in
    the log U, the part of the time that the fewest FLOPs need."""
    dry_run: bool = False
    """Show one rendered, tokenised and masked record, the parameter count and the memory that the run needs, then stop."""


@dataclass(frozen=True)
class EvaluationOptions:
    """The evaluation at the end."""

    eval_prompts: int = 500
    """Held-out prompts to sample from."""
    eval_samples: int = 4
    """Samples a prompt, temperature 1, unfiltered."""
    eval_max_new_tokens: int = 128
    """Tokens a sample at most."""


@dataclass(frozen=True)
class DPOConfig:
    """Align a model with preferences: (tokenizer and SFT where no --model is given,) reference, DPO, evaluation, report."""

    model: ModelOptions = field(default_factory=ModelOptions)
    sft: SFTOptions = field(default_factory=SFTOptions)
    data: PreferenceDataOptions = field(default_factory=PreferenceDataOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


@dataclass(frozen=True)
class SFTDataOptions:
    """Text, prompt+completion, conversations, or the chosen side of preference pairs."""

    dataset: tuple[str, ...] = ()
    """Files (.txt with a document a line, .jsonl, .json, each also .gz, .parquet) or names on the Hugging Face hub; none:
    the embedded corpus."""
    dataset_weights: tuple[float, ...] = ()
    """How often an epoch visits each file; none: once each."""
    eval_dataset: str | None = None
    """Held-out file, its first 5,000 examples at most; none: a seeded twentieth of the data."""
    columns: tuple[str, ...] = ()
    """Names of the files' columns where they differ from ours: prompt=question completion=answer. A file that has none of
    them, where another has, is read under ours."""
    max_length: int = 512
    """Tokens a record (those of over 1,000,000 characters are dropped before, documents as well)."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_start"
    """Which part of a record that is too long stays; plain documents are split instead. A chat turn that keep_end cuts
    loses its role."""
    empty: Literal["error", "drop"] = "error"
    """Records with an empty reply; HH-RLHF's are always dropped."""


@dataclass(frozen=True)
class SFTConfig:
    """Train a model to imitate: plain text, completions, or the assistant's turns of conversations."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: SFTDataOptions = field(default_factory=SFTDataOptions)
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(learning_rate=4e-3, batch_size=24, warmup_steps=50))
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class PromptOptions:
    """What to continue."""

    model: str = "runs/demo/policy"
    """Folder of a trained model, or its name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of a model from the hub; none: its main branch."""
    allow_pickle: bool = False
    """Also load a model whose weights are pickled (by torch's weights_only reader)."""
    prompt: str | None = None
    """One prompt (also -p); none: --prompts, or standard input."""
    prompts: str | None = None
    """File with a prompt a line: .txt, or .jsonl with "prompt" as text or messages."""
    chat: bool = False
    """Render prompts with the model's chat template as a user's turn."""
    system: str | None = None
    """System turn in front (with --chat)."""
    json: bool = False
    """Write a JSON object a completion instead of text."""


@dataclass(frozen=True)
class SamplingOptions(SamplingParams):
    """How to draw; without any of these: temperature 1, unfiltered."""

    batch_size: int = 64
    """Rows that run together at most; a row that ends makes room for the next prompt."""
    cache_tokens: int | None = None
    """Tokens that the cache of keys and values may hold at most, which bounds its memory; none: as many as the rows need."""
    device: str | None = None
    """cpu, cuda, ...; none: a GPU where there is one."""
    dtype: str | None = None
    """float32, bfloat16, float16; none: the checkpoint's."""
    load_in_8bit: bool = False
    """Quantise the layers' weights to int8 after loading; the rest becomes bfloat16."""
    load_in_4bit: bool = False
    """The same to 4 bits."""
    quant_type: Literal["int4", "nf4"] = "int4"
    """Kind of 4 bits: torch's own kernels, or bitsandbytes' NF4."""
    quant_group_size: int | None = None
    """Weights that share a scale in 4 bits: 32, 64, 128 or 256 (nf4: 64 to 4096); none: the smallest."""
    quant_head: bool = True
    """Quantise the head too; one that is tied to the embedding never is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("load_in_8bit and load_in_4bit are both given, allowed is one of them")
        for name in ("quant_type", "quant_group_size"):
            if getattr(self, name) not in ("int4", None) and not self.load_in_4bit:
                raise ConfigError(f"{name} is {getattr(self, name)}, which goes with load_in_4bit")


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model; completions go to standard output."""

    prompt: PromptOptions = field(default_factory=PromptOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True)
class InspectOptions:
    """What to look at."""

    dataset: str | None = None
    """The file, also as the first argument (.jsonl, .json, .txt, each also with .gz; .parquet), or a hub name."""
    columns: tuple[str, ...] = ()
    """Names of the file's columns, such as chosen=better rejected=worse."""
    limit: int | None = None
    """Records to look at; none: all."""
    tokenizer: str | None = None
    """Folder of the tokenizer (a trained model's) to count tokens with; none: characters are counted."""
    max_length: int | None = None
    """Show what truncation to so many tokens would cut and drop."""
    truncation_mode: Literal["keep_end", "keep_start"] | None = None
    """Which part of a record that is too long stays; none: as the training programs do by default."""
    empty: Literal["error", "drop"] = "error"
    """Records with an empty reply, as in the training programs."""
    color: Literal["auto", "always", "never"] = "auto"
    """Colours; auto: on a terminal, unless NO_COLOR is set."""


@dataclass(frozen=True)
class InspectConfig:
    """Show what a file of records holds: its format, flaws, lengths, duplicates, and one record as training sees it."""

    data: InspectOptions = field(default_factory=InspectOptions)


def flatten(config: Any) -> dict[str, Any]:
    """All settings of a configuration by their flag's name."""
    return {f.name: getattr(group, f.name) for group in _groups(config) for f in dataclasses.fields(group)}


def _groups(config: Any) -> list[Any]:
    return [getattr(config, f.name) for f in dataclasses.fields(config)]


def parse(kind: type[C], arguments: Sequence[str], program: str, short: dict[str, str] | None = None) -> C:
    """Parse flags into a `kind`; prints and leaves for `--help` and `--print-config`. Raises `ConfigError`, one line."""
    import tyro

    default = kind()
    known = flatten(default)
    arguments = _normal(arguments, short or {}, known)
    print_config = "--print-config" in arguments
    arguments = [a for a in arguments if a != "--print-config"]
    arguments, origin = _config_file(arguments, known)
    switches = {name for name, value in known.items() if isinstance(value, bool)}
    for argument in arguments:
        name = argument.removeprefix("--").split("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known and name.removeprefix("no_") not in switches and name != "help":
            flags = [k.replace("_", "-") for k in (*known, "config", "print_config", "help")]
            close = nearest(name.replace("_", "-"), flags).replace("'", "", 1).replace("did you mean ", "did you mean --")
            raise ConfigError(f"unknown flag {argument.split('=')[0]}{close.replace(chr(39), '')} ({program} --help lists all)")
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused):
            config = tyro.cli(kind, args=arguments, default=default, prog=program, description=_description(kind),
                              config=(tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = re.sub(r"^Error parsing (\w+: )?", "", _one_line(refused.getvalue()))
        message = re.sub(r"no type matching .*<class '(?:int|float)'>: ", "", message)  # of a number that may be left out
        named = re.search(r"--[\w-]+", message)
        raise ConfigError(f"{origin.get(named[0], '') if named else ''}{message}") from None
    for name, value in flatten(config).items():
        flag = "--" + name.replace("_", "-")
        _check(flag, value, LIMITS.get(name), origin.get(flag, ""))
    if print_config:
        print(json.dumps(flatten(config), indent=2))
        sys.exit(0)
    return config


def _check(flag: str, value: Any, limits: tuple[float, float] | None, origin: str) -> None:
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, str) and ("\0" in one or one != one.encode("utf-8", "replace").decode()):
            raise ConfigError(f"{origin}{flag} holds a character that no text has ({one!a})")
        if one == "" and flag not in (*FREE, "--stop"):  # of which SamplingParams tells
            raise ConfigError(f"{origin}{flag} is empty, allowed is a path or a name")
        low, high = (-math.inf, math.inf) if limits is None else limits
        if isinstance(one, int | float) and not (low <= one <= high and math.isfinite(one)):
            bounds = f" >= {low}" * (low > -math.inf) + f" and <= {high}" * (high < math.inf)
            raise ConfigError(f"{origin}{flag} is {one}, allowed is a finite number{bounds}")
    if flag == "--max-steps" and value == 0:
        raise ConfigError(f"{origin}--max-steps is 0, allowed is -1 (as the epochs give) or at least 1")


def _description(kind: type) -> str:
    return f"{kind.__doc__} Besides: --config FILE takes settings from a JSON file, --print-config shows them as one."


def _normal(arguments: Sequence[str], short: dict[str, str], known: dict[str, Any]) -> list[str]:
    """Long flags with `-`; `--stop a b` as `--stop=a --stop=b`; a prompt may begin with dashes if it isn't a flag."""
    normal: list[str] = []
    several, empty = "", set()  # the flag whose values are being read, and those that have none yet
    for argument in arguments:
        flag, equals, value = short.get(argument, argument).partition("=")
        name = flag[2:].replace("-", "_")
        is_flag = flag.startswith("--") and (name in known or not name.startswith((" ", "_")))
        if normal and normal[-1] in FREE and not is_flag:
            normal[-1] += f"={argument}"
        elif is_flag:
            several = flag.replace("_", "-") if isinstance(known.get(name), tuple) and not equals else ""
            empty |= {several} - {""}
            normal += [] if several else [flag.replace("_", "-") + equals + value]
        else:
            empty -= {several}
            normal.append(f"{several}={argument}" if several else argument)
    if empty:
        raise ConfigError(f"{min(empty)} needs a value")
    return normal


def _config_file(arguments: list[str], known: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Replace `--config FILE` by the flags that its settings are, in front, so that the command line's own win.

    Gives also what to say in front of a message about one of these flags: where it comes from.
    """
    origin: dict[str, str] = {}
    rest: list[str] = []
    flags: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        flag, _, value = argument.partition("=")
        if flag != "--config":
            rest.append(argument)
            continue
        file = value or next(pending, "")
        if not file:
            raise ConfigError("--config needs a JSON file")
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config {file}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"--config {file}: no JSON ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--config {file} holds a {type(values).__name__}, allowed is an object of settings")
        for name, setting in values.items():
            name = name.replace("-", "_")
            if name not in known:
                raise ConfigError(f"--config {file}: no setting {name!r}{nearest(name, known)}")
            if isinstance(setting, bool) != isinstance(known[name], bool):
                allowed = "true or false" if isinstance(known[name], bool) else "a number or text"
                raise ConfigError(f"--config {file}: {name} is {json.dumps(setting)}, allowed is {allowed}")
            if isinstance(setting, dict | list) and not (isinstance(known[name], tuple) and isinstance(setting, list)):
                raise ConfigError(f"--config {file}: {name} is {json.dumps(setting)}, allowed is a single value")
            flag = "--" + name.replace("_", "-")
            flags += _as_flags(flag, setting)
            origin[flag] = f"--config {file}: "
    given = {argument.partition("=")[0] for argument in rest}
    origin = {flag: where for flag, where in origin.items() if flag not in given}
    return [f for f in flags if f.partition("=")[0] not in given] + rest, origin


def _as_flags(flag: str, setting: Any) -> list[str]:
    if isinstance(setting, bool):
        return [flag if setting else f"--no-{flag[2:]}"]
    return [f"{flag}={value}" for value in (setting if isinstance(setting, list) else [setting])]


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws: its first part, or the second where the box is ASCII and has a title."""
    lines = [line.strip("│ ") for line in box.splitlines() if line[:1] not in "╭╰"]
    parts = re.split(r"\n[─-]+(?:\n|$)", "\n".join(lines))
    return " ".join(parts[0 if "│" in box or len(parts) < 2 else 1].split())
