"""A raw record to a pair, an example, a labelled completion or a prompt; every dataset's oddity is dealt with here.

Shapes of a preference record (other columns are ignored, but for `margin`, or `score_chosen` and `score_rejected`):
- `prompt`, `chosen`, `rejected` as text (TRL standard, RewardBench), or as messages `{"role", "content"}` (TRL
  conversational), with or without the prompt repeated in the completions;
- a prompt of messages and two texts, which are one assistant message each (RewardBench's prior sets);
- `chosen` and `rejected` as conversations that differ in the last message: the rest is the prompt. UltraFeedback's
  `prompt` repeats the text of their first message;
- Anthropic's HH-RLHF: two texts of `\\n\\nHuman:` and `\\n\\nAssistant:` turns, split at the last `\\n\\nAssistant:`;
- two texts without a prompt: the prompt is "". A shared beginning ("I like") is *not* moved into the prompt: where it
  ends is an accident of the answers, and in the difference of two log-ratios it cancels anyway.

Shapes to imitate: `messages`; `prompt` and `completion`; `instruction` (with `input`) and `output` (AlpacaEval), which
become a user's and an assistant's message; `text`; a line of a .txt file; the chosen side of a pair.
Labelled: `completion` (with `prompt`), or `messages`, and `label`; a pair is two of them.

A column that is null counts as absent.
Anything wrong is a `DataError` that begins with `path:line` (see `data.files`). Flaws that are common in real data are
counted in a `ReadReport` instead: identical sides, prompts that differ, HH-RLHF's empty replies (with `empty="drop"` all),
labels that are null, texts of over `TEXT_LIMIT` characters, and, where examples are read, completions that are labelled
undesirable.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from numbers import Real
from typing import Any, Literal, TypeVar

from xalign.data.files import keys_of
from xalign.data.records import EmptyReply, Example, Labelled, Message, PreferencePair, Text, is_empty
from xalign.errors import ConfigError, DataError

NAMES = ("prompt", "chosen", "rejected", "completion", "label", "messages", "text", "instruction", "input", "output",
         "margin", "score_chosen", "score_rejected")  # fmt: skip
"""The columns that are read, by their standard names."""
PAIR_SHAPES = "prompt+chosen+rejected, chosen+rejected"
LABELLED_SHAPES = f"prompt+completion+label, messages+label, {PAIR_SHAPES}"
EXAMPLE_SHAPES = f"messages, prompt+completion, instruction+output, text, {PAIR_SHAPES}"
PROMPT_SHAPES = "a record with prompt, messages, instruction or text"
TURN = re.compile(r"\n\n(Human|Assistant):")
Record = dict[str, Any]
Identical = Literal["drop", "keep"]
Empty = Literal["error", "drop"]
TEXT_LIMIT = 1_000_000
"""Characters of a record's text at most: it is tokenised as a whole, which takes about 200 bytes of memory a character."""
T = TypeVar("T")


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


def shape_of(record: Record, where: str) -> tuple[Literal["pairs", "labelled", "examples", "prompts"], str]:
    """What a record is best read as, and the name of its shape. Raises `DataError` for an unknown one."""
    def form(*names: str) -> str:
        return "standard" if all(isinstance(record.get(name, ""), str) for name in names) else "conversational"

    if _has(record, "chosen") or _has(record, "rejected"):
        told = _has(record, "prompt")
        if not told and _is_dialogue(record.get("chosen")):
            return "pairs", "Anthropic HH-RLHF, dialogues as text, implicit prompt"
        if "subset" in record and "id" in record:
            return "pairs", f"RewardBench, {'prior sets' if form('prompt') == 'conversational' else 'standard'}"
        if _has(record, "score_chosen") and form("chosen") == "conversational":
            return "pairs", "UltraFeedback-binarized, conversations with scores"
        words = form("chosen", "rejected"), "explicit" if told else "implicit"
        return "pairs", f"TRL preference, {words[0]}, {words[1]} prompt"
    if _has(record, "label") or _unlabelled(record):
        return "labelled", f"TRL unpaired preference (KTO), {form('completion', 'messages')}"
    if _has(record, "messages"):
        return "examples", "conversations (TRL messages)"
    if _has(record, "completion"):
        return "examples", f"TRL prompt-completion, {form('completion')}"
    if _has(record, "output"):
        return "examples", "AlpacaEval outputs"
    if _has(record, "text"):
        return "examples", "plain text"
    if _has(record, "prompt"):
        return "prompts", f"TRL prompt-only, {form('prompt')}"
    if _has(record, "instruction"):
        return "prompts", "AlpacaEval instructions"
    raise DataError(f"{where}: a record of unknown shape with {keys_of(record)}; allowed: prompt, {EXAMPLE_SHAPES}")


def _kept(read: Callable[[], T | None], record: Record, where: str, report: ReadReport, empty: Empty) -> T | None:
    """What `read` makes of a record, or None where it is too long, or has an empty reply that is to be dropped."""
    if empty not in ("error", "drop"):
        raise ConfigError(f"empty={empty!r} is not allowed; allowed: 'error', 'drop'")
    if _characters(record) > TEXT_LIMIT:
        report.count(f"too long to tokenise (over {TEXT_LIMIT:,} characters), dropped", where)
        return None
    try:
        return read()
    except EmptyReply as error:
        if empty == "error":
            raise DataError(f"{error} (--empty drop skips such records)") from None
        report.count("empty reply, dropped", where)
        return None


def _characters(record: Record) -> int:
    """Characters of a record's texts and messages."""
    count = 0
    for name in NAMES:
        value = record.get(name)
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, list):
            contents = [message.get("content") for message in value if isinstance(message, dict)]
            parts = [part.get("text") for c in contents if isinstance(c, list) for part in c if isinstance(part, dict)]
            count += sum(len(text) for text in (*contents, *parts) if isinstance(text, str))
    return count


def to_pair(record: Record, where: str, report: ReadReport, identical: Identical = "drop",
            empty: Empty = "error") -> PreferencePair | None:
    """One preference record, or None where it has a flaw that is counted."""
    if identical not in ("drop", "keep"):
        raise ConfigError(f"identical={identical!r} is not allowed; allowed: 'drop', 'keep'")
    if _has(record, "label") and not _has(record, "chosen"):
        raise DataError(f"{where}: a labelled record (completion, label), not a pair; allowed: {PAIR_SHAPES}. "
                        "Labels are for the loss kto; xalign sft imitates the desirable ones")
    pair = _kept(lambda: _pair(record, where, report, PAIR_SHAPES), record, where, report, empty)
    if pair is not None and pair.identical:
        report.count(f"chosen and rejected identical, {'dropped' if identical == 'drop' else 'kept'}", where)
        return None if identical == "drop" else pair
    return pair


def to_example(record: Record, where: str, report: ReadReport, every_turn: bool = False,
               empty: Empty = "error") -> Example | None:
    """One example to imitate, or None where the record has a flaw that is counted, or is labelled undesirable."""
    return _kept(lambda: _example(record, where, report, every_turn), record, where, report, empty)


def _example(record: Record, where: str, report: ReadReport, every_turn: bool) -> Example | None:
    if _unlabelled(record):
        report.count("label is null, dropped", where)
        return None
    if _has(record, "label") and not _has(record, "chosen") and not _label(record, where):
        report.count("labelled undesirable, dropped", where)
        return None
    if _has(record, "messages"):
        return Example((), to_messages(record["messages"], "messages", where), where)
    if _has(record, "completion"):
        return Example(*_prompt_and_completion(record, where), where)
    if _has(record, "instruction") and _has(record, "output"):
        return Example(_instruction(record, where), (Message("assistant", _string(record, "output", where)),), where)
    if _has(record, "text") and not _has(record, "chosen"):
        return Example("", _string(record, "text", where), where)
    pair = _pair(record, where, report, EXAMPLE_SHAPES)
    return None if pair is None else pair_to_example(pair, every_turn)


def pair_to_example(pair: PreferencePair, every_turn: bool = False) -> Example:
    """The chosen side of a pair, to imitate; with `every_turn` also the assistant's earlier turns in the prompt."""
    if every_turn and isinstance(pair.prompt, tuple) and isinstance(pair.chosen, tuple):
        return Example((), pair.prompt + pair.chosen, pair.where)
    return Example(pair.prompt, pair.chosen, pair.where)


def to_labelled(record: Record, where: str, report: ReadReport, identical: Identical = "drop",
                empty: Empty = "error") -> list[Labelled] | None:
    """The one labelled completion of a record, or the two of a pair; None where it has a flaw that is counted."""
    if _has(record, "chosen") or _has(record, "rejected"):
        pair = to_pair(record, where, report, identical, empty)
        if pair is None:
            return None
        return [Labelled(pair.prompt, pair.chosen, True, where), Labelled(pair.prompt, pair.rejected, False, where)]
    return _kept(lambda: _labelled(record, where, report), record, where, report, empty)


def _labelled(record: Record, where: str, report: ReadReport) -> list[Labelled] | None:
    if _unlabelled(record):
        report.count("label is null, dropped", where)
        return None
    if _has(record, "label"):
        if _has(record, "messages"):
            messages = to_messages(record["messages"], "messages", where)
            return [Labelled(messages[:-1], messages[-1:], _label(record, where), where)]
        if not _has(record, "completion"):
            raise DataError(f"{where}: a label, but only {keys_of(record)}; allowed: {LABELLED_SHAPES}")
        return [Labelled(*_prompt_and_completion(record, where), _label(record, where), where)]
    raise DataError(f"{where}: a record without a label, with {keys_of(record)}; allowed: {LABELLED_SHAPES}")


def _unlabelled(record: Record) -> bool:
    """Whether a record has all that a labelled one has, but null for a label: nobody said if it is good."""
    bare = "label" in record and record["label"] is None and (_has(record, "completion") or _has(record, "messages"))
    return bare and not _has(record, "chosen") and not _has(record, "rejected")


def to_prompt(record: Record, where: str, report: ReadReport) -> Text | None:
    """One prompt, or None where the record is a pair with a flaw that is counted."""
    if (size := _characters(record)) > TEXT_LIMIT:
        raise DataError(f"{where}: a record of {size:,} characters; allowed: up to {TEXT_LIMIT:,}")
    if _has(record, "chosen") and _has(record, "rejected"):  # the prompt that training on the pair would see
        pair = _pair(record, where, report, PAIR_SHAPES)
        prompt = None if pair is None else pair.prompt
    elif _has(record, "instruction"):
        prompt = _instruction(record, where)
    else:
        name = next((name for name in ("prompt", "messages", "text") if _has(record, name)), None)
        if name is None:
            raise DataError(f"{where}: {keys_of(record)}; allowed: {PROMPT_SHAPES}")
        prompt = _text(record, name, where)
    if isinstance(prompt, str) and not prompt.strip():
        raise DataError(f"{where}: 'prompt' is empty")
    return prompt


def _pair(record: Record, where: str, report: ReadReport, shapes: str) -> PreferencePair | None:
    """One preference record, identical or not, or None where it has a flaw that is counted."""
    missing = [name for name in ("chosen", "rejected") if not _has(record, name)]
    if len(missing) == 2:
        raise DataError(f"{where}: a record of unknown shape with {keys_of(record)}; allowed: {shapes}")
    if missing:
        raise DataError(f"{where}: the record has no {missing[0]!r}, only {keys_of(record)}")
    chosen, rejected = _text(record, "chosen", where), _text(record, "rejected", where)
    prompt = _text(record, "prompt", where) if _has(record, "prompt") else None
    if prompt is None and _is_dialogue(chosen) and _is_dialogue(rejected):
        chosen, rejected = _dialogue(chosen), _dialogue(rejected)
        if is_empty(chosen[-1:]) or is_empty(rejected[-1:]):
            report.count("empty reply, dropped", where)
            return None
    if isinstance(prompt, tuple) and isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = (Message("assistant", chosen),), (Message("assistant", rejected),)
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        # UltraFeedback: the prompt is also the first message of both, or the first after a system's
        if isinstance(prompt, str) and all(_first_user(side) == prompt.strip() for side in (chosen, rejected)):
            prompt = None
        if prompt is None:
            prompt = chosen[:-1]
            if prompt != rejected[:-1]:
                report.count("prompts differ, dropped", where)
                return None
        # The prompt's messages may be repeated in front of the completions.
        if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return PreferencePair("" if prompt is None else prompt, chosen, rejected, _margin(record, where), where)


def _first_user(messages: tuple[Message, ...]) -> str | None:
    return next((message.content.strip() for message in messages if message.role == "user"), None)


def _prompt_and_completion(record: Record, where: str) -> tuple[Text, Text]:
    """Two columns of one kind: a text that answers messages is an assistant's."""
    prompt = _text(record, "prompt", where) if _has(record, "prompt") else None
    completion = _text(record, "completion", where)
    if isinstance(prompt, tuple) and isinstance(completion, str):
        completion = (Message("assistant", completion),)
    return (() if isinstance(completion, tuple) else "") if prompt is None else prompt, completion


def _instruction(record: Record, where: str) -> tuple[Message, ...]:
    """AlpacaEval's instruction, and below it the input where there is one, as a user's message."""
    parts = [_string(record, name, where) for name in ("instruction", "input") if _has(record, name)]
    return (Message("user", "\n\n".join(part for part in parts if part)),)


def _label(record: Record, where: str) -> bool:
    label = record["label"]
    if isinstance(label, bool | int) and label in (0, 1):
        return bool(label)
    raise DataError(f"{where}: 'label' must be true or false (or 1 or 0), not {label!r:.40}")


def _margin(record: Record, where: str) -> float | None:
    """The column `margin`, or the difference of UltraFeedback's two scores."""
    scores: list[float | None] = []
    for name in ("margin", "score_chosen", "score_rejected"):
        score = record.get(name)
        if isinstance(score, Decimal) or (isinstance(score, Real) and not isinstance(score, int | float)):
            score = float(score)  # a parquet's decimal, or numpy's
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or abs(score) > 1e300):
            raise DataError(f"{where}: margins and scores must be numbers (up to 1e300), not {score!r:.40}")
        scores.append(score)
    margin, better, worse = scores
    return margin if margin is not None else None if better is None or worse is None else better - worse


def _has(record: Record, name: str) -> bool:
    return record.get(name) is not None


def _string(record: Record, name: str, where: str) -> str:
    if not isinstance(record[name], str):
        raise DataError(f"{where}: {name!r} must be text, not {type(record[name]).__name__}")
    return record[name]


def _text(record: Record, name: str, where: str) -> Text:
    """A column that holds text or a list of messages."""
    value = record[name]
    return value if isinstance(value, str) else to_messages(value, name, where)


def to_messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """The messages of a column that holds a list of them."""
    if not isinstance(value, list):
        allowed = "a list of messages" if name == "messages" else "text or a list of messages"
        raise DataError(f"{where}: {name!r} must be {allowed}, not {type(value).__name__}")
    messages = []
    for entry in value:
        if not isinstance(entry, dict) or "role" not in entry or "content" not in entry:
            raise DataError(f"{where}: {name!r} must hold objects with 'role' and 'content', not {entry!r:.60}")
        try:
            for key in ("tool_calls", "function_call"):
                if entry.get(key):
                    raise DataError(f"a message with {key!r} can't be used; allowed: messages of text")
            content = entry["content"]
            messages.append(Message(entry["role"], _joined(content) if isinstance(content, list) else content))
        except DataError as error:
            raise DataError(f"{where}: {name!r}: {error}") from None
    return tuple(messages)


def _joined(parts: list[Any]) -> str:
    """The text of a content that is a list of parts."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type", "without a type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f'content with a part {kind!r:.40}; allowed: text, or parts {{"type": "text", "text": ...}}')
    return "".join(part["text"] for part in parts)


def _is_dialogue(text: Any) -> bool:
    return isinstance(text, str) and bool(TURN.match("\n\n" + text.lstrip())) and "\n\nAssistant:" in text


def _dialogue(text: Any) -> tuple[Message, ...]:
    """The turns of an HH-RLHF dialogue; all after the last `Assistant:` is the reply, whatever it holds."""
    head, _, reply = ("\n\n" + text.lstrip()).rpartition("\n\nAssistant:")
    return *_turns(head), Message("assistant", reply.strip())


@lru_cache(maxsize=1)
def _turns(head: str) -> tuple[Message, ...]:
    """The turns before the reply; kept for the other side of the pair, whose are nearly always the same."""
    parts = TURN.split(head)[1:]
    names = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(names[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True))
