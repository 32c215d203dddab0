"""Hugging Face's `tokenizer.json`: writing ours without the `tokenizers` package, and reading any through it."""

import copy
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from xalign.disk import write_atomically
from xalign.errors import DataError
from xalign.tokenizer_base import Tokenizer, json_bytes, one_line, read_json

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
FILES = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
         CONFIG, TEMPLATE)
KINDS = ("bos", "eos", "pad", "unk")
MAX_GAP = 1_000_000  # ids without a token, beside nine for each token: more is a mistake, and would take memory
SPACE = "\u2581"  # the stand-in for a blank of SentencePiece and what descends from it


def _byte_characters() -> list[str]:
    """The character by which byte-level vocabularies write each byte: itself if it shows, else one from U+0100 on."""
    shown = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else "" for b in range(256)]
    others = iter(range(256, 512))
    return [character or chr(next(others)) for character in shown]


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def tokenizer_json(
    vocab: dict[str, int],
    merges: Iterable[tuple[str, str]],
    special: dict[str, int],
    bos: str | None,
    *,
    plain: dict[str, int] | None = None,
    unk: str | None = None,
    byte_level: bool = False,
) -> dict[str, Any]:
    """A BPE vocabulary as the contents of a tokenizer.json.

    `special` tokens and those of `plain` are cut out of a text before anything else; `bos` is put in front of each text.
    Characters that `vocab` lacks are spelt in `<0xNN>` pieces, unless all of it is `byte_level`.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = sorted((id, text) for text, id in (special | (plain or {})).items())
    a = {"Sequence": {"id": "A", "type_id": 0}}
    b = {"Sequence": {"id": "B", "type_id": 0}}
    first = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **flags, "special": text in special} for id, text in added],
        "normalizer": None,
        "pre_tokenizer": byte if byte_level else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*first, a],
            "pair": [*first, a, b],
            "special_tokens": {} if bos is None else {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
        },
        "decoder": byte if byte_level else {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": not byte_level,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of a folder: its own file, else the tokenizer_config's only or `default` one."""
    if (folder / TEMPLATE).exists():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{folder / TEMPLATE}: can't be read as UTF-8 text ({one_line(error)})") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each under a name
        try:
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        except (TypeError, LookupError):
            template = 0
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder / CONFIG}: chat_template must be a string or a list of {{name, template}}")
    return template


class JSONTokenizer(Tokenizer):
    """The tokenizer of a folder that holds a `tokenizer.json`, run by the `tokenizers` package: its ids are transformers'.

    Its markers are its special tokens, control tokens included: `encode` finds them in a text, as transformers does,
    and with `markers=False` spells them out. Added tokens that are not special (GPT-NeoX's runs of blanks) are ordinary text.
    Special tokens decode to nothing. Raises `DataError` for files that can't be read and for kinds of decoders
    whose pieces don't stand for bytes (WordPiece and the like).

    One divergence: where tokenizer_config.json names a class (`LlamaTokenizer`), or config.json a model that has one,
    transformers 5 replaces parts of tokenizer.json by the class's own; for Llama 2 it puts no blank behind special
    tokens. We and 4.57 go by the file, and what `save` writes is read so by both (but 5 has one class for all qwen2).
    """

    def __init__(self, folder: str | os.PathLike[str]):
        folder = Path(folder)
        self._where = folder / "tokenizer.json"
        raw = read_json(self._where)
        self._config = read_json(folder / CONFIG)
        self._new_pad = ""
        self._template = self.chat_template = read_template(folder, self._config)
        self._files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        self._settings = self._with_older_files(folder)
        tokenizer = self._build(self._files["tokenizer.json"])
        self._name_controls(folder, {id: token for token, id in tokenizer.get_vocab().items()})
        self._add_tokens(tokenizer)
        vocab = tokenizer.get_vocab()
        added = tokenizer.get_added_tokens_decoder()
        self.markers = {token.content: id for id, token in added.items() if token.special}
        self.bos_id, self.eos_id, pad, unk = (vocab.get(t) if t else None for t in self._controls)
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = (t or "" for t in self._controls)
        self.stop_ids = tuple(id for id in dict.fromkeys(self._ends) if id != self.eos_id)
        # Pads are masked anyway, so any id will do where there is none for it.
        self.pad_id = next((id for id in (pad, self.eos_id, unk) if id is not None), 0)
        self.pad_token = self.pad_token or tokenizer.id_to_token(self.pad_id)
        piece = _reader(raw.get("decoder"), self._where)
        highest = max(vocab.values(), default=-1)
        if highest > 10 * len(vocab) + MAX_GAP:
            raise DataError(f"{self._where}: its highest id is {highest}, allowed is {10 * len(vocab) + MAX_GAP} for "
                            f"{len(vocab)} tokens")
        self._pieces = [b""] * (1 + highest)
        for token, id in vocab.items():
            self._pieces[id] = b"" if token in self.markers else piece(token)
        # The file decides, as in transformers 5, not tokenizer_config's add_bos_token.
        self.adds_bos = self.bos_id is not None and tokenizer.encode("").ids[:1] == [self.bos_id]
        self._after: dict[str, Any] = {"": tokenizer}
        for before in ("token", "text"):
            bare = _without_prefix(raw, before)
            known = next((b for b in self._after if _without_prefix(raw, b) == bare), None)
            self._after[before] = self._after[known] if known is not None else self._build(json.dumps(raw | bare).encode())
            self._add_tokens(self._after[before])

    def _build(self, data: bytes) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{self._where}: reading it needs the package tokenizers: pip install 'xalign[hf]'") from error
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # its errors are plain Exceptions
            raise DataError(f"{self._where}: not a tokenizer.json ({one_line(error)})") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _with_older_files(self, folder: Path) -> dict[str, Any]:
        """The tokenizer_config with what older files add to it: as in transformers, unless it lists the added tokens itself.

        Then special_tokens_map.json's names come first, and the tokens of added_tokens.json behind tokenizer.json's.
        """
        if "added_tokens_decoder" in self._config:
            return self._config
        settings = self._config | read_json(folder / "special_tokens_map.json")
        if further := self._config.get("extra_special_tokens") or self._config.get("additional_special_tokens"):
            settings["extra_special_tokens"] = further
        special = [settings.get(f"{kind}_token") for kind in KINDS]
        special = [token.get("content") if isinstance(token, dict) else token for token in special]
        settings["added_tokens_decoder"] = {
            str(id): {"content": text, "special": text in special, "normalized": text not in special}
            for text, id in read_json(folder / "added_tokens.json").items()
        }
        return settings

    def _name_controls(self, folder: Path, tokens: dict[int, str]) -> None:
        """Find the texts of bos, eos, pad and unk, and the further ids that end a text."""
        names = self._settings
        drawn = read_json(folder / "generation_config.json")
        model = read_json(folder / "config.json") | {name: value for name, value in drawn.items() if value is not None}
        self._controls: list[str | None] = []
        for kind in KINDS:
            name = f"{kind}_token"
            value = names.get(name)
            if name not in names:  # old folders leave it to the model's configuration, as GPT-2's does
                ids = model.get(f"{name}_id")
                ids = ids if isinstance(ids, list) else [ids]
                value = next((tokens[id] for id in ids if isinstance(id, int) and id in tokens), None)
            value = value.get("content") if isinstance(value, dict) else value
            if value is not None and not isinstance(value, str):
                raise DataError(f'{folder / CONFIG}: {name} is {value!r}, allowed is a string, {{"content": ...}} or null')
            self._controls.append(value)
        ends = model.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if any(not isinstance(id, int) or id < 0 for id in ends):
            file = "config.json" if drawn.get("eos_token_id") is None else "generation_config.json"
            raise DataError(f"{folder / file}: eos_token_id is {ends!r}, allowed is an id or a list of ids")
        self._ends = ends

    def _add_tokens(self, tokenizer: Any) -> None:
        """Add what tokenizer_config.json names and tokenizer.json lacks, in transformers' order."""
        from tokenizers import AddedToken

        known = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
        try:
            listed: dict[str, Any] = dict(self._settings.get("added_tokens_decoder") or {})
            for _, options in sorted(listed.items(), key=lambda item: int(item[0])):
                if options["content"] not in known:
                    tokenizer.add_tokens([AddedToken(**options)])
                    known[options["content"]] = options.get("special", False)
            further = self._settings.get("extra_special_tokens") or self._settings.get("additional_special_tokens") or []
            further = further.values() if isinstance(further, dict) else further
            texts = [*self._controls, *(t["content"] if isinstance(t, dict) else t for t in further)]
            tokenizer.add_special_tokens(
                [AddedToken(t, special=True, normalized=False) for t in dict.fromkeys(texts) if t and not known.get(t)]
            )
        except (TypeError, LookupError, ValueError, AttributeError) as error:
            raise DataError(f"{self._where.with_name(CONFIG)}: its added tokens can't be read ({one_line(error)})") from error

    @property
    def special_tokens(self) -> dict[str, int]:
        return self.markers  # control tokens are among them; where there is no pad, any token stands in for it

    def _ids(self, text: str, markers: bool) -> list[int]:
        tokenizer = self._after[""]
        if not markers:
            return tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = False
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = True
        return ids

    def encode_part(self, text: str, before: str) -> list[int]:
        return self._after[before].encode(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False).ids

    def decode(self, ids: Any) -> str:
        """Text of `ids` as `tokenizers` gives it: without special tokens, and without a blank that was put in front."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return self._after[""].decode([i for i in ids if 0 <= i < len(self._pieces)])

    def padded_apart(self) -> "JSONTokenizer | None":
        ends = {self.eos_id, *self.stop_ids}
        if self.pad_id not in ends:
            return self
        free = [text for text, id in self.markers.items() if id not in ends]
        # one that is meant for it, or never occurs, or occurs only elsewhere
        free.sort(key=lambda text: ("pad" not in text.lower(), text != self.unk_token, text in (self.chat_template or "")))
        if not free:
            return None
        twin = copy.copy(self)
        twin.pad_token = twin._new_pad = free[0]
        twin.pad_id = self.markers[free[0]]
        return twin

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that were read, byte for byte, and the chat template where it was changed.

        Only `tokenizer_class` is made `PreTrainedTokenizerFast`, the name by which transformers 4 and 5 both go by
        tokenizer.json alone; the control tokens that another class knows by itself are then written by name.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            write_atomically(folder / name, data)
        config = dict(self._config)
        if self._new_pad:
            config["pad_token"] = self._new_pad
            if (older := folder / "special_tokens_map.json").exists():
                write_atomically(older, json_bytes(read_json(older) | {"pad_token": self._new_pad}))
        if config.get("tokenizer_class") != "PreTrainedTokenizerFast":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            if isinstance(config.get("extra_special_tokens"), list):  # 4.57 knows no list of them
                config["additional_special_tokens"] = config.pop("extra_special_tokens")
            names = {f"{kind}_token": text for kind, text in zip(KINDS, self._controls, strict=True) if text}
            config |= {name: text for name, text in names.items() if name not in self._settings}
        if self.chat_template != self._template:
            (folder / TEMPLATE).unlink(missing_ok=True)
            config["chat_template"] = self.chat_template
        if config != self._config:
            written = {k: v for k, v in config.items() if k != "chat_template" or v is not None}
            write_atomically(folder / CONFIG, json_bytes(written))


def _without_prefix(raw: dict[str, Any], before: str) -> dict[str, Any]:
    """The normaliser and pre-tokeniser for text after `before`: as they are, or without the blank put in front of a text."""

    def bare(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        if kind == "Sequence":
            parts = {key: [bare(p) for p in part[key]] for key in ("normalizers", "pretokenizers") if key in part}
            return part | {key: [p for p in value if p is not None] for key, value in parts.items()}
        if kind == "Metaspace" and (before == "text" or (before == "token" and part.get("prepend_scheme") == "first")):
            return {k: v for k, v in part.items() if k != "add_prefix_space"} | {"prepend_scheme": "never"}
        if before == "text" and kind == "ByteLevel":
            return part | {"add_prefix_space": False}
        return None if before == "text" and kind == "Prepend" else part

    return {key: bare(raw.get(key)) for key in ("normalizer", "pre_tokenizer")}


def _reader(decoder: Any, where: Path) -> Callable[[str], bytes]:
    """A function from a piece of the vocabulary to the bytes that it stands for."""
    parts: list[dict[str, Any]] = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else [{}]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return _byte_level
    allowed: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "Metaspace", "replacement": SPACE},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " "},
    ]
    for part in parts:
        if not any(part.items() >= known.items() for known in allowed) or ("Strip" in kinds and "Fuse" not in kinds):
            raise DataError(f"{where}: its decoder {json.dumps(part)} is not supported; allowed: ByteLevel, or a sequence of "
                            f"Replace or Metaspace ({SPACE} to a blank), ByteFallback, Fuse and then Strip")  # fmt: skip
    fallback, blank = "ByteFallback" in kinds, " " if {"Replace", "Metaspace"} & set(kinds) else SPACE

    def piece(token: str) -> bytes:
        if fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, blank).encode()

    return piece


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # an added token, which is written as it is
        return token.encode()
