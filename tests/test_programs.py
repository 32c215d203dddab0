"""The programs as a person runs them: end to end on tiny configurations, and every mistake is one clear line."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny
from safetensors.torch import load_file, save_file
from tokenizer_folders import write

from xalign import load_pretrained, save_pretrained
from xalign.cli import main
from xalign.config import PreferenceDataOptions
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS, render_prompt
from xalign.data.records import Message
from xalign.prepare import preference_data
from xalign.tokenizers import ByteTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HH = ROOT.parent / "shared/data/hh-harmless-base.train.jsonl.gz"
SHAPE = {"dim": 16, "depth": 1, "heads": 2, "vocab_size": 330, "sft_epochs": 0.5, "sft_batch_size": 8}
LOOP = {"max_steps": 6, "batch_size": 4, "eval_steps": 3, "save_steps": 2, "eval_prompts": 3, "eval_samples": 2,
        "eval_max_new_tokens": 8, "logging_steps": 2}
TINY = SHAPE | LOOP
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def script(name: str, *arguments, stdin: str = "") -> subprocess.CompletedProcess:
    """Run one of the scripts at the top as a process of its own."""
    return subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], input=stdin, capture_output=True, text=True,
                          env=ENVIRONMENT, cwd=ROOT, timeout=120)


def call(command: str, *arguments) -> int:
    """Run a command in this process; gives its exit status."""
    try:
        main([str(a) for a in arguments], command)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A folder with a tiny part of the toy world and the configuration for it."""
    folder = tmp_path_factory.mktemp("toy")
    lines = (ROOT / "data/test.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:30]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(lines[30:40]) + "\n")
    settings = TINY | {"dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "test.jsonl")}
    (folder / "tiny.json").write_text(json.dumps(settings))
    (folder / "given.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in SHAPE}))
    return folder


@pytest.fixture(scope="module")
def finished(toy) -> tuple[Path, subprocess.CompletedProcess]:
    """A run of train_dpo.py as it is after its first call, and what it printed."""
    done = script("train_dpo.py", "--config", toy / "tiny.json", "--output-dir", toy / "run")
    assert done.returncode == 0, done.stderr
    return toy / "run", done


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A random model with a byte tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    save_pretrained(tiny(**LLAMA, num_tokens=tokenizer.vocab_size, max_seq_len=256, sharp=3.0), folder, tokenizer)
    return folder


# -- train_dpo.py ---------------------------------------------------------------------------------------------------


def test_train_dpo_end_to_end(finished):
    run, done = finished
    assert {p.name for p in run.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "samples.jsonl", "checkpoint-4", "checkpoint-6", "latest", "sft", "reference",
        "policy", "report.md", "report.html", "evaluation.json", "training.png", "rewards.png", "gold.png", "lengths.png"}
    assert {p.name for p in (run / "policy").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json"}
    assert "| win rate by gold reward |" in done.stdout and "| untrained | reference | policy |" in done.stdout
    assert done.stdout.count("\n") == done.stdout.strip().count("\n") + 1 and "report:" in done.stderr
    numbers = json.loads((run / "evaluation.json").read_text())
    for key in ("win_rate", "win_rate_interval", "gold_untrained", "gold_reference", "gold_policy", "well_formed_reference",
                "well_formed_policy", "consistent_reference", "consistent_policy", "preference_accuracy",
                "preference_accuracy_limit", "perplexity_reference", "perplexity_policy", "kl", "seconds"):
        assert key in numbers
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/loss"] == pytest.approx(0.6931, abs=1e-4) and lines[-1]["step"] == 6
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0] * 4 + [3] * 4 + [6] * 4 and samples[0].keys() == {"step", "prompt", "completion"}
    weights = [load_pretrained(run / name)[0].token_emb.weight for name in ("policy", "checkpoint-6", "reference")]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert json.loads((run / "config.json").read_text())["program"] == "dpo"


def test_the_policy_opens_in_transformers(finished):
    from transformers import AutoModelForCausalLM

    run, _ = finished
    theirs, (ours, tokenizer) = AutoModelForCausalLM.from_pretrained(run / "policy"), load_pretrained(run / "policy")
    tokens = torch.tensor([tokenizer.encode("Once a gentle bear", bos=True)])
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4


def test_a_finished_run_says_so_and_is_not_touched(finished, toy, capsys):
    run, done = finished
    before = snapshot(run)
    assert call("dpo", "--config", toy / "tiny.json", "--output-dir", run) == 0
    out, err = capsys.readouterr()
    assert "is finished; --overwrite runs it anew" in err and done.stdout.strip() in out and snapshot(run) == before
    assert call("dpo", "--config", toy / "tiny.json", "--output-dir", run, "--resume") == 0


def test_the_same_command_gives_the_same_run(finished, toy, capsys):
    run, done = finished
    assert call("dpo", "--config", toy / "tiny.json", "--output-dir", toy / "again") == 0
    for file in ("policy/model.safetensors", "reference/model.safetensors", "samples.jsonl"):
        assert (run / file).read_bytes() == (toy / "again" / file).read_bytes(), file
    assert capsys.readouterr().out == done.stdout
    assert call("dpo", "--config", toy / "tiny.json", "--output-dir", toy / "again", "--overwrite", "--seed", 1) == 0
    assert (run / "policy/model.safetensors").read_bytes() != (toy / "again/policy/model.safetensors").read_bytes()


def test_dpo_from_a_model_and_with_a_reference(finished, toy, capsys):
    run, _ = finished
    options = ["--config", toy / "given.json", "--model", run / "reference", "--no-precompute-ref-log-probs"]
    assert call("dpo", *options, "--output-dir", toy / "from") == 0
    assert "untrained" not in capsys.readouterr().out and not (toy / "from/sft").exists()
    # the same reference and the same pairs: the reference's log-probabilities known beforehand change nothing
    a, b = (load_file(r / "policy/model.safetensors") for r in (run, toy / "from"))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert call("dpo", *options, "--output-dir", toy / "other", "--ref-model", run / "policy", "--bf16",
                "--gradient-checkpointing", "--gradient-accumulation-steps", 2, "--dtype", "bfloat16") == 0
    assert json.loads((toy / "other/policy/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("given", [True, False])
def test_a_policy_is_measured_against_the_reference_before_it_moved(finished, toy, given):
    run, _ = finished
    options = ["--config", toy / "given.json", "--model", run / "reference", "--output-dir", toy / f"moving-{given}",
               *(["--ref-model", run / "reference"] if given else []), "--sync-ref-model"]
    assert call("dpo", *options, "--ref-model-sync-steps", 1, "--ref-model-mixup-alpha", 1) == 0
    before, found = (json.loads((r / "evaluation.json").read_text()) for r in (run, toy / f"moving-{given}"))
    assert found["perplexity_reference"] == pytest.approx(before["perplexity_reference"], rel=1e-5)
    assert abs(found["perplexity_policy"] / found["perplexity_reference"] - 1) > 1e-4 and found["kl"] != 0


def test_interrupt_saves_and_the_same_command_goes_on(finished, toy):
    run, _ = finished
    command = [sys.executable, "-c", "import xalign.training as t, os, signal, sys\nfrom xalign.cli import main\n"
               "real = t.schedule\n"
               "def schedule(step, **k):\n    if step == 4 and k['total'] == 6: os.kill(os.getpid(), signal.SIGINT)\n"
               "    return real(step, **k)\nt.schedule = schedule\nmain(sys.argv[1:], 'dpo')\n"]
    options = ["--config", str(toy / "tiny.json"), "--output-dir", str(toy / "stopped")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=120)
    assert done.returncode == 130 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: dpo: stopped after step 5 of 6, all is saved in") and last.endswith("goes on from there")
    assert call("dpo", *options, "--resume") == 0
    for file in ("policy/model.safetensors", "samples.jsonl"):
        assert (run / file).read_bytes() == (toy / "stopped" / file).read_bytes(), file


def test_a_policy_that_was_deleted_is_made_again(finished, toy, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    before = snapshot(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/policy")
    assert call("dpo", "--config", toy / "tiny.json", "--output-dir", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert f"{tmp_path}/run/policy is missing although there is a report" in err and "resumed after step 6 of 6" in err
    assert out == finished[1].stdout
    after = snapshot(tmp_path / "run")
    timed = ("metrics.jsonl", "sft/metrics.jsonl", "evaluation.json", "report.md", "report.html", "plots.png")
    assert {k: v for k, v in after.items() if k not in timed} == {k: v for k, v in before.items() if k not in timed}
    assert after["metrics.jsonl"] == before["metrics.jsonl"]


# -- xalign sft -----------------------------------------------------------------------------------------------------


SFT = ["--dim", 16, "--depth", 1, "--heads", 2, "--vocab-size", 320, "--max-steps", 4, "--batch-size", 4, "--logging-steps", 2,
       "--eval-steps", 2, "--save-steps", 2, "--warmup-steps", 1]
TALK = [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Say {i}."},
                      {"role": "assistant", "content": f"{i}!"}, {"role": "user", "content": "Again."},
                      {"role": "assistant", "content": f"{i}, again."}]} for i in range(30)]


def test_sft_on_plain_text(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"The {i}th story tells of {i} bears.\n" for i in range(40)))
    assert call("sft", *SFT, "--dataset", tmp_path / "text.txt", "--output-dir", tmp_path / "run") == 0
    assert capsys.readouterr().out == f"{tmp_path}/run/policy\n"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "config.json", "metrics.jsonl", "checkpoint-2",
                                                             "checkpoint-4", "latest", "policy"}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/perplexity"] > lines[-1]["eval/perplexity"]
    model, tokenizer = load_pretrained(tmp_path / "run/policy")
    assert tokenizer.chat_template is None and tokenizer.vocab_size == model.num_tokens <= 320
    assert call("sft", *SFT, "--dataset", tmp_path / "text.txt", "--output-dir", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/run/policy\n" and "is finished (--overwrite trains it anew)" in err
    before = snapshot(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/policy")
    assert call("sft", *SFT, "--dataset", tmp_path / "text.txt", "--output-dir", tmp_path / "run") == 0
    assert snapshot(tmp_path / "run") == before, "a deleted policy comes from the last checkpoint"


def test_sft_scores_the_assistant_only(tmp_path, capsys):
    write_jsonl(tmp_path / "talk.jsonl", TALK)
    assert call("sft", *SFT, "--dataset", tmp_path / "talk.jsonl", "--output-dir", tmp_path / "run", "--dry-run") == 0
    out, _ = capsys.readouterr()
    assert not (tmp_path / "run").exists() and "first of 29 records" in out
    rows = [line.split(None, 2) for line in out.split("\nMemory a device")[0].splitlines()[1:]]
    scored = "".join(eval(r[2].removeprefix("scored ")) for r in rows if r[2].startswith("scored"))
    read = "".join(eval(r[2]) for r in rows if not r[2].startswith("scored"))
    assert "Be kind." in read and "Say" in read and "<|user|>" in read and "<|assistant|>" in read
    assert scored.endswith("again.</s>") and "!" in scored and "Say" not in scored and "<|" not in scored
    assert call("sft", *SFT, "--dataset", tmp_path / "talk.jsonl", "--output-dir", tmp_path / "run") == 0
    assert load_pretrained(tmp_path / "run/policy")[1].chat_template == DEFAULT_TEMPLATE


def test_sft_mixes_datasets_by_weight(tmp_path, capsys):
    write_jsonl(tmp_path / "talk.jsonl", TALK)
    (tmp_path / "text.txt").write_text("".join(f"The {i}th story.\n" for i in range(20)))
    write_jsonl(tmp_path / "eval.jsonl", TALK[:2])
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"prompt": f"{i} and {i} is", "completion": f" {2 * i}"}) + "\n" for i in range(10))
    options = [*SFT, "--dataset", tmp_path / "talk.jsonl", tmp_path / "text.txt", tmp_path / "more.jsonl.gz",
               "--eval-dataset", tmp_path / "eval.jsonl", "--dataset-weights", 2, 0.5, 1]
    assert call("sft", *options, "--dry-run") == 0
    assert f"of {2 * 30 + 10 + 10} records" in capsys.readouterr().out
    assert call("sft", *options, "--output-dir", tmp_path / "run", "--dropout", 0.1) == 0
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept["dataset_weights"] == [2.0, 0.5, 1.0] and len(kept["dataset"]) == 3
    assert call("sft", *options, "--output-dir", tmp_path / "run", "--dropout", 0.1) == 0, "lists compare equal on resume"
    assert call("sft", *options[:-1], "--output-dir", tmp_path / "other") == 2
    assert "--dataset-weights has 2 numbers for 3 files" in capsys.readouterr().err


def test_sft_goes_on_from_a_model_and_dtype_counts(tmp_path, chatty, capsys):
    write_jsonl(tmp_path / "talk.jsonl", TALK)
    options = ["--dataset", tmp_path / "talk.jsonl", "--max-steps", 2, "--batch-size", 4]
    assert call("sft", *options, "--model", chatty, "--output-dir", tmp_path / "run") == 0
    before, after = load_file(chatty / "model.safetensors"), load_file(tmp_path / "run/policy/model.safetensors")
    assert before.keys() == after.keys() and not all(torch.equal(before[k], after[k]) for k in before)
    assert "cut to the model's 256 positions" in capsys.readouterr().err
    assert call("sft", *SFT, *options, "--dtype", "bfloat16", "--output-dir", tmp_path / "half") == 0
    assert {t.dtype for t in load_file(tmp_path / "half/policy/model.safetensors").values()} == {torch.bfloat16}


# -- generate.py ----------------------------------------------------------------------------------------------------


def test_generate_script(chatty):
    """The real process once; the rest of the flags are tried in this one."""
    arguments = ["--model", chatty, "--max-new-tokens", 12, "--seed", 3]
    one = script("generate.py", *arguments, "-p", "hello")
    two = script("generate.py", *arguments, stdin="hello\n")
    assert one.returncode == two.returncode == 0 and one.stdout == two.stdout and one.stderr == "", one.stderr
    assert one.stdout.endswith("\n") and len(one.stdout) > 1


def generated(capsys, *arguments) -> str:
    capsys.readouterr()
    assert call("generate", *arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_streaming_equals_not_streaming(chatty, capsys):
    for extra in ([], ["--stop", "e", "a"], ["--temperature", 0], ["--top-k", 5, "--top-p", 0.9, "--min-p", 0.01],
                  ["--chat", "--system", "Be kind."], ["--repetition-penalty", 1.3]):
        options = ["--model", chatty, "--max-new-tokens", 16, "--seed", 5, "-p", "hello", *extra]
        streamed, whole = generated(capsys, *options), json.loads(generated(capsys, *options, "--json"))
        assert streamed == whole["completion"] + "\n" and whole["finish_reason"] in ("stop", "length")
        assert whole.keys() == {"prompt", "completion", "finish_reason", "tokens", "logps"} and whole["logps"] < 0


def test_prompt_files(chatty, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("one\ntwo two\n\nthree three three\n")
    turns = [{"role": "user", "content": "one"}]
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}, {"prompt": turns}, {"messages": turns}])
    options = ["--model", chatty, "--max-new-tokens", 8, "--temperature", 0]
    text = [json.loads(line) for line in generated(capsys, *options, "--prompts", tmp_path / "p.txt", "--json").splitlines()]
    assert [r["prompt"] for r in text] == ["one", "two two", "three three three"]
    mixed = [json.loads(line) for line in generated(capsys, *options, "--prompts", tmp_path / "p.jsonl", "--json").splitlines()]
    assert [r["prompt"] for r in mixed] == ["one", turns, turns] and mixed[1]["completion"] == mixed[2]["completion"]
    assert mixed[0]["completion"] == text[0]["completion"]
    chat = json.loads(generated(capsys, *options, "-p", "one", "--chat", "--json"))
    assert chat["completion"] == mixed[1]["completion"]
    plain = generated(capsys, *options, "--prompts", tmp_path / "p.txt")
    assert plain.startswith("one\n    ") and "\ntwo two\n    " in plain


def test_an_empty_system_turn_is_sent(chatty, capsys):
    options = ["--model", chatty, "--max-new-tokens", 4, "--temperature", 0, "-p", "one", "--chat", "--json"]
    sent = json.loads(generated(capsys, *options, "--system", ""))["prompt"]
    assert sent == [{"role": "system", "content": ""}, {"role": "user", "content": "one"}]
    assert json.loads(generated(capsys, *options))["prompt"] == sent[1:]


# -- models without a chat template, without an end ------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A random model with GPT-2's kind of tokenizer, which has no chat template."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = load_tokenizer(write(folder / "tokenizer", "gpt2"))
    save_pretrained(tiny(**LLAMA, num_tokens=tokenizer.vocab_size, max_seq_len=256), folder / "model", tokenizer)
    return folder / "model"


NO_TEMPLATE = "has no chat template: xalign's own is used"


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_conversations_give_a_model_without_a_template_ours(command, plain, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    if command == "sft":
        write_jsonl(tmp_path / "talk.jsonl", TALK)
        options = ["--dataset", tmp_path / "talk.jsonl", "--max-steps", 2, "--batch-size", 4, "--model", plain]
    else:
        turn = [{"role": "user", "content": "Say 1."}]
        sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        rows = [{"prompt": [*turn, {"role": "assistant", "content": f"{i}"}, *turn], **sides} for i in range(20)]
        write_jsonl(tmp_path / "talk.jsonl", rows)
        options = ["--dataset", tmp_path / "talk.jsonl", "--max-steps", 2, "--batch-size", 4, "--eval-prompts", 2,
                   "--eval-samples", 1, "--eval-max-new-tokens", 2, "--model", plain]
    for more in (["--dry-run"], ["--output-dir", tmp_path / "run"]):
        assert call(command, *options, *more) == 0
        assert capsys.readouterr().err.count(f"{plain} {NO_TEMPLATE}, and saved with the model") == 1
    for name in ("policy", "reference")[: 1 + (command == "dpo")]:
        ours = load_pretrained(tmp_path / "run" / name)[1]
        assert ours.chat_template == DEFAULT_TEMPLATE
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        chat = (Message("system", "Be kind."), Message("user", "Hi."), Message("assistant", "Yes"), Message("user", "So?"))
        ids = peer.apply_chat_template([vars(m) for m in chat], add_generation_prompt=True)["input_ids"]
        assert ids == render_prompt(ours, chat).ids


def test_generate_says_that_there_is_no_template(plain, chatty, capsys):
    for model, options, count in ((plain, ["--chat"], 1), (plain, [], 0), (chatty, ["--chat"], 0)):
        capsys.readouterr()
        assert call("generate", "--model", model, "-p", "x", "--max-new-tokens", 2, *options) == 0
        assert capsys.readouterr().err.count(NO_TEMPLATE) == count


def test_training_says_that_no_text_ends(plain, toy, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "model")
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    for command in ("sft", "dpo"):
        assert call(command, "--dataset", toy / "train.jsonl", "--dry-run", "--model", tmp_path / "model") == 0
        assert capsys.readouterr().err.count("model has no EOS token: no text of the training ends") == 1
        assert call(command, "--dataset", toy / "train.jsonl", "--dry-run", "--model", plain) == 0
        assert "EOS" not in capsys.readouterr().err


def test_many_samples_seeds_and_beams(chatty, capsys):
    options = ["--model", chatty, "--max-new-tokens", 10, "-p", "hello", "--json"]
    rows = [json.loads(line)["completion"] for line in generated(capsys, *options, "-n", 5, "--seed", 1).splitlines()]
    assert len(rows) == 5 and len(set(rows)) == 5
    assert rows == [json.loads(r)["completion"] for r in generated(capsys, *options, "--n=5", "--seed=1").splitlines()]
    assert generated(capsys, *options, "--seed", 1) != generated(capsys, *options, "--seed", 2)
    assert generated(capsys, *options) != generated(capsys, *options), "without a seed each time another text"
    beams = json.loads(generated(capsys, *options, "--beams", 4, "--length-penalty", 0.5))
    assert beams["logps"] is None and beams == json.loads(generated(capsys, *options, "--beams", 4, "--length_penalty=0.5"))


def test_stop_strings_and_odd_prompts(chatty, capsys):
    options = ["--model", chatty, "--max-new-tokens", 6, "--temperature", 0]
    for prompt in ("", "- a list", "-5", "--- a_b", "🦊", " \t", "<|user|>"):
        assert generated(capsys, *options, f"--prompt={prompt}") == generated(capsys, *options, "-p", prompt)
    whole = json.loads(generated(capsys, *options, "-p", "hello", "--json", "--max-new-tokens", 30))["completion"]
    stop = whole[3:5]
    cut = generated(capsys, *options, "-p", "hello", "--max-new-tokens", 30, "--stop", "nowhere", "--stop", stop)
    assert cut == whole[: whole.index(stop)] + "\n"


def test_a_reader_that_goes_away_is_no_crash(chatty, tmp_path):
    (tmp_path / "p.txt").write_text("hello\n" * 300)
    command = (f"{sys.executable} {ROOT}/generate.py --model {chatty} --prompts {tmp_path}/p.txt -n 20 --max-new-tokens 2"
               " 2>&1 >/dev/full | cat; exit ${PIPESTATUS[0]}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stdout and "error: " in done.stdout, done.stdout
    command = command.replace("2>&1 >/dev/full | cat", f"2>{tmp_path}/err | head -c 1")
    done = subprocess.run(["bash", "-c", command], timeout=120, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    told = (tmp_path / "err").read_text()
    assert done.returncode == 141 and "Traceback" not in told and "Exception" not in told, told


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "arguments"), [
    ("dpo", ["--beta", 0.3, "--bf16", "--no-precompute-ref-log-probs", "--max_steps=7", "--run-name=-x y"]),
    ("sft", ["--dataset", "a", "b c", "--dataset-weights", 1, 0.5, "--lr-scheduler-type", "linear"]),
    ("generate", ["-p", "- x", "--stop", "- y", "--stop=--z", "-n", 3, "--top-k", 4]),
    ("generate", []),
])
def test_print_config_and_config_round_trip(tmp_path, capsys, command, arguments):
    assert call(command, *arguments, "--print-config") == 0
    first = capsys.readouterr().out
    (tmp_path / "c.json").write_text(first)
    assert call(command, "--config", tmp_path / "c.json", "--print-config") == 0
    assert capsys.readouterr().out == first
    assert call(command, f"--config={tmp_path}/c.json", "--seed", 9, "--print-config") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(first) | {"seed": 9}


def test_flags_win_over_the_file_wherever_they_stand(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"bf16": true, "beta": 0.5, "max-steps": 3, "model": null, "run_name": "--x"}')
    assert call("dpo", "--no-bf16", "--max_steps", 4, "--config", tmp_path / "c.json", "--print-config") == 0
    settings = json.loads(capsys.readouterr().out)
    assert [settings[k] for k in ("bf16", "beta", "max_steps", "model", "run_name")] == [False, 0.5, 4, None, "--x"]
    (tmp_path / "c.json").write_text('{"stop": ["a", "b"]}')
    assert call("generate", "--stop", "c", "--config", tmp_path / "c.json", "--print-config") == 0
    assert json.loads(capsys.readouterr().out)["stop"] == ["c"]


def test_dry_run_shows_one_pair_and_writes_nothing(toy, tmp_path, capsys):
    assert call("dpo", "--config", toy / "tiny.json", "--output-dir", tmp_path / "run", "--dry-run") == 0
    out, memory = capsys.readouterr().out.split("\nMemory a device, in GB, for 4 records of 512 tokens (the longest")
    assert list(tmp_path.iterdir()) == [] and "parameters" in out.splitlines()[0]
    assert [line.split()[0] for line in memory.splitlines()[1:5]] == ["weights", "gradients", "optimizer", "reference"]
    assert "at the peak" in memory and "does not fit" not in memory
    first = json.loads((toy / "train.jsonl").read_text().splitlines()[0])
    for side, block in zip(("chosen", "rejected"), out.split("\nchosen:\n")[1].split("\nrejected:\n"), strict=True):
        rows = [line.split(None, 2) for line in block.splitlines() if line.strip()]
        scored = "".join(eval(r[2].removeprefix("scored ")) for r in rows if r[2].startswith("scored"))
        read = "".join(eval(r[2]) for r in rows if not r[2].startswith("scored"))
        assert (read, scored) == (f"<s>{first['prompt']}", f"{first[side]}</s>")


def test_dry_run_shows_what_the_run_trains(finished, toy, capsys):
    run, _ = finished
    assert call("dpo", "--config", toy / "tiny.json", "--dry-run") == 0
    model, tokenizer = load_pretrained(run / "policy")
    count = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out.startswith(f"{count:,} parameters, {tokenizer.vocab_size:,} pieces, 30 pairs; the first:")


# -- mistakes -------------------------------------------------------------------------------------------------------


GOOD = {"prompt": "Say", "chosen": " yes", "rejected": " no"}


def refused(capsys, command: str, *arguments, status: int = 2) -> str:
    """The one line of a user's mistake; stdout stays empty."""
    capsys.readouterr()
    assert call(command, *arguments) == status
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(errors) == 1 and err.endswith(errors[0] + "\n") and "Traceback" not in err, err
    return errors[0]


BAD_DATA = {
    "broken JSON": ([GOOD, '{"prompt": "a"', GOOD], r"data.jsonl:2: not valid JSON"),
    "no rejected": ([GOOD, GOOD, {"prompt": "a", "chosen": "b"}], "data.jsonl:3: the record has no 'rejected'"),
    "empty completion": ([GOOD, GOOD | {"rejected": " \n"}], "data.jsonl:2: 'rejected' is an empty completion"),
    "a number": ([GOOD, GOOD | {"chosen": 3}], "data.jsonl:2: 'chosen' must be text or a list of messages, not int"),
    "no record": (["", " "], "data.jsonl: the file holds no record"),
    "all the same": ([GOOD | {"rejected": " yes"}] * 3, "data.jsonl: no usable preference pair (0 of 3 records kept; "
                     "chosen and rejected identical, dropped: 3"),
    "one prompt": ([GOOD] * 5, "1 different prompt can't be split into training and held-out data"),
    "unknown shape": ([{"text": "a"}], "data.jsonl:1: a record of unknown shape"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_and_nothing_is_written(tmp_path, capsys, name):
    records, message = BAD_DATA[name]
    file = write_jsonl(tmp_path / "data.jsonl", records)
    assert message in refused(capsys, "dpo", "--dataset", file, "--output-dir", tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_missing_files(tmp_path, capsys):
    run = ["--output-dir", tmp_path / "run"]
    missing = str(tmp_path / "nope.jsonl")
    for command, flag in (("dpo", "--dataset"), ("dpo", "--sft-dataset"), ("dpo", "--eval-dataset"), ("sft", "--dataset"),
                          ("sft", "--eval-dataset")):
        assert f"{missing}: can't be read (No such file or directory)" in refused(capsys, command, flag, missing, *run)
    assert "no config.json there" in refused(capsys, "dpo", "--model", tmp_path / "m", *run)
    assert "is a file, allowed is a folder" in refused(capsys, "dpo", "--reference-cache", __file__, *run)
    assert "no config.json there" in refused(capsys, "dpo", "--ref-model", tmp_path / "m", *run)
    assert f"{missing}: can't be read" in refused(capsys, "generate", "--model", tmp_path, "--prompts", missing)
    assert "no config.json there" in refused(capsys, "generate", "--model", tmp_path, "-p", "x")
    assert "No such file" in refused(capsys, "dpo", "--config", tmp_path / "c.json")
    assert list(tmp_path.iterdir()) == []


def test_identical_pairs_are_counted_and_dropped_or_kept(toy, tmp_path, capsys):
    same = [GOOD | {"prompt": f"Say {i}", "rejected": " yes" if i % 3 == 0 else " no"} for i in range(30)]
    file = write_jsonl(tmp_path / "d.jsonl", same)
    options = ["--config", toy / "tiny.json", "--dataset", file, "--vocab-size", 290, "--dry-run"]
    assert call("dpo", *options) == 0
    out, err = capsys.readouterr()
    assert "20 pairs" in out and "20 of 30 records kept; chosen and rejected identical, dropped: 10" in err
    assert call("dpo", *options, "--identical", "keep") == 0
    out, err = capsys.readouterr()
    assert "30 pairs" in out and "identical, kept: 10" in err


def test_empty_replies_are_refused_unless_they_are_to_be_dropped(toy, tmp_path, capsys):
    lines = (toy / "train.jsonl").read_text().splitlines()
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join([*lines, json.dumps(GOOD | {"chosen": ""})]))
    shape = ["--dim", 16, "--depth", 1, "--heads", 2, "--vocab-size", 330, "--dry-run"]
    for command in ("dpo", "sft"):
        options = [command, "--dataset", file, *shape]
        said = refused(capsys, *options)
        assert f"{file}:{len(lines) + 1}: 'chosen' is an empty completion (--empty drop skips such records)" in said
        assert call(*options, "--empty", "drop") == 0
        assert f"{len(lines)} of {len(lines) + 1} records kept; empty reply, dropped: 1" in capsys.readouterr().err


FLAGS = [
    ("dpo", ["--bata", 1], "unknown flag --bata, did you mean --beta?"),
    ("dpo", ["--learning_rat=1"], "unknown flag --learning-rat, did you mean --learning-rate?"),
    ("generate", ["--temprature", 1], "unknown flag --temprature, did you mean --temperature?"),
    ("dpo", ["--zzzzzz"], "unknown flag --zzzzzz ("),
    ("dpo", ["stray"], "Unrecognized options: stray"),
    ("dpo", ["-x"], "Unrecognized options: -x"),
    ("dpo", ["--max-steps", "many"], "--max-steps: invalid literal for int() with base 10: 'many'"),
    ("dpo", ["--max-steps", 1.5], "--max-steps"),
    ("dpo", ["--max-steps", 0], "--max-steps is 0, allowed is -1"),
    ("dpo", ["--beta", "x"], "--beta"),
    ("dpo", ["--beta", 0], "beta is 0.0, allowed is a finite number > 0"),
    ("dpo", ["--label-smoothing", 0.5], "label_smoothing is 0.5, allowed is a number in [0, .5)"),
    ("dpo", ["--loss-type", "sigmod"], "no loss 'sigmod', did you mean 'sigmoid'?"),
    ("dpo", ["--learning-rate", "nan"], "--learning-rate is nan, allowed is a finite number"),
    ("dpo", ["--learning-rate", -1], "--learning-rate is -1.0, allowed is a finite number >="),
    ("dpo", ["--num-train-epochs", 0], "--num-train-epochs is 0.0, allowed is"),
    ("dpo", ["--batch-size", 0], "--batch-size is 0, allowed is a finite number >= 1"),
    ("dpo", ["--dropout", 1], "--dropout is 1.0, allowed is a finite number >= 0 and <= 0.999"),
    ("dpo", ["--max-length", 1], "--max-length is 1, allowed is a finite number >= 2"),
    ("dpo", ["--heads", 3], "dim is 128, allowed is a multiple of 2 * heads = 6"),
    ("dpo", ["--kv-heads", 3], "attn_kv_heads is 3, allowed is a divisor of heads = 4"),
    ("dpo", ["--truncation-mode", "middle"], "keep_end"),
    ("dpo", ["--adam-beta2", 1], "--adam-beta2 is 1.0, allowed is a finite number >= 0 and <= 0.9999999999999999"),
    ("dpo", ["--adam-epsilon", 0], "--adam-epsilon is 0.0, allowed is a finite number >= 1e-20"),
    ("dpo", ["--seed", 2**64], "--seed is 18446744073709551616, allowed is a finite number >= 0 and <= 9223372036854775807"),
    ("generate", ["-p", "x", "--seed", 2**64], "--seed is 18446744073709551616, allowed is"),
    ("generate", ["-p", "x", "--n", 10**400], "n is 1000"),
    ("dpo", ["--sft-epochs", 1e308], "--sft-epochs is 1e+308, allowed is"),
    ("sft", ["--num-train-epochs", 1e308], "--num-train-epochs is 1e+308, allowed is"),
    *(("dpo", [f"--{name}", 10**400], f"--{name} is 1000") for name in (
        "dim", "depth", "heads", "kv-heads", "vocab-size", "max-seq-len", "max-length", "batch-size", "sft-batch-size",
        "gradient-accumulation-steps", "max-steps", "warmup-steps", "sft-warmup-steps", "logging-steps", "eval-steps",
        "save-steps", "eval-prompts", "eval-samples", "eval-max-new-tokens")),
    *(("dpo", [f"--{name}", ""], f"--{name} is empty, allowed is a path or a name") for name in (
        "output-dir", "model", "dataset", "eval-dataset", "sft-dataset", "ref-model", "run-name", "device")),
    ("sft", ["--dataset", ""], "--dataset is empty, allowed is"),
    ("generate", ["-p", "x", "--model", ""], "--model is empty, allowed is"),
    ("dpo", ["--lr-scheduler-type", "cosin"], "'cosine', 'linear', 'constant'"),
    ("dpo", ["--device", "toaster"], "--device toaster: not usable here"),
    ("dpo", ["--device", "cuda:77"], "--device cuda:77: not usable here"),
    ("dpo", ["--dtype", "float33"], "--dtype"),
    ("dpo", ["--model"], "--model"),
    ("dpo", ["--output-dir", "a\0b"], "--output-dir holds a character that no text has"),
    ("dpo", ["--config"], "--config needs a JSON file"),
    ("dpo", ["--resume", "--overwrite", "--output-dir", "OUT"], "--resume: there is no run in"),
    ("sft", ["--dataset"], "--dataset needs a value"),
    ("sft", ["--dataset-weights", 1, 2], "--dataset-weights has 2 numbers for 1 file,"),
    ("sft", ["--dataset-weights", -1], "--dataset-weights is -1.0, allowed is"),
    ("generate", ["-p", "x", "--top-p", 2], "top_p is 2.0, allowed is a number in [0, 1]"),
    ("generate", ["-p", "x", "--top-k", 0], "top_k is 0, allowed is a number >= 1"),
    ("generate", ["-p", "x", "--beams", 2, "--top-k", 3], "beams is 2 and top_k is 3, allowed is one of them"),
    ("generate", ["-p", "x", "--temperature", "inf"], "error: temperature is inf, allowed is a number >= 0"),
    ("generate", ["-p", "x", "--stop", ""], "stop is ('',), allowed is a list of non-empty strings"),
    ("generate", ["-p", "x", "--prompts", "y"], "--prompt and --prompts are both given"),
    ("generate", ["-p", "x", "--system", "y"], "--system goes with --chat"),
    ("generate", ["--prompts", "SYSTEM", "--chat", "--system", "y"], "prompt 2 begins with a system turn and --system is"),
    ("generate", ["-p", "x", "--dtype", "float33"], "dtype is 'float33', allowed is float32, bfloat16 or float16"),
    ("generate", ["-p", "\udcff"], "--prompt holds a character that no text has"),
    ("generate", ["-p"], "--prompt"),
]


@pytest.mark.parametrize(("command", "arguments", "message"), FLAGS)
def test_wrong_flags(tmp_path, toy, chatty, capsys, command, arguments, message):
    run = ["--output-dir", tmp_path / "run"]
    small = {"dpo": ["--dataset", toy / "train.jsonl", *run], "sft": run, "generate": ["--model", chatty]}[command]
    system = toy / "system.jsonl"
    write_jsonl(system, [{"prompt": "x"}, {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}])
    arguments = [str(a).replace("OUT", str(tmp_path / "run")).replace("SYSTEM", str(system)) for a in arguments]
    assert message in refused(capsys, command, *small, *arguments)
    assert list(tmp_path.iterdir()) == []


CONFIGS = [
    ("{", "no JSON"),
    ("[1]", "holds a list, allowed is an object of settings"),
    ('{"bata": 1}', "no setting 'bata', did you mean 'beta'"),
    ('{"bf16": 1}', "bf16 is 1, allowed is true or false"),
    ('{"depth": true}', "depth is true, allowed is a number or text"),
    ('{"dataset": ["a", "b"]}', 'dataset is ["a", "b"], allowed is a single value'),
    ('{"max_steps": {"a": 1}}', "allowed is a single value"),
    ('{"max_steps": "x"}', "c.json: --max-steps: invalid literal"),
    ('{"f_alpha": "x"}', "c.json: --f-alpha: could not convert string to float: 'x'"),
    ('{"f_alpha": null}', "c.json: --f-alpha: could not convert"),
    ('{"beta": "x"}', "c.json: --beta: could not convert string to float: 'x'"),
    ('{"dtype": null}', "c.json: invalid choice 'None' for argument '--dtype'"),
    ('{"learning_rate": NaN}', "c.json: --learning-rate is nan"),
    ('{"depth": 1.5}', "c.json: --depth"),
    ('{"max_steps": 0}', "c.json: --max-steps is 0"),
    ('{"output_dir": ""}', "c.json: --output-dir is empty"),
]


@pytest.mark.parametrize(("text", "message"), CONFIGS)
def test_wrong_config_files(tmp_path, capsys, text, message):
    (tmp_path / "c.json").write_text(text)
    run = [] if "output_dir" in text else ["--output-dir", tmp_path / "run"]
    assert message in refused(capsys, "dpo", "--config", tmp_path / "c.json", *run)
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"beta": 0.1, "seed": 1}')
    for flag, value in (("--beta", "y"), ("--seed", -1)):
        assert refused(capsys, "dpo", "--config", tmp_path / "c.json", flag, value).startswith(f"error: {flag}")


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2 and "no command 'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["generat"])
    assert stop.value.code == 2 and "did you mean 'generate'" in capsys.readouterr().err
    assert main([]) is None and "sft" in capsys.readouterr().out


DAMAGES = {
    "NaN": (lambda f, t: t["model.embed_tokens.weight"][3, 4].fill_(float("nan")), "not finite"),
    "other shape": (lambda f, t: t.update({"model.norm.weight": torch.ones(31)}), "has shape (31,), allowed is the shape that"),
    "lacking": (lambda f, t: t.pop("model.norm.weight"), "lacks tensor model.norm.weight"),
    "no tokenizer": (lambda f, t: [p.unlink() for p in f.glob("tokenizer*")], "there is no tokenizer in this folder"),
    "larger tokenizer": (lambda f, t: ByteTokenizer((*ROLE_MARKERS, "<|more|>")).save(f), "the tokenizer has 264 ids"),
    "broken tokenizer": (lambda f, t: (f / "tokenizer_config.json").write_text("["), "not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models_are_refused(tmp_path, toy, chatty, capsys, name):
    damage, message = DAMAGES[name]
    model = tmp_path / "model"
    shutil.copytree(chatty, model)
    tensors = load_file(model / "model.safetensors")
    damage(model, tensors)
    save_file(tensors, model / "model.safetensors")
    out = ["--config", toy / "given.json", "--output-dir", tmp_path / "run"]
    assert message in refused(capsys, "dpo", "--model", model, *out)
    assert message in refused(capsys, "dpo", "--ref-model", model, *out)
    assert message in refused(capsys, "sft", "--model", model, "--output-dir", tmp_path / "run")
    assert message in refused(capsys, "generate", "--model", model, "-p", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "no half-written run stays"


UNUSED = [("dpo", "--dim", 32), ("dpo", "--vocab-size", 400), ("dpo", "--sft-epochs", 2), ("dpo", "--sft-dataset", "a.txt"),
          ("sft", "--dropout", 0.1), ("sft", "--kv-heads", 1)]


@pytest.mark.parametrize(("command", "flag", "value"), UNUSED)
def test_settings_that_a_given_model_would_ignore_are_refused(tmp_path, chatty, capsys, command, flag, value):
    line = refused(capsys, command, "--model", chatty, flag, value, "--output-dir", tmp_path / "run")
    assert line == f"error: {flag} is for a model from scratch, but --model is {chatty}: allowed is one of them"


def test_a_revision_needs_a_model(tmp_path, capsys):
    line = refused(capsys, "dpo", "--revision", "main", "--output-dir", tmp_path / "run")
    assert line == "error: --revision main goes with --model"


def test_columns_by_other_names(toy, tmp_path, capsys):
    lines = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    renamed = write_jsonl(tmp_path / "d.jsonl", [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in lines])
    columns = ["--columns", "prompt=q", "chosen=good", "rejected=bad"]
    shape = ["--dim", 16, "--depth", 1, "--heads", 2, "--vocab-size", 330, "--seed", 3, "--dry-run"]
    assert call("dpo", "--dataset", renamed, *shape, *columns) == 0
    theirs = capsys.readouterr().out
    assert call("dpo", "--dataset", toy / "train.jsonl", *shape) == 0
    assert capsys.readouterr().out == theirs
    assert call("sft", "--dataset", renamed, *shape, *columns) == 0
    assert "first of 29 records" in capsys.readouterr().out
    # other files of the run may have our names
    assert call("dpo", "--dataset", renamed, "--eval-dataset", toy / "test.jsonl", *shape, *columns) == 0
    assert call("dpo", "--dataset", toy / "train.jsonl", "--sft-dataset", renamed, *shape, *columns) == 0
    assert call("sft", "--dataset", renamed, toy / "train.jsonl", "--eval-dataset", toy / "test.jsonl", *shape, *columns) == 0
    assert "first of 60 records" in capsys.readouterr().out
    for columns, message in ((["chosen"], "--columns has 'chosen', allowed are settings like chosen=better"),
                             (["chosen=a", "chosen=b"], "each name once"), (["chosen=nope"], "d.jsonl:1: "),
                             (["chosne=good"], "chosne")):
        assert message in refused(capsys, "dpo", "--dataset", renamed, *shape, "--columns", *columns)


def test_a_tenth_is_held_out_by_prompt(tmp_path, capsys):
    """Every prompt lies on one side, a seed gives the same split, another one another."""
    file = write_jsonl(tmp_path / "d.jsonl", [GOOD | {"prompt": f"Say {i % 50}", "chosen": f" yes {i}"} for i in range(100)])

    def split(seed: int) -> tuple[list[str], list[str]]:
        data, examples = preference_data(PreferenceDataOptions(dataset=str(file)), seed)
        train = list(data.train())
        assert len(train) == data.count and [e.completion for e in examples()] == [p.chosen for p in train]
        return [p.prompt for p in train], [p.prompt for p in data.held_out]

    train, held_out = split(0)
    assert len(set(held_out)) == 5 and len(held_out) == 10 and not set(train) & set(held_out) and len(set(train)) == 45
    assert split(0) == (train, held_out) != split(1)


def test_a_reference_with_another_tokenizer_is_refused(finished, toy, chatty, tmp_path, capsys):
    run, _ = finished
    line = refused(capsys, "dpo", "--config", toy / "given.json", "--model", run / "reference", "--ref-model", chatty,
                   "--output-dir", tmp_path / "run")
    assert "has another tokenizer than the policy" in line


def test_a_vocabulary_that_is_too_small(toy, tmp_path, capsys):
    line = refused(capsys, "dpo", "--config", toy / "tiny.json", "--vocab-size", 100, "--output-dir", tmp_path / "run")
    assert "vocab_size 100 is too small; for these texts: 3" in line and list(tmp_path.iterdir()) == []


def test_output_folders_in_use(finished, toy, tmp_path, capsys):
    run, _ = finished
    before = snapshot(run)
    options = ["--config", toy / "tiny.json", "--output-dir"]
    assert "was made with beta = None, now it is 0.3" in refused(capsys, "dpo", *options, run, "--beta", 0.3)
    assert "holds a run of dpo" in refused(capsys, "sft", "--output-dir", run, "--max-steps", 1)
    assert "holds files but no run" in refused(capsys, "dpo", *options, run / "policy", "--overwrite")
    assert "holds files but no run" in refused(capsys, "dpo", *options, toy, "--overwrite")
    assert "there is no run in" in refused(capsys, "dpo", *options, tmp_path / "new", "--resume")
    assert "both given" in refused(capsys, "dpo", *options, run, "--resume", "--overwrite")
    assert "is a file" in refused(capsys, "dpo", *options, toy / "tiny.json")
    assert snapshot(run) == before and list(tmp_path.iterdir()) == []


def test_a_live_process_keeps_the_folder(toy, tmp_path, capsys):
    """A second process is refused while the first one trains, and the first goes on undisturbed."""
    command = [sys.executable, ROOT / "train_dpo.py", "--config", toy / "tiny.json", "--output-dir", tmp_path / "run",
               "--max-steps", "100000"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as first:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "run/latest").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            for extra in ([], ["--overwrite"]):
                line = refused(capsys, "dpo", *command[2:], *extra)
                assert "is in use by another process" in line
            assert first.poll() is None
            first.send_signal(signal.SIGTERM)
            assert first.wait(60) == 130
        finally:
            first.kill()
    assert (tmp_path / "run/latest").exists() and not (tmp_path / "run/policy").exists()


def test_wandb_without_a_login_is_refused(toy, tmp_path):
    """And leaves nothing behind; with WANDB_MODE=offline the same command works (see test_training.py)."""
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path / "home")}
    options = ["--config", toy / "tiny.json", "--output-dir", tmp_path / "run", "--report-to", "wandb"]
    done = subprocess.run([sys.executable, ROOT / "train_dpo.py", *options], env=environment, cwd=ROOT, capture_output=True,
                          text=True, timeout=120, stdin=subprocess.DEVNULL)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: wandb can't start (") and "WANDB_MODE=offline" in last, done.stderr
    assert not (tmp_path / "run").exists()


# -- real preferences -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HH.exists(), reason="../shared/data/hh-harmless-base.train.jsonl.gz is not there")
def test_hh_dialogues(tmp_path, capsys):
    """The first 120 dialogues of Anthropic's HH-RLHF, from the file as it is distributed, through every stage."""
    with gzip.open(HH, "rt", encoding="utf-8") as file, gzip.open(tmp_path / "hh.jsonl.gz", "wt", encoding="utf-8") as part:
        part.writelines(line for line, _ in zip(file, range(120), strict=False))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"vocab_size": 420, "max_length": 96}))
    assert call("dpo", "--config", tmp_path / "tiny.json", "--dataset", tmp_path / "hh.jsonl.gz",
                "--output-dir", tmp_path / "run") == 0
    numbers = json.loads((tmp_path / "run/evaluation.json").read_text())
    for key in ("preference_accuracy", "preference_accuracy_interval", "perplexity_policy", "perplexity_policy_interval", "kl"):
        assert key in numbers
    assert "win_rate" not in numbers and not (tmp_path / "run/gold.png").exists()
    tokenizer = load_pretrained(tmp_path / "run/policy")[1]
    assert tokenizer.chat_template == DEFAULT_TEMPLATE and set(ROLE_MARKERS) <= set(tokenizer.markers)
    assert "prompts cut" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="../shared/data/hh-harmless-base.train.jsonl.gz is not there")
def test_the_whole_hh_file(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"vocab_size": 512, "max_length": 64, "sft_epochs": 0.001}))
    done = subprocess.run([sys.executable, ROOT / "train_dpo.py", "--config", tmp_path / "tiny.json", "--dataset", HH,
                           "--output-dir", tmp_path / "run"], capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "preference accuracy" in done.stdout and (tmp_path / "run/report.md").exists()
