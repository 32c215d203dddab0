"""The records that every dataset becomes: `Message`, `PreferencePair`, `Example`, `Labelled`; wrong ones can't be made.

A prompt or a completion is a `Text`: plain text, or a tuple of messages. One record never mixes the two.
"Empty" means: nothing but blanks. `where` is the `path:line` that a record came from, and begins its errors.
"""

import math
from dataclasses import dataclass

from xalign.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


class EmptyReply(DataError):
    """A completion is blank, and nothing else is wrong with it."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. Raises `DataError` for an unknown role or a content that isn't text."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"unknown role {self.role!r}; allowed: {', '.join(ROLES)}")
        if not (isinstance(self.content, str) and self.content.isascii()):  # the most are, and need no more
            _check_text(self.content, f"the content of the {self.role}'s message")


Text = str | tuple[Message, ...]


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two completions of it, the better one first.

    All three are strings, or all three are tuples of messages; then `chosen` and `rejected` hold one assistant
    message each. The prompt may be empty, a completion not. `margin` says by how much chosen is better, or None.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    where: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self.where, prompt=self.prompt, chosen=self.chosen, rejected=self.rejected)
        _check_reply(self.where, "chosen", self.chosen)
        _check_reply(self.where, "rejected", self.rejected)
        if self.margin is not None and not math.isfinite(self.margin):
            raise _error(self.where, f"'margin' must be a finite number, not {self.margin}")

    @property
    def identical(self) -> bool:
        """Whether chosen and rejected are the same text, which teaches nothing."""
        return self.chosen == self.rejected


@dataclass(frozen=True)
class Example:
    """Something to imitate: `completion` is learnt, `prompt` is only read.

    A plain document has the prompt "" and is learnt whole. In a conversation every assistant turn of `completion` is
    learnt and none of `prompt`; a `messages` record has the prompt () and all its messages as the completion.
    """

    prompt: Text
    completion: Text
    where: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self.where, prompt=self.prompt, completion=self.completion)
        if is_empty(self.completion):
            if isinstance(self.completion, tuple) and not any(m.role == "assistant" for m in self.completion):
                raise _error(self.where, "the completion has no assistant turn")
            what = "has no assistant turn with any text" if isinstance(self.completion, tuple) else "is empty"
            raise _error(self.where, f"the completion {what}", EmptyReply)


@dataclass(frozen=True)
class Labelled:
    """A prompt, one completion of it, and whether that is a good one (KTO's data; TRL's column `label`).

    As in a `PreferencePair` both are strings or both tuples of messages, and the completion is not empty.
    """

    prompt: Text
    completion: Text
    label: bool
    where: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self.where, prompt=self.prompt, completion=self.completion)
        _check_reply(self.where, "completion", self.completion)


def is_empty(text: Text) -> bool:
    """Whether a completion is blank; of messages, whether every assistant turn is."""
    if isinstance(text, str):
        return not text.strip()
    return not any(message.content.strip() for message in text if message.role == "assistant")


def _check_kinds(where: str, **texts: Text) -> None:
    """Raise unless all are strings, or all are tuples of messages."""
    for name, text in texts.items():
        if isinstance(text, str):
            if not text.isascii():
                _check_text(text, repr(name), where)
        elif not isinstance(text, tuple) or not all(isinstance(message, Message) for message in text):
            raise _error(where, f"{name!r} must be text or a tuple of messages, not {type(text).__name__}")
    if len({type(text) for text in texts.values()}) > 1:
        kinds = ", ".join(f"{name!r} is {'text' if isinstance(t, str) else 'messages'}" for name, t in texts.items())
        raise _error(where, f"text and messages are mixed: {kinds}")


def _check_reply(where: str, name: str, text: Text) -> None:
    """Raise unless a completion is text, or one assistant message, and not blank."""
    if isinstance(text, tuple) and [message.role for message in text] != ["assistant"]:
        roles = ", ".join(message.role for message in text) or "none"
        raise _error(where, f"{name!r} must be one assistant message, not: {roles}")
    if is_empty(text):
        raise _error(where, f"{name!r} is an empty completion", EmptyReply)


def _check_text(text: str, name: str, where: str = "") -> None:
    if not isinstance(text, str):
        raise _error(where, f"{name} must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _error(where, f"{name} holds half a character (a lone surrogate) at position {error.start}") from None


def _error(where: str, what: str, kind: type[DataError] = DataError) -> DataError:
    return kind(f"{where}: {what}" if where else what)
