"""Trainings of LoRA adapters by the real programs: small checkpoints, exact resume, quantised bases, what peft opens."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, ids, tiny
from safetensors.torch import load_file
from test_distributed import errors, torchrun
from test_kill import SUICIDE
from test_lora import GPT2, close
from test_programs import ENVIRONMENT, LOOP, ROOT, call, refused, snapshot
from test_training import fit, killed, same_bits

from xalign import load_pretrained, save_pretrained
from xalign.adapters import adapt, load_adapter
from xalign.checkpoint import load_state
from xalign.config import LoRAOptions
from xalign.errors import CheckpointError, ConfigError
from xalign.nn.lora import LoRALinear, apply_lora, has_lora, lora_state_dict, merge
from xalign.nn.quantize import quantize
from xalign.tokenizers import ByteTokenizer
from xalign.watch import TIMED

ADAPTERS = ["--lora-r", 4, "--lora-alpha", 8, "--lora-dropout", 0.1, "--learning-rate", 1e-2]
QUANTISED = {"plain": [], "int8": ["--load-in-8bit"], "int4": ["--load-in-4bit"]}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A random model, a tiny part of the toy world, and settings for it."""
    folder = tmp_path_factory.mktemp("adapters")
    lines = (ROOT / "data/test.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:30]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(lines[30:36]) + "\n")
    shape = {"dim": 64, "attn_dim_head": 16, "attn_kv_heads": 2, "ff_inner_dim": 96, "max_seq_len": 256, "tie_embedding": True}
    save_pretrained(tiny(**LLAMA, **shape, sharp=3.0, num_tokens=ByteTokenizer().vocab_size), folder / "base", ByteTokenizer())
    settings = LOOP | {"model": str(folder / "base"), "max_length": 128, "dataset": str(folder / "train.jsonl"),
                       "eval_dataset": str(folder / "test.jsonl")}
    (folder / "tiny.json").write_text(json.dumps(settings))
    (folder / "sft.json").write_text(json.dumps({k: v for k, v in settings.items() if k in (
        "model", "max_length", "dataset", "eval_dataset", "max_steps", "save_steps", "eval_steps", "batch_size")}))
    return folder


@pytest.fixture(scope="module", params=["plain", "int4", pytest.param("int8", marks=pytest.mark.slow)])
def finished(request, toy) -> Path:
    """A finished run of adapters on each kind of base."""
    run = toy / request.param
    assert call("dpo", "--config", toy / "tiny.json", "--output-dir", run, *ADAPTERS, *QUANTISED[request.param]) == 0
    return run


def texts(capsys, *arguments) -> str:
    capsys.readouterr()
    assert call("generate", "-p", "Once a gentle bear", "-n", 2, "--seed", 1, "--max-new-tokens", 12, *arguments) == 0
    return capsys.readouterr().out


# -- the programs ---------------------------------------------------------------------------------------------------


def test_dpo_end_to_end(finished, toy, capsys):
    assert {p.name for p in finished.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "samples.jsonl", "checkpoint-4", "checkpoint-6", "latest", "reference",
        "adapter", "policy", "report.md", "report.html", "evaluation.json", "training.png", "rewards.png", "gold.png",
        "lengths.png"}
    assert [p for p in (finished / "checkpoint-6").rglob("*") if p.is_file()] == [finished / "checkpoint-6/training/state.pt"]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/kl"] == 0 and lines[0]["eval/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert lines[-1]["step"] == 6 and lines[-1]["eval/kl"] != 0
    base, _ = load_pretrained(toy / "base")
    assert same_bits(load_pretrained(finished / "reference")[0], base)
    trained = load_adapter_on(base, finished / "adapter")
    assert all(layer.lora_b.abs().max() > 1e-3 for layer in trained.modules() if isinstance(layer, LoRALinear))
    assert same_bits(merge(trained), load_pretrained(finished / "policy")[0]), "merged into the plain weights"
    numbers = json.loads((finished / "evaluation.json").read_text())
    assert numbers["perplexity_policy"] != numbers["perplexity_reference"]
    for folder in ("adapter", "checkpoint-6"):
        assert texts(capsys, "--model", toy / "base", "--adapter", finished / folder) == texts(
            capsys, "--model", finished / "policy")
    assert "is finished" not in texts(capsys, "--model", toy / "base", "--adapter", finished / "adapter", "--load-in-8bit")


def load_adapter_on(model, folder: Path):
    load_adapter(model, folder)
    return model


def test_peft_opens_the_adapter_and_transformers_the_policy(finished, toy):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = ids(2, 9, 200)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy / "base"), finished / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(finished / "policy")
    close(theirs(tokens).logits, whole(tokens).logits, 1e-4)
    close(load_pretrained(finished / "policy")[0](tokens), whole(tokens).logits, 1e-4)
    config = json.loads((finished / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, str(toy / "base"))


def test_a_run_of_adapters_is_found_finished_and_its_policy_made_again(finished, toy, capsys):
    settings = json.loads((finished / "config.json").read_text())
    quantised = [f"--{flag.replace('_', '-')}" for flag in ("load_in_8bit", "load_in_4bit") if settings[flag]]
    command = ["dpo", "--config", toy / "tiny.json", "--output-dir", finished, *ADAPTERS, *quantised]
    before = snapshot(finished)
    assert call(*command) == 0 and "is finished" in capsys.readouterr().err and snapshot(finished) == before
    shutil.rmtree(finished / "policy")
    assert call(*command) == 0
    for file in ("policy/model.safetensors", "adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (finished / file).read_bytes() == before[file], file
    assert call(*command, "--lora-alpha", 9) == 2
    assert "was made with lora_alpha = 8.0, now it is 9.0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--no-precompute-ref-log-probs"], ["--bf16", "--gradient-checkpointing"]])
def test_the_reference_are_the_weights_without_adapters(options, toy, tmp_path):
    """Asked at every step or known before, it is the same training, and no copy of the model is made for it."""
    command = ["dpo", "--config", toy / "tiny.json", *ADAPTERS[:-4], "--learning-rate", 1e-2]
    assert call(*command, "--output-dir", tmp_path / "a", *options) == 0
    assert call(*command, "--output-dir", tmp_path / "b", *options[1:], *options[:1] * ("--bf16" in options)) == 0
    ours, theirs = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in "ab")
    assert all(torch.allclose(t, theirs[name], atol=1e-5) for name, t in ours.items())


def test_sft(toy, tmp_path, capsys):
    command = ["sft", "--config", toy / "sft.json", "--lora-r", 4, "--lora-target-modules", "q_proj", "down", "--load-in-8bit"]
    assert call(*command, "--output-dir", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/run/policy\n" and f"merged into the weights of {toy}/base as they were before they were" in err
    base, _ = load_pretrained(toy / "base")
    expected = merge(load_adapter_on(copy.deepcopy(base), tmp_path / "run/adapter"))
    policy, _ = load_pretrained(tmp_path / "run/policy")
    assert same_bits(policy, expected)
    changed = {name.split(".")[-2] for (name, a), b in zip(policy.state_dict().items(), base.state_dict().values(), strict=True)
               if not torch.equal(a, b)}
    assert changed == {"to_q", "down"}


@pytest.mark.slow
def test_adapters_of_a_model_from_scratch_come_after_its_imitation(toy, tmp_path, capsys):
    settings = json.loads((toy / "tiny.json").read_text())
    del settings["model"]
    (tmp_path / "c.json").write_text(json.dumps(settings | {
        "dim": 32, "depth": 1, "heads": 2, "vocab_size": 330, "sft_epochs": 0.5, "sft_batch_size": 8}))
    assert call("dpo", "--config", tmp_path / "c.json", "--output-dir", tmp_path / "run", *ADAPTERS, "--use-rslora") == 0
    assert (tmp_path / "run/sft/checkpoint-2/model.safetensors").exists() and (tmp_path / "run/adapter").exists()
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "run/reference") and config["lora_alpha"] == 16.0, "8 / sqrt(4)"


@pytest.mark.slow
def test_what_has_no_place_in_pefts_folder_is_merged_all_the_same(toy, tmp_path, capsys):
    """GPT-2's queries and values share a tensor in its Hugging Face folder."""
    shape = {"dim": 64, "attn_dim_head": 16, "max_seq_len": 256, "num_tokens": ByteTokenizer().vocab_size, "sharp": 3.0}
    save_pretrained(tiny(**shape, **GPT2), tmp_path / "gpt2", ByteTokenizer())
    command = ["dpo", "--config", toy / "tiny.json", "--output-dir", tmp_path / "run", *ADAPTERS, "--model", tmp_path / "gpt2"]
    assert call(*command, "--lora-target-modules", "to_q", "to_v") == 0
    assert "there is no" in (err := capsys.readouterr().err) and "shares its tensor" in err
    assert not (tmp_path / "run/adapter").exists()
    base, _ = load_pretrained(tmp_path / "gpt2")
    expected = merge(load_adapter_on(base, tmp_path / "run/checkpoint-6"))
    assert same_bits(expected, load_pretrained(tmp_path / "run/policy")[0])


REFUSED = [
    ("dpo", ["--load-in-4bit"], "--load-in-4bit without --lora-r: quantised weights can't be trained, allowed is to train"),
    ("sft", ["--load-in-8bit"], "--load-in-8bit without --lora-r: quantised weights can't be trained"),
    ("dpo", ["--lora-alpha", 4], "--lora-alpha goes with --lora-r"),
    ("dpo", ["--lora-target-modules", "to_q"], "--lora-target-modules goes with --lora-r"),
    ("dpo", ["--use-rslora"], "--use-rslora goes with --lora-r"),
    ("dpo", ["--lora-r", 0], "--lora-r is 0, allowed is a finite number >= 1"),
    ("dpo", ["--lora-r", 4, "--lora-alpha", 0], "--lora-alpha is 0.0, allowed is a finite number >= 1e-06"),
    ("dpo", ["--lora-r", 4, "--lora-dropout", 1], "--lora-dropout is 1.0, allowed is a finite number >= 0 and <= 0.999"),
    ("dpo", ["--lora-r", 4, "--lora-target-modules", "to_w"], "--lora-target-modules: targets has 'to_w', did you mean"),
    ("sft", ["--lora-r", 4, "--lora-target-modules", "c_attn"], "'c_attn'; allowed are to_q, to_k, to_v, to_out, gate, up,"),
    ("dpo", ["--lora-r", 4, "--load-in-8bit", "--load-in-4bit"], "load_in_8bit and load_in_4bit are both given"),
    ("dpo", ["--lora-r", 4, "--load-in-4bit", "--quant-group-size", 33], "group_size is 33, allowed is 32, 64, 128, 256"),
    ("dpo", ["--lora-r", 4, "--load-in-4bit", "--quant-type", "nf4"], "NF4 needs bitsandbytes"),
    ("sft", ["--lora-r", 4, "NO MODEL"], "--lora-r is 4 for a model from scratch, allowed are adapters of a --model"),
    ("generate", ["-p", "x", "--adapter", "HERE"], "no adapter_config.json there, allowed is a folder of adapters"),
]


@pytest.mark.parametrize(("command", "arguments", "message"), REFUSED)
def test_mistakes_are_one_line_before_anything_is_done(command, arguments, message, toy, tmp_path, capsys):
    if "nf4" in arguments:
        try:
            import bitsandbytes  # noqa: F401

            pytest.skip("bitsandbytes is there")
        except ImportError:
            pass
    config = {"dpo": ["--config", toy / "tiny.json"], "sft": ["--config", toy / "sft.json"],
              "generate": ["--model", toy / "base"]}[command]
    if "NO MODEL" in arguments:
        arguments, config = arguments[:-1], ["--dataset", toy / "train.jsonl"]
    run = [] if command == "generate" else ["--output-dir", tmp_path / "run"]
    assert message in refused(capsys, command, *config, *run, *[str(a).replace("HERE", str(tmp_path)) for a in arguments])
    assert list(tmp_path.iterdir()) == []


def test_the_models_own_names_and_a_seed():
    plain = tiny(**LLAMA)
    for given, found in (((), 7), (("all-linear",), 7), (("q_proj", "to_v"), 2), (("gate_proj", "gate"), 1)):
        ours = copy.deepcopy(plain)
        adapt(ours, LoRAOptions(lora_r=2, lora_target_modules=given))
        assert sum(isinstance(layer, LoRALinear) for layer in ours.modules()) == 2 * found
    gpt2 = tiny(**GPT2)
    adapt(gpt2, LoRAOptions(lora_r=2, lora_target_modules=("c_proj",)))
    assert {n.rpartition(".")[2] for n, m in gpt2.named_modules() if isinstance(m, LoRALinear)} == {"to_out", "down"}
    one, other, third = (copy.deepcopy(plain) for _ in range(3))
    for net, seed in ((one, 1), (other, 1), (third, 2)):
        adapt(net, LoRAOptions(lora_r=2), seed)
    assert same_bits(one, other) and not same_bits(one, third)
    adapt(plain, LoRAOptions())
    assert not has_lora(plain)


def test_dry_run_tells_of_adapters(toy, tmp_path, capsys):
    shown = {}
    for name, options in {"whole": [], **{name: [*ADAPTERS, *more] for name, more in QUANTISED.items()}}.items():
        assert call("dpo", "--config", toy / "tiny.json", "--output-dir", tmp_path / "run", "--dry-run", *options) == 0
        out = capsys.readouterr().out
        shown[name] = out
        assert ("of adapters, which are trained" in out) == (name != "whole")
        assert ("  reference (after training)" in out) == (name != "whole"), "no second copy of the model in training"
    assert not (tmp_path / "run").exists()


# -- checkpoints ----------------------------------------------------------------------------------------------------


def adapted(bits: int = 0, dropout: float = 0.3, seed: int = 0):
    torch.manual_seed(seed)
    plain = tiny(**LLAMA)
    return apply_lora(quantize(plain, bits) if bits else plain, 2, 4.0, dropout)


def adapters_equal(one, other) -> bool:
    a, b = lora_state_dict(one), lora_state_dict(other)
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same numbers, to the bit (their files differ: a pickle knows which strings are one)."""
    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
        return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else a == b

    return equal(load_state(one), load_state(other))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("bits", [0, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop", [pytest.param(0, marks=pytest.mark.slow), 3, 8])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kind, bits, stop, monkeypatch):
    monkeypatch.setattr("test_training.pairs_logps", known_reference)
    options = {"save_steps": 3, "learning_rate": 1e-2}
    model, lines = fit(tmp_path / "a", kind, model=adapted(bits), **options)
    killed(tmp_path / "b", kind, stop=stop, model=adapted(bits), **options)
    again, more = fit(tmp_path / "b", kind, model=adapted(bits, seed=5 * (stop > 3)), **options)
    assert more == lines and adapters_equal(again, model)
    assert not adapters_equal(model, adapted(bits))
    assert same_state(tmp_path / "a/checkpoint-9", tmp_path / "b/checkpoint-9")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"checkpoint-6", "checkpoint-9", "latest", "metrics.jsonl"}
    assert {p.name for p in (tmp_path / "a/checkpoint-9").iterdir()} == {"training"}


def known_reference(dpo, none, pairs, pad_id):
    from xalign.evaluation.metrics import pairs_logps

    assert none is None and dpo.ref_model is None
    with dpo.reference() as reference:
        return pairs_logps(dpo, reference, pairs, pad_id)


@pytest.mark.parametrize("damage", ["truncate", "NaN", "missing", "junk"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, capsys, damage):
    model, lines = fit(tmp_path / "a", model=adapted(), save_steps=2)
    killed(tmp_path / "b", stop=7, model=adapted(), save_steps=2)
    file = tmp_path / "b/checkpoint-6/training/state.pt"
    if damage == "truncate":
        os.truncate(file, 3000)
    elif damage == "missing":
        file.unlink()
    elif damage == "junk":
        file.write_bytes(b"junk" * 500)
    else:
        state = torch.load(file)
        next(iter(state["adapters"].values()))[0, 0] = float("nan")
        torch.save(state, file)
    capsys.readouterr()
    again, more = fit(tmp_path / "b", model=adapted(), save_steps=2)
    told = capsys.readouterr().err
    assert "warning:" in told and "checkpoint-6" in told and "resumed after step 4 of 9" in told
    assert more == lines and adapters_equal(again, model)


def test_adapters_of_other_weights_are_refused(tmp_path):
    """The frozen weights are no part of a checkpoint: whoever changed them would go on with something that nobody trained."""
    killed(tmp_path / "b", stop=7, model=adapted(), save_steps=2)
    other = adapted()
    with torch.no_grad():
        other.token_emb.weight[3, 3] += 1e-3
    with pytest.raises(CheckpointError, match="checkpoint-6 holds adapters of other weights than the model's"):
        fit(tmp_path / "b", model=other, save_steps=2)
    assert load_state(tmp_path / "b/checkpoint-6")["step"] == 6


def test_a_checkpoint_is_a_folder_of_adapters(tmp_path):
    model, _ = fit(tmp_path / "a", model=adapted())
    assert adapters_equal(load_adapter_on(tiny(**LLAMA), tmp_path / "a/checkpoint-9"), model)
    fit(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"no adapter_config.json there"):
        load_adapter(tiny(**LLAMA), tmp_path / "whole/checkpoint-9")
    with pytest.raises(ConfigError, match="allowed is"):
        load_adapter(tiny(**LLAMA, dim=16), tmp_path / "a/checkpoint-9")


# -- processes ------------------------------------------------------------------------------------------------------


def command(toy: Path, run: Path, *flags) -> list[str]:
    return ["--config", str(toy / "tiny.json"), "--output-dir", str(run), *map(str, [*ADAPTERS, *flags])]


def lines_of(run: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


MOMENTS = {
    "in a step": ("xalign.training", "schedule", 4, "before"),
    "while a checkpoint is written": ("torch", "save", 2, "after"),
    "before the policy is written": ("xalign.train", "merge", 1, "after"),
    "in the evaluation": ("xalign.evaluation.metrics", "sample", 1, "after"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_and_resume(toy, tmp_path, moment):
    whole = toy / "int4"
    if not (whole / "report.md").exists():
        assert call("dpo", *command(toy, whole, "--load-in-4bit")) == 0
    module, name, count, when = MOMENTS[moment]
    started = subprocess.run([sys.executable, "-c", SUICIDE, module, name, str(count), when, *command(
        toy, tmp_path / "run", "--load-in-4bit")], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert started.returncode == -9, started.stderr[-500:]
    again = subprocess.run([sys.executable, ROOT / "train_dpo.py", *command(toy, tmp_path / "run", "--load-in-4bit")],
                           env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert same_state(tmp_path / "run/checkpoint-6", whole / "checkpoint-6")
    for file in ("adapter/adapter_model.safetensors", "policy/model.safetensors", "samples.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes(), file
    assert {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*")} == {
        str(p.relative_to(whole)) for p in whole.rglob("*")}


@pytest.mark.slow
def test_two_processes_send_the_adapters_gradients_alone(toy, tmp_path):
    """And end near one process with twice the batch."""
    counted = ("import sys; from xalign import distributed; real = distributed.sum_gradients\n"
               "def summed(parameters):\n    parameters = list(parameters)\n    real(parameters)\n"
               "    print('sent', sum(p.numel() for p in parameters if p.grad is not None), file=sys.stderr)\n"
               "distributed.sum_gradients = summed\nfrom xalign.cli import main\nmain(sys.argv[1:], 'dpo')\n")
    (tmp_path / "counted.py").write_text(counted)
    alike = ["--lora-dropout", 0, "--logging-steps", 1, "--learning-rate", 1e-3]
    done = subprocess.run(torchrun(str(tmp_path / "counted.py"), *command(toy, tmp_path / "two", *alike, "--batch-size", 2)),
                          env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    trained = sum(t.numel() for t in load_file(tmp_path / "two/adapter/adapter_model.safetensors").values())
    assert {s.split()[0] for s in done.stderr.split("sent ")[1:]} == {str(trained)}
    assert call("dpo", *command(toy, tmp_path / "one", *alike, "--batch-size", 4)) == 0
    for line, other in zip(lines_of(tmp_path / "two")[1:], lines_of(tmp_path / "one")[1:], strict=True):
        assert line.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)
    ours, theirs = (load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("two", "one"))
    assert all(torch.allclose(t, theirs[name], atol=1e-4) for name, t in ours.items())
    assert not errors(done.stderr)
