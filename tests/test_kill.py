"""`kill -9` and a full disk: the same command goes on, and ends with the bytes of the run that nobody disturbed."""

import json
import math
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
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


def assert_same(run: Path, whole: Path, stopped: bool = False) -> None:
    """The same weights, logs and files; a run that was `stopped` by signals kept other checkpoints besides the last."""
    for log in ("metrics.jsonl", "sft/metrics.jsonl"):
        assert without_seconds(run / log) == without_seconds(whole / log), log
    for file in ("samples.jsonl", "reference/model.safetensors", "policy/model.safetensors", "reference/tokenizer.model",
                 "checkpoint-12/model.safetensors", "config.json"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    ours, theirs = (json.loads((r / "evaluation.json").read_text()) for r in (run, whole))
    assert {k: v for k, v in ours.items() if k not in TIMED} == {k: v for k, v in theirs.items() if k not in TIMED}
    names, expected = ({str(p.relative_to(r)) for p in r.rglob("*") if not (stopped and "checkpoint-" in str(p.relative_to(r)))}
                       for r in (run, whole))
    assert names == expected, "something half-written stayed"


MOMENTS = {
    "before SFT's first step": ("xalign.training", "schedule", 1, "before"),
    "in SFT, before a checkpoint": ("xalign.training", "schedule", 5, "before"),
    "in SFT, after a checkpoint": ("xalign.training", "schedule", 14, "before"),
    "after SFT's last step": ("xalign.training", "RunFolder.save", 3, "after"),
    "while SFT's checkpoint is written": ("xalign.weights", "save_file", 2, "before"),
    "while the reference is written": ("xalign.weights", "save_file", 4, "after"),
    "while pairs are encoded": ("xalign.prepare", "write_store", 2, "before"),
    "while the reference runs over all pairs": ("xalign.reference", "pairs_logps", 1, "after"),
    "before what it gave is saved": ("xalign.reference", "write_atomically", 1, "before"),
    "while the reference scores held-out pairs": ("xalign.train", "pairs_logps", 1, "after"),
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


# A process that has imported everything and forks for each run, so that none waits for the imports again.
SERVER = """
import json, os, sys
import matplotlib.pyplot, sentencepiece, torch
import xalign.evaluation.report, xalign.train
from xalign.cli import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main(arguments, "dpo")
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs of train_dpo.py by `SERVER`, one at a time."""

    def __init__(self, toy: Path):
        self.toy = toy
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=ENVIRONMENT, cwd=ROOT, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.server.stdout.readline() == "ready\n"

    def run(self, folder: Path, *flags: str, kill: int = 0, after: float = math.inf) -> int:
        """Start, or go on with, the run in `folder`; after so many seconds it gets the signal `kill`. Its exit status."""
        arguments = ["--config", str(self.toy / "tiny.json"), "--output-dir", str(folder), *flags]
        self.server.stdin.write(json.dumps([arguments, str(self.toy / "stderr")]) + "\n")
        self.server.stdin.flush()
        process = int(self.server.stdout.readline())
        if not select.select([self.server.stdout], [], [], min(after, 100))[0]:
            os.kill(process, kill)  # it can't be another's number: nobody has asked how it ended
        return int(self.server.stdout.readline())

    def last_words(self) -> str:
        return (self.toy / "stderr").read_text().splitlines()[-1]


@pytest.fixture(scope="module")
def forks(toy) -> Iterator[Forks]:
    forks = Forks(toy)
    yield forks
    forks.server.kill()
    forks.server.wait()


def test_twenty_kills_at_random(toy, undisturbed, forks, tmp_path):
    """20 `kill -9`, 2 SIGTERM and 2 Ctrl-C all over a run, and over another where one ends before: the same weights."""
    draw, began = random.Random(0), time.monotonic()
    assert forks.run(tmp_path / "0") == 0
    whole = time.monotonic() - began
    signals = [signal.SIGKILL] * 20 + [signal.SIGTERM] * 2 + [signal.SIGINT] * 2
    draw.shuffle(signals)
    places, number = [], 0
    while signals:
        run = tmp_path / str(number)
        status = forks.run(run, kill=signals[-1], after=draw.uniform(0, 0.7 * whole))
        if status == 0:
            assert_same(run, undisturbed, stopped=True)
            number += 1
            continue
        # between its loops a run dies of SIGTERM, in them it saves, and says so by 130
        allowed = {signal.SIGKILL: (-9,), signal.SIGTERM: (-15, 130), signal.SIGINT: (130,)}[signals.pop()]
        assert status in allowed, forks.last_words()
        places.append(stage(run))
    assert forks.run(run) == 0
    assert_same(run, undisturbed, stopped=True)
    print(f"{len(places)} signals in {number + 1} runs of {whole:.1f} s: {dict(Counter(places))}")
    assert len(set(places)) >= 3, "at several stages"


def stage(run: Path) -> str:
    """How far a run has come, by its files."""
    if not (run / "reference").exists():
        return "SFT, after a checkpoint" if list(run.glob("sft/checkpoint-*")) else "tokenizer, encoding, SFT"
    if (run / "policy").exists():
        return "evaluation"
    return "DPO, after a checkpoint" if list(run.glob("checkpoint-*")) else "encoding, reference, DPO"


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


def test_a_disk_that_is_too_small_in_every_stage(toy, undisturbed, forks, tmp_path):
    """It grows a little after each failure, until all is done: nothing half-written is ever taken for whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system, and not in every container")
    try:
        places, size = [], 40
        while forks.run(disk / "run"):
            last = forks.last_words()
            assert last.startswith(f"error: {disk}/run") and "No space left on device" in last, last
            assert not [p for p in (disk / "run").glob("**/.*") if p.name != ".lock"], "what was half-written is gone"
            if checkpoints := list((disk / "run").glob("checkpoint-*")):
                assert newest_is_good(disk / "run") == max(int(p.name.split("-")[1]) for p in checkpoints)
            places.append(stage(disk / "run"))
            size += 40
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        assert_same(disk / "run", undisturbed)
        print(f"{len(places)} times full, at last {size} kB: {dict(Counter(places))}")
        assert len(set(places)) >= 3
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
