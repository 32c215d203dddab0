"""`kill -9` and a full disk: the same command goes on, and ends with the bytes of the run that nobody disturbed."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xalign.checkpoint import load_pretrained, load_state
from xalign.watch import TIMED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"dim": 16, "depth": 1, "heads": 2, "vocab_size": 330, "dropout": 0.1, "sft_epochs": 6, "sft_batch_size": 8,
            "max_steps": 12, "batch_size": 4, "gradient_accumulation_steps": 2, "eval_steps": 3, "save_steps": 2,
            "eval_prompts": 3, "eval_samples": 2, "eval_max_new_tokens": 8, "logging_steps": 5}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# Runs train_dpo.py, but kills itself without warning at the n-th call of a function, before (or after) the call.
SUICIDE = """
import importlib, os, signal, sys
module, name, count, after = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1) == "after"
owner = importlib.import_module(module)
for part in name.split(".")[:-1]:
    owner = getattr(owner, part)
real, calls = getattr(owner, name.split(".")[-1]), []
def deadly(*args, **kwargs):
    calls.append(1)
    result = real(*args, **kwargs) if after or len(calls) != count else None
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name.split(".")[-1], deadly)
from xalign.cli import main
main(sys.argv[1:], "dpo")
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    lines = (ROOT / "data/test.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:30]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(lines[30:40]) + "\n")
    settings = SETTINGS | {"dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "test.jsonl")}
    (folder / "tiny.json").write_text(json.dumps(settings))
    return folder


def train(toy: Path, run: Path, *before: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *(before or (str(ROOT / "train_dpo.py"),))]
    return subprocess.run([*command, "--config", str(toy / "tiny.json"), "--output-dir", str(run)], env=ENVIRONMENT, cwd=ROOT,
                          capture_output=True, text=True, timeout=200, **options)


@pytest.fixture(scope="module")
def undisturbed(toy) -> Path:
    done = train(toy, toy / "whole")
    assert done.returncode == 0, done.stderr
    return toy / "whole"


def without_seconds(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in path.read_text().splitlines()]


def assert_same(run: Path, whole: Path) -> None:
    for log in ("metrics.jsonl", "sft/metrics.jsonl"):
        assert without_seconds(run / log) == without_seconds(whole / log), log
    for file in ("samples.jsonl", "reference/model.safetensors", "policy/model.safetensors", "reference/tokenizer.model",
                 "checkpoint-12/model.safetensors", "config.json"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    ours, theirs = (json.loads((r / "evaluation.json").read_text()) for r in (run, whole))
    assert {k: v for k, v in ours.items() if k not in TIMED} == {k: v for k, v in theirs.items() if k not in TIMED}
    names = {str(p.relative_to(run)) for p in run.rglob("*")}
    assert names == {str(p.relative_to(whole)) for p in whole.rglob("*")}, "something half-written stayed"


MOMENTS = {
    "before SFT's first step": ("xalign.training", "schedule", 1, "before"),
    "in SFT, before a checkpoint": ("xalign.training", "schedule", 5, "before"),
    "in SFT, after a checkpoint": ("xalign.training", "schedule", 14, "before"),
    "after SFT's last step": ("xalign.training", "RunFolder.save", 3, "after"),
    "while SFT's checkpoint is written": ("xalign.weights", "save_file", 2, "before"),
    "while the reference is written": ("xalign.weights", "save_file", 4, "after"),
    "while the reference scores pairs": ("xalign.train", "pairs_logps", 1, "after"),
    "before DPO's first step": ("xalign.training", "schedule", 25, "before"),
    "in DPO, before a checkpoint": ("xalign.training", "schedule", 26, "after"),
    "in DPO, after a log line": ("xalign.runs", "RunFolder.log", 14, "after"),
    "while DPO's checkpoint is written": ("xalign.weights", "save_file", 7, "after"),
    "before a checkpoint gets its name": ("pathlib", "Path.rename", 7, "before"),
    "before latest is written": ("xalign.runs", "write_atomically", 7, "before"),
    "late in DPO": ("xalign.training", "schedule", 34, "before"),
    "before the policy is written": ("xalign.train", "save_pretrained", 2, "before"),
    "in the evaluation": ("xalign.evaluation.metrics", "sample", 2, "after"),
    "before the report": ("xalign.evaluation.report", "draw", 1, "after"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_undisturbed(toy, undisturbed, tmp_path, moment):
    module, name, count, when = MOMENTS[moment]
    killed = train(toy, tmp_path / "run", "-c", SUICIDE, module, name, str(count), when)
    assert killed.returncode == -signal.SIGKILL, f"{moment} never came: {killed.stderr[-500:]}"
    assert not (tmp_path / "run/report.md").exists()
    again = train(toy, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert_same(tmp_path / "run", undisturbed)


def test_killed_again_and_again_at_random(toy, undisturbed, tmp_path):
    draw, kills = random.Random(0), 0
    command = [sys.executable, "train_dpo.py", "--config", str(toy / "tiny.json"), "--output-dir", str(tmp_path / "run")]
    for _ in range(12):
        with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while process.stderr.read(1) not in (b"", b":"):  # the first word on stderr: the imports are over
                pass
            wait = draw.uniform(0.0, 0.9)
            try:
                process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
        time.sleep(0.05)
    assert kills > 0
    done = train(toy, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", undisturbed)


# -- the disk -------------------------------------------------------------------------------------------------------


def newest_is_good(run: Path) -> int:
    newest = max(run.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    load_pretrained(newest)
    return load_state(newest)["step"]


@pytest.mark.parametrize("limit", [200, 3_000, 20_000])
def test_a_write_that_fails_in_the_middle(toy, undisturbed, tmp_path, limit):
    """No file may grow beyond `limit` bytes, so weights, optimizer state or already a log line are cut off."""
    killed = train(toy, tmp_path / "run", "-c", SUICIDE, "xalign.training", "schedule", "30", "before")
    assert killed.returncode == -signal.SIGKILL
    step = newest_is_good(tmp_path / "run")

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    failed = train(toy, tmp_path / "run", preexec_fn=small_files_only)
    last = failed.stderr.splitlines()[-1]
    assert failed.returncode == 2 and last.startswith("error: /"), failed.stderr
    assert "File too large" in last and "Traceback" not in failed.stderr
    assert newest_is_good(tmp_path / "run") == step
    again = train(toy, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert_same(tmp_path / "run", undisturbed)


def test_a_full_disk(toy, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system, and not in every container")
    try:
        killed = train(toy, disk / "run", "-c", SUICIDE, "xalign.training", "schedule", "30", "before")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        step = newest_is_good(disk / "run")
        ballast = disk / "ballast"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(bytes(free - 30_000))
        failed = train(toy, disk / "run")
        last = failed.stderr.splitlines()[-1]
        assert failed.returncode == 2 and last.startswith(f"error: {disk}/run/"), failed.stderr
        assert "No space left on device" in last and "Traceback" not in failed.stderr
        assert newest_is_good(disk / "run") == step and not list((disk / "run").glob(".*.tmp"))
        ballast.unlink()
        again = train(toy, disk / "run")
        assert again.returncode == 0, again.stderr
        assert_same(disk / "run", undisturbed)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
