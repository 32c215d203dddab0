"""`generate.py`: prompts from flags, standard input or a file to completions on standard output."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from xalign.backends.base import SamplingParams
from xalign.backends.native import NativeBackend
from xalign.data.records import Message, Text
from xalign.data.sources import read_prompts
from xalign.errors import ConfigError, DataError
from xalign.evaluate_config import ComparedDataOptions
from xalign.generate_config import GenerateConfig, PromptOptions
from xalign.loading import load
from xalign.prepare import say
from xalign.repl import run_chat, talks
from xalign.score_config import ScoreOptions
from xalign.stages import prompt_text


def run_generate(config: GenerateConfig) -> None:
    """Continue each prompt; text as it comes for one prompt, else completions in the prompts' order."""
    if talks(config):
        return run_chat(config)
    options, draw = config.prompt, config.sampling
    params = SamplingParams(**{name: getattr(draw, name) for name in SamplingParams.__dataclass_fields__})
    prompts = [as_prompt(p, options, f"prompt {i}") for i, p in enumerate(gather(options), 1)]
    backend = load(options.model, options, draw, options.adapter)
    if (isinstance(backend, NativeBackend) and not backend.tokenizer.chat_template
            and not all(isinstance(prompt, str) for prompt in prompts)):
        say(f"{options.model} has no chat template: xalign's own is used")
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
