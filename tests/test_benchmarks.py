"""`make bench` on models so small that its figures mean nothing: it runs, and what it says about figures is right."""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import ids, tiny_ar

for peer in ("transformers", "x_transformers", "matplotlib"):
    pytest.importorskip(peer)
pytestmark = pytest.mark.filterwarnings("ignore")
FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The benchmarks' modules, which import one another by their plain names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = {path.stem for path in FOLDER.glob("*.py")}
    import clock
    import decode
    import gpu
    import latency
    import throughput
    import train
    import train_models

    monkeypatch.setattr(clock, "NUMBERS", {"cpu": 2**16})
    monkeypatch.setattr(clock, "ceilings", lambda device="cpu": {"read, GB/s": 50.0, "mm fp32, GFLOP/s": 200.0})
    monkeypatch.setattr(train, "ceilings", lambda options: {"linear fp32, GFLOP/s": 400.0, "mm fp32, GFLOP/s": 200.0,
                                                            "mm bf16, GFLOP/s": 900.0})
    threads = torch.get_num_threads()
    yield argparse.Namespace(clock=clock, decode=decode, gpu=gpu, latency=latency, throughput=throughput, train=train,
                             train_models=train_models)
    torch.set_num_threads(threads)
    for name in names & sys.modules.keys():
        del sys.modules[name]


def test_the_sections_of_the_program(bench, tmp_path, monkeypatch, capsys):
    """A section's figures are in the table, in the file and in the picture; an earlier section stays and is told."""
    tiny = ["decode.py", "--depth", "1", "--vocabularies", "640", "--repeats", "1", "--lengths", "2", "4", "--threads", "1",
            "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*tiny, "--only", "greedy", "sampler"])
    bench.decode.main()
    out = capsys.readouterr().out
    assert "| 640 | 8 | xalign int4 |" in out and "x-transformers fp32, V = 640, B = 8, 1024 tokens" in out
    found = json.loads((tmp_path / "decode.json").read_text())["sections"]
    greedy = {(row["b"], row["engine"]): row for row in found["greedy"]["rows"]}
    assert len(greedy) == 14 and all(row["bound_ms"] > 0 and math.isfinite(row["R"]) for row in greedy.values())
    assert greedy[1, "xalign int8"]["bound_ms"] < 0.3 * greedy[1, "xalign fp32"]["bound_ms"]
    assert {who: a["asked"] for who, a in greedy[8, "xalign bf16"]["against"].items()} == {
        "transformers fp32": 3.0, "x-transformers fp32": 3.0, "transformers bf16": 1.5}
    assert {row["sampler"] for row in found["sampler"]["rows"]} == {"full", "pure top-p", "plain", "pure top-p, flat head"}
    sizes = found["sampler"]["heads"]["640"]["nucleus"]
    assert 10 <= sizes["sharp"]["median"] <= 300 < sizes["flat"]["median"]

    monkeypatch.setattr(sys, "argv", [*tiny, "--only", "beams"])
    bench.decode.main()
    assert "greedy is of an earlier run" in capsys.readouterr().out
    found = json.loads((tmp_path / "decode.json").read_text())["sections"]
    assert found.keys() == {"greedy", "sampler", "beams"}
    assert [row["what"] for row in found["beams"]["rows"]] == ["beams", "beams", "samples"]
    assert (tmp_path / "decode.png").stat().st_size > 10_000


def test_a_gpus_table_also_runs_on_a_cpu(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.gpu, "SHAPES", {"tiny": {"vocab": 640, "depth": 2, "dim": 64, "inner": 128, "heads": 4,
                                                       "kv_heads": 2, "tied": True}})
    monkeypatch.setattr(bench.gpu, "LENGTHS", (2, 4))
    section = bench.gpu.run(argparse.Namespace(device="cpu", batches=[1, 3], repeats=1), "tiny")
    bench.gpu.show(section)
    assert [row["b"] for row in section["rows"]] == [1, 3] and not any(row["failed"] for row in section["rows"])
    assert "2 layers in fp32, B = 8, 1024 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_many_prompts(bench, capsys):
    section = bench.throughput.run(argparse.Namespace(prompts=12, depth=1))
    bench.throughput.show(section)
    assert section["failed"] or len(section["rows"]) == 3
    assert all(row.get("equal", row["prompts"]) == row["prompts"] for row in section["rows"])
    assert "THESE ARE 12 PROMPTS" in capsys.readouterr().out


def test_other_tokens_end_the_run(bench):
    wrapper, prompt = tiny_ar(), ids(2, 5)
    written = wrapper.generate(prompt, 6, temperature=0.0)
    assert bench.latency.check_equal(wrapper.net, prompt, written, written, "a peer") == "12 tokens"
    other = written.clone()
    other[1, 4] = (other[1, 4] + 1) % 17
    with pytest.raises(SystemExit, match="a peer: tokens differ in row 1 at step 4"):
        bench.latency.check_equal(wrapper.net, prompt, written, other, "a peer")


def test_two_equal_logits_are_no_difference(bench):
    wrapper, prompt = tiny_ar(), ids(1, 5)
    with torch.no_grad():
        wrapper.net.to_logits.weight.zero_()
    zeros = torch.zeros(1, 3, dtype=torch.long)
    assert "row 0 forks at step 1" in bench.latency.check_equal(wrapper.net, prompt, zeros, torch.tensor([[0, 3, 1]]), "a peer")


def test_ratios_are_those_of_rounds(bench):
    """A machine that gets ten times slower changes the medians' ratio, not the ratio's median."""
    times = bench.clock.Times({"a": [2.0, 20.0, 21.0], "b": [1.0, 10.0, 1.0]})
    assert times.ratio("a", "b") == 2.0 and times.quartiles("a", "b") == [2.0, 21.0] and times.median("a") == 20.0


def test_watched_time_is_counted_once(bench, monkeypatch):
    """By a clock that ticks when it is looked at: a product within the head's is the head's alone."""
    wrapper, prompt = tiny_ar(), ids(1, 5)
    monkeypatch.setattr(bench.clock.time, "perf_counter", itertools.count().__next__)
    with bench.clock.watching() as spent:
        wrapper.generate(prompt, 3, temperature=0.0)
    monkeypatch.undo()
    steps, layers = 3, 2
    inside = {bench.clock.HEAD: steps, bench.clock.ATTENTION: 2 * layers * steps}
    assert {part: spent[part] for part in inside} == inside and spent[bench.clock.DRAW] == steps
    assert spent[bench.clock.LAYERS] == 4 * layers * (steps + 1)  # and the prompt's pass
    before = dict(spent)
    wrapper.generate(prompt, 3, temperature=0.0)
    assert spent == before  # nothing is watched any more


def test_a_quarter_of_the_prompts_makes_the_batches_of_all(bench):
    prompts = [torch.zeros(n, dtype=torch.long) for n in range(1, 41)]
    some = [len(p) for p in bench.throughput.spread(prompts, 4)]
    assert some == [36, 35, 34, 33, 20, 19, 18, 17, 4, 3, 2, 1]
    assert len(bench.throughput.spread(prompts, 64)) == 40


def test_the_least_that_a_step_reads(bench):
    """Every weight but the embedding's, and two times layers * heads * width numbers for each token that came before."""
    net = tiny_ar(num_tokens=17, dim=32).net
    weights = sum(p.nbytes for name, p in net.named_parameters() if name != "token_emb.weight")
    assert bench.clock.least_bytes(net, 3, 10.0) == weights + 3 * 10 * 2 * 2 * 4 * 8 * 4
    tied = tiny_ar(tie_embedding=True).net
    assert bench.clock.least_bytes(tied, 0, 0.0) == sum(p.nbytes for p in tied.parameters())


# ---- bench-train

TINY = ["train.py", "--depth", "1", "--vocab", "640", "--shapes", "24,8", "8,12", "--repeats", "1", "--threads", "1"]


def test_the_sections_of_training(bench, tmp_path, monkeypatch, capsys):
    """All engines take the same step, or the run ends; what is measured is in the table, in the file and in the picture."""
    pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", [*TINY, "--results", str(tmp_path), "--only", "long-prompts", "hh", "bf16", "economies"])
    bench.train.main()
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "train.json").read_text())["sections"]
    rows = {row["engine"]: row for row in found["long-prompts"]["rows"]}
    assert rows.keys() == {"plain", "x-transformers", "TRL", "TRL, head compacted", "xalign", "xalign, reference in the step"}
    assert all(row["loss"] == pytest.approx(rows["plain"]["loss"], abs=1e-4) for row in rows.values())
    assert rows["xalign"]["ratio"] == 1 and rows["plain"]["ratio"] == pytest.approx(rows["plain"]["s"] / rows["xalign"]["s"])
    flops = bench.train_models.least_flops(bench.train_models.Models(640, 1).policy.config, [(24, 8, 8)] * 8)
    assert rows["TRL"]["U"] == pytest.approx(3 * flops / (400e9 * rows["TRL"]["s"]))
    assert "2.0x as fast as torch.mm's" in out and "| 24, 8 | xalign | " in out
    half = {row["engine"]: row for row in found["bf16"]["rows"] if row["case"].startswith("8, 12")}
    assert half["xalign"]["asked"] == 1.8 and half["xalign bf16"]["ratio"] == 1
    assert half["xalign bf16"]["U"] == pytest.approx(half["xalign bf16"]["rate"] / 900e9)
    assert half["xalign bf16"]["loss"] != half["xalign"]["loss"] and len(found["economies"]["rows"]) == 12
    assert "\n## hh\n" in out and len(found["hh"]["rows"]) == (5 if bench.train_models.HH.exists() else 0)
    assert (tmp_path / "train.png").stat().st_size > 10_000


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(bench, capsys):
    pytest.importorskip("trl")
    options = argparse.Namespace(vocabularies=[8_000, 16_000], depth=1, shapes=[(16, 8)], threads=1)
    section = bench.train.memory(bench.train_models.Models(640, 1), options)
    bench.train.show_memory(section)
    weights = 4 * (2 * 16_000 * 512 + 4 * 512**2 + 3 * 512 * 1376)
    assert all(4 * weights < row["bytes"] < 40 * weights for row in section["rows"] if row["v"] == 16_000)
    assert "| 16k | TRL | " in capsys.readouterr().out


def test_another_loss_or_gradient_ends_the_run(bench):
    bench.train.check("a peer", (0.6931, 33.0), (0.69315, 33.01), 1e-4, 1e-3)
    for got in ((0.6933, 33.0), (0.6931, 33.1), (math.nan, 33.0), (0.6931, math.nan)):
        with pytest.raises(SystemExit, match="a peer: loss"):
            bench.train.check("a peer", got, (0.6931, 33.0), 1e-4, 1e-3)


def test_the_least_that_a_step_multiplies(bench):
    """Position by position: projections, feed-forward, scores and sums of all that is seen, and the head."""
    config = argparse.Namespace(hidden_size=6, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                                intermediate_size=5, vocab_size=11)
    p, c, r = 4, 3, 2
    expected = 0
    for layer in range(3):
        for begin, count in ((0, p), (p, c), (p, r)):
            for i in range(count):
                expected += 2 * 2 * 6 * 3  # keys and values of one head, three wide
                if layer < 2 or begin:
                    expected += 2 * (2 * 6 * 6 + 3 * 6 * 5) + 2 * 2 * 6 * (begin + i + 1)
    expected += 2 * 6 * 11 * (c + r)
    assert bench.train_models.least_flops(config, [(p, c, r), (p, c, r)]) == 2 * expected


def test_real_lengths_are_those_of_an_epoch(bench):
    if not bench.train_models.HH.exists():
        pytest.skip("no ../shared")
    rows = bench.train_models.real_lengths(5)
    tokens = [sum(sum(one) for one in row) for row in rows]
    assert [len(row) for row in rows] == [8] * 5 and tokens == sorted(tokens) and 3 * tokens[0] < tokens[-1]
    assert all(p + max(c, r) <= 512 for row in rows for p, c, r in row)
