"""`xalign data inspect`: counts, duplicates, lengths, truncation, and the example with its borders."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from xalign.cli import main
from xalign.data.chat_template import render_completion
from xalign.data.collate import encode_pair, truncate_pair
from xalign.data.sources import read_examples, read_pairs
from xalign.display import Paint, histogram, show_text, show_tokens, table, visible
from xalign.errors import ConfigError
from xalign.inspection import describe, inspect
from xalign.tokenizers import ByteTokenizer

ROOT = Path(__file__).parent.parent
REAL = ROOT / "../shared/data/hh-harmless-base.train.jsonl.gz"
PAIR = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green!!"}
PLAIN, COLORED = Paint("never"), Paint("always")


@pytest.fixture
def write(tmp_path):
    """Write records to a file and give its path."""

    def write(records, name="d.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(path)

    return write


def lines_of(path, **options):
    """The report of a file without colours, by the name in front of each line."""
    found, error = inspect(path, **options)
    assert error is None
    return found, "\n".join(describe(found, PLAIN, options.get("tokenizer"))).split("\n")


def line(lines, name):
    return next(line for line in lines if line.startswith(name))


def test_pairs(write):
    swapped = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"], "id": 4}
    same = PAIR | {"rejected": " Blue."}
    found, lines = lines_of(path := write([PAIR, PAIR | {"chosen": " Blue?"}, PAIR, swapped, same, PAIR | {"prompt": "?"}]))
    assert line(lines, "format").endswith("TRL preference, standard, explicit prompt")
    assert line(lines, "records").endswith("6 read, 5 kept")
    assert any(x.strip() == f"1 chosen and rejected identical, dropped (first: {path}:5)" for x in lines)
    assert line(lines, "columns").endswith("prompt, chosen, rejected")
    assert line(lines, "not read").split() == ["not", "read", "id"]
    assert line(lines, "length bias").endswith("chosen is longer in 20.0%, shorter in 80.0%, as long in 0.0%")
    text = "\n".join(lines)
    assert f"the same as an earlier record: 1 ({path}:3 is {path}:1)" in text
    assert f"the prompt of an earlier record: 3 ({path}:2 has {path}:1's)" in text
    assert f"contradict another record: 3 ({path}:1 and {path}:4: the same two sides the other way round)" in text
    assert list(found.lengths["chosen"]) == [6, 6, 6, 8, 6] and list(found.lengths["prompt + longer"]) == [12, 12, 12, 12, 9]
    assert lines[-5:] == ["Sky?", "chosen", " Blue.", "rejected", " Green!!"]


def test_conversations_margins_and_bad_records(write):
    def pair(i, **more):
        turns = [{"role": "user", "content": f"hi{i}"}]
        return {"chosen": [*turns, {"role": "assistant", "content": "yes"}],
                "rejected": [*turns, {"role": "assistant", "content": "no"}], **more}

    bad = pair(9) | {"rejected": [{"role": "bot", "content": "x"}]}
    path = write([pair(1, margin=1.5), bad, pair(2, margin=-2), bad, {"foo": 1}])
    found, lines = lines_of(path)
    assert line(lines, "roles").endswith("user 2, assistant 2")
    assert line(lines, "messages").endswith("2 records of 2")
    assert line(lines, "columns").endswith("chosen (4), rejected (4), margin (2)")
    assert line(lines, "margins").endswith("-2 to 1.5, median -0.25; 1 are negative: the rejected side has the better score")
    assert any(f"2 bad, training stops: 'rejected': unknown role 'bot'" in x and f"(first: {path}:2)" in x for x in lines)  # noqa: F541
    assert any("1 bad, training stops: a record of unknown shape with the keys 'foo'" in x for x in lines)
    assert found.report.records == 5 and found.report.kept == 2
    done = subprocess.run([sys.executable, "-m", "xalign", "data", "inspect", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.splitlines() == lines
    assert done.stderr.startswith(f"error: {path}: 3 bad records, which training refuses, the first: {path}:2: 'rejected'")
    assert done.stderr.count("\n") == 1


def test_other_kinds(write):
    labelled = [{"prompt": "p", "completion": "c" * n, "label": n > 2} for n in (1, 2, 3)]
    found, lines = lines_of(write([*labelled, labelled[0] | {"label": 1}]))
    assert found.kind == "labelled" and line(lines, "labels").endswith("desirable 2, undesirable 2")
    assert "the same completion, labelled otherwise" in "\n".join(lines)
    assert list(found.lengths["desirable"]) == [3, 1] and "completion (undesirable)" in lines
    found, lines = lines_of(write([{"messages": [{"role": r, "content": c} for r, c in (("user", "ab"), ("assistant", "c"))]}]))
    assert found.kind == "examples" and list(found.lengths["scored"]) == [1] and list(found.lengths["whole record"]) == [3]
    assert lines[-3:] == ["completion", "user: ab", "assistant: c"] and line(lines, "duplicates").endswith("none")
    found, lines = lines_of(write([{"prompt": "ab"}, {"prompt": "ab"}]))
    assert found.kind == "prompts" and list(found.lengths["prompt"]) == [2, 2]
    assert sum("earlier record" in x for x in lines) == 1
    found, lines = lines_of(write([{"instruction": "a", "output": "b"}, {"text": "c"}]))
    assert line(lines, "format").endswith("AlpacaEval outputs (1); plain text (1)")


def test_tokens_and_truncation(write):
    tokenizer = ByteTokenizer()
    path = write([PAIR, PAIR | {"prompt": "x" * 50}, PAIR | {"chosen": "y" * 50, "rejected": "y" * 49 + "z"}])
    found, lines = lines_of(path, tokenizer=tokenizer, max_length=16)
    pairs = [encode_pair(p, tokenizer) for p in read_pairs(path)]
    assert list(found.lengths["prompt + longer"]) == [p.length for p in pairs]
    assert [truncate_pair(p, 16) is None for p in pairs] == [False, False, True]
    assert line(lines, "truncation").endswith("to 16 tokens: of 3 records: 1 prompts cut, 1 dropped")
    assert lines[-4:] == ["chosen: 12 tokens, 7 scored", "<s>Sky?⟦ Blue.</s>⟧",
                          "rejected: 14 tokens, 9 scored", "<s>Sky?⟦ Green!!</s>⟧"]
    _, lines = lines_of(path, tokenizer=tokenizer, max_length=16, limit=1)
    assert line(lines, "truncation").endswith("of 1 records: none cut")
    for rows, expected in (([{"text": "ab"}], "<s>⟦ab</s>⟧"), ([{"prompt": "ab"}], "<s>ab"),
                           ([{"prompt": "a", "completion": "b", "label": 0}], "<s>a⟦b</s>⟧")):
        assert lines_of(write(rows), tokenizer=tokenizer)[1][-1] == expected
    with pytest.raises(ConfigError, match="--max-length 16 counts tokens: it needs --tokenizer"):
        inspect(path, max_length=16)


def test_the_example_shows_every_border():
    """With the colours taken out the text is the text; with them, each token and each scored one can be told."""
    tokenizer = ByteTokenizer(["<|user|>", "<|assistant|>"])
    prompt, completion = "é\n\x1b[31m", "日本 <|user|>\t"
    head, reply, mask = render_completion(tokenizer, prompt, completion)
    ids, scored = head + reply, [False] * len(head) + mask
    shown = show_tokens(tokenizer, ids, scored, COLORED)
    bare = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert bare == "<s>é↵\n\\x1b[31m日本 <|user|>→</s>" and "\x1b[31m" not in shown
    assert "\x1b[32;4m日\x1b[0m" in shown or "\x1b[32m日\x1b[0m" in shown
    assert shown.startswith("\x1b[7;2m<s>\x1b[0m") and shown.endswith("\x1b[7;32m</s>\x1b[0m")
    green = "".join(re.findall(r"\x1b\[(?:7;)?32(?:;4)?m(.*?)\x1b\[0m", shown))
    assert green == "日本 <|user|>→</s>"
    dim = "".join(re.findall(r"\x1b\[(?:7;)?2(?:;4)?m(.*?)\x1b\[0m", shown, re.DOTALL))
    assert dim == "<s>é↵\\x1b[31m"
    assert show_tokens(tokenizer, tokenizer.encode("abc"), [False] * 3, COLORED) == (
        "\x1b[2ma\x1b[0m\x1b[2;4mb\x1b[0m\x1b[2mc\x1b[0m")
    assert show_tokens(tokenizer, ids, scored, PLAIN) == "<s>é↵\n\\x1b[31m⟦日本 <|user|>→</s>⟧"
    half = tokenizer.encode("é")[:1]
    assert show_tokens(tokenizer, half, [True], PLAIN) == r"⟦\xc3⟧"
    assert "… 200 tokens …" in show_tokens(tokenizer, tokenizer.encode("x" * 1000), [False] * 1000, PLAIN)


def test_display():
    assert visible("a\tb\x07\x1b\u202e\n") == "a→b\\x07\\x1b\\u202e\n"
    assert COLORED("a\n\nb", "red") == "\x1b[31ma\x1b[0m\n\n\x1b[31mb\x1b[0m" and PLAIN("a", "red") == "a"
    assert "9,000 characters" in show_text("x" * 12_000, PLAIN)
    assert table("t", ["a", "bb"], [("name", [1, 2000.6])], PLAIN) == ["t     a     bb", "name  1  2,001"]
    lines = histogram({"x": (np.array([0, 1, 1, 2, 19]), "red")}, PLAIN, bins=3, width=4)
    assert lines == [" 0 – 10  ████ 4", "10 – 20  █    1"]
    values = {"x": (np.array([*[5] * 200, 10_000]), "red"), "yy": (np.array([4]), "red")}
    assert histogram(values, PLAIN, bins=3, width=8) == ["       x              yy",
                                                         "4 – 5             0   ▏          1",
                                                         "5 – 6  ████████ 200              0",
                                                         "6 – …  ▏          1              0"]
    assert histogram({"x": (np.array([7, 7]), "red")}, PLAIN, width=2) == ["7 – 8  ██ 2"]


def test_colors_ask_the_terminal(write, monkeypatch, capsys):
    path = write([PAIR])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for environment, flags, on in ((None, [], True), ("1", [], False), ("1", ["--color=always"], True),
                                   (None, ["--color=never"], False)):
        if environment:
            monkeypatch.setenv("NO_COLOR", environment)
        else:
            monkeypatch.delenv("NO_COLOR", raising=False)
        main(["data", "inspect", path, *flags])
        assert ("\x1b[" in capsys.readouterr().out) == on


def test_flags_and_mistakes(write, tmp_path, capsys):
    rows = [{"question": f"q{i}", "better": "good", "worse": "bad"} for i in range(5)]
    path = write(rows, "mapped.jsonl")
    flags = ["--columns", "prompt=question", "chosen=better", "rejected=worse"]
    for arguments in ([path, *flags, "--limit", "3"], ["--limit=3", *flags, path], ["--limit", "3", "--dataset", path, *flags]):
        main(["data", "inspect", *arguments])
        assert "3 read, 3 kept" in capsys.readouterr().out
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    main(["data", "inspect", str(tmp_path / "d.parquet"), *flags])
    assert "5 read, 5 kept" in capsys.readouterr().out

    def fails(message, *arguments):
        with pytest.raises(SystemExit) as stop:
            main(["data", "inspect", *arguments])
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.out == ""
        assert re.search(message, captured.err) and captured.err.count("\n") == 1

    fails("no file is given: xalign data inspect FILE")
    fails(r"several files are given \(a, b\), allowed is one", "a", "b")
    fails("unknown flag --limt, did you mean --limit", path, "--limt", "3")
    fails("--limit is 0, allowed is a finite number >= 1", path, "--limit", "0")
    fails("no.jsonl: can't be read", "no.jsonl")
    fails("the folder holds no tokenizer", path, "--tokenizer", str(tmp_path))
    fails("--max-length 9 counts tokens", path, "--max-length", "9")
    fails("no standard name 'chosn', did you mean 'chosen'", path, "--columns", "chosn=better")
    fails("--columns has 'x', allowed are settings like", path, "--columns", "x")
    with pytest.raises(SystemExit):
        main(["data"])
    assert "no command 'data'; allowed are sft, " in capsys.readouterr().err
    main(["--help"])
    assert "data inspect" in capsys.readouterr().out


def test_what_was_read_before_an_error_is_shown(tmp_path, capsys):
    (path := tmp_path / "d.jsonl").write_text(json.dumps(PAIR) + "\nbroken\n")
    with pytest.raises(SystemExit) as stop:
        main(["data", "inspect", str(path)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "2 read, 1 kept" in out and f"{path}:2: not valid JSON" in err
    path.write_text("broken\n" + json.dumps(PAIR) + "\n[1]\n" + json.dumps(PAIR) + "\n")
    found, error = inspect(path)
    assert error is None and (found.report.records, found.report.kept) == (4, 2)
    assert sorted(found.bad.first.values()) == [f"{path}:1", f"{path}:3"]
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\xff\n")  # from here on nothing is a line
    found, error = inspect(path)
    assert found.report.kept == 1 and "not UTF-8" in str(error)


def test_records_of_another_kind(write, capsys):
    """sft takes them, so that only the other program stops there, and nobody is told that training does."""
    reply = {"prompt": "a", "completion": "b"}
    path = write([PAIR, {"text": "a"}, reply | {"label": True}, PAIR, reply])
    assert len(read_examples(path)) == 5
    found, lines = lines_of(path)
    assert found.report.kept == 2 and sum(found.mixed.flaws.values()) == 3 and not found.bad.flaws
    said = f"1 of another kind, plain text: xalign sft reads it, xalign dpo stops at it (first: {path}:2)"
    assert any(said in x for x in lines)
    main(["data", "inspect", path])
    assert "training stops" not in capsys.readouterr().out
    found, _ = lines_of(write([PAIR, reply | {"label": None}]))
    assert found.report.flaws == {"label is null, dropped": 1}
    found, _ = lines_of(write([reply | {"label": 0}, {"text": "a"}]))
    assert list(found.mixed.flaws) == ["of another kind, plain text: xalign sft reads it, it has no label"]
    found, _ = lines_of(write([PAIR, {"prompt": "a"}, {"text": 3}]))  # which no training takes
    assert sum(found.bad.flaws.values()) == 2 and not found.mixed.flaws


def test_empty_replies(write, capsys):
    path = write([PAIR, PAIR | {"chosen": ""}])
    with pytest.raises(SystemExit):
        main(["data", "inspect", path])
    assert f"{path}:2: 'chosen' is an empty completion (--empty drop skips such records)" in capsys.readouterr().err
    main(["data", "inspect", path, "--empty", "drop"])
    assert "1 empty reply, dropped" in capsys.readouterr().out


def test_file_names_are_told_from_settings(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lang=en").mkdir()
    for name in ("a=b.jsonl", "lang=en/x.jsonl", "plain.jsonl"):
        write([{"prompt": "p", "better": "b", "rejected": "r"}], name)
        for arguments in ([f"./{name}", "--columns", "chosen=better"], ["--columns", "chosen=better", f"./{name}"],
                          ["--columns=chosen=better", "--dataset", name], [f"--dataset={name}", "--columns", "chosen=better"],
                          [name, "--columns", "chosen=better", "--limit", "1"]):
            main(["data", "inspect", *arguments])
            assert "1 read, 1 kept" in capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            main(["data", "inspect", "--print-config", name])
        assert stop.value.code == 0 and json.loads(capsys.readouterr().out)["dataset"] == name
    for arguments in (["--dataset", "a", "b"], ["--dataset=a", "b"], ["b", "--dataset", "a"],
                      ["--columns", "chosen=x", "a", "b"]):
        with pytest.raises(SystemExit) as stop:
            main(["data", "inspect", *arguments])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "several files are given (" in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["data", "inspect", "--dataset"])
    assert "dataset" in capsys.readouterr().err


def test_output_that_is_not_utf8(write):
    path = write([PAIR | {"prompt": "é😀"}])
    environment = {"PYTHONIOENCODING": "ascii", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-m", "xalign", "data", "inspect", path], cwd=ROOT, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0 and done.stderr == "" and r"\xe9\U0001f600" in done.stdout


def test_only_training_says_that_it_can_go_on(write, monkeypatch, capsys):
    from xalign import inspection, train

    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "run_inspect", stopped)
    monkeypatch.setattr(train, "run_sft", stopped)
    for arguments, message in ((["data", "inspect", "x"], "stopped\n"),
                               (["sft"], "stopped; finished stages and checkpoints are kept, the same command goes on\n")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 130 and capsys.readouterr().err == message


@pytest.mark.skipif(not REAL.exists(), reason=f"the shared data {REAL.name} is not beside this checkout")
def test_real_data_without_torch():
    code = ("import sys\nfrom xalign.cli import main\nmain(['data', 'inspect', sys.argv[1]])\n"
            "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(REAL)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for part in ("Anthropic HH-RLHF", "1,800 read, 1,795 kept", "4 prompts differ, dropped", "user 4,408"):
        assert part in done.stdout
