"""Batches: encoding, truncation that keeps its promises, padding, and schedules that are pure functions of the step."""

import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xalign.data.chat_template import ROLE_MARKERS, render_prompt
from xalign.data.collate import (
    EncodedExample,
    EncodedPair,
    Schedule,
    TruncationReport,
    collate_examples,
    collate_pairs,
    encode_example,
    encode_pair,
    mixture,
    truncate_example,
    truncate_pair,
)
from xalign.data.records import Example, Message, PreferencePair
from xalign.errors import ConfigError, DataError
from xalign.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer(ROLE_MARKERS)
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id
USER, ASSISTANT = TOKENIZER.markers["<|user|>"], TOKENIZER.markers["<|assistant|>"]
CHAT = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
PAIR = PreferencePair(CHAT, (Message("assistant", "d"),), (Message("assistant", "ef"),), where="f:1")


def test_encode_pair_by_hand():
    encoded = encode_pair(PreferencePair("ab", "c", "de", where="f:7"), TOKENIZER)
    assert encoded == EncodedPair([BOS, 97, 98], [99, EOS], [100, 101, EOS], "f:7") and encoded.length == 6
    encoded = encode_pair(PAIR, TOKENIZER)
    assert encoded.prompt == [BOS, USER, 97, ASSISTANT, 98, EOS, USER, 99, ASSISTANT]
    assert encoded.prompt == render_prompt(TOKENIZER, CHAT).ids
    assert (encoded.chosen, encoded.rejected) == ([100, EOS], [101, 102, EOS])


def test_encode_example_by_hand():
    assert encode_example(Example("", "ab"), TOKENIZER) == EncodedExample([BOS, 97, 98, EOS], [False, True, True, True])
    assert encode_example(Example("a", "b"), TOKENIZER).loss_mask == [False, False, True, True]
    chat = encode_example(Example((), (*CHAT, Message("assistant", "d"))), TOKENIZER)
    assert chat.ids == [BOS, USER, 97, ASSISTANT, 98, EOS, USER, 99, ASSISTANT, 100, EOS]
    assert chat.loss_mask == [False] * 4 + [True] * 2 + [False] * 3 + [True] * 2
    last = encode_example(Example(CHAT, (Message("assistant", "d"),)), TOKENIZER)
    assert last.ids == chat.ids and last.loss_mask == [False] * 9 + [True] * 2


def test_encoding_errors_say_where():
    for encode, record in ((encode_pair, PAIR), (encode_example, Example(CHAT, PAIR.chosen, "f:1"))):
        with pytest.raises(DataError, match=r"^f:1: the chat template failed: no$"):
            encode(record, TOKENIZER, "{{ raise_exception('no') }}")


def test_truncate_pair_by_hand():
    pair = EncodedPair([1, 10, 11, 12, 13], [20, 21, 2], [30, 2])
    report = TruncationReport()
    assert truncate_pair(pair, 8, report=report) is pair
    assert truncate_pair(pair, 6, "keep_end", report) == EncodedPair([1, 12, 13], [20, 21, 2], [30, 2])
    assert truncate_pair(pair, 2, "keep_end", report) == EncodedPair([1], [20], [30])
    assert truncate_pair(pair, 6, "keep_start", report) == EncodedPair([1, 10, 11, 12, 13], [20], [30])
    assert truncate_pair(pair, 5, "keep_start", report) is None
    assert report == TruncationReport(total=5, prompt_cut=2, completion_cut=2, dropped=1)
    assert str(report) == "of 5 records: 2 prompts cut, 2 completions cut, 1 dropped"
    assert str(TruncationReport(total=1)) == "of 1 records: none cut"
    same_start = EncodedPair([1], [20, 21, 2], [20, 22, 2])
    assert truncate_pair(same_start, 2) is None  # nothing is left that tells them apart
    long = EncodedPair([1, *range(10, 30)], [*range(40, 60), 2], [30, 2])
    assert truncate_pair(long, 12) == EncodedPair([1, 28, 29], list(range(40, 49)), [30, 2])  # a quarter stays prompt
    for wrong in (lambda: truncate_pair(pair, 1), lambda: truncate_pair(pair, 8, "middle")):
        with pytest.raises(ConfigError, match="allowed"):
            wrong()


IDS = st.integers(3, 9)
PAIRS = st.builds(
    lambda p, c, r: EncodedPair([1, *p], [*c, 2], [*r, 2]),
    st.lists(IDS, max_size=12), st.lists(IDS, min_size=1, max_size=12), st.lists(IDS, min_size=1, max_size=12),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.integers(2, 30), st.sampled_from(["keep_end", "keep_start"]))
def test_truncation_keeps_its_promises(pair, length, mode):
    report = TruncationReport()
    cut = truncate_pair(pair, length, mode, report)
    assert report.total == 1
    if cut is None:
        assert report.dropped == 1 and pair.length > length
        return
    assert cut.length <= length and cut.chosen and cut.rejected and cut.prompt[0] == 1
    assert pair.chosen[: len(cut.chosen)] == cut.chosen and pair.rejected[: len(cut.rejected)] == cut.rejected
    assert pair.prompt[len(pair.prompt) - len(cut.prompt) + 1 :] == cut.prompt[1:]
    assert report.prompt_cut == (cut.prompt != pair.prompt)
    assert report.completion_cut == ((cut.chosen, cut.rejected) != (pair.chosen, pair.rejected))
    if mode == "keep_start":
        assert cut.prompt == pair.prompt
    if report.completion_cut:
        assert cut.length == length  # no token is lost without need


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(2, 12))
def test_documents_are_split_so_that_every_token_is_scored_once(size, length):
    document = EncodedExample(list(range(size)), [False] + [True] * (size - 1), "f:1")
    report = TruncationReport()
    windows = truncate_example(document, length, report=report)
    scored = [i for w in windows for i, s in zip(w.ids, w.loss_mask, strict=True) if s]
    assert scored == list(range(1, size)) and all(len(w.ids) <= length for w in windows)
    assert all(not w.loss_mask[0] and w.where == "f:1" for w in windows)
    assert (report.split, report.total) == (int(size > length), 1)


def test_truncate_example_by_hand():
    example = EncodedExample([1, 5, 6, 7, 8, 2], [False, False, False, True, True, True])
    report = TruncationReport()
    assert truncate_example(example, 6, report=report) == [example]
    assert truncate_example(example, 4, report=report) == [EncodedExample([1, 5, 6, 7], [False, False, False, True])]
    assert truncate_example(example, 4, "keep_end", report) == [EncodedExample([1, 7, 8, 2], [False, True, True, True])]
    assert truncate_example(example, 3, report=report) == []
    assert report == TruncationReport(total=4, prompt_cut=1, completion_cut=1, dropped=1)


def test_only_a_bos_is_kept_in_front():
    """A first token that is no BOS is a piece of the prompt like the others."""
    pair = EncodedPair([5, 10, 11, 12, 13], [20, 21, 2], [30, 2], bos=False)
    assert truncate_pair(pair, 6) == EncodedPair([11, 12, 13], [20, 21, 2], [30, 2])
    assert not truncate_pair(pair, 6).bos and truncate_pair(pair, 2) == EncodedPair([13], [20], [30])
    example = EncodedExample([5, 6, 7, 8, 9], [False, False, False, True, True], bos=False)
    assert truncate_example(example, 3, "keep_end") == [EncodedExample([7, 8, 9], [False, True, True])]
    answer = EncodedExample([5, 6, 7, 8], [False, True, True, True], bos=False)  # a prompt of one token is no BOS,
    assert truncate_example(answer, 3) == [EncodedExample([5, 6, 7], [False, True, True])]  # and this no document
    document = EncodedExample([5, 6, 7, 8], [True] * 4, bos=False)
    assert [w.ids for w in truncate_example(document, 3)] == [[5, 6, 7], [7, 8]]


@pytest.mark.parametrize("kind", ["adds", "adds none", "has none", "opens turns"])
def test_encoding_tells_whether_there_is_a_bos(kind):
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    tokenizer.adds_bos = kind == "adds"
    tokenizer.chat_template = None
    if kind == "has none":
        tokenizer.bos_id = None
    if kind == "opens turns":  # SmolLM2's template, whose turns open with its BOS
        tokenizer.chat_template = ("{% for m in messages %}{{ bos_token + m.role + ':' + m.content + eos_token }}{% endfor %}"
                                   "{% if add_generation_prompt %}{{ bos_token + 'assistant:' }}{% endif %}")
    assert encode_pair(PreferencePair("ab", "c", "d"), tokenizer).bos == (kind == "adds")
    assert encode_pair(PAIR, tokenizer).bos == (kind in ("adds", "adds none"))  # our template writes it
    assert encode_example(Example("ab", "c"), tokenizer).bos == (kind == "adds")
    document = encode_example(Example("", "abcdefgh"), tokenizer)  # begins with BOS, or EOS for want of one
    assert document.bos and len(truncate_example(document, 6)) == 2
    cut = truncate_pair(encode_pair(PreferencePair("x" * 20 + "END", "c", "d"), tokenizer), 6)
    assert tokenizer.decode(cut.prompt).endswith("END") and (cut.prompt[0] == tokenizer.bos_id) == (kind == "adds")
    assert len(cut.prompt) == 4


def test_collate_pairs_by_hand():
    batch = collate_pairs([EncodedPair([1, 5], [6, 2], [2]), EncodedPair([1], [7, 8, 9, 2], [6, 2])], PAD, [4, 9])
    assert batch.chosen.tolist() == [[1, 5, 6, 2, PAD], [1, 7, 8, 9, 2]] and batch.chosen.dtype == torch.long
    assert batch.rejected.tolist() == [[1, 5, 2], [1, 6, 2]]
    assert batch.chosen_mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert batch.rejected_mask.all() and batch.rejected_mask.dtype == torch.bool
    assert batch.chosen_prompt_mask.tolist() == [[True, True, False, False, False], [True] + [False] * 4]
    assert batch.rejected_prompt_mask.tolist() == [[True, True, False], [True, False, False]]
    assert batch.index.tolist() == [4, 9] and len(batch) == 2
    moved = batch.to("meta")
    assert type(moved) is type(batch) and moved.chosen.device.type == moved.index.device.type == "meta"


def test_pads_are_told_by_length_not_by_value():
    """traps.md 8: a pad that is EOS must not blank anything real."""
    batch = collate_pairs([EncodedPair([1], [2, 6, 2], [2]), EncodedPair([1], [2], [2])], pad_id=2)
    assert batch.chosen_mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_collate_examples_by_hand():
    batch = collate_examples([EncodedExample([1, 5], [False, True]), EncodedExample([1, 6, 2], [False, True, True])], 0)
    assert batch.tokens.tolist() == [[1, 5, 0], [1, 6, 2]]
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.loss_mask.tolist() == [[False, True, False], [False, True, True]]
    assert batch.loss_mask.dtype == batch.mask.dtype == torch.bool
    assert batch.index.tolist() == [0, 1] and len(batch.to("cpu")) == 2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=120), st.integers(1, 7), st.integers(1, 4), st.booleans())
def test_every_row_once_an_epoch_on_exactly_one_rank(lengths, batch_size, world_size, group):
    if len(lengths) < world_size:
        with pytest.raises(DataError, match="too few for"):
            Schedule(lengths, batch_size, 0, group, 0, world_size)
        return
    ranks = [Schedule(lengths, batch_size, 3, group, rank, world_size) for rank in range(world_size)]
    steps = len(ranks[0])
    assert {len(rank) for rank in ranks} == {steps}
    for epoch in range(2):
        batches = [[rank.batch(step) for rank in ranks] for step in range(epoch * steps, (epoch + 1) * steps)]
        assert sorted(row for step in batches for rows in step for row in rows) == list(range(len(lengths)))
        for step in batches:
            assert max(map(len, step)) - min(map(len, step)) <= 1
        assert all(len(rows) == batch_size for step in batches[:-1] for rows in step) and all(batches[0])
    assert steps == math.ceil(len(lengths) / batch_size / world_size)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=5, max_size=120), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5))
def test_a_steps_rows_are_the_same_for_any_number_of_ranks(lengths, batch_size, processes, world_size):
    if batch_size * processes < world_size:
        with pytest.raises(ConfigError, match=f"step has {batch_size * processes} rows, too few for {world_size} processes"):
            Schedule(lengths, batch_size, 3, world_size=world_size, processes=processes)
        return
    began = [Schedule(lengths, batch_size, 3, rank=rank, world_size=processes) for rank in range(processes)]
    now = [Schedule(lengths, batch_size, 3, True, rank, world_size, processes) for rank in range(world_size)]
    for step in range(2 * len(began[0])):
        one, other = (sorted(row for rank in ranks for row in rank.batch(step)) for ranks in (began, now))
        assert one == other


def test_schedule_is_a_pure_function_of_seed_and_step():
    lengths = [i * 7 % 31 + 1 for i in range(100)]
    schedule = Schedule(lengths, 8, seed=5)
    run = [schedule.batch(step) for step in range(3 * len(schedule))]
    backwards = [Schedule(lengths, 8, seed=5).batch(step) for step in reversed(range(3 * len(schedule)))]
    assert run == backwards[::-1]
    assert run[: len(schedule)] != run[len(schedule) : 2 * len(schedule)]
    assert run != [Schedule(lengths, 8, seed=6).batch(step) for step in range(len(run))]
    code = (
        "from xalign.data.collate import Schedule;"
        "print(Schedule([i * 7 % 31 + 1 for i in range(100)], 8, seed=5).batch(20))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == str(run[20])


def test_grouping_by_length_saves_padding():
    lengths = torch.randint(1, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(group):
        schedule = Schedule(lengths, 10, 0, group)
        return sum(max(lengths[i] for i in rows) * len(rows) for rows in map(schedule.batch, range(len(schedule))))

    assert padded(True) < 1.1 * sum(lengths) < padded(False)
    first = [max(lengths[i] for i in Schedule(lengths, 10, 0).batch(step)) for step in range(20)]
    assert first != sorted(first)  # long and short batches take turns


def test_bad_schedules():
    for arguments in ((0, 0, True, 0, 1), (1, 0, True, 2, 2), (1, 0, True, -1, 2)):
        with pytest.raises(ConfigError, match="allowed"):
            Schedule([1, 2, 3], *arguments)
    with pytest.raises(DataError, match="0 rows are too few"):
        Schedule([], 4, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 3)), min_size=1, max_size=4), st.integers(0, 5))
def test_mixture_takes_each_row_by_weight(datasets, epoch):
    sizes, weights = zip(*datasets, strict=True)
    rows = list(mixture(sizes, weights, 1, epoch))
    assert rows == list(mixture(sizes, weights, 1, epoch)) and len(rows) == len(list(mixture(sizes, weights, 1, epoch + 1)))
    counts = Counter(rows)
    for dataset, (size, weight) in enumerate(datasets):
        for row in range(size):
            assert math.floor(weight) <= counts[dataset, row] <= math.ceil(weight)
    assert len(rows) == sum(s * int(w) + round(s * (w - int(w))) for s, w in datasets)


def test_mixture_by_hand():
    rows = list(mixture([3, 4], [2, 0.5], seed=0, epoch=0))
    assert [row for row in rows if row[0] == 0] == [(0, 0), (0, 1), (0, 2)] * 2
    assert len([row for row in rows if row[0] == 1]) == 2
    halves = {tuple(mixture([40], [0.5], 0, epoch)) for epoch in range(3)}
    assert len(halves) == 3  # another half every epoch
    for weights in ([1], [1, -1], [1, float("nan")]):
        with pytest.raises(ConfigError, match="allowed"):
            mixture([3, 4], weights, 0, 0)
