"""What `xalign evaluate` compares: the pairs with their sources, and the two models."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from xalign.backends.base import Backend
from xalign.backends.native import NativeBackend
from xalign.backends.opening import as_spec
from xalign.backends.opening import open as open_backend
from xalign.complete import as_prompt
from xalign.data.chat_template import render_prompt
from xalign.data.files import raw_records
from xalign.data.records import Message, PreferencePair, Text
from xalign.data.shapes import ReadReport
from xalign.data.sources import columns_by_file, iter_pairs
from xalign.errors import ConfigError
from xalign.evaluate_config import ComparedOptions, EvaluateConfig
from xalign.nn.transformer import TransformerWrapper
from xalign.prepare import EMBEDDED, say
from xalign.stages import choose_device, load_model
from xalign.tokenizers import Tokenizer


def files_of(config: EvaluateConfig) -> list[str]:
    embedded = () if config.data.prompts else (str(EMBEDDED / "test.jsonl"),)
    return list(config.data.dataset or embedded)


def read(config: EvaluateConfig, files: Sequence[str]) -> tuple[list[PreferencePair], dict[str, str], list[str]]:
    """The pairs, at most --limit; where each comes from, by its `path:line`; and of each file what was left out of it."""
    options = config.data
    columns = columns_by_file(options.columns, files)
    pairs: list[PreferencePair] = []
    sources: dict[str, str] = {}
    lost: list[str] = []
    for file in files:
        left = None if options.limit is None else options.limit - len(pairs)
        report = ReadReport()
        own = list(itertools.islice(iter_pairs(file, empty=options.empty, columns=columns[file], report=report), left))
        say(f"{file}: {report}")
        if report.flaws:
            lost.append(f"{file}: {report}")
        named = {pair.where: pair for pair in own}  # whose source is still to be found
        records = raw_records(file, (options.source_column, "prompt", "chosen")) if named else iter(())
        while named:
            where, record = next(records)
            if named.pop(where, None) is not None:
                told = record.get(options.source_column)
                sources[where] = told if isinstance(told, str) and told else Path(file).name
        pairs += [_as_chat(pair, config) for pair in own]
    if options.system is not None and not options.chat:
        raise ConfigError("--system goes with --chat")
    return pairs, sources, lost


def _as_chat(pair: PreferencePair, config: EvaluateConfig) -> PreferencePair:
    """With --chat a text prompt is a user's turn, and its completions are the assistant's."""
    if not config.data.chat:
        return pair
    sides = (pair.chosen, pair.rejected)
    chosen, rejected = ((Message("assistant", text),) if isinstance(text, str) else text for text in sides)
    return PreferencePair(as_prompt(pair.prompt, config.data, pair.where), chosen, rejected, pair.margin, pair.where)


def weights_digest(spec: str) -> str:
    """A hash of a model's files, so that a run never goes on with other weights under a name; "" for one that is elsewhere."""
    folder, whole = Path(as_spec(spec)["model"]), hashlib.sha256()
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.suffix in (".safetensors", ".bin", ".json", ".model"):
            with open(path, "rb") as file:
                whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16] if folder.is_dir() else ""


class Side:
    """One of the two models: a backend that writes, and, of a native one, the model and tokenizer that score."""

    def __init__(self, spec: str, options: ComparedOptions):
        told = as_spec(spec)
        self.model: TransformerWrapper | None = None
        self.tokenizer: Tokenizer | None = None
        self.backend: Backend
        if told["backend"] == "native":
            self.model, self.tokenizer = load_model(told["model"], options.dtype, choose_device(options.device),
                                                    allow_pickle=options.allow_pickle, revision=options.revision)
            self.backend = NativeBackend(self.model, self.tokenizer, options.batch_size)
            return
        if told["backend"] == "transformers":
            told |= {"device": options.device, "dtype": options.dtype, "batch_size": options.batch_size}
        self.backend = open_backend(told)

    @property
    def own(self) -> tuple[TransformerWrapper, Tokenizer]:
        """Model and tokenizer of a native one."""
        assert self.model is not None and self.tokenizer is not None
        return self.model, self.tokenizer


def same_ids(one: Tokenizer, other: Tokenizer, prompts: Sequence[Text]) -> bool:
    """Whether two tokenizers agree, judged by their size and some prompts."""
    return one.vocab_size == other.vocab_size and all(
        render_prompt(one, p).ids == render_prompt(other, p).ids for p in prompts[:20])


def slug(judge: str, *settings: object) -> str:
    """A judge's name as part of a file's: another for other settings, and for a model of other weights."""
    weights = [weights_digest(part) for part in judge.partition(":")[2].split(",") if part]
    whole = hashlib.sha256(repr((judge, settings, weights)).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', judge).strip('-')[-40:]}-{whole}"
