"""What a training tells: FLOPs, pace, profile, the KL of samples, and the classic mistakes, each where it is made."""

import copy
import json
import random
from contextlib import nullcontext

import pytest
import torch
from conftest import LLAMA, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from xalign import DPO
from xalign.data.collate import EncodedExample, EncodedPair, TruncationReport, collate_examples, collate_pairs
from xalign.logprobs import token_logprobs
from xalign.nn.lora import apply_lora
from xalign.objectives import SFT, Preference
from xalign.watch import (
    CHECKS,
    TIMED,
    Pace,
    Profile,
    Watch,
    accuracy_stuck,
    both_falling,
    loss_rising,
    missing_end,
    peak_flops,
    sampled_kl,
    shared_flops,
    trend,
    truncated,
)

MODELS = {"llama": tiny(**LLAMA, attn_kv_heads=2), "plain": tiny(depth=3), "tied": tiny(**LLAMA, tie_embedding=True, depth=1)}


# -- pace -----------------------------------------------------------------------------------------------------------


def token_by_token(model, rows):
    """FLOPs counted at each token, matrix by matrix."""
    layers = model.attn_layers
    head = model.num_tokens * layers.dim
    total = 0
    for prompt, *completions in rows:
        for i, layer in enumerate(layers.layers):
            last = i == layers.depth - 1
            matrices = {n: p.numel() for n, p in layer.named_parameters() if p.ndim == 2}
            for at in range(prompt):
                total += sum(2 * m for n, m in matrices.items() if not last or "to_k" in n or "to_v" in n)
                total += 0 if last else 4 * layers.heads * layers.dim_head * (at + 1)
            for c in completions:
                for at in range(c):
                    total += 2 * sum(matrices.values()) + 4 * layers.heads * layers.dim_head * (prompt + at + 1)
        total += 2 * head * sum(completions)
    return total


@pytest.mark.parametrize("name", MODELS)
@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=3), max_size=3))
def test_flops_are_those_of_each_token(name, rows):
    assert shared_flops(MODELS[name], rows) == token_by_token(MODELS[name], rows)


def test_flops_are_what_torch_counts():
    model, n = tiny(**(LLAMA | {"attn_flash": False})), 11
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(n)[None])
    above = 4 * 4 * 8 * 2 * (n * n - n * (n + 1) // 2)  # torch's attention multiplies also by what is masked
    assert shared_flops(model, [[0, n]]) == counter.get_total_flops() - above


def test_pace_is_work_by_time_since_the_last_look():
    model = MODELS["llama"]
    pace = Pace(model, peak=1e6)
    tokens, flops = pace.work([[5, 2, 3], [1, 4]])
    assert tokens == 2 * 5 + 2 + 3 + 1 + 4 and flops == 3 * shared_flops(model, [[5, 2, 3], [1, 4]])
    frozen = Pace(apply_lora(copy.deepcopy(model)), pace.peak).work([[5, 2, 3], [1, 4]])
    assert frozen == (tokens, 2 * shared_flops(model, [[5, 2, 3], [1, 4]])), "no gradients of weights"
    pace.add(30, 1.5e6, 2.0)
    pace.add(10, 0.5e6, 2.0)
    assert pace.take() == {"tokens_per_second": 10.0, "U": 0.5} and pace.take() == {}
    plain = Pace(model)
    assert plain.work([[5, 2, 3]]) == (15, 0.0)
    plain.add(15, 0.0, 3.0)
    assert plain.take() == {"tokens_per_second": 5.0}


def test_lengths_of_batches():
    pairs = [EncodedPair([1, 2, 3], [4, 5], [6]), EncodedPair([1], [7], [8, 9, 10])]
    assert Preference(None).lengths(collate_pairs(pairs, 0)) == [[3, 2, 1], [1, 1, 3]]
    rows = [EncodedExample([1, 2, 3, 4, 5], [False] * 3 + [True] * 2), EncodedExample([7, 8], [True] * 2)]
    examples = collate_examples(rows, 0)
    assert SFT(None).lengths(examples) == [[3, 2], [1, 1]], "a row's first token is never scored"


@pytest.mark.parametrize("bf16", [False, True])
def test_the_peak_is_measured_without_a_draw(bf16):
    before = torch.get_rng_state()
    assert peak_flops(MODELS["plain"], bf16, seconds=0) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_profile_of_a_process_that_ends_early(tmp_path, capsys):
    pace = Pace(MODELS["plain"])
    profile = Profile(tmp_path / "profile.json", "cpu")
    profile.note(1, False, pace)
    profile.note(2, True, pace)
    assert "saw 2 steps" in capsys.readouterr().err and not list(tmp_path.iterdir())
    profile.note(2, False, pace)
    torch.ones(3).cos()
    profile.note(3, True, pace)
    assert "steps 3 to 3 of this process" in capsys.readouterr().err
    assert "aten::cos" in {e.get("name") for e in json.loads((tmp_path / "profile.json").read_text())["traceEvents"]}
    profile.note(2, False, pace)
    profile.close()
    assert profile.profiler is None, "a training that fails leaves no profiler running"


# -- KL -------------------------------------------------------------------------------------------------------------


def test_kl_of_samples_is_the_mean_log_ratio():
    policy, reference = tiny(1, **LLAMA, attn_dropout=0.5).train(), tiny(2, **LLAMA)
    samples = [([1, 2, 3], [4, 5, 6]), ([7], [8]), ([1, 2, 3, 4], [9, 10])]
    ratios = []
    for prompt, completion in samples:
        ids = torch.tensor([prompt + completion])
        ours, theirs = (token_logprobs(m(ids), ids)[0, len(prompt) - 1 :].sum() for m in (policy.eval(), reference))
        ratios.append(float((ours - theirs).detach()))
    policy.train()
    assert sampled_kl(policy, lambda: nullcontext(reference), samples) == {"eval/kl": pytest.approx(sum(ratios) / 3, abs=1e-5)}
    assert policy.training and policy.attn_layers.layers[0].attn.training
    assert sampled_kl(reference, lambda: nullcontext(reference), samples) == {"eval/kl": 0.0}


def test_kl_leaves_out_what_outgrew_the_window():
    policy, reference = tiny(1, max_seq_len=8), tiny(2, max_seq_len=8)
    whole = ([1, 2, 3], [4, 5, 6, 7, 8])
    kept = sampled_kl(policy, lambda: nullcontext(reference), [whole])
    more = [whole, ([1, 2, 3, 4], [4, 5, 6, 7, 8]), ([1], [])]
    assert kept["eval/kl"] != 0 and sampled_kl(policy, lambda: nullcontext(reference), more) == kept
    assert sampled_kl(policy, lambda: nullcontext(reference), [([1] * 8, [2])]) == {}


def test_kl_to_the_policy_without_its_adapters():
    plain, samples = tiny(**LLAMA), [([1, 2, 3], [4, 5, 6]), ([7], [8])]
    policy = apply_lora(copy.deepcopy(plain), 2)
    with torch.no_grad():
        policy.attn_layers.layers[0].ff.down.lora_b.normal_(std=0.3)
    found = sampled_kl(policy, DPO(policy).reference, samples)
    assert found == sampled_kl(policy, lambda: nullcontext(plain), samples) and abs(found["eval/kl"]) > 1e-3


# -- mistakes of data -----------------------------------------------------------------------------------------------


def pairs_with_ends(share, end=2, behind=()):
    return [EncodedPair([1], [5, 6, *([end] if i >= share * 100 else []), *behind], [7, end]) for i in range(100)]


def test_completions_without_an_end():
    assert "6.0% of the chosen completions have no end" in missing_end(pairs_with_ends(0.06), [2])
    assert missing_end(pairs_with_ends(0.05), [2]) == ""
    assert missing_end(pairs_with_ends(0.0, behind=[9]), [2]) == "", "a template may write a line break behind it"
    assert missing_end(pairs_with_ends(0.0, end=3), [2, 3]) == "" and missing_end(pairs_with_ends(0.0, end=3), [2]) != ""
    assert missing_end(pairs_with_ends(1.0), []) == "" and missing_end([], [2]) == ""
    early = [EncodedPair([1], [5, 2, 6, 7, 8, 9], [7])]
    assert missing_end(early, [2]) != "", "an earlier turn's end is not the reply's"


def test_an_end_is_looked_for_all_over_the_data():
    pairs = pairs_with_ends(1.0) * 40 + pairs_with_ends(0.0) * 60
    assert "40.0%" in missing_end(pairs, [2])


@pytest.mark.parametrize("report, share", [
    (TruncationReport(100, prompt_cut=6), "6.0%"), (TruncationReport(100, completion_cut=6), "6.0%"),
    (TruncationReport(100, dropped=6), "6.0%"), (TruncationReport(100, prompt_cut=4, completion_cut=4, dropped=4), "8.0%"),
    (TruncationReport(100, prompt_cut=5, completion_cut=5), ""), (TruncationReport(100, split=90), ""),
    (TruncationReport(), "")])
def test_truncation(report, share):
    told = truncated(report)
    assert told.startswith(f"{share} of the records are longer than --max-length") if share else told == ""


# -- mistakes of a training -----------------------------------------------------------------------------------------


def lines(count, noise=0.01, seed=0, step=10, **series):
    """Lines of a log: each key's value is its function of the line's number, with noise."""
    draw = random.Random(seed)
    return [{"step": step * (i + 1), **{k: f(i) + draw.gauss(0, noise) for k, f in series.items()}} for i in range(count)]


def rewards(count, chosen, rejected, **more):
    return lines(count, **{"rewards/chosen": chosen, "rewards/rejected": rejected}, **more)


def test_trend():
    assert trend([1.0, 2.0]) == 0 and trend([0.1] * 9) == 0 and trend([0.0, 1.0, 0.0]) == 0
    assert trend([1.0, 2.0, 3.0]) > 1e6 and trend([3.0, 2.0, 1.0]) < -1e6
    # by hand: slope 1/2 over the root of (1.5 / 1) / 2
    assert trend([0.0, 2.0, 1.0]) == pytest.approx(0.5 / (1.5 / 2) ** 0.5)


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=12), st.floats(0.1, 9), st.floats(-9, 9))
def test_a_trend_knows_no_scale_and_no_direction_of_time(values, scale, shift):
    found = trend(values)
    if abs(found) < 1e3 and max(values) - min(values) > 1e-3:
        assert trend([scale * v + shift for v in values]) == pytest.approx(found, rel=1e-3, abs=1e-3)
        assert trend(values[::-1]) == pytest.approx(-found, rel=1e-3, abs=1e-3)


def test_both_rewards_falling():
    assert both_falling(rewards(30, lambda i: -0.02 * i - 0.1, lambda i: -0.05 * i - 0.1), 300)
    late = rewards(30, lambda i: 0.1 * (18 - i), lambda i: 0.1 * (18 - i))
    assert both_falling(late, 300) and late[10]["rewards/chosen"] > 0, "only the last third counts"
    assert not both_falling(rewards(30, lambda i: 0.02 * i, lambda i: -0.05 * i - 0.1), 300), "the healthy way"
    assert not both_falling(rewards(30, lambda i: -0.02 * i - 0.1, lambda i: 0.05 * i), 300)
    assert not both_falling(rewards(30, lambda i: -0.5, lambda i: -0.5), 300), "low, but not falling"
    assert not both_falling(rewards(30, lambda i: 2 - 0.02 * i, lambda i: -0.05 * i - 0.1), 300), "falling, but not low"
    assert not both_falling(rewards(23, lambda i: -0.02 * i - 0.1, lambda i: -0.05 * i - 0.1), 300), "too few lines"
    assert not both_falling(lines(30, loss=lambda i: 1.0), 300), "of losses without a reference there are none"


def test_accuracy_stuck():
    def log(level, count=30, noise=0.03):
        return lines(count, noise, **{"rewards/accuracies": lambda i: level})

    assert accuracy_stuck(log(0.5), 300) and accuracy_stuck(log(0.5, noise=0), 300) and accuracy_stuck(log(0.51), 500)
    assert not accuracy_stuck(log(0.5), 700), "not yet half of the training"
    assert not accuracy_stuck(log(0.6), 300) and not accuracy_stuck(log(0.4), 300)
    assert not accuracy_stuck(log(0.6, noise=0.3), 300), "such lines tell nothing"
    assert not accuracy_stuck(log(0.5, count=23), 230) and not accuracy_stuck(lines(30, loss=lambda i: 1.0), 300)
    late = log(0.5, 20) + [r | {"step": 200 + r["step"]} for r in log(0.7, 10)]
    assert not accuracy_stuck(late, 300), "the last third counts"


def test_loss_rising():
    assert loss_rising(lines(30, loss=lambda i: 0.6 + 0.01 * i), 300)
    assert loss_rising(lines(30, loss=lambda i: 0.9 - 0.02 * min(i, 20) + 0.02 * max(0, i - 20)), 300)
    assert not loss_rising(lines(30, loss=lambda i: 0.9 - 0.01 * i), 300)
    assert not loss_rising(lines(23, loss=lambda i: 0.6 + 0.01 * i), 300), "too few lines"


def test_noise_alone_is_no_mistake():
    for seed in range(100):
        assert not loss_rising(lines(60, 0.1, seed, loss=lambda i: 1.0), 600)
        assert not both_falling(rewards(60, lambda i: -5.0, lambda i: -6.0, noise=0.3, seed=seed), 600)


def test_lines_without_a_value_are_passed_over():
    """Evaluations lie between, a step without a finite loss is None in the log, and a resumed run has read both."""
    log = [r for line in lines(30, loss=lambda i: 0.6 + 0.01 * i) for r in (line, {"step": line["step"], "eval/loss": 9.0})]
    assert loss_rising([*log[:9], {"step": 45, "loss": None}, *log[9:]], 300)


def told(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_each_mistake_is_told_once(capsys):
    watch = Watch("dpo", 400)
    for line in lines(40, loss=lambda i: 0.6 + 0.01 * i, **{
            "rewards/chosen": lambda i: -0.1 * i - 0.1, "rewards/rejected": lambda i: -0.1 * i - 0.1,
            "rewards/accuracies": lambda i: 0.5}):
        watch.note(line)
    found = told(capsys)
    assert len(found) == len(CHECKS) == 3 and {sum(part in line for line in found) for part in CHECKS.values()} == {1}
    assert all(line.startswith("warning: dpo, step ") for line in found)
    rises = next(line for line in found if "the loss rises" in line)
    assert rises.startswith("warning: dpo, step 2"), "as soon as there are lines enough, 24"


def test_a_healthy_training_is_told_nothing(capsys):
    watch = Watch("dpo", 400)
    for line in lines(40, loss=lambda i: 0.7 - 0.01 * i, **{
            "rewards/chosen": lambda i: 0.02 * i, "rewards/rejected": lambda i: -0.1 * i, "rewards/accuracies": lambda i: 0.7}):
        watch.note(line)
    assert told(capsys) == []


def test_a_resumed_watch_knows_the_lines_before(capsys):
    log = lines(30, loss=lambda i: 0.6 + 0.01 * i)
    Watch("sft", 300, log[:29]).note(log[29])
    assert len(told(capsys)) == 1
    Watch("sft", 300).note(log[29])
    assert told(capsys) == []


def test_the_last_line_is_looked_at(capsys):
    watch = Watch("sft", 1000, [{"loss": 0.01 * i} for i in range(99)])
    watch.due = 1e9
    watch.note({"step": 990, "loss": 0.99})
    assert told(capsys) == []
    watch.note({"step": 1000, "loss": 1.0})
    assert len(told(capsys)) == 1


def test_a_long_log_is_looked_at_now_and_then(monkeypatch):
    looks = []
    monkeypatch.setattr("xalign.watch.CHECKS", {lambda records, total: looks.append(len(records)): ""})
    watch = Watch("sft", 10**6)
    for line in lines(3000, loss=lambda i: 1.0):
        watch.note(line)
    assert looks[:20] == list(range(1, 21)) and len(looks) < 150 and looks[-1] > 2800


def test_what_the_clock_gives_is_known_by_name():
    pace = Pace(MODELS["plain"], 1.0)
    pace.add(1, 1, 1)
    assert {"seconds", *pace.take()} == set(TIMED)
