"""Each main loss raises the gold reward of the embedded world with the settings that docs/losses.md documents, and so do online
rounds."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from demo_losses import ROOT, SETTINGS, align, head, line, make_reference

from xalign.cli import main

DOCS = ROOT / "docs/losses.md"
SHORTER = {"num_train_epochs": 0.4, "eval_prompts": 120, "eval_samples": 2}  # than the table's, to take seconds a loss


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a reference in it, and with fewer held-out pairs than the embedded world has."""
    folder = tmp_path_factory.mktemp("losses")
    (folder / "held-out.jsonl").write_text("".join((ROOT / "data/test.jsonl").open().readlines()[:100]))
    make_reference(folder / "made", sft_epochs=1.0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_raises_the_gold_reward(name, runs):
    data = {"dataset": str(ROOT / "data/train.jsonl"), "eval_dataset": str(runs / "held-out.jsonl")}
    numbers = align(name, runs / "made/reference", runs, **data, **SHORTER)
    assert numbers["gold_policy_interval"][0] > numbers["gold_reference"], line(name, numbers)
    assert numbers["win_rate_interval"][0] > 0.5, line(name, numbers)
    assert numbers["well_formed_policy"] > numbers["well_formed_reference"] - 0.15, line(name, numbers)


@pytest.mark.slow
def test_gold_rises_in_each_online_round(runs):
    """docs/online.md in small: two rounds of 64 prompts, by the gold reward itself."""
    settings = json.loads((ROOT / "data/online.json").read_text()) | {
        "model": str(runs / "made/reference"), "reward_model": "gold", "rounds": 2, "prompts_per_round": 64, "n": 6,
        "eval_prompts": 60, "eval_samples": 2, "learning_rate": 6e-4, "num_train_epochs": 3}
    (runs / "online.json").write_text(json.dumps(settings))
    main(["online", "--config", str(runs / "online.json"), "--output-dir", str(runs / "online")])
    lines = [json.loads(line) for line in (runs / "online/metrics.jsonl").read_text().splitlines()]
    assert all(line["gold_gain_interval"][0] > 0 for line in lines[1:]), lines
    assert lines[-1]["well_formed"] > lines[0]["well_formed"] - 0.1, lines


@pytest.mark.parametrize("name", SETTINGS)
def test_the_docs_tell_these_settings(name):
    table = DOCS.read_text(encoding="utf-8").split("## On the demo")[1].splitlines()
    assert any(row.startswith(head(name)) for row in table), head(name)
