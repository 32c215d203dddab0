"""`generate.py`: prompts from flags, standard input or a file to completions on standard output."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xalign import backends
from xalign.adapters import load_adapter
from xalign.backends.base import Backend, SamplingParams
from xalign.backends.native import NativeBackend
from xalign.config import GenerateConfig, PromptOptions, QuantOptions, SamplingOptions
from xalign.data.records import Message, Text
from xalign.data.sources import read_prompts
from xalign.errors import ConfigError, DataError
from xalign.evaluate_config import ComparedDataOptions
from xalign.nn.lora import merge
from xalign.prepare import say
from xalign.score_config import ScoreOptions
from xalign.stages import choose_device, load_model, prompt_text


def run_generate(config: GenerateConfig) -> None:
    """Continue each prompt; text as it comes for one prompt, else completions in the prompts' order."""
    options, draw = config.prompt, config.sampling
    params = SamplingParams(**{name: getattr(draw, name) for name in SamplingParams.__dataclass_fields__})
    prompts = [as_prompt(p, options, f"prompt {i}") for i, p in enumerate(gather(options), 1)]
    backend = _native(config, prompts) if options.backend == "native" else _foreign(config)
    if len(prompts) == 1 and params.n == params.beams == 1 and not options.json:
        for piece in backend.stream(prompts[0], params):
            print(piece, end="", flush=True)
        print()
        return
    for prompt, completions in zip(prompts, backend.generate(prompts, params, "generate"), strict=True):
        for completion in completions:
            if completion.error is not None:
                raise DataError(f"{options.model}: {completion.error}")
            if options.json:
                shown = prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]
                print(json.dumps({"prompt": shown, "completion": completion.text, "finish_reason": completion.finish_reason,
                                  "tokens": len(completion.token_ids), "logps": completion.logps}, ensure_ascii=False))
            else:
                print((f"{prompt_text(prompt)}\n    " if len(prompts) > 1 else "") + completion.text)


def _native(config: GenerateConfig, prompts: Sequence[Text]) -> Backend:
    options, draw = config.prompt, config.sampling
    if options.base_url is not None:
        raise ConfigError("--base-url goes with --backend openai")
    model, tokenizer = load_model(options.model, draw.dtype, choose_device(draw.device), allow_pickle=options.allow_pickle,
                                  revision=options.revision, quant=draw)
    if options.adapter is not None:
        load_adapter(model, options.adapter)
        model.eval() if draw.load_in_8bit or draw.load_in_4bit else merge(model)  # merged it is as fast as without
    if not tokenizer.chat_template and not all(isinstance(prompt, str) for prompt in prompts):
        say(f"{options.model} has no chat template: xalign's own is used")
    return NativeBackend(model, tokenizer, draw.batch_size, draw.cache_tokens)


def _foreign(config: GenerateConfig) -> Backend:
    """Another engine; a flag that only ours knows is an error."""
    options, draw = config.prompt, config.sampling
    taken = {"openai": ("base_url",), "transformers": ("device", "dtype", "batch_size"), "vllm": ("dtype",)}[options.backend]
    values = {**vars(options), **vars(draw)}
    defaults = {**vars(PromptOptions()), **vars(SamplingOptions())}
    for name in ("base_url", "adapter", "revision", "allow_pickle", "batch_size", "cache_tokens", "device", "dtype",
                 *QuantOptions.__dataclass_fields__):
        if name not in taken and values[name] != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')} doesn't go with --backend {options.backend}")
    spec: dict[str, Any] = {"backend": options.backend, "model": options.model, "unsupported": options.unsupported}
    spec |= {name: values[name] for name in taken if values[name] is not None}
    return backends.open(spec)


def gather(options: PromptOptions) -> Iterator[Text]:
    """The prompts: --prompt, else --prompts FILE, else standard input as one."""
    if options.prompt is not None and options.prompts is not None:
        raise ConfigError("--prompt and --prompts are both given, allowed is one of them")
    if options.prompt is not None:
        yield options.prompt
    elif options.prompts is not None:
        yield from read_prompts(Path(options.prompts))
    else:
        if sys.stdin.isatty():
            print("reading a prompt from standard input, end with Ctrl-D (or use --prompt)", file=sys.stderr)
        try:
            yield sys.stdin.buffer.read().decode("utf-8").replace("\r\n", "\n").rstrip("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 ({error.reason} at byte {error.start})") from None


def as_prompt(prompt: Text, options: PromptOptions | ScoreOptions | ComparedDataOptions, where: str) -> Text:
    """With --chat a text becomes a user's turn, behind the --system turn where there is one; `where` begins an error."""
    if not options.chat:
        if options.system is not None:
            raise ConfigError("--system goes with --chat")
        return prompt
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if options.system is None:
        return turns
    if turns and turns[0].role == "system":
        raise ConfigError(f"{where} begins with a system turn and --system is given, allowed is one of them")
    return (Message("system", options.system), *turns)
