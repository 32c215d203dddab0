"""Run folders: one owner, one configuration, nothing of others is ever touched."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny

from xalign import save_pretrained
from xalign.errors import CheckpointError
from xalign.runs import RunFolder
from xalign.tokenizers import ByteTokenizer

CONFIG = {"program": "dpo", "beta": 0.1, "seed": 0, "model": None}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def claim(folder: Path, overwrite: bool = False, **changes) -> None:
    """Claim and give back at once."""
    run = RunFolder(folder)
    try:
        run.claim(CONFIG | changes, overwrite)
    finally:
        with run:
            pass


@pytest.fixture
def run(tmp_path):
    """A run folder of CONFIG with something in it."""
    claim(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run/sft").mkdir()
    (tmp_path / "run/sft/metrics.jsonl").write_text('{"step": 2}\n')
    return tmp_path / "run"


def test_a_new_folder_and_its_parents_are_made(tmp_path):
    claim(tmp_path / "a/b/c")
    assert json.loads((tmp_path / "a/b/c/config.json").read_text()) == CONFIG | {"processes": 1}
    (tmp_path / "empty").mkdir()
    claim(tmp_path / "empty")


def test_the_same_configuration_goes_on(run):
    before = contents(run)
    claim(run)
    assert contents(run) == before


@pytest.mark.parametrize(("changes", "message"), [
    ({"beta": 0.2}, r"was made with beta = 0.1, now it is 0.2: allowed is the same configuration .*--overwrite"),
    ({"new": 1}, r"made with new = None, now it is 1"),
    ({"program": "sft"}, r"holds a run of dpo, allowed is a new folder or one of sft's"),
    ({"beta": 0.2, "seed": 1}, "made with beta"),
])
def test_another_configuration_is_refused_by_name(run, changes, message):
    before = contents(run)
    with pytest.raises(CheckpointError, match=message):
        claim(run, **changes)
    assert contents(run) == before


def test_overwrite_starts_anew(run):
    claim(run, overwrite=True, beta=0.2)
    assert contents(run).keys() == {"config.json"}
    assert json.loads((run / "config.json").read_text())["beta"] == 0.2


def test_a_kill_while_overwriting_leaves_no_mixture(run, monkeypatch):
    """Half of the old run must not be taken up by either configuration."""
    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            claim(run, overwrite=True, beta=0.2)
    for beta in (0.1, 0.2):
        with pytest.raises(CheckpointError, match=r"made with .*allowed is the same configuration"):
            claim(run, beta=beta)
    claim(run, overwrite=True, beta=0.2)
    assert contents(run).keys() == {"config.json"}


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="holds files but no run, allowed is a new folder or a run's"):
            claim(tmp_path, overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_folder_is_no_run(tmp_path, overwrite):
    """It has a config.json too: --overwrite --output-dir runs/demo/policy must not delete the model."""
    save_pretrained(tiny(), tmp_path / "policy", ByteTokenizer())
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="holds files but no run"):
        claim(tmp_path / "policy", overwrite)
    assert contents(tmp_path) == before and not (tmp_path / "policy/.lock").exists()


@pytest.mark.parametrize("text", ["[]", '"program"', "{", "\x00"])
def test_a_config_that_is_none_is_not_taken_for_a_run(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "more").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds files but no run|no usable JSON") as caught:
        claim(tmp_path, overwrite=True)
    assert "\n" not in str(caught.value) and (tmp_path / "more").exists()


def test_places_that_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file, allowed is a new folder"):
        claim(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"can't be written \(Not a directory\)"):
        claim(tmp_path / "file/run")
    with pytest.raises(CheckpointError, match="can't be written"):
        claim(Path("/proc/xalign-run"))
    with pytest.raises(CheckpointError, match=r"can't be written \(File name too long\)"):
        claim(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_without_permission(tmp_path):
    """Root may write anywhere, so this is tried as nobody."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and parent.is_relative_to("/tmp"):
            parent.chmod(0o755)
    code = ("import os, sys; from xalign.runs import RunFolder; from xalign.errors import XalignError\n"
            "os.setgid(65534); os.setuid(65534)\n"
            "for path in sys.argv[1:]:\n"
            "    try: RunFolder(path).claim({'program': 'x'})\n"
            "    except XalignError as error: print(error)")
    (tmp_path / "locked").mkdir(mode=0o555)
    paths = [str(tmp_path / name) for name in ("locked", "locked/new", "new")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{path} can't be written (Permission denied)" for path in paths], done


# -- the lock -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_live_process_keeps_others_out(run, overwrite):
    code = ("import sys; from xalign.runs import RunFolder; import json\n"
            f"run = RunFolder(sys.argv[1]); run.claim(json.loads({json.dumps(CONFIG)!r})); print('ready', flush=True); input()")
    before = contents(run)
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(CheckpointError, match="is in use by another process, allowed is one at a time"):
            claim(run, overwrite)
        assert contents(run) == before
        holder.kill()
    claim(run)  # a lock dies with its process, however that ends


def test_one_process_cant_claim_twice(run):
    first, second = RunFolder(run), RunFolder(run)
    first.claim(CONFIG)
    with pytest.raises(CheckpointError, match="in use"):
        second.claim(CONFIG)
    with first:
        pass
    second.claim(CONFIG)
    with second:
        pass


def test_a_refused_process_takes_nothing_away(tmp_path):
    """Also where the folder's owner has written nothing but its configuration yet."""
    first = RunFolder(tmp_path / "run")
    first.claim(CONFIG)
    with pytest.raises(CheckpointError), RunFolder(tmp_path / "run") as second:
        second.claim(CONFIG)
    assert (tmp_path / "run/config.json").exists()
    with open(tmp_path / "run/.lock", "w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with first:
        pass


# -- what is left behind --------------------------------------------------------------------------------------------


def test_a_run_that_failed_before_it_began_leaves_no_trace(tmp_path):
    with pytest.raises(ValueError), RunFolder(tmp_path / "run") as run:
        run.claim(CONFIG)
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_failed_later_is_kept(tmp_path):
    with pytest.raises(ValueError), RunFolder(tmp_path / "run") as run:
        run.claim(CONFIG)
        run.log("metrics.jsonl", {"step": 0})
        raise ValueError
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "config.json", "metrics.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("file", ["state.pt", "metrics.jsonl", ".latest"])
def test_a_full_disk_is_named(tmp_path, monkeypatch, file):
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: real("/dev/full" if file in str(path) else path, *a, **k))
    folder = RunFolder(tmp_path)
    with pytest.raises(OSError) as error:
        folder.log("metrics.jsonl", {"step": 1})
        folder.save(3, tiny(num_tokens=20, **LLAMA), None, {"step": 3, "much": torch.zeros(1_000_000)})
    if file == "state.pt":
        assert str(error.value) == f"{tmp_path}/checkpoint-3 can't be written (No space left on device)"
    else:
        assert error.value.errno == 28 and error.value.filename == str(tmp_path / file.strip("."))


def test_leftovers_of_a_kill_are_swept(run):
    for name in (".checkpoint-4.123.tmp", ".checkpoint-4.99@node-1.old", "sft/.checkpoint-8.77.tmp"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_text("half")
        (run / name / ".tokenizer.model.99.tmp").write_text("half")
    (run / ".latest.5.tmp").write_text("half")
    (run / ".mine").write_text("stays")
    (run / ".hidden.tmp").write_text("stays")
    claim(run)
    left = {str(p.relative_to(run)) for p in run.rglob("*")}
    assert left == {".lock", ".mine", ".hidden.tmp", "config.json", "metrics.jsonl", "sft", "sft/metrics.jsonl"}


def test_checkpoints_are_kept_newest_first(run):
    folder = RunFolder(run)
    for step in (2, 4, 10, 6):
        folder.save(step, tiny(), None, {"step": step})
        assert (run / "latest").read_text() == f"checkpoint-{step}\n" and (run / f"checkpoint-{step}").exists()
    assert [p.name for p in folder.checkpoints()] == ["checkpoint-6", "checkpoint-4"], "10 was passed over: it is damaged"
    (run / "checkpoint-x").mkdir()
    assert len(folder.checkpoints()) == 2
    model, state = folder.restore()
    assert state["step"] == 6 and torch.equal(model.token_emb.weight, tiny().token_emb.weight)


def test_overwriting_takes_neither_another_programs_run_nor_what_is_read(run):
    claim(run)
    (run / "reward").mkdir()
    for named in (run / "reward", f"dpo:{run}/reward,elsewhere", f"shp={run / 'reward'}", [str(run / "reward")]):
        with pytest.raises(CheckpointError, match="which lies in"), RunFolder(run) as folder:
            folder.claim({"program": "dpo", "model": named if isinstance(named, list) else str(named)}, overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="holds a run of dpo, allowed is a new folder or one of score's"), (
                RunFolder(run)) as folder:
            folder.claim({"program": "score"}, overwrite)
    assert (run / "reward").exists()
