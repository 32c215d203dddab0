"""Text to token ids and back: byte-level and SentencePiece tokenizers, exact for every string.

A tokenizer knows strings, not roles. Its *control* tokens (pad, bos, eos, unk) never come out of text:
`encode("</s>")` is four ordinary characters. Its *markers* (`<|user|>` and the like) are strings that are one
symbol each; `encode(..., markers=False)` spells them out instead, which is what text from a dataset or a
person gets, so that nobody can write another's turn. Left out: Hugging Face `tokenizer.json`.
"""

import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xalign.errors import DataError

SPACE = "\u2581"  # SentencePiece's stand-in for a blank; a real one in the text must be spelt in bytes


class Tokenizer(ABC):
    """What every tokenizer offers: `encode`, `decode`, `save`, the ids and strings of its control tokens.

    `bos_id` and `eos_id` may be None where a family has no such token (then `bos=True` adds nothing).
    `chat_template` is a jinja source or None, and may be set.
    """

    pad_id: int
    bos_id: int | None
    eos_id: int | None
    pad_token: str = "<pad>"
    bos_token: str = "<s>"
    eos_token: str = "</s>"
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
        if markers and self.markers:
            for part in re.split(f"({either(self.markers)})", text):
                ids += [self.markers[part]] if part in self.markers else self._encode_plain(part)
        else:
            ids += self._encode_plain(text)
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Ids of valid text, none of them a marker or a control token."""

    def decode_bytes(self, ids: Any) -> bytes:
        """The exact bytes of a sequence or 1-D tensor of ids, for streaming: a character may span several ids.

        Control tokens and ids outside the vocabulary (a model's may be padded) give nothing, markers their text.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return b"".join(self._pieces[i] for i in ids if 0 <= i < len(self._pieces))

    def decode(self, ids: Any) -> str:
        """Text of `ids`, see `decode_bytes`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into `folder` (made if missing), each atomically."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = self._config() | {
            "bos_token": self.bos_token if self.bos_id is not None else None,
            "eos_token": self.eos_token if self.eos_id is not None else None,
            "pad_token": self.pad_token,
            "additional_special_tokens": list(self.markers),
            "chat_template": self.chat_template,
        }
        text = json.dumps({k: v for k, v in config.items() if v is not None}, ensure_ascii=False, indent=2)
        _write(Path(folder) / "tokenizer_config.json", text.encode() + b"\n")

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """The entries of tokenizer_config.json that only this kind of tokenizer has."""


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte (0–255), then pad 256, bos 257, eos 258 and one symbol per marker."""

    def __init__(self, special_tokens: Sequence[str] = ()):
        _check_markers(special_tokens)
        self.pad_id, self.bos_id, self.eos_id = 256, 257, 258
        self.markers = {text: 259 + i for i, text in enumerate(special_tokens)}
        self._pieces = [bytes([i]) for i in range(256)] + [b""] * 3 + [text.encode() for text in special_tokens]

    def _encode_plain(self, text: str) -> list[int]:
        return list(text.encode())

    def _config(self) -> dict[str, Any]:
        return {"tokenizer_class": "ByteTokenizer"}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, from a file or from its serialised bytes; decoding is exact for models trained here.

    `markers` says which of its user-defined pieces are special (default: those like `<|user|>`).
    Models that put a blank before every text are refused: they can't give back what they were given.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, markers: Sequence[str] | None = None):
        from sentencepiece import SentencePieceProcessor

        where = "SentencePiece model" if isinstance(model, bytes) else os.fspath(model)
        try:
            self._model = model if isinstance(model, bytes) else Path(model).read_bytes()
            if not self._model:
                raise RuntimeError("it is empty")
            self._processor = sp = SentencePieceProcessor(model_proto=self._model)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{where}: can't be read as a SentencePiece model ({_one_line(error)})") from error
        if sp.encode("a", out_type=str)[0].startswith(SPACE):
            raise DataError(f"{where}: puts a blank before every text; allowed: add_dummy_prefix=False")
        size = sp.get_piece_size()
        names = [sp.id_to_piece(i) for i in range(size)]
        self.bos_id, self.eos_id, unk = (i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id(), sp.unk_id()))
        # Llama's own model has no pad; unk never occurs with byte fallback, and pads are masked anyway.
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else unk or 0
        for name, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            if id is not None:
                setattr(self, name, names[id])
        self._pieces = []
        self._bytes: dict[int, int] = {}
        for id, name in enumerate(names):
            if sp.is_byte(id):
                self._bytes[int(name[1:-1], 16)] = id
                self._pieces.append(bytes([int(name[1:-1], 16)]))
            elif sp.is_control(id) or sp.is_unknown(id) or sp.is_unused(id):
                self._pieces.append(b"")
            else:
                self._pieces.append(name.replace(SPACE, " ").encode())
        ids = {name: id for id, name in enumerate(names)}
        # sentencepiece can't be asked which pieces are user-defined, so without a list go by their looks.
        markers = [name for name in names if re.fullmatch(r"<\|\S+\|>", name)] if markers is None else markers
        self.markers = {name: ids[name] for name in markers if name in ids}
        # A marker is spelt out by cutting it after its first character, also where two of them overlap.
        self._cut = re.compile(f"(?<=(?=(?:{either(self.markers)})).)", re.DOTALL) if self.markers else None

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids += [self._bytes.get(byte, self._processor.unk_id()) for byte in SPACE.encode()]
            for fragment in self._cut.split(part) if self._cut else [part]:
                ids += self._processor.encode(fragment)
        return ids

    def _config(self) -> dict[str, Any]:
        return {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model` and `tokenizer_config.json` into `folder`."""
        super().save(folder)
        _write(Path(folder) / "tokenizer.model", self._model)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, user_defined_symbols: Sequence[str] = (), character_coverage: float = 1.0
) -> SentencePieceTokenizer:
    """Train BPE pieces on `texts`; the same texts give the same model.

    Ids: pad 0, unk 1, bos 2, eos 3, the markers `user_defined_symbols`, 256 bytes, then pieces. Nothing is normalised.
    Where the texts don't hold `vocab_size` pieces the vocabulary is smaller. Raises `DataError` for no text and
    for a `vocab_size` below the characters' number; lower `character_coverage` to spell rare ones in bytes.
    """
    from sentencepiece import SentencePieceTrainer

    _check_markers(user_defined_symbols)
    lines = [line for text in texts for line in _lines(text)]
    if not any(line.strip() for line in lines):
        raise DataError("no text to train a tokenizer on")

    def train(size: int) -> bytes:
        writer = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=writer, vocab_size=size, model_type="bpe",
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, byte_fallback=True, character_coverage=character_coverage,
            user_defined_symbols=list(user_defined_symbols), normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            max_sentence_length=16384, num_threads=2, minloglevel=2,
        )  # fmt: skip
        return writer.getvalue()

    try:
        try:
            return SentencePieceTokenizer(train(vocab_size), user_defined_symbols)
        except RuntimeError as error:
            if not (possible := re.search(r"too high .*<= (\d+)", str(error))):
                raise
            return SentencePieceTokenizer(train(int(possible[1])), user_defined_symbols)
    except RuntimeError as error:
        if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise DataError(f"vocab_size {vocab_size} is too small; for these texts: {needed[1]} or more") from None
        raise DataError(f"the tokenizer can't be trained: {_one_line(error)}") from error


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer saved in `folder`, or None where there is none; `DataError` if its files are broken."""
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if path.exists():
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(config, dict):
            raise DataError(f"{path}: must hold one JSON object, not a {type(config).__name__}")
    markers = config.get("additional_special_tokens")
    tokenizer: Tokenizer
    if (folder / "tokenizer.model").exists():
        tokenizer = SentencePieceTokenizer(folder / "tokenizer.model", markers)
    elif config.get("tokenizer_class") == "ByteTokenizer":
        tokenizer = ByteTokenizer(markers or ())
    else:
        return None
    template = config.get("chat_template")
    if isinstance(template, list):  # transformers' form for several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is None and (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template
    return tokenizer


def either(strings: Iterable[str]) -> str:
    """A regular expression that matches any of `strings`, the longest first."""
    return "|".join(re.escape(text) for text in sorted(strings, key=len, reverse=True))


def _check_markers(markers: Sequence[str]) -> None:
    for marker in markers:
        # One character could not be cut in two, and blanks are not themselves inside SentencePiece.
        if len(marker) < 2 or re.search(rf"[\s{SPACE}]", marker) or list(markers).count(marker) > 1:
            raise DataError(f"marker {marker!r} is not allowed: distinct strings of two or more characters, no blanks")


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, cut to a length that SentencePiece doesn't skip."""
    for line in text.encode("utf-8", "replace").decode("utf-8").splitlines(keepends=True):
        yield from (line[i : i + 2000] for i in range(0, len(line), 2000))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or whole, also if the process dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
