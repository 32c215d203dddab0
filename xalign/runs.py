"""The run folder: who owns it, with which configuration, its logs and its checkpoints."""

import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from torch import nn

from xalign import distributed, sharding
from xalign.checkpoint import load_trained, save_trained
from xalign.disk import LOCK, check_same, lock, write_atomically, writing
from xalign.errors import CheckpointError, XalignError
from xalign.tokenizers import Tokenizer

KEPT_CHECKPOINTS = 2  # the newest, and the one before in case the newest is damaged
CONFIG, METRICS, SAMPLES, LATEST = "config.json", "metrics.jsonl", "samples.jsonl", "latest"
HALF = "half overwritten"
LEFTOVER = re.compile(r"\..+\.\d+(@.+)?\.(tmp|old)")  # what a killed process leaves of an atomic write


class RunFolder:
    """A folder `runs/<name>` with `config.json`, `metrics.jsonl`, `samples.jsonl`, `checkpoint-N/` and `latest`.

    Of several processes rank 0 alone owns and writes it; the others call the same methods, and read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.wandb: Any = None
        self.processes = distributed.size()  # that the run began with: of so many each had `batch_size` rows of a step
        self._lock: IO | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Give the folder back; a run that failed before it wrote anything leaves no trace."""
        self.finish()
        if self._lock is None:
            return
        if kind is not None and self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {CONFIG, LOCK}:
            shutil.rmtree(self.path)
        self._lock.close()

    def claim(self, config: dict[str, Any], overwrite: bool = False) -> None:
        """Take the folder for this process, until it ends, and for this configuration, which names its "program".

        Raises `CheckpointError` if a live process holds it, if its configuration is another one (`overwrite` starts it
        anew), or if it holds something else. The same configuration resumes.
        """
        try:
            config = {**config, "processes": self.processes}
            self.processes = distributed.once(lambda: self._claim(config, overwrite))
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise

    def _claim(self, config: dict[str, Any], overwrite: bool) -> int:
        old = self.path / CONFIG
        try:
            if self.path.exists() and not self.path.is_dir():
                raise CheckpointError(f"{self.path} is a file, allowed is a new folder or a run's")
            self.path.mkdir(parents=True, exist_ok=True)
            before = read_json(old) if old.exists() else {}
            # a model's folder has a config.json too, and --overwrite must not take it for a run
            if not (isinstance(before, dict) and "program" in before) and any(p.name != LOCK for p in self.path.iterdir()):
                raise CheckpointError(f"{self.path} holds files but no run, allowed is a new folder or a run's")
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be written ({error.strerror})") from error
        self._lock = lock(self.path)
        for leftover in (p for p in (*self.path.glob(".*"), *self.path.glob("*/.*")) if LEFTOVER.fullmatch(p.name)):
            if leftover.parent.exists():  # else it went with its folder, half written too
                _remove(leftover)
        if before and before["program"] not in (config["program"], HALF):
            raise CheckpointError(f"{self.path} holds a run of {before['program']}, allowed is a new folder or one of "
                                  f"{config['program']}'s")
        if overwrite:
            self._refuse_inputs(config)
            write_atomically(old, json.dumps({"program": HALF}))  # a kill from here on leaves no mixture
            for entry in self.path.iterdir():
                if entry.name not in (LOCK, CONFIG):
                    _remove(entry)
        elif before:
            check_same(self.path, before, config, ("processes",))
            return before.get("processes", 1)
        write_atomically(old, json.dumps(config, indent=2) + "\n")
        return config["processes"]

    def _refuse_inputs(self, config: dict[str, Any]) -> None:
        """Raise `CheckpointError` where a setting names something in this folder, which overwriting would remove."""
        here = self.path.resolve()
        for key, value in config.items():
            for text in [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]:
                for name in filter(None, {text, *re.split("[,:=]", text)}):
                    if os.path.exists(name) and Path(name).resolve().is_relative_to(here):
                        raise CheckpointError(f"{key} is {text!r}, which lies in {self.path}, allowed with --overwrite is a "
                                              "folder that holds none of what is read")

    def part(self, name: str) -> "RunFolder":
        """A folder inside this one for a stage with a training loop of its own; it shares the wandb run."""
        part = RunFolder(self.path / name)
        part.path.mkdir(exist_ok=True)
        part.wandb, part.processes = self.wandb, self.processes
        return part

    def log(self, file: str, record: dict[str, Any], prefix: str = "") -> None:
        """Append a record to `metrics.jsonl` or `samples.jsonl`, and metrics to wandb where it is on."""
        if distributed.rank():
            return
        with writing(self.path / file), open(self.path / file, "a", encoding="utf-8") as f:
            f.write(json.dumps(strict(record), ensure_ascii=False) + "\n")
        if self.wandb is not None and file == METRICS:
            self.wandb.log({prefix + k: v for k, v in record.items()})

    def rewind(self, step: int) -> None:
        """Forget log lines after `step` (-1: all), and a last line that was cut off: the resumed run writes them again."""
        if distributed.rank():
            return
        for file in (METRICS, SAMPLES):
            path = self.path / file
            if path.exists():
                kept = [r for r in read_jsonl(path) if r.get("step", 0) <= step]
                write_atomically(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, newest first."""
        found = [(int(m[1]), p) for p in self.path.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
        return [p for _, p in sorted(found, reverse=True)]

    def _stale(self, newest: Path) -> list[Path]:
        """All checkpoints but the one just written and the one before it: later ones were damaged, hence passed over."""
        found = self.checkpoints()
        at = found.index(newest)
        return found[:at] + found[at + KEPT_CHECKPOINTS :]

    def save(self, step: int, model: nn.Module, tokenizer: Tokenizer | None, state: dict[str, Any]) -> Path:
        """Write `checkpoint-<step>` whole, point `latest` to it, then drop old ones."""
        return self.save_by(step, lambda folder: distributed.once(lambda: save_trained(model, folder, tokenizer, state)))

    def save_by(self, step: int, write: Callable[[Path], None]) -> Path:
        """The same with a checkpoint that all processes `write` together."""
        folder = self.path / f"checkpoint-{step}"
        write(folder)
        distributed.once(lambda: self._saved(folder))
        return folder

    def _saved(self, folder: Path) -> None:
        write_atomically(self.path / LATEST, folder.name + "\n")
        for stale in self._stale(folder):
            shutil.rmtree(stale)

    def restore(self) -> tuple[nn.Module | Path, dict[str, Any]] | None:
        """Model (of adapters and of a sharded one the folder) and state of the newest usable checkpoint, for all the one that
        rank 0 finds; a damaged one is passed over, with a warning.
        """
        loaded: list[tuple[nn.Module | Path, dict[str, Any]]] = []

        def usable() -> Path | None:
            for folder in self.checkpoints():
                try:
                    loaded.append(load_trained(folder))
                    if "files" in loaded[0][1]:
                        sharding.check_shards(folder, loaded[0][1])
                    return folder
                except XalignError as error:
                    loaded.clear()
                    print(f"warning: {error}; going back to what was before {folder.name}", file=sys.stderr)
            return None

        folder = distributed.once(usable)
        if folder is None:
            return None
        return loaded[0] if loaded else load_trained(folder)

    def start_wandb(self, name: str, config: dict[str, Any]) -> None:
        """Log to wandb too; with WANDB_MODE=offline nothing leaves the machine. A resumed run continues its own."""
        distributed.once(lambda: self._start_wandb(name, config))

    def _start_wandb(self, name: str, config: dict[str, Any]) -> None:
        import wandb

        identity = self.path / "wandb-id"
        run_id = identity.read_text().strip() if identity.exists() else secrets.token_hex(4)
        try:
            self.wandb = wandb.init(project="xalign", name=name, id=run_id, resume="allow", dir=self.path, config=config,
                                    settings=wandb.Settings(silent=True))
        except (wandb.errors.Error, OSError) as error:
            raise CheckpointError(f"wandb can't start ({str(error).splitlines()[0]}); allowed is a login, WANDB_MODE=offline, "
                                  "or --report-to none") from error
        write_atomically(identity, run_id + "\n")

    def finish(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
            self.wandb = None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no usable JSON ({error})") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a log that we write; a last line that a kill cut off is left out."""
    return list(_whole_lines(path))


def strict(value: Any) -> Any:
    """Values as JSON knows them: None for a number that is not finite."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n"):  # str.splitlines would cut at U+2028 too
        try:
            yield json.loads(line)
        except ValueError:
            return
