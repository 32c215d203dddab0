"""A run's data from files to stores of token ids; text streams through, so that a file may be larger than memory.

Each pass reads the file anew: one to check and count all records and to choose those held out, one for the tokenizer if
it is trained too, and one to encode. In memory stay 8 bytes a record while the first pass lasts, and the held-out records.
"""

import array
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from xalign import distributed
from xalign.config import PreferenceDataOptions, RewardDataOptions, SFTDataOptions
from xalign.data import toyworld
from xalign.data.collate import (
    EncodedExample,
    EncodedLabelled,
    EncodedPair,
    EncodedRanked,
    TruncationMode,
    TruncationReport,
    encode_labelled,
    encode_pair,
    encode_scored,
    encode_turns,
    mismatch,
    mixture,
    truncate_example,
    truncate_pair,
)
from xalign.data.records import Example, Labelled, PreferencePair
from xalign.data.shapes import ReadReport, pair_to_example, shape_of
from xalign.data.sources import columns_by_file, iter_examples, iter_labelled, iter_pairs, iter_records, refuse_twice
from xalign.data.store import Store, open_store, write_store
from xalign.disk import writing
from xalign.errors import ConfigError, DataError
from xalign.tokenizers import Tokenizer
from xalign.watch import truncated, warn

T = TypeVar("T", PreferencePair, Labelled, Example)
R = TypeVar("R", EncodedPair, EncodedLabelled, EncodedRanked, EncodedExample)
Source = Callable[[], Iterator[T]]  # records, read from their files anew at each call
EMBEDDED = Path(__file__).resolve().parent.parent / "data"
MISMATCHED = 256  # records in a row among which a mismatched completion is looked for
WATCHED = 500  # documents of a text whose perplexity is watched
HELD_OUT = 5_000  # pairs or examples of an evaluation at most: more only cost time, .7 % is the standard error of an accuracy


def say(text: str) -> None:
    """A line of progress, on stderr: stdout is for answers."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Split(Generic[T]):
    """Records to train on, how many they are, and those held out."""

    train: Source[T]
    count: int
    held_out: list[T]


def preference_data(options: PreferenceDataOptions, seed: int,
                    labelled: bool = False) -> tuple[Split[Any], Source[Example]]:
    """Training and held-out pairs, and the examples to imitate before alignment; all files are read and checked once.

    With `labelled` a file may as well hold `Labelled` records (judged by its first), which are then what is given.
    """
    train_file = options.dataset or str(EMBEDDED / "train.jsonl")
    eval_file = options.eval_dataset or (None if options.dataset else str(EMBEDDED / "test.jsonl"))
    files = [file for file in (train_file, eval_file, options.sft_dataset) if file]
    columns = distributed.once(lambda: columns_by_file(options.columns, files))

    def holds_labels(file: str) -> bool:
        first = next(iter_records(file, columns[file]), None)
        return first is not None and shape_of(first[1], first[0])[0] != "pairs"

    labels = {file: labelled and distributed.once(partial(holds_labels, file)) for file in (train_file, eval_file) if file}

    def read(file: str, report: ReadReport | None = None) -> Iterator[Any]:
        return (iter_labelled if labels[file] else iter_pairs)(
            file, identical=options.identical, empty=options.empty, columns=columns[file], report=report)

    def key(record: PreferencePair | Labelled) -> int:
        replies = record.completion if isinstance(record, Labelled) else (record.chosen, record.rejected)
        return key_hash(str(record.prompt or replies), seed)

    def scan() -> tuple[int, int, list[Any]]:
        report = ReadReport()
        keys = array.array("Q", (key(record) for record in shown(read(train_file, report), "read")))
        say(f"{train_file}: {report}")
        if eval_file:
            return len(keys), -1, list(itertools.islice(read(eval_file), HELD_OUT))
        last = hold_out(keys, 10)
        held_out = list(itertools.islice((record for record in read(train_file) if key(record) <= last), HELD_OUT))
        say(f"{len(held_out):,} {'records' if labels[train_file] else 'pairs'} are held out for evaluation")
        return sum(k > last for k in keys), last, held_out

    count, last, held_out = distributed.once(scan)

    def train() -> Iterator[Any]:
        return (record for record in read(train_file) if last < 0 or key(record) > last)

    split = Split(train, count, held_out)
    return split, partial(to_imitate, options, split, columns)


def to_imitate(options: PreferenceDataOptions | RewardDataOptions, split: Split[Any],
               columns: dict[Any, dict[str, str] | None]) -> Iterator[Example]:
    """What a model from scratch imitates before it learns from preferences."""
    if options.sft_dataset:
        return iter_examples(options.sft_dataset, every_turn=True, empty=options.empty, columns=columns[options.sft_dataset])
    if options.dataset:
        return (Example(r.prompt, r.completion, r.where) if isinstance(r, Labelled) else pair_to_example(r, every_turn=True)
                for r in split.train() if not isinstance(r, Labelled) or r.label)
    # prompts of the toy world are drawn at random, so learning them by heart would only take room
    documents = iter_examples(str(EMBEDDED / "corpus.txt"))
    return (Example(*toyworld.split_document(str(d.completion)), d.where) for d in documents)


def ranked_data(options: RewardDataOptions, seed: int, margin: bool = False) -> tuple[Split[PreferencePair], Source[Example]]:
    """The same for pairs of several files, each by its weight; with `margin` a pair without one is a `DataError`."""
    files = options.dataset or (str(EMBEDDED / "train.jsonl"),)
    eval_file = options.eval_dataset or (None if options.dataset else str(EMBEDDED / "test.jsonl"))
    wanted = [file for file in (*files, eval_file, options.sft_dataset) if file]
    columns = distributed.once(lambda: columns_by_file(options.columns, wanted))

    def read(file: str, report: ReadReport | None = None) -> Iterator[PreferencePair]:
        for pair in iter_pairs(file, identical=options.identical, empty=options.empty, columns=columns[file], report=report):
            if margin and pair.margin is None:
                raise DataError(f"{pair.where}: no margin, nor score_chosen and score_rejected; allowed: all records with one, "
                                "or training without --margin")
            yield pair

    def key(pair: PreferencePair) -> int:
        return key_hash(str(pair.prompt or (pair.chosen, pair.rejected)), seed)

    split = mixed_data(files, options.dataset_weights, eval_file, read, key, seed, 10)
    return split, partial(to_imitate, options, split, columns)


def example_data(options: SFTDataOptions, seed: int) -> Split[Example]:
    """Examples of all files, each by its weight, and held-out ones; all files are read and checked once."""
    files = options.dataset or (str(EMBEDDED / "corpus.txt"),)
    wanted = [*files, *([options.eval_dataset] if options.eval_dataset else [])]
    columns = distributed.once(lambda: columns_by_file(options.columns, wanted))

    def read(file: str, report: ReadReport | None = None) -> Iterator[Example]:
        return iter_examples(file, every_turn=True, empty=options.empty, columns=columns[file], report=report)

    def key(example: Example) -> int:
        return key_hash(f"{example.prompt}{example.completion}", seed)

    return mixed_data(files, options.dataset_weights, options.eval_dataset, read, key, seed, 20)


def mixed_data(files: Sequence[str], weights: Sequence[float], eval_file: str | None, read: Callable[..., Iterator[T]],
               key: Callable[[T], int], seed: int, one_in: int) -> Split[T]:
    """Records of all files, each by its weight (none: 1), and held-out ones: `eval_file`'s, or those of a key in `one_in`."""
    weights = weights or (1.0,) * len(files)
    refuse_twice(files, " (--dataset-weights 2 takes each record twice)")
    if len(weights) != len(files):
        raise ConfigError(f"--dataset-weights has {len(weights)} number{'s' * (len(weights) != 1)} for {len(files)} "
                          f"file{'s' * (len(files) != 1)}, allowed is one each")

    def mixed(sizes: Sequence[int]) -> Iterator[T]:
        return in_order([partial(read, file) for file in files], mixture(sizes, weights, seed, 0))

    def scan() -> tuple[int, list[int], int, list[T]]:
        keys = []
        for file in files:
            report = ReadReport()
            keys.append(array.array("Q", map(key, shown(read(file, report), "read"))))
            say(f"{file}: {report}")
        sizes = list(map(len, keys))
        if eval_file:
            return sum(1 for _ in mixture(sizes, weights, seed, 0)), sizes, -1, list(
                itertools.islice(read(eval_file), HELD_OUT))
        taken = array.array("Q", (keys[file][row] for file, row in mixture(sizes, weights, seed, 0)))
        last = hold_out(taken, one_in)
        held_out = list(itertools.islice((e for e in mixed(sizes) if key(e) <= last), HELD_OUT))
        return sum(k > last for k in taken), sizes, last, held_out

    count, sizes, last, held_out = distributed.once(scan)
    return Split(lambda: (e for e in mixed(sizes) if last < 0 or key(e) > last), count, held_out)


def in_order(files: Sequence[Source[T]], rows: Iterable[tuple[int, int]]) -> Iterator[T]:
    """The records with these (file, row), in this order; a file is read again where the rows go back."""
    current, at = -1, -1
    records: Iterator[T] = iter(())
    for file, row in rows:
        if file != current or row <= at:
            current, at, records = file, -1, files[file]()
        yield next(itertools.islice(records, row - at - 1, None))
        at = row


def shown(records: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The same records, with a progress bar where they take more than some seconds."""
    return iter(tqdm(records, desc=title, total=total, unit="record", delay=5, mininterval=1))


# -- held-out data --------------------------------------------------------------------------------------------------


def key_hash(text: str, seed: int) -> int:
    """64 bits of a text; another seed gives unrelated ones."""
    return int.from_bytes(hashlib.blake2b(f"hold out {seed}:{text}".encode(), digest_size=8).digest(), "big")


def hold_out(keys: Sequence[int], one_in: int) -> int:
    """The last key hash that is held out: about one different key in `one_in` is at most this, and no more than `HELD_OUT`.

    Records with the same key stay together. Raises `DataError` unless both sides get a key.
    """
    different = np.unique(np.asarray(keys, dtype=np.uint64))
    if len(different) < 2:
        raise DataError(f"{len(different)} different prompt can't be split into training and held-out data, allowed is at "
                        "least 2 (or give --eval-dataset)")
    return int(different[max(1, min(len(different) // one_in, HELD_OUT)) - 1])


# -- encoding -------------------------------------------------------------------------------------------------------


def encode_pairs(pairs: Iterable[PreferencePair], tokenizer: Tokenizer, max_length: int, mode: TruncationMode,
                 report: TruncationReport) -> Iterator[EncodedPair]:
    """Tokenise and truncate pairs. Raises `DataError` if none is left."""
    left = False
    for pair in pairs:
        cut = truncate_pair(encode_pair(pair, tokenizer), max_length, mode, report)
        if cut is not None:
            left = True
            yield cut
    if not left:
        raise DataError(f"no pair is left after truncation to {max_length} tokens ({report})")


def encode_ranked(pairs: Iterable[PreferencePair], tokenizer: Tokenizer, max_length: int, mode: TruncationMode,
                  report: TruncationReport, margin: bool = False) -> Iterator[EncodedRanked]:
    """Tokenise pairs for a reward model, each side cut as it is when it is scored alone; with `margin` theirs is kept.
    Raises `DataError` if none is left."""
    left = False
    for pair in pairs:
        (head, chosen, cut), (other, rejected, also) = (
            encode_scored(pair.prompt, side, tokenizer, max_length, mode, pair.where) for side in (pair.chosen, pair.rejected))
        if head != other:
            head, chosen, rejected = [], head + chosen, other + rejected
        report.total += 1
        if chosen == rejected and not pair.identical:
            report.dropped += 1
            continue
        if mode == "keep_end":
            report.prompt_cut += cut or also
        else:
            report.completion_cut += cut or also
        left = True
        yield EncodedRanked(head, chosen, rejected, pair.where, margin=(pair.margin or 0.0) if margin else 0.0)
    if not left:
        raise DataError(f"no pair is left after truncation to {max_length} tokens ({report})")


def encode_texts(records: Iterable[Labelled | PreferencePair], tokenizer: Tokenizer, max_length: int, mode: TruncationMode,
                 report: TruncationReport) -> Iterator[EncodedLabelled]:
    """Tokenise and truncate labelled completions, and pairs as two of them, and put mismatched completions beside them.

    Those are of the `MISMATCHED` records around, so that records still stream. Raises `DataError` if none is left.
    """
    near: list[EncodedLabelled] = []
    for text in itertools.chain.from_iterable(map(unpaired, records)):
        cut = truncate_pair(encode_labelled(text, tokenizer), max_length, mode, report)
        near += [] if cut is None else [cut]
        if len(near) == 2 * MISMATCHED:  # so that no few are left alone at the end
            yield from mismatch(near[:MISMATCHED], max_length)
            near = near[MISMATCHED:]
    if not near:
        raise DataError(f"no completion is left after truncation to {max_length} tokens ({report})")
    yield from mismatch(near, max_length)


def unpaired(record: Labelled | PreferencePair) -> list[Labelled]:
    """A labelled completion, or both of a pair: the chosen desirable, the rejected undesirable."""
    if isinstance(record, Labelled):
        return [record]
    sides = (record.chosen, True), (record.rejected, False)
    return [Labelled(record.prompt, text, label, record.where) for text, label in sides]


def encode_examples(examples: Iterable[Example], tokenizer: Tokenizer, max_length: int, mode: TruncationMode,
                    report: TruncationReport) -> Iterator[EncodedExample]:
    """Tokenise and truncate examples. Raises `DataError` if none is left."""
    left = False
    for example in examples:
        turns = encode_turns(example, tokenizer)
        report.split += len(turns) > 1
        for part in (part for turn in turns for part in truncate_example(turn, max_length, mode, report)):
            left = True
            yield part
    if not left:
        raise DataError(f"nothing is left to imitate after truncation to {max_length} tokens ({report})")


def in_memory(encode: Callable[..., Iterator[R]], records: Iterable[Any], tokenizer: Tokenizer, max_length: int,
              mode: TruncationMode, title: str) -> list[R]:
    """Few records, encoded; says what truncation cost."""
    report = TruncationReport()
    encoded = list(encode(records, tokenizer, max_length, mode, report))
    say(f"{title}: {report}")
    warn(truncated(report))
    return encoded


def watched_text(file: str, tokenizer: Tokenizer, max_length: int) -> list[EncodedExample]:
    """The first documents of a text (or records of a file) whose perplexity is watched; long ones are split, nothing is cut."""
    documents = itertools.islice(iter_examples(file), WATCHED)
    return in_memory(encode_examples, documents, tokenizer, max_length, "keep_start", Path(file).name)


def on_disk(folder: Path, kind: type[R], encode: Callable[..., Iterator[R]], source: Callable[[], Iterator[Any]],
            tokenizer: Tokenizer, max_length: int, mode: TruncationMode, title: str, *, count: int | None = None,
            key: dict[str, Any]) -> Store[R]:
    """All records of `source`, encoded into a store in `folder`, or the one of an earlier start; says what truncation cost.

    `key` is what the source depends on, besides what is given here. Of several processes one encodes.
    """
    key = {**key, "tokenizer": fingerprint(tokenizer), "max_length": max_length, "mode": mode}

    def make() -> None:
        if open_store(folder, key, kind) is None:
            report = TruncationReport()
            rows = encode(shown(source(), f"encode {title}", count), tokenizer, max_length, mode, report)
            write_store(folder, key, kind, rows, max(tokenizer.vocab_size, max_length + 1), lambda: str(report))
            warn(truncated(report))

    distributed.once(make)
    found = open_store(folder, key, kind)
    assert found is not None, f"{folder} is not what was just written"
    say(f"{title}: {found[1]}")
    return found[0]


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that a tokenizer and its chat template are: of the files that it saves."""
    with tempfile.TemporaryDirectory() as folder, writing(folder):
        tokenizer.save(folder)
        whole = hashlib.sha256()
        for path in sorted(Path(folder).iterdir()):
            whole.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def data_digest(names: Iterable[str]) -> str:
    """A hash of what data files (and hub data sets) hold, so that a run never goes on with other data under a name."""
    from xalign.data.files import data_files

    whole = hashlib.sha256()
    for path in itertools.chain.from_iterable(map(data_files, names)):
        try:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{os.fspath(path)}: can't be read ({error.strerror or error})") from None
    return whole.hexdigest()[:16]
