"""The numbers of the report: by hand, on simulated data, and against exact enumeration."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA, tiny

from xalign import DPO
from xalign.backends.base import SamplingParams
from xalign.backends.native import NativeBackend
from xalign.data import toyworld
from xalign.data.collate import EncodedPair, collate_pairs, encode_pair
from xalign.data.records import Message, PreferencePair
from xalign.data.sources import read_pairs
from xalign.errors import ConfigError
from xalign.evaluation import metrics
from xalign.evaluation.compare import compare, quick
from xalign.evaluation.figures import Comparison
from xalign.evaluation.intervals import Estimate, estimate, wins
from xalign.evaluation.metrics import accuracies, completion_logps, label_accuracies, label_noise_share, perplexity
from xalign.evaluation.report import prose, write_report
from xalign.objectives import Preference
from xalign.tokenizers import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("win_rate", "win_rate_interval", "gold_untrained", "gold_reference", "gold_policy", "well_formed_reference",
        "well_formed_policy", "consistent_reference", "consistent_policy", "preference_accuracy",
        "preference_accuracy_limit", "perplexity_reference", "perplexity_policy", "kl")


class FewBytes(ByteTokenizer):
    """Five ids: a, b, pad, bos, eos; small enough to enumerate all texts."""

    def __init__(self):
        super().__init__()
        self.pad_id, self.bos_id, self.eos_id = 2, 3, 4
        self._pieces = [b"a", b"b", b"", b"", b""]

    def _encode_plain(self, text):
        return ["ab".index(c) for c in text]


def uniform(vocab=300, **options):
    """A model that gives every token the same probability, whatever the text."""
    model = tiny(**(LLAMA | options), num_tokens=vocab)
    with torch.no_grad():
        model.to_logits.weight.zero_()
    return model


# -- estimates ------------------------------------------------------------------------------------------------------


def test_estimate_by_hand():
    assert estimate([2.0, 2.0, 2.0]) == Estimate(2.0, 2.0, 2.0)
    assert estimate([6.0, 1.0], [3, 1]).value == 7 / 4
    assert estimate([6.0, 1.0], [3, 1], np.exp).value == pytest.approx(math.exp(7 / 4))
    two = estimate([0.0, 1.0])  # resampled means are 0, 1/2, 1 with probability 1/4, 1/2, 1/4
    assert (two.value, two.low, two.high) == (0.5, 0.0, 1.0)
    assert str(estimate([1.0, 1.0])) == "1.000 [1.000, 1.000]"
    many = [math.sqrt(i) for i in range(40)]
    assert estimate(many) == estimate(many) != estimate(many, seed=1), "the resampling is seeded"


@pytest.mark.parametrize("ratio", [False, True])
def test_intervals_cover_the_truth_95_times_in_100(ratio):
    """Prompts with their own means and several samples each: an interval over samples would be far too narrow."""
    draw, covered, naive, trials = np.random.default_rng(0), 0, 0, 160
    for _ in range(trials):
        counts = draw.integers(1, 8, 60) if ratio else np.full(60, 4)
        levels = draw.normal(1.0, 1.0, 60)
        samples = [draw.normal(m, 0.3, n) for m, n in zip(levels, counts, strict=True)]
        interval = estimate([float(s.sum()) for s in samples], counts.tolist())
        covered += interval.low <= 1.0 <= interval.high
        flat = np.concatenate(samples)
        naive += abs(flat.mean() - 1.0) <= 1.96 * flat.std() / len(flat) ** 0.5
    assert 0.90 <= covered / trials <= 0.98
    assert naive / trials < 0.80


def test_wins():
    assert wins([[2.0, 0.0]], [[1.0]]) == [0.5]
    assert wins([[1.0]], [[1.0]]) == [0.5], "a tie counts one half"
    assert wins([[3.0, 1.0], [0.0]], [[2.0, 1.0, 0.0], [5.0]]) == [pytest.approx((3 + 1.5) / 6), 0.0]
    draw = np.random.default_rng(1)
    ours, theirs = ([draw.integers(0, 4, 5).tolist() for _ in range(30)] for _ in range(2))
    assert [a + b for a, b in zip(wins(ours, theirs), wins(theirs, ours), strict=True)] == pytest.approx([1.0] * 30)
    assert np.mean(wins(ours, ours)) == pytest.approx(0.5)


def test_accuracies():
    def t(*values):
        return torch.tensor(values)

    assert accuracies(t(-1.0, -1.0, -1.0, -5.0), t(-2.0, -1.0, -0.5, -4.0)) == [1.0, 0.5, 0.0, 0.0]


def test_accuracies_of_labels_are_the_auc():
    draw = np.random.default_rng(0)
    rewards, labels = torch.tensor(draw.integers(0, 6, 40).astype(np.float32)), torch.tensor(draw.random(40) < 0.3)
    good, bad = rewards[labels].tolist(), rewards[~labels].tolist()
    assert label_accuracies(rewards, labels) == pytest.approx([np.mean([(g > b) + 0.5 * (g == b) for b in bad]) for g in good])
    assert label_accuracies(rewards, labels | True) == label_accuracies(rewards, labels & False) == []


def test_label_noise_share():
    assert label_noise_share(0.5, 0.8) == 0 and label_noise_share(0.8, 0.8) == 1
    assert label_noise_share(0.65, 0.8) == pytest.approx(0.5) and math.isnan(label_noise_share(0.6, 0.5))


# -- likelihoods ----------------------------------------------------------------------------------------------------


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    pairs = [EncodedPair([1] * a, [2] * b, [3] * c) for a, b, c in ((1, 1, 9), (5, 3, 2), (2, 7, 7))]
    result = perplexity(uniform(300), pairs, 0)
    assert [result.value, result.low, result.high] == pytest.approx([300] * 3, rel=1e-5)


def test_quick_without_a_reference_speaks_in_the_losses_own_terms():
    for name, means in (("simpo", True), ("orpo", True), ("cpo", False)):
        dpo = DPO(tiny(**LLAMA), beta=0.5, loss=name)
        pairs = [EncodedPair([1, 2], [3, 4, 5], [6]), EncodedPair([7], [8], [9, 10, 11, 12])]
        values = quick(dpo, pairs, None, 0)
        logps = metrics.pairs_logps(dpo, dpo.policy_model, pairs, 0)
        lengths = (torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0]))
        win, lose = (0.5 * p / (n if means else 1) for p, n in zip(logps, lengths, strict=True))
        assert values["eval/rewards/chosen"] == pytest.approx(float(win.mean()))
        assert values["eval/rewards/margins"] == pytest.approx(float((win - lose).mean()))
        assert values["eval/rewards/accuracies"] == pytest.approx(float((win > lose).float().mean()))
        loss, told = Preference(dpo)(collate_pairs(pairs, 0))
        assert values["eval/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        assert float(told["rewards/margins"]) == pytest.approx(values["eval/rewards/margins"], abs=1e-5)


def test_perplexity_and_logps_by_hand():
    model = tiny(**LLAMA)
    pairs = [EncodedPair([1, 2], [3, 4, 5], [6]), EncodedPair([7], [8], [9, 10, 11, 12])]

    @torch.no_grad()
    def logp(prompt, completion):
        rows = model(torch.tensor([prompt + completion])).double().log_softmax(-1)[0]
        return sum(float(rows[len(prompt) + i - 1, token]) for i, token in enumerate(completion))

    by_hand = [(logp(p.prompt, p.chosen), logp(p.prompt, p.rejected)) for p in pairs]
    assert perplexity(model, pairs, 0).value == pytest.approx(math.exp(-sum(map(sum, by_hand)) / 9), rel=1e-5)
    got = torch.stack(metrics.pairs_logps(DPO(model), model, pairs, 0, size=1), 1)
    assert got.tolist() == [pytest.approx(row, abs=1e-4) for row in by_hand]
    model.train()
    metrics.pairs_logps(DPO(model), model, pairs, 0)
    assert model.training, "the mode comes back"


def test_quick_agrees_with_the_training_metrics():
    dpo = DPO(tiny(**LLAMA, num_tokens=300), beta=0.3)
    with torch.no_grad():
        for p in dpo.policy_model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    sizes = ((1, 2, 9), (5, 3, 2), (2, 7, 7))
    pairs = [EncodedPair([1] * a, list(range(5, 5 + b)), list(range(30, 30 + c))) for a, b, c in sizes]
    values = quick(dpo, pairs, metrics.pairs_logps(dpo, dpo.ref_model, pairs, 0), 0)
    loss, expected = Preference(dpo)(collate_pairs(pairs, 0))
    assert values["eval/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    for name in ("accuracies", "chosen", "rejected", "margins"):
        assert values[f"eval/rewards/{name}"] == pytest.approx(float(expected[f"rewards/{name}"]), abs=1e-5)


def test_kl_of_equal_models_is_zero():
    model, tokenizer = tiny(**LLAMA, num_tokens=300), ByteTokenizer()
    prompts = ["one", "two", "a longer prompt"]
    drawn = metrics.sample(model, tokenizer, prompts, 3, 12, seed=0)
    ours, again = (completion_logps(m, tokenizer, prompts, drawn) for m in (model, tiny(**LLAMA, num_tokens=300)))
    assert ours == again and [len(row) for row in ours] == [3, 3, 3]
    told = [[c.logps for c in row] for row in drawn]
    for row, other in zip(ours, told, strict=True):
        assert row == pytest.approx(other, abs=1e-3), "scoring agrees with what the sampler says"


# -- the native engine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    return NativeBackend(tiny(**LLAMA, num_tokens=300, max_seq_len=64, sharp=3.0), ByteTokenizer(), batch_size=4)


PROMPTS = ["x", "a longer prompt", "", "x", "🦊", "middle"]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 3}, {"seed": 3, "n": 3, "top_k": 20},
                                     {"seed": 1, "stop": ("e", "xy"), "temperature": 0.7}, {"beams": 3}])
def test_batches_do_not_change_texts(engine, options):
    params = SamplingParams(max_new_tokens=12, **options)
    together = engine.generate(PROMPTS, params)
    assert [len(row) for row in together] == [params.n] * len(PROMPTS)
    large = NativeBackend(engine.wrapper.net, engine.tokenizer, batch_size=100).generate(PROMPTS, params)
    assert [[c.token_ids for c in row] for row in together] == [[c.token_ids for c in row] for row in large]
    if "seed" in options:
        assert together[0] != together[3], "equal prompts at two places draw their own"


@pytest.mark.parametrize("stop", [(), ("e",), ("\ufffd", "a"), ("zzz",)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_equals_generating(engine, stop, temperature):
    for seed in range(12):
        params = SamplingParams(max_new_tokens=20, seed=seed, stop=stop, temperature=temperature)
        whole = engine.generate(["a prompt"], params)[0][0]
        pieces = list(engine.stream("a prompt", params))
        assert "".join(pieces) == whole.text and not any(s in whole.text for s in stop)


def test_a_stop_string_ends_tokens_and_logps(engine):
    """What comes after the stop belongs to nobody: neither to the count nor to the log-probability."""
    for seed in range(30):
        free = engine.generate(["a"], SamplingParams(max_new_tokens=20, seed=seed))[0][0]
        text = engine.tokenizer.decode(free.token_ids[:8])
        stop = next((c for c in text if c.isascii() and c.isprintable()), None)
        if stop is None:
            continue
        cut = engine.generate(["a"], SamplingParams(max_new_tokens=20, seed=seed, stop=(stop,)))[0][0]
        assert cut.finish_reason == "stop" and cut.text == text[: text.index(stop)]
        assert cut.token_ids == free.token_ids[: len(cut.token_ids)] and cut.token_ids[-1] == ord(stop)
        scored = completion_logps(engine.wrapper.net, engine.tokenizer, ["a"], [[cut]])
        assert cut.logps == pytest.approx(scored[0][0], abs=1e-3)
        return
    pytest.fail("no text with a printable character")


def test_finish_reasons():
    tokenizer = FewBytes()  # every fifth token is EOS
    rows = NativeBackend(uniform(5), tokenizer).generate(["a", "bb"], SamplingParams(max_new_tokens=3, n=40, seed=0))
    flat = [c for row in rows for c in row]
    assert {c.finish_reason for c in flat} == {"stop", "length"}
    for c in flat:
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == 4) and 4 not in c.token_ids[:-1] and len(c.token_ids) <= 3
        assert c.text == tokenizer.decode(c.token_ids) and c.logps == pytest.approx(-math.log(5) * len(c.token_ids), abs=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1}, "temperature is -1, allowed is a number >= 0"), ({"temperature": math.nan}, "temperature is nan"),
    ({"top_k": 0}, "top_k is 0, allowed is a number >= 1"), ({"top_p": 1.1}, r"top_p is 1.1, allowed is a number in \[0, 1\]"),
    ({"min_p": -0.1}, "min_p is -0.1"), ({"n": 0}, "n is 0"), ({"beams": 0}, "beams is 0"), ({"repetition_penalty": 0}, "is 0"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"), ({"temperature": math.inf}, "temperature is inf"),
    ({"beams": 2, "n": 2}, "beams is 2 and n is 2"), ({"beams": 2, "seed": 1}, "beams is 2 and seed is 1"),
    ({"beams": 2, "temperature": 0.5}, "beams is 2 and temperature"), ({"beams": 2, "stop": ("a",)}, "beams is 2 and stop"),
])
def test_bad_sampling_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)


# -- comparison and report ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison():
    tokenizer = ByteTokenizer()
    pairs = read_pairs(ROOT / "data/test.jsonl", limit=6)
    dpo = DPO(tiny(**LLAMA, num_tokens=259, max_seq_len=1024, depth=1), beta=0.3)
    with torch.no_grad():
        dpo.policy_model.to_logits.weight.mul_(1.2)
    return compare(dpo, dpo.ref_model, tiny(**LLAMA, num_tokens=259, max_seq_len=1024, depth=1, sharp=1.0), tokenizer, pairs,
                   [encode_pair(p, tokenizer) for p in pairs], gold_known=True, prompts=4, samples=2, max_new_tokens=12, seed=0)


def test_every_promised_number_is_there(comparison):
    for key in KEYS:
        assert key in comparison.numbers, key
    low, high = comparison.numbers["win_rate_interval"]
    assert low <= comparison.numbers["win_rate"] <= high
    assert comparison.numbers["perplexity_policy"] != comparison.numbers["perplexity_reference"]
    assert comparison.numbers["prompts"] == 4 and comparison.numbers["prompts_too_long"] == 0
    pairs = read_pairs(ROOT / "data/test.jsonl", limit=6)
    limit = toyworld.preference_limit({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs)
    assert comparison.numbers["preference_accuracy_limit"] == limit
    for name, samples in (("untrained", 1), ("reference", 2), ("policy", 2)):
        assert [len(row) for row in comparison.texts[name]] == [samples] * 4
        gold = [toyworld.gold_reward(str(p), t) for p, row in zip(comparison.prompts, comparison.texts[name], strict=True)
                for t in row]
        assert comparison.numbers[f"gold_{name}"] == pytest.approx(np.mean(gold))


def test_policy_and_reference_do_not_share_draws():
    """Equal models must tie over all samples, not give the same text twice."""
    tokenizer = ByteTokenizer()
    pairs = read_pairs(ROOT / "data/test.jsonl", limit=3)
    dpo = DPO(tiny(**LLAMA, num_tokens=259, max_seq_len=1024, depth=1), beta=0.3)
    encoded = [encode_pair(p, tokenizer) for p in pairs]
    result = compare(dpo, dpo.ref_model, None, tokenizer, pairs, encoded, gold_known=True, prompts=3, samples=2,
                     max_new_tokens=12, seed=0)
    assert result.numbers["kl"] == pytest.approx(0, abs=1e-4) and result.numbers["preference_accuracy"] == 0.5
    assert result.texts["policy"] != result.texts["reference"] and "untrained" not in result.texts


def test_prompts_that_do_not_fit_are_left_out_and_counted(tmp_path):
    tokenizer = ByteTokenizer()
    pairs = [PreferencePair(p, " yes", " no") for p in ("short", "x" * 200, "short")]
    dpo = DPO(tiny(**LLAMA, num_tokens=259, max_seq_len=64, depth=1))
    encoded = [encode_pair(p, tokenizer) for p in pairs]
    for max_new_tokens, kept in ((10, 1), (80, 0)):
        result = compare(dpo, dpo.ref_model, None, tokenizer, pairs, encoded, gold_known=False, prompts=9, samples=1,
                         max_new_tokens=max_new_tokens, seed=0)
        assert (result.numbers["prompts"], result.numbers["prompts_too_long"]) == (kept, 2 - kept)
        (tmp_path / "metrics.jsonl").write_text("")
        assert "perplexity" in write_report(tmp_path, "t", result, {})


def test_report(comparison, tmp_path):
    lines = [{"step": s, "epoch": 0.1, "loss": 0.6, "rewards/margins": 0.1, "rewards/accuracies": 0.5, "rewards/chosen": 0.1,
              "rewards/rejected": 0.0} for s in (1, 2)] + [{"step": 2, "eval/loss": None, "eval/rewards/margins": 0.2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"step": 3, "lo')
    table = write_report(tmp_path, "A title", comparison, {"beta": 0.3})
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# A title\n") and table in report and '"beta": 0.3' in report
    for picture in ("training.png", "rewards.png", "gold.png", "lengths.png"):
        assert f"]({picture})" in report and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    rows = table.splitlines()
    assert rows[0] == "| | untrained | reference | policy |" and all(row.count("|") == 5 for row in rows)
    assert report.count("- *reference* (gold ") == 4 == report.count("- *policy* (gold ")
    evaluation = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert set(KEYS) <= set(evaluation)


def test_evaluation_json_is_strict(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    result = Comparison(numbers={"preference_accuracy_share": math.nan, "kl_interval": [0.0, math.inf]})
    write_report(tmp_path, "t", result, {})
    values = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert values == {"preference_accuracy_share": None, "kl_interval": [0.0, None]}


@pytest.mark.parametrize("text", [
    "# head\n\n- list\n\n1. one", "<script>alert(1)</script>", "[link](http://x.y) http://a.b www.c.d",
    "| a | b |\n|---|---|", "**bold** __it__ `code` ~~no~~ $x$ &lt; &#42;", "```\nblock\n```",
    "![i](p.png)", "a\u2028b\rc", "\\[x](y)",
])
def test_samples_can_not_become_markdown_of_ours(text):
    import re

    line = prose(text)
    assert "\n" not in line and "\r" not in line and "\u2028" not in line
    assert not re.search(r"(?<!\\)(\\\\)*[`*_\[\]<>|#~$&]", line), "an unescaped mark"
    assert "http://" not in line and "www." not in line
    plain = re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", line).split()
    assert plain == text.split()


def test_messages_become_one_line():
    assert prose((Message("user", "a\nb"), Message("assistant", "*c*"))) == r"[user] a b [assistant] \*c\*".replace(
        "[", r"\[").replace("]", r"\]")
