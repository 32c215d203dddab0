"""Records to batches: encoding, truncation, padding, and the order in which rows are visited.

Everything that has to do with position is a pure function of (seed, step): to resume at step N, begin at step N.
"""

import array
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor

from xalign.data.chat_template import NotCut, render_completion
from xalign.data.records import Example, Labelled, PreferencePair, Text
from xalign.errors import ConfigError, DataError
from xalign.tokenizers import Tokenizer

TruncationMode = Literal["keep_end", "keep_start"]


@dataclass(frozen=True)
class EncodedPair:
    """Ids of a prompt and of the two completions (their end-of-turn token, mostly EOS, last).

    `bos`: whether the first id is a BOS, which truncation keeps; a store, whose rows are cut already, doesn't tell.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str = ""
    bos: bool = field(default=True, compare=False)

    @property
    def length(self) -> int:
        """Tokens of the longer side, prompt included."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class EncodedLabelled(EncodedPair):
    """A labelled completion as `chosen`, be it good or not, and as `rejected` one that answers another prompt (`mismatch`)."""

    label: bool = True


@dataclass(frozen=True)
class EncodedRanked(EncodedPair):
    """A pair for a reward model, each side cut on its own (where prompts then differ, `prompt` is empty), and its margin."""

    margin: float = 0.0


@dataclass(frozen=True)
class EncodedExample:
    """Ids and which of them are scored; `bos` as in `EncodedPair`."""

    ids: list[int]
    loss_mask: list[bool]
    where: str = ""
    bos: bool = field(default=True, compare=False)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


AnyPair = TypeVar("AnyPair", EncodedPair, EncodedLabelled)


def encode_pair(pair: PreferencePair, tokenizer: Tokenizer, template: str | None = None) -> EncodedPair:
    """Tokenise a pair by `chat_template`'s rule; `template` as in its `render`. Raises `DataError` with `where`."""
    prompt, chosen, _ = _completion(pair.prompt, pair.chosen, pair.where, tokenizer, template)
    _, rejected, _ = _completion(pair.prompt, pair.rejected, pair.where, tokenizer, template)
    return EncodedPair(prompt, chosen, rejected, pair.where, _has_bos(prompt + chosen, pair.prompt, tokenizer))


def encode_labelled(labelled: Labelled, tokenizer: Tokenizer) -> EncodedLabelled:
    """Tokenise a labelled completion as `encode_pair` does; `rejected` is the completion itself, until `mismatch`."""
    prompt, ids, _ = _completion(labelled.prompt, labelled.completion, labelled.where, tokenizer, None)
    bos = _has_bos(prompt + ids, labelled.prompt, tokenizer)
    return EncodedLabelled(prompt, ids, ids, labelled.where, bos, labelled.label)


def encode_scored(prompt: Text, completion: Text, tokenizer: Tokenizer, max_length: int, mode: TruncationMode = "keep_end",
                  where: str = "") -> tuple[list[int], list[int], bool]:
    """Ids of a prompt and a completion for a reward model, cut to `max_length`, and whether they had to be.

    `keep_end` cuts the prompt's beginning (but for its BOS) and, where that is not enough, the completion's; `keep_start` the
    completion's end, and then the prompt's. What closes the completion (EOS, or its end of turn) always stays: there the
    reward is read. Raises `DataError` with `where`.
    """
    _check_length(max_length, mode)
    head, ids, mask = _completion(prompt, completion, where, tokenizer, None)
    over = len(head) + len(ids) - max_length
    if over <= 0:
        return head, ids, False
    if mode == "keep_end":
        bos = int(_has_bos(head + ids, prompt, tokenizer))
        kept, left = (head + ids)[:bos] + (head + ids)[over + bos :], len(head) - min(over, max(0, len(head) - bos))
        return kept[:left], kept[left:], True
    closing = ids[max((i for i, scored in enumerate(mask) if scored), default=len(ids) - 1) :][-max_length:]
    kept = (head + ids)[: max_length - len(closing)]
    return kept[: len(head)], kept[len(head) :] + closing, True


def mismatch(rows: Sequence[EncodedLabelled], max_length: int) -> list[EncodedLabelled]:
    """The rows in their order, each with the next longer completion of a row with another prompt as `rejected`, cut to fit.

    The longest takes the shortest's. Where there is no other prompt it is just another row's, and of a single row its own.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].chosen))
    found = list(rows)
    for at, i in enumerate(order):
        others = [rows[j] for j in (*order[at + 1 :], *order[:at])]
        other = next((o for o in others if o.prompt != rows[i].prompt), (*others, rows[i])[0])
        found[i] = replace(rows[i], rejected=other.chosen[: max_length - len(rows[i].prompt)])
    return found


def encode_example(example: Example, tokenizer: Tokenizer, template: str | None = None) -> EncodedExample:
    """Tokenise an example: the completion's assistant turns are scored, of plain text all but BOS and the prompt."""
    prompt, ids, mask = _completion(example.prompt, example.completion, example.where, tokenizer, template)
    return _example(example, prompt, ids, mask, tokenizer)


def _example(example: Example, head: list[int], ids: list[int], mask: list[bool], tokenizer: Tokenizer) -> EncodedExample:
    bos = _has_bos(head + ids, example.prompt, tokenizer)
    return EncodedExample(head + ids, [False] * len(head) + mask, example.where, bos)


def encode_turns(example: Example, tokenizer: Tokenizer) -> list[EncodedExample]:
    """An example as `encode_example` gives it, or, where its template writes a turn differently once others follow it, one
    for each assistant turn of the completion, behind all that comes before it. Raises `DataError` with `where`.
    """
    prompt, completion = example.prompt, example.completion
    try:
        return [encode_example(example, tokenizer)]
    except NotCut:
        assert isinstance(prompt, tuple) and isinstance(completion, tuple)
        turns = [i for i, message in enumerate(completion) if message.role == "assistant"]
        parts = [(prompt + completion[:i], completion[i : i + 1]) for i in turns]
    encoded = [_completion(*part, example.where, tokenizer, None) for part in parts]
    return [_example(example, *parts, tokenizer) for parts in encoded]


def _completion(
    prompt: Text, completion: Text, where: str, tokenizer: Tokenizer, template: str | None
) -> tuple[list[int], list[int], list[bool]]:
    try:
        return render_completion(tokenizer, prompt, completion, template)
    except DataError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from error


def _has_bos(ids: list[int], prompt: Text, tokenizer: Tokenizer) -> bool:
    """Whether the first of the ids is a BOS (EOS for tokenizers without one).

    SmolLM2's, which adds none, is also what opens every turn of its chat template: then the first is no BOS.
    """
    bos = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return ids[:1] == [bos] and (isinstance(prompt, str) or tokenizer.adds_bos or bos not in ids[1:])


@dataclass
class TruncationReport:
    """How many records were looked at, and how many lost a part of the prompt, of a completion, or everything."""

    total: int = 0
    prompt_cut: int = 0
    completion_cut: int = 0
    dropped: int = 0
    split: int = 0

    def __str__(self) -> str:
        counts = {"prompts cut": self.prompt_cut, "completions cut": self.completion_cut,
                  "dropped": self.dropped, "split": self.split}  # fmt: skip
        parts = [f"{number:,} {name}" for name, number in counts.items() if number]
        return f"of {self.total:,} records: " + (", ".join(parts) or "none cut")


def truncate_pair(
    pair: AnyPair, max_length: int, mode: TruncationMode = "keep_end", report: TruncationReport | None = None
) -> AnyPair | None:
    """Shorten a pair so that prompt + longer completion ≤ `max_length` tokens; both sides keep one and the same prompt.

    `keep_end` cuts the prompt's beginning (but for its BOS, if it has one) down to a quarter of `max_length`, and then,
    where that is not enough, the completions' ends; a chat turn that is cut has lost its role. `keep_start` cuts only the
    completions' ends. None, counted as dropped, where no token of a completion would be left or nothing that tells chosen
    from rejected. A cut completion has no EOS.
    """
    _check_length(max_length, mode)
    report = TruncationReport() if report is None else report
    report.total += 1
    longest = max(len(pair.chosen), len(pair.rejected))
    if pair.length <= max_length:
        return pair
    prompt = pair.prompt
    if mode == "keep_end":
        room = max(max_length - longest, max_length // 4, 1)
        prompt = prompt if len(prompt) <= room else prompt[: pair.bos] + prompt[len(prompt) - room + pair.bos :]
    room = max_length - len(prompt)
    chosen, rejected = pair.chosen[: max(room, 0)], pair.rejected[: max(room, 0)]
    if not chosen or not rejected or (chosen == rejected and pair.chosen != pair.rejected):
        report.dropped += 1
        return None
    report.prompt_cut += len(prompt) < len(pair.prompt)
    report.completion_cut += longest > room
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def truncate_example(
    example: EncodedExample,
    max_length: int,
    mode: TruncationMode = "keep_start",
    report: TruncationReport | None = None,
) -> list[EncodedExample]:
    """Shorten an example to `max_length` tokens.

    A plain document (all is scored but for its BOS) is split into windows instead; each begins with the last token of the
    one before as unscored context, so that every token is scored once. Of others the end is cut (`keep_start`), or the
    beginning behind BOS (`keep_end`); the list is empty, and that is counted as dropped, if nothing scored is left.
    """
    _check_length(max_length, mode)
    report = TruncationReport() if report is None else report
    report.total += 1
    ids, mask = example.ids, example.loss_mask
    if len(ids) <= max_length:
        return [example]
    if all(mask[example.bos :]):
        report.split += 1
        starts = range(0, len(ids) - 1, max_length - 1)
        windows = [(ids[i : i + max_length], mask[i : i + max_length]) for i in starts]
        return [EncodedExample(part, [scored[0] and not i, *scored[1:]], example.where, example.bos and not i)
                for i, (part, scored) in enumerate(windows)]  # fmt: skip
    head = max_length if mode == "keep_start" else int(example.bos)
    kept = [*range(head), *range(len(ids) - max_length + head, len(ids))]
    cut = replace(example, ids=[ids[i] for i in kept], loss_mask=[mask[i] for i in kept])
    if not any(cut.loss_mask[1:]):
        report.dropped += 1
        return []
    scored_cut = sum(mask) - sum(cut.loss_mask)
    report.completion_cut += scored_cut > 0
    report.prompt_cut += len(ids) - max_length > scored_cut
    return [cut]


def _check_length(max_length: int, mode: str) -> None:
    if max_length < 2:
        raise ConfigError(f"max_length={max_length} is not allowed; allowed: 2 or more")
    if mode not in ("keep_end", "keep_start"):
        raise ConfigError(f"truncation mode {mode!r} is not allowed; allowed: 'keep_end', 'keep_start'")


class _Batch:
    """What both batches can: move to a device, and say how many rows they have."""

    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class PairBatch(_Batch):
    """Right-padded prompt + completion of both sides, `(b, n_c)` and `(b, n_r)`, and `(b,)` indices of the rows.

    The masks are bool: `*_mask` is True on real tokens, `*_prompt_mask` on the prompt's.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    chosen_prompt_mask: Tensor
    rejected_prompt_mask: Tensor
    index: Tensor


@dataclass(frozen=True)
class LabelledBatch(PairBatch):
    """Labelled completions as `chosen`, mismatched ones as `rejected`, and `(b,)` bool labels, True where desirable."""

    labels: Tensor


@dataclass(frozen=True)
class RankedBatch(PairBatch):
    """Pairs for a reward model, with their margins (b,)."""

    margin: Tensor


@dataclass(frozen=True)
class ExampleBatch(_Batch):
    """Right-padded ids `(b, n)`, bool masks of real and of scored tokens, and `(b,)` indices of the rows."""

    tokens: Tensor
    mask: Tensor
    loss_mask: Tensor
    index: Tensor


def collate_pairs(pairs: Sequence[EncodedPair], pad_id: int, index: Sequence[int] | None = None) -> PairBatch:
    """Pad pairs into a batch; `index` (default 0, 1, …) says which rows of the dataset they are."""
    chosen, chosen_mask = _pad([pair.prompt + pair.chosen for pair in pairs], pad_id)
    rejected, rejected_mask = _pad([pair.prompt + pair.rejected for pair in pairs], pad_id)
    prompts = torch.tensor([len(pair.prompt) for pair in pairs])[:, None]
    chosen_prompt, rejected_prompt = (torch.arange(side.shape[1]) < prompts for side in (chosen, rejected))
    rows = torch.tensor(range(len(pairs)) if index is None else index)
    return PairBatch(chosen, rejected, chosen_mask, rejected_mask, chosen_prompt, rejected_prompt, rows)


def collate_labelled(rows: Sequence[EncodedLabelled], pad_id: int, index: Sequence[int] | None = None) -> LabelledBatch:
    """Pad labelled completions into a batch; `index` as in `collate_pairs`."""
    return LabelledBatch(**vars(collate_pairs(rows, pad_id, index)), labels=torch.tensor([row.label for row in rows]))


def collate_ranked(rows: Sequence[EncodedRanked], pad_id: int, index: Sequence[int] | None = None) -> RankedBatch:
    """Pad pairs for a reward model into a batch; `index` as in `collate_pairs`."""
    return RankedBatch(**vars(collate_pairs(rows, pad_id, index)), margin=torch.tensor([row.margin for row in rows]))


def collate_examples(
    examples: Sequence[EncodedExample], pad_id: int, index: Sequence[int] | None = None
) -> ExampleBatch:
    """Pad examples into a batch; `index` as in `collate_pairs`."""
    tokens, mask = _pad([example.ids for example in examples], pad_id)
    loss_mask, _ = _pad([example.loss_mask for example in examples], False)
    rows = torch.tensor(range(len(examples)) if index is None else index)
    return ExampleBatch(tokens, mask, loss_mask.bool(), rows)


def _pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-pad rows to `(b, n)` long, with the bool mask of what is real."""
    width = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows]), torch.arange(width) < lengths


class Schedule:
    """Which rows each step sees: a pure function of (seed, epoch, step), the same in every process.

    Every row comes once an epoch; `len()` is the number of steps in an epoch. `batch_size` counts the rows of one rank, of
    `processes` (None: `world_size`): a step's rows depend on their product alone, and not on how many ranks share them now.
    The ranks' shards of a step are disjoint and differ by at most one row. Only an epoch's last step may be smaller, so
    small that a rank has no row of it. With `group_by_length`, rows of similar length share a step: they are sorted within
    shuffled runs of 50 steps, whose steps are then shuffled.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        group_by_length: bool = True,
        rank: int = 0,
        world_size: int = 1,
        processes: int | None = None,
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"batch_size={batch_size}, rank={rank} of {world_size}; allowed: ≥ 1, 0 ≤ rank < world")
        if len(lengths) < world_size:
            raise DataError(f"{len(lengths)} rows are too few for {world_size} processes; allowed: a row each or more")
        self.lengths, self.seed, self.group_by_length = lengths, seed, group_by_length
        self.rank, self.world_size = rank, world_size
        self._size = batch_size * (processes or world_size)
        if self._size < world_size:
            raise ConfigError(f"a step has {self._size} rows, too few for {world_size} processes; allowed: a row each")
        self._steps = -(-len(lengths) // self._size)
        self._cached: tuple[int, list[array.array]] = (-1, [])

    def __len__(self) -> int:
        return self._steps

    def batch(self, step: int) -> list[int]:
        """This rank's row indices in global step `step` ≥ 0, counted over all epochs."""
        epoch, position = divmod(step, self._steps)
        if self._cached[0] != epoch:
            self._cached = epoch, self._epoch(epoch)
        return self._cached[1][position][self.rank :: self.world_size].tolist()

    def _epoch(self, epoch: int) -> list[array.array]:
        """All steps of an epoch, each with the rows of all ranks."""
        draw = random.Random(f"{self.seed}:{epoch}")  # a string is hashed alike in every process
        order = array.array("I", range(len(self.lengths)))  # compact, and shuffled as a list would be
        draw.shuffle(order)
        last = (self._steps - 1) * self._size
        last += self._size if len(order) == last + self._size else 0  # a full last step is one like the others
        order, rest = order[:last], order[last:]
        if self.group_by_length:
            run = 50 * self._size
            runs = (sorted(order[i : i + run], key=self.lengths.__getitem__) for i in range(0, last, run))
            order = array.array("I", itertools.chain.from_iterable(runs))
        steps = [order[i : i + self._size] for i in range(0, last, self._size)]
        draw.shuffle(steps)
        return [*steps, rest] if len(rest) else steps


def mixture(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> Iterator[tuple[int, int]]:
    """The (dataset, row) pairs of one epoch over several datasets, in order; the number is the same every epoch.

    Weight 2 takes every row twice, 0.5 a half that is drawn anew by (seed, epoch), 1.5 every row and such a half.
    """
    if len(sizes) != len(weights) or any(not 0 <= weight < float("inf") for weight in weights):
        raise ConfigError(f"weights {list(weights)} for {len(sizes)} datasets; allowed: one number ≥ 0 for each")

    def passes(dataset: int) -> Iterator[Sequence[int]]:
        size, whole = sizes[dataset], int(weights[dataset])
        yield from itertools.repeat(range(size), whole)
        draw = random.Random(f"{seed}:{epoch}:{dataset}")
        yield sorted(draw.sample(range(size), round(size * (weights[dataset] - whole))))

    return ((dataset, row) for dataset in range(len(sizes)) for rows in passes(dataset) for row in rows)
