"""Shards: two processes by FSDP2 equal one, any number goes on from any checkpoint, and damage is seen."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny
from test_distributed import (
    DEADLY,
    ENVIRONMENT,
    EXAMPLES,
    ONE,
    PAIRS,
    ROOT,
    TWO,
    disturbed,
    dpo,
    errors,
    log,
    run,
    torchrun,
    toy_data,
)
from torch import nn
from torch.distributed.tensor import DTensor

from xalign import DPO, distributed, sharding
from xalign.checkpoint import load_pretrained, load_state
from xalign.data.collate import Schedule, collate_examples, collate_pairs
from xalign.errors import CheckpointError
from xalign.nn.lora import apply_lora
from xalign.objectives import SFT, Preference
from xalign.runs import RunFolder
from xalign.stages import micro_batches
from xalign.training import LoopOptions, train

# Each case trains differently shaped steps: what the two processes have of a step differs in rows, tokens and micro-batches.
EQUAL = {
    "sft": {"kind": "sft", "rows": 17},
    "ddp": {"kind": "dpo", "rows": 17, "parallel": "ddp"},
    "sft-tied-tokens": {"kind": "sft", "tied": True, "tokens": 14, "checkpointing": True},
    "dpo": {"kind": "dpo", "shared": True},
    "dpo-tied-asked": {"kind": "dpo", "tied": True, "tokens": 20, "asked": True, "checkpoint_type": "full"},
    "lora": {"kind": "dpo", "lora": True},
}
RESUMED = {f"{parallel}-{kind}": {"kind": "dpo", "parallel": parallel, "checkpoint_type": kind}
           for parallel in ("ddp", "fsdp") for kind in ("full", "sharded")}
FAST = ["sft-tied-tokens", "dpo-tied-asked", "fsdp-sharded"]
SLOW = [*(name for name in EQUAL | RESUMED if name not in FAST), "damaged"]
SIZE = 2  # rows of a micro-batch, of which each of two processes has two a step


class Stop(Exception):
    """Stands for a kill on all processes at once."""


def schedule(rows, rank: int | None = None, size: int | None = None) -> Schedule:
    return Schedule([r.length for r in rows], 2 * SIZE, seed=3, rank=distributed.rank() if rank is None else rank,
                    world_size=size or distributed.size(), processes=2)


def fit(folder: Path, *, kind: str, rows: int = 21, tied: bool = False, tokens: int | None = None, asked: bool = False,
        lora: bool = False, shared: bool = False, checkpointing: bool = False, stop: int | None = None, parallel: str = "fsdp",
        **options) -> nn.Module:
    """Train a tiny model for 6 steps on this process's rows; before step `stop` it dies."""
    model = tiny(**LLAMA, tie_embedding=tied)
    if lora:
        apply_lora(model, rank=2)
        torch.manual_seed(5)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data.normal_(std=0.1)
    model.attn_layers.gradient_checkpointing = checkpointing
    data = (EXAMPLES if kind == "sft" else PAIRS)[:rows]
    order = schedule(data)
    collate = collate_examples if kind == "sft" else collate_pairs
    plain = micro_batches(order, SIZE, lambda chosen: collate([data[i] for i in chosen], 0, chosen), tokens)

    def batches(step: int):
        if step == stop:
            raise Stop
        return plain(step)

    policy = DPO(model, beta=0.3, share_prefix=shared) if kind == "dpo" else None
    folder.mkdir(parents=True, exist_ok=True)
    held = plain(0)[0]  # the same for all where there is one process; rank 0's where there are two

    def evaluate(step: int) -> dict[str, float]:
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        with torch.no_grad():
            return {"eval/norm": float(sum(p.double().square().sum() for p in model.parameters())),
                    "eval/seen": float(model(held.tokens if kind == "sft" else held.chosen).isfinite().all())}

    settings = {"learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 1, "eval_steps": 3, "save_steps": 3} | options
    train(model, SFT(model) if policy is None else Preference(policy), batches, 6, len(order),
          LoopOptions(parallel=parallel, **settings), RunFolder(folder), title=kind, evaluate=evaluate,
          reference=policy.ref_model if asked and policy else None)
    return model


def dies(folder: Path, at: int = 4, **case) -> None:
    with pytest.raises(Stop):
        fit(folder, stop=at, **case)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def main(folder: Path, *names: str) -> None:
    """What the two processes do: the cases, half of those that one goes on with, the rest of those that one began."""
    with distributed.joined():
        for name, case in [(n, c) for n, c in EQUAL.items() if n in names]:
            model = fit(folder / "two" / name, **case)
            if distributed.rank() == 0:
                torch.save(weights(model), folder / "two" / name / "weights.pt")
        for name, case in [(n, c) for n, c in RESUMED.items() if n in names]:
            dies(folder / "two-one" / name, **case)
            fit(folder / "one-two" / name, **case)
        if "damaged" in names:
            run = folder / "damaged"
            dies(run, kind="dpo", save_steps=2, at=5)
            shard = run / "checkpoint-4/training/shards/__1_0.distcp"
            distributed.once(lambda: shard.write_bytes(shard.read_bytes()[:-1]))
            fit(run, kind="dpo", save_steps=2)
    os._exit(0)


@pytest.mark.parametrize("names", [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)])
def test_two_processes_equal_one_and_go_on_with_what_it_saved(tmp_path, names):
    equal, resumed = ({n: c for n, c in cases.items() if n in names} for cases in (EQUAL, RESUMED))
    for name, case in resumed.items():
        dies(tmp_path / "one-two" / name, **case)
    done = run(*torchrun("-m", "test_sharding", str(tmp_path), *names))
    assert done.returncode == 0, done.stderr
    assert len(re.findall("(?:dpo|sft): 100%", done.stderr)) == len(names), "only rank 0 prints"
    assert done.stderr.count("resumed after step 3 of 6, by 1 processes") == len(resumed)
    for name, case in equal.items():
        model = fit(tmp_path / "one" / name, **case)
        assert_logs_near(tmp_path / "two" / name, tmp_path / "one" / name)
        assert_weights_near(torch.load(tmp_path / "two" / name / "weights.pt"), weights(model))
    whole = tmp_path / "whole"
    expected = weights(fit(whole, kind="dpo"))
    for name, case in resumed.items():
        model = fit(tmp_path / "two-one" / name, **case)
        assert_weights_near(weights(model), expected)
        for way in ("two-one", "one-two"):
            assert_logs_near(tmp_path / way / name, whole)
            found = tmp_path / way / name / "checkpoint-6"
            assert (found / "model.safetensors").exists() == (case["checkpoint_type"] == "full")
            again = weights(fit(tmp_path / way / name, **case))  # nothing is left to do but to load
            assert_weights_near(again, expected)
    if "damaged" in names:
        assert "__1_0.distcp is damaged" in done.stderr and "resumed after step 2 of 6" in done.stderr
        assert_logs_near(tmp_path / "damaged", whole)
    shards = tmp_path / "two" / names[0] / "checkpoint-6/training/shards"
    size = {p.name: p.stat().st_size for p in shards.iterdir()}
    assert sorted(size) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert size["__0_0.distcp"] < 1.2 * size["__1_0.distcp"] < 1.5 * size["__0_0.distcp"], "each process writes its half"


def assert_logs_near(ours: Path, theirs: Path) -> None:
    assert len(log(ours)) == 9 and all(r.get("eval/seen", 1) == 1 for r in log(ours))
    for line, other in zip(log(ours), log(theirs), strict=True):
        if line["step"] == 1:  # policy = reference: rounding alone decides who "wins"
            line, other = ({k: v for k, v in r.items() if k != "rewards/accuracies"} for r in (line, other))
        assert line.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)
        assert line == pytest.approx(other, rel=1e-4, abs=1e-4)


def assert_weights_near(ours: dict, theirs: dict) -> None:
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4, rtol=0), name


def test_the_cases_are_uneven():
    """The steps of the tests above: other counts of micro-batches and rows on both ranks, and at last no row at all on one."""
    assert [schedule(PAIRS[:17], 1, 2).batch(step) for step in (2, 5)] == [[], []]
    for rows, tokens in ((EXAMPLES, 14), (PAIRS, 20), (PAIRS, None)):
        ranks = [micro_batches(schedule(rows, rank, 2), SIZE, list, tokens) for rank in (0, 1)]
        counts = [[(len(batches(step)), sum(map(len, batches(step)))) for step in range(6)] for batches in ranks]
        assert any(a[0] != b[0] for a, b in zip(*counts, strict=True)), "micro-batches"
        assert any(a[1] != b[1] for a, b in zip(*counts, strict=True)), "rows"


# -- sharded checkpoints, by one process ----------------------------------------------------------------------------


def test_a_sharded_checkpoint_goes_on_to_the_bit(tmp_path):
    case = {"kind": "sft", "checkpoint_type": "sharded"}
    expected = weights(fit(tmp_path / "whole", **case))
    dies(tmp_path / "run", **case)
    assert all(torch.equal(t, expected[name]) for name, t in weights(fit(tmp_path / "run", **case)).items())
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="allowed is a model's folder, such as"):
        load_pretrained(tmp_path / "run/checkpoint-6")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "metadata"])
def test_a_damaged_shard_falls_back_to_the_checkpoint_before(tmp_path, damage, capsys):
    case = {"kind": "sft", "checkpoint_type": "sharded", "save_steps": 2}
    expected = weights(fit(tmp_path, **case))
    file = tmp_path / "checkpoint-6/training/shards" / (".metadata" if damage == "metadata" else "__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[:-5] if damage == "cut" else content)
    if damage == "gone":
        file.unlink()
    capsys.readouterr()
    assert all(torch.equal(t, expected[name]) for name, t in weights(fit(tmp_path, **case)).items())
    told = capsys.readouterr().err
    assert f"warning: {file} {'can' if damage == 'gone' else 'is damaged'}" in told
    assert "going back to what was before checkpoint-6" in told and "resumed after step 4 of 6" in told


def test_a_full_disk_and_another_model_are_named(tmp_path, monkeypatch):
    fit(tmp_path / "run", kind="sft", checkpoint_type="sharded")
    other = tiny(**LLAMA, dim=16)
    state = load_state(tmp_path / "run/checkpoint-6")
    with pytest.raises(CheckpointError, match="its shards are no state of this training"):
        sharding.load_shards(tmp_path / "run/checkpoint-6", other, torch.optim.AdamW(other.parameters()), state)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"can't be written .*No space left"):
        sharding.save_shards(tmp_path / "new", other, torch.optim.AdamW(other.parameters()), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


# -- the programs ---------------------------------------------------------------------------------------------------


SHARDED = (*TWO, "--parallel", "fsdp")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toy_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def undisturbed(toy) -> Path:
    done = run(*torchrun(*dpo(toy, toy / "sharded", *SHARDED)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("preference accuracy") == 1
    return toy / "sharded"


def assert_policies_near(ours: Path, theirs: Path) -> None:
    for part in ("reference", "policy"):
        assert_weights_near(*(load_pretrained(folder / part)[0].state_dict() for folder in (ours, theirs)))


def assert_program_logs_near(ours: Path, theirs: Path) -> None:
    for part in ("sft", ""):
        for line, other in zip(log(ours / part), log(theirs / part), strict=True):
            assert line.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)
            line, other = ({k: v for k, v in r.items() if "accuracies" not in k} for r in (line, other))
            assert line == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--bf16", "--checkpoint-type", "full"), (
    "--no-precompute-ref-log-probs", "--gradient-checkpointing", "--micro-batch-tokens", "90")])
def test_the_whole_program_sharded(toy, undisturbed, tmp_path, flags):
    two = undisturbed
    if flags:
        two = tmp_path / "two"
        done = run(*torchrun(*dpo(toy, two, *SHARDED, *flags)))
        assert done.returncode == 0, done.stderr
    alone = run(sys.executable, *dpo(toy, tmp_path / "one", *ONE, *flags))
    assert alone.returncode == 0, alone.stderr
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "checkpoint" not in str(p.relative_to(folder)))
             for folder in (tmp_path / "one", two)]
    assert names[0] == names[1] and "report.md" in names[0]
    if "--bf16" not in flags:  # which rounds more than the order of sums
        assert_policies_near(two, tmp_path / "one")
        assert_program_logs_near(two, tmp_path / "one")
    again = run(sys.executable, *dpo(toy, two, *TWO, *flags))
    assert again.returncode == 0 and "is finished" in again.stderr, "one process takes the run for its own"


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "count"), [(1, 5), (0, 12), (1, 13)])  # 8 steps of SFT, then 6 of DPO
def test_a_killed_rank_of_a_sharded_run(toy, undisturbed, tmp_path, rank, count):
    killed = disturbed(toy, tmp_path / "run", rank, count, "kill", SHARDED)
    [line] = errors(killed.stderr)
    assert f"rank {1 - rank} lost another of the 2 processes" in line and "the same command goes on" in line
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    done = run(*torchrun(*dpo(toy, tmp_path / "run", *SHARDED)))
    assert done.returncode == 0, done.stderr
    for part in ("", "sft"):
        assert log(tmp_path / "run" / part) == log(undisturbed / part)
    assert (tmp_path / "run/policy/model.safetensors").read_bytes() == (undisturbed / "policy/model.safetensors").read_bytes()
    done = run(sys.executable, *dpo(toy, tmp_path / "alone", *TWO))  # no flag but the batch's: the run knows
    assert done.returncode == 0, done.stderr
    assert count < 9 or re.search("dpo: resumed after step [24] of 6, by 2 processes", done.stderr)
    assert_policies_near(tmp_path / "alone", undisturbed)
    assert_program_logs_near(tmp_path / "alone", undisturbed)


@pytest.mark.slow
def test_one_process_begins_and_three_go_on(toy, tmp_path):
    whole = run(sys.executable, *dpo(toy, tmp_path / "whole", *ONE))
    assert whole.returncode == 0, whole.stderr
    (toy / "deadly.py").write_text(DEADLY)
    command = [str(toy / "deadly.py"), "0", "12", "SIGINT", *dpo(toy, tmp_path / "run", *ONE)[1:]]
    stopped = subprocess.run([sys.executable, *command], env=ENVIRONMENT | {"RANK": "0"}, cwd=ROOT, capture_output=True,
                             text=True, timeout=100)
    assert stopped.returncode == 130, stopped.stderr
    done = run(*torchrun(*dpo(toy, tmp_path / "run", *ONE, "--parallel", "fsdp"), processes=3))
    assert done.returncode == 0, done.stderr
    assert "resumed after step 4 of 6, by 1 processes" in done.stderr
    assert_policies_near(tmp_path / "run", tmp_path / "whole")
    assert_program_logs_near(tmp_path / "run", tmp_path / "whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
