"""`backends.open(spec)`: a backend by its name, `{"backend": "openai", "model": ..., "base_url": ...}` or "openai:NAME"."""

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, cast, get_args

from xalign.backends.base import Backend, SamplingParams
from xalign.errors import ConfigError, nearest
from xalign.formats import FORMATS

KINDS = ("native", "transformers", "vllm", "openai")
PLAIN = {int: "a whole number >= 1", float: "a number", str: "text", bool: "true or false", type(None): "none"}
Spec = str | Mapping[str, Any]


def as_spec(spec: Spec) -> dict[str, Any]:
    """A spec as a dict, checked as far as that goes without loading anything. Raises `ConfigError`."""
    if isinstance(spec, str):
        kind, colon, model = spec.partition(":")
        spec = {"backend": kind, "model": model} if colon and kind in KINDS else {"backend": "native", "model": spec}
    if not isinstance(spec, Mapping):
        raise ConfigError(f"a backend is {spec!r}, allowed is text such as native:FOLDER, or an object with backend and model")
    spec = dict(spec)
    kind = spec.setdefault("backend", "native")
    if kind not in KINDS:
        raise ConfigError(f"no backend {kind!r}{nearest(str(kind), KINDS)}; allowed are {', '.join(KINDS)}")
    if not isinstance(spec.get("model"), str) or not spec["model"]:
        raise ConfigError(f"a backend needs a model: {spec!r}, allowed is a folder or a name")
    if "api_key" in spec:
        raise ConfigError("a backend's api_key can't be given, allowed is api_key_env, the name of an environment variable")
    if spec.get("unsupported", "error") not in ("error", "warn"):
        raise ConfigError(f"unsupported is {spec['unsupported']!r}, allowed are error, warn")
    if spec.get("format", "chat") not in FORMATS:
        raise ConfigError(
            f"no format {spec['format']!r}{nearest(str(spec['format']), FORMATS)}; allowed are {', '.join(FORMATS)}"
        )
    return spec


def open(spec: Spec) -> Backend:  # as `backends.open`
    """A backend, its model loaded (openai: the server is asked with the first request).

    `format` names one of `formats.FORMATS`: what turns messages into text in the place of the model's own chat template.
    `unsupported`: "error" or "warn", see `Backend`. Other keys go to the backend. Raises `ConfigError` for unknown ones.
    """
    make, options, format, unsupported = _checked(spec)
    backend = make(**options)
    backend.unsupported, backend.template = unsupported, FORMATS[format].template
    return backend


def check(spec: Spec, params: SamplingParams) -> None:
    """Raise `ConfigError` for what can be known to be wrong before a model is loaded: options, and params not honoured."""
    make, options, _, unsupported = _checked(spec)
    if (kind := as_spec(spec)["backend"]) == "native":  # honours all
        return
    backend: Any = make(**options) if kind == "openai" else object.__new__(cast(type, make))  # neither loads anything
    backend.name = options.get("name") or options["model"]
    if unsupported == "error":
        backend.checked(params)


def _checked(spec: Spec) -> tuple[Callable[..., Backend], dict[str, Any], str, str]:
    """What makes a backend, its options, format, and what happens with a parameter that it doesn't honour."""
    options = as_spec(spec)
    kind, format, unsupported = (
        options.pop(k, d) for k, d in (("backend", "native"), ("format", "chat"), ("unsupported", "error"))
    )
    make = _maker(kind)
    known = inspect.signature(make).parameters
    for name in options:
        if name not in known:
            raise ConfigError(f"backend {kind} has no option {name!r}{nearest(name, known)}; allowed are {', '.join(known)}")
    for name, value in options.items():
        _check(name, value, known[name].annotation)
    return make, options, format, unsupported


def _check(name: str, value: Any, hint: Any) -> None:
    """Raise `ConfigError` for a value that isn't of the plain type that is declared, and for a whole number below 1."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if not set(kinds) <= PLAIN.keys():
        return
    fits = type(value) in kinds or (float in kinds and type(value) is int)
    if not fits or (int in kinds and type(value) is int and value < 1):
        raise ConfigError(f"{name} is {value!r}, allowed is {' or '.join(PLAIN[kind] for kind in kinds)}")


def _maker(kind: str) -> Callable[..., Backend]:
    if kind == "native":
        return _native
    if kind == "transformers":
        from xalign.backends.transformers import TransformersBackend

        return TransformersBackend
    if kind == "vllm":
        from xalign.backends.vllm import VLLMBackend

        return VLLMBackend
    from xalign.backends.openai import OpenAIBackend

    return OpenAIBackend


def _native(
    model: str,
    *,
    batch_size: int = 64,
    cache_tokens: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    name: str | None = None,
) -> Backend:
    from xalign.adapters import load_adapter
    from xalign.backends.native import NativeBackend
    from xalign.nn.lora import merge
    from xalign.stages import choose_device, load_model

    net, tokenizer = load_model(model, dtype, choose_device(device), revision=revision)
    if adapter is not None:
        load_adapter(net, adapter)
        merge(net)
    return NativeBackend(net, tokenizer, batch_size, cache_tokens, name=name or model, context=net.max_seq_len)
