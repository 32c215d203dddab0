"""`xalign evaluate`: win rates and their intervals, figures by hand and against enumeration, judges, and the whole program."""

import itertools
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROME, Browser
from conftest import LLAMA, tiny
from server import Server
from test_evaluation import FewBytes, uniform
from test_rewardbench import Writer, letter_of

from xalign import RewardModel, load_pretrained, save_pretrained
from xalign.backends.base import Completion, SamplingParams, failure
from xalign.backends.native import NativeBackend
from xalign.cli import main
from xalign.config import EvaluationOptions
from xalign.data import toyworld
from xalign.data.chat_template import render_prompt
from xalign.data.records import Message
from xalign.errors import ConfigError, DataError
from xalign.evaluation import figures, metrics
from xalign.evaluation.figures import Comparison
from xalign.evaluation.intervals import all_wins, differences, length_controlled, monte_carlo_error, wilson, win_rate
from xalign.evaluation.judge import Judge
from xalign.stages import LanguageWatch
from xalign.verdicts import HumanJudge, LanguageJudge, PairwiseJudge, matched

ROOT = Path(__file__).resolve().parent.parent

# -- win rates ------------------------------------------------------------------------------------------------------


def drawn(seed, prompts=40):
    """Comparisons of prompts with one to four replies a side, with ties, and lengths that matter."""
    draw = np.random.default_rng(seed)
    sides = []
    for shift in (0, 1):
        rows = [draw.integers(1, 9, draw.integers(1, 5)).tolist() for _ in range(prompts)]
        sides.append((rows, [[int(30 * v + draw.integers(0, 50) + 10 * shift) for v in row] for row in rows]))
    (ours, our_lengths), (theirs, their_lengths) = sides
    return (ours, theirs), (our_lengths, their_lengths)


def values(found):
    return [v for e in (found.rate, found.wilson, found.controlled) for v in (e.value, e.low, e.high)]


@pytest.mark.parametrize("seed", range(5))
def test_win_rates_are_antisymmetric(seed):
    scores, lengths = drawn(seed)
    there = values(win_rate(all_wins(*scores), differences(*lengths)))
    back = values(win_rate(all_wins(*scores[::-1]), differences(*lengths[::-1])))
    for at in range(0, 9, 3):
        assert [there[at], there[at + 1], there[at + 2]] == pytest.approx(
            [1 - back[at], 1 - back[at + 2], 1 - back[at + 1]], abs=1e-7)
    assert win_rate(all_wins(scores[0], scores[0]), differences(lengths[0], lengths[0])).rate.value == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_prompts_and_samples_is_nothing(seed):
    scores, lengths = drawn(seed)
    found, order = win_rate(all_wins(*scores), differences(*lengths)), np.random.default_rng(seed).permutation(40)
    moved = [[side[i][::-1] for i in order] for side in (*scores, *lengths)]
    again = win_rate(all_wins(*moved[:2]), differences(*moved[2:]))
    assert again.rate.value == pytest.approx(found.rate.value, abs=1e-12)
    assert values(again)[3:] == pytest.approx(values(found)[3:], abs=1e-8)
    assert (again.rate.low, again.rate.high) == pytest.approx((found.rate.low, found.rate.high), abs=0.02)
    assert (again.prompts, again.comparisons, again.ties) == (found.prompts, found.comparisons, found.ties)


def test_a_score_that_is_no_number_loses():
    nan = math.nan
    assert all_wins([[nan, 1.0, nan]], [[0.0, nan]]) == [[0.0, 0.5, 1.0, 1.0, 0.0, 0.5]]


def test_intervals_cover_the_truth():
    """500 experiments of 80 prompts, each with its own chance and two replies a side, hence four comparisons that are alike."""
    draw, trials, prompts = np.random.default_rng(0), 500, 80
    covered = np.zeros(3)
    for _ in range(trials):
        level = draw.normal(0.4, 0.8, prompts)
        ours, theirs = (np.round(draw.normal(0, 1, (prompts, 2)) + shift, 1) for shift in (level[:, None], 0.0))
        found = win_rate(all_wins(ours, theirs), differences(*(draw.normal(100, 20, (prompts, 2)) for _ in range(2))))
        covered += [e.low <= TRUTH <= e.high for e in (found.rate, found.wilson, found.controlled)]
    assert (covered / trials >= 0.93).all(), covered / trials
    assert covered[0] / trials <= 0.98


# P(x > y) for x - y ~ N(.4, .8^2 + 2); rounding to a tenth, ties one half, moves it by less than .001
TRUTH = 0.5 * (1 + math.erf(0.4 / math.sqrt(2 * (0.8**2 + 2))))


def test_length_control_takes_a_length_bias_out():
    from scipy.optimize import minimize

    draw, n = np.random.default_rng(0), 3000
    lengths = draw.normal(60, 100, n)  # ours are longer, and the judge likes that
    chance = 1 / (1 + np.exp(-(-0.3 + 1.2 * np.tanh(lengths / lengths.std()))))
    won = (draw.random(n) < chance).astype(float)
    rows, told = [[v] for v in won], [[v] for v in lengths]
    found = length_controlled(rows, told)

    def loss(at):
        z = at[0] + at[1] * np.tanh(lengths / lengths.std())
        return (np.logaddexp(0, z) - won * z).sum() + 0.005 * (at**2).sum()

    assert found.value == pytest.approx(1 / (1 + math.exp(-minimize(loss, np.zeros(2)).x[0])), abs=1e-5)
    truth = 1 / (1 + math.exp(0.3))
    assert won.mean() > 0.5 > truth and found.low < truth < found.high
    for sure in (1.0, 0.0):
        end = length_controlled([[sure]] * 50, told[:50])
        assert end.value == sure and (end.low, end.high) == wilson(50 * sure, 50)
    apart = length_controlled([[float(v > 0)] for v in lengths], told)
    assert 0.3 < apart.value < 0.7, "length alone tells who wins"
    assert length_controlled([[1.0], [0.0], [0.0], [1.0]], [[5.0]] * 4).value == pytest.approx(0.5)


# -- figures --------------------------------------------------------------------------------------------------------


def test_variety_and_repetition_by_hand():
    assert figures.distinct(["a b a", "b a"], 1) == 2 / 5 and figures.distinct(["a b a", "b a"], 2) == 2 / 3
    assert figures.distinct(["", "a"], 2) == 0
    assert figures.repetition("a b c d a b c d e") == pytest.approx(1 - 5 / 6) and figures.repetition("a b c") == 0


def test_the_monte_carlo_error_is_that_of_drawing_samples():
    draw = np.random.default_rng(0)
    levels = draw.normal(0, 5, 12)
    rows = [draw.normal(m, 1, 8) for m in levels]
    means = [np.mean([draw.normal(m, 1, 8).mean() for m in levels]) for _ in range(2000)]
    assert monte_carlo_error(rows) == pytest.approx(np.std(means), rel=0.15)
    assert monte_carlo_error([[1.0], [3.0]]) == pytest.approx(1.0) and math.isnan(monte_carlo_error([[1.0]]))


def test_log_ratios_by_hand():
    result = Comparison()
    policy = np.array([[-1.0, -5.0, -2.0, -3.0], [-4.0, -4.0, -3.0, -9.0]])  # chosen, rejected of four pairs
    reference = np.array([[-2.0, -3.0, -2.0, -3.0], [-3.0, -4.0, -3.0, -8.0]])
    tokens = np.array([[5, 3, 4, 9], [5, 6, 2, 1]])
    figures.add_log_ratios(result, policy, reference, tokens, ["p", "p", "q", "r"], ["a", "a", "b", "b"], [1.0, -2.0, 0.0, 3.0])
    numbers = result.numbers
    assert result.margins == [2.0, -2.0, 0.0, 1.0]
    assert numbers["alignment"] == (1 + 0 + 0.5 + 1) / 4 and numbers["margin"] == 0.25
    assert numbers["log_ratio_policy"] == (3 - 1 + 1 + 6) / 4 and numbers["likelier_policy"] == 0.75
    assert numbers["log_ratio_reference"] == (1 + 1 + 1 + 5) / 4 and numbers["likelier_reference"] == 1
    assert numbers["alignment_gold"] == 1, "the second pair is labelled the wrong way round, the third has no order"
    slices = numbers["alignment_slices"]
    assert slices["chosen is longer"]["alignment"] == 0.75 and slices["chosen is shorter"]["pairs"] == 1
    assert slices["lengths are equal"]["margin"] == 2.0
    assert slices["source is a"]["alignment"] == 0.5 and slices["source is b"]["margin"] == 0.5
    assert sum(part["pairs"] for name, part in slices.items() if "have" in name) == 4


def test_kl_and_entropy_in_a_world_that_can_be_enumerated():
    """Five tokens, up to four a text: KL and entropy are within 2 standard errors of the exact sums."""
    tokenizer, length, prompt = FewBytes(), 4, "ab"
    policy, reference = (tiny(seed=s, **LLAMA, num_tokens=5, sharp=3.0) for s in (1, 2))
    texts = [ids for n in range(1, length + 1) for ids in itertools.product(range(5), repeat=n)
             if tokenizer.eos_id not in ids[:-1] and (n == length or ids[-1] == tokenizer.eos_id)]
    known = [[Completion("", ids, "stop") for ids in texts]]
    p, q = (np.array(metrics.completion_logps(m, tokenizer, [prompt], known)[0]) for m in (policy, reference))
    assert np.exp(p).sum() == pytest.approx(1, abs=1e-5) == np.exp(q).sum()
    result = Comparison()
    samples = metrics.sample(policy, tokenizer, [prompt], 4000, length, seed=0)
    result.lengths["policy"] = [[len(c.token_ids) for c in row] for row in samples]
    ours, theirs = (metrics.completion_logps(m, tokenizer, [prompt], samples) for m in (policy, reference))
    figures.add_divergence(result, ours, theirs)
    numbers, exact = result.numbers, float((np.exp(p) * (p - q)).sum())
    assert 0 < numbers["kl_standard_error"] < 0.1 * exact
    assert abs(numbers["kl"] - exact) < 2 * numbers["kl_standard_error"]
    assert abs(numbers["entropy_policy"] + float((np.exp(p) * p).sum())) < 2 * np.std(ours) / 4000**0.5
    mean = float((np.exp(p) * [len(ids) for ids in texts]).sum())
    assert numbers["kl_token"] == pytest.approx(exact / mean, rel=0.1)


def test_the_language_watch_warns_once(tmp_path, capsys, chat_tokenizer):
    (tmp_path / "text.txt").write_text("Mia had a kite.\nAn owl flew over the lake.\n" * 4)
    model = tiny(num_tokens=chat_tokenizer.vocab_size, max_seq_len=64, **LLAMA)
    assert LanguageWatch(EvaluationOptions(), chat_tokenizer, model)(model, 1) == {}
    watch = LanguageWatch(EvaluationOptions(eval_text=str(tmp_path / "text.txt"), perplexity_alert=1.2), chat_tokenizer, model)
    told = watch(model, 1)
    assert told["eval/text_perplexity_ratio"] == 1 and "warning" not in capsys.readouterr().err
    with torch.no_grad():
        model.to_logits.weight.mul_(4)
    assert watch(model, 2)["eval/text_perplexity_ratio"] > 1.2
    watch(model, 3)
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "dpo, step 2: the policy's perplexity of text.txt is" in err


def test_a_text_is_watched_while_a_policy_is_trained(world, tmp_path):
    main(["dpo", "--model", str(world / "policy"), "--dataset", str(world / "pairs.jsonl"),
          "--output-dir", str(tmp_path / "run"), "--max-steps", "2", "--batch-size", "4", "--eval-steps", "1",
          "--eval-prompts", "2", "--eval-samples", "1", "--eval-max-new-tokens", "4",
          "--learning-rate", "1e-3", "--eval-text", str(world / "text.txt")])
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    ratios = [line["eval/text_perplexity_ratio"] for line in log if "eval/text_perplexity_ratio" in line]
    numbers = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert len(ratios) == 3 and ratios[0] == 1 and ratios[-1] == pytest.approx(numbers["text_perplexity_ratio"], rel=1e-4) != 1
    assert "| perplexity of text.txt |" in (tmp_path / "run/report.md").read_text()


# -- judges ---------------------------------------------------------------------------------------------------------


def test_replies_are_matched_one_with_one():
    assert matched("ab", "cd") == [("a", "c"), ("b", "d")] and matched("abc", "d") == [("a", "d"), ("b", "d"), ("c", "d")]


class Down:
    def generate(self, prompts, params, progress=""):
        return [[failure("it is down")] for _ in prompts]


def test_a_language_model_is_asked_in_both_orders():
    def judge(function):
        return LanguageJudge(Judge(Writer(function), SamplingParams(temperature=0)))

    prompts, ours, theirs = ["Q", (Message("user", "R"),)], [["good", "bad"], ["good"]], [["bad", "good"], ["bad"]]
    likes = judge(lambda text: f"so [[{letter_of(text, 'good')}]]")
    rows = likes.wins(prompts, ours, theirs, [0, 1])
    assert [row["wins"] for row in rows] == [[1.0, 0.0], [1.0]] and len(likes.judge.backend.asked) == 6
    assert rows[0]["verdicts"][1] == [[1, "so [[B]]"], [1, "so [[A]]"]]
    back = likes.wins(prompts, theirs, ours, [0, 1])
    assert [row["wins"] for row in back] == [[0.0, 1.0], [0.0]]
    with pytest.raises(DataError, match=r"the judge answered none of 6 requests \(it is down\)"):
        LanguageJudge(Judge(Down(), SamplingParams())).wins(prompts, ours, theirs, [0, 1])
    for answer in ("[[A]]", "neither"):  # always the first, or none at all: a tie
        rows = judge(lambda text, a=answer: a).wins(prompts, ours, theirs, [0, 1])
        assert [row["wins"] for row in rows] == [[0.5, 0.5], [0.5]]


def test_a_pairwise_judge_weighs_the_letters_in_both_orders(chat_tokenizer, monkeypatch):
    model = tiny(num_tokens=chat_tokenizer.vocab_size, max_seq_len=128, **LLAMA)
    [a], [b] = map(chat_tokenizer.encode, "AB")
    judge = PairwiseJudge(model, chat_tokenizer)
    prompt = (Message("user", "Who?"), Message("assistant", "Mia."), Message("user", "Why?"))
    [there], [back] = (judge.probabilities([prompt], *pair) for pair in ((["kite"], ["the owl"]), (["the owl"], ["kite"])))
    assert there == pytest.approx(1 - back, abs=1e-6)
    expected = []
    for first, second in (("kite", "the owl"), ("the owl", "kite")):
        context = "\n\n\n<turn> user\n Who?\n\n<turn> assistant\n Mia.\n\n<turn> user\n Why?\n\n\n"
        text = f"[CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \n"
        ids = render_prompt(chat_tokenizer, (Message("user", text),)).ids
        assert ids.count(chat_tokenizer.bos_id) == 1 == ids.index(chat_tokenizer.bos_id) + 1
        with torch.no_grad():
            expected.append(float(model(torch.tensor([ids[1:]]))[0, -1, [a, b]].softmax(-1)[0]))
    assert there == pytest.approx((expected[0] + 1 - expected[1]) / 2, abs=1e-5)
    rows = judge.wins([prompt, "x"], [["kite", "a"], ["b"]], [["the owl", "a"], ["c"]], [0, 1])
    assert rows[0]["wins"] == [float(there > 0.5), 0.5] and len(rows[1]["probabilities"]) == 1
    with pytest.raises(DataError, match="allowed for this pairwise judge is up to 127"):
        judge.wins(["x" * 500], [["a"]], [["b"]], [0])
    monkeypatch.setattr(chat_tokenizer, "encode", lambda text: [1, 2])
    with pytest.raises(ConfigError, match="A or B with one token"):
        PairwiseJudge(model, chat_tokenizer)


def test_a_persons_choices(tmp_path, capsys):
    judge, prompts = HumanJudge(tmp_path / "sheet.jsonl", 0), [f"Q{i}" for i in range(40)]
    ours, theirs = [[f"ours {i}", "x"] for i in range(40)], [[f"theirs {i}"] for i in range(40)]
    assert judge.wins(prompts, ours, theirs, list(range(40))) == [{"wins": []}] * 40
    assert "40 pairs of replies to choose from" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "sheet.jsonl").read_text().splitlines()]
    assert 8 < sum(line["A"].startswith("ours") for line in lines) < 32, "the sides are drawn"
    for i, line in enumerate(lines[:30]):
        line["choice"] = "tie" if i < 5 else "A" if line["A"].startswith("ours") else "B"
    good = "".join(json.dumps(line) + "\n" for line in reversed(lines))
    judge.path.write_text(good)
    rows = judge.wins(prompts, ours, theirs, list(range(40)))
    assert [row["wins"] for row in rows] == [[0.5]] * 5 + [[1.0]] * 25 + [[]] * 10
    for old, new, told in (('"choice": "A"', '"choice": "C"', "choice is 'C', allowed are A, B, tie"),
                           ('"B": "ours', '"B": "mine', "other replies than were"),
                           ('{"id": 3,', '{"id": 77,', "a line that is none of ours"), ('{"id": 39', "[[", "no JSON")):
        judge.path.write_text(good.replace(old, new, 1))
        with pytest.raises(DataError, match=rf"sheet.jsonl:\d+: {told}"):
            judge.wins(prompts, ours, theirs, list(range(40)))


# -- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, chat_tokenizer):
    """Two small models of the toy world's words, twelve pairs of two sources, and a text."""
    folder, draw = tmp_path_factory.mktemp("world"), random.Random(0)
    for seed, name in ((1, "reference"), (2, "policy")):
        save_pretrained(tiny(seed, num_tokens=chat_tokenizer.vocab_size, max_seq_len=160, sharp=3.0, **LLAMA), folder / name,
                        chat_tokenizer)
    pairs = [toyworld.sample_pair(toyworld.sample_prompt(draw), draw) | {"source": "ab"[i % 2]} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "text.txt").write_text("Mia had a kite.\nAn owl flew over the lake.\n")
    return folder


def arguments(world, out, *more):
    return ["evaluate", "--model", str(world / "policy"), "--dataset", str(world / "pairs.jsonl"), "--output-dir", str(out),
            "--eval-prompts", "6", "--eval-samples", "2", "--eval-max-new-tokens", "8", "--eval-text", str(world / "text.txt"),
            *more]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    main(arguments(world, out, "--temperatures", "0", "1.5"))
    return out


def test_everything_that_is_promised(world, finished, capsys):
    numbers = json.loads((finished / "evaluation.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    for key in ("win_rate", "win_rate_interval", "win_rate_wilson", "win_rate_length_controlled", "kl", "kl_standard_error",
                "kl_token", "entropy_policy", "entropy_reference", "perplexity_policy", "text_perplexity_reference",
                "text_perplexity_ratio", "alignment", "alignment_gold", "alignment_slices", "margin", "log_ratio_policy",
                "length_policy", "distinct_2_policy", "repetition_reference", "gold_policy", "well_formed_policy"):
        assert key in numbers, key
    assert {"source is a", "source is b"} < numbers["alignment_slices"].keys() and numbers["pairs"] == 12
    told = numbers["win_rates"]["gold reward"]
    assert told["comparisons"] == 6 * 4 and told["temperatures"].keys() == {"0", "1", "1.5"}
    assert told["temperatures"]["0"]["policy"]["comparisons"] == 6, "a greedy text needs no second"
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * 6 and {len(s["completions"]) for s in samples} == {1, 2}
    report = (finished / "report.md").read_text()
    for picture in ("wins.png", "temperature.png", "margins.png", "kl.png", "gold.png", "lengths.png"):
        assert f"]({picture})" in report and (finished / picture).read_bytes().startswith(b"\x89PNG")
    for part in ("| win rate by gold reward | ", "inequality by slice", "Win rate against temperature", "Monte-Carlo"):
        assert part in report
    main(arguments(world, finished, "--temperatures", "0", "1.5"))
    again = capsys.readouterr()
    assert "is finished" in again.err and "| win rate by gold reward |" in again.out


def test_equal_models_tie(world, tmp_path):
    out = tmp_path / "out"
    main(arguments(world, out, "--ref-model", str(world / "policy")))
    numbers = json.loads((out / "evaluation.json").read_text())
    assert numbers["kl"] == 0 and numbers["alignment"] == 0.5 and numbers["text_perplexity_ratio"] == 1
    samples = [json.loads(line)["completions"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples[:6] != samples[6:], "they don't share their draws"


class Stop(Exception):
    pass


def test_a_run_that_is_killed_goes_on_and_other_judges_sample_nothing(world, finished, tmp_path, monkeypatch):
    out, real, asked = tmp_path / "out", NativeBackend.generate, []

    def dies(self, prompts, params, progress="", *, seeds=None, done=None):
        def some(i, completions):
            if len(asked) == 8:
                raise Stop
            asked.append(i)
            done(i, completions)

        return real(self, prompts, params, progress, seeds=seeds, done=some)

    command = arguments(world, out, "--temperatures", "0", "1.5")
    monkeypatch.setattr(NativeBackend, "generate", dies)
    with pytest.raises(Stop):
        main(command)
    path = out / "samples.jsonl"
    assert path.read_bytes().count(b"\n") == 8 and not (out / "report.md").exists()
    path.write_bytes(path.read_bytes()[:-20])  # and the last line was cut off
    monkeypatch.setattr(NativeBackend, "generate", real)
    main(command)
    assert (out / "evaluation.json").read_bytes() == (finished / "evaluation.json").read_bytes()
    (out / "report.md").unlink()
    (out / "pairs.jsonl").write_bytes((out / "pairs.jsonl").read_bytes()[:500])
    main(command)
    assert (out / "evaluation.json").read_bytes() == (finished / "evaluation.json").read_bytes()

    monkeypatch.setattr(NativeBackend, "generate", lambda *_, **__: pytest.fail("it samples again"))
    implicit = f"dpo:{world / 'policy'},{world / 'reference'}"
    sheet = f"human:{tmp_path / 'sheet.jsonl'}"
    main([*command, "--judge", "gold", implicit, sheet])
    numbers = json.loads((out / "evaluation.json").read_text())
    assert numbers["win_rates"].keys() == {"gold reward", implicit}
    assert "nothing is judged yet" in (out / "report.md").read_text()
    filled = (tmp_path / "sheet.jsonl").read_text().replace('"choice": ""', '"choice": "A"')
    (tmp_path / "sheet.jsonl").write_text(filled)
    main([*command, "--judge", "gold", implicit, sheet])
    assert json.loads((out / "evaluation.json").read_text())["win_rates"][sheet]["comparisons"] == 6


def test_against_chosen_replies_and_a_uniform_model(world, tmp_path, capsys, chat_tokenizer):
    size, out = chat_tokenizer.vocab_size, tmp_path / "out"
    save_pretrained(uniform(size, max_seq_len=160), tmp_path / "flat", chat_tokenizer)
    command = arguments(world, out, "--ref-model", str(world / "reference"), "--against", "chosen", "--perplexity-alert", ".01")
    command[2] = str(tmp_path / "flat")
    main(command)
    told = capsys.readouterr()
    numbers = json.loads((out / "evaluation.json").read_text())
    assert numbers["text_perplexity_policy"] == pytest.approx(size, rel=1e-4) == numbers["perplexity_policy"]
    assert numbers["entropy_token_policy"] == pytest.approx(math.log(size), rel=1e-4)
    rates = numbers["win_rates"]["gold reward"]
    assert rates["win_rate"] == 0 and rates["comparisons"] == 12 and 0 < rates["wilson"][1] < 0.5
    assert rates["reference"]["comparisons"] == 12
    assert "warning: the policy's perplexity of text.txt is" in told.err and "**Warning**" in (out / "report.md").read_text()


def test_what_is_left_out_is_told_and_names_break_no_table(world, tmp_path, capsys):
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()][:4]
    pairs[1]["rejected"] = pairs[1]["chosen"]
    pairs[2] |= {"source": "a | `b`\n<img src=x>"}
    pairs[3] |= {"prompt": pairs[3]["prompt"] + "\x00"}
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    main(arguments(world, tmp_path / "out", "--dataset", str(tmp_path / "odd.jsonl")))
    [told] = json.loads((tmp_path / "out/evaluation.json").read_text())["left_out"]
    report = (tmp_path / "out/report.md").read_text()
    assert "3 of 4 records kept" in told and told in capsys.readouterr().err and told in report
    assert "| source is a \\| `b` &lt;img src=x> |" in report and "<img" not in report
    assert "\x00" not in report + (tmp_path / "out/report.html").read_text()


def test_models_as_judges_of_chats(world, tmp_path, monkeypatch):
    """A reward model, a pairwise one, and a language model on a server; prompts are a user's turns."""
    net, tokenizer = load_pretrained(world / "policy")
    RewardModel(net, tokenizer).save_pretrained(tmp_path / "reward", tokenizer)
    judges, out = [f"reward:{tmp_path / 'reward'}", f"pairwise:{world / 'policy'}", "llm:openai:judge"], tmp_path
    with Server(reply=lambda body: "so [[A]]") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        main(arguments(world, out / "run", "--chat", "--judge", *judges))
    told = json.loads((out / "run/evaluation.json").read_text())
    assert told["win_rates"].keys() == set(judges) and told["win_rate"] == told["win_rates"][judges[0]]["win_rate"]
    assert [told["win_rates"][judge]["comparisons"] for judge in judges] == [24, 12, 12]
    assert told["win_rates"]["llm:openai:judge"]["win_rate"] == 0.5
    assert told["judges"]["llm:openai:judge"] == {"orders_agree": 0.0, "no_verdict": 0.0}
    with Server(reply=lambda body: "I would rather not say") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        main(arguments(world, out / "mute", "--chat", "--judge", judges[2]))
    told = json.loads((out / "mute/evaluation.json").read_text())
    assert told["judges"]["llm:openai:judge"] == {"orders_agree": None, "no_verdict": 1.0}
    assert "**Warning**: 100.0% of llm:openai:judge's answers hold no verdict" in (out / "mute/report.md").read_text()
    assert "they agree in 0.0% of the 12 comparisons with two verdicts" in (out / "run/report.md").read_text()


class Reader(HTMLParser):
    """Notes what a page asks for, and whether its elements are closed in their order."""

    def __init__(self):
        super().__init__()
        self.open, self.asked, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.asked += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_all_that_it_needs(finished):
    page = (finished / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and page.count("<article") == 6 and page.count("<img") == 6
    assert all(value.startswith(("data:,", "data:image/png;base64,")) for value in reader.asked)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(", page) and "default-src 'none'" in page


def test_what_a_model_writes_is_no_html(tmp_path):
    from xalign.evaluation.report import write

    bad = "<script>alert(1)</script><img src=http://a.b/c> &lt; </article>"
    result = Comparison(prompts=[bad, (Message("user", bad),)])
    for name in ("reference", "policy"):
        figures.add_texts(result, name, [[Completion(bad, (1, 2), "stop")], [Completion("", (1,), "length")]])
    figures.add_wins(result, "<b>", [[1.0], [0.0]], [[0.0], [3.0]])
    write(tmp_path, bad, result, [bad], [], {"x": "</pre><script>"})
    page = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and reader.asked == ["data:,"] and page.count("<script>") == 1
    assert "alert(1)" in "".join(reader.text) and "(nothing)" in page


@pytest.mark.slow
@pytest.mark.skipif(CHROME is None, reason="no chromium or chrome here")
def test_the_page_in_a_browser(finished):
    """No error, no request that leaves the file, nothing wider than a phone, and its filters work."""
    with Browser() as page:
        for width in (360, 1200):
            page.open(finished / "report.html", width)
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
            sides = page.run("[...document.querySelectorAll('article .two > div')].slice(0, 2).map(d => d.offsetTop)")
            assert (sides[0] == sides[1]) == (width > 640), "side by side, or one above the other"
        shown = "[...document.querySelectorAll('article')].filter(a => a.offsetParent).length"
        assert page.run(shown) == 6
        first = page.run("document.querySelector('article .text').textContent")
        page.run(f"words.value = {json.dumps(first.upper())}; words.dispatchEvent(new Event('input'))")
        assert page.run(shown) == 1 and page.run("count.textContent") == "1 of 6"
        page.run("words.value = ''; who.value = 'won'; who.dispatchEvent(new Event('change'))")
        assert page.run(shown) == page.run("document.querySelectorAll('article[data-who=won]').length") < 6
        page.run("order.value = 'gain'; order.dispatchEvent(new Event('change'))")
        gains = page.run("[...document.querySelectorAll('article')].map(a => +a.dataset.gain)")
        assert gains == sorted(gains)
        assert page.errors == []
        assert all(url.startswith(("file://", "data:")) for url in page.requests) and page.requests


@pytest.mark.parametrize(("more", "told"), [
    (["--judge", "gould"], "--judge is gould, allowed are gold, reward:FOLDER"), (["--judge", "human:/no/where/x"], "folder"),
    (["--judge", "reward:nowhere"], "nowhere"), (["--judge", "llm:"], "--judge is llm:"), (["--temperatures", "-1"], ">= 0"),
    (["--eval-text", "missing.txt"], "missing.txt"), (["--ref-model", "nowhere"], "nowhere"),
    (["--dataset", "x.jsonl"], "x.jsonl"), (["--system", "x"], "--system goes with --chat"),
    (["--eval-max-new-tokens", "400"], "no prompt leaves room for --eval-max-new-tokens 400"),
    (["--prompts", "plain.txt", "--judge", "gold"], "only the toy world's prompts"),
    (["--prompts", "plain.txt", "--against", "chosen"], "--against chosen goes with"),
    (["--model", "openai:x", "--ref-model", "openia:y"], "openia:y")])
def test_mistakes_are_one_line(world, tmp_path, monkeypatch, capsys, more, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    (tmp_path / "plain.txt").write_text("Hello\n")
    with pytest.raises(SystemExit) as stop:
        main([*arguments(world, tmp_path / "out"), *more])
    error = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and error[-1].startswith("error: ") and told in error[-1], error
    assert "Traceback" not in "".join(error)
