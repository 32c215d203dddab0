"""Encoded records on disk: what goes in comes out, a half-written store is never used, and memory stays flat."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xalign.data.collate import EncodedExample, EncodedPair, Schedule, TruncationReport, encode_example
from xalign.data.records import Example
from xalign.data.store import open_store, write_store
from xalign.errors import DataError
from xalign.prepare import (
    HELD_OUT,
    data_digest,
    encode_examples,
    encode_pairs,
    fingerprint,
    hold_out,
    in_order,
    key_hash,
    on_disk,
)
from xalign.stages import thinned
from xalign.tokenizers import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
IDS = st.lists(st.integers(0, 70_000), min_size=1, max_size=6)
PAIRS = st.lists(st.builds(EncodedPair, IDS, IDS, IDS), min_size=1, max_size=8)
SCORED = st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=9)
EXAMPLES = st.lists(SCORED, min_size=1, max_size=8).map(
    lambda rows: [EncodedExample([i for i, _ in row], [s for _, s in row]) for row in rows])


@given(PAIRS | EXAMPLES, st.data())
def test_what_goes_in_comes_out(tmp_path_factory, rows, data):
    folder, kind = tmp_path_factory.mktemp("s") / "tokens", type(rows[0])
    write_store(folder, {"a": (1, 2)}, kind, iter(rows), 70_001 if kind is EncodedPair else 301, lambda: "a note")
    store, note = open_store(folder, {"a": (1, 2)}, kind)
    assert list(store) == rows and note == "a note" and len(store) == len(rows)
    assert list(store.lengths) == [row.length for row in rows]
    i, j = sorted((data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9))))
    assert list(store[i:j]) == rows[i:j] and list(store[i:j].lengths) == [row.length for row in rows[i:j]]
    assert store[-1] == rows[-1] == store[np.int64(len(rows) - 1)]
    with pytest.raises(IndexError):
        store[len(rows)]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["dtype"] == ("uint32" if kind is EncodedPair else "uint16")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tokens"]


ROWS = [EncodedPair([1, 2], [3], [4, 5]), EncodedPair([1], [2], [3])]
DAMAGES = {
    "ids cut": lambda f: (f / "ids.bin").write_bytes((f / "ids.bin").read_bytes()[:-2]),
    "lengths cut": lambda f: (f / "lengths.bin").write_bytes((f / "lengths.bin").read_bytes()[:-4]),
    "a row less": lambda f: (f / "lengths.bin").write_bytes((f / "lengths.bin").read_bytes()[:-12]),
    "no meta": lambda f: (f / "meta.json").unlink(),
    "half a meta": lambda f: (f / "meta.json").write_text('{"key": {'),
    "no ids": lambda f: (f / "ids.bin").unlink(),
    "empty ids": lambda f: (f / "ids.bin").write_bytes(b""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_is_not_used(tmp_path, name):
    write_store(tmp_path / "s", {}, EncodedPair, ROWS, 10)
    assert open_store(tmp_path / "s", {}, EncodedPair) is not None
    DAMAGES[name](tmp_path / "s")
    assert open_store(tmp_path / "s", {}, EncodedPair) is None
    write_store(tmp_path / "s", {}, EncodedPair, ROWS, 10)
    assert list(open_store(tmp_path / "s", {}, EncodedPair)[0]) == ROWS, "and made anew over the damaged one"


def test_a_store_is_for_its_key_and_kind(tmp_path):
    assert open_store(tmp_path / "s", {}, EncodedPair) is None
    write_store(tmp_path / "s", {"data": "x"}, EncodedPair, ROWS, 10)
    for key, kind in (({"data": "y"}, EncodedPair), ({}, EncodedPair), ({"data": "x", "more": None}, EncodedPair),
                      ({"data": "x"}, EncodedExample)):
        assert open_store(tmp_path / "s", key, kind) is None


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    write_store(tmp_path / "s", {}, EncodedPair, ROWS, 10)

    def broken():
        yield ROWS[1]
        raise DataError("f:2: bad")

    for rows, error in ((broken(), DataError), ([EncodedPair([70_000], [1], [2])], OverflowError), ([], AssertionError)):
        with pytest.raises(error):
            write_store(tmp_path / "s", {}, EncodedPair, rows, 10)
    assert list(open_store(tmp_path / "s", {}, EncodedPair)[0]) == ROWS and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """Where the disk has no room, the system's error has no name of a file."""
    real = open
    monkeypatch.setattr("builtins.open", lambda p, *a, **k: real("/dev/full" if str(p).endswith(".bin") else p, *a, **k))
    with pytest.raises(OSError, match="No space left") as error:
        write_store(tmp_path / "s", {}, EncodedPair, ROWS, 10)
    assert error.value.filename == str(tmp_path / "s") and list(tmp_path.iterdir()) == []


def test_a_store_is_made_once_for_the_same_tokenizer_and_truncation(tmp_path, capsys):
    tokenizer, other = ByteTokenizer(), ByteTokenizer(("<|user|>",))
    calls = []

    def source():
        calls.append(1)
        return iter([Example("a", "b" * n, f"f:{n}") for n in range(1, 9)])

    def store(tokenizer=tokenizer, length=6, mode="keep_start", **key):
        return on_disk(tmp_path / "s", EncodedExample, encode_examples, source, tokenizer, length, mode, "to imitate", key=key)

    first = store()
    assert first[0].ids == encode_example(Example("a", "b"), tokenizer).ids and len(first) == 8
    assert list(store()) == list(first) and len(calls) == 1
    warning, *told = capsys.readouterr().err.splitlines()
    assert told == ["to imitate: of 8 records: 5 completions cut"] * 2, "also said of what is there already"
    assert warning.startswith("warning: 62.5% of the records are longer than --max-length")
    for changed in ({"tokenizer": other}, {"length": 5}, {"mode": "keep_end"}, {"data": "other"}):
        store(**changed)
    assert len(calls) == 5
    other.chat_template = "{{ messages }}"
    assert len({fingerprint(t) for t in (tokenizer, ByteTokenizer(("<|user|>",)), other)}) == 3


def test_nothing_left_is_an_error():
    tokenizer = ByteTokenizer()
    with pytest.raises(DataError, match="nothing is left to imitate after truncation to 3 tokens"):
        list(encode_examples([Example("abcdef", "x")], tokenizer, 3, "keep_start", TruncationReport()))
    with pytest.raises(DataError, match="no pair is left after truncation"):
        list(encode_pairs([], tokenizer, 3, "keep_start", TruncationReport()))


# -- which records ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60).filter(lambda keys: len(set(keys)) > 1))
def test_about_a_tenth_of_the_keys_is_held_out(keys):
    last = hold_out(keys, 10)
    held = {k for k in keys if k <= last}
    assert len(held) == max(1, len(set(keys)) // 10) < len(set(keys))


def test_no_more_is_held_out_than_an_evaluation_uses():
    keys = [key_hash(str(i), 0) for i in range(20 * HELD_OUT)]
    last = hold_out(keys, 10)
    assert len(set(keys)) == len(keys) and sum(k <= last for k in keys) == HELD_OUT
    assert hold_out([1, 2], 10) == 1
    with pytest.raises(DataError, match="1 different prompt can't be split"):
        hold_out([5, 5], 10)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), max_size=20))
def test_rows_in_order_whatever_the_order(rows):
    files = [lambda: iter("abcde"), lambda: iter("vwxyz")]
    assert list(in_order(files, rows)) == [("abcde", "vwxyz")[file][row] for file, row in rows]


@given(st.lists(st.text(max_size=5), max_size=60), st.integers(1, 40))
def test_a_tokenizers_sample_is_spread_evenly_and_bounded(texts, limit):
    sample = thinned(iter(texts), limit)
    assert sum(map(len, sample)) <= limit
    cut = [text[:limit] for text in texts]
    step = next(n for n in (1, 2, 4, 8, 16, 32, 64) if sample == cut[::n])
    assert step == 1 or sum(map(len, cut[:: step // 2])) > limit, "no thinner than it must be"


def test_schedule_takes_a_stores_lengths(tmp_path):
    rows = [EncodedPair([1], [2] * (1 + i % 5), [3] * (1 + i % 3)) for i in range(57)]
    write_store(tmp_path / "s", {}, EncodedPair, rows, 10)
    store, _ = open_store(tmp_path / "s", {}, EncodedPair)
    a, b = Schedule(store.lengths, 4, 1), Schedule([row.length for row in rows], 4, 1)
    assert [a.batch(i) for i in range(40)] == [b.batch(i) for i in range(40)]


def test_a_digest_is_of_what_the_files_hold(tmp_path, monkeypatch):
    """Also of a hub's data set, by its files in the cache; the name alone counts for nothing."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.parquet"
    one.write_text("a")
    two.write_text("b")
    monkeypatch.setattr("xalign.hub.dataset_files", lambda name: [one, two] if name == "some/data:train" else [two])
    assert data_digest(["some/data:train"]) == data_digest([str(one), str(two)]) != data_digest([str(two), str(one)])
    assert data_digest(["some/other"]) == data_digest([two]) != data_digest([])
    before = data_digest([one])
    one.write_text("c")
    assert data_digest([one]) != before
    for missing, what in ((tmp_path / "nope.jsonl", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=f"{missing}: can't be read \\({what}\\)"):
            data_digest([one, missing])


# -- whole runs ------------------------------------------------------------------------------------------------------


SMALL = {"dim": 16, "depth": 1, "heads": 2, "vocab_size": 400, "sft_epochs": 1e-6, "max_steps": 3, "batch_size": 8,
         "eval_steps": 0, "eval_prompts": 2, "eval_samples": 1, "eval_max_new_tokens": 4, "max_length": 128}


def settings(folder: Path, lines: int) -> Path:
    """A configuration for `lines` pairs of the toy world, repeated under ever new prompts, about 900 bytes each."""
    source = [json.loads(line) for line in (ROOT / "data/test.jsonl").read_text().splitlines()[:100]]
    with open(folder / "data.jsonl", "w") as file:
        for i in range(lines):
            pair = source[i % 100]
            told = {"prompt": f"{i}: {pair['prompt']}", "chosen": 2 * pair["chosen"], "rejected": 2 * pair["rejected"]}
            file.write(json.dumps(told) + "\n")
    (folder / "c.json").write_text(json.dumps(SMALL | {"dataset": str(folder / "data.jsonl")}))
    return folder / "c.json"


def start(config: Path, **options) -> subprocess.Popen:
    command = [sys.executable, ROOT / "train_dpo.py", "--config", config, "--output-dir", config.parent / "run"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_while_encoding(tmp_path, number):
    """A half-written store is thrown away, and the same command goes on to the end."""
    config, run = settings(tmp_path, 4_000), tmp_path / "run"
    with start(config, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        deadline = time.monotonic() + 100
        while not list(run.glob(".tokens.*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in told
    assert bool(list(run.glob(".tokens.*.tmp"))) == (number == signal.SIGKILL) and not (run / "tokens").exists()
    with start(config) as again:
        _, told = again.communicate()
    assert again.returncode == 0, told
    assert not [p for p in run.iterdir() if "tokens" in p.name] and (run / "report.md").exists()


PEAK = """
import re, sys
from pathlib import Path
from xalign.cli import main
main(sys.argv[1:], "dpo")
# not getrusage's ru_maxrss: that begins with what the parent process had
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """300 MB of pairs need less than 150 MB more than 1 MB of pairs, from scratch to the report."""
    peaks = []
    for lines in (1_500, 350_000):
        folder = tmp_path / str(lines)
        folder.mkdir()
        config = settings(folder, lines)
        done = subprocess.run([sys.executable, "-c", PEAK, "--config", config, "--output-dir", folder / "run"], text=True,
                              env=ENVIRONMENT, cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
        size = (folder / "data.jsonl").stat().st_size
        (folder / "data.jsonl").unlink()
    assert size > 300e6
    assert peaks[1] - peaks[0] < 150e6, peaks
