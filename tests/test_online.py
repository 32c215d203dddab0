"""`xalign online`: pairing rules, files between stages, mistakes, post-processors; killed anywhere it ends the same."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import LLAMA, tiny
from hypothesis import given
from hypothesis import strategies as st

from xalign import RewardModel, load_pretrained, rounds, save_pretrained
from xalign.cli import main
from xalign.data.records import Message
from xalign.errors import DataError
from xalign.evaluation.rounds import hacked
from xalign.flags import parse
from xalign.online_config import OnlineConfig
from xalign.pairing import RULES, best_of, best_of_kl, pair, usable
from xalign.watch import TIMED

ROOT = Path(__file__).resolve().parent.parent


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- pairing --------------------------------------------------------------------------------------------------------


def test_the_rules_on_rewards_written_by_hand():
    texts, rewards = ["a", "bb", "ccc", "dddd"], [1.0, 3.0, -2.0, 2.5]
    assert pair(texts, rewards, "max_min", Random(0)) == (1, 2, 5.0)
    assert pair(texts, rewards, "max_max", Random(0)) == (1, 3, 0.5)
    assert pair(texts, rewards, "random", Random(0)) == (1, 0, 2.0)
    assert pair(texts[:2], [3.0, 1.0], "random", Random(0)) == (0, 1, 2.0)
    drawn = Counter(pair(texts, rewards, "max_random", Random(seed))[1] for seed in range(300))
    assert set(drawn) == {0, 2, 3} and min(drawn.values()) > 70  # any other, not RLHFlow's first
    # by reward - characters: 0, 1, -5, -1.5; and with 2 a character: -1, -1, -8, -5.5, of two best the first
    assert pair(texts, rewards, "length_penalised", Random(0), 1.0) == (1, 2, 6.0)
    assert pair(texts, rewards, "length_penalised", Random(0), 2.0) == (0, 2, 7.0)
    # the bare rewards disagree with the penalised order, and it stays (RLHFlow's code swaps the sides back)
    assert pair(["long " * 9, "x"], [1.0, 0.5], "length_penalised", Random(0), 0.1) == (1, 0, pytest.approx(3.9))
    assert pair(["a", "b"], [1.0, 1.0], "max_min", Random(0)) == "tie"
    assert pair(["a"], [1.0], "max_min", Random(0)) == "fewer than two usable completions"


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), st.sampled_from(RULES), st.integers(0, 99))
def test_chosen_is_never_worse(rewards, rule, seed):
    texts = [f"text {i}" for i in range(len(rewards))]
    found = pair(texts, rewards, rule, Random(seed))
    if found == "tie":
        assert rule in ("max_random", "max_max", "random") or len(set(rewards)) == 1
        return
    chosen, rejected, margin = found
    assert margin == rewards[chosen] - rewards[rejected] > 0
    if rule != "random":
        assert rewards[chosen] == max(rewards)
    if rule == "max_min":
        assert rewards[rejected] == min(rewards)


def test_what_can_t_be_learnt_from():
    texts, rewards = ["a", " ", "b", "a", "c", "d", "e"], [1.0, 2.0, None, 1.0, math.nan, 3.0, 4.0]
    assert usable(texts, rewards, [True] * 5 + [False, True]) == [0, 6]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    draw = Random(n)
    rewards, values = [draw.random() for _ in range(5)], [draw.random() for _ in range(5)]
    subsets = list(itertools.combinations(range(5), n))
    expected = sum(values[max(some, key=rewards.__getitem__)] for some in subsets) / len(subsets)
    assert best_of(rewards, values, n) == pytest.approx(expected, abs=1e-12)
    assert best_of(rewards, rewards, 5) == max(rewards)
    assert best_of_kl(1) == 0 and best_of_kl(16) == pytest.approx(1.8351, abs=1e-4)


def test_a_reward_in_the_prompt():
    config = parse(OnlineConfig, ["--csft-template", "[{reward}] {prompt}"], "xalign online")
    assert rounds.conditioned(config, "Say {reward} {prompt}", 1.234) == "[1.23] Say {reward} {prompt}"
    talk = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert rounds.conditioned(config, talk, -0.5) == (*talk[:2], Message("user", "[-0.50] c"))


def test_over_optimisation_is_told():
    good = {"step": 1, "reward_gain": 1.0, "gold_gain": 0.5, "reward_gain_interval": [0.5, 1.5],
            "gold_gain_interval": [0.2, 0.8]}
    bad = good | {"step": 2, "gold_gain": -0.5, "gold_gain_interval": [-0.8, -0.2]}
    (told,) = hacked([{"step": 0}, good, bad, bad | {"gold_gain_interval": [-0.8, 0.1]}])
    assert told.startswith("round 2: the reward rose by 1.00 and gold fell by 0.50") and "round 1's is better" in told


def test_the_workflow_s_defaults():
    """The RLHF Workflow's: K 8, temperature 1, beta .1 (the loss's own), rate 5e-7, cosine, 2 epochs of 128 pairs a step."""
    config = parse(OnlineConfig, [], "xalign online")
    t = config.training
    assert (config.online.rounds, config.draw.n, config.draw.temperature, config.draw.max_new_tokens) == (3, 8, 1.0, 2048)
    assert (t.learning_rate, t.batch_size * t.gradient_accumulation_steps, t.num_train_epochs) == (5e-7, 128, 2.0)
    assert (config.loss.beta, config.improve.reference, config.improve.warm_start) == (None, "fixed", True)
    toy = parse(OnlineConfig, ["--config", str(ROOT / "data/online.json")], "xalign online")
    assert toy.online.rounds == 3 and toy.draw.n == 8


# -- a small run ----------------------------------------------------------------------------------------------------

SETTINGS = {"rounds": 2, "n": 4, "max_new_tokens": 6, "unfinished": "keep", "max_length": 80, "eval_prompts": 6,
            "eval_samples": 2, "beta": 0.1, "learning_rate": 3e-3, "batch_size": 4, "gradient_accumulation_steps": 1,
            "num_train_epochs": 3.0,
            "warmup_steps": 1, "logging_steps": 2, "eval_steps": 0, "save_steps": 2, "seed": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory, chat_tokenizer) -> Path:
    """A folder with a random policy, a random reward model, prompts of the toy world, and settings."""
    folder = tmp_path_factory.mktemp("online")
    options = {"num_tokens": chat_tokenizer.vocab_size, "max_seq_len": 96, "dim": 16, "heads": 2, **LLAMA}
    save_pretrained(tiny(1, **options), folder / "policy", chat_tokenizer)
    reward = RewardModel(tiny(2, **options), chat_tokenizer)
    with torch.no_grad():
        reward.head.weight.normal_(std=1)
    reward.save_pretrained(folder / "reward")
    prompts = [json.loads(line)["prompt"] for line in (ROOT / "data/test.jsonl").read_text().splitlines()[:40]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts[:24]))
    (folder / "held.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts[24:32]))
    settings = SETTINGS | {"model": str(folder / "policy"), "reward_model": str(folder / "reward"),
                           "dataset": [str(folder / "prompts.jsonl")], "eval_dataset": str(folder / "held.jsonl")}
    (folder / "tiny.json").write_text(json.dumps(settings))
    return folder


def online(toy: Path, run: Path, *flags) -> None:
    main(["online", "--config", str(toy / "tiny.json"), "--output-dir", str(run), *map(str, flags)])


class Vowels(BaseHTTPRequestHandler):
    """A reward server: the share of the letter e."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"rewards": [vowels(r) for r in asked["responses"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def vowels(text: str) -> float:
    return text.count("e") / max(1, len(text))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Vowels)
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_address[1]}"
    serving.shutdown()
    serving.server_close()


@pytest.fixture(scope="module")
def finished(toy, server) -> Path:
    """A run of two rounds with a remote reward."""
    online(toy, toy / "remote", *remote(server))
    return toy / "remote"


def remote(server: str) -> tuple:
    return "--reward-model", server, "--prompts-per-round", 8, "--n", 8, "--learning-rate", 0.01, "--eval-samples", 16


def test_each_stage_leaves_its_file_and_the_reward_rises(toy, finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["program"] == "online" and config["model_sha256"] and "rounds" not in config
    seen: set[str] = set()
    for number in (1, 2):
        folder = finished / f"round-{number}"
        completions, scores = read(folder / "completions.jsonl"), read(folder / "scores.jsonl")
        assert len(completions) == 8 and all(len(row["responses"]) == 8 == len(row["finish_reasons"]) for row in completions)
        assert not seen & {row["prompt"] for row in completions}, "each round has prompts of its own"
        seen |= {row["prompt"] for row in completions}
        for row, scored in zip(completions, scores, strict=True):
            assert scored == row | {"rewards": [pytest.approx(vowels(r)) for r in row["responses"]]}
        by_prompt = {row["prompt"]: row for row in scores}
        for made in read(folder / "pairs.jsonl"):
            rewards = dict(zip(by_prompt[made["prompt"]]["responses"], by_prompt[made["prompt"]]["rewards"], strict=True))
            assert rewards[made["chosen"]] == made["score_chosen"] == max(rewards.values())
            assert made["margin"] == made["score_chosen"] - made["score_rejected"] > 0
        trained = json.loads((folder / "dpo/config.json").read_text())
        assert trained["ref_model"] == (None if number == 1 else str(toy / "policy")), "the reference is fixed"
        assert trained["model"] == str(toy / "policy" if number == 1 else finished / "round-1/policy"), "and the start is warm"
        assert (folder / "dpo/report.md").exists()
        assert not [*folder.glob("dpo/checkpoint-*"), *folder.glob("growing-*"), *folder.glob("scoring")]
        load_pretrained(folder / "policy")
    lines = read(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[0]["kl"] == 0 and lines[2]["kl"] > 0.05
    assert lines[0]["reward"] < lines[1]["reward"] < lines[2]["reward"]
    assert all(-8 <= line["gold"] <= 5 and 0 <= line["well_formed"] <= 1 for line in lines)
    report = (finished / "report.md").read_text()
    assert "| reward |" in report and "## Best of N" in report and "![" in report
    last = (finished / "round-2/policy/model.safetensors").read_bytes()
    assert (finished / "policy/model.safetensors").read_bytes() == last != (toy / "policy/model.safetensors").read_bytes()


def test_a_finished_run_says_so_goes_on_with_more_rounds_and_refuses_other_settings(toy, finished, server, capsys):
    flags = remote(server)
    online(toy, finished, *flags)
    told = capsys.readouterr()
    assert "is finished" in told.err and "| reward |" in told.out
    before = (finished / "round-2/policy/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        online(toy, finished, *flags, "--beta", 0.2)
    assert "was made with beta = 0.1, now it is 0.2" in capsys.readouterr().err.splitlines()[-1]
    online(toy, finished, *flags, "--rounds", 3)
    assert len(read(finished / "metrics.jsonl")) == 4 and (finished / "round-2/policy/model.safetensors").read_bytes() == before
    last = (finished / "round-3/policy/model.safetensors").read_bytes()
    assert (finished / "policy/model.safetensors").read_bytes() == last != before


def test_a_file_that_was_replaced_is_what_the_next_stage_reads(toy, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise DataError("stopped for a look")

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("xalign.online.make_training_data", stop)
        online(toy, tmp_path / "run", "--rounds", 1)
    scores = tmp_path / "run/round-1/scores.jsonl"
    rows = read(scores)
    scores.write_text("".join(json.dumps(row | {"rewards": row["rewards"][:-1]}) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        online(toy, tmp_path / "run", "--rounds", 1)
    assert "scores.jsonl:1: 'rewards' must be a list of 4 values" in capsys.readouterr().err.splitlines()[-1]
    scores.write_text("".join(json.dumps(row | {"rewards": [-r for r in row["rewards"]]}) + "\n" for row in rows))
    online(toy, tmp_path / "run", "--rounds", 1)
    assert {p["prompt"]: p["score_chosen"] for p in read(tmp_path / "run/round-1/pairs.jsonl")} == \
        {row["prompt"]: -min(row["rewards"]) for row in rows}


@pytest.mark.parametrize("post_processor", ["rs", "csft"])
def test_imitation_of_the_best_and_of_all_by_their_reward(toy, tmp_path, post_processor):
    run = tmp_path / "run"
    without_a_loss(toy, run, post_processor)
    rows = read(run / "round-1/scores.jsonl")
    if post_processor == "rs":
        best = read(run / "round-1/best.jsonl")
        assert [(b["prompt"], b["reward"]) for b in best] == [(row["prompt"], max(row["rewards"])) for row in rows]
    else:
        made = read(run / "round-1/conditioned.jsonl")
        assert made[0]["prompt"] == f"{rows[0]['prompt']} <rm_score>: {rows[0]['rewards'][0]:.2f}"
        assert len(made) == sum(len({r for r in row["responses"] if r.strip()}) for row in rows)
    assert (run / "round-1/sft/metrics.jsonl").exists() and read(run / "metrics.jsonl")[1]["kl"] != 0
    assert (run / "policy/model.safetensors").read_bytes() != (toy / "policy/model.safetensors").read_bytes()


def without_a_loss(toy: Path, run: Path, post_processor: str) -> None:
    online(toy, run, "--post-processor", post_processor, "--rounds", 1, "--prompts-per-round", 4)


def test_best_of_n_trains_nothing(toy, tmp_path, capsys):
    without_a_loss(toy, tmp_path / "run", "best_of_n")
    report = (tmp_path / "run/report.md").read_text()
    assert "| 4 | 0.64 |" in report and "best_of_n.png" in report and not (tmp_path / "run/policy").exists()
    rows = read(tmp_path / "run/round-1/scores.jsonl")
    mean = sum(max(row["rewards"]) for row in rows) / len(rows)
    assert f" {mean:.3f} [" in report.split("| 4 | 0.64 ")[1].splitlines()[0]


def test_conversations_and_another_engine_s_text(toy, tmp_path):
    """--chat and --system: prompts are messages in each file, and in what is trained; drawn by transformers."""
    online(toy, tmp_path / "run", "--chat", "--system", "Tell.", "--rounds", 1, "--prompts-per-round", 4, "--backend",
           "transformers", "--reference", "moving")
    (made, *_) = read(tmp_path / "run/round-1/pairs.jsonl")
    assert [m["role"] for m in made["prompt"]] == ["system", "user"] and isinstance(made["chosen"], str)
    assert "gold" not in read(tmp_path / "run/metrics.jsonl")[0]


@pytest.mark.parametrize(("flags", "message"), [
    (["--model", "nowhere"], "nowhere"),
    (["--max-new-tokens", 4000], "--max-new-tokens is 4000, which leaves no room for any of the 24 prompts in the 96"),
    (["--rounds", 30], "24 different prompts for 30 rounds, allowed are as many as the rounds need"),
    (["--prompts-per-round", 13], "24 different prompts for 2 rounds of 13"),
    (["--n", 1], "-n is 1, allowed is at least 2"),
    (["--temperature", 0], "--temperature is 0 and -n 4"),
    (["--temperature", -1], "temperature is -1"),
    (["--ref-model", "x", "--reference", "moving"], "--ref-model is x and --reference moving, allowed is one of them"),
    (["--reference", "moving", "--no-warm-start"], "reference is moving without warm_start"),
    (["--len-penalty", 0.1], "pairing is max_min and len_penalty is 0.1"),
    (["--post-processor", "rs", "--loss-type", "ipo"], "--loss-type goes with --post-processor dpo, it is rs"),
    (["--csft-template", "{reward}"], "csft_template is '{reward}'"),
    (["--system", "x"], "--system goes with --chat"),
    (["--backend", "openai"], "invalid choice 'openai'"),
    (["--loss-type", "sigmod"], "sigmod"),
    (["--loss-type", "simpo", "--beta", -1], "beta"),
    (["--reward-model", "http://127.0.0.1:1 x"], "is no address of a server"),
    (["--reward-model", "nowhere"], "nowhere"),
    (["--resume"], "--resume: there is no run in"),
])
def test_a_mistake_is_one_line_before_anything_is_drawn(toy, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        online(toy, tmp_path / "run", *flags)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists(), "the next try may have other settings"


def test_another_model_under_the_same_name_is_refused(toy, tmp_path, chat_tokenizer, capsys, monkeypatch):
    def stop(*_):
        raise DataError("far enough")

    monkeypatch.setattr("xalign.online.draw_completions", stop)
    save_pretrained(load_pretrained(toy / "policy")[0], tmp_path / "policy", chat_tokenizer)
    for seed in (None, 9):
        if seed:
            options = {"num_tokens": chat_tokenizer.vocab_size, "max_seq_len": 96, "dim": 16, "heads": 2, **LLAMA}
            save_pretrained(tiny(seed, **options), tmp_path / "policy", chat_tokenizer)
        with pytest.raises(SystemExit):
            online(toy, tmp_path / "run", "--model", tmp_path / "policy")
        told = capsys.readouterr().err.splitlines()[-1]
        assert "was made with model_sha256 = " in told if seed else "far enough" in told


# -- kill -9 --------------------------------------------------------------------------------------------------------

# A process that has imported everything and forks for each run; one with a `moment` kills itself without warning at the n-th
# call of a function, before or after the call. Chunks are small, so that stages have several.
SERVER = """
import importlib, json, os, signal, sys
import sentencepiece, torch
import xalign.online
from xalign.cli import main
torch.set_num_threads(1)
sys.modules["matplotlib"] = None  # no pictures and short bootstraps: they would take most of the time
xalign.evaluation.intervals.RESAMPLES = 50
xalign.rounds.CHUNK = xalign.score.CHUNK = 5
def arm(module, name, count, when):
    owner = importlib.import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name.split(".")[-1]), []
    def deadly(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs) if when == "after" or len(calls) != count else None
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name.split(".")[-1], deadly)
print("ready", flush=True)
for line in sys.stdin:
    arguments, log, moment = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if moment:
            arm(*moment)
        try:
            main(arguments)
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
MOMENTS = {
    "while round 0 is drawn": ("xalign.journal", "Journal.add", 2, "after"),
    "between samples and evaluation": ("xalign.rounds", "measure", 1, "before"),
    "in a chunk of drawing": ("xalign.journal", "Journal.add", 13, "before"),
    "between drawing and scoring": ("xalign.online", "score_completions", 1, "before"),
    "in scoring, before a chunk is written": ("xalign.score", "RunFolder.log", 2, "after"),
    "between scoring and pairing": ("xalign.online", "make_training_data", 1, "before"),
    "between held-out pairs and pairs": ("xalign.rounds", "write_lines", 3, "after"),
    "between pairing and training": ("xalign.online", "improve_policy", 1, "before"),
    "in training, after a checkpoint": ("xalign.training", "schedule", 3, "before"),
    "while a checkpoint is written": ("xalign.weights", "save_file", 3, "after"),
    "between training and its policy": ("xalign.rounds", "run_dpo", 1, "after"),
    "before checkpoints are removed": ("xalign.rounds", "tidy", 1, "before"),
    "between training and measuring": ("xalign.online", "evaluate", 2, "before"),
    "while the KL is measured": ("xalign.rounds", "completion_logps", 1, "after"),
    "in round 2's drawing": ("xalign.rounds", "row_seed", 24, "before"),
    "in round 2's training": ("xalign.training", "schedule", 9, "after"),
    "between the rounds and the policy": ("xalign.online", "atomic_folder", 1, "before"),
    "before the report": ("xalign.online", "write_rounds", 1, "before"),
}


class Forks:
    """Runs of `xalign online` by `SERVER`, one at a time."""

    def __init__(self, toy: Path):
        self.toy = toy
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
                                       text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.server.stdout.readline() == "ready\n"

    def run(self, folder: Path, moment=None) -> int:
        arguments = ["online", "--config", str(self.toy / "tiny.json"), "--output-dir", str(folder), "--prompts-per-round", "8"]
        self.server.stdin.write(json.dumps([arguments, str(self.toy / "stderr"), moment]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def told(self) -> str:
        return (self.toy / "stderr").read_text()[-1000:]


@pytest.fixture(scope="module")
def forks(toy) -> Iterator[Forks]:
    forks = Forks(toy)
    yield forks
    forks.server.kill()
    forks.server.wait()


@pytest.fixture(scope="module")
def undisturbed(toy, forks) -> Path:
    """The run folder's name is the same for all, since dpo/config.json names files in it."""
    assert forks.run(toy / "run") == 0, forks.told()
    return (toy / "run").rename(toy / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_undisturbed(toy, forks, undisturbed, moment):
    run = toy / "run"
    assert forks.run(run, MOMENTS[moment]) == -signal.SIGKILL, f"{moment} never came: {forks.told()}"
    assert not (run / "report.md").exists()
    assert forks.run(run) == 0, forks.told()
    ours, theirs = ({str(p.relative_to(r)): p for p in r.rglob("*") if p.is_file()} for r in (run, undisturbed))
    assert set(ours) == set(theirs), "something half-written stayed, or something is missing"
    for name in ours:
        if name.endswith("metrics.jsonl"):
            assert untimed(read(ours[name])) == untimed(read(theirs[name])), name
        elif not name.endswith((".png", "dpo/report.md", "dpo/evaluation.json")):  # which tell how long it took
            assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    run.rename(toy / f"run-{len(list(toy.glob('run-*')))}")


def untimed(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]
