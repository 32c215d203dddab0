"""A raw record to a prompt and the replies that are to be scored.

Shapes: `prompt` (text or messages, or AlpacaEval's `instruction`) with `response` (also `completion`, `output`) or with a list
of K `responses`; `messages`, of which an assistant's last message is the reply; one that ends on another's turn is scored as it
stands. Blank replies are scored: a model may well write nothing. Where two keys could hold the reply, or the prompt, it is an
error; only beside `messages` a prompt is not looked at, as it repeats their beginning in real data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xalign.data.records import Message, Text
from xalign.data.shapes import TEXT_LIMIT, ReadReport, to_messages, to_prompt
from xalign.errors import DataError

REPLY_NAMES = ("response", "completion", "output")
HOLDS_REPLY = (*REPLY_NAMES, "responses", "messages")
PROMPT_NAMES = ("prompt", "instruction", "input")
REPLY_SHAPES = "prompt+response, prompt+responses (a list), messages"


@dataclass(frozen=True)
class Replies:
    """A prompt and its replies; a reply None says that the prompt is scored as it stands. `several`: they came as a list."""

    prompt: Text
    replies: tuple[str | None, ...]
    several: bool = False
    where: str = ""


def to_replies(record: Mapping[str, Any], where: str) -> Replies:
    """The replies of a record. Raises `DataError` for one of another shape, and for a text that is too long to tokenise."""
    found = _replies(record, where)
    size = len(found.prompt) if isinstance(found.prompt, str) else sum(len(m.content) for m in found.prompt)
    if (size := size + max(len(reply or "") for reply in found.replies)) > TEXT_LIMIT:
        raise DataError(f"{where}: a prompt and reply of {size:,} characters; allowed: up to {TEXT_LIMIT:,}")
    return found


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record under our names, `columns` being ours -> the file's; what is named so is looked for under no other name."""
    hidden = {*columns.values()} | ({*HOLDS_REPLY} if not columns.keys().isdisjoint(HOLDS_REPLY) else set())
    hidden |= {*PROMPT_NAMES} if "prompt" in columns else set()
    return {k: v for k, v in record.items() if k not in hidden} | {ours: record[theirs] for ours, theirs in columns.items()}


def keys_told(record: Mapping[str, Any]) -> str:
    """The keys of a record in words, and which of them are null."""
    told = ", ".join(f"{name!r}{' (null)' if value is None else ''}" for name, value in record.items())
    return f"the keys {told}"[:200] if record else "no keys"


def _replies(given: Mapping[str, Any], where: str) -> Replies:
    record = {name: value for name, value in given.items() if value is not None}
    for names in (HOLDS_REPLY, () if "messages" in record else ("prompt", "instruction")):
        if len(several := [name for name in names if name in record]) > 1:
            raise DataError(f"{where}: both {several[0]!r} and {several[1]!r}, allowed is one of them (--columns tells which)")
    if "responses" in record:
        replies = record["responses"]
        if not isinstance(replies, list) or not replies:
            raise DataError(f"{where}: 'responses' must be a list of at least one text, not {replies!r:.60}")
        return Replies(_prompt(record, where), tuple(reply_text(r, where, "responses") for r in replies), True, where)
    name = next((name for name in REPLY_NAMES if name in record), None)
    if name is not None:
        return Replies(_prompt(record, where), (reply_text(record[name], where, name),), False, where)
    if "messages" in record:
        messages = as_text(record["messages"] or "", where, "messages")
        if isinstance(messages, str):
            raise DataError(f"{where}: 'messages' must be a list of at least one message")
        if messages[-1].role == "assistant":
            if not messages[:-1]:
                raise DataError(f"{where}: 'messages' holds a reply alone, allowed is one behind at least one message")
            return Replies(messages[:-1], (messages[-1].content,), False, where)
        return Replies(messages, (None,), False, where)
    raise DataError(f"{where}: a record with {keys_told(given)}; allowed: {REPLY_SHAPES}")


def _prompt(record: Mapping[str, Any], where: str) -> Text:
    if record.get("prompt") == "":  # a reply to nothing is a text
        return ""
    given = {name: record[name] for name in PROMPT_NAMES if name in record}
    if "prompt" not in given and "instruction" not in given:
        raise DataError(f"{where}: a reply without a prompt, with {keys_told(record)}; allowed: {REPLY_SHAPES}")
    if "prompt" in given:
        return as_text(given["prompt"], where, "prompt")
    prompt = to_prompt(given, where, ReadReport())
    assert prompt is not None
    return prompt


def reply_text(value: Any, where: str = "", name: str = "response") -> str:
    """A reply as text: a string, or one assistant message (in a list). Raises `DataError`."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant":
        value = value[0].get("content")
    if not isinstance(value, str):
        raise DataError(_at(where, f"{name!r} must be text, not {value!r:.60}"))
    return _whole(value, where, name)


def as_text(value: Any, where: str = "", name: str = "prompt") -> Text:
    """A prompt as text or a tuple of messages, from a string, `Message`s or their objects. Raises `DataError`."""
    if isinstance(value, str):
        return _whole(value, where, name)
    if isinstance(value, list | tuple) and not value:
        raise DataError(_at(where, f"{name!r} must be text or a list of at least one message, not an empty list"))
    if isinstance(value, tuple) and all(isinstance(message, Message) for message in value):
        return value
    if not isinstance(value, list | tuple):
        raise DataError(_at(where, f"{name!r} must be text or a list of messages, not {value!r:.60}"))
    objects = [{"role": m.role, "content": m.content} if isinstance(m, Message) else m for m in value]
    try:
        return to_messages(objects, name, where or "given")
    except DataError as error:
        raise DataError(str(error).removeprefix("given: ")) from None


def _whole(text: str, where: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(_at(where, f"{name!r} holds half a character (a lone surrogate) at {error.start}")) from None
    return text


def _at(where: str, what: str) -> str:
    return f"{where}: {what}" if where else what
