"""Our own tokenizers, byte-level and SentencePiece, exact for every string; and the loading of any kind.

What they save opens everywhere: beside `tokenizer.model` and tokenizer_config.json they write a `tokenizer.json` that
gives the same ids in transformers. It spells its pieces with real blanks, not with SentencePiece's `▁`, so that it needs
no normaliser, and a `▁` in a text comes out in bytes there as it does here.
"""

import io
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xalign.disk import write_atomically
from xalign.errors import DataError
from xalign.tokenizer_base import Tokenizer, either, json_bytes, one_line, read_json
from xalign.tokenizer_json import BYTE_CHARACTERS, JSONTokenizer, read_template, tokenizer_json

__all__ = ["ByteTokenizer", "JSONTokenizer", "SentencePieceTokenizer", "Tokenizer", "either", "load_tokenizer",
           "train_sentencepiece"]  # fmt: skip
SPACE = "\u2581"  # SentencePiece's stand-in for a blank; a real one in the text must be spelt in bytes
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # the kinds of pieces in a SentencePiece model
KIND = "xalign_tokenizer"  # the key in tokenizer_config.json by which we know our own


class OwnTokenizer(Tokenizer):
    """A tokenizer of ours: its vocabulary is known piece by piece, so it can be written as a tokenizer.json."""

    _kind: str

    def _ids(self, text: str, markers: bool) -> list[int]:
        if not (markers and self.markers):
            return self._encode_plain(text)
        ids: list[int] = []
        for part in re.split(f"({either(self.markers)})", text):
            ids += [self.markers[part]] if part in self.markers else self._encode_plain(part)
        return ids

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Ids of valid text, none of them a marker or a control token."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, template included, into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            KIND: self._kind,
            "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both know
            "bos_token": self.bos_token if self.bos_id is not None else None,
            "eos_token": self.eos_token if self.eos_id is not None else None,
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
            "additional_special_tokens": list(self.markers),
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
            "add_prefix_space": False,  # llama.cpp goes by it
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        write_atomically(folder / "tokenizer_config.json", json_bytes({k: v for k, v in config.items() if v is not None}))
        write_atomically(folder / "tokenizer.json", json_bytes(self.json()))
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would come before ours

    @abstractmethod
    def json(self) -> dict[str, Any]:
        """The contents of tokenizer.json."""


class ByteTokenizer(OwnTokenizer):
    """One id per UTF-8 byte (0–255), then pad 256, bos 257, eos 258 and one symbol per marker."""

    _kind = "bytes"

    def __init__(self, special_tokens: Sequence[str] = ()):
        _check_markers(special_tokens)
        self.pad_id, self.bos_id, self.eos_id = 256, 257, 258
        self.markers = {text: 259 + i for i, text in enumerate(special_tokens)}
        self._pieces = [bytes([i]) for i in range(256)] + [b""] * 3 + [text.encode() for text in special_tokens]

    def _encode_plain(self, text: str) -> list[int]:
        return list(text.encode())

    def json(self) -> dict[str, Any]:
        special = self.special_tokens
        vocab = {BYTE_CHARACTERS[i]: i for i in range(256)} | special
        return tokenizer_json(vocab, [], special, self.bos_token, byte_level=True)


class SentencePieceTokenizer(OwnTokenizer):
    """A SentencePiece model, from a file or from its serialised bytes, that can give back any text as it was.

    So it must be BPE with byte fallback, and change nothing: Llama 2's model, which puts a blank before every text, is
    read from its tokenizer.json instead. `markers` says which of the user-defined pieces are special (default: those
    like `<|user|>`).
    """

    _kind = "sentencepiece"

    def __init__(self, model: str | os.PathLike[str] | bytes, markers: Sequence[str] | None = None):
        from sentencepiece import SentencePieceProcessor

        where = "SentencePiece model" if isinstance(model, bytes) else os.fspath(model)
        try:
            self._model = model if isinstance(model, bytes) else Path(model).read_bytes()
            if not self._model:
                raise RuntimeError("it is empty")
            self._processor = sp = SentencePieceProcessor(model_proto=self._model)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{where}: can't be read as a SentencePiece model ({one_line(error)})") from error
        self._check(where)
        size = sp.get_piece_size()
        names = [sp.id_to_piece(i) for i in range(size)]
        self.bos_id, self.eos_id, unk = (i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id(), sp.unk_id()))
        # Llama's own model has no pad; unk never occurs with byte fallback, and pads are masked anyway.
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else unk or 0
        ids_of = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "unk_token": unk}
        for name, id in ids_of.items():
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
                ids += [self._bytes[byte] for byte in SPACE.encode()]
            for fragment in self._cut.split(part) if self._cut else [part]:
                ids += self._processor.encode(fragment)
        return ids

    def _check(self, where: str) -> None:
        """Refuse what could not give a text back, or not be written as a tokenizer.json."""
        parts = dict(_fields(self._model))
        trainer, normalizer = (dict(_fields(parts.get(n, b""))) for n in (2, 3))
        allowed = {
            "model_type=bpe": trainer.get(3, 1) == 2,
            "byte_fallback=True": trainer.get(35, 0) == 1,
            "normalization_rule_name=identity": not normalizer.get(2),
            "add_dummy_prefix=False": normalizer.get(3, 1) == 0,
            "remove_extra_whitespaces=False": normalizer.get(4, 1) == 0,
        }
        if lacking := [option for option, given in allowed.items() if not given]:
            raise DataError(
                f"{where}: was not trained with {', '.join(lacking)}; allowed: that, or a tokenizer.json beside it "
                "(transformers writes one: AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` into `folder`."""
        super().save(folder)
        write_atomically(Path(folder) / "tokenizer.model", self._model)

    def json(self) -> dict[str, Any]:
        sp = self._processor
        names = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
        kinds = [dict(_fields(piece)).get(3, NORMAL) for number, piece in _fields(self._model) if number == 1]
        vocab = {name.replace(SPACE, " "): id for id, name in enumerate(names)}
        scores = {name.replace(SPACE, " "): sp.get_score(id) for id, name in enumerate(names) if kinds[id] == NORMAL}
        added = {name: id for id, name in enumerate(names) if kinds[id] in (UNKNOWN, CONTROL, USER_DEFINED)}
        special = {n: i for n, i in added.items() if kinds[i] != USER_DEFINED or n in self.markers}
        bos = self.bos_token if self.bos_id is not None else None
        return tokenizer_json(vocab, _merges(scores), special, bos, plain=added, unk=self.unk_token)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer, (number, value) each; sentencepiece itself can't be asked for its settings."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        else:
            size = {1: 8, 5: 4}.get(wire) or varint()
            yield number, message[at : at + size]
            at += size


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges by which byte-pair encoding does what SentencePiece does: best score first, then leftmost.

    SentencePiece joins any two neighbours whose union is a piece; so each piece gives a merge for each cut of it.
    Two cuts of one piece compete only where both fit overlapping neighbours, x y z with xy = yz: the left one must win.
    """
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = [i for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
        # y is what a cut leaves at its right, where the piece also begins with y
        cuts.sort(key=lambda i: (not piece.startswith(piece[i:]), -i))
        merges += [(piece[:i], piece[i:]) for i in cuts]
    return merges


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
        raise DataError(f"the tokenizer can't be trained: {one_line(error)}") from error


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer saved in `folder`, or None where there is none; `DataError` if its files are broken.

    As in transformers a tokenizer.json comes before a tokenizer.model; what xalign saved comes back as the same class.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json")
    markers = config.get("additional_special_tokens")
    kind, has_json, has_model = (config.get(KIND), *((folder / f"tokenizer.{end}").exists() for end in ("json", "model")))
    own: OwnTokenizer | None = None
    if has_model and (kind == SentencePieceTokenizer._kind or not has_json):
        own = SentencePieceTokenizer(folder / "tokenizer.model", markers)
    elif kind == ByteTokenizer._kind or config.get("tokenizer_class") == "ByteTokenizer":
        own = ByteTokenizer(markers or ())
    # Others may have saved our folder again with tokens of theirs in it: then tokenizer.json is what counts.
    if own is not None and (not has_json or read_json(folder / "tokenizer.json") == own.json()):
        own.chat_template = read_template(folder, config)
        return own
    if has_json:
        return JSONTokenizer(folder)
    if named := config.get("tokenizer_class"):
        raise DataError(f"{folder}: its {named} has no tokenizer.json; transformers writes one: "
                        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")  # fmt: skip
    return None


def _check_markers(markers: Sequence[str]) -> None:
    for marker in markers:
        # One character could not be cut in two, and blanks are not themselves inside SentencePiece.
        if len(marker) < 2 or re.search(rf"[\s{SPACE}]", marker) or list(markers).count(marker) > 1:
            raise DataError(f"marker {marker!r} is not allowed: distinct strings of two or more characters, no blanks")


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, cut to a length that SentencePiece doesn't skip."""
    for line in text.encode("utf-8", "replace").decode("utf-8").splitlines(keepends=True):
        yield from (line[i : i + 2000] for i in range(0, len(line), 2000))


