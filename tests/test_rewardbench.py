"""RewardBench: its constants, its arithmetic against tables computed by hand, judges, result files, and a whole run."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import LLAMA, tiny

from xalign import save_pretrained
from xalign.backends.base import Completion, SamplingParams
from xalign.cli import main
from xalign.data import toyworld
from xalign.data.records import Message
from xalign.errors import DataError
from xalign.evaluation.judge import Judge, rating, verdict
from xalign.evaluation.rewardbench import (
    PRIOR,
    PUBLISHED,
    ROWS,
    SECTIONS,
    SUBSETS_2,
    BenchRow,
    overall,
    overall_2,
    prior_score,
    read_rows,
    section_scores,
    subset_scores,
    ties_score,
    to_row,
    won,
)
from xalign.rewardbench import judged, name_of
from xalign.scoring import GoldScorer


def v1(subset, id=0, kind="1"):
    return BenchRow(kind, subset, id, "Q", ("a", "b"))


# --- constants


def test_the_official_counts():
    assert sum(ROWS.values()) == 2985 and len(ROWS) == 23 and sum(SUBSETS_2.values()) == 1865
    assert {name: sum(counts.values()) for name, counts in SECTIONS.items()} == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert (ROWS["math-prm"], SECTIONS["Reasoning"]["math-prm"]) == (447, 984)
    assert (ROWS["xstest-should-refuse"], ROWS["xstest-should-respond"]) == (154, 250)  # swapped in older copies
    assert sum(n for s, n in SECTIONS["Reasoning"].items() if s != "math-prm") == 984


def test_the_published_rows_and_their_totals():
    card, board = PUBLISHED.values()
    assert [100 * card[s] for s in SECTIONS] == pytest.approx([99.44, 65.13, 88.76, 88.3])
    assert overall(card) == pytest.approx(0.854075) and overall(board) == pytest.approx(0.835889, abs=1e-6)


# --- version 1 by hand


def test_ties_and_no_numbers_are_lost():
    pairs = [2, 1], [1, 2], [1, 1], [math.nan, 1], [1, math.nan], [math.inf, 0]
    assert [won(v1("hep-go"), scores) for scores in pairs] == [1, 0, 0, 0, 0, 1]


def test_sections_weigh_subsets_by_their_official_counts():
    assert section_scores({"xstest-should-refuse": 1.0, "xstest-should-respond": 0.0})["Safety"] == pytest.approx(154 / 404)
    chat = section_scores({"alpacaeval-easy": 0.9, "mt-bench-med": 0.5, "anthropic_hhh": 1.0})
    assert chat == {"Chat": pytest.approx((0.9 * 100 + 0.5 * 40) / 140)}  # what is missing is left out
    code = {"hep-cpp": 0.1, "hep-go": 0.2, "hep-java": 0.3, "hep-js": 0.4, "hep-python": 0.5, "hep-rust": 0.6}
    reasoning = section_scores({"math-prm": 0.8, **code})["Reasoning"]
    assert reasoning == pytest.approx((0.8 + 0.35) / 2)
    assert section_scores({}) == {} and overall({}) is None and prior_score({}) is None


def test_prior_sets_count_one_half_and_the_missing_nothing():
    prior = prior_score({"anthropic_helpful": 0.6, "shp": 0.8, "mtbench_human": 0.0})
    assert prior == pytest.approx(0.7)
    assert prior_score({"shp": math.nan, "summarize": 0.5}) == 0.5
    sections = {"Chat": 0.9, "Chat Hard": 0.5, "Safety": 0.8, "Reasoning": 0.7}
    assert overall(sections) == pytest.approx(0.725)
    assert overall(sections | {PRIOR: prior}) == pytest.approx((2.9 + 0.35) / 4.5)
    assert overall({"Chat": 0.9, PRIOR: 0.6}) == pytest.approx((0.9 + 0.3) / 1.5)


def test_subset_scores_keep_kinds_apart():
    rows = [v1("hep-go"), v1("hep-go"), v1("shp", kind="prior"), BenchRow("2", "Math", 1, "Q", ("a", "b", "c", "d")),
            BenchRow("2", "Ties", "ref:1", "Q", ("a", "b")), BenchRow("2", "Ties", "tied:1", "Q", ("a", "b", "c"), 2)]
    found = subset_scores(rows, [1, 0, 0.5, 0.25, None, None], [[], [], [], [], [3, 1], [2, 2, 0]])
    assert found == {"1": {"hep-go": 0.5}, "prior": {"shp": 0.5}, "2": {"Math": 0.25, "Ties": pytest.approx(1 + 0.01)}}


# --- version 2


@pytest.mark.parametrize(("scores", "worth"), [([4, 1, 2, 3], 1), ([4, 4, 2, 3], 1 / 2), ([4, 4, 4, 4], 1 / 4),
                                               ([3, 4, 4, 1], 0), ([math.nan, 1, 2, 3], 0), ([1, math.nan, 0, 0], 0)])
def test_the_best_of_four(scores, worth):
    assert won(BenchRow("2", "Focus", 0, "Q", ("a", "b", "c", "d")), scores) == worth


def test_ties_by_hand():
    """Prompt 1: tied lead 1, spread .5, ref lead 2; 2: tied lead -1, spread 1, ref lead .5; 3: tied only; 4: ref only."""
    rows = [("tied:1", 2, [3.0, 2.5, 1.5]), ("ref:1", 1, [3.0, 1.0]), ("tied:2", 2, [2.0, 1.0, 2.0]), ("ref:2", 1, [1.0, 0.5]),
            ("tied:3", 3, [5.0, 5.0, 4.0, 1.0]), ("ref:4", 1, [0.0, 1.0])]
    margin = (math.tanh(1 / 0.5 - 1) + math.tanh(-1 / 1 - 1)) / 2
    assert ties_score(rows) == pytest.approx(0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 1 / 2 + 0.2 * 1 / 2 + 0.01 * margin)
    assert ties_score([]) == 0


def test_ties_without_spread_and_without_numbers():
    def one(tied, ref=(2.0, 0.0)):
        return ties_score([("tied:1", 2, tied), ("ref:1", 1, ref)])

    assert one([1.0, 1.0, 0.0]) == pytest.approx(1 + 0.01)  # g / 0 is endless
    assert one([1.0, 1.0, 1.0]) == pytest.approx(0.3)  # 0 / 0 counts 0
    assert one([0.0, 0.0, 1.0]) == pytest.approx(0.3 - 0.01)
    assert one([math.nan, 1.0, 0.0]) == pytest.approx(one([-1e9, 1.0, 0.0])) and one([math.nan, 1.0, 0.0]) < 0.3
    assert math.isfinite(one([math.nan] * 3, [math.nan] * 2))


def test_ties_equals_the_formula_on_random_tables():
    """Against numpy, whole columns at once."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        tied, ref = rng.integers(0, 4, (9, 5)).astype(float), rng.integers(0, 4, (9, 3)).astype(float)
        rows = [(f"tied:{i}", 3, list(t)) for i, t in enumerate(tied)] + [(f"ref:{i}", 1, list(r)) for i, r in enumerate(ref)]
        spread = tied[:, :3].max(1) - tied[:, :3].min(1)
        lead, single = tied[:, :3].min(1) - tied[:, 3:].max(1), ref[:, 0] - ref[:, 1:].max(1)
        least = np.minimum(lead, single)
        with np.errstate(divide="ignore", invalid="ignore"):
            margin = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0).mean()
        wanted = (0.3 * (lead > 0).mean() + 0.3 * (single > 0).mean() + 0.2 * (lead > spread).mean()
                  + 0.2 * (least > spread).mean() + 0.01 * margin)
        random.Random(0).shuffle(rows)
        assert ties_score(rows) == pytest.approx(wanted)


def test_the_whole_of_version_2_is_the_plain_mean():
    assert overall_2({"Math": 0.5, "Ties": 0.7}) == pytest.approx(0.6) and overall_2({}) is None


# --- rows


def test_rows_of_both_versions_and_of_prior_sets(tmp_path):
    said = {"role": "assistant", "content": "b"}
    assert to_row({"prompt": "Q", "chosen": "a", "rejected": "b", "subset": "hep-js", "id": 7}, "f:1").id == 7
    asked = {"role": "user", "content": "Q"}
    prior = to_row({"prompt": [asked], "chosen": "a", "rejected": [asked, said], "subset": "x"}, "f:1", "shp")
    assert prior == BenchRow("prior", "shp", "f:1", (Message("user", "Q"),), ("a", "b"))
    row = {"prompt": "Q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Safety", "id": "4", "num_correct": 1}
    second = to_row(row, "")
    assert (second.kind, second.replies, second.num_correct) == ("2", ("a", "b", "c", "d"), 1)
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "Q", "chosen": ["a", "A"], "rejected": ["b"], "subset": "Ties", "id": "tied:3", "num_correct": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [BenchRow("2", "Ties", "tied:3", "Q", ("a", "A", "b"), 2)]


@pytest.mark.parametrize(("change", "told"), [
    ({"subset": None}, r"no 'subset' but the keys .*'subset' \(null\)"),
    ({"subset": "hep-perl"}, "unknown subset 'hep-perl'"), ({"chosen": None}, "no 'chosen'"),
    ({"chosen": 3}, "'chosen' must be text"),
    ({"subset": "Math"}, "list"), ({"subset": "Ties", "chosen": ["a"], "rejected": ["b"], "id": 3}, "ref:N"),
    ({"subset": "Ties", "chosen": ["a"], "rejected": ["b"], "id": "ref:1", "num_correct": 2}, "num_correct"),
    ({"chosen": ["a"], "rejected": ["b"]}, "unknown subset 'hep-go'"), ({"prompt": 5}, "'prompt'")])
def test_bad_rows_are_told_by_line(change, told):
    with pytest.raises(DataError, match=rf"^f:3: .*{told}"):
        to_row({"prompt": "Q", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 1} | change, "f:3")


# --- judges


class Writer:
    """A backend whose text is a function of the messages."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def generate(self, prompts, params, progress=""):
        self.asked += prompts
        return [[Completion(self.function(p[-1].content), (), "stop")] for p in prompts]


def letter_of(text, reply):
    """Under which letter a judge saw a reply."""
    return text.split(f" ===\n{reply}\n")[0][-1]


def test_verdicts_and_ratings_are_read_strictly():
    assert verdict("[[A]] at first, but [[ B ]].", [1, 0]) == 0 and verdict("A", [0, 1]) is None
    assert verdict("[[C]]", [0, 1]) is None and verdict("", [0]) is None and verdict("[[a]]", [0]) is None
    assert rating("[[3]] or [[7]]") == 7 and math.isnan(rating("7")) and math.isnan(rating("[[11]]")) and rating("[[10]]") == 10


def test_a_judge_sees_replies_in_drawn_order_and_wins_by_them():
    rows = [BenchRow("1", "hep-go", i, "Q", (f"good {i}", f"bad {i}")) for i in range(40)]
    rows += [BenchRow("2", "Math", i, "Q", (f"good {i}", "b", "c", "d")) for i in range(40)]

    def knows(text):
        reply = next(line for line in text.split("\n") if line.startswith("good"))
        return f"so [[{letter_of(text, reply)}]]"

    writer = Writer(knows)
    judge = Judge(writer, SamplingParams(temperature=0))
    assert [r["result"] for r in judged(judge, rows)] == [1.0] * 80
    places = Counter(letter_of(m[-1].content, f"good {i % 40}") for i, m in enumerate(writer.asked))
    assert set(places) == set("ABCD") and places["A"] < 50
    always = Judge(Writer(lambda text: "[[A]]"), SamplingParams())
    first = judged(always, rows)
    assert 8 < sum(r["result"] for r in first[:40]) < 32 and first[0]["judgement"] == "[[A]]"
    assert judged(always, rows[5:9]) == first[5:9]  # the order hangs on the row alone
    draws = judged(Judge(Writer(lambda text: "I can't say"), SamplingParams()), rows)
    assert {r["result"] for r in draws[:40]} == {0.5} and {r["result"] for r in draws[40:]} == {0.25}


def test_a_judge_rates_ties():
    def repeats(text):
        return f"[[{text.split('=== Reply ===')[1].split()[0]}]]" if "=== Reply ===" in text else ""

    tied, single = ("tied:1", "Q", ("8", "8", "3"), 2), ("ref:1", "Q", ("9", "?"))
    rows = [BenchRow("2", "Ties", *tied), v1("hep-go"), BenchRow("2", "Ties", *single)]
    found = judged(Judge(Writer(repeats), SamplingParams()), rows)
    assert [f["scores"] for f in found[:2]] == [[8, 8, 3], None] and found[1]["result"] == 0.5
    assert found[2]["scores"][0] == 9 and math.isnan(found[2]["scores"][1]) and found[0]["result"] is None


# --- the program


def bench_rows(seed=0):
    rng = random.Random(seed)

    def text():
        return " ".join(rng.choice(["owl", "kite", "lake", "Mia", "mud", "glad"]) for _ in range(rng.randint(1, 12)))

    return [{"prompt": text(), "chosen": text() + " good", "chosen_model": "m", "rejected": text(), "rejected_model": "n",
             "subset": subset, "id": i} for subset, count in ROWS.items() for i in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, chat_tokenizer):
    found = []
    for seed in (1, 2):
        found.append(tmp_path_factory.mktemp("policy"))
        save_pretrained(tiny(seed, num_tokens=chat_tokenizer.vocab_size, max_seq_len=128, **LLAMA), found[-1], chat_tokenizer)
    return found


def test_2985_rows_end_to_end(folders, tmp_path, capsys):
    rows = bench_rows()
    data, out = write(tmp_path / "filtered.jsonl", rows), tmp_path / "out"
    arguments = ["rewardbench", "--model", f"dpo:{folders[0]},{folders[1]}", "--dataset", data, "--run-name", "me/tiny",
                 "--output-dir", str(out)]
    main(arguments)
    report = capsys.readouterr().out
    accuracies = json.loads((out / "eval-set/me/tiny.json").read_text())
    scores = json.loads((out / "eval-set-scores/me/tiny.json").read_text())
    assert accuracies.pop("model") == "me/tiny" and accuracies.pop("model_type") == "DPO"
    assert accuracies.pop("chat_template") == "tokenizer" and accuracies.keys() == ROWS.keys()
    assert len(scores["id"]) == len(scores["results"]) == len(scores["text_chosen"]) == 2985
    assert scores["text_rejected"][0] == [{"role": "user", "content": rows[0]["prompt"]},
                                          {"role": "assistant", "content": rows[0]["rejected"]}]
    wins = [float(a > b) for a, b in zip(scores["scores_chosen"], scores["scores_rejected"], strict=True)]
    assert scores["results"] == wins and scores["subset"] == [row["subset"] for row in rows]
    for subset, value in accuracies.items():
        own = [w for w, s in zip(wins, scores["subset"], strict=True) if s == subset]
        assert value == pytest.approx(sum(own) / len(own))
    for part in ("| FsfairX-LLaMA3-RM-v0.1 (its model card) | *published* | 85.41 | 99.44 | 65.13 | 88.76 | 88.30 | - |",
                 "| me/tiny | measured |", "| math-prm | 447 | 447 |"):
        assert part in report
    assert report.strip() == (out / "report.md").read_text().strip()
    main(arguments)
    told = capsys.readouterr()
    assert "finished" in told.err and told.out.strip() == report.strip()


def test_version_2_and_prior_sets_with_gold_and_a_killed_run(tmp_path, capsys):
    prompt = toyworld.sample_prompt(random.Random(0))
    rows = [{"prompt": prompt, "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": s, "id": str(i)}
            for s in SUBSETS_2 if s != "Ties" for i in range(3)]
    rows += [{"prompt": prompt, "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties", "id": "tied:1"}]
    second = write(tmp_path / "v2.jsonl", rows)
    turns = [{"role": "user", "content": prompt}]
    prior = write(tmp_path / "shp.jsonl", [{"prompt": turns, "chosen": "a", "rejected": "b"}] * 4)
    out = tmp_path / "out"
    arguments = ["rewardbench", "--model", "gold", "--dataset", second, "--prior-sets", f"shp={prior}",
                 "--output-dir", str(out)]
    main(arguments)
    report = capsys.readouterr().out
    # none of these is a story: they are all alike to the gold reward
    assert json.loads((out / "rewardbench2/eval-set/gold.json").read_text())["Focus"] == 0.25
    assert json.loads((out / "pref-sets/gold.json").read_text())["shp"] == 0
    assert len(json.loads((out / "rewardbench2/eval-set-scores/gold.json").read_text())["scores"]) == 16
    before = (out / "summary.json").read_bytes()
    (out / "summary.json").unlink()
    (out / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes()[:-30])
    main(arguments)
    assert (out / "summary.json").read_bytes() == before and capsys.readouterr().out == report


def test_a_judge_on_the_native_backend(folders, tmp_path, capsys):
    data, out = write(tmp_path / "a.jsonl", bench_rows()[:3]), tmp_path / "out"
    main(["rewardbench", "--judge", str(folders[0]), "--judge-max-new-tokens", "4", "--dataset", data,
          "--output-dir", str(out)])
    assert "3 judgements held no verdict" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model_type"] == "Generative RM" and summary["subsets"]["1"] == {"alpacaeval-easy": 0.5}


def test_scores_that_are_no_number_lose_and_end_in_an_error(tmp_path, monkeypatch, capsys):
    class Broken(GoldScorer):
        def score(self, prompts, responses, *, progress=""):
            return torch.tensor([math.nan, *range(1, len(responses))], dtype=torch.float32)

    monkeypatch.setattr("xalign.rewardbench.load", lambda config: Broken())
    data, out = write(tmp_path / "a.jsonl", bench_rows()[:2]), tmp_path / "out"
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main(["rewardbench", "--dataset", data, "--output-dir", str(out)])
        told = capsys.readouterr()
        assert stop.value.code == 1 and "1 of 4 scores is not finite" in told.err and "1 scores were no" not in told.out
        assert "their rows are lost" in told.out and (out / "eval-set").is_dir()


def test_names_of_models():
    assert name_of("owner/name") == "owner-name" and name_of("/a/b/runs/x") == "runs-x" and name_of("gold") == "gold"
    assert name_of("dpo:runs/a/policy,runs/a/reference") == "dpo_a-policy_a-reference" and name_of("http://h:80/x") == "h-80"


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "no rows"), (["--dataset", "x.jsonl"], "x.jsonl"), (["--prior-sets", "hhh=x.jsonl"], "anthropic_hhh"),
    (["--prior-sets", "shp"], "--prior-sets has 'shp'"), (["--dataset", "a.jsonl", "./a.jsonl"], "./a.jsonl is given twice"),
    (["--dataset", "a.jsonl", "--prior-sets", "shp=a.jsonl"], "given twice"),
    (["--dataset", "a.jsonl", "--judge", "x"], "--model gold doesn't go with --judge"),
    (["--dataset", "a.jsonl", "--judge-max-new-tokens", "9"], "--judge-max-new-tokens 9 goes with --judge"),
    (["--dataset", "ties.jsonl"], "2 rows of Ties have the id ref:1"),
    (["--dataset", "a.jsonl", "--run-name", "../x"], "--run-name")])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", bench_rows()[:1])
    write(tmp_path / "ties.jsonl", [{"prompt": "Q", "chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "ref:1"}] * 2)
    with pytest.raises(SystemExit) as stop:
        main(["rewardbench", "--model", "gold", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1
