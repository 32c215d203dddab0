"""The demo as a newcomer runs it, held to the figures that the project promises (slow: the whole run)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    command = [sys.executable, "train_dpo.py", "--config", "data/demo.json", "--output-dir", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((tmp_path / "demo" / "evaluation.json").read_text())
    assert numbers["prompts"] == 500
    assert numbers["well_formed_reference"] >= 0.95 and numbers["consistent_reference"] >= 0.85
    assert numbers["well_formed_policy"] >= numbers["well_formed_reference"] - 0.03
    assert numbers["consistent_policy"] >= numbers["consistent_reference"] - 0.03
    assert numbers["win_rate"] >= 0.80 and numbers["win_rate_interval"][0] > 0.78
    assert numbers["kl"] <= 5 and numbers["distinct_policy"] >= 0.95
    assert 0.75 <= numbers["preference_accuracy_limit"] <= 0.9
    assert numbers["preference_accuracy_share"] >= 0.75
    assert numbers["perplexity_policy"] <= 1.15 * numbers["perplexity_reference"]
    assert numbers["gold_untrained"] < numbers["gold_reference"] < numbers["gold_policy"]

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "is finished" in again.stderr and "win rate" in again.stdout

    command = [sys.executable, "-m", "xalign", "evaluate", "--model", str(tmp_path / "demo/policy"), "--eval-prompts", "20",
               "--eval-samples", "1", "--eval-max-new-tokens", "112", "--output-dir", str(tmp_path / "evaluation")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert told["alignment_gold"] >= 0.85 and told["alignment"] >= 0.75
    assert told["perplexity_policy"] == pytest.approx(numbers["perplexity_policy"], rel=1e-5)
