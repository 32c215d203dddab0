"""What every tokenizer offers, and the files that all of them write.

A tokenizer knows strings, not roles. Its *control* tokens (pad, bos, eos, unk) never come out of text:
`encode("</s>")` is four ordinary characters. Its *markers* (`<|user|>` and the like) are strings that are one
symbol each; `encode(..., markers=False)` spells them out instead, which is what text from a dataset or a
person gets, so that nobody can write another's turn.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xalign.errors import DataError


class Tokenizer(ABC):
    """What every tokenizer offers: `encode`, `decode`, `save`, the ids and strings of its control tokens.

    `bos_id` and `eos_id` may be None where a family has no such token (then `bos=True` adds nothing).
    `adds_bos`: whether a text gets a BOS in front by itself, as Llama's does and GPT-2's doesn't. `stop_ids`: further
    ids that end a text. `chat_template` is a jinja source or None, and may be set.
    """

    pad_id: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool = True
    stop_ids: tuple[int, ...] = ()
    pad_token: str = "<pad>"
    bos_token: str = "<s>"
    eos_token: str = "</s>"
    unk_token: str | None = None
    chat_template: str | None = None
    markers: dict[str, int]  # string -> id
    _pieces: list[bytes]  # the bytes that each id stands for; empty for control tokens

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is in `range(vocab_size)`."""
        return len(self._pieces)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every string that a chat template may write to mean one symbol: markers and control tokens."""
        control = {self.bos_token: self.bos_id, self.eos_token: self.eos_id, self.pad_token: self.pad_id}
        return {text: id for text, id in control.items() if id is not None} | self.markers

    def encode(self, text: str, bos: bool = False, eos: bool = False, *, markers: bool = True) -> list[int]:
        """Token ids of `text`; lone surrogates become `?`. With `markers=False` no marker comes out of the text."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        ids += self._ids(text, markers)
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def encode_part(self, text: str, before: str) -> list[int]:
        """Ids of a part of a longer text, markers spelt out; the whole is the ids of its parts, one after the other.

        `before` says what the part follows: "" nothing, "token" a special token, "text" other text. It matters only
        to tokenizers that put a blank in front of a text.
        """
        return self.encode(text, markers=False)

    @abstractmethod
    def _ids(self, text: str, markers: bool) -> list[int]:
        """Ids of valid text, of which with `markers=False` none is a special token."""

    def decode_bytes(self, ids: Any) -> bytes:
        """The exact bytes of a sequence or 1-D tensor of ids, for streaming: a character may span several ids.

        Control tokens and ids outside the vocabulary (a model's may be padded) give nothing, markers their text.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return b"".join(self._pieces[i] for i in ids if 0 <= i < len(self._pieces))

    def decode(self, ids: Any) -> str:
        """Text of `ids`, see `decode_bytes`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def padded_apart(self) -> "Tokenizer | None":
        """The same, with a pad that ends no text: transformers' reward models read the last token that isn't the pad.

        None where it has no token for that.
        """
        return None if self.pad_id in (self.eos_id, *self.stop_ids) else self

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into `folder` (made if missing), each atomically."""


def either(strings: Iterable[str]) -> str:
    """A regular expression that matches any of `strings`, the longest first; of none, nothing."""
    return "|".join(re.escape(text) for text in sorted(strings, key=len, reverse=True)) or "(?!)"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file; `DataError` for anything else in it."""
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not valid JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold one JSON object, not a {type(value).__name__}")
    return value
