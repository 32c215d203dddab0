"""`xalign collect` and `annotate`: the plan's draws, completions that survive kills, judges that are parsed strictly."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.server import Server, prompt_of
from tests.test_backends import make_folder
from xalign import judge
from xalign.annotate import annotated, asked_of, judge_rows, judgements, read_completions, score_rows, scores
from xalign.backends.base import Completion
from xalign.cli import main
from xalign.collect import as_json, from_json
from xalign.data import toyworld
from xalign.data.records import Message
from xalign.errors import CheckpointError, DataError
from xalign.journal import Journal, claimed, write_lines
from xalign.plan import Instruction, as_prompt, draw, load_plan, row_seed, system_text
from xalign.principles import CALIBRATION, PRINCIPLES

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments) -> int:
    try:
        main([str(a) for a in arguments])
        return 0
    except SystemExit as stop:
        return stop.code


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_plan(folder: Path, url: str, rows: int = 30, models: int = 3, **more) -> Path:
    sources = ("flan", "sharegpt", "truthful_qa")
    tasks = [{"instruction": f"task {i}", "source": sources[i % 3], "correct_answers": [f"right {i}"]} for i in range(rows)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    pool = [
        {
            "name": f"model-{i}",
            "backend": "openai",
            "model": f"m{i}",
            "base_url": url,
            "dialect": "openai",
            "probe": False,
            "concurrency": 32,
            "tries": 6,
            "backoff": 0.01,
            "max_backoff": 0.05,
            "timeout": 0.4,
            "weight": i + 1,
        }
        for i in range(models)
    ]
    plan = {"seed": 1, "completions": 2, "instructions": ["tasks.jsonl"], "models": pool} | more
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder / "plan.json"


# -- the plan -------------------------------------------------------------------------------------------------------


def test_draws_have_the_plan_s_frequencies_and_depend_on_seed_and_row_alone(tmp_path):
    plan = load_plan(str(write_plan(tmp_path, "http://127.0.0.1:1/v1", models=5)))
    sources = ["flan"] * 4000 + ["truthful_qa"] * 4000 + ["never heard of"] * 1000
    drawn = draw(plan, sources)
    assert all(len(set(row)) == 2 for row in drawn.models.tolist())
    first = np.bincount(drawn.models[:, 0], minlength=5) / len(sources)
    assert np.abs(first - np.arange(1, 6) / 15).max() < 0.02  # by weight
    named = [Counter(drawn.names[p] for p in part.ravel()) for part in np.split(drawn.principles, [4000, 8000])]
    assert abs(named[0]["helpfulness"] / 8000 - 0.8) < 0.02 and abs(named[0][CALIBRATION] / 8000 - 0.2) < 0.02
    assert abs(named[1]["truthfulness"] / 8000 - 0.5) < 0.03 and abs(named[1]["honesty"] / 8000 - 0.45) < 0.03
    assert abs(named[1][CALIBRATION] / 8000 - 0.05) < 0.01 and set(named[2]) == {"helpfulness"}
    assert len({system_text(plan, drawn, row, 0) for row in range(4000)}) == len(PRINCIPLES["helpfulness"]) + 1
    short = draw(plan, sources[:10])
    for name in ("models", "principles", "wordings"):
        assert (getattr(short, name) == getattr(drawn, name)[:10]).all()
    assert len({row_seed(plan, r, s) for r in range(500) for s in range(2)}) == 1000


def test_a_pool_smaller_than_the_completions_is_gone_through_again(tmp_path):
    plan = load_plan(str(write_plan(tmp_path, "http://127.0.0.1:1/v1", models=2, completions=5)))
    for row in draw(plan, ["flan"] * 50).models.tolist():
        assert sorted(Counter(row).values()) == [2, 3] and set(row[:2]) == {0, 1} == set(row[2:4])


def test_principles_go_into_the_system_text(tmp_path):
    path = write_plan(tmp_path, "http://127.0.0.1:1/v1", models=1)
    plan = load_plan(str(path))
    task, model = Instruction("x", "flan"), plan.models[0]
    assert as_prompt(task, model, "P") == (Message("system", "P"), Message("user", "x"))
    assert as_prompt(task, model, "") == (Message("user", "x"),)
    talk = Instruction((Message("system", "S."), Message("user", "x")), "flan")
    assert as_prompt(talk, model, "P")[0] == Message("system", "S. P")
    assert (
        plan.models[0].params.max_new_tokens == 1024 and plan.models[0].params.temperature == plan.models[0].params.top_p == 1
    )
    values = json.loads(path.read_text())
    values["models"][0] |= {"format": "vicuna", "sampling": {"temperature": 0.5, "stop": ["!"]}}
    path.write_text(json.dumps(values))
    model = load_plan(str(path)).models[0]
    assert model.params.stop == ("!", "</s>", "USER:") and model.params.temperature == 0.5
    assert as_prompt(task, model, "P")[0].content.endswith("user's questions. P")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeed": 1}, "no setting 'seeed', did you mean 'seed'"),
        ({"completions": 0}, "completions is 0, allowed is a whole number from 1 to 1000"),
        ({"completions": 10**9}, "completions is 1000000000, allowed is"),
        ({"sampling": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ({"principles": {"flan": {"honesty": True}}}, "weights >= 0"),
        ({"models": []}, "models is [], allowed is a list of objects, each with 'model'"),
        ({"models": [{"backend": "native"}]}, "models is"),
        ({"models": ["openai:a", "openai:a"]}, "two models are called 'a'"),
        ({"models": [{"model": "a", "weight": 0}]}, "weight is 0"),
        (
            {"models": [{"model": "a", "sampling": {"temprature": 1}}]},
            "no sampling option 'temprature', did you mean 'temperature'",
        ),
        ({"sampling": {"n": 2}}, "sampling has n or seed"),
        ({"sampling": {"temperature": -1}}, "temperature is -1"),
        ({"models": [{"model": "a", "api_key": "sk-1"}]}, "allowed is api_key_env"),
        ({"instructions": "nowhere.jsonl"}, "No such file"),
        ({"principles": {"flan": {"kindness": 1}}}, "no principle 'kindness'"),
        ({"principles": {"flan": {"honesty": -1}}}, "weights >= 0"),
        ({"models": [{"model": "a", "format": "text"}]}, "allowed is principles: none"),
        ({"instructions": [{"file": "t", "limit": 0}]}, "limit is"),
        ({"sampling": {"stop": "END"}}, "sampling: stop is 'END', allowed is a list of texts"),
        ({"wordings": 3}, "wordings is 3"),
        ({"sampling": {"temperature": "hot"}}, "sampling: temperature is 'hot', allowed is a number"),
    ({"sampling": {"max_new_tokens": 1.5}}, "max_new_tokens is 1.5, allowed is a whole number"),
        ({"honesty_to_calibration": 2}, "honesty_to_calibration is 2"),
        ({"wordings": {"honesty": []}}, "the wordings of 'honesty'"),
        ({"models": [{"model": "a", "backend": "nativ"}]}, "no backend 'nativ', did you mean 'native'"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_a_wrong_plan_is_one_line(tmp_path, capsys, change, message):
    path = write_plan(tmp_path, "http://127.0.0.1:1/v1")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert run("collect", "--plan", path, "--output-dir", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "out" / "parts.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "seed: [", "not usable"),
        ("p.json", "{", "not usable"),
        ("p.json", "[]", "holds list"),
        ("p.yaml", "", "holds NoneType"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert run("collect", "--plan", tmp_path / name) == 2 and message in capsys.readouterr().err
    assert run("collect", "--plan", tmp_path / "nothing.yaml") == 2 and "can't be read" in capsys.readouterr().err
    assert run("collect") == 2 and "--plan is needed" in capsys.readouterr().err


def test_yaml_and_json_are_the_same_plan(tmp_path):
    yaml = pytest.importorskip("yaml")
    path = write_plan(tmp_path, "http://127.0.0.1:1/v1")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(json.loads(path.read_text())))
    assert load_plan(str(path)).digest() == load_plan(str(tmp_path / "plan.yaml")).digest()


def test_a_record_for_imitation_asks_what_stands_before_its_answer(tmp_path):
    plan = write_plan(tmp_path, "http://127.0.0.1:1/v1")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, turns * 2, turns[1:])))
    found = load_plan(str(plan)).instructions()
    assert next(found).prompt == "q" and [m.content for m in next(found).prompt] == ["q", "a", "q"]
    with pytest.raises(DataError, match=r"tasks.jsonl:3: the messages hold no instruction"):
        next(found)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"backend": "native", "model": "x", "batchsize": 1}, "no option 'batchsize', did you mean 'batch_size'"),
    ({"backend": "openai", "model": "x", "base_url": "http://127.0.0.1:1", "dialect": "openai", "sampling": {"top_k": 5}},
     "x: top_k is 5, which this backend doesn't honour"),
    ({"backend": "vllm", "model": "x", "sampling": {"length_penalty": 2}}, "x: length_penalty is 2, which this"),
])
def test_all_models_are_checked_before_the_first_is_asked(tmp_path, capsys, wrong, message):
    with Server() as server:
        plan = write_plan(tmp_path, server.url, models=1)
        values = json.loads(plan.read_text())
        plan.write_text(json.dumps(values | {"models": [*values["models"], wrong]}))
        assert run("collect", "--plan", plan, "--output-dir", tmp_path / "out") == 2 and not server.bodies
        assert message in capsys.readouterr().err


# -- the journal ----------------------------------------------------------------------------------------------------


def test_a_journal_survives_a_cut_at_any_byte(tmp_path):
    path = tmp_path / "parts.jsonl"
    journal = Journal(path, 2, 2)
    journal.add(0, 1, False, {"response": "é😀" * 9000})
    journal.add(1, 0, True, {"error": "no"})
    journal.add(1, 0, False, {"response": "at last"})
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in sorted({0, 1, 5, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1, ends[1] + 9, len(whole) - 1, len(whole)}):
        path.write_bytes(whole[:cut])
        again = Journal(path, 2, 2)
        assert path.read_bytes() == whole[: max([0, *(e for e in ends if e <= cut)])]
        assert (again.read(0, 1) or {}).get("response") == ("é😀" * 9000 if cut >= ends[0] else None)
        assert again.missing[1, 0] == (cut < len(whole)) and again.missing[0, 0]
        again.add(0, 0, False, {"response": "more"})
        assert again.read(0, 0)["response"] == "more"
        again.close()


@pytest.mark.parametrize("content", [b"hello\n{}\n", b'{"row": 9, "slot": 0, "failed": false}\n', b"x" * 10 + b"\n" + b"y"])
def test_a_journal_of_something_else_is_not_touched(tmp_path, content):
    path = tmp_path / "parts.jsonl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"parts.jsonl:1: a line that is none of ours"):
        Journal(path, 2, 2)
    assert path.read_bytes() == content


def test_a_folder_is_for_one_plan_and_one_process(tmp_path):
    with (claimed(tmp_path / "f", {"a": 1}, False, ("x",)), pytest.raises(CheckpointError, match=r"in use by another process"),
          claimed(tmp_path / "f", {"a": 1}, False, ())):
        pass
    with claimed(tmp_path / "f", {"a": 1}, False, ("x",)):
        pass
    with pytest.raises(CheckpointError, match="was made with a = 1, now it is 2"), claimed(tmp_path / "f", {"a": 2}, False, ()):
        pass
    (tmp_path / "f" / "x").write_text("old")
    with claimed(tmp_path / "f", {"a": 2}, True, ("x",)):
        assert not (tmp_path / "f" / "x").exists()
    with pytest.raises(DataError), claimed(tmp_path / "n", {"a": 1}, False, ("x",)):
        (tmp_path / "n" / "x").touch()
        raise DataError("no")
    with claimed(tmp_path / "n", {"a": 2}, False, ("x",)):  # of a start that came to nothing nothing is left
        pass
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "x").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds x but no settings\.json"), claimed(tmp_path / "g", {}, False, ("x",)):
        pass
    assert (tmp_path / "g" / "x").read_text() == "precious"


def test_records_are_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield {"a": 1}
        raise DataError("no")

    (tmp_path / "r.jsonl").write_text("before")
    with pytest.raises(DataError):
        write_lines(tmp_path / "r.jsonl", broken())
    assert os.listdir(tmp_path) == ["r.jsonl"] and (tmp_path / "r.jsonl").read_text() == "before"


# -- collecting -----------------------------------------------------------------------------------------------------


def test_records_in_ultrafeedback_s_shape(tmp_path, capsys):
    with Server(reply=lambda body: f" {prompt_of(body)}, boss</s>") as server:
        plan = write_plan(tmp_path, server.url)
        out = tmp_path / "out"
        assert run("collect", "--plan", plan, "--output-dir", out) == 0
        rows = lines(out / "completions.jsonl")
        assert [r["instruction"] for r in rows] == [f"task {i}" for i in range(30)]
        for row in rows:
            assert list(row) == [
                "source",
                "instruction",
                "models",
                "correct_answers",
                "incorrect_answers",
                "completions",
                "text",
            ]
            assert row["models"] == [c["model"] for c in row["completions"]] and len(set(row["models"])) == 2
            for c in row["completions"]:
                assert (
                    c["response"] == f"{row['instruction']}, boss"
                    and c["principle"] in PRINCIPLES
                    and c["finish_reason"] == "stop"
                )
                assert c["custom_system_prompt"] in PRINCIPLES[c["principle"]]
        sent = Counter(body["messages"][0]["content"] for body in server.bodies)
        assert sent == Counter(c["custom_system_prompt"] for row in rows for c in row["completions"])
        assert "60 completions" in capsys.readouterr().err
        assert (
            run("collect", "--plan", plan, "--output-dir", out) == 0 and sum(server.asked.values()) == 60
        )  # nothing is asked again
        assert lines(out / "completions.jsonl") == rows
        assert run("collect", "--plan", plan, "--output-dir", out, "--overwrite") == 0 and sum(server.asked.values()) == 120
        capsys.readouterr()
        (tmp_path / "tasks.jsonl").write_text('{"instruction": "another"}\n')
        assert (
            run("collect", "--plan", plan, "--output-dir", out) == 2
            and "was made with content = " in capsys.readouterr().err
        )
        assert run("collect", "--plan", plan, "--output-dir", out, "--dry-run") == 0
        assert "1 instructions, 2 completions each" in capsys.readouterr().out


def test_a_failure_is_recorded_and_asked_for_again(tmp_path, capsys):
    with Server() as server:
        plan = write_plan(tmp_path, server.url, rows=3, models=1, completions=1)
        server.first_status = [400]
        assert run("collect", "--plan", plan, "--output-dir", tmp_path / "out") == 0
        assert "1 failed" in capsys.readouterr().err
        bad = [c for row in lines(tmp_path / "out/completions.jsonl") for c in row["completions"] if c["response"] is None]
        assert len(bad) == 1 and bad[0]["error"].startswith("HTTP 400") and bad[0]["finish_reason"] == "error"
        assert run("collect", "--plan", plan, "--output-dir", tmp_path / "out", "--no-retry-failed") == 0
        assert sum(server.asked.values()) == 3
        assert run("collect", "--plan", plan, "--output-dir", tmp_path / "out") == 0 and sum(server.asked.values()) == 4
        assert all(c["response"] for row in lines(tmp_path / "out/completions.jsonl") for c in row["completions"])


def test_local_models_give_the_same_after_a_restart(tmp_path):
    """A native pool, its last lines torn away: what is asked again comes out as it was, whatever is in its batch."""
    folders = [make_folder(tmp_path / f"m{i}", seed=i) for i in range(2)]
    plan = tmp_path / "plan.json"
    (tmp_path / "tasks.jsonl").write_text(
        "".join(json.dumps({"prompt": f"text {i}" + "y" * (120 * (i == 5))}) + "\n" for i in range(12))
    )
    plan.write_text(
        json.dumps(
            {
                "completions": 2,
                "instructions": "tasks.jsonl",
                "principles": "none",
                "sampling": {"max_new_tokens": 12},
                "models": [
                    {"model": folders[0], "format": "text"},
                    {"backend": "transformers", "model": folders[1], "format": "text", "name": "hf"},
                ],
            }
        )
    )
    assert run("collect", "--plan", plan, "--output-dir", tmp_path / "out") == 0
    parts, result = tmp_path / "out/parts.jsonl", tmp_path / "out/completions.jsonl"
    whole = lines(result)
    assert {c["error"] for c in whole[5]["completions"]} == {"the prompt has 127 tokens, allowed is up to the model's 96"}
    assert all(c["response"] is not None for row in whole[:5] + whole[6:] for c in row["completions"]) and whole[0]["text"]
    data = parts.read_bytes()
    parts.write_bytes(data[: len(data) // 2])
    assert run("collect", "--plan", plan, "--output-dir", tmp_path / "out") == 0

    def replies(rows):
        return [[(c["model"], c["response"]) for c in row["completions"]] for row in rows]

    assert replies(lines(result)) == replies(whole)


@pytest.mark.slow
def test_killed_five_times_in_mid_run(tmp_path):
    """kill -9 while a faulty server is asked: the end holds exactly the plan's completions, and few were asked for twice."""
    with Server(rate=0.3, hang=0.6) as server:
        plan = write_plan(tmp_path, server.url, rows=250, models=4)
        out, kills, rng = tmp_path / "out", 0, random.Random(0)
        command = [sys.executable, "-m", "xalign", "collect", "--plan", str(plan), "--output-dir", str(out)]
        sizes = [0]
        while kills < 5:
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            parts, begun = out / "parts.jsonl", time.monotonic()
            grown = sizes[-1] + rng.randint(3000, 12000)
            while process.poll() is None and (not parts.exists() or parts.stat().st_size < grown):
                assert time.monotonic() - begun < 60
                time.sleep(0.002)
            assert process.poll() is None, "it ended before it could be killed"
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            sizes.append(parts.stat().st_size)
        before = sum(server.asked.values())
        assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 0
        rows = lines(out / "completions.jsonl")
        assert [r["instruction"] for r in rows] == [f"task {i}" for i in range(250)]
        for row in rows:
            assert len(row["completions"]) == 2 and len(set(row["models"])) == 2
            for c in row["completions"]:
                assert c["response"] == f"answer to {row['instruction']}" or c["error"]
        assert sum(c["response"] is None for row in rows for c in row["completions"]) < 10
        keys = Counter((p["row"], p["slot"]) for p in lines(out / "parts.jsonl") if not p["failed"])
        assert set(keys.values()) == {1}  # no completion is in it twice
        # each kill can lose what was under way; tries are bounded by that, and by 6 for a request
        assert before < sum(server.asked.values()) < 1.6 * 500 + 5 * 32


def test_a_hundred_thousand_instructions_take_seconds_and_little_memory(tmp_path):
    """Plan, draws and restart of 100,000 instructions with 4 completions each, 300,000 of them there: < 10 s, < 500 MB.

    (The peak is that of the program's own memory, VmHWM: rusage's also knows what the test's process had when it forked.)
    """
    write_plan(tmp_path, "http://127.0.0.1:1/v1", models=17, completions=4)
    with open(tmp_path / "tasks.jsonl", "w") as file:
        for i in range(100_000):
            file.write(json.dumps({"instruction": f"task {i} " + "words and more " * 12, "source": "flan"}) + "\n")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "parts.jsonl", "w") as file:
        for i in range(300_000):
            file.write(f'{{"row": {i // 4}, "slot": {i % 4}, "failed": false, "response": "{"lorem ipsum " * 20}"}}\n')
    code = (
        "import sys, time, numpy\nfrom pathlib import Path\nbegan = time.monotonic()\n"
        "from xalign.collect import content, draw, load_plan\nfrom xalign.journal import Journal\n"
        "plan = load_plan(sys.argv[1])\nrows = list(plan.instructions())\ndrawn = draw(plan, [r.source for r in rows])\n"
        "content(rows)\n"
        "journal = Journal(Path(sys.argv[2]), *drawn.models.shape)\n"
        "left = sum(len(numpy.argwhere(journal.missing & (drawn.models == m))) for m in range(17))\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]\n"
        "print(left, time.monotonic() - began, int(peak) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "plan.json", tmp_path / "out" / "parts.jsonl"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    left, seconds, megabytes = map(float, done.stdout.split())
    assert left == 100_000 and megabytes < 500, f"{seconds:.1f} s"


# -- annotation -----------------------------------------------------------------------------------------------------

GOOD = "#### Output for Text 1\nRating: 4\nRationale: fine\n\n#### Output for Text 2\nRating: N/A\nRationale: nothing\nclaimed"


def test_ratings_are_read_strictly():
    assert judge.read_ratings("honesty", GOOD, 2) == [{"Rating": "4", "Rationale": "fine"},
                                                      {"Rating": "N/A", "Rationale": "nothing\nclaimed"}]
    typed = "#### Output for Text 1\nType: 1, 2\nRationale: r\nRating: 2\nRationale For Rating: s"
    assert judge.read_ratings("truthfulness", typed, 1) == [
        {"Type": "1, 2", "Rationale": "r", "Rating": "2", "Rationale For Rating": "s"}
    ]
    for bad in (
        GOOD + "\n#### Output for Text 3\nRating: 1\nRationale: x",
        GOOD.replace("Text 2", "Text 1"),
        "Sure!\n" + GOOD,
        GOOD.replace("4", "6"),
        GOOD.replace("4", "4.5"),
        GOOD.replace("4", "__import__('os')"),
        GOOD.replace("Rationale: fine", ""),
        "",
        GOOD.replace("Rating: 4", "Score: 4"),
        GOOD.replace("#### Output for Text 1", "Text 1"),
    ):
        with pytest.raises(ValueError, match=r"section|the reply"):
            judge.read_ratings("honesty", bad, 2)


@pytest.mark.parametrize(
    ("reply", "score"), [("8", 8), ("1", 1), ("10", 10), ("7.5", 7.5), ("8/10", 8), ("1/10", 1), ("**6**", 6), ("3.", 3)]
)
def test_a_score_of_1_stays_1(reply, score):
    assert judge.read_critique(f"Feedback: be\nclear\n\nOverall Score: {reply}\n") == ("be\nclear", score)


@pytest.mark.parametrize("reply", ["0", "11", "8/5", "1+1", "ten", "", "8 or 9", "-3", "1e1"])
def test_other_scores_are_asked_for_again(reply):
    with pytest.raises(ValueError, match=r"overall score|Overall Score"):
        judge.read_critique(f"Feedback: x\nOverall Score: {reply}")


BAR = SimpleNamespace(update=lambda n=1: None)


def test_texts_are_shuffled_and_put_back(tmp_path):
    """A judge that rates by length, whatever the order it sees; its first reply to each request is of no use."""
    rows = [{"instruction": f"q{r}", "source": "flan", "completions": [
        {"model": str(i), "response": "x" * (i + 1), "custom_system_prompt": None} for i in range(4)]} for r in range(6)]
    rows[2]["completions"][1]["response"] = None
    seen, asked = Counter(), Counter()

    class ByLength:
        def generate(self, prompts, params, done):
            for i, p in enumerate(prompts):
                assert params.temperature == 0.7 * (asked[p[-1].content] > 0)  # the same request would give the same reply
                done(i, [Completion(self.reply(p[-1].content), (), "stop")])

        def reply(self, text):
            asked[text] += 1
            if asked[text] == 1:
                return "I can't say."
            if "# Answer\n" in text:
                return f"Feedback: long\nOverall Score: {len(text.split('# Answer')[1].split()[0])}/10"
            shown = [len(part.split("\n")[1]) for part in text.split("<text ")[1:]]
            seen[tuple(shown)] += 1
            form = (
                "Type: 1\nRationale: r\nRating: {}\nRationale For Rating: r"
                if "Type: <" in text
                else "Rating: {}\nRationale: r"
            )
            return "\n\n".join(f"#### Output for Text {i}\n{form.format(n)}" for i, n in enumerate(shown, 1))

    journal = Journal(tmp_path / "parts.jsonl", 6, 8)
    todo = [(r, slot) for r in range(6) for slot in asked_of(rows[r])]
    judge_rows(ByLength(), rows, todo[:20], journal, BAR, seed=0, reask=0)  # replies are kept: a start goes on behind them
    assert journal.failed.sum() == 20 and "the reply has sections" in journal.read(0, 1)["error"]
    assert set(asked.values()) == {1}
    journal.close()
    journal = Journal(tmp_path / "parts.jsonl", 6, 8)
    judge_rows(ByLength(), rows, todo, journal, BAR, seed=0, reask=2)
    assert len(seen) > 8  # many orders
    assert not journal.failed.any() and set(asked.values()) == {2} and len(asked) == len(todo) == 47
    for r, found in enumerate(judgements(rows, journal, 0)):
        done = annotated(rows[r], *found)["completions"]
        for i, c in enumerate(done):
            if r == 2 and i == 1:
                assert c["overall_score"] is None and c["annotations"] == {}
                continue
            assert c["overall_score"] == i + 1 == c["fine-grained_score"] and c["critique"] == "long"
            assert {a["Rating"] for a in c["annotations"].values()} == {str(i + 1)} and set(c["annotations"]) == set(
                judge.ASPECTS
            )
        assert all(len(journal.read(r, slot)["raw"]) == 2 for slot in asked_of(rows[r]))
    assert journal.read(0, 1)["raw"][0] == "I can't say."


def test_gold_annotation_and_its_restart(tmp_path, capsys):
    pairs = [json.loads(line) for line in (ROOT / "data/test.jsonl").read_text().splitlines()[:70]]
    rows = [
        {
            "source": "toy",
            "instruction": p["prompt"],
            "text": True,
            "completions": [
                {"model": "a", "response": p["chosen"]},
                {"model": "b", "response": p["rejected"]},
                {"model": "c", "response": None},
            ],
        }
        for p in pairs
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ("annotate", "--completions", tmp_path / "c.jsonl", "--output-dir", tmp_path / "out")
    assert run(*flags) == 0
    done = lines(tmp_path / "out/annotated.jsonl")
    for row, p in zip(done, pairs, strict=True):
        gold = [toyworld.gold_reward(p["prompt"], p[side]) for side in ("chosen", "rejected")]
        assert [c["overall_score"] for c in row["completions"]] == [*gold, None]
    parts = (tmp_path / "out/parts.jsonl").read_bytes()
    (tmp_path / "out/parts.jsonl").write_bytes(parts[: len(parts) // 2])
    assert run(*flags) == 0 and lines(tmp_path / "out/annotated.jsonl") == done
    capsys.readouterr()
    assert run(*flags, "--seed", 1) == 2 and "was made with seed = 0, now it is 1" in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "hi", "completions": [{"response": "x"}]}) + "\n")
    assert run("annotate", "--completions", tmp_path / "d.jsonl", "--output-dir", tmp_path / "o2") == 2
    assert "only the toy world's prompts" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"e.jsonl:1: no completions"):
        (tmp_path / "e.jsonl").write_text('{"instruction": "x"}\n')
        list(read_completions(str(tmp_path / "e.jsonl")))


def test_a_scorer_with_a_chat_template_is_asked_in_messages(tmp_path, capsys):
    class Chatty:
        chat = True

        def score(self, prompts, responses):
            self.prompts = prompts
            return torch.tensor([0.0, torch.nan, 2.0, 3.0])

    journal, scorer = Journal(tmp_path / "parts.jsonl", 2, 1), Chatty()
    rows = [{"instruction": "q", "text": text, "completions": [{"response": "a"}, {"response": None}, {"response": "b"}]}
            for text in (False, True)]
    score_rows(scorer, rows, [0, 1], journal, BAR)
    assert scorer.prompts == [(Message("user", "q"),)] * 2 + ["q"] * 2
    assert [overall for _, _, overall in scores(rows, journal, 0)] == [[0.0, None, None], [2.0, None, 3.0]]  # NaN is no score
    assert "warning: 1 scores are no finite numbers" in capsys.readouterr().err


def test_prompts_to_json_and_back():
    talk = (Message("system", "s"), Message("user", "u"))
    assert from_json(as_json(talk), "") == talk and from_json("x", "") == "x"
    with pytest.raises(DataError, match=r"f:1: 'instruction' must be"):
        from_json([1], "f:1")

