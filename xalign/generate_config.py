"""The settings of `generate.py` and `xalign chat`. No torch: `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from xalign.backends.base import SamplingParams
from xalign.config import QuantOptions
from xalign.errors import ConfigError


@dataclass(frozen=True)
class PromptOptions:
    """What to continue."""

    model: str = "runs/demo/policy"
    """Folder of a trained model, or its name on the Hugging Face hub; with --backend openai the server's name for it."""
    backend: Literal["native", "transformers", "vllm", "openai"] = "native"
    """Engine: our own, transformers, vLLM in this process, or a server with OpenAI's interface (key: OPENAI_API_KEY)."""
    base_url: str | None = None
    """Address of the server (--backend openai), such as http://127.0.0.1:8000/v1; none: OPENAI_BASE_URL, or OpenAI's own."""
    unsupported: Literal["error", "warn"] = "error"
    """What a setting is that the backend doesn't honour."""
    revision: str | None = None
    """Branch, tag or commit of a model from the hub; none: its main branch."""
    adapter: str | None = None
    """Folder of LoRA adapters of this model: a run's adapter/ or a checkpoint of it, or peft's."""
    allow_pickle: bool = False
    """Also load a model whose weights are pickled (by torch's weights_only reader)."""
    prompt: str | None = None
    """One prompt (also -p); none: --prompts, or standard input."""
    prompts: str | None = None
    """File with a prompt a line: .txt, or .jsonl with "prompt" as text or messages."""
    chat: bool = False
    """Render prompts with the model's chat template as a user's turn; without any prompt: a conversation."""
    system: str | None = None
    """System turn in front (with --chat)."""
    json: bool = False
    """Write a JSON object a completion instead of text."""


@dataclass(frozen=True)
class SamplingOptions(QuantOptions, SamplingParams):
    """How to draw; without any of these: temperature 1, unfiltered."""

    batch_size: int = 64
    """Rows that run together at most; a row that ends makes room for the next prompt."""
    cache_tokens: int | None = None
    """Tokens that the cache of keys and values may hold at most, which bounds its memory; none: as many as the rows need."""
    device: str | None = None
    """cpu, cuda, ...; none: a GPU where there is one."""
    dtype: str | None = None
    """float32, bfloat16, float16; none: the checkpoint's."""

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        QuantOptions.__post_init__(self)


@dataclass(frozen=True)
class ConversationOptions:
    """Talking to a model: turn by turn (--chat), or each message by itself (--interactive)."""

    interactive: bool = False
    """Read messages and answer them (also -i), each by itself, in --input-template; with --chat as a conversation."""
    input_template: str | None = None
    """What the model sees of --interactive, {} for the message; none: User: {}, a line end, Assistant: and a blank."""
    compare: str | None = None
    """Answer with this model as well, side by side; without a value: with the run's reference, or with the model without its
    --adapter."""
    beta: float = 0.1
    """What the log-ratio shown by --compare is multiplied with, > 0."""
    picks: str = "picks.jsonl"
    """File to which /pick adds preference pairs."""
    allow_special_tokens: bool = False
    """Read special tokens in a message as tokens, not as text."""
    history: str | None = None
    """File of what was typed before; none: xalign/history in $XDG_STATE_HOME, or ~/.local/state."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ConfigError(f"beta is {self.beta}, allowed is a finite number > 0")


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model, or talk to it; completions go to standard output."""

    prompt: PromptOptions = field(default_factory=PromptOptions)
    conversation: ConversationOptions = field(default_factory=ConversationOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
