"""What backends of foreign engines share: a template to text, prompts to ids, and a raw reply to a completion's text."""

from collections.abc import Iterable, Sequence
from typing import Any

from xalign.backends.base import SamplingParams, fit
from xalign.data.chat_template import write
from xalign.data.records import Text
from xalign.errors import DataError
from xalign.stopping import UNFINISHED, StopStrings


def cut(text: str, stops: Sequence[str], ended: bool) -> tuple[str, bool]:
    """The text before the first stop string, and whether it has ended: by that, or as the engine says.

    A text that was cut off at its length loses a character of which only some bytes are there.
    """
    cutter = StopStrings(stops)
    text = cutter.push(text) + cutter.flush()
    ended = ended or cutter.stopped is not None
    return (text if ended else text.rstrip(UNFINISHED)), ended


def as_dicts(messages: Iterable[Any]) -> list[dict[str, str]]:
    """Messages as other libraries want them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def written(prompt: Text, template: str) -> str:
    """A prompt as the text that a model continues."""
    return prompt if isinstance(prompt, str) else write(template, prompt)


def prompt_ids(tokenizer: Any, prompt: Text, template: str | None) -> list[int]:
    """The ids of a prompt by a tokenizer of transformers: one BOS, where the tokenizer adds one or the template writes one."""
    if isinstance(prompt, str):
        text, special = prompt, True
    else:
        try:
            text = tokenizer.apply_chat_template(as_dicts(prompt), chat_template=template, tokenize=False,
                                                 add_generation_prompt=True)
        except ValueError as error:  # there is none
            raise DataError(f"the chat template can't be used: {' '.join(str(error).split())[:200]}") from None
        except Exception as error:  # a template is a program: it may fail in any way
            raise DataError(f"the chat template failed: {' '.join(str(error).split())[:200]}") from error
        special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise DataError("the prompt is empty, and the tokenizer has no token to begin a text with")
        ids = [start]
    return ids


def fitted_ids(tokenizer: Any, prompt: Text, template: str | None, params: SamplingParams, context: int | None) -> list[int]:
    """`prompt_ids`, of which the oldest go where the answer would have no room; see `fit`."""
    ids = prompt_ids(tokenizer, prompt, template)
    return ids[len(ids) - fit(len(ids), params, context) :]


def special_ids(tokenizer: Any, strings: Iterable[str]) -> list[int]:
    """Ids of those strings that are special tokens: a decoder hides them, so that they never show in a text."""
    return [tokenizer.convert_tokens_to_ids(s) for s in strings if s in tokenizer.all_special_tokens]
