"""Processes by a real torchrun: two ranks equal one with twice the batch, and they end together, whatever ends them."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny

from xalign import DPO, distributed
from xalign.checkpoint import load_pretrained, load_state
from xalign.data.collate import EncodedExample, EncodedPair, Schedule, collate_examples, collate_pairs
from xalign.errors import CheckpointError, ConfigError
from xalign.objectives import SFT, Preference
from xalign.runs import METRICS, RunFolder, read_jsonl
from xalign.stages import micro_batches
from xalign.training import LoopOptions, train
from xalign.watch import TIMED

ROOT = Path(__file__).resolve().parent.parent
draw = random.Random(1)
EXAMPLES = [EncodedExample([1, *(draw.randrange(3, 17) for _ in range(n))], [False] * (1 + n // 3) + [True] * (n - n // 3))
            for n in (2, 3, 13, 5, 8, 2, 12, 7, 3, 9, 4, 11, 6, 2, 10, 5, 9, 3, 13, 4, 2)]
PAIRS = [EncodedPair(e.ids[: len(e.ids) // 2], e.ids[len(e.ids) // 2 :], f.ids[len(f.ids) // 2 :])
         for e, f in zip(EXAMPLES, reversed(EXAMPLES), strict=True)]


def fit(folder: Path, kind: str, size: int, steps: int = 6, dropout: float = 0.0) -> None:
    """Train a tiny model on this process's shards: `size` rows a micro-batch, two of them a step."""
    model = tiny(**LLAMA, attn_dropout=dropout)
    rows = EXAMPLES if kind == "sft" else PAIRS
    order = Schedule([r.length for r in rows], 2 * size, seed=3, rank=distributed.rank(), world_size=distributed.size())
    collate = collate_examples if kind == "sft" else collate_pairs
    batches = micro_batches(order, size, lambda chosen: collate([rows[i] for i in chosen], 0, chosen))
    folder.mkdir(parents=True, exist_ok=True)
    train(model, SFT(model) if kind == "sft" else Preference(DPO(model, beta=0.3)), batches, steps, len(order),
          LoopOptions(learning_rate=1e-3, warmup_steps=2, logging_steps=1, eval_steps=3), RunFolder(folder), title=kind,
          evaluate=lambda step: {"eval/loss": float(model.token_emb.weight.detach().sum())})


def check_functions() -> None:
    """What each function does between two processes; run by both."""
    number = distributed.rank()
    assert distributed.size() == 2 and number == int(os.environ["RANK"])
    assert distributed.totals([1, number, 0.5]) == [2, 1, 1]
    assert distributed.gathered(torch.tensor([number, 7])).tolist() == [[0, 7], [1, 7]]
    assert distributed.once(lambda: {"from": number}) == {"from": 0}
    shapes = [(3,), (2, 3), (7,), (1,), (40,), (2,)]
    for bucket in (1, 10, 1 << 24):  # a tensor larger than a bucket, several in one, all in one
        distributed.BUCKET = bucket
        parameters = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
        frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        for i, p in enumerate(parameters):
            p.grad = torch.full(p.shape, float(i + 10 * number))
        if number:
            parameters[2].grad = None
        parameters[4] = torch.nn.Parameter(torch.zeros(40, dtype=torch.bfloat16))
        parameters[4].grad = torch.full((40,), 1.0 + number, dtype=torch.bfloat16)
        distributed.sum_gradients([*parameters, frozen])
        assert [float(p.grad.mean()) for p in parameters] == [10, 12, 2, 16, 3, 20] and frozen.grad is None
        assert [p.grad.shape for p in parameters] == [p.shape for p in parameters]
        assert parameters[4].grad.dtype == torch.bfloat16
    model = tiny()
    distributed.check_same_weights(model, "now")
    with torch.no_grad():
        model.token_emb.weight[3, 4] += 1e-6 * number
    try:
        distributed.check_same_weights(model, "now")
    except CheckpointError as error:
        assert "rank 1 has other weights than rank 0" in str(error)
    else:
        raise AssertionError("another weight was not seen")


def main(what: str, folder: str) -> None:
    with distributed.joined():
        if what == "both":
            check_functions()
            for kind in ("sft", "dpo"):
                fit(Path(folder) / kind, kind, 2)
        elif what == "dropout":
            fit(Path(folder), "sft", 2, dropout=0.3)
        elif what == "bug" and distributed.rank():
            raise KeyError("a bug on one rank")
        elif what == "bug":
            distributed.totals([1.0])
    print("the end", flush=True)
    os._exit(0)  # as the programs do


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1",
            "--master-port", str(free_port()), *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100)


def log(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMED} for r in read_jsonl(folder / METRICS)]


def assert_near(ours: Path, theirs: Path, weights: float = 1e-4) -> None:
    """Two runs with the same rows in each step, differently split."""
    for line, other in zip(log(ours), log(theirs), strict=True):
        if line["step"] == 1:  # policy = reference: rounding alone decides who "wins"
            line, other = ({k: v for k, v in r.items() if k != "rewards/accuracies"} for r in (line, other))
        assert line.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)
        assert line == pytest.approx(other, rel=1e-4, abs=1e-4)
    newest = max((p.name for p in theirs.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    one, other = (load_pretrained(f / newest)[0].state_dict() for f in (ours, theirs))
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=weights, rtol=0), name


# -- the loop -------------------------------------------------------------------------------------------------------


def test_two_ranks_equal_one_with_twice_the_batch(tmp_path):
    """21 rows in steps of 8: the last step has 5, so 3 rows in two micro-batches on one rank, 2 in one on the other."""
    done = run(*torchrun("-m", "test_distributed", "both", str(tmp_path / "two")))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sft: 100%") == 1, "only rank 0 prints"
    for kind in ("sft", "dpo"):
        fit(tmp_path / "one" / kind, kind, 4)
        assert_near(tmp_path / "two" / kind, tmp_path / "one" / kind)
        assert log(tmp_path / "two" / kind)[-1]["eval/loss"] != 0 and len(log(tmp_path / "two" / kind)) == 9
        assert sorted(p.name for p in (tmp_path / "two" / kind).iterdir()) == ["checkpoint-6", "latest", "metrics.jsonl"]
    shards = [Schedule([e.length for e in EXAMPLES], 4, seed=3, rank=r, world_size=2).batch(2) for r in (0, 1)]
    assert sorted(map(len, shards)) in ([2, 3], [4, 4])


def test_alone_nothing_is_sent(monkeypatch):
    """Without torchrun no function touches its values, and there is no process group."""
    values, gradient = torch.tensor([1.0, float("nan")]), torch.nn.Parameter(torch.ones(2))
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.total(values) is values and distributed.totals([3]) == [3] and distributed.once(lambda: 4) == 4
    assert distributed.gathered(values).shape == (1, 2)
    distributed.sum_gradients([gradient])
    assert gradient.grad is None
    distributed.leave_to_first()


def test_half_an_environment_is_refused(toy, tmp_path):
    done = subprocess.run([sys.executable, *dpo(toy, tmp_path / "run")], env=ENVIRONMENT | {"WORLD_SIZE": "2"}, cwd=ROOT,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: WORLD_SIZE is 2 but RANK is not set, allowed is a start by torchrun, or none of these variables"]


def test_each_process_takes_its_own_gpu(monkeypatch):
    assert distributed.own_device("cuda:1") == torch.device("cuda:1"), "alone any may be named"
    taken = []
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.own_device("cuda") == torch.device("cuda:1") == taken[0]
    assert distributed.own_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device is cuda:1 for 2 processes, allowed is cuda"):
        distributed.own_device("cuda:1")


def test_a_bug_is_told_once():
    done = run(*torchrun("-m", "test_distributed", "bug", "-"))
    assert done.returncode == 1 and "the end" not in done.stdout
    ours = done.stderr.split("torch/distributed/elastic")[0]  # what torchrun says of itself comes after
    assert ours.count("Traceback") == 1 and ours.count("KeyError: 'a bug on one rank'") == 1 and "lost" not in ours


# -- the programs ---------------------------------------------------------------------------------------------------


SETTINGS = {"dim": 16, "depth": 1, "heads": 2, "vocab_size": 330, "sft_epochs": 2, "sft_learning_rate": 1e-3, "max_steps": 6,
            "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "eval_steps": 3, "save_steps": 2, "eval_prompts": 3,
            "eval_samples": 2, "eval_max_new_tokens": 8, "logging_steps": 1}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toy_data(tmp_path_factory.mktemp("toy"))


def toy_data(folder: Path) -> Path:
    lines = (ROOT / "data/test.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:29]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(lines[30:40]) + "\n")
    settings = SETTINGS | {"dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "test.jsonl")}
    (folder / "tiny.json").write_text(json.dumps(settings))
    return folder


def dpo(toy: Path, folder: Path, *flags: str, script: str = str(ROOT / "train_dpo.py")) -> list[str]:
    return [script, "--config", str(toy / "tiny.json"), "--output-dir", str(folder), *flags]


TWO, ONE = ("--batch-size", "2", "--sft-batch-size", "4"), ("--batch-size", "4", "--sft-batch-size", "8")
NOISY = (*TWO, "--dropout", "0.1")


def errors(stderr: str) -> list[str]:
    """Our own error lines (a bar may stand before one), and no traceback of ours: torchrun always prints one of its own."""
    assert 'File "' + str(ROOT / "xalign") not in stderr, stderr
    return re.findall("error: .*", stderr)


def test_a_data_error_is_told_once(toy, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    done = run(*torchrun(*dpo(toy, tmp_path / "run", "--dataset", str(tmp_path / "bad.jsonl"))))
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    [line] = errors(done.stderr)
    assert "bad.jsonl:1" in line and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_whole_program_on_two_ranks(toy, tmp_path):
    """Tokenizer, imitation, sharded reference, DPO, report; one process with the same settings finds it finished."""
    done = run(*torchrun(*dpo(toy, tmp_path / "two", *TWO)))
    assert done.returncode == 0, done.stderr
    alone = run(sys.executable, *dpo(toy, tmp_path / "one", *ONE))
    assert alone.returncode == 0, alone.stderr
    assert done.stdout.count("preference accuracy") == 1
    names = [sorted(str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*")) for n in ("one", "two")]
    assert names[0] == names[1] and "report.md" in names[0]
    assert_near(tmp_path / "two/sft", tmp_path / "one/sft")
    assert_near(tmp_path / "two", tmp_path / "one")
    ours, theirs = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("two", "one"))
    assert ours["perplexity_policy"] == pytest.approx(theirs["perplexity_policy"], rel=1e-3)
    again = run(sys.executable, *dpo(toy, tmp_path / "two", *TWO))
    assert again.returncode == 0 and "is finished" in again.stderr
    refused = run(sys.executable, *dpo(toy, tmp_path / "two", *ONE))
    [line] = errors(refused.stderr)
    assert refused.returncode != 0 and "was made with batch_size = 2, now it is 4: allowed is" in line


@pytest.mark.slow
def test_sft_on_two_ranks(toy, tmp_path):
    lines = [f"the cat number {i} sat on the mat {'and on ' * (i % 7)}it" for i in range(44)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    flags = ["sft", "--dataset", str(tmp_path / "text.txt"), "--dim", "16", "--depth", "1", "--heads", "2",
             "--vocab-size", "300", "--learning-rate", "1e-3", "--logging-steps", "1", "--output-dir"]
    done = run(*torchrun("-m", "xalign", *flags, str(tmp_path / "two"), "--batch-size", "4"))
    assert done.returncode == 0, done.stderr
    alone = run(sys.executable, "-m", "xalign", *flags, str(tmp_path / "one"), "--batch-size", "8")
    assert alone.returncode == 0, alone.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "two/policy")]
    assert_near(tmp_path / "two", tmp_path / "one")


# Runs train_dpo.py, but one rank does something deadly before the n-th learning rate is asked for.
DEADLY = """
import os, signal, sys
rank, count, what = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
from xalign import training
real, calls = training.schedule, []
def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == count and os.environ["RANK"] == str(rank):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "nan":
            sys._getframe(1).f_locals["model"].token_emb.weight.register_hook(lambda gradient: gradient * float("nan"))
        elif what == "drift":
            sys._getframe(1).f_locals["model"].token_emb.weight.data[0, 0] += 1e-3
        else:
            os.kill(os.getpid(), getattr(signal, what))
    return real(*args, **kwargs)
training.schedule = deadly
from xalign.cli import main
main(sys.argv[1:], "dpo")
"""


@pytest.fixture(scope="module")
def undisturbed(toy) -> Path:
    done = run(*torchrun(*dpo(toy, toy / "whole", *NOISY)))
    assert done.returncode == 0, done.stderr
    return toy / "whole"


def disturbed(toy: Path, folder: Path, rank: int, count: int, what: str,
              flags: tuple[str, ...] = NOISY) -> subprocess.CompletedProcess:
    (toy / "deadly.py").write_text(DEADLY)
    command = torchrun(str(toy / "deadly.py"), str(rank), str(count), what, *dpo(toy, folder, *flags)[1:])
    # torchrun looks every 2 seconds: 10 times a second, on a busy machine, it ends the others before they see a death
    done = run(*command[:3], "--monitor-interval", "2", *command[3:])
    assert done.returncode != 0 and not (folder / "report.md").exists()
    return done


def assert_goes_on_as(toy: Path, folder: Path, whole: Path) -> None:
    done = run(*torchrun(*dpo(toy, folder, *NOISY)))
    assert done.returncode == 0, done.stderr
    for part in ("", "sft"):
        assert log(folder / part) == log(whole / part)
    for file in ("reference/model.safetensors", "policy/model.safetensors", "samples.jsonl", "config.json"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "count"), [(1, 5), (0, 12), (1, 13)])  # 8 steps of SFT, then 6 of DPO
def test_a_killed_rank_ends_all_and_the_run_goes_on(toy, undisturbed, tmp_path, rank, count):
    started = time.time()
    killed = disturbed(toy, tmp_path / "run", rank, count, "kill")
    [line] = errors(killed.stderr)
    assert f"rank {1 - rank} lost another of the 2 processes" in line and "the same command goes on" in line
    assert time.time() - started < 25, "the survivor was not waited for"
    assert_goes_on_as(toy, tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "what"), [(1, "SIGTERM"), (0, "SIGINT")])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(toy, undisturbed, tmp_path, rank, what):
    done = disturbed(toy, tmp_path / "run", rank, 11, what)
    [line] = errors(done.stderr)
    assert "dpo: stopped after step 3 of 6, all is saved in" in line and "exitcode  : 130" in done.stderr
    state = load_state(tmp_path / "run/checkpoint-3")
    assert state["step"] == 3 and len(state["rng"]) == 2 and not torch.equal(*state["rng"])
    assert_goes_on_as(toy, tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ctrl_c_at_the_launcher(toy, tmp_path, parallel):
    # torchrun hands the signal on to all processes
    command = torchrun(*dpo(toy, tmp_path / "run", *NOISY, "--max-steps", "100000", "--parallel", parallel))
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        seen = ""
        while not re.search(r"dpo: .* [1-9]\d*/100000", seen):
            seen += process.stderr.read(1) or pytest.fail(seen)
        process.send_signal(signal.SIGINT)
        seen += process.stderr.read()
        assert process.wait(40) != 0
    [line] = errors(seen) or [seen]
    assert "dpo: stopped after step" in line and "all is saved" in line
    newest = tmp_path / "run" / (tmp_path / "run/latest").read_text().strip()
    assert str(newest) in line and load_state(newest)["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_on_one_rank_is_every_ranks(toy, tmp_path, rank):
    done = disturbed(toy, tmp_path / "run", rank, 12, "nan")
    [line] = errors(done.stderr)
    assert "step 4: loss is 0." in line and "gradient norm nan" in line and "exitcode  : 1 " in done.stderr
    assert (tmp_path / "run/latest").read_text() == "checkpoint-2\n"


@pytest.mark.slow
def test_weights_that_drift_apart_are_never_saved(toy, tmp_path):
    done = disturbed(toy, tmp_path / "run", 1, 12, "drift")
    [line] = errors(done.stderr)
    assert "after step 4 rank 1 has other weights than rank 0" in line
    assert (tmp_path / "run/latest").read_text() == "checkpoint-2\n"


@pytest.mark.slow
def test_dropout_draws_differ_by_rank_and_are_reproducible(tmp_path):
    for name in ("a", "b"):
        done = run(*torchrun("-m", "test_distributed", "dropout", str(tmp_path / name)))
        assert done.returncode == 0, done.stderr
    fit(tmp_path / "plain", "sft", 4)
    assert log(tmp_path / "a") == log(tmp_path / "b") != log(tmp_path / "plain")
    states = load_state(tmp_path / "a/checkpoint-6")["rng"]
    assert states.shape[0] == 2 and not torch.equal(states[0], states[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
