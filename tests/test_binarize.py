"""Annotated completions to preference pairs, their report, and the whole way from a pool of models to a better policy."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.server import Server, prompt_of
from tests.test_collect import lines, run
from xalign.annotate import read_completions
from xalign.binarize import Tally, as_pair, binarized, chosen_rejected, score
from xalign.collect_config import BinarizeOptions
from xalign.data import toyworld
from xalign.data.sources import read_pairs
from xalign.errors import DataError

ROOT = Path(__file__).resolve().parent.parent


def completion(value, name="m", text=None, **ratings):
    notes = {k: {"Rating": v, "Rationale": ""} for k, v in ratings.items()}
    return {
        "model": name,
        "principle": "honesty",
        "response": text or f"{name} says {value}",
        "overall_score": value,
        "annotations": notes,
    }


def record(*completions, **more):
    return {"source": "flan", "instruction": "do it", "completions": list(completions)} | more


def pairs_of(rows, tally=None, **options):
    return list(binarized(rows, BinarizeOptions(**options), tally or Tally()))


def test_the_best_is_chosen_and_another_rejected():
    rows = [record(*(completion(v, f"m{i}") for i, v in enumerate((3, 9, 1, 9)))) for _ in range(300)]
    for how, allowed in (("random", {"m0", "m2"}), ("lowest", {"m2"}), ("lower", {"m0", "m2"})):
        found = pairs_of(rows, rejected=how)
        assert {p["chosen_model"] for p in found} == {"m1"} and {p["rejected_model"] for p in found} == allowed
        assert len(found) == (300 if how != "random" else len([p for p in found if p["rejected_model"] != "m3"]))
    tally = Tally()
    found = pairs_of(rows, tally, rejected="random", ties="keep")
    counts = Counter(p["rejected_model"] for p in found)
    assert all(abs(counts[m] - 100) < 30 for m in ("m0", "m2", "m3"))
    assert len(pairs_of(rows, rejected="random")) == 300 - counts["m3"]  # the same draws, without the ties
    assert pairs_of(rows) == pairs_of(rows) != pairs_of(rows, seed=1)
    assert pairs_of(rows[:7]) == pairs_of(rows)[: len(pairs_of(rows[:7]))]


def test_why_an_instruction_gives_no_pair():
    tally = Tally()
    rows = [
        record(completion(3)),
        record(completion(3, "a"), completion(3, "b")),
        record(completion(4, "a"), completion(3, "b")),
        record(completion(5, "a", "same"), completion(3, "b", "same")),
        record(completion(None), completion(2)),
        record(completion(9, "a"), completion(2, "b"), source="truthful_qa"),
        record(completion(9, "a"), completion(2, "b", " ")),
    ]
    assert pairs_of(rows, tally, min_margin=2, exclude_sources=("truthful_qa",)) == []
    assert tally.left_out == {"fewer than two scored completions": 3, "tie": 1, "margin too small": 1, "source excluded": 1,
                              "no completion differs from the best": 1}
    assert pairs_of(rows[1:2], rejected="lower") == [] and len(pairs_of(rows[1:2], ties="keep")) == 1
    assert isinstance(chosen_rejected([], BinarizeOptions(), random.Random(0)), str)


@pytest.mark.parametrize(
    ("overall", "ratings", "options", "expected"),
    [
        (7, {"honesty": "4", "truthfulness": "N/A"}, {}, 7),
        (7, {"honesty": "4", "helpfulness": "1"}, {"score": "mean"}, 2.5),
        (7, {"honesty": "N/A"}, {"score": "mean"}, None),
        (7, {}, {"score": "mean"}, None),
        (None, {"honesty": "4"}, {}, None),
        (10, {"honesty": "1", "helpfulness": "2"}, {"fix_tens": True}, 1),
        (10, {"honesty": "3"}, {"fix_tens": True}, None),
        (10, {"honesty": "5"}, {"fix_tens": True}, 10),
        (10, {"honesty": "1"}, {}, 10),
        (9, {"honesty": "1"}, {"fix_tens": True}, 9),
    ],
)
def test_scores(overall, ratings, options, expected):
    assert score(completion(overall, **ratings), BinarizeOptions(**options)) == expected


@pytest.mark.parametrize(("change", "message"), [
    *(({"overall_score": v}, "an overall_score is") for v in ("8", True, float("nan"), float("inf"), [1])),
    *(({"annotations": v}, "annotations are") for v in ([1], {"honesty": "5"}, {"honesty": []})),
])
def test_a_completion_whose_notes_are_malformed(tmp_path, change, message):
    rows = [record(completion(1)), record(completion(1) | change)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=f"a.jsonl:2: {message}"):
        list(read_completions(str(tmp_path / "a.jsonl")))


def test_pairs_are_read_as_they_were_meant(tmp_path, capsys):
    """Text to continue, a question, and a conversation: by JSONL and by parquet."""
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [record(completion(9, "a"), completion(2, "b|c"), instruction="once", text=True)] * 2
    rows += [
        record(completion(9, "a"), completion(2, "b|c"), instruction="why?"),
        record(completion(1, "a"), completion(2, "b|c"), instruction=talk),
    ]
    for name, some, kinds in (("texts", rows[:2], [str, str]), ("chats", rows[2:], [tuple, tuple])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
        out = tmp_path / name
        assert run("binarize", "--annotated", tmp_path / f"{name}.jsonl", "--output-dir", out) == 0
        read = read_pairs(out / "pairs.jsonl")
        assert [type(p.prompt) for p in read] == kinds and all(
            p.margin == abs(lines(out / "pairs.jsonl")[i]["score_chosen"] - lines(out / "pairs.jsonl")[i]["score_rejected"])
            for i, p in enumerate(read)
        )
        theirs = read_pairs(out / "pairs.parquet")
        assert [(p.prompt, p.chosen, p.rejected) for p in theirs] == [(p.prompt, p.chosen, p.rejected) for p in read]
        report = (out / "report.md").read_text()
        assert "2 pairs" in report and "b\\|c" in report and (out / "wins.png").stat().st_size > 3000 and "scores.png" in report
    kept = {p.name: p.read_bytes() for p in out.iterdir()}
    assert run("binarize", "--annotated", tmp_path / "chats.jsonl", "--min-margin", 99, "--output-dir", out) == 2
    assert kept == {p.name: p.read_bytes() for p in out.iterdir()}  # what makes no pair leaves an earlier result alone
    assert read_pairs(tmp_path / "texts/pairs.jsonl")[0].prompt == "once" and read[0].prompt[0].content == "why?"
    assert [m.role for m in read[1].prompt] == ["system", "user"] and read[1].chosen[0].content == "b|c says 2"
    assert "| a |  | 0.50 |" in report
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    capsys.readouterr()
    assert (
        run("binarize", "--annotated", tmp_path / "mixed.jsonl", "--output-dir", out) == 0
        and not (out / "pairs.parquet").exists()
    )
    assert (
        "no parquet: a column has one type" in capsys.readouterr().err
        and len(read_pairs(out / "pairs.jsonl", identical="keep")) == 4
    )
    (tmp_path / "none.jsonl").write_text(json.dumps(record(completion(1))) + "\n")
    capsys.readouterr()
    assert run("binarize", "--annotated", tmp_path / "none.jsonl", "--output-dir", tmp_path / "o") == 2
    assert "no pair can be made (fewer than two scored completions: 1)" in capsys.readouterr().err
    assert not (tmp_path / "o/pairs.jsonl").exists()


def test_trl_reads_the_pairs(tmp_path):
    datasets = pytest.importorskip("datasets")
    from trl.data_utils import is_conversational, maybe_extract_prompt

    rows = [as_pair(record(), completion(2, "a"), completion(1, "b"), 2.0, 1.0)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "p.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    told = maybe_extract_prompt(loaded[0])
    for key in ("prompt", "chosen", "rejected"):  # TRL looks at any of the three
        assert is_conversational({key: told[key]})
    assert told["prompt"] == [{"role": "user", "content": "do it"}]
    assert told["chosen"] == [{"role": "assistant", "content": "a says 2"}]


COUNT = itertools.count()


def judge_by_gold(body) -> str:
    """A judge's reply in the form that is asked for, by the gold reward; now and then it chats instead."""
    text = prompt_of(body)
    if "# Instruction\n" not in text or (len(text) % 11 == 0 and body["temperature"] == 0):
        return f"Happy to help! {next(COUNT)}"
    prompt = text.split("# Instruction\n")[1].split("\n\n#")[0]

    def rating(story, top):
        return round(1 + (top - 1) * (toyworld.gold_reward(prompt, " " + story.strip()) + 8) / 13)

    if "# Answer\n" in text:
        return f"Feedback: a story\nOverall Score: {rating(text.split('# Answer')[1].split('# Your reply')[0], 10)}"
    stories = [part.split(f"\n</text {i}>")[0].split("\n", 1)[1] for i, part in enumerate(text.split("<text ")[1:], 1)]
    form = "Type: None\nRationale: r\nRating: {}\nRationale For Rating: r" if "Type: <" in text else "Rating: {}\nRationale: r"
    return "\n\n".join(f"#### Output for Text {i}\n{form.format(rating(s, 5))}" for i, s in enumerate(stories, 1))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Three models by the sft program: a good one, a narrow one, and one that has hardly been trained."""
    folder = tmp_path_factory.mktemp("pool")
    documents = (ROOT / "data/corpus.txt").read_text().splitlines()[:3000]
    told = [dict(zip(("prompt", "completion"), toyworld.split_document(d), strict=True)) for d in documents]
    (folder / "stories.jsonl").write_text("".join(json.dumps(t) + "\n" for t in told))
    for name, dim, steps in (("good", 64, 260), ("narrow", 32, 130)):
        flags = {"dataset": folder / "stories.jsonl", "dim": dim, "depth": 2, "heads": 2, "vocab-size": 512, "max-length": 128,
                 "max-seq-len": 256, "max-steps": steps, "eval-steps": 0, "save-steps": 130, "output-dir": folder / name,
                 "learning-rate": 8e-3, "batch-size": 16, "device": "cpu"}
        assert run("sft", *(f"--{k}={v}" for k, v in flags.items())) == 0
    return {"good": folder / "good/policy", "narrow": folder / "narrow/policy", "early": folder / "good/checkpoint-130"}


@pytest.mark.slow
@pytest.mark.parametrize("annotator", ["gold", "judge"])
def test_from_a_pool_of_models_to_a_better_policy(pool, tmp_path, annotator):
    """Three models, differently trained, write; gold or a judge decides; DPO on the pairs raises the gold reward."""
    plan = {"seed": 0, "completions": 3, "principles": "none", "sampling": {"max_new_tokens": 100},
            "instructions": [{"file": str(ROOT / "data/train.jsonl"), "limit": 200, "source": "toy"}],
            "models": [{"name": name, "model": str(path), "format": "text"} for name, path in pool.items()]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    written, noted, pairs = (tmp_path / name for name in ("collect", "annotate", "pairs"))
    assert run("collect", "--plan", tmp_path / "plan.json", "--output-dir", written) == 0
    flags = ["annotate", "--completions", written / "completions.jsonl", "--output-dir", noted]
    if annotator == "gold":
        assert run(*flags) == 0
    else:
        with Server(reply=judge_by_gold) as server:
            assert run(*flags, "--annotator", "judge:openai:m", "--base-url", server.url) == 0
    assert run("binarize", "--annotated", noted / "annotated.jsonl", "--rejected", "lowest", "--output-dir", pairs) == 0
    made = lines(pairs / "pairs.jsonl")
    gold = [toyworld.gold_reward(p["prompt"], p["chosen"]) - toyworld.gold_reward(p["prompt"], p["rejected"]) for p in made]
    assert len(made) > 100 and sum(g > 0 for g in gold) > 0.9 * sum(g != 0 for g in gold)
    flags = {
        "model": pool["good"],
        "dataset": pairs / "pairs.jsonl",
        "eval-dataset": ROOT / "data/test.jsonl",
        "max-length": 128,
        "num-train-epochs": 2,
        "learning-rate": 1e-3,
        "beta": 0.1,
        "eval-steps": 0,
        "save-steps": 10**6,
        "eval-prompts": 100,
        "eval-samples": 2,
        "eval-max-new-tokens": 80,
        "output-dir": tmp_path / "dpo",
        "device": "cpu",
    }
    assert run("dpo", *(f"--{k}={v}" for k, v in flags.items())) == 0
    numbers = json.loads((tmp_path / "dpo/evaluation.json").read_text())
    print(annotator, len(made), {k: v for k, v in numbers.items() if "gold" in k or "win" in k})
    assert numbers["gold_policy"] > numbers["gold_reference"] and numbers["win_rate"] > 0.5
