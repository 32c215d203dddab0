"""The programs' settings: dataclasses in groups, of which `flags` makes a command line. No torch: `--help` answers at once."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from xalign.errors import ConfigError


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
    """Preference pairs, for kto labelled completions as well: a file (.jsonl, .json, each also .gz, .parquet), or a name on
    the Hugging Face hub (owner/name, owner/name:split); none: the embedded toy world."""
    eval_dataset: str | None = None
    """Held-out pairs, the first 5,000 at most; none: the toy world's, or a seeded tenth of the dataset's prompts."""
    sft_dataset: str | None = None
    """Text to imitate before alignment; none: the toy world's corpus, or the chosen side of the pairs (the desirable)."""
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
    """Name of the loss, or several: sigmoid,sft (docs/losses.md lists them); kto alone also takes labelled completions."""
    loss_weights: str | None = None
    """What each of several losses counts: 1,0.1; none: 1 each."""
    beta: float | None = None
    """Strength of the pull towards the reference, > 0; none: the loss's own (docs/losses.md), .1 for sigmoid."""
    label_smoothing: float = 0.0
    """Probability that a label is flipped, in [0, .5)."""
    gamma: float | None = None
    """Margin that simpo asks for, >= 0; none: .5."""
    alpha: float | None = None
    """What the rejected's likelihood counts in unlikelihood, in [0, 1); none: .5."""
    tau: float | None = None
    """How sharply discopop changes from one loss to the other, in (0, 1]; none: .05."""
    desirable_weight: float | None = None
    """What a desirable completion counts in kto, >= 0; none: 1."""
    undesirable_weight: float | None = None
    """What an undesirable one counts, >= 0; none: 1."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence that holds the policy to the reference."""
    f_alpha: float = 0.5
    """The alpha of f_divergence alpha: 1 is reverse_kl, 0 forward_kl."""
    ld_alpha: float = 1.0
    """What tokens of the longer side count beyond the shorter's length, in [0, 1] (LD-DPO)."""
    use_weighting: bool = False
    """Weigh each pair's loss in training by how likely the policy is to write its two texts (WPO)."""
    share_prefix: bool = True
    """Run what both sides of a pair begin with once; changes nothing but time and memory."""
    packed: bool = True
    """Run no padding, and the head for scored tokens alone, in pieces; changes nothing but time and memory."""
    ref_model: str | None = None
    """Folder of the reference, or its name on the hub; none: a frozen copy of the model before training. A loss without
    reference (simpo, cpo, orpo, sft) keeps none in memory while it trains."""
    precompute_ref_log_probs: bool = True
    """Run the reference over all pairs once, before training; one that moves (--sync-ref-model) runs in each step."""
    sync_ref_model: bool = False
    """Let the reference follow the policy (TR-DPO)."""
    ref_model_mixup_alpha: float = 0.6
    """How far it moves: reference = alpha policy + (1 - alpha) reference, in (0, 1]; 1 is a copy of the policy."""
    ref_model_sync_steps: int = 512
    """Steps between its moves, at least 1."""
    reference_cache: str | None = None
    """Folder in which runs share these log-probabilities, found by weights, tokens and precision; none: the run's own, for as
    long as it lasts."""


@dataclass(frozen=True)
class LoRAOptions:
    """Adapters (LoRA) that are trained in the place of the weights."""

    lora_r: int | None = None
    """Rank of the adapters; none: all weights are trained. Use a higher rate than for these, 1e-5 to 2e-4."""
    lora_alpha: float = 32.0
    """An adapter counts alpha / r."""
    lora_dropout: float = 0.0
    """Dropout of an adapter's input, in training."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers with adapters: to_q, to_k, to_v, to_out, gate, up, down, or the model's own names (q_proj); none, or
    all-linear: all of them."""
    use_rslora: bool = False
    """An adapter counts alpha / sqrt(r) (rsLoRA)."""


@dataclass(frozen=True)
class QuantOptions:
    """Weights in 8 or 4 bits; of a training the frozen ones, under adapters."""

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
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("load_in_8bit and load_in_4bit are both given, allowed is one of them")
        for name in ("quant_type", "quant_group_size"):
            if getattr(self, name) not in ("int4", None) and not self.load_in_4bit:
                raise ConfigError(f"{name} is {getattr(self, name)}, which goes with load_in_4bit")


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
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each process of a torchrun holds while it trains: the whole model, or shards of weights, gradients and moments."""
    checkpoint_type: Literal["full", "sharded"] | None = None
    """Checkpoints as Hugging Face folders, or as shards that the processes write side by side; any number of processes goes on
    from either. none: sharded with fsdp, else full."""
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
    """The evaluation: samples at temperature 1, and perplexity."""

    eval_prompts: int = 500
    """Held-out prompts to sample from."""
    eval_samples: int = 4
    """Samples a prompt, temperature 1, unfiltered."""
    eval_max_new_tokens: int = 128
    """Tokens a sample at most."""
    eval_text: str | None = None
    """Text whose perplexity is watched (.txt with a document a line, .jsonl, ...; its first 500 documents), also while a
    policy is trained: alignment must not cost the model its language."""
    perplexity_alert: float = 1.5
    """Warn when the policy's perplexity of --eval-text is more than so many times the reference's."""


@dataclass(frozen=True)
class DPOConfig:
    """Align a model with preferences: (tokenizer and SFT where no --model is given,) reference, DPO, evaluation, report."""

    model: ModelOptions = field(default_factory=ModelOptions)
    sft: SFTOptions = field(default_factory=SFTOptions)
    data: PreferenceDataOptions = field(default_factory=PreferenceDataOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    quant: QuantOptions = field(default_factory=lambda: QuantOptions(quant_head=False))
    training: TrainingOptions = field(default_factory=TrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


@dataclass(frozen=True)
class RewardDataOptions:
    """Preference pairs, and the text for the model from scratch."""

    dataset: tuple[str, ...] = ()
    """Preference pairs: files (.jsonl, .json, each also .gz, .parquet), or names on the Hugging Face hub (owner/name:split);
    none: the embedded toy world."""
    dataset_weights: tuple[float, ...] = ()
    """How often an epoch visits each file; none: once each."""
    eval_dataset: str | None = None
    """Held-out pairs, the first 5,000 at most; none: the toy world's, or a seeded tenth of the datasets' prompts."""
    sft_dataset: str | None = None
    """Text that a model from scratch imitates first; none: the toy world's corpus, or the chosen side of the pairs."""
    columns: tuple[str, ...] = ()
    """Names of the files' columns where they differ from ours: chosen=better rejected=worse. A file that has none of
    them, where another has, is read under ours."""
    max_length: int = 512
    """Tokens of a prompt with a completion (records of over 1,000,000 characters are dropped before)."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which part of a text that is too long stays: keep_end cuts its beginning behind the BOS, keep_start the completion's
    end, but not the EOS (or end of turn) that closes it."""
    identical: Literal["drop", "keep"] = "drop"
    """Pairs whose two sides are the same text (counted in any case)."""
    empty: Literal["error", "drop"] = "error"
    """Records with an empty reply; HH-RLHF's are always dropped (and counted)."""


@dataclass(frozen=True)
class RewardOptions:
    """What the reward model minimises, and what is kept with it."""

    loss_type: Literal["sigmoid", "logexp"] = "sigmoid"
    """Bradley and Terry's loss, -log sigmoid(r_chosen - r_rejected - margin); logexp, ln(1 + e^(r_rejected - r_chosen)), is
    the same without a margin."""
    margin: bool = False
    """Ask for the records' margins (column margin, or score_chosen - score_rejected), which all must have."""
    center_rewards_coefficient: float = 0.0
    """What (r_chosen + r_rejected)^2 counts, >= 0: it draws rewards to mean 0; trl's documentation tries .01."""
    share_prefix: bool = True
    """Run what both sides of a pair begin with once; changes nothing but time and memory."""
    normalize_reward: bool = False
    """Say in the saved model that its scores are (reward - mean) / std of the held-out rewards, which it holds in any case."""
    value_head_prefix: str | None = None
    """Name of the head's tensor in a --model that is a reward model already; none: as its config.json says, or score."""


@dataclass(frozen=True)
class RewardConfig:
    """Train a reward model on preference pairs: (tokenizer and SFT where no --model is given,) Bradley-Terry, report."""

    model: ModelOptions = field(default_factory=ModelOptions)
    sft: SFTOptions = field(default_factory=SFTOptions)
    data: RewardDataOptions = field(default_factory=RewardDataOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    quant: QuantOptions = field(default_factory=lambda: QuantOptions(quant_head=False))
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(learning_rate=1e-5))
    run: RunOptions = field(default_factory=RunOptions)


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
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    quant: QuantOptions = field(default_factory=lambda: QuantOptions(quant_head=False))
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(learning_rate=4e-3, batch_size=24, warmup_steps=50))
    run: RunOptions = field(default_factory=RunOptions)


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
