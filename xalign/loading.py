"""The engine that settings name: our own with a model of ours in it, or another by `backends.open`."""

from typing import Any

from xalign import backends
from xalign.adapters import load_adapter
from xalign.backends.base import Backend
from xalign.backends.native import NativeBackend
from xalign.config import QuantOptions
from xalign.errors import ConfigError
from xalign.generate_config import PromptOptions, SamplingOptions
from xalign.nn.lora import merge
from xalign.stages import choose_device, load_model


def load(model: str, options: PromptOptions, draw: SamplingOptions, adapter: str | None) -> Backend:
    """A model (folder, hub name, or a server's name for it) behind --backend. Raises `ConfigError` for flags not for it."""
    if options.backend != "native":
        return _foreign(model, options, draw)
    if options.base_url is not None:
        raise ConfigError("--base-url goes with --backend openai")
    revision = options.revision if model == options.model else None
    net, tokenizer = load_model(model, draw.dtype, choose_device(draw.device), allow_pickle=options.allow_pickle,
                                revision=revision, quant=draw)
    if adapter is not None:
        load_adapter(net, adapter)
        net.eval() if draw.load_in_8bit or draw.load_in_4bit else merge(net)  # merged it is as fast as without
    return NativeBackend(net, tokenizer, draw.batch_size, draw.cache_tokens)


def _foreign(model: str, options: PromptOptions, draw: SamplingOptions) -> Backend:
    taken = {"openai": ("base_url",), "transformers": ("device", "dtype", "batch_size"), "vllm": ("dtype",)}[options.backend]
    values = {**vars(options), **vars(draw)}
    defaults = {**vars(PromptOptions()), **vars(SamplingOptions())}
    for name in ("base_url", "adapter", "revision", "allow_pickle", "batch_size", "cache_tokens", "device", "dtype",
                 *QuantOptions.__dataclass_fields__):
        if name not in taken and values[name] != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')} doesn't go with --backend {options.backend}")
    spec: dict[str, Any] = {"backend": options.backend, "model": model, "unsupported": options.unsupported}
    spec |= {name: values[name] for name in taken if values[name] is not None}
    return backends.open(spec)
