"""The one loop: global means under accumulation, exact resume, what happens at NaN, signals and damage."""

import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny

from xalign import DPO
from xalign.config import RunOptions, TrainingOptions
from xalign.data.collate import EncodedExample, EncodedPair, Schedule, collate_examples, collate_pairs
from xalign.errors import ConfigError, Diverged, Interrupted
from xalign.evaluation.metrics import pairs_logps
from xalign.logprobs import token_logprobs
from xalign.objectives import SFT, Moving, Preference
from xalign.optim import adamw, schedule
from xalign.runs import METRICS, RunFolder, read_jsonl
from xalign.stages import loop_options, micro_batches
from xalign.train import check_first_loss
from xalign.training import LoopOptions, postponed_signals, train
from xalign.watch import TIMED

ROOT = Path(__file__).resolve().parent.parent
draw = random.Random(0)
EXAMPLES = [EncodedExample([1, *(draw.randrange(3, 17) for _ in range(n))], [False] * (1 + n // 3) + [True] * (n - n // 3))
            for n in (2, 3, 13, 5, 8, 2, 12, 7, 3, 9, 4, 11, 6, 2, 10, 5, 9, 3, 13, 4, 2, 8, 6, 12)]
PAIRS = [EncodedPair(e.ids[: len(e.ids) // 2], e.ids[len(e.ids) // 2 :], f.ids[len(f.ids) // 2 :])
         for e, f in zip(EXAMPLES, reversed(EXAMPLES), strict=True)]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def network(**options):
    return tiny(**(LLAMA | options))


def fit(folder: Path, kind: str = "sft", size: int = 4, accumulation: int = 1, steps: int = 9, stop: int | None = None,
        event=None, model=None, evaluate=True, bad=(), **options):
    """Train a tiny model; before step `stop` the `event` happens, and NaN in the steps `bad`. Gives (model, log lines without
    what the clock gives)."""
    model = network(attn_dropout=options.pop("dropout", 0.0)) if model is None else model
    rows = EXAMPLES if kind == "sft" else PAIRS
    order = Schedule([r.length for r in rows], size * accumulation, seed=3, group_by_length=False)
    collate = collate_examples if kind == "sft" else collate_pairs
    plain = micro_batches(order, size, lambda chosen: collate([rows[i] for i in chosen], 0, chosen))

    def batches(step):
        if step == stop:
            event()
        if step in bad:
            poison_once(model)
        return plain(step)

    dpo, moving = DPO(model, beta=0.3), None
    if kind == "moving":
        objective, moving = Preference(dpo), Moving(dpo, alpha=0.6, steps=2)
    else:
        objective = SFT(model) if kind == "sft" else Preference(dpo, pairs_logps(dpo, dpo.ref_model, PAIRS, 0))
    settings = {"learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 2, "eval_steps": 3, "save_steps": 0} | options
    run = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    train(model, objective, batches, steps, len(order), LoopOptions(**settings), run, title=kind,
          evaluate=(lambda step: {"eval/loss": float(model.token_emb.weight.detach().sum())}) if evaluate else None,
          moving=moving)
    return model, log(folder)


def poison_once(model) -> None:
    """NaN in the next forward pass."""
    def poison(module, inputs, output):
        hook.remove()
        return output * float("nan")

    hook = model.attn_layers.final_norm.register_forward_hook(poison)


def log(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMED} for r in read_jsonl(folder / METRICS)]


def losses(lines: list[dict]) -> list[float]:
    return [r["loss"] for r in lines if "loss" in r]


def killed(*args, **kwargs) -> None:
    def kill():
        raise Killed

    with pytest.raises(Killed):
        fit(*args, event=kill, **kwargs)


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- means ----------------------------------------------------------------------------------------------------------


def test_first_loss_is_the_mean_over_scored_tokens(tmp_path):
    model = network()
    order = Schedule([e.length for e in EXAMPLES], 8, seed=3, group_by_length=False)
    total, count = 0.0, 0
    for i in order.batch(0):
        e = EXAMPLES[i]
        logps = token_logprobs(model(torch.tensor([e.ids])), torch.tensor([e.ids]))[0].detach()
        scored = torch.tensor(e.loss_mask[1:])
        total, count = total - float(logps[scored].sum()), count + int(scored.sum())
    _, lines = fit(tmp_path / "r", size=8, steps=1, evaluate=False)
    assert lines[0]["loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_accumulation_changes_nothing(tmp_path, kind):
    runs = {size: fit(tmp_path / str(size), kind, size, 8 // size, steps=6, logging_steps=1) for size in (8, 4, 2)}
    reference, lines = runs[8]
    for size in (4, 2):
        model, others = runs[size]
        for line, other in zip(lines, others, strict=True):
            if line["step"] == 1:  # policy = reference: rounding alone decides who "wins"
                line, other = ({k: v for k, v in r.items() if k != "rewards/accuracies"} for r in (line, other))
            assert line == pytest.approx(other, rel=2e-4, abs=2e-4)
        for (name, a), b in zip(reference.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.allclose(a, b, atol=3e-5), name


def test_the_mean_of_means_would_differ(tmp_path):
    """The data of the test above can tell a global mean from a mean of the micro-batches' means."""
    order = Schedule([e.length for e in EXAMPLES], 8, seed=3, group_by_length=False)
    model = network()
    halves = [collate_examples([EXAMPLES[i] for i in part], 0) for part in (order.batch(0)[:4], order.batch(0)[4:])]
    objective = SFT(model)
    means, weights = [float(objective(b)[0].detach()) for b in halves], [objective.weight(b) for b in halves]
    whole = sum(m * w for m, w in zip(means, weights, strict=True)) / sum(weights)
    assert abs(whole - sum(means) / 2) > 2e-3


def test_a_step_without_scored_tokens_is_no_nan(tmp_path):
    blank = [collate_examples([EncodedExample([1, 2, 3], [False] * 3)], 0)]
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (tmp_path / "r").mkdir()
    train(model, SFT(model), lambda step: blank, 1, 1, LoopOptions(1e-3), RunFolder(tmp_path / "r"))
    assert log(tmp_path / "r")[0]["loss"] == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_log_lines_are_means_since_the_last_one(tmp_path):
    _, each = fit(tmp_path / "a", steps=6, logging_steps=1, evaluate=False)
    _, every = fit(tmp_path / "b", steps=6, logging_steps=3, evaluate=False)
    order = Schedule([e.length for e in EXAMPLES], 4, seed=3, group_by_length=False)
    weights = [sum(sum(EXAMPLES[i].loss_mask[1:]) for i in order.batch(s)) for s in range(6)]
    for i, line in enumerate(every):
        part = slice(3 * i, 3 * i + 3)
        mean = sum(w * r["loss"] for w, r in zip(weights[part], each[part], strict=True)) / sum(weights[part])
        assert line["loss"] == pytest.approx(mean, abs=1e-6) and line["learning_rate"] == each[3 * i + 2]["learning_rate"]
    assert [r["step"] for r in every] == [3, 6] and every[1]["epoch"] == 1.0


def test_cadence_and_names(tmp_path):
    _, lines = fit(tmp_path / "r", "dpo", steps=7, save_steps=3)
    assert [(r["step"], "eval/loss" in r) for r in lines] == [
        (0, True), (2, False), (3, True), (4, False), (6, False), (6, True), (7, False), (7, True)]
    trained = next(r for r in lines if r["step"] == 2)
    assert trained.keys() == {"step", "epoch", "loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected",
                              "logps/chosen_change", "lengths/chosen", "lengths/rejected",
                              *(f"rewards/{n}" for n in ("chosen", "rejected", "accuracies", "margins"))}
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["checkpoint-6", "checkpoint-7", "latest", "metrics.jsonl"]
    assert (tmp_path / "r/latest").read_text() == "checkpoint-7\n"
    timed = [r for r in read_jsonl(tmp_path / "r" / METRICS) if "loss" in r]
    assert all(r["tokens_per_second"] > 0 and r["seconds"] >= 0 and "U" not in r for r in timed)


# -- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "dpo", "moving"])
@pytest.mark.parametrize("stop", [0, 2, 3, 5, 8])
@pytest.mark.parametrize("options", [{"save_steps": 3, "dropout": 0.3}, {"save_steps": 2, "size": 2, "accumulation": 2},
                                     {"save_steps": 5, "logging_steps": 4, "bf16": True}])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kind, stop, options):
    """x-transformers has no resume at all; here dropout's draws, AdamW's moments and half-filled log lines go on."""
    model, lines = fit(tmp_path / "a", kind, **options)
    killed(tmp_path / "b", kind, stop=stop, **options)
    again, more = fit(tmp_path / "b", kind, **options)
    assert more == lines and same_bits(again, model)
    assert (tmp_path / "a/metrics.jsonl").read_bytes().count(b"\n") == len(lines)
    for file in ("checkpoint-9/model.safetensors", "latest"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_killed_twice_and_resumed(tmp_path):
    model, lines = fit(tmp_path / "a", save_steps=2, dropout=0.2)
    killed(tmp_path / "b", stop=3, save_steps=2, dropout=0.2)
    killed(tmp_path / "b", stop=7, save_steps=2, dropout=0.2)
    again, more = fit(tmp_path / "b", save_steps=2, dropout=0.2)
    assert more == lines and same_bits(again, model)


def test_dropout_does_draw(tmp_path):
    one, _ = fit(tmp_path / "a", dropout=0.3, seed=1)
    other, _ = fit(tmp_path / "b", dropout=0.3, seed=2)
    assert not same_bits(one, other)


def test_resuming_what_is_finished_changes_nothing(tmp_path):
    model, lines = fit(tmp_path / "a")
    again, more = fit(tmp_path / "a")
    assert more == lines and same_bits(again, model)


@pytest.mark.parametrize("damage", ["truncate weights", "NaN", "no state", "junk state", "no tokenizer"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, capsys, damage):
    model, lines = fit(tmp_path / "a", save_steps=2)
    killed(tmp_path / "b", stop=7, save_steps=2)
    newest = tmp_path / "b/checkpoint-6"
    if damage == "truncate weights":
        os.truncate(newest / "model.safetensors", 3000)
    elif damage == "NaN":
        from safetensors.torch import load_file, save_file

        tensors = load_file(newest / "model.safetensors")
        tensors["lm_head.weight"][0, 0] = float("nan")
        save_file(tensors, newest / "model.safetensors")
    elif damage == "no state":
        shutil.rmtree(newest / "training")
    elif damage == "junk state":
        (newest / "training/state.pt").write_bytes(b"junk" * 50)
    else:
        (newest / "tokenizer_config.json").write_text("{")
    capsys.readouterr()
    again, more = fit(tmp_path / "b", save_steps=2)
    told = capsys.readouterr().err
    assert "warning:" in told and "checkpoint-6" in told and "resumed after step 4 of 9" in told
    assert more == lines and same_bits(again, model)


def test_all_checkpoints_damaged_begins_anew(tmp_path, capsys):
    model, lines = fit(tmp_path / "a", save_steps=2)
    killed(tmp_path / "b", stop=5, save_steps=2)
    for folder in (tmp_path / "b").glob("checkpoint-*"):
        (folder / "config.json").write_text("{")
    again, more = fit(tmp_path / "b", save_steps=2)
    assert more == lines and same_bits(again, model) and "resumed" not in capsys.readouterr().err


def test_the_last_good_checkpoint_is_never_dropped(tmp_path, capsys):
    """A run that begins anew behind damaged checkpoints, which have larger numbers, keeps what it writes."""
    model, lines = fit(tmp_path / "a", save_steps=2)
    killed(tmp_path / "b", stop=7, save_steps=2)
    for name in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / "b" / name / "training/state.pt").write_bytes(b"junk")
    killed(tmp_path / "b", stop=3, save_steps=2)
    assert [p.name for p in RunFolder(tmp_path / "b").checkpoints()] == ["checkpoint-2"]
    capsys.readouterr()
    again, more = fit(tmp_path / "b", save_steps=2)
    assert "resumed after step 2 of 9" in (told := capsys.readouterr().err) and "warning" not in told
    assert more == lines and same_bits(again, model)


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "\x00\x00\x00", '{"step": 4, "completion": "\xf0\x9f'])
def test_a_cut_last_line_of_a_log_is_forgotten(tmp_path, tail):
    _, lines = fit(tmp_path / "a", save_steps=2)
    killed(tmp_path / "b", stop=3, save_steps=2)
    with open(tmp_path / "b/metrics.jsonl", "ab") as f:
        f.write(tail.encode("latin-1"))
    _, more = fit(tmp_path / "b", save_steps=2)
    assert more == lines


def test_a_log_may_hold_every_character(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and str.splitlines would cut there."""
    run = RunFolder(tmp_path)
    records = [{"step": i, "completion": c} for i, c in enumerate(["a\nb", "\u2028", "\x85\u2029\x0c\x1c", "\u0000", "🦊"])]
    for record in records:
        run.log("samples.jsonl", record)
    assert read_jsonl(tmp_path / "samples.jsonl") == records
    run.rewind(3)
    assert read_jsonl(tmp_path / "samples.jsonl") == records[:4]
    run.rewind(-1)
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


def test_logs_are_strict_json(tmp_path):
    RunFolder(tmp_path).log("metrics.jsonl", {"step": 1, "eval/perplexity": math.inf, "x": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"step": 1, "eval/perplexity": None, "x": None}


# -- NaN, signals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_steps", [0, 2])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_nan_stops_and_names_step_and_checkpoint(tmp_path, kind, save_steps):
    model = network()
    seen = {}

    def poison():
        seen.update({k: v.clone() for k, v in model.state_dict().items()})
        model.attn_layers.final_norm.register_forward_hook(lambda *args: args[2] * float("nan"))

    good = "none yet" if save_steps == 0 else str(tmp_path / "r/checkpoint-4")
    with pytest.raises(Diverged, match=f"step 6: loss is nan.*last good checkpoint is {good}") as caught:
        fit(tmp_path / "r", kind, stop=5, event=poison, model=model, save_steps=save_steps)
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert all(torch.equal(v, seen[k]) for k, v in model.state_dict().items())
    assert not (tmp_path / "r/checkpoint-6").exists() and all(math.isfinite(r.get("loss", 0)) for r in log(tmp_path / "r"))


def test_an_infinite_gradient_stops_too(tmp_path):
    model = network()

    def poison():
        model.token_emb.weight.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(Diverged, match=r"step 3: loss is \d.*gradient norm (inf|nan)"):
        fit(tmp_path / "r", stop=2, event=poison, model=model)


def test_a_skipped_step_changes_nothing(tmp_path, capsys):
    """But data and schedule go on: as a loop written by hand that leaves the steps out."""
    bad, model = (2, 5, 8), network()
    order = Schedule([e.length for e in EXAMPLES], 4, seed=3, group_by_length=False)
    optimizer = adamw(model, 1e-3)
    for step in range(9):
        if step not in bad:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * schedule(step, total=9, warmup=2, kind="cosine")
            SFT(model)(collate_examples([EXAMPLES[i] for i in order.batch(step)], 0))[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    trained, lines = fit(tmp_path / "r", bad=bad, on_nan="skip", logging_steps=1, evaluate=False)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained.parameters(), model.parameters(), strict=True))
    assert [r["skipped"] for r in lines] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [r["step"] - 1 for r in lines if "loss" not in r] == list(bad) and all(math.isfinite(v) for v in losses(lines))
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1 and "sft, step 3: loss is nan" in warned[0] and "skipped" in warned[0]


def test_an_infinite_gradient_is_skipped_too(tmp_path):
    model, seen = network(), {}

    def poison():
        seen.update({k: v.clone() for k, v in model.state_dict().items()})
        hooks.append(model.token_emb.weight.register_hook(lambda gradient: gradient * float("inf")))

    hooks = []
    _, lines = fit(tmp_path / "r", stop=2, event=poison, model=model, steps=3, on_nan="skip", logging_steps=1)
    assert hooks and lines[-2]["skipped"] == 1
    assert all(torch.equal(v, seen[k]) for k, v in model.state_dict().items())


def test_means_are_those_of_the_other_steps(tmp_path):
    _, each = fit(tmp_path / "a", "dpo", bad=[4], on_nan="skip", logging_steps=1, evaluate=False)
    _, every = fit(tmp_path / "b", "dpo", bad=[4], on_nan="skip", logging_steps=3, evaluate=False)
    assert every[1]["loss"] == pytest.approx((each[3]["loss"] + each[5]["loss"]) / 2) and "loss" not in each[4]
    assert [r["skipped"] for r in every] == [0, 1, 1]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resumed_after_skips_equals_uninterrupted(tmp_path, kind, stop):
    options = {"bad": (2, 3, 5), "on_nan": "skip", "save_steps": 1, "dropout": 0.3, "logging_steps": 4}
    model, lines = fit(tmp_path / "a", kind, **options)
    killed(tmp_path / "b", kind, stop=stop, **options)
    again, more = fit(tmp_path / "b", kind, **options)
    assert more == lines and same_bits(again, model) and lines[-2]["skipped"] == 3


def test_twenty_bad_steps_in_a_row_stop(tmp_path):
    with pytest.raises(Diverged, match=r"step 23: loss is nan.*as in the 19 steps before; nothing was updated"):
        fit(tmp_path / "a", bad=range(3, 40), on_nan="skip", steps=40)
    _, lines = fit(tmp_path / "b", bad=[s for s in range(60) if s % 10], on_nan="skip", steps=60)
    assert lines[-1]["step"] == 60 and lines[-2]["skipped"] == 54, "54 in all, but 9 in a row"


def test_bad_steps_in_a_row_are_counted_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("xalign.training.MOST_SKIPPED", 4)
    options = {"bad": range(3, 9), "on_nan": "skip", "save_steps": 1}
    killed(tmp_path / "a", stop=5, **options)
    with pytest.raises(Diverged, match=f"step 7: .*last good checkpoint is {tmp_path / 'a/checkpoint-6'}"):
        fit(tmp_path / "a", **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop", [4, 8])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, stop):
    model, lines = fit(tmp_path / "a", dropout=0.2)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped after step {stop + 1} of 9, all is saved in .*checkpoint-{stop + 1}; "
                                          "the same command goes on") as caught:
        fit(tmp_path / "b", stop=stop, event=lambda: os.kill(os.getpid(), number), dropout=0.2)
    assert caught.value.exit_status == 130 and signal.getsignal(number) is before
    again, more = fit(tmp_path / "b", dropout=0.2)
    assert more == lines and same_bits(again, model)


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_is_not_waited_for(interruptible):
    with pytest.raises(KeyboardInterrupt), postponed_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


# -- options --------------------------------------------------------------------------------------------------------


def test_gradients_are_clipped(tmp_path):
    """With plain SGD's view of AdamW out of reach, compare with a hand-written step on the same gradients."""
    model = network()
    order = Schedule([e.length for e in EXAMPLES], 4, seed=3, group_by_length=False)
    batch = collate_examples([EXAMPLES[i] for i in order.batch(0)], 0)
    SFT(model)(batch)[0].backward()
    norm = float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    for p in model.parameters():
        p.grad.mul_(0.01 / norm)
    optimizer = adamw(model, 1e-3)
    for group in optimizer.param_groups:
        group["lr"] *= schedule(0, total=1, warmup=2, kind="cosine")
    optimizer.step()
    trained, lines = fit(tmp_path / "a", steps=1, max_grad_norm=0.01)
    assert lines[1]["grad_norm"] == pytest.approx(norm, rel=1e-4), "the norm before clipping is logged"
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


def test_max_grad_norm_0_never_clips(tmp_path):
    never, _ = fit(tmp_path / "a", max_grad_norm=0)
    huge, _ = fit(tmp_path / "b", max_grad_norm=1e9)
    clipped, _ = fit(tmp_path / "c", max_grad_norm=0.01)
    assert same_bits(never, huge) and not same_bits(never, clipped)


def test_gradient_checkpointing_is_equal(tmp_path):
    plain, lines = fit(tmp_path / "a", dropout=0.3)
    model = network(attn_dropout=0.3)
    model.attn_layers.gradient_checkpointing = True
    again, more = fit(tmp_path / "b", model=model)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    assert losses(more) == pytest.approx(losses(lines), abs=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_bf16_is_near_and_its_weights_stay_fp32(tmp_path, kind):
    plain, lines = fit(tmp_path / "a", kind)
    model, more = fit(tmp_path / "b", kind, bf16=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not same_bits(plain, model)
    assert losses(more) == pytest.approx(losses(lines), rel=0.05, abs=0.05)


def test_weights_may_be_bfloat16(tmp_path):
    model, lines = fit(tmp_path / "a", model=network().bfloat16(), save_steps=2)
    killed(tmp_path / "b", model=network().bfloat16(), save_steps=2, stop=5)
    again, more = fit(tmp_path / "b", model=network().bfloat16(), save_steps=2)
    assert more == lines and same_bits(model, again) and next(again.parameters()).dtype == torch.bfloat16


def test_schedules():
    for kind, halfway in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        factors = [schedule(s, total=110, warmup=10, kind=kind) for s in range(110)]
        assert factors[:10] == pytest.approx([(s + 1) / 11 for s in range(10)]) and factors[10] == 1
        assert factors[60] == pytest.approx(halfway) and min(factors) > 0
        assert factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule(35, total=110, warmup=10, kind="cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(109, total=110, warmup=10, kind="linear") == pytest.approx(0.01)
    assert schedule(0, total=1, warmup=0, kind="cosine") == 1 and schedule(3, total=2, warmup=10, kind="linear") == 4 / 11
    with pytest.raises(ConfigError, match=r"lr_scheduler_type is 'cosin', did you mean 'cosine'.; allowed are"):
        schedule(0, total=1, warmup=0, kind="cosin")


def test_only_matrices_decay():
    model = network(attn_qkv_bias=True, attn_out_bias=True)
    decays, rest = adamw(model, 1e-3, 0.1).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    assert all("norm" in (n := names[id(p)]) or "bias" in n or "emb" in n for p in rest["params"])
    assert all("weight" in (n := names[id(p)]) and "norm" not in n and "emb" not in n for p in decays["params"])
    assert len(decays["params"]) + len(rest["params"]) == len(names)


def test_the_optimizers_settings_reach_it(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("xalign.training.adamw", lambda *a: made.append(adamw(*a)) or made[-1])
    options = TrainingOptions(adam_beta1=0.8, adam_beta2=0.999, adam_epsilon=1e-6)
    loop = loop_options(options, RunOptions())
    fit(tmp_path / "a", steps=3, **{k: getattr(loop, k) for k in ("adam_beta1", "adam_beta2", "adam_epsilon")})
    assert {(g["betas"], g["eps"]) for g in made[0].param_groups} == {((0.8, 0.999), 1e-6)}
    fit(tmp_path / "b", steps=1)
    assert {(g["betas"], g["eps"]) for g in made[1].param_groups} == {((0.9, 0.95), 1e-8)}


def test_what_a_run_says_of_itself_reaches_the_loop():
    loop = loop_options(TrainingOptions(on_nan="skip"), RunOptions(profile=True))
    assert loop.on_nan == "skip" and loop.profile
    assert (loop_options(TrainingOptions(), RunOptions()).on_nan, RunOptions().profile) == ("stop", False)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_profile_changes_nothing(tmp_path, kind, capsys):
    plain, lines = fit(tmp_path / "a", kind, dropout=0.3)
    model, more = fit(tmp_path / "b", kind, dropout=0.3, profile=True)
    assert more == lines and same_bits(plain, model) and not (tmp_path / "a/profile.json").exists()
    events = json.loads((tmp_path / "b/profile.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "Optimizer.step#AdamW.step" for e in events) == 3
    told = capsys.readouterr().err
    assert "steps 3 to 5 of this process" in told and "Self CPU" in told and "U 0." in told
    assert [r["step"] for r in read_jsonl(tmp_path / "b" / METRICS) if "U" in r] == [4, 6, 8, 9], "after step 2 it begins"


def test_the_profile_of_a_resumed_run(tmp_path):
    options = {"save_steps": 2, "dropout": 0.3, "profile": True}
    model, lines = fit(tmp_path / "a", **options)
    killed(tmp_path / "b", stop=3, **options)
    assert not (tmp_path / "b/profile.json").exists()
    again, more = fit(tmp_path / "b", **options)
    assert more == lines and same_bits(again, model) and (tmp_path / "b/profile.json").exists()


def test_mistakes_are_told_by_the_loop_also_after_a_resume(tmp_path, capsys, monkeypatch):
    def seven(records, total):
        return sum("loss" in r for r in records) >= 7 and total == 9

    monkeypatch.setattr("xalign.watch.CHECKS", {seven: "seven lines"})
    fit(tmp_path / "a", logging_steps=1)
    assert "warning: sft, step 7: seven lines\n" in capsys.readouterr().err
    killed(tmp_path / "b", logging_steps=1, save_steps=5, stop=5)
    assert "seven" not in capsys.readouterr().err
    fit(tmp_path / "b", logging_steps=1, save_steps=5)
    assert "warning: sft, step 7: seven lines\n" in capsys.readouterr().err


def test_a_quantised_model_is_refused():
    from xalign.nn.quantize import quantize

    with pytest.raises(ConfigError, match="no weight that can be trained"):
        adamw(DPO(quantize(network(), 8)), 1e-3)


def test_first_loss_check():
    batch = collate_pairs(PAIRS[:4], 0, list(range(4)))
    for label_smoothing in (0.0, 0.2):
        check_first_loss(Preference(DPO(network(), label_smoothing=label_smoothing)), batch, bf16=False)
    check_first_loss(Preference(DPO(network(attn_dropout=0.5))), batch, bf16=True)
    dpo = DPO(network(), beta=1.0)
    with torch.no_grad():
        dpo.policy_model.to_logits.weight[5] += 1.0
    with pytest.raises(Diverged, match=r"first loss is \d\.\d+ although policy and reference are equal, expected is 0\.6931"):
        check_first_loss(Preference(dpo), batch, bf16=False)
    good = DPO(network(), beta=1.0)
    known = pairs_logps(good, good.ref_model, PAIRS, 0)
    check_first_loss(Preference(good, known), batch, bf16=False)
    with pytest.raises(Diverged, match="the first loss"):
        check_first_loss(Preference(good, (known[0] + torch.arange(24.0), known[1])), batch, bf16=False)


def test_precomputed_reference_gives_the_same_run(tmp_path):
    def one(folder, precompute):
        dpo = DPO(network(), beta=0.3)
        objective = Preference(dpo, pairs_logps(dpo, dpo.ref_model, PAIRS, 0) if precompute else None)
        order = Schedule([p.length for p in PAIRS], 4, seed=3)
        batches = micro_batches(order, 4, lambda rows: collate_pairs([PAIRS[i] for i in rows], 0, rows))
        folder.mkdir()
        train(dpo.policy_model, objective, batches, 6, len(order), LoopOptions(1e-3, logging_steps=1), RunFolder(folder))
        return [r["loss"] for r in log(folder)]

    assert one(tmp_path / "a", True) == pytest.approx(one(tmp_path / "b", False), abs=1e-4)


def test_a_reference_that_follows_the_policy(tmp_path):
    """TR-DPO, by trl's arithmetic at trl's steps; until the first move the losses are those of a fixed reference."""
    from trl.trainer.callbacks import SyncRefModelCallback

    model = network()
    dpo = DPO(model, beta=0.3)
    theirs = network()
    theirs.load_state_dict(model.state_dict())
    moving = Moving(dpo, alpha=0.6, steps=3)
    for step in range(1, 7):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        moving.after(step)
        if step % 3 == 0:
            SyncRefModelCallback._sync_target_model(model, theirs, 0.6)
        for a, b in zip(dpo.ref_model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert not any(p.requires_grad for p in dpo.ref_model.parameters())

    _, fixed = fit(tmp_path / "a", "dpo", logging_steps=1, model=network())
    _, lines = fit(tmp_path / "b", "moving", logging_steps=1, model=network())
    assert losses(lines)[:2] == pytest.approx(losses(fixed)[:2], rel=1e-5) and abs(losses(lines)[3] - losses(fixed)[3]) > 1e-3
    with pytest.raises(ConfigError, match=r"--ref-model-mixup-alpha is 0, allowed is a number in \(0, 1\]"):
        Moving(dpo, 0, 3)
    with pytest.raises(ConfigError, match="no reference stands beside the policy"):
        Moving(DPO(model, loss="simpo"), 0.6, 3)


def test_training_lowers_the_loss(tmp_path):
    _, sft = fit(tmp_path / "a", steps=40, learning_rate=5e-3, logging_steps=10)
    _, dpo = fit(tmp_path / "b", "dpo", steps=40, learning_rate=5e-3, logging_steps=10)
    for lines in (sft, dpo):
        assert losses(lines)[-1] < 0.7 * losses(lines)[0]
    assert [r["rewards/margins"] for r in dpo if "loss" in r][-1] > 0.5


# -- wandb ----------------------------------------------------------------------------------------------------------


def wandb_history(file: Path) -> list[dict]:
    """The history rows of an offline run: LevelDB's log format around wandb's own protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, rows = file.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            if message.WhichOneof("record_type") == "history":
                rows.append({(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in message.history.item})
    return rows


def test_wandb_offline_run_can_be_read_back(tmp_path):
    code = ("import sys; from pathlib import Path; import test_training as t; from xalign.runs import RunFolder\n"
            "folder = Path(sys.argv[1]); folder.mkdir()\n"
            "class Reporting(RunFolder):\n"
            "    def __init__(self, path): super().__init__(path); self.start_wandb('a name', {'beta': 0.3})\n"
            "t.RunFolder = Reporting\n"
            "t.fit(folder, 'dpo')\n")
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], env=environment, cwd=tmp_path, check=True)
    files = list((tmp_path / "r").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1 and files[0].name == f"run-{(tmp_path / 'r/wandb-id').read_text().strip()}.wandb"
    rows = [{k.removeprefix("dpo/"): v for k, v in row.items() if k.startswith("dpo/")} for row in wandb_history(files[0])]
    assert rows == read_jsonl(tmp_path / "r/metrics.jsonl") and sum("loss" in r for r in rows) == 5
