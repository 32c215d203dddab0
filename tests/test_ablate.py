"""`xalign ablate`: the exact world against brute force, grids and their names, runs made once, the report."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from xalign import losses
from xalign.ablate import finished, record_file, run_ablate
from xalign.ablation_report import Row, at_kl, checks, half_width, hold_against_dpo, rows_of, table
from xalign.checkpoint import save_pretrained
from xalign.cli import main
from xalign.config import ModelOptions
from xalign.errors import CheckpointError, ConfigError, RunsFailed
from xalign.exact import SHARPNESS, TEXTS, Frontier, World, best_of, best_of_kl, draw_pairs, expected, kl, tilted, wins
from xalign.grids import GRIDS, AblateConfig, AblateOptions, ExactRun, TextRun, runs_of
from xalign.logprobs import sequence_logprobs
from xalign.stages import scratch_model, scratch_tokenizer
from xalign.trials import changed_pairs, frontier, run_text

ROOT = Path(__file__).resolve().parent.parent


def few(n: int = 7, seed: int = 0) -> Frontier:
    """A world of so few texts that sums over all tuples of them can be written out."""
    draw = torch.Generator().manual_seed(seed)
    ref = torch.randn(n, generator=draw, dtype=torch.float64).log_softmax(0)
    return Frontier(ref, torch.rand(n, generator=draw, dtype=torch.float64))


# -- the exact world ------------------------------------------------------------------------------------------------


def test_the_distribution_of_a_model_is_that_of_its_texts_one_by_one():
    world, model = World(), scratch_model(ModelOptions(dim=16, depth=2, heads=2, max_seq_len=8), 5, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    logps = world.logps(model)
    assert logps.shape == (TEXTS,) and abs(float(logps.exp().sum()) - 1) < 1e-6
    some = torch.randperm(TEXTS, generator=torch.Generator().manual_seed(0))[:400]
    texts = world.texts[some]
    scored = torch.ones_like(texts, dtype=torch.bool)
    scored[:, 0] = False
    with torch.no_grad():
        assert torch.allclose(logps[some].float(), sequence_logprobs(model, texts, scored), atol=2e-5)
    assert logps.std() > 0.3  # of a flat one the order would not show


def test_the_texts_are_all_there_are_and_no_two_rewards_are_equal():
    world = World()
    assert [tuple(row) for row in world.texts[:, 1:].tolist()] == list(product(range(5), repeat=6))
    assert len(world.reward.unique()) == TEXTS and 0 < world.reward.min() < world.reward.max() < 1
    row = world.texts[12345].tolist()[1:]
    assert math.isclose(float(world.reward[12345]),
                        1 / (1 + math.exp(-0.9 * sum(float(world.weights[i, s]) for i, s in enumerate(row)))))
    assert abs(float(world.corpus().exp().sum()) - 1) < 1e-12


def test_expectation_and_divergence_are_their_sums():
    world = few()
    logps = few(seed=1).ref
    p, q, r = logps.exp().tolist(), world.ref.exp().tolist(), world.reward.tolist()
    assert math.isclose(expected(logps, world.reward), sum(a * b for a, b in zip(p, r, strict=True)))
    assert math.isclose(kl(logps, world.ref), sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    none = torch.tensor([-math.inf, 0.0], dtype=torch.float64)
    assert math.isclose(kl(none, torch.tensor([0.25, 0.75], dtype=torch.float64).log()), -math.log(0.75))


@pytest.mark.parametrize("reward", [[0.1, 0.5, 0.2, 0.9], [0.3, 0.3, 0.9, 0.3], [0.5] * 4])
def test_best_of_n_is_what_all_tuples_of_draws_give(reward):
    ref, r, n = few(4).ref, torch.tensor(reward, dtype=torch.float64), 3
    p, found = ref.exp().tolist(), [0.0] * 4
    for drawn in product(range(4), repeat=n):
        top = max(reward[i] for i in drawn)
        best = [i for i in drawn if reward[i] == top]
        for i in best:
            found[i] += math.prod(p[j] for j in drawn) / len(best)
    assert torch.allclose(best_of(ref, r, n).exp(), torch.tensor(found, dtype=torch.float64), atol=1e-12)
    assert kl(best_of(ref, r, n), ref) <= best_of_kl(n) + 1e-12


def test_best_of_n_has_the_known_divergence_in_the_exact_world():
    world = World()
    for n in (2, 16):
        assert math.isclose(kl(best_of(world.corpus(), world.reward, n), world.corpus()), best_of_kl(n), rel_tol=0.01)


def test_no_distribution_beats_the_oracle():
    world = few()
    draw = torch.Generator().manual_seed(5)
    best = tilted(world.ref, world.reward, 1 / 0.3)
    aim = expected(best, world.reward) - 0.3 * kl(best, world.ref)
    for _ in range(200):
        other = (best + torch.randn(7, generator=draw, dtype=torch.float64)).log_softmax(0)
        assert expected(other, world.reward) - 0.3 * kl(other, world.ref) <= aim + 1e-12
        assert expected(other, world.reward) <= world.oracle(kl(other, world.ref)) + 1e-9
    assert math.isclose(world.oracle(kl(best, world.ref)), expected(best, world.reward), rel_tol=1e-9)
    assert math.isclose(world.efficiency(*world.point(best)), 1, rel_tol=1e-6)
    assert math.isnan(world.efficiency(world.start, 0.0))


def population_loss(method: str, logps: Tensor, world: Frontier, beta: float, alpha: float) -> Tensor:
    """The loss over all pairs of texts, each as often as the reference draws and the labels order it."""
    a, b = (x.flatten() for x in torch.meshgrid(*[torch.arange(len(logps))] * 2, indexing="ij"))
    weight = (world.ref[a] + world.ref[b]).exp() * torch.sigmoid(SHARPNESS * (world.reward[a] - world.reward[b]))
    if method in ("sft", "unlikelihood"):
        one = torch.ones(len(a))
        return (weight * losses.unlikelihood(logps[a], logps[b], one, one, alpha=alpha)).sum()
    return (weight * losses.LOSSES[method](logps[a], logps[b], world.ref[a], world.ref[b], beta=beta)).sum()


@pytest.mark.parametrize(("method", "beta", "alpha"), [("sigmoid", 0.3, 0), ("sigmoid", 3, 0), ("ipo_sum", 0.2, 0),
                                                       ("sft", 1, 0), ("unlikelihood", 1, 0.3)])
def test_at_a_losss_optimum_its_gradient_over_all_pairs_is_zero(method, beta, alpha):
    world = few()
    optimum = world.optimum(method, beta, alpha)
    slopes = []
    for at in (optimum, world.ref):
        logits = at.clone().requires_grad_(True)
        population_loss(method, logits.log_softmax(0), world, beta, alpha).backward()
        slopes.append(float(logits.grad.abs().max()))
    assert slopes[0] < 1e-10 < 1e-3 < slopes[1]
    assert world.optimum("kto", 1.0) is None


def test_pairs_are_drawn_and_labelled_as_said():
    world = few(4)
    chosen, rejected = draw_pairs(world.ref, world.reward, 20_000, 4, seed=0)
    assert len(chosen) == len(rejected) == 6 * 20_000
    seen, p = torch.bincount(torch.cat((chosen, rejected)), minlength=4).double(), world.ref.exp()
    assert torch.allclose(seen / seen.sum(), p, atol=0.01)
    assert len(torch.stack((chosen, rejected)).view(2, -1, 6)[:, 0].unique()) <= 4  # a group after the other
    for noise in (0.0, 0.3):
        chosen, rejected = draw_pairs(world.ref, world.reward, 20_000, 4, seed=1, noise=noise)
        won = float(((chosen == 0) & (rejected == 1)).sum())
        lost = float(((chosen == 1) & (rejected == 0)).sum())
        true = float(torch.sigmoid(SHARPNESS * (world.reward[0] - world.reward[1])))
        assert abs(won / (won + lost) - (true * (1 - noise) + (1 - true) * noise)) < 0.02
    chosen, rejected = draw_pairs(world.ref, world.reward, 100, 4, seed=0, labels="deterministic")
    assert bool((world.reward[chosen] >= world.reward[rejected]).all())
    assert math.isclose(float(wins(world.ref, world.reward)[2]), sum(
        float(p[i] * torch.sigmoid(SHARPNESS * (world.reward[2] - world.reward[i]))) for i in range(4)))


# -- grids ------------------------------------------------------------------------------------------------------------


def test_named_grids_hold_what_they_promise():
    for name in GRIDS:
        runs = runs_of(name)
        assert len({run.name for run in runs}) == len(runs) and not any("/" in run.name for run in runs)
    plain = [r for r in runs_of("exact") if r.own.keys() == {"beta"} and r.method == "sigmoid"]
    assert {(r.beta, r.seed) for r in plain} == {(b, s) for b in (0.1, 0.3, 1.0, 3.0) for s in range(3)}
    assert {r.beta for r in runs_of("text") if r.method == "simpo"} == {0.05, 0.1, 0.3, 1.0}


@pytest.mark.parametrize(("body", "told"), [
    ("def g(): return []", "with a run at least"),
    ("def g(): return [ExactRun(), TextRun()]", "one of TextRun"),
    ("def g(): return [ExactRun(), ExactRun()]", "is there twice"),
    ("def g(): return [ExactRun(fraction=0)]", "fraction is 0, allowed is a number in"),
    ("def h(): return []", "no function 'g'"),
    ("def g(:", "SyntaxError"), ("def g(): return None", "TypeError: 'NoneType'"),
    ("def g(): raise ValueError('so')", "ValueError: so"),
    ("def g(): return [ExactRun(method='sigmoyd')]", "run sigmoyd-seed=0: no loss 'sigmoyd', did you mean 'sigmoid'"),
    ("def g(): return [TextRun(), TextRun(beta=-1.0)]", "run sigmoid-beta=-1-seed=0: beta is -1.0"),
    ("def f(a, b): return a\ndef g(): return [ExactRun(method=__file__ + ':f')]", "run mine.f-seed=0: TypeError"),
])
def test_a_grid_that_cant_be_used_is_told_in_a_line(body, told, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"from xalign.grids import ExactRun, TextRun\n{body}\n")
    with pytest.raises(ConfigError, match=told):
        run_ablate(AblateConfig(AblateOptions(f"{file}:g", output_dir=str(tmp_path / "none"))))
    assert not (tmp_path / "none").exists()


def test_a_grid_without_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        runs_of("exakt")


def test_half_widths_are_students():
    for n in (2, 3, 5, 21, 22, 40):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).tolist()
        low, high = student.interval(0.95, n - 1, sum(values) / n, torch.tensor(values).std().item() / n**0.5)
        assert math.isclose(half_width(values), (high - low) / 2, rel_tol=1e-3)
    assert math.isnan(half_width([1.0]))


# -- the lab ----------------------------------------------------------------------------------------------------------

GRID = """
from xalign.grids import ExactRun, crossed

def pull(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta=0.1):
    return (policy_rejected - policy_chosen) * beta

def lab():
    base = ExactRun(steps=20, batch_size=32, draws=200, evaluations=2, warmup_steps=2)
    return [*crossed(base, method=("sigmoid", "kto"), beta=(1.0,), seed=(0, 1)),
            *crossed(base, method=(__file__ + ":pull",), beta=(1.0,)),
            ExactRun(method="best_of", n=4), ExactRun(beta=1.0, steps=20, rounds=3)]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A folder with a grid's file and, in grid/, its runs: four in a first start, the others in a second."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "mine.py").write_text(GRID)
    run_ablate(AblateConfig(options(folder, limit=4)))
    before = {p: p.read_bytes() for p in (folder / "grid/runs").glob("*.json")}
    assert len(before) == 4
    with pytest.raises(RunsFailed, match="1 of 7 runs failed, the first is online-sigmoid"):
        run_ablate(AblateConfig(options(folder)))
    assert all(p.read_bytes() == b for p, b in before.items())
    return folder


def options(folder: Path, **changes) -> AblateOptions:
    return AblateOptions(**{"grid": f"{folder / 'mine.py'}:lab", "output_dir": str(folder / "grid"), "jobs": 1, **changes})


def test_each_run_keeps_settings_revision_versions_and_figures(lab):
    runs = runs_of(f"{lab / 'mine.py'}:lab")
    record = json.loads(record_file(lab / "grid", runs[0]).read_text())
    assert record["settings"]["steps"] == 20 and record["settings"]["world"] == "exact" and record["settings"]["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__ and "revision" in record and record["seconds"] > 0
    assert [point[0] for point in record["result"]["trajectory"]] == [0, 10, 20]
    start = frontier(lab / "grid")[2].start
    first, last = (record["result"]["trajectory"][i] for i in (0, -1))
    assert first[1] == pytest.approx(start) and first[2] == pytest.approx(0, abs=1e-9)
    assert last[1:] == pytest.approx([record["result"]["reward"], record["result"]["kl"]])


def test_the_report_groups_seeds_and_tells_of_what_failed(lab):
    text = (lab / "grid/report.md").read_text()
    assert "| sigmoid | β 1, draws 200" in text and "| mine:pull |" in text and "| 2 |" in text and " ± " in text
    assert "6 of 7 runs" in text and "rounds=3" in text and "allowed is a multiple" in text
    result = json.loads((lab / "grid/results.json").read_text())
    assert result["runs"] == 6 and result["revisions"] and [row["loss"] for row in result["rows"]][:2] == ["sigmoid", "kto"]
    assert result["rows"][-1]["figures"]["kl"]["values"][0] < result["rows"][-1]["figures"]["optimum_kl"]["values"][0] + 1e-9
    assert (lab / "grid/frontier.png").stat().st_size > 10_000


def test_a_run_of_other_settings_is_refused(lab):
    file = lab / "mine.py"
    for old, new, key in (("batch_size=32", "batch_size=32 + 1", None), ("* beta", "* beta * 2", "method_sha256")):
        file.write_text(GRID.replace(old, new))
        if key is None:  # another batch size is another name, hence another run
            assert not any(finished(lab / "grid", run) for run in runs_of(f"{file}:lab") if run.method == "sigmoid")
        else:
            with pytest.raises(CheckpointError, match=f"made with {key} = .*allowed are the same settings"):
                run_ablate(AblateConfig(options(lab)))
    file.write_text(GRID)
    with pytest.raises(CheckpointError, match="made with grid"):
        run_ablate(AblateConfig(options(lab, grid="exact")))


def test_a_dry_run_lists_and_writes_nothing(tmp_path, capsys):
    main(["ablate", "--grid", "text", "--dry-run", "--output-dir", str(tmp_path / "none")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 84 and lines[0] == "to do     sigmoid-beta=0.05-seed=0" and not (tmp_path / "none").exists()


def test_checks_say_no_where_a_run_is_off(lab):
    known = frontier(lab / "grid")[2]
    base = ExactRun()
    records = []
    for beta, off in ((0.3, 1.0), (1.0, 1.2)):
        reward, drift = known.point(known.optimum("sigmoid", beta))
        figures = {"reward": reward, "kl": drift * off, "optimum_reward": reward, "optimum_kl": drift, "efficiency": 0.9}
        records.append((replace(base, beta=beta), {"result": figures}))
    records.append((ExactRun(method="sft"), {"result": {"reward": known.start, "kl": 0.01, "efficiency": 0.0}}))
    told = checks(rows_of(records), known)
    assert [passed for _, passed in told] == [True, True, False, True, True], told
    assert at_kl(rows_of(records)[:2], known.start, 0) == known.start
    assert at_kl(rows_of(records)[:2], known.start, 0.0, known) == pytest.approx(known.start)


def test_a_part_of_the_pairs_with_flipped_labels(tmp_path):
    run = TextRun(fraction=0.1, noise=0.25)
    rows = [json.loads(line) for line in Path(changed_pairs(run, tmp_path)).read_text().splitlines()]
    before = [json.loads(line) for line in (ROOT / "data/train.jsonl").open()]
    known = {(r["prompt"], r["chosen"], r["rejected"]) for r in before}
    kept = sum((r["prompt"], r["chosen"], r["rejected"]) in known for r in rows)
    assert len(rows) == round(0.1 * len(before)) and abs(kept / len(rows) - 0.75) < 0.1
    assert changed_pairs(TextRun(), tmp_path) is None


def rows_at(*points: tuple[str, float | None, float, list[float]]) -> list[Row]:
    return [Row(ExactRun(method=method, beta=beta), [0, 1, 2], {"kl": [drift] * 3, "reward": rewards})
            for method, beta, drift, rewards in points]


def test_each_row_is_held_against_dpo_at_its_own_divergence():
    rows = rows_at(("sigmoid", 1.0, 1.0, [2.0, 2.0, 2.0]), ("sigmoid", 0.1, 4.0, [3.0, 3.0, 3.0]),
                   ("kto", 1.0, 2.25, [2.8, 2.9, 2.7]), ("orpo", 1.0, 2.25, [2.4, 2.9, 2.5]),
                   ("sft", None, 0.25, [1.4, 1.5, 1.4]), ("simpo", 1.0, 9.0, [9.0, 9.0, 9.0]))
    told = hold_against_dpo(rows, 1.0).splitlines()
    # in the root of the KL: 1 at 0, 2 at 1, 3 at 2
    assert [row.dpo for row in rows[2:5]] == pytest.approx([2.5, 2.5, 1.5]) and all(math.isnan(rows[i].dpo) for i in (0, 1, 5))
    assert told[-4:] == ["- above it, by more than its interval: kto β 1 (+0.300)",
                         "- above it, within its interval: orpo β 1 (+0.100)", "- below it: sft (-0.067)",
                         "- further from the reference than any β of DPO here: simpo β 1 (KL 9.0)"]
    assert "| 2.500 |" in table(rows)
    assert hold_against_dpo(rows[2:], 1.0) == hold_against_dpo(rows[:2], 1.0) == "" == hold_against_dpo(rows, math.nan)


def test_rounds_in_the_text_world_are_xalign_onlines(tmp_path, monkeypatch):
    """As many pairs as offline, of two draws each, ordered by the known reward; real rounds need a model of stories."""
    asked = []

    def rounds(config):
        asked.append(config)
        for number in (0, 3):
            folder = Path(config.run.output_dir) / f"round-{number}"
            folder.mkdir(parents=True)
            found = {name: number + i / 10 for i, name in enumerate(("gold", "kl", "gold_win_rate", "well_formed", "tokens"))}
            (folder / "evaluation.json").write_text(json.dumps(found))

    monkeypatch.setattr("xalign.trials.run_online", rounds)
    run = TextRun(rounds=3, beta=0.3, fraction=0.33, seed=5)
    found = run_text(run, tmp_path, tmp_path / "run")
    assert found == {"reward": 3.0, "kl": 3.1, "win_rate": 3.2, "well_formed": 3.3, "tokens": 3.4, "reference_reward": 0.0,
                     "reference_well_formed": 0.3}
    [config] = asked
    options, draw = config.online, config.draw
    assert (options.rounds, options.prompts_per_round, options.reward_model, draw.n) == (3, 440, "gold", 2)
    assert (config.loss.beta, config.training.seed, options.eval_prompts, options.eval_samples) == (0.3, 5, 150, 3)
    with pytest.raises(ConfigError, match=r"noise is 0\.1 in 3 rounds"):
        run_text(replace(run, noise=0.1), tmp_path, tmp_path / "other")


# -- slow ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_grid_leaves_nobody_behind_and_goes_on_to_the_same_figures(lab, tmp_path):
    grid = GRID.replace("steps=20, batch_size", "steps=120, batch_size").replace(", ExactRun(beta=1.0, steps=20, rounds=3)", "")
    (tmp_path / "mine.py").write_text(grid)
    command = [sys.executable, "-m", "xalign", "ablate", "--grid", f"{tmp_path / 'mine.py'}:lab", "--jobs", "2"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--output-dir", str(cut)], **quiet)
    deadline = time.monotonic() + 120
    while not any("result" in p.read_text() for p in (cut / "runs").glob("[!.]*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.1)
    done = {p: p.read_bytes() for p in (cut / "runs").glob("[!.]*.json") if "result" in p.read_text()}
    assert 0 < len(done) < 6
    for folder in (cut, whole):
        subprocess.run([*command, "--output-dir", str(folder)], cwd=ROOT, check=True, capture_output=True)
    assert all(p.read_bytes() == b for p, b in done.items())
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (cut, whole))
    assert one["runs"] == 6 and one["rows"] == other["rows"]


@pytest.mark.slow
def test_dpo_ends_at_its_population_optimum(tmp_path):
    """The acceptance of the exact grid with fewer runs and steps; docs/ablate.md has the whole."""
    (tmp_path / "mine.py").write_text(
        "from xalign.grids import ExactRun, crossed\ndef lab():\n    base = ExactRun(steps=400, evaluations=1)\n"
        "    return [*crossed(base, beta=(0.3, 1.0)), ExactRun(method='sft', steps=400, evaluations=1),"
        " ExactRun(method='best_of', n=16)]\n")
    run_ablate(AblateConfig(options(tmp_path)))
    known = frontier(tmp_path / "grid")[2]
    runs = runs_of(f"{tmp_path / 'mine.py'}:lab")
    rows = rows_of([(run, json.loads(record_file(tmp_path / "grid", run).read_text())) for run in runs])
    strong, middle, sft, best = rows
    assert strong.mean("kl") > middle.mean("kl") > sft.mean("kl")
    for row in (strong, middle):
        assert row.mean("reward") == pytest.approx(row.mean("optimum_reward"), rel=0.15)
        assert row.mean("kl") == pytest.approx(row.mean("optimum_kl"), rel=0.25)
    assert min(row.mean("efficiency") for row in rows[:2]) > 0.85
    assert at_kl(rows[:2], known.start, sft.mean("kl"), known) > sft.mean("reward")
    between = (strong.mean("kl") + middle.mean("kl")) / 2
    assert at_kl(rows[:2], known.start, between) < at_kl(rows[:2], known.start, between, known) < known.oracle(between)
    assert best.mean("kl") == pytest.approx(best_of_kl(16), rel=0.01)


@pytest.mark.slow
def test_a_text_grid_trains_as_xalign_dpo_does_from_a_given_reference(tmp_path):
    texts = [json.loads(line) for line in (ROOT / "data/train.jsonl").open()][:300]
    tokenizer = scratch_tokenizer((r["prompt"] + r["chosen"] for r in texts), 400)
    model = scratch_model(ModelOptions(dim=32, depth=1, heads=2), tokenizer.vocab_size, 0)
    save_pretrained(model, tmp_path / "base", tokenizer)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom xalign.grids import TextRun, crossed\ndef lab():\n"
        "    base = TextRun(fraction=.02, noise=.1, prompts=3, samples=1, beta=.5)\n"
        "    small = TextRun(fraction=.02, prompts=3, samples=1)\n"
        "    return [*crossed(base, method=('sigmoid', 'kto'), seed=(0, 1)), replace(small, method='unlikelihood', alpha=.2),"
        " TextRun(method='best_of', n=3, prompts=3, samples=1)]\n")
    run_ablate(AblateConfig(options(tmp_path, reference=str(tmp_path / "base"))))
    result = json.loads((tmp_path / "grid/results.json").read_text())
    assert [row["loss"] for row in result["rows"]] == ["sigmoid", "kto", "unlikelihood", "best_of"]
    assert result["runs"] == 6
    sizes = {name: {json.loads(p.read_text())["batch_size"] for p in (tmp_path / "grid/runs").glob(f"{name}-*/config.json")}
             for name in ("sigmoid", "kto")}
    assert sizes == {"sigmoid": {16}, "kto": {32}}, "kto counts texts, so its steps would hold half as many pairs"
    [run] = (tmp_path / "grid/runs").glob("sigmoid-*-seed=1/evaluation.json")
    evaluation = json.loads(run.read_text())
    assert result["rows"][0]["figures"]["kl"]["values"][1] == evaluation["kl"]
    assert "| gold reward |" in (tmp_path / "grid/report.md").read_text()
    with pytest.raises(CheckpointError, match="made with reference"):
        run_ablate(AblateConfig(options(tmp_path)))
