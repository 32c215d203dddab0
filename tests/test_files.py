"""Files to raw records: parquet equals JSON lines, long lines and cut files are refused, big files stream."""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from xalign.data import files
from xalign.data.files import raw_records
from xalign.data.sources import iter_pairs, read_examples, read_labelled, read_pairs, read_prompts
from xalign.errors import DataError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
filled = text.map(lambda t: f"a{t}")


def turn(role, content):
    return st.fixed_dictionaries({"role": st.just(role), "content": content})


standard = st.fixed_dictionaries({"prompt": text, "chosen": filled, "rejected": filled, "margin": st.none() | st.floats(-9, 9)})
conversation = st.tuples(st.lists(turn("user", text), min_size=1, max_size=3), filled, filled).map(
    lambda c: {"chosen": [*c[0], {"role": "assistant", "content": c[1]}],
               "rejected": [*c[0], {"role": "assistant", "content": c[2]}], "score_chosen": 8.0, "score_rejected": None})
labelled = st.fixed_dictionaries({"prompt": text, "completion": filled, "label": st.booleans()})
READERS = [(standard, read_pairs), (conversation, read_pairs), (standard, read_examples), (labelled, read_labelled)]


def plain(records):
    """What a reader gave, without the place that it came from."""
    return [{k: v for k, v in vars(record).items() if k != "where"} for record in records]


@pytest.mark.parametrize(("records", "read"), READERS, ids=["standard", "conversational", "examples", "labelled"])
def test_parquet_gives_what_json_lines_give(records, read):
    keep = {"identical": "keep"} if read in (read_pairs, read_labelled) else {}

    @given(st.lists(records, min_size=1, max_size=6))
    def check(rows):
        with tempfile.TemporaryDirectory() as folder:
            a, b, c = (f"{folder}/{name}" for name in ("a.jsonl", "b.parquet", "c.json.gz"))
            Path(a).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            parquet.write_table(pyarrow.Table.from_pylist(rows), b, row_group_size=2)
            Path(c).write_bytes(gzip.compress(json.dumps({"data": rows}).encode()))
            one, two, three = (read(name, **keep) for name in (a, b, c))
            assert plain(one) == plain(two) == plain(three)
            assert [r.where for r in two] == [r.where.replace(a, b) for r in one]

    check()


def test_parquet_as_datasets_writes_it(tmp_path):
    """Large strings, lists of structs, a null, a dictionary-encoded column: all become plain Python."""
    from datasets import Dataset

    rows = [{"prompt": "p", "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": f"é{i}"}],
             "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "no"}], "score_chosen": 7.5,
             "score_rejected": 7 if i else None, "prompt_id": "x"} for i in range(3)]
    Dataset.from_list(rows).to_parquet(path := str(tmp_path / "u.parquet"))
    pairs = read_pairs(path)
    assert [p.chosen[0].content for p in pairs] == ["é0", "é1", "é2"] and [p.margin for p in pairs] == [None, 0.5, 0.5]
    assert [p.where for p in pairs] == [f"{path}:{i}" for i in (1, 2, 3)]
    Dataset.from_list(rows).to_json(lines := str(tmp_path / "u.jsonl"))
    assert plain(read_pairs(lines)) == plain(pairs)
    table = pyarrow.table({"text": pyarrow.array(["a", "a", "b"]).dictionary_encode()})
    parquet.write_table(table, path := tmp_path / "d.parquet")
    assert read_prompts(path) == ["a", "a", "b"]


def test_only_wanted_columns_of_a_parquet_are_read(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"], "embedding": [[1.0, 2.0]]}), path := tmp_path / "d.parquet")
    assert list(raw_records(path, ("text",))) == [(f"{path}:1", {"text": "a", "embedding": None})]
    assert list(raw_records(path)) == [(f"{path}:1", {"text": "a", "embedding": [1.0, 2.0]})]


def fails(path, message, start=None):
    with pytest.raises(DataError, match=message) as error:
        list(iter_pairs(path))
    assert str(error.value).startswith(start or f"{path}:") and "\n" not in str(error.value)


def test_bad_parquets(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "chosen": random.Random(i).randbytes(40).hex(), "rejected": "r"} for i in range(2000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path := tmp_path / "d.parquet", row_group_size=100)
    whole = path.read_bytes()
    for part in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        fails(path, "not a sound parquet file, perhaps cut short")
    path.write_bytes(whole[:20000] + bytes(len(whole) - 60000) + whole[-40000:])  # a footer that is whole, pages that are not
    fails(path, r"d\.parquet:\d+: not a sound parquet file")
    path.write_bytes(b"x" * 100)
    fails(path, "not a sound parquet file")
    fails(tmp_path / "no.parquet", r"can't be read \(No such file")
    (tmp_path / "dir.parquet").mkdir()
    fails(tmp_path / "dir.parquet", r"can't be read \(Is a directory")
    fails(tmp_path, r"can't be read \(Is a directory\); allowed: a file \.jsonl")
    parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), path)
    fails(path, "none of the columns 'a', 'b' is one that is read; allowed: prompt, chosen")
    parquet.write_table(pyarrow.table({"chosen": ["a"], "b": [2]}), path)
    fails(path, r":1: the record has no 'rejected', only the keys 'chosen', 'b'")
    parquet.write_table(pyarrow.table({"chosen": [b"a"], "rejected": [b"b"]}), path)
    fails(path, r":1: 'chosen' must be text or a list of messages, not bytes")
    parquet.write_table(pyarrow.table({"chosen": pyarrow.array([], pyarrow.string())}), path)
    fails(path, "the file holds no record")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(path, r"reading parquet needs pyarrow: pip install 'xalign\[parquet\]'")


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 5, names=["chosen", "rejected", "x", "chosen", "x"])
    parquet.write_table(table, path := tmp_path / "d.parquet")
    fails(path, "two columns are called 'chosen'; allowed: each name once")
    assert len(list(raw_records(path, ("rejected",)))) == 1  # one that isn't read does no harm


def test_one_record_is_a_json_file(tmp_path):
    record = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for name, data in (("a.json", json.dumps(record)), ("b.json", json.dumps(record, indent=2))):
        (path := tmp_path / name).write_text(data)
        assert [p.where for p in read_pairs(path)] == [f"{path}:1"]
    path.write_text('{"version": 1, "pairs": []}')
    fails(path, "holds the keys 'version', 'pairs'; allowed: a list of records")


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "f.jsonl")
    os.symlink("/dev/zero", tmp_path / "zero.jsonl")
    os.mkfifo(tmp_path / "f.parquet")
    for name in ("f.jsonl", "f.parquet", "zero.jsonl"):
        fails(tmp_path / name, r"can't be read \(a pipe or device\); allowed: a file \.jsonl")


def test_bad_lines_can_be_told_and_left(tmp_path):
    lines = ['{"text": "a"}', "broken", "", "[1]", "null", '{"text": "b"}', '{"text":']
    for name in ("d.jsonl", "d.json"):
        (path := tmp_path / name).write_text("\n".join(['{"text": "0"}', *lines] if name == "d.json" else lines))
        errors = []
        good = [value["text"] for _, value in raw_records(path, (), lambda *place: errors.append(place))]  # noqa: B023
        bad = [(where, str(error)) for where, error in errors]
        shift = int(name == "d.json")
        assert good == ["0"] * shift + ["a", "b"] and [w for w, _ in bad] == [f"{path}:{n + shift}" for n in (2, 4, 5, 7)]
        assert all(error.startswith(f"{where}: ") for where, error in bad) and "not list" in bad[1][1]
    path = tmp_path / "bad.jsonl"
    path.write_text("x\n")
    assert list(raw_records(path, (), lambda where, error: None)) == []
    fails(path, ":1: not valid JSON")


def test_a_line_longer_than_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_LIMIT", 2**20)
    good = json.dumps({"chosen": "a", "rejected": "b"})
    for name in ("d.jsonl", "d.jsonl.gz", "d.txt", "d.json"):
        data = f"{good}\n{'x' * 2**21}\n".encode()
        (path := tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        with pytest.raises(DataError, match="a line of more than 1 MB") as error:
            list(raw_records(path))
        assert str(error.value).startswith(f"{path}:2: ")
    limit = json.dumps({"text": "x" * (2**20 - 12)})
    assert len(limit) == 2**20
    (path := tmp_path / "limit.jsonl").write_text(limit)
    assert len(list(raw_records(path))) == 1


def test_hub_names(tmp_path, monkeypatch):
    """All files of a split, in their order; the network's errors are `hub`'s."""
    from xalign import hub

    for i in (0, 1):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": f"t{i}"}))
    asked = []
    monkeypatch.setattr(hub, "dataset_files", lambda name: asked.append(name) or [tmp_path / "0.jsonl", tmp_path / "1.jsonl"])
    assert read_prompts("owner/name:test") == ["t0", "t1"] and asked == ["owner/name:test"]
    assert [where for where, _ in raw_records("owner/name")] == [f"{tmp_path}/0.jsonl:1", f"{tmp_path}/1.jsonl:1"]
    fails("no_such_file", r"can't be read \(No such file")
    fails("owner/no.jsonl", r"can't be read \(No such file")
    fails("./owner/name", r"can't be read \(No such file")
    assert len(asked) == 2


MEASURE = """
import re, sys, time
from pathlib import Path
from xalign.data.sources import iter_pairs
# not getrusage's ru_maxrss: that begins with what the parent process had
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before, start, count = peak(), time.perf_counter(), 0
try:
    for pair in iter_pairs(sys.argv[1]):
        count += 1
except ValueError as error:
    print(error, file=sys.stderr)
print(count, peak() - before, time.perf_counter() - start)
"""


def measure(path):
    """Records, growth of the peak memory in MB and seconds of reading a file in a process of its own, and its errors."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    count, growth, seconds = done.stdout.split()
    return int(count), float(growth), float(seconds), done.stderr


LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")


@LINUX
@pytest.mark.slow
def test_a_file_of_two_gigabytes_streams_in_little_memory(tmp_path):
    random_text = "".join(random.Random(0).choices("abcdefgh ijklmnop äöü", k=100_000))
    lines = [json.dumps({"chosen": [{"role": "user", "content": random_text[i : i + 900]},
                                    {"role": "assistant", "content": random_text[i + 900 : i + 1300]}],
                         "rejected": [{"role": "user", "content": random_text[i : i + 900]},
                                      {"role": "assistant", "content": random_text[i + 1000 : i + 1500]}]}, ensure_ascii=False)
             for i in range(0, 90_000, 70)]
    block = "".join(line + "\n" for line in lines).encode()
    path = tmp_path / "big.jsonl"
    try:
        with open(path, "wb") as file:
            for _ in range(2 * 2**30 // len(block) + 1):
                file.write(block)
        size = os.path.getsize(path)
        assert size >= 2 * 2**30
        count, growth, seconds, _ = measure(path)
    finally:
        path.unlink()
    print(f"{count:,} pairs, {count / seconds:,.0f} a second, {size / seconds / 1e6:.0f} MB/s, {growth:.1f} MB more")
    assert count == len(lines) * (size // len(block)) and growth < 80


@LINUX
@pytest.mark.slow
def test_a_line_of_a_gigabyte_and_a_big_parquet_take_little_memory(tmp_path):
    path = tmp_path / "line.jsonl"
    with open(path, "wb") as file:
        file.truncate(2**30)  # a hole in the file: NUL bytes without a line's end
    count, growth, _, error = measure(path)
    assert count == 0 and growth < 80 + files.LINE_LIMIT / 2**20 and f"{path}:1: a line of more than 64 MB" in error
    path.unlink()
    draw = random.Random(0)
    path = tmp_path / "big.parquet"
    with parquet.ParquetWriter(path, pyarrow.schema({"chosen": pyarrow.string(), "rejected": pyarrow.string()})) as writer:
        for _ in range(20):
            rows = [{"chosen": draw.randbytes(5000).hex(), "rejected": draw.randbytes(5000).hex()} for _ in range(1000)]
            writer.write_table(pyarrow.Table.from_pylist(rows), row_group_size=1000)
    assert os.path.getsize(path) > 2e8
    count, growth, seconds, _ = measure(path)
    print(f"{count:,} pairs, {count / seconds:,.0f} a second, {growth:.1f} MB more")
    assert count == 20_000 and growth < 200  # pyarrow's own code is 100 MB
