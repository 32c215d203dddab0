"""`xalign reward`: the loss beside trl's, the data, the program end to end, and what it measures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_distributed import log, run, torchrun

from xalign import RewardModel, losses, save_pretrained
from xalign.cli import main
from xalign.data import toyworld
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS
from xalign.data.collate import EncodedRanked, TruncationReport, collate_ranked
from xalign.data.records import PreferencePair
from xalign.data.store import open_store, write_store
from xalign.errors import DataError
from xalign.evaluation.rewards import calibration, calibration_error, pair_rewards, spearman
from xalign.objectives import Reward
from xalign.prepare import encode_ranked
from xalign.tokenizers import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
HH = ROOT.parent / "shared/data/hh-harmless-base.train.jsonl.gz"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
LOOP = ["--max-steps", "6", "--batch-size", "4", "--eval-steps", "3", "--save-steps", "2", "--logging-steps", "2",
        "--learning-rate", "1e-3"]


INTERRUPTED = """
import os, signal, sys
from xalign.cli import main
from xalign.objectives import Reward

old, calls = Reward.__call__, []

def call(self, *arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return old(self, *arguments)

Reward.__call__ = call
main(sys.argv[1:], "reward")
"""


def call(*arguments) -> int:
    try:
        main([str(a) for a in arguments], "reward")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def numbers_of(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random language model with a byte tokenizer and a chat template."""
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    folder = tmp_path_factory.mktemp("base") / "model"
    save_pretrained(tiny(**LLAMA, num_tokens=tokenizer.vocab_size, max_seq_len=512, sharp=3.0), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with some pairs of the toy world to train on, and some held out; `margin` is the gold one."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [json.loads(line) for line in (ROOT / "data/test.jsonl").read_text().splitlines()]
    for pair in pairs:
        chosen, rejected = (toyworld.gold_reward(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        pair["margin"] = chosen - rejected
    write_jsonl(folder / "train.jsonl", pairs[:30])
    write_jsonl(folder / "test.jsonl", pairs[30:42])
    return folder


@pytest.fixture(scope="module")
def flags(base, data) -> list:
    return ["--model", base, "--dataset", data / "train.jsonl", "--eval-dataset", data / "test.jsonl", *LOOP]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert call(*flags, "--output-dir", run, "--normalize-reward") == 0
    return run


# -- the loss ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("margin,center", [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_losses_and_gradients_are_trls(data, tmp_path, margin, center):
    """Same weights, same records: its tokens, its batch, its loss and every gradient."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    ours = RewardModel(tiny(seed=3, **LLAMA, num_tokens=259, max_seq_len=512, sharp=4.0), ByteTokenizer())
    torch.nn.init.normal_(ours.head.weight)
    ours.save_pretrained(tmp_path / "rm")
    ours = RewardModel.from_pretrained(tmp_path / "rm").train()
    records = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:6]]
    if not margin:
        records = [{k: v for k, v in r.items() if k != "margin"} for r in records]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    options = RewardConfig(str(tmp_path / "out"), max_length=None, bf16=False, center_rewards_coefficient=center or None,
                           report_to=[], use_cpu=True, gradient_checkpointing=False)
    trainer = RewardTrainer(theirs, options, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    expected = trainer.compute_loss(trainer.model.train(), batch)
    expected.backward()

    pairs = [PreferencePair(r["prompt"], r["chosen"], r["rejected"], r.get("margin")) for r in records]
    rows = list(encode_ranked(pairs, ours.tokenizer, 512, "keep_end", TruncationReport(), margin))
    texts = [row.prompt + getattr(row, side) for side in ("chosen", "rejected") for row in rows]
    width = batch["input_ids"].shape[1]
    assert [t + [256] * (width - len(t)) for t in texts] == batch["input_ids"].tolist()
    loss, _ = Reward(ours, center=center)(collate_ranked(rows, 0))
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    named = dict(ours.named_parameters())
    torch.testing.assert_close(named["head.weight"].grad, gradients["score.weight"], atol=1e-5, rtol=1e-4)
    pairs_of = {"net.token_emb.weight": "model.embed_tokens.weight", "net.attn_layers.final_norm.weight": "model.norm.weight"}
    pairs_of |= {f"net.attn_layers.layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for i in range(2) for a, b in (
        ("attn.to_q", "self_attn.q_proj"), ("attn.to_out", "self_attn.o_proj"), ("ff.down", "mlp.down_proj"))}
    for mine, its in pairs_of.items():
        assert (named[mine].grad - gradients[its]).norm() < 1e-4 * gradients[its].norm()


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0, 2))
def test_logexp_is_openrlhfs_formula_and_the_same_function(chosen, rejected, center):
    c, r = torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64)
    formula = torch.log(1 + torch.exp(r - c)) + center * (c + r) ** 2
    torch.testing.assert_close(losses.logexp(c, r, center=center), formula, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(losses.bradley_terry(c, r, center=center), formula, atol=1e-9, rtol=1e-9)
    assert losses.logexp(torch.tensor([-500.0]), torch.tensor([500.0])).isfinite().all()  # theirs overflows


def test_the_objective_with_and_without_shared_beginnings(base):
    rows = [EncodedRanked([257, 5, 6], [7, 258], [8, 9, 258], margin=0.5), EncodedRanked([], [257, 3, 258], [257, 4, 258])]
    model = RewardModel(tiny(**LLAMA, num_tokens=259, sharp=4.0))
    batch = collate_ranked(rows, 0)
    assert batch.margin.tolist() == [0.5, 0.0]
    both = [Reward(model, share_prefix=share)(batch) for share in (True, False)]
    torch.testing.assert_close(both[0][0], both[1][0])
    chosen, rejected = pair_rewards(Reward(model), rows, 0)
    expected = losses.bradley_terry(chosen, rejected, margin=batch.margin).mean()
    torch.testing.assert_close(both[0][0].detach(), expected)
    assert both[0][1]["rewards/margins"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    torch.testing.assert_close(Reward(model, "logexp")(batch)[0].detach(), losses.bradley_terry(chosen, rejected).mean())
    assert Reward(model).weight(batch) == 2 and Reward(model).lengths(batch) == [[3, 2, 3], [0, 3, 3]]
    alone = [Reward(model)(collate_ranked([row], 0))[0] for row in rows]  # a batch is the mean of its pairs
    torch.testing.assert_close(both[0][0], sum(alone) / 2)


# -- data -------------------------------------------------------------------------------------------------------------

def test_each_side_is_cut_as_it_is_when_it_is_scored():
    tokenizer = ByteTokenizer()
    pair = PreferencePair("0123456789", "ab", "abcdef", 1.25, "f:1")
    model = RewardModel(tiny(**LLAMA, num_tokens=259, max_seq_len=64), tokenizer)
    for limit in (40, 14, 10, 4):
        for mode, side in (("keep_end", "left"), ("keep_start", "right")):
            report = TruncationReport()
            try:
                [row] = encode_ranked([pair], tokenizer, limit, mode, report, True)
            except DataError:
                assert limit <= 14 and mode == "keep_start" and report.dropped == 1  # nothing tells them apart any more
                continue
            alone, cut = model.encode([pair.prompt] * 2, [pair.chosen, pair.rejected], limit, side)
            assert [row.prompt + row.chosen, row.prompt + row.rejected] == alone and row.margin == 1.25
            assert (report.prompt_cut + report.completion_cut > 0) == (cut > 0)


def test_margins_are_asked_for_and_survive_the_store(tmp_path):
    pairs = [PreferencePair("p", "a", "b", margin, f"f:{i}") for i, margin in enumerate((0.1, -3.0, 1e30))]
    rows = list(encode_ranked(pairs, ByteTokenizer(), 20, "keep_end", TruncationReport(), True))
    write_store(tmp_path / "s", {}, EncodedRanked, iter(rows), 300)
    stored, _ = open_store(tmp_path / "s", {}, EncodedRanked)
    assert list(stored) == [EncodedRanked(r.prompt, r.chosen, r.rejected, margin=float(torch.tensor(r.margin))) for r in rows]
    plain = list(encode_ranked(pairs, ByteTokenizer(), 20, "keep_end", TruncationReport()))
    assert [row.margin for row in plain] == [0, 0, 0]


# -- what is measured -------------------------------------------------------------------------------------------------

def test_calibration_by_hand_and_for_a_model_that_knows():
    bins = calibration(torch.tensor([0.0, 1.0, -1.0, 5.0]), 2)
    assert [b.pairs for b in bins] == [2, 2] and [b.observed for b in bins] == [0.75, 0.5]
    assert bins[0].predicted == pytest.approx((0.5 + 1 / (1 + math.exp(-1))) / 2) and bins[0].low < 0.75 < bins[0].high
    assert calibration_error(bins) == pytest.approx(sum(abs(b.predicted - b.observed) for b in bins) / 2)
    draw = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20_000, generator=draw)
    margins = torch.where(torch.rand(20_000, generator=draw) < torch.sigmoid(z), z, -z)
    assert calibration_error(calibration(margins)) < 0.012 < 0.08 < calibration_error(calibration(3 * margins))
    for b in calibration(margins):
        assert b.low - 0.01 < b.predicted < b.high + 0.01
    assert len(calibration(torch.tensor([0.5]))) == 1


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=20))
def test_spearman_is_scipys(pairs):
    from scipy.stats import spearmanr

    a, b = zip(*pairs, strict=True)
    ours = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)


# -- the program ------------------------------------------------------------------------------------------------------

def test_end_to_end(finished, base, data, capsys):
    assert {p.name for p in finished.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "checkpoint-4", "checkpoint-6", "latest", "reward", "report.md",
        "evaluation.json", "training.png", "rewards.png", "calibration.png"}
    numbers = numbers_of(finished)
    model = RewardModel.from_pretrained(finished / "reward")
    pairs = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    prompts = [p["prompt"] for p in pairs]
    chosen, rejected = (model.score(prompts, [p[k] for p in pairs], normalize=False) for k in ("chosen", "rejected"))
    assert numbers["accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert numbers["margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    both = torch.cat((chosen, rejected))
    assert model.mean == pytest.approx(float(both.mean()), abs=1e-5) and model.std == pytest.approx(float(both.std()), rel=1e-4)
    assert model.normalize_reward  # --normalize-reward
    normal = model.score(prompts, [p["chosen"] for p in pairs])
    torch.testing.assert_close(normal, (chosen - model.mean) / model.std, atol=1e-4, rtol=1e-3)
    gold = [toyworld.gold_reward(p["prompt"], p[side]) for side in ("chosen", "rejected") for p in pairs]
    assert numbers["spearman_gold"] == pytest.approx(spearman(both.tolist(), gold), abs=0.02)
    assert numbers["accuracy_limit"] == pytest.approx(toyworld.preference_limit(pairs))
    low, high = numbers["accuracy_interval"]
    assert low <= numbers["accuracy"] <= high and sum(b["pairs"] for b in numbers["calibration"]) == numbers["pairs"] == 12
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "grad_norm"} <= lines[1].keys()
    assert [r["step"] for r in lines if "eval/loss" in r] == [0, 3, 6] and "eval/rewards/accuracies" in lines[0]
    assert lines[-1]["eval/loss"] == pytest.approx(numbers["loss"], abs=1e-5)
    report = (finished / "report.md").read_text()
    for part in ("| accuracy |", "## Calibration", "calibration.png", "rewards.png", "limit of the accuracy by label noise"):
        assert part in report


def test_the_same_command_resumes_to_the_same_bits_and_a_finished_run_says_so(finished, flags, tmp_path, capsys):
    assert call(*flags, "--output-dir", finished, "--normalize-reward") == 0
    said = capsys.readouterr()
    assert "is finished" in said.err and "| accuracy |" in said.out
    run = tmp_path / "run"
    stopped = subprocess.run([sys.executable, "-c", INTERRUPTED, *map(str, flags), "--output-dir", run, "--normalize-reward"],
                             cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert stopped.returncode == 130 and "the same command goes on from there" in stopped.stderr, stopped.stderr
    assert call(*flags, "--output-dir", run, "--normalize-reward") == 0
    assert "resumed after step 4" in capsys.readouterr().err
    assert (run / "reward/model.safetensors").read_bytes() == (finished / "reward/model.safetensors").read_bytes()


def test_training_goes_on_from_a_reward_model(finished, flags, tmp_path, capsys):
    """From its head as well: with a rate of nothing the rewards stay what they were."""
    arguments = ["--model", finished / "reward", *flags[2:], "--max-steps", 1, "--learning-rate", 1e-12, "--output-dir"]
    assert call(*arguments, tmp_path / "on") == 0
    assert "is a reward model: training goes on from its head" in capsys.readouterr().err
    for key in ("accuracy", "loss", "mean"):
        assert numbers_of(tmp_path / "on")[key] == pytest.approx(numbers_of(finished)[key], abs=1e-4)
    assert call("--model", finished / "reward", *flags[2:], "--dry-run", "--output-dir", tmp_path / "dry") == 0
    out = capsys.readouterr().out
    assert "scored at its last token" in out and "Memory a device" in out and not (tmp_path / "dry").exists()


@pytest.mark.parametrize("quant", [[], ["--load-in-8bit"]], ids=["plain", "int8"])
def test_adapters_and_a_head_are_trained_and_merged(base, flags, tmp_path, quant):
    run = tmp_path / "run"
    assert call(*flags, "--lora-r", 4, *quant, "--output-dir", run) == 0
    model = RewardModel.from_pretrained(run / "reward")
    before, after = (load_file(f / "model.safetensors") for f in (base, run / "reward"))
    assert after["score.weight"].shape == (1, 32)
    moved = {k for k in before.keys() & after.keys() if not torch.equal(before[k], after[k])}
    assert moved and all("proj" in k for k in moved) and "model.embed_tokens.weight" not in moved
    state = torch.load(run / "checkpoint-6/training/state.pt", weights_only=True)
    assert torch.equal(state["head"].cpu(), model.head.weight.cpu()) and not (run / "checkpoint-6/model.safetensors").exists()


def test_adapters_resume_with_their_head(flags, tmp_path):
    for name, steps in (("whole", [6]), ("parts", [3, 6])):
        for count in steps:
            arguments = [*flags, "--lora-r", 4, "--lr-scheduler-type", "constant", "--max-steps", count, "--output-dir",
                         tmp_path / name]
            if count == 6 and name == "parts":  # as if it had been killed after step 3
                for file in ("report.md", "reward", "config.json"):
                    path = tmp_path / name / file
                    path.rename(tmp_path / f"old-{file}")
                settings = json.loads((tmp_path / "old-config.json").read_text()) | {"max_steps": 6}
                (tmp_path / name / "config.json").write_text(json.dumps(settings))
            assert call(*arguments) == 0
    one, two = (load_file(tmp_path / name / "reward/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_several_datasets_by_weight_and_margins(flags, data, base, tmp_path, capsys):
    scored = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    for r in scored:
        r |= {"score_chosen": r["margin"] + 1, "score_rejected": 1.0}
        del r["margin"]
    other = write_jsonl(tmp_path / "scored.jsonl", scored)
    arguments = ["--model", base, "--dataset", data / "train.jsonl", other, "--dataset-weights", 0.5, 2, *LOOP, "--output-dir"]
    assert call(*arguments, tmp_path / "run", "--margin") == 0
    said = capsys.readouterr().err
    assert "train pairs: of 3" in said and numbers_of(tmp_path / "run")["pairs"] >= 1  # 15 + 24, less those held out
    bare = write_jsonl(tmp_path / "bare.jsonl", [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in scored])
    both = ["--dataset", data / "train.jsonl", bare]
    assert call("--model", base, *both, *LOOP, "--output-dir", tmp_path / "no", "--margin") == 2
    assert "bare.jsonl:1: no margin, nor score_chosen" in capsys.readouterr().err  # the first, also if another is held out


def test_conversations_from_scratch(tmp_path, capsys):
    """HH's dialogues: the tokenizer gets role markers and a template, the model imitates first, prompts end alike."""
    draw = ["red", "blue", "green", "white", "black", "brown", "pink", "grey"]
    records = [{"chosen": f"\n\nHuman: Which {a} or {b}?\n\nAssistant: The {a} one is nice.",
                "rejected": f"\n\nHuman: Which {a} or {b}?\n\nAssistant: {b}"} for a in draw for b in draw if a != b]
    file = write_jsonl(tmp_path / "hh.jsonl", records)
    shape = ["--dim", 16, "--depth", 1, "--heads", 2, "--vocab-size", 330, "--sft-epochs", 0.2, "--sft-batch-size", 8]
    assert call("--dataset", file, *LOOP, *shape, "--output-dir", tmp_path / "run") == 0
    model = RewardModel.from_pretrained(tmp_path / "run/reward")
    [row], _ = model.encode([[{"role": "user", "content": "Which?"}]], ["red"])
    assert row[0] == model.tokenizer.bos_id and row[-1] == model.tokenizer.eos_id and row.count(row[0]) == 1
    assert (tmp_path / "run/base/model.safetensors").exists() and "spearman_gold" not in numbers_of(tmp_path / "run")


@pytest.mark.parametrize("arguments,message", [
    (["--loss-type", "logexp", "--margin"], "the loss logexp has none"),
    (["--loss-type", "hinge"], "sigmoid"),
    (["--center-rewards-coefficient", "-1"], "--center-rewards-coefficient is -1.0, allowed is a finite number >= 0"),
    (["--model", "nowhere"], "nowhere: no config.json there"),
    (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--dataset-weights", "1", "2"], "--dataset-weights has 2 numbers for 1 file,"),
    (["--dataset", ROOT / "data/test.jsonl", ROOT / "data/../data/test.jsonl"], "test.jsonl is given twice, allowed is once ("),
    (["--load-in-4bit"], "without --lora-r"),
    (["--value-head-prefix", "x"], "--value-head-prefix x goes with a --model that is a reward model"),
    (["--beta", "1"], "unknown flag --beta"),
])
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    assert call(*arguments, "--output-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("error:") and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_twice_the_batch(flags, tmp_path, parallel):
    one = [*flags, "--batch-size", 4, "--output-dir", tmp_path / "one"]
    assert call(*one) == 0
    two = ["-m", "xalign", "reward", *map(str, flags), "--batch-size", "2", "--parallel", parallel]
    done = run(*torchrun(*two, "--output-dir", str(tmp_path / "two")))
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[r["loss"] for r in log(tmp_path / name) if "loss" in r] for name in ("one", "two")]
    assert len(losses[0]) > 2 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    one, two = (load_file(tmp_path / name / "reward/model.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_toy_worlds_gold_reward_is_learnt_in_part(tmp_path):
    """With a fifth of data/reward.json's imitation and a fifth of its epochs; docs/reward.md has the whole's figures."""
    arguments = ["--config", ROOT / "data/reward.json", "--sft-epochs", 0.1, "--num-train-epochs", 0.6, "--save-steps", 0,
                 "--eval-steps", 0, "--output-dir", tmp_path / "run"]
    assert call(*arguments) == 0
    numbers = numbers_of(tmp_path / "run")
    assert numbers["pairs"] == 500 and 0.85 < numbers["accuracy_limit"] < 0.89
    assert numbers["accuracy_expected"] > 0.7 and numbers["spearman_gold"] > 0.7 and abs(numbers["spearman_length"]) < 0.25
    assert numbers["accuracy_expected"] <= numbers["accuracy_limit"] and numbers["loss"] < math.log(2)


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="no HH pairs on this machine")
def test_hh_pairs(base, tmp_path):
    """Real dialogues through the whole program, on a random model: nothing is learnt, and that is what is said."""
    assert call("--model", base, "--dataset", HH, *LOOP, "--max-length", 256, "--output-dir", tmp_path / "run") == 0
    low, high = numbers_of(tmp_path / "run")["accuracy_interval"]
    assert low < 0.6 and high > 0.4 and numbers_of(tmp_path / "run")["pairs"] > 100
