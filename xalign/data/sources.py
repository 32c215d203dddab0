"""Files to records: JSONL, JSON and text, plain or gzipped; every dataset's oddity is dealt with here.

Shapes of a preference record (other columns are ignored, but for `margin`, or `score_chosen` and `score_rejected`):
- `prompt`, `chosen`, `rejected` as text, or as messages `{"role", "content"}`, with or without the prompt repeated
  in the completions;
- `chosen` and `rejected` as conversations that differ in the last message: the rest is the prompt;
- Anthropic's HH-RLHF: two texts of `\\n\\nHuman:` and `\\n\\nAssistant:` turns, split at the last `\\n\\nAssistant:`;
- two texts without a prompt: the prompt is "". A shared beginning ("I like") is *not* moved into the prompt: where it
  ends is an accident of the answers, and in the difference of two log-ratios it cancels anyway.

Shapes to imitate: `messages`; `prompt` and `completion`; `text`; a line of a .txt file; the chosen side of a pair.
Anything wrong is a `DataError` that begins with `path:line` (in a .json list the record's number, from 1). Three flaws
that are common in real data are counted in a `ReadReport` instead: identical sides, prompts that differ, and
HH-RLHF's empty replies.
"""

import codecs
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from xalign.data.records import Example, Message, PreferencePair, Text, is_empty
from xalign.errors import ConfigError, DataError

PAIR_SHAPES = "prompt+chosen+rejected, chosen+rejected"
EXAMPLE_SHAPES = f"messages, prompt+completion, text, {PAIR_SHAPES}"
TURN = re.compile(r"\n\n(Human|Assistant):")
Path = str | os.PathLike[str]


@dataclass
class ReadReport:
    """What a reader met: records read and kept, and of each flaw how many and where it was first."""

    records: int = 0
    kept: int = 0
    flaws: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def count(self, flaw: str, where: str) -> None:
        """Note one record with a flaw."""
        self.flaws[flaw] = self.flaws.get(flaw, 0) + 1
        self.first.setdefault(flaw, where)

    def __str__(self) -> str:
        flaws = [f"; {flaw}: {number:,} (first: {self.first[flaw]})" for flaw, number in self.flaws.items()]
        return f"{self.kept:,} of {self.records:,} records kept" + "".join(flaws)


def read_pairs(
    path: Path,
    *,
    identical: Literal["drop", "keep"] = "drop",
    limit: int | None = None,
    report: ReadReport | None = None,
) -> list[PreferencePair]:
    """The preference pairs of a file, at most `limit`; see `iter_pairs`."""
    return list(itertools.islice(iter_pairs(path, identical=identical, report=report), limit))


def iter_pairs(
    path: Path, *, identical: Literal["drop", "keep"] = "drop", report: ReadReport | None = None
) -> Iterator[PreferencePair]:
    """Yield a file's preference pairs, one line in memory at a time (.json: all), and count into `report`.

    `identical` says what to do with chosen == rejected. Raises `DataError` for a bad record or a file without a pair.
    """
    if identical not in ("drop", "keep"):
        raise ConfigError(f"identical={identical!r} is not allowed; allowed: 'drop', 'keep'")
    report = ReadReport() if report is None else report
    kept = 0
    for where, record in _records(path, report):
        pair = _pair(record, where, report, PAIR_SHAPES)
        if pair is not None and pair.identical:
            report.count("chosen and rejected identical" + (", dropped" if identical == "drop" else ", kept"), where)
            pair = None if identical == "drop" else pair
        if pair is not None:
            kept, report.kept = kept + 1, report.kept + 1
            yield pair
    if not kept:
        raise DataError(f"{os.fspath(path)}: no usable preference pair ({report})")


def read_examples(
    path: Path, *, every_turn: bool = False, limit: int | None = None, report: ReadReport | None = None
) -> list[Example]:
    """The examples to imitate of a file, at most `limit`; see `iter_examples`."""
    return list(itertools.islice(iter_examples(path, every_turn=every_turn, report=report), limit))


def iter_examples(path: Path, *, every_turn: bool = False, report: ReadReport | None = None) -> Iterator[Example]:
    """Yield a file's examples, one line in memory at a time; of a preference pair its chosen side.

    `every_turn` is `pair_to_example`'s. Raises `DataError` for a bad record or a file without a record.
    """
    report = ReadReport() if report is None else report
    kept = 0
    for where, record in _records(path, report):
        example: Example | None
        if "messages" in record:
            example = Example((), _messages(record["messages"], "messages", where), where)
        elif "prompt" in record and "completion" in record:
            example = Example(_text(record, "prompt", where), _text(record, "completion", where), where)
        elif "text" in record and "chosen" not in record:
            example = Example("", _text(record, "text", where), where)
        else:
            pair = _pair(record, where, report, EXAMPLE_SHAPES)
            example = None if pair is None else pair_to_example(pair, every_turn)
        if example is not None:
            kept, report.kept = kept + 1, report.kept + 1
            yield example
    if not kept:
        raise DataError(f"{os.fspath(path)}: no usable example ({report})")


def pair_to_example(pair: PreferencePair, every_turn: bool = False) -> Example:
    """The chosen side of a pair, to imitate; with `every_turn` also the assistant's earlier turns in the prompt."""
    if every_turn and isinstance(pair.prompt, tuple) and isinstance(pair.chosen, tuple):
        return Example((), pair.prompt + pair.chosen, pair.where)
    return Example(pair.prompt, pair.chosen, pair.where)


def read_prompts(path: Path) -> list[Text]:
    """The prompts of a file: a line of a .txt, or the column `prompt` (text or messages) or `messages` of a record."""
    prompts: list[Text] = []
    for where, record in _records(path, ReadReport()):
        name = next((name for name in ("prompt", "messages", "text") if name in record), None)
        if name is None:
            raise DataError(f"{where}: {_keys(record)}; allowed: a record with prompt, messages or text")
        prompts.append(_text(record, name, where))
        if isinstance(prompts[-1], str) and not prompts[-1].strip():
            raise DataError(f"{where}: {name!r} is empty")
    return prompts


def _pair(record: dict[str, Any], where: str, report: ReadReport, shapes: str) -> PreferencePair | None:
    """One preference record, or None where it has a flaw that is counted."""
    missing = [name for name in ("chosen", "rejected") if name not in record]
    if len(missing) == 2:
        raise DataError(f"{where}: a record of unknown shape with {_keys(record)}; allowed: {shapes}")
    if missing:
        raise DataError(f"{where}: the record has no {missing[0]!r}, only {_keys(record)}")
    chosen, rejected = _text(record, "chosen", where), _text(record, "rejected", where)
    prompt = _text(record, "prompt", where) if record.get("prompt") is not None else None
    if prompt is None and _is_dialogue(chosen) and _is_dialogue(rejected):
        chosen, rejected = _dialogue(chosen), _dialogue(rejected)
        if is_empty(chosen[-1:]) or is_empty(rejected[-1:]):
            report.count("empty reply, dropped", where)
            return None
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        if isinstance(prompt, str) and chosen[:1] == rejected[:1] == (Message("user", prompt),):
            prompt = None  # UltraFeedback: the prompt is also the first message of both
        if prompt is None:
            prompt = chosen[:-1]
            if prompt != rejected[:-1]:
                report.count("prompts differ, dropped", where)
                return None
        # The prompt's messages may be repeated in front of the completions.
        if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return PreferencePair("" if prompt is None else prompt, chosen, rejected, _margin(record, where), where)


def _margin(record: dict[str, Any], where: str) -> float | None:
    """The column `margin`, or the difference of UltraFeedback's two scores."""
    scores = [record.get(name) for name in ("margin", "score_chosen", "score_rejected")]
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise DataError(f"{where}: margins and scores must be numbers, not {score!r:.40}")
    margin, better, worse = scores
    return margin if margin is not None else None if better is None or worse is None else better - worse


def _text(record: dict[str, Any], name: str, where: str) -> Text:
    """A column that holds text or a list of messages."""
    value = record[name]
    return value if isinstance(value, str) else _messages(value, name, where)


def _messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        allowed = "a list of messages" if name == "messages" else "text or a list of messages"
        raise DataError(f"{where}: {name!r} must be {allowed}, not {type(value).__name__}")
    messages = []
    for entry in value:
        if not isinstance(entry, dict) or "role" not in entry or "content" not in entry:
            raise DataError(f"{where}: {name!r} must hold objects with 'role' and 'content', not {entry!r:.60}")
        try:
            messages.append(Message(entry["role"], entry["content"]))
        except DataError as error:
            raise DataError(f"{where}: {name!r}: {error}") from None
    return tuple(messages)


def _is_dialogue(text: Text) -> bool:
    return isinstance(text, str) and bool(TURN.match("\n\n" + text.lstrip())) and "\n\nAssistant:" in text


def _dialogue(text: Any) -> tuple[Message, ...]:
    """The turns of an HH-RLHF dialogue; all after the last `Assistant:` is the reply, whatever it holds."""
    head, _, reply = ("\n\n" + text.lstrip()).rpartition("\n\nAssistant:")
    parts = TURN.split(head)[1:]
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [Message(names[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True)]
    return *turns, Message("assistant", reply.strip())


def _records(path: Path, report: ReadReport) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `path:line` and the object of every record of a file."""
    name = os.fspath(path)
    kind = os.path.splitext(name.lower().removesuffix(".gz"))[1]
    if kind not in (".jsonl", ".json", ".txt") and os.path.isfile(name):
        raise DataError(f"{name}: a file of unknown kind; allowed: .jsonl, .json, .txt, each also with .gz")
    found = False
    for number, value in _values(name, kind):
        found, where = True, f"{name}:{number}"
        if not isinstance(value, dict):
            raise DataError(f"{where}: a record must be a JSON object, not {type(value).__name__}")
        report.records += 1
        yield where, value
    if not found:
        raise DataError(f"{name}: the file holds no record")


def _values(name: str, kind: str) -> Iterator[tuple[int, Any]]:
    """Yield line (or record) numbers and parsed records."""
    if kind == ".json":
        lines = list(_lines(name))
        text = "".join(line for _, line in lines)
        try:
            value = _parse(text, name, 1) if text.strip() else []
        except DataError as error:
            # JSON lines under the name .json are common: their first line is whole.
            if not isinstance(error.__cause__, json.JSONDecodeError) or error.__cause__.msg != "Extra data":
                raise
            yield from ((number, _parse(line, name, number)) for number, line in lines if line.strip())
            return
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            value = value["data"]
        if not isinstance(value, list):
            keys = _keys(value) if isinstance(value, dict) else type(value).__name__
            raise DataError(f'{name}:1: holds {keys}; allowed: a list of records, or {{"data": [...]}}')
        yield from enumerate(value, 1)
    else:
        for number, line in _lines(name):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")} if kind == ".txt" else _parse(line, name, number)


def _parse(text: str, name: str, number: int) -> Any:
    try:
        return json.loads(text.rstrip("\r\n"))  # the end of a line is no line of its own
    except json.JSONDecodeError as error:
        where = f"{name}:{number + error.lineno - 1}"
        raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise DataError(f"{name}:{number}: not usable JSON: nested too deeply") from None


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a UTF-8 file, gzipped if its name says so; only \\n ends a line."""
    number = 0
    try:
        with gzip.open(name, "rb") if name.lower().endswith(".gz") else open(name, "rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except EOFError:
        raise DataError(f"{name}:{number + 1}: the gzip file is cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}:{number + 1}: not a sound gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error.strerror or error})") from None


def _keys(record: dict[str, Any]) -> str:
    return f"the keys {', '.join(map(repr, record))}"[:200] if record else "no keys"
