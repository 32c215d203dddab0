"""`xalign ablate`: a grid of runs, each made once, some at a time, and their report; a killed grid goes on where it was."""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import xalign
from xalign.ablation_report import write_report
from xalign.disk import write_atomically
from xalign.errors import CheckpointError, Interrupted, ProcessLost, RunsFailed
from xalign.grids import AblateConfig, Run, runs_of
from xalign.prepare import say
from xalign.runs import RunFolder, read_json, strict
from xalign.trials import conduct, prepare, refuse_bad

RUNS = "runs"


def run_ablate(config: AblateConfig) -> None:
    """The program: what is missing of the grid is made, then all that is there is reported."""
    options = config.ablate
    runs = runs_of(options.grid)
    refuse_bad(runs)
    folder = Path(options.output_dir or Path("runs/ablate") / options.grid.rsplit(":", 1)[-1])
    if options.dry_run:
        for run in runs:
            print(f"{'finished' if finished(folder, run) else 'to do':9} {run.name}")
        return
    with RunFolder(folder) as owned:
        owned.claim({"program": "ablate", "grid": options.grid, "reference": options.reference}, options.overwrite)
        todo = [run for run in runs if not finished(folder, run)]
        if todo:
            (folder / RUNS).mkdir(exist_ok=True)
            with one_thread(), logged(folder / "reference.log"):
                prepare(todo, folder, options.reference)
            go(todo[: options.limit], folder, options.jobs, len(runs) - len(todo), len(runs))
        else:
            say(f"{folder} is finished (--overwrite makes it anew); its report:")
        records = [(run, read_json(file)) for run in runs if (file := record_file(folder, run)).exists()]
        print(write_report(folder, options.grid, records, len(runs)))
        say(f"report: {folder / 'report.md'}")
    if failed := [run.name for run, record in records if "error" in record]:
        raise RunsFailed(f"{len(failed)} of {len(records)} runs failed, the first is {failed[0]}; the same command tries them "
                         "again")


def record_file(folder: Path, run: Run) -> Path:
    """Where a run's settings, revision, versions and, once it is finished, its result stand."""
    return folder / RUNS / f"{run.name}.json"


def settings(run: Run) -> dict[str, Any]:
    """All that a run's result depends on, as JSON knows it; of a loss in a file its content too."""
    file = run.method.rpartition(":")[0]
    digest = {"method_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()} if file.endswith(".py") else {}
    found: dict[str, Any] = json.loads(json.dumps({"world": run.world, **dataclasses.asdict(run), **digest}))
    return found


def finished(folder: Path, run: Run) -> bool:
    """Whether there is a result. Raises `CheckpointError` for a record of this name with other settings."""
    file = record_file(folder, run)
    if not file.exists():
        return False
    record, now = read_json(file), settings(run)
    before = record.get("settings", {}) if isinstance(record, dict) else {}
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise CheckpointError(f"{file} was made with {key} = {before.get(key)!r}, now it is {now.get(key)!r}: allowed are "
                                  "the same settings (it goes on), another --output-dir, or --overwrite")
    return "result" in record


def provenance() -> dict[str, Any]:
    """The revision of the code where it is a git checkout, and the versions of what computes."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError):
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None
        return None

    tracked = git("ls-files", "--error-unmatch", "__init__.py") is not None  # an installation may lie in another repository
    return {"revision": git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if tracked else None,
            "versions": {"xalign": xalign.__version__, "python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread, whatever the number of jobs: other numbers give other roundings, and the models are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def logged(file: Path) -> Iterator[None]:
    """What the block prints, on stdout and stderr, goes into a file."""
    with open(file, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def make(run: Run, folder: Path, about: dict[str, Any]) -> str | None:
    """Make a run and write its record; gives what went wrong, of which the run's log tells more."""
    file, began = record_file(folder, run), time.monotonic()
    record = {"settings": settings(run), **about}
    write_atomically(file, json.dumps(record, indent=2) + "\n")
    with one_thread(), logged(file.with_suffix(".log")):
        try:
            record["result"] = conduct(run, folder, file.with_suffix(""))
        except Interrupted:
            raise
        except Exception as error:  # a run that fails, be it in a user's loss, ends no grid
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {error}"
    record["seconds"] = round(time.monotonic() - began, 1)
    write_atomically(file, json.dumps(strict(record), indent=2) + "\n")
    return record.get("error")


def go(runs: Sequence[Run], folder: Path, jobs: int, done: int, total: int) -> None:
    """Make runs, `jobs` at a time, and show how many are there."""
    about = provenance()
    with tqdm(total=total, initial=done, desc="ablate", unit="run", mininterval=1) as bar:
        for run, error in each(runs, folder, about, min(jobs, len(runs))):
            if error is not None:
                tqdm.write(f"{run.name} failed (the same command tries it again): {error}", file=sys.stderr)
            bar.set_postfix_str(run.name, refresh=False)
            bar.update()


def each(runs: Sequence[Run], folder: Path, about: dict[str, Any], jobs: int) -> Iterator[tuple[Run, str | None]]:
    if jobs == 1:
        for run in runs:
            yield run, make(run, folder, about)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), follow, (os.getpid(),)) as pool:
        futures = {pool.submit(make, run, folder, about): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.kill()  # a run that is cut off is made again, or goes on from its checkpoint
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise ProcessLost("a process of the grid was killed (is memory short?); the same command goes on") from None
            raise


def follow(parent: int) -> None:
    """A worker ends with its parent, also where that was killed; an interruption is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
