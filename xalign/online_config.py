"""The settings of `xalign online`. No torch: `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from xalign.backends.base import SamplingParams
from xalign.config import LoRAOptions, LossOptions, QuantOptions, RunOptions, TrainingOptions
from xalign.errors import ConfigError


@dataclass(frozen=True)
class OnlineOptions:
    """Whom to improve, by whose reward, on which prompts, in how many rounds."""

    model: str | None = None
    """The first policy, which is also the reference unless --ref-model is another: a folder, or a name on the hub."""
    reward_model: str | None = None
    """What scores the completions, as for xalign score: a reward model's folder or hub name, http://HOST:PORT, gold,
    dpo:POLICY,REFERENCE."""
    reward_tokenizer: str | None = None
    """Folder of the tokenizer that writes texts for another's server; none: the server writes them itself (ours does)."""
    gold_model: str | None = None
    """A second scorer that training never sees, to watch for over-optimisation; none: the toy world's known reward where the
    prompts are its, else nothing."""
    dataset: tuple[str, ...] = ()
    """Prompts: files (.txt, .jsonl, .json, each also .gz, .parquet) or names on the hub; of pairs their prompts are taken.
    none: the toy world's."""
    eval_dataset: str | None = None
    """Prompts to measure each round on; none: the toy world's, or a seeded tenth of the dataset's."""
    columns: tuple[str, ...] = ()
    """Names of the files' columns where they differ from ours: prompt=question."""
    chat: bool = False
    """Text prompts are a user's turn, put into the model's chat template."""
    system: str | None = None
    """System turn in front (with --chat)."""
    rounds: int = 3
    """Rounds; each has prompts of its own."""
    prompts_per_round: int | None = None
    """Prompts a round; none: all prompts, shared out. With a number a finished run takes more --rounds."""
    eval_prompts: int = 200
    """Held-out prompts to sample from after each round."""
    eval_samples: int = 4
    """Samples of each."""
    max_length: int = 2048
    """Tokens of prompt and completion together in training."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which part of a prompt that is too long stays."""


@dataclass(frozen=True)
class DrawOptions:
    """How completions are drawn."""

    n: int = 8
    """Completions a prompt (also -n)."""
    temperature: float = 1.0
    """0 is greedy, which makes no pairs."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens with this mass."""
    min_p: float | None = None
    """Keep tokens at least this many times as likely as the likeliest."""
    max_new_tokens: int = 2048
    """Tokens of a completion at most."""
    unfinished: Literal["drop", "keep"] = "drop"
    """Completions that were cut off at max_new_tokens: training would close them with an end that nobody wrote."""
    backend: Literal["native", "transformers", "vllm"] = "native"
    """Engine that draws; it opens each round's policy anew."""
    sample_batch_size: int = 64
    """Completions that run together at most (native, transformers)."""

    def __post_init__(self) -> None:
        self.params()

    def params(self) -> SamplingParams:
        """The same for a backend."""
        names = ("n", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")
        return SamplingParams(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class ImproveOptions:
    """What becomes of scored completions."""

    post_processor: Literal["dpo", "rs", "csft", "best_of_n"] = "dpo"
    """dpo: pairs, and preference training; rs: imitation of each prompt's best (rejection sampling); csft: imitation of all,
    with the reward in the prompt; best_of_n: a report on what choosing among N would give, and no training."""
    pairing: Literal["max_min", "max_random", "max_max", "random", "length_penalised"] = "max_min"
    """Best against worst; best against any other; best against second; any two; best against worst by reward - len_penalty *
    characters."""
    len_penalty: float = 0.0
    """What a character costs (length_penalised)."""
    reference: Literal["fixed", "moving"] = "fixed"
    """The reference of each round: the first policy (or --ref-model), or the policy that the round starts from."""
    warm_start: bool = True
    """A round trains on from the policy before; else from --model anew."""
    csft_template: str = "{prompt} <rm_score>: {reward}"
    """The prompt with its reward (csft); of messages the last is {prompt}."""
    csft_reward: float | None = None
    """The reward that is asked for when a csft policy writes; none: the mean of each prompt's best."""

    def __post_init__(self) -> None:
        if (self.pairing == "length_penalised") != (self.len_penalty > 0):
            raise ConfigError(f"pairing is {self.pairing} and len_penalty is {self.len_penalty}, allowed is length_penalised "
                              "with a len_penalty > 0, or neither")
        if self.reference == "moving" and not self.warm_start:
            raise ConfigError("reference is moving without warm_start, allowed is one of them: a moving reference is the "
                              "policy before")
        if any(self.csft_template.count(part) != 1 for part in ("{prompt}", "{reward}")):
            raise ConfigError(f"csft_template is {self.csft_template!r}, allowed is a text with {{prompt}} and {{reward}} in "
                              "it, once each")


@dataclass(frozen=True)
class OnlineConfig:
    """Improve a policy in rounds: draw completions, score them, pair them, train on them (online iterative DPO). The defaults
    are the RLHF Workflow's for models of 8 billion parameters; data/online.json holds the toy world's."""

    online: OnlineOptions = field(default_factory=OnlineOptions)
    draw: DrawOptions = field(default_factory=DrawOptions)
    improve: ImproveOptions = field(default_factory=ImproveOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    quant: QuantOptions = field(default_factory=lambda: QuantOptions(quant_head=False))
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(
        learning_rate=5e-7, gradient_accumulation_steps=8, num_train_epochs=2.0, seed=42))
    run: RunOptions = field(default_factory=RunOptions)
