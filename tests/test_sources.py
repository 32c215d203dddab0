"""Readers: every format from a tiny file, every kind of bad input with its line, and the real data."""

import gzip
import json
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xalign.data import shapes
from xalign.data.records import Example, Labelled, Message, PreferencePair
from xalign.data.shapes import NAMES, ReadReport, pair_to_example, shape_of, to_example, to_labelled, to_pair, to_prompt
from xalign.data.sources import (
    column_names,
    columns_by_file,
    iter_labelled,
    iter_pairs,
    read_examples,
    read_labelled,
    read_pairs,
    read_prompts,
)
from xalign.errors import ConfigError, DataError

REAL = Path(__file__).parent.parent / "../shared/data/hh-harmless-base.train.jsonl.gz"
STANDARD = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}


def U(text):
    return Message("user", text)


def A(text):
    return Message("assistant", text)


@pytest.fixture
def write(tmp_path):
    """Write records (or raw text or bytes) to a file and give its path."""

    def write(data, name="data.jsonl"):
        if isinstance(data, list):
            data = "".join(json.dumps(record) + "\n" for record in data)
        data = data.encode() if isinstance(data, str) else data
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write


def test_trl_standard(write):
    path = write([STANDARD, STANDARD | {"margin": 2, "id": 7}])
    one, two = read_pairs(path)
    assert one == PreferencePair("Sky?", " Blue.", " Green.", None, f"{path}:1")
    assert (two.margin, two.where) == (2, f"{path}:2")


def test_trl_standard_implicit_prompt_keeps_the_shared_beginning(write):
    """losses.md: a shared answer prefix moved into the prompt ("I like")."""
    (pair,) = read_pairs(write([{"chosen": "I like tea.", "rejected": "I like mud."}]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("", "I like tea.", "I like mud.")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": [user("hi")], "chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": "hi", "chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": None, "chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"chosen": "Human: hi\n\nAssistant: yes\n", "rejected": "\n\nHuman: hi\n\nAssistant:no"},
    ],
    ids=["explicit", "implicit", "repeated", "ultrafeedback", "hh", "hh-loose"],
)
def test_conversational_forms_of_one_pair(write, record):
    (pair,) = read_pairs(write([record]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((U("hi"),), (A("yes"),), (A("no"),))


def test_hh_splits_at_the_last_assistant(write):
    head = "\n\nHuman: a\n\nAssistant: b\n\n1. x\n\nHuman: c\n\nAssistant: "
    (pair,) = read_pairs(write([{"chosen": head + "I like d", "rejected": head + "I like e"}]))
    assert pair.prompt == (U("a"), A("b\n\n1. x"), U("c"))
    assert (pair.chosen, pair.rejected) == ((A("I like d"),), (A("I like e"),))


def test_flaws_of_real_data_are_counted_and_dropped(write):
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    empty = good | {"rejected": "\n\nHuman: a\n\nAssistant: "}
    other = good | {"rejected": "\n\nHuman: z\n\nAssistant: c"}
    path = write([good, empty, other, other, good | {"rejected": good["chosen"]}])
    report = ReadReport()
    assert len(read_pairs(path, report=report)) == 1
    assert (report.records, report.kept) == (5, 1)
    assert list(report.flaws.values()) == [1, 2, 1] and f"prompts differ, dropped: 2 (first: {path}:3)" in str(report)
    with pytest.raises(DataError, match=r"no usable preference pair \(0 of 1 records kept; empty reply"):
        read_pairs(write([empty]))


def test_identical_sides(write):
    path = write([STANDARD, STANDARD | {"rejected": " Blue."}])
    for mode, number in (("drop", 1), ("keep", 2)):
        report = ReadReport()
        assert len(read_pairs(path, identical=mode, report=report)) == number
        assert sum(report.flaws.values()) == 1 and "identical" in str(report)
    with pytest.raises(ConfigError, match="'drop', 'keep'"):
        read_pairs(path, identical="both")


def test_ultrafeedback(write):
    chosen, rejected = [user("hi "), assistant("yes")], [user("hi "), assistant("no")]
    record = {"prompt": "hi", "prompt_id": "0a", "chosen": chosen, "rejected": rejected, "messages": chosen,
              "score_chosen": 8.5, "score_rejected": 6}
    path = write([record, record | {"chosen": [SYSTEM, *chosen], "rejected": [SYSTEM, *rejected]}])
    one, two = read_pairs(path)
    assert one == PreferencePair((U("hi "),), (A("yes"),), (A("no"),), 2.5, f"{path}:1")
    assert two.prompt == (Message("system", "s"), U("hi ")) and two.chosen == one.chosen
    assert read_examples(path)[0].completion == (U("hi "), A("yes"))
    assert read_prompts(path) == [one.prompt, two.prompt]  # not the bare text: what training on the pair sees
    with pytest.raises(DataError, match="text and messages are mixed"):
        read_pairs(write([record | {"prompt": "bye"}]))


def test_rewardbench(write):
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "subset": "alpacaeval-easy", "id": 0}
    prior = row | {"prompt": [user("Hi"), assistant("x"), user("y")]}
    one, two = read_pairs(write([row, prior]))
    assert (one.prompt, one.chosen, one.rejected) == ("Hi", "a", "b")
    assert (two.prompt, two.chosen, two.rejected) == ((U("Hi"), A("x"), U("y")), (A("a"),), (A("b"),))


def test_alpaca_eval(write):
    rows = [{"instruction": "Add.", "output": "2", "generator": "g", "dataset": "d"},
            {"instruction": "Add.", "input": "1 1", "output": "2", "generator": "g"}]
    path = write(json.dumps(rows, indent=1), "outputs.json")
    prompts = [(U("Add."),), (U("Add.\n\n1 1"),)]
    assert read_prompts(path) == prompts
    assert read_examples(path) == [Example(p, (A("2"),), f"{path}:{i}") for i, p in enumerate(prompts, 1)]


def test_labelled(write):
    rows = [{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "d", "label": 0},
            {"prompt": [user("p")], "completion": [assistant("c")], "label": 1},
            {"prompt": [user("p")], "completion": "c", "label": False},
            {"messages": [user("p"), assistant("c")], "label": True}]
    path = write(rows)
    expected = [("p", "c", True), ("p", "d", False), ((U("p"),), (A("c"),), True), ((U("p"),), (A("c"),), False),
                ((U("p"),), (A("c"),), True)]
    assert read_labelled(path) == [Labelled(*e, f"{path}:{i}") for i, e in enumerate(expected, 1)]
    report = ReadReport()
    assert [e.where for e in read_examples(path, report=report)] == [f"{path}:{i}" for i in (1, 3, 5)]
    assert report.kept == 3 and report.flaws == {"labelled undesirable, dropped": 2}
    with pytest.raises(DataError, match=r":1: a labelled record .* allowed: prompt\+chosen.*loss kto; xalign sft"):
        read_pairs(path)
    for row, message in ((rows[0] | {"label": "true"}, r"'label' must be true or false \(or 1 or 0\), not 'true'"),
                         (rows[0] | {"label": 2}, "not 2"), (rows[0] | {"completion": " "}, "is an empty completion"),
                         ({"prompt": "p"}, r"without a label, with the keys .* allowed: prompt\+completion\+label"),
                         ({"prompt": "p", "label": 1}, "a label, but only the keys 'prompt', 'label'"),
                         (rows[0] | {"completion": [assistant("c")]}, "text and messages are mixed")):
        with pytest.raises(DataError, match=f":1: .*{message}"):
            read_labelled(write([row]))


def test_a_pair_is_two_labelled_completions(write):
    report = ReadReport()
    path = write([STANDARD, STANDARD | {"rejected": " Blue."}])
    assert list(iter_labelled(path, report=report)) == [Labelled("Sky?", " Blue.", True, f"{path}:1"),
                                                        Labelled("Sky?", " Green.", False, f"{path}:1")]
    assert (report.records, report.kept, sum(report.flaws.values())) == (2, 1, 1)


def test_a_label_that_is_null_is_dropped_and_counted(write):
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, None)]
    rows += [{"messages": [user("p"), assistant("c")], "label": None}, STANDARD | {"label": None}]
    for read, kept in ((read_labelled, 3), (read_examples, 2)):  # the pair is one
        report = ReadReport()
        assert len(read(write(rows), report=report)) == kept
        assert report.flaws == {"label is null, dropped": 2} and report.first["label is null, dropped"].endswith(":2")
    with pytest.raises(DataError, match=r"no usable example .*label is null, dropped: 1"):
        read_examples(write(rows[1:2]))


EMPTY = [
    (read_pairs, STANDARD, STANDARD | {"rejected": " "}),
    (read_pairs, {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "score_chosen": 1},
     {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("")], "score_chosen": 1}),
    (read_pairs, STANDARD | {"prompt": [user("a")]}, STANDARD | {"prompt": [user("a")], "chosen": ""}),
    (read_examples, STANDARD, STANDARD | {"chosen": ""}),
    (read_examples, {"text": "a"}, {"prompt": "a", "completion": "\n"}),
    (read_examples, {"messages": [user("a"), assistant("b")]}, {"messages": [user("a"), assistant("")]}),
    (read_examples, {"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}),
    (read_labelled, {"completion": "a", "label": 1}, {"completion": "", "label": 0}),
    (read_labelled, {"completion": "a", "label": 1}, STANDARD | {"rejected": ""}),
]


@pytest.mark.parametrize(("read", "good", "bad"), EMPTY, ids=range(len(EMPTY)))
def test_empty_replies_are_errors_or_dropped_and_counted(write, read, good, bad):
    path = write([good, bad, good])
    with pytest.raises(DataError, match=r"jsonl:2: .*(empty completion|is empty|no assistant turn with any text) "
                                        r"\(--empty drop skips such records\)$"):
        read(path)
    report = ReadReport()
    assert len(read(path, empty="drop", report=report)) == 2
    assert (report.records, report.kept, report.flaws) == (3, 2, {"empty reply, dropped": 1})
    assert report.first == {"empty reply, dropped": f"{path}:2"}
    with pytest.raises(ConfigError, match="'error', 'drop'"):
        read(path, empty="keep")


def test_what_lacks_a_reply_altogether_is_an_error_in_any_case(write):
    turn = [user("a")]
    for read, record in ((read_pairs, {"chosen": turn, "rejected": turn}), (read_examples, {"messages": turn})):
        with pytest.raises(DataError, match=r":1: .*(no assistant turn|one assistant message)"):
            read(write([record]), empty="drop")


def test_records_too_long_to_tokenise_are_dropped(write, monkeypatch):
    monkeypatch.setattr(shapes, "TEXT_LIMIT", 100)
    long = {"chosen": [user("a"), assistant("b")],
            "rejected": [assistant([{"type": "text", "text": "x" * 99}]), user("c")]}
    rows = [STANDARD, STANDARD | {"prompt": "x" * 87}, STANDARD | {"prompt": "x" * 88}, long, {"text": "x" * 101}]
    report = ReadReport()
    assert [e.where[-2:] for e in read_examples(write(rows), report=report)] == [":1", ":2"]
    assert report.flaws == {"too long to tokenise (over 100 characters), dropped": 3}
    assert len(read_pairs(write(rows[:4]))) == 2
    assert len(read_labelled(write([{"completion": "a", "label": 1}, {"completion": "a" * 101, "label": 1}]))) == 1
    with pytest.raises(DataError, match=":1: a record of 101 characters; allowed: up to 100"):
        read_prompts(write([{"prompt": "x" * 101}]))


def test_numbers_of_other_types_are_scores():
    for score in (Decimal("1.5"), np.float32(1.5), np.float64(1.5)):
        pair = to_pair(STANDARD | {"score_chosen": score, "score_rejected": np.int64(1)}, "f:1", ReadReport())
        assert pair.margin == 0.5 and isinstance(pair.margin, float)
    with pytest.raises(DataError, match="'margin' must be a finite number"):
        to_pair(STANDARD | {"margin": Decimal("NaN")}, "f:1", ReadReport())


def test_columns_of_several_files(write):
    """A file that has none of the mapped columns is read under the standard names, unless none of the files has any."""
    settings = ["prompt=question", "chosen=better"]
    own = write([{"question": "q", "better": "b", "rejected": "r"}], "own.jsonl")
    half, standard = write([{"question": "q", "chosen": "b"}], "half.jsonl"), write([STANDARD], "standard.jsonl")
    names = {"prompt": "question", "chosen": "better"}
    assert columns_by_file(settings, [own, standard, half, own]) == {own: names, standard: None, half: names}
    assert columns_by_file(settings, [standard]) == {standard: names}  # a mistake, which reading it says
    assert columns_by_file([], [own, "no such file"]) == {own: None, "no such file": None}


def test_columns(write):
    path = write([{"question": "q", "better": "b", "worse": "w", "text": "t", "id": 1}])
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert read_pairs(path, columns=names) == [PreferencePair("q", "b", "w", None, f"{path}:1")]
    assert read_labelled(path, columns=names)[1] == Labelled("q", "w", False, f"{path}:1")
    assert read_examples(path, columns={"prompt": "question", "completion": "worse"}) == [Example("q", "w", f"{path}:1")]
    assert read_prompts(path, columns={"prompt": "question"}) == ["q"]
    assert read_prompts(path, columns={"prompt": "text"}) == ["t"]
    swapped = read_pairs(write([STANDARD], "swapped.jsonl"), columns={"chosen": "rejected", "rejected": "chosen"})
    assert (swapped[0].chosen, swapped[0].rejected) == (" Green.", " Blue.")
    with pytest.raises(DataError, match=r":1: no column 'best' to take as 'chosen', only the keys 'question', 'better'"):
        read_pairs(path, columns={"chosen": "best"})
    with pytest.raises(ConfigError, match="no standard name 'chosn', did you mean 'chosen'\\?; allowed: prompt, chosen"):
        read_pairs(path, columns={"chosn": "better"})
    assert column_names(["chosen=better", "rejected=a=b"]) == {"chosen": "better", "rejected": "a=b"}
    assert column_names([]) is None
    for wrong in (["chosen"], ["=b"], ["chosen="], ["chosen=a", "chosen=b"], ["chosen=a", "rejected=a"]):
        with pytest.raises(ConfigError, match=r"--columns has .*allowed are settings like chosen=better"):
            column_names(wrong)


def test_null_columns_and_odd_messages(write):
    def pair(reply, **more):
        return {"prompt": None, "messages": None, "chosen": [user("hi"), assistant("a") | more],
                "rejected": [user("hi"), {"role": "assistant", "content": reply}], "margin": None}

    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c", "image": None}]
    (one,) = read_pairs(write([pair(parts, name="x", tool_calls=None, function_call=None)]))
    assert (one.prompt, one.chosen, one.rejected) == ((U("hi"),), (A("a"),), (A("bc"),))
    assert len(read_pairs(write([pair("b", tool_calls=[])]))) == 1
    bad = [(pair("b", tool_calls=[{"id": 1}]), "'chosen': a message with 'tool_calls' can't be used; allowed: messages"),
           (pair([{"type": "image", "url": "u"}]), "'rejected': content with a part 'image'; allowed: text, or parts"),
           (pair([{"text": "b"}]), "part 'without a type'"), (pair(["b"]), "part 'str'"),
           (pair([{"type": "text", "text": 3}]), "part 'text'")]
    for record, message in bad:
        with pytest.raises(DataError, match=f":1: .*{message}"):
            read_pairs(write([record]))
    with pytest.raises(DataError, match=":1: the record has no 'chosen'"):
        read_pairs(write([STANDARD | {"chosen": None}]))


SHAPES = [
    (STANDARD, "pairs", "TRL preference, standard, explicit prompt"),
    ({"chosen": "a", "rejected": "b"}, "pairs", "TRL preference, standard, implicit prompt"),
    ({"prompt": [], "chosen": [], "rejected": []}, "pairs", "TRL preference, conversational, explicit prompt"),
    ({"chosen": [], "rejected": []}, "pairs", "TRL preference, conversational, implicit prompt"),
    ({"prompt": "", "chosen": [], "rejected": [], "score_chosen": 1.0}, "pairs", "UltraFeedback-binarized"),
    ({"prompt": "", "chosen": "", "rejected": "", "subset": "s", "id": 1}, "pairs", "RewardBench, standard"),
    ({"prompt": [], "chosen": "", "rejected": "", "subset": "s", "id": 1}, "pairs", "RewardBench, prior sets"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": ""}, "pairs", "Anthropic HH-RLHF"),
    ({"prompt": "", "completion": "", "label": True}, "labelled", "KTO), standard"),
    ({"prompt": [], "completion": [], "label": False}, "labelled", "KTO), conversational"),
    ({"messages": []}, "examples", "conversations (TRL messages)"),
    ({"prompt": "", "completion": ""}, "examples", "TRL prompt-completion, standard"),
    ({"instruction": "", "output": ""}, "examples", "AlpacaEval outputs"),
    ({"text": ""}, "examples", "plain text"),
    ({"prompt": []}, "prompts", "TRL prompt-only, conversational"),
    ({"instruction": ""}, "prompts", "AlpacaEval instructions"),
]


@pytest.mark.parametrize(("record", "kind", "words"), SHAPES, ids=[f"{kind}-{words[:30]}" for _, kind, words in SHAPES])
def test_shape_of(record, kind, words):
    found = shape_of(record, "f:1")
    assert found[0] == kind and words in found[1]
    if "TRL" in words and words.endswith(("standard", "conversational")):
        from trl.data_utils import is_conversational

        filled = {k: [user("a")] if v == [] else v for k, v in record.items()}
        assert is_conversational(filled) == words.endswith("conversational")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "text", "\n\nHuman: a\n\nAssistant: b"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls"]), v),
    max_leaves=8)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), VALUES, VALUES)
def test_whatever_a_record_holds_is_read_or_told_in_one_line(record, chosen, rejected):
    for read in (shape_of, to_pair, to_example, to_labelled, to_prompt):
        for content in (record, record | {"chosen": chosen, "rejected": rejected}):
            try:
                read(content, "f:1", *([ReadReport()] if read is not shape_of else []))
            except DataError as error:
                assert str(error).startswith("f:1: ")


TURNS = st.lists(st.tuples(st.text(max_size=5), st.text("ab", min_size=1, max_size=3)), min_size=1, max_size=3)


@given(turns=TURNS, other=st.text("cd", min_size=1, max_size=3), system=st.booleans(), explicit=st.booleans())
def test_conversational_pairs_split_and_unpair_as_in_trl(turns, other, system, explicit):
    from datasets import Dataset
    from trl.data_utils import extract_prompt, unpair_preference_dataset

    prompt = [SYSTEM] * system + [m for question, answer in turns for m in (user(question), assistant(answer))][:-1]
    record = {"chosen": [*prompt, assistant(turns[-1][1])], "rejected": [*prompt, assistant(other)]}
    theirs = extract_prompt(record)
    pair = to_pair(theirs if explicit else record, "f:1", ReadReport())
    assert pair is not None
    ours = {name: [{"role": m.role, "content": m.content} for m in getattr(pair, name)] for name in theirs}
    assert ours == theirs
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "d.jsonl")).write_text(json.dumps(record))
        labelled = [{"prompt": list(map(vars, e.prompt)), "completion": list(map(vars, e.completion)), "label": e.label}
                    for e in read_labelled(path)]
    assert labelled == unpair_preference_dataset(Dataset.from_list([theirs])).to_list()


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.JSONL", "d.json", "d.json.gz"])
def test_containers(write, name):
    data = [STANDARD, STANDARD]
    if ".json" in name and "jsonl" not in name.lower():
        for value in (data, {"data": data, "version": 1}):
            pairs = read_pairs(path := write(json.dumps(value, indent=1), name))
            assert [p.where for p in pairs] == [f"{path}:1", f"{path}:2"]
    assert len(read_pairs(write(data, name))) == 2  # JSON lines under the name .json as well


def test_bom_crlf_blank_lines_and_odd_separators(write):
    line = json.dumps(STANDARD | {"chosen": "a\u2028b"}, ensure_ascii=False)
    pairs = read_pairs(path := write(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}".encode()))
    assert [p.where for p in pairs] == [f"{path}:1", f"{path}:3"] and pairs[0].chosen == "a\u2028b"


def test_examples(write):
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    records = [
        {"messages": chat},
        {"prompt": "p", "completion": "c"},
        {"prompt": [user("a")], "completion": [assistant("b")]},
        {"text": "once"},
        STANDARD,
    ]
    examples = read_examples(write(records))
    turns = (U("a"), A("b"), U("c"), A("d"))
    expected = [((), turns), ("p", "c"), ((U("a"),), (A("b"),)), ("", "once"), ("Sky?", " Blue.")]
    assert [(e.prompt, e.completion) for e in examples] == expected


def test_text_files(write):
    examples = read_examples(path := write("  one \r\n\n\ntwo", "corpus.txt"))
    assert examples == [Example("", "  one ", f"{path}:1"), Example("", "two", f"{path}:4")]
    assert len(read_examples(write("a\nb\n", "c.txt.gz"), limit=1)) == 1


def test_pair_to_example():
    pair = PreferencePair((U("a"), A("b"), U("c")), (A("d"),), (A("e"),))
    assert pair_to_example(pair) == Example(pair.prompt, pair.chosen)
    assert pair_to_example(pair, every_turn=True) == Example((), pair.prompt + pair.chosen)
    assert pair_to_example(PreferencePair("a", "b", "c"), every_turn=True) == Example("a", "b")


def test_read_prompts(write):
    assert read_prompts(write("one\n\ntwo \n", "p.txt")) == ["one", "two "]
    assert read_prompts(write([STANDARD, {"messages": [user("hi")]}])) == ["Sky?", (U("hi"),)]
    for record, message in (({"id": 1}, "allowed: a record with prompt"), ({"prompt": " "}, "'prompt' is empty")):
        with pytest.raises(DataError, match=f":1: .*{message}"):
            read_prompts(write([record]))


GOOD = json.dumps(STANDARD)


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ('{"prompt": "a", "chosen": ', r"not valid JSON: Expecting value at column 27"),
        ('{"prompt": "\t"}', r"not valid JSON: Invalid control character at column 13"),
        ('{"prompt": "a", "chosen": "b"}', r"no 'rejected', only the keys 'prompt', 'chosen'"),
        ('{"query": "a", "answer": "b"}', r"unknown shape with the keys 'query', 'answer'; allowed: prompt\+chosen"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', r"'chosen' must be text or a list of messages, not int"),
        ('{"prompt": 1, "chosen": "b", "rejected": "c"}', r"'prompt' must be text or a list of messages, not int"),
        ('{"prompt": "a", "chosen": " \\n", "rejected": "c"}', r"'chosen' is an empty completion"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', r"'rejected' is an empty completion"),
        ('{"prompt": "a", "chosen": "b", "rejected": "\\ud800"}', r"'rejected' holds half a character"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}', r"must be numbers \(up to 1e300\), not 'x'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', r"'margin' must be a finite number"),
        ('{"chosen": [{"role": "bot", "content": "b"}], "rejected": []}', r"unknown role 'bot'; allowed: system"),
        ('{"chosen": [{"role": "user"}], "rejected": []}', r"'chosen' must hold objects with 'role' and 'content'"),
        ('{"chosen": [], "rejected": []}', r"'chosen' must be one assistant message, not: none"),
        ('{"chosen": [{"role": "assistant", "content": null}], "rejected": []}', r"must be text, not NoneType"),
        ('{"chosen": [{"role": "user", "content": "b"}], "rejected": [{"role": "user", "content": ""}]}', "not: user"),
        ('{"chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}', r"text and messages are mixed"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1' + "0" * 400 + ', "score_rejected": 1}', "1e300"),
        ('{"prompt": 1' + "0" * 5000 + "}", "a whole number of thousands of digits"),
        ("[1, 2]", r"must be a JSON object, not list"),
        ("[" * 100_000, r"nested too deeply|Expecting value"),
    ],
    ids=lambda value: value[:40],
)
def test_bad_pairs_name_their_line(write, second_line, message):
    path = write(f"{GOOD}\n{second_line}\n{GOOD}\n")
    with pytest.raises(DataError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion": ""}', "the completion is empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn$"),
        ('{"messages": "a"}', "'messages' must be a list of messages, not str"),
        ('{"text": 3}', "'text' must be"),
        ('{"foo": 3}', r"the keys 'foo'; allowed: messages, prompt\+completion, instruction\+output"),
        ("{}", "no keys; allowed"),
    ],
)
def test_bad_examples_name_their_line(write, line, message):
    with pytest.raises(DataError, match=message) as error:
        read_examples(path := write(line))
    assert str(error.value).startswith(f"{path}:1: ")


def test_bad_files(write, tmp_path):
    def fails(path, message, start=None):
        with pytest.raises(DataError, match=message) as error:
            read_pairs(path)
        assert str(error.value).startswith(start or f"{path}: ") and "\n" not in str(error.value)

    fails(tmp_path / "no.jsonl", "can't be read \\(No such file")
    (tmp_path / "dir.jsonl").mkdir()
    fails(tmp_path / "dir.jsonl", "can't be read \\(Is a directory")
    fails(write("", "empty.jsonl"), "holds no record")
    fails(write("\n\n", "empty.json"), "holds no record")
    fails(write("[]", "none.json"), "holds no record")
    fails(write("x", "data.csv"), "unknown kind; allowed: .jsonl")
    fails(path := write('{"a": 1}', "one.json"), "holds the keys 'a'; allowed: a list", f"{path}:1: ")
    fails(path := write("[\n{},\n{]", "bad.json"), "not valid JSON", f"{path}:3: ")
    fails(path := write(f"{GOOD}\n".encode() + b'{"prompt": "\xff"}\n', "latin.jsonl"), "not UTF-8", f"{path}:2: ")
    fails(path := write(GOOD.encode("utf-16"), "utf16.jsonl"), "not UTF-8", f"{path}:1: ")
    path = tmp_path / "plain.jsonl.gz"
    path.write_text(GOOD)
    fails(path, "not a sound gzip file", f"{path}:1: ")
    whole = gzip.compress("".join(f"{GOOD[:-1]}, {i}{'x' * i}: 1}}\n" for i in range(200)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, "cut short|not valid JSON", f"{path}:")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(f"{GOOD}\n".encode())[:-9])
    fails(path := tmp_path / "cut.jsonl.gz", "cut short", f"{path}:")


def test_lines_are_streamed(write):
    """A broken line is met only when the reader gets there: nothing is read ahead as a whole."""
    pairs = iter_pairs(write(f"{GOOD}\nbroken"))
    assert next(pairs).chosen == " Blue."
    with pytest.raises(DataError, match=":2: not valid JSON"):
        next(pairs)
    assert len(read_pairs(write(f"{GOOD}\nbroken"), limit=1)) == 1


def test_reading_needs_no_torch():
    code = "import sys, xalign.data.sources, xalign.tokenizers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not REAL.exists(), reason=f"the shared data {REAL.name} is not beside this checkout")
def test_real_preference_data():
    report = ReadReport()
    pairs = read_pairs(REAL, report=report)
    assert report.records == 1800 and report.kept == len(pairs) == 1795
    assert report.flaws == {"empty reply, dropped": 1, "prompts differ, dropped": 4}
    assert all(p.prompt and p.prompt[-1].role == "user" and len(p.chosen) == len(p.rejected) == 1 for p in pairs)
    assert len(read_examples(REAL, every_turn=True, limit=10)) == 10
