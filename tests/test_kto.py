"""KTO from unpaired labels: mismatched completions, the objective against a formula and trl's own code, and the program."""

import copy
import gc
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA, tiny
from test_kill import ENVIRONMENT, SUICIDE
from test_losses import trainer
from test_preference import moved
from test_programs import LOOP, TINY, call, refused, write_jsonl

from xalign import DPO
from xalign.data.collate import EncodedLabelled, EncodedPair, LabelledBatch, TruncationReport, collate_labelled, mismatch
from xalign.data.records import Labelled, PreferencePair
from xalign.data.store import open_store, write_store
from xalign.errors import ConfigError
from xalign.evaluation.compare import quick
from xalign.evaluation.metrics import pairs_logps
from xalign.nn.transformer import TransformerWrapper
from xalign.objectives import KTO
from xalign.prepare import MISMATCHED, encode_texts
from xalign.tokenizers import ByteTokenizer
from xalign.watch import TIMED, unbalanced

ROOT = Path(__file__).resolve().parent.parent


def text(number: int) -> EncodedLabelled:
    completion = [3 + number, *range(5, 6 + number % 4)]
    return EncodedLabelled([1, 2 + number % 6], completion, completion, label=number % 3 > 0)


ROWS = mismatch([text(number) for number in range(9)], 32)


# -- mismatched completions -----------------------------------------------------------------------------------------


def test_each_prompt_gets_a_completion_of_another():
    rows = [EncodedLabelled([1], [7] * 4, []), EncodedLabelled([2], [8] * 2, [], label=False),
            EncodedLabelled([2], [9] * 3, []), EncodedLabelled([3, 3, 3], [5], [])]
    found = mismatch(rows, 6)
    assert [(r.prompt, r.chosen, r.label) for r in found] == [(r.prompt, r.chosen, r.label) for r in rows]
    # the next longer one of another prompt; [2]'s longer neighbour has the same prompt; the longest takes the shortest
    assert [r.rejected for r in found] == [[5], [7] * 4, [7] * 4, [8] * 2]
    assert [r.rejected for r in mismatch(rows, 4)] == [[5], [7] * 3, [7] * 3, [8]], "cut to what the prompt leaves"
    same = [EncodedLabelled([], [n], []) for n in range(3)]
    assert [r.rejected for r in mismatch(same, 9)] == [[1], [2], [0]], "no other prompt: another row's"
    assert mismatch(same[:1], 9)[0].rejected == [0]


def test_pairs_are_two_labelled_texts_and_records_stream():
    pairs = [PreferencePair(f"{n}?", f" yes {n}", f" no {n}" * (1 + n % 4)) for n in range(2 * MISMATCHED + 3)]
    texts = [Labelled(p.prompt, t, good) for p in pairs for t, good in ((p.chosen, True), (p.rejected, False))]
    both = [list(encode_texts(records, ByteTokenizer(), 40, "keep_end", TruncationReport())) for records in (pairs, texts)]
    assert both[0] == both[1] and len(both[0]) == len(texts)
    assert [r.label for r in both[0]] == [True, False] * len(pairs)
    for i, row in enumerate(both[0]):
        near = both[0][max(0, i - 2 * MISMATCHED) : i + 2 * MISMATCHED]
        assert row.rejected != row.chosen and any(row.rejected == o.chosen and row.prompt != o.prompt for o in near)
    taken = 0

    def source():
        nonlocal taken
        for record in texts:
            taken += 1
            yield record

    next(encode_texts(source(), ByteTokenizer(), 40, "keep_end", TruncationReport()))
    assert taken == 2 * MISMATCHED


def test_labels_survive_the_store(tmp_path):
    write_store(tmp_path / "tokens", {}, EncodedLabelled, iter(ROWS), 100)
    store, _ = open_store(tmp_path / "tokens", {}, EncodedLabelled)
    assert list(store) == ROWS and store.labels.tolist() == [r.label for r in ROWS]
    assert list(store.lengths) == [r.length for r in ROWS] and list(store[3:5]) == ROWS[3:5]
    assert open_store(tmp_path / "tokens", {}, EncodedPair) is None
    flipped = [EncodedLabelled(r.prompt, r.chosen, r.rejected, label=not r.label) for r in ROWS]
    write_store(tmp_path / "flipped", {}, EncodedLabelled, iter(flipped), 100)
    assert open_store(tmp_path / "flipped", {}, EncodedLabelled)[0].digest() != store.digest()


# -- the objective --------------------------------------------------------------------------------------------------


def kto(beta: float = 0.3, **options) -> DPO:
    policy = tiny(**LLAMA)
    reference, weights = moved(policy), {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    return DPO(policy, beta=beta, ref_model=reference, loss="kto", loss_options=weights, **options)


def step(dpo: DPO, rows=ROWS, known=None):
    dpo.zero_grad()
    loss, metrics = KTO(dpo, known)(collate_labelled(rows, 0))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in dpo.parameters()], metrics


def assert_same(one, other, rtol=1e-4):
    torch.testing.assert_close(one[0], other[0].float(), atol=1e-6, rtol=rtol)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-6, rtol=rtol)


def test_the_objective_is_the_formula_in_fp64():
    dpo = kto()
    policy, reference = (copy.deepcopy(m).double() for m in (dpo.policy_model, dpo.ref_model))

    def logp(model, prompt, completion):
        rows = model(torch.tensor([prompt + completion])).log_softmax(-1)[0]
        return sum(rows[len(prompt) + i - 1, token] for i, token in enumerate(completion))

    ratio, drift = ([logp(policy, r.prompt, getattr(r, side)) - logp(reference, r.prompt, getattr(r, side)).detach()
                     for r in ROWS] for side in ("chosen", "rejected"))
    z0 = max(0.0, sum(float(d.detach()) for d in drift) / len(ROWS))
    assert z0 > 0.01, "else this test asks for nothing"
    loss = sum(1.5 * (1 - torch.sigmoid(0.3 * (r - z0))) if row.label else 0.5 * (1 - torch.sigmoid(0.3 * (z0 - r)))
               for r, row in zip(ratio, ROWS, strict=True)) / len(ROWS)
    loss.backward()
    found = step(dpo)
    assert_same(found, (loss.detach(), [p.grad for p in policy.parameters()]), 1e-3)
    told = KTO(dpo).told({k: float(v) for k, v in found[2].items()})
    wanted, unwanted = ([0.3 * float(r.detach()) for r, row in zip(ratio, ROWS, strict=True) if row.label == kind]
                        for kind in (True, False))
    assert told["kl"] == pytest.approx(z0, abs=1e-4) and told.keys() == {
        "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    assert told["rewards/chosen"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
    assert told["rewards/rejected"] == pytest.approx(sum(unwanted) / len(unwanted), abs=1e-4)


def test_the_objective_equals_trls_trainer():
    """Its collator, its drift and its loss, on the same model and the same mismatched completions."""
    pytest.importorskip("trl")
    from trl import KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    dpo = kto()
    known = pairs_logps(dpo, dpo.ref_model, ROWS, 0)

    def model(input_ids, attention_mask, labels, fused_lm_head, use_cache):
        logps = dpo.policy_model(input_ids)[:, :-1].log_softmax(-1)
        scored = labels[:, 1:] != -100
        found = logps.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * scored
        return SimpleNamespace(log_probs=found, entropy=0 * found, mean_logits=0 * found)

    inputs = DataCollatorForUnpairedPreference(pad_token_id=0)([
        {"prompt_ids": r.prompt, "completion_ids": r.chosen, "KL_completion_ids": r.rejected, "label": r.label,
         "ref_logps": float(a), "ref_KL_logps": float(b)} for r, a, b in zip(ROWS, *known, strict=True)])
    me = trainer(beta=0.3, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.5, calculate_KL=True)
    me._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, me)
    dpo.zero_grad()
    theirs = KTOTrainer._compute_loss(me, model, inputs, False)
    theirs.backward()
    gradients = [p.grad.clone() for p in dpo.parameters()]
    ours = step(dpo, known=known)
    assert_same(ours, (theirs.detach(), gradients))
    told = KTO(dpo).told({k: float(v) for k, v in ours[2].items()})
    for name, values in me._metrics["train"].items():
        if name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert told[name] == pytest.approx(values[0], abs=1e-4), name


def test_ways_to_compute_it_change_nothing():
    dpo = kto()
    plain = step(dpo)
    assert_same(step(dpo, known=pairs_logps(dpo, dpo.ref_model, ROWS, 0)), plain)
    padded = kto(packed=False)
    assert_same(step(padded), plain)
    dropout = DPO(tiny(**LLAMA, ff_dropout=0.5), beta=0.3, ref_model=dpo.ref_model, loss="kto").train()
    assert dropout.policy_model.training
    found = step(dropout)
    assert dropout.policy_model.training, "the mode comes back"
    assert float(found[2]["kl"]) == pytest.approx(float(plain[2]["kl"]), abs=1e-4), "z0 knows no dropout"
    assert float(found[2]["logps/chosen"]) != pytest.approx(float(plain[2]["logps/chosen"]), abs=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        half = step(dpo)
    for a, b in zip(half[1], plain[1], strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9


def test_gradients_flow_through_labelled_texts_alone():
    """z0 is held: with equal z0 another mismatched completion changes nothing."""
    dpo = kto()
    other = [EncodedLabelled(r.prompt, r.chosen, r.chosen[::-1], label=r.label) for r in ROWS]
    zs = [float(step(dpo, rows)[2]["kl"]) for rows in (ROWS, other)]
    known = pairs_logps(dpo, dpo.ref_model, ROWS, 0), pairs_logps(dpo, dpo.ref_model, other, 0)
    shifted = (known[1][0], known[1][1] + pairs_logps(dpo, dpo.policy_model, other, 0)[1].mean()
               - known[1][1].mean() - pairs_logps(dpo, dpo.policy_model, ROWS, 0)[1].mean() + known[0][1].mean())
    assert zs[0] != pytest.approx(zs[1], abs=1e-3)
    assert_same(step(dpo, other, shifted), step(dpo, ROWS, known[0]))


def test_micro_batches_average_by_their_texts_and_sides_by_their_own():
    dpo = kto()
    objective = KTO(dpo)
    parts = [collate_labelled(part, 0) for part in (ROWS[:1], ROWS[1:4], ROWS[4:])]
    assert [objective.weight(part) for part in parts] == [1, 3, 5]
    assert objective.tokens(parts[1]) == sum(len(r.chosen) for r in ROWS[1:4])
    assert objective.lengths(parts[0]) == [[2, len(ROWS[0].chosen)]]
    means: dict[str, float] = {}
    for part in parts:
        for key, value in objective(part)[1].items():
            means[key] = means.get(key, 0.0) + len(part) / 9 * float(value)
    whole = objective.told({k: float(v) for k, v in objective(collate_labelled(ROWS, 0))[1].items()})
    told = objective.told(means)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert told[key] == pytest.approx(whole[key], abs=1e-5), key
    good = objective.told({k: float(v) for k, v in objective(collate_labelled([r for r in ROWS if r.label], 0))[1].items()})
    assert good.keys() == {"kl", "rewards/chosen", "logps/chosen"}, "no undesirable text, no mean of them"


def test_held_out_loss_is_that_of_one_batch():
    dpo = kto()
    told = quick(dpo, ROWS, pairs_logps(dpo, dpo.ref_model, ROWS, 0), 0)
    loss, metrics = KTO(dpo)(collate_labelled(ROWS, 0))
    expected = KTO(dpo).told({k: float(v) for k, v in metrics.items()})
    assert told["eval/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert told["eval/z0"] == pytest.approx(float(metrics["kl"]), abs=1e-4)
    for side in ("chosen", "rejected", "margins"):
        assert told[f"eval/rewards/{side}"] == pytest.approx(expected[f"rewards/{side}"], abs=1e-4)
    assert quick(dpo, ROWS[1:3], pairs_logps(dpo, dpo.ref_model, ROWS[1:3], 0), 0).keys() == {
        "eval/loss", "eval/z0", "eval/rewards/chosen"}, "one kind of label only"


def test_kto_takes_no_pairs_and_none_of_the_pairs_settings():
    with pytest.raises(ConfigError, match=r"objectives\.KTO"):
        kto()(torch.ones(1, 3).long(), torch.ones(1, 3).long())
    for options, message in (({"loss": "kto,sft"}, "allowed is kto alone"), ({"loss": "sigmoid, kto"}, "allowed is kto alone"),
                             ({"loss": "kto", "label_smoothing": 0.1}, "label_smoothing is 0.1"),
                             ({"loss": "kto", "divergence": "js"}, "knows no f_divergence"),
                             ({"loss": "kto", "ld_alpha": 0.5}, "ld_alpha"), ({"loss": "kto", "reduction": "mean"}, "means"),
                             ({"loss": "kto", "loss_options": {"desirable_weight": -1.0}}, "desirable_weight is -1.0"),
                             ({"loss": "kto", "loss_options": {"desirable_weight": 0, "undesirable_weight": 0}}, "both 0"),
                             ({"loss": "sigmoid", "loss_options": {"desirable_weight": 2.0}}, "desirable_weight is 2.0, but")):
        with pytest.raises(ConfigError, match=message):
            DPO(tiny(**LLAMA), **options)


def test_labels_out_of_balance_are_told():
    assert unbalanced(10, 10, 1.0, 1.0) == unbalanced(30, 10, 1.0, 3.0) == ""
    assert "--desirable-weight 0.1, or --undesirable-weight 10" in unbalanced(100, 10, 1.0, 1.0)
    assert "needs both kinds" in unbalanced(9, 0, 1.0, 1.0) and "needs both kinds" in unbalanced(9, 9, 0.0, 1.0)


def test_batches_move_whole():
    batch = collate_labelled(ROWS, 0, range(9, 18)).to("cpu")
    assert isinstance(batch, LabelledBatch) and len(batch) == 9 and batch.index.tolist() == list(range(9, 18))
    assert batch.labels.tolist() == [r.label for r in ROWS]


# -- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Pairs of the toy world, the same as labelled completions, and their configuration."""
    folder = tmp_path_factory.mktemp("kto")
    records = [json.loads(line) for line in (ROOT / "data/test.jsonl").read_text().splitlines()[:40]]
    for name, some in (("train", records[:30]), ("test", records[30:])):
        write_jsonl(folder / f"{name}.jsonl", some)
        write_jsonl(folder / f"{name}-labels.jsonl", [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
                                                     for r in some for side in ("chosen", "rejected")])
    for kind in ("", "-labels"):
        data = {"dataset": str(folder / f"train{kind}.jsonl"), "eval_dataset": str(folder / f"test{kind}.jsonl")}
        (folder / f"tiny{kind}.json").write_text(json.dumps(TINY | data | {"loss_type": "kto", "learning_rate": 1e-2}))
    return folder


def lines(run: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in (run / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def labelled(toy) -> Path:
    assert call("dpo", "--config", toy / "tiny-labels.json", "--output-dir", toy / "labels") == 0
    return toy / "labels"


def test_kto_of_pairs_is_kto_of_their_labels(toy, labelled, capsys):
    assert call("dpo", "--config", toy / "tiny.json", "--output-dir", toy / "pairs") == 0
    table = capsys.readouterr().out
    train = [[r for r in lines(run) if "loss" in r] for run in (toy / "pairs", labelled)]
    assert train[0] == train[1] and len(train[0]) == 3
    assert lines(toy / "pairs")[0]["eval/loss"] == pytest.approx(0.5, abs=1e-4)
    numbers = {run.name: json.loads((run / "evaluation.json").read_text()) for run in (toy / "pairs", labelled)}
    assert {"win_rate", "gold_policy", "preference_accuracy_limit", "kl"} <= numbers["pairs"].keys() and "win rate" in table
    assert numbers["pairs"]["perplexity_policy"] == pytest.approx(numbers["labels"]["perplexity_policy"], rel=1e-5)
    assert "preference_accuracy" in numbers["labels"] and "preference_accuracy_limit" not in numbers["labels"]
    assert numbers["labels"]["gold_policy"] == numbers["pairs"]["gold_policy"]
    assert "20 held-out labelled completions" in (labelled / "report.md").read_text()
    assert "10 held-out pairs" in (toy / "pairs/report.md").read_text()


class Crash(BaseException):
    """What no one catches."""


@pytest.mark.parametrize("at", [1, 5])
def test_a_run_that_was_cut_off_goes_on_to_the_bit(toy, labelled, tmp_path, monkeypatch, at):
    from xalign import training

    real, seen = training.schedule, []

    def deadly(step, *, kind, **options):
        if len(seen) == 2 + at:  # behind two steps of imitation
            raise Crash
        seen.append(step)
        return real(step, kind=kind, **options)

    monkeypatch.setattr(training, "schedule", deadly)
    options = "dpo", "--config", toy / "tiny-labels.json", "--output-dir", tmp_path / "run"
    with pytest.raises(Crash):
        call(*options)
    assert seen.count(0) == 2, "cut off in the preference stage"
    monkeypatch.undo()
    assert call(*options) == 0
    assert lines(tmp_path / "run") == lines(labelled)
    for file in ("policy/model.safetensors", "checkpoint-6/model.safetensors", "samples.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (labelled / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "count"), [("xalign.training", "schedule", 6), ("xalign.weights", "save_file", 5),
                                                       ("xalign.reference", "write_atomically", 1)])
def test_killed_and_resumed_equals_undisturbed(toy, labelled, tmp_path, module, name, count):
    options = ["--config", str(toy / "tiny-labels.json"), "--output-dir", str(tmp_path / "run")]
    killed = subprocess.run([sys.executable, "-c", SUICIDE, module, name, str(count), "after", *options], env=ENVIRONMENT,
                            cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "run/policy").exists(), killed.stderr
    assert call("dpo", *options) == 0
    assert lines(tmp_path / "run") == lines(labelled)
    for file in ("policy/model.safetensors", "checkpoint-6/model.safetensors", "samples.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (labelled / file).read_bytes(), file


def test_held_out_labels_and_what_a_dry_run_shows(toy, tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps(TINY | {"loss_type": "kto", "dataset": str(toy / "train-labels.jsonl")}))
    assert call("dpo", "--config", tmp_path / "c.json", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "records are held out" in err and "labelled records; the first:\n\ndesirable:" in out and "\nmismatched" in out
    assert call("dpo", "--config", toy / "tiny.json", "--loss-type", "simpo", "--dry-run") == 0
    assert "reference (after training)" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--loss-type", "sigmoid,kto"], "the loss is 'sigmoid,kto', but kto takes labelled texts and the others pairs"),
    (["--loss-type", "kto", "--label-smoothing", 0.1], "label_smoothing is 0.1, but the loss 'kto' has none"),
    (["--loss-type", "kto", "--gamma", 0.1], "gamma is 0.1, but the loss 'kto' has none"),
    (["--loss-type", "kto", "--undesirable-weight", -1], "undesirable_weight is -1.0, allowed is a finite number >= 0"),
    (["--desirable-weight", 2], "desirable_weight is 2.0, but the loss 'sigmoid' has none"),
    (["--loss-type", "kto", "--ld-alpha", 0.5], "the loss kto knows no f_divergence, ld_alpha"),
    (["--loss-type", "ktp"], "no loss 'ktp', did you mean 'kto'?"),
    (["--loss-type", "simpo", "--ref-model", "x"], "--ref-model is x, but the loss simpo asks for no reference"),
])
def test_wrong_flags(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, "dpo", "--output-dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_wrong_records(toy, tmp_path, capsys):
    good = {"prompt": "a", "completion": "b", "label": True}
    for records, message in (([good, {"prompt": "a", "completion": "b"}], ":2: a record without a label, with"),
                             ([{"prompt": "a", "completion": "b"}], ":1: a record without a label, with"),
                             ([good, good | {"label": "maybe"}], ":2: "),
                             ([json.loads((toy / "train.jsonl").open().readline()), good], ":2: a labelled record")):
        file = write_jsonl(tmp_path / "records.jsonl", records)
        said = refused(capsys, "dpo", "--loss-type", "kto", "--dataset", file, "--output-dir", tmp_path / "run")
        assert message in said, said


# -- losses without a reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["simpo", "cpo,sft"])
def test_no_reference_is_in_memory_while_a_loss_that_needs_none_trains(toy, labelled, tmp_path, monkeypatch, loss):
    from xalign import train as program

    real, models = program.train, []

    def counted(policy, *arguments, **options):
        gc.collect()
        models.append(sum(type(o) is TransformerWrapper for o in gc.get_objects()))
        return real(policy, *arguments, **options)

    monkeypatch.setattr(program, "train", counted)
    gc.collect()
    before = sum(type(o) is TransformerWrapper for o in gc.get_objects())
    given = LOOP | {"learning_rate": 1e-2, "model": str(labelled / "reference"), "loss_type": loss,
                    "dataset": str(toy / "train.jsonl"), "eval_dataset": str(toy / "test.jsonl")}
    (tmp_path / "c.json").write_text(json.dumps(given))
    assert call("dpo", "--config", tmp_path / "c.json", "--output-dir", tmp_path / "run") == 0
    assert [n - before for n in models] == [1]
    numbers = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert numbers["perplexity_reference"] != numbers["perplexity_policy"] and numbers["kl"] != 0 and "win_rate" in numbers
    for record in lines(tmp_path / "run"):
        if "eval/loss" in record:
            assert {"eval/rewards/chosen", "eval/rewards/margins", "eval/rewards/accuracies"} <= record.keys()
            assert "eval/kl" not in record
