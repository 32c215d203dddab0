"""What servers with OpenAI's interface take, as a table: where each parameter goes, and what a request's body becomes."""

import json
from dataclasses import dataclass
from typing import Any

from xalign.backends.base import SamplingParams
from xalign.backends.text import as_dicts, written
from xalign.data.records import Text
from xalign.errors import DataError


@dataclass(frozen=True)
class Dialect:
    """Where a server takes parameters: {ours: theirs} at the top level; whether n is one of them, and how many stop strings.

    With `in_config` all of the draw goes into one JSON field `generation_config`, as transformers' server wants it.
    """

    fields: dict[str, str]
    n: bool = True
    stops: int | None = None
    in_config: bool = False


def _same(*names: str, **renamed: str) -> dict[str, str]:
    return {name: name for name in names} | renamed


_OPENAI = _same("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
DIALECTS = {
    "openai": Dialect(_OPENAI, stops=4),
    "vllm": Dialect(_OPENAI | _same("top_k", "min_p", "repetition_penalty", min_new_tokens="min_tokens")),
    "llamacpp": Dialect(_OPENAI | _same("top_k", "min_p", repetition_penalty="repeat_penalty"), n=False),
    # its presence_penalty is ignored, and its frequency_penalty becomes a repetition penalty
    "transformers": Dialect(_same("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens", "seed"),
                            n=False, in_config=True),
}
ALWAYS = frozenset({"max_new_tokens", "n", "stop"})  # of every dialect: n by one request each, stop strings are cut here
NAMED = {"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stop", "n", *_OPENAI}
"""The fields that the official client takes by name; others go into its extra_body."""


def request(model: str, dialect: Dialect, prompt: Text, params: SamplingParams, seed: int | None, n: int, *, api: str,
            template: str | None, official: bool) -> tuple[str, dict[str, Any]]:
    """The endpoint, "chat" or "completions", and the body of a request. Raises `DataError` for messages without a way to text.

    A `template` writes messages as text. OpenAI's own server (`official`) has another name for the length of a chat's answer.
    """
    chat = api == "chat" or (api == "auto" and not isinstance(prompt, str) and template is None)
    body: dict[str, Any] = {"model": model}
    if chat:
        body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else as_dicts(prompt)
    else:
        if not isinstance(prompt, str) and template is None:
            raise DataError("messages go to completions only by a format, which writes them as text")
        body["prompt"] = written(prompt, template or "")
    body["max_completion_tokens" if chat and official else "max_tokens"] = params.max_new_tokens
    if params.stop:
        body["stop"] = list(params.stop[: dialect.stops])
    if dialect.in_config:
        greedy = params.temperature == 0
        body["generation_config"] = json.dumps({
            "do_sample": not greedy, "temperature": 1.0 if greedy else params.temperature, "top_k": params.top_k or 0,
            "top_p": 1.0 if params.top_p is None else params.top_p, "min_p": params.min_p or 0.0,
            "repetition_penalty": params.repetition_penalty, "min_new_tokens": params.min_new_tokens})
    else:
        default = SamplingParams()
        for name, theirs in dialect.fields.items():
            if name != "seed" and (value := getattr(params, name)) != getattr(default, name):
                body[theirs] = value
        # told in any case: a server's own defaults may be others
        body |= {"temperature": params.temperature, "top_p": 1.0 if params.top_p is None else params.top_p}
    if n > 1:
        body["n"] = n
    if seed is not None:
        body["seed"] = seed
    return ("chat" if chat else "completions"), body
