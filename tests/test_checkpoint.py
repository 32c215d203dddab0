"""Checkpoint folders: exact round trips, transformers reads ours and we theirs, damage is told in one line."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, ids, llama, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from xalign import DPO, AutoregressiveWrapper, checkpoint, load_pretrained, save_pretrained
from xalign.checkpoint import atomic_folder, load_state
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS
from xalign.disk import write_atomically
from xalign.errors import CheckpointError, ConfigError, DataError, XalignError
from xalign.tokenizers import ByteTokenizer

SHAPES = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_embedding": True},
    "llama, grouped": LLAMA | {"attn_kv_heads": 2, "rotary_base": 5000.0, "norm_eps": 1e-6, "ff_inner_dim": 40},
    "llama, biases": LLAMA | {"attn_qkv_bias": True, "attn_out_bias": True, "ff_no_bias": False},
    "x-transformers' default": {},
    "gelu, tied": {"tie_embedding": True, "use_rmsnorm": True},
    "alibi, qk norm": {"alibi_pos_bias": True, "attn_qk_norm": True},
    "partial rotary, parallel": {"rotary_pos_emb": True, "rotary_dim": 4, "parallel_residual": True, "attn_qkv_bias": True},
    "no positions": {"use_abs_pos_emb": False},
}
XALIGN = {"x-transformers' default", "gelu, tied", "alibi, qk norm", "partial rotary, parallel", "no positions"}


def equal_bits(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.fixture
def folder(tmp_path):
    """A sound Llama-shaped folder with a byte tokenizer."""
    save_pretrained(tiny(**LLAMA, num_tokens=300), tmp_path / "model", ByteTokenizer())
    return tmp_path / "model"


# -- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_round_trip_is_exact(tmp_path, name, dtype):
    model = tiny(**SHAPES[name]).to(dtype)
    save_pretrained(model, tmp_path / "a")
    again, tokenizer = load_pretrained(tmp_path / "a")
    assert tokenizer is None and not again.training
    equal_bits(model, again)
    assert again.config == model.config and (again.to_logits is None) == (model.to_logits is None)
    assert json.loads((tmp_path / "a/config.json").read_text())["model_type"] == ("xalign" if name in XALIGN else "llama")
    tokens = ids(2, 9)
    assert torch.equal(model(tokens), again(tokens))
    save_pretrained(again, tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_config_has_the_spelling_of_transformers_4_and_5(tmp_path, dtype):
    save_pretrained(tiny(**LLAMA, rotary_base=5000.0).to(dtype), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert config["dtype"] == config["torch_dtype"] == name
    assert config["rope_theta"] == 5000.0 and config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize("spelling", [4, 5])
def test_either_spelling_alone_is_read(tmp_path, spelling):
    model = tiny(**LLAMA, rotary_base=5000.0)
    save_pretrained(model, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "torch_dtype") if spelling == 5 else ("rope_parameters", "dtype"):
        del config[key]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert torch.equal(load_pretrained(tmp_path / "m")[0](ids(2, 9)), model(ids(2, 9)))


def test_spellings_that_disagree_are_refused(folder):
    change_config(folder, rope_theta=500000.0)
    with pytest.raises(CheckpointError, match=r"rope_theta is (10000|500000)\.0 in one place and (10000|500000)\.0 in another"):
        load_pretrained(folder)


def test_tokenizer_template_and_ids_travel(tmp_path):
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    save_pretrained(tiny(num_tokens=tokenizer.vocab_size), tmp_path / "m", tokenizer)
    again = load_pretrained(tmp_path / "m")[1]
    text = "a <|user|> \t\n tab, 🦊"
    assert again.chat_template == DEFAULT_TEMPLATE and again.encode(text) == tokenizer.encode(text)
    ends = json.loads((tmp_path / "m/generation_config.json").read_text())
    config = json.loads((tmp_path / "m/config.json").read_text())
    for values in (ends, config):
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (257, 258, 256)


def test_wrappers_are_unwrapped(tmp_path):
    model = tiny(**LLAMA)
    dpo = DPO(AutoregressiveWrapper(model))
    with torch.no_grad():
        next(dpo.ref_model.parameters()).add_(1)
    for i, wrapper in enumerate((AutoregressiveWrapper(model), dpo)):
        save_pretrained(wrapper, tmp_path / str(i))
        equal_bits(load_pretrained(tmp_path / str(i))[0], model)
    with pytest.raises(CheckpointError, match="Linear can't be saved"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_dtype_and_device_can_be_chosen(folder):
    for name, dtype in (("bfloat16", torch.bfloat16), ("fp16", torch.float16), (torch.float64, torch.float64)):
        model, _ = load_pretrained(folder, dtype=name, device="cpu")
        assert {p.dtype for p in model.parameters()} == {dtype}
    for wrong in ("float33", "int8", "Tensor", "nn", "float8_e4m3fn", torch.float8_e4m3fn, torch.int8):
        with pytest.raises(CheckpointError, match=rf"dtype is {wrong!r}, allowed is float32, bfloat16 or float16 \(or float64"):
            load_pretrained(folder, dtype=wrong)
    for wrong in ("foo", "meta", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ConfigError, match=f"device is '{wrong}', not usable here") as caught:
            load_pretrained(folder, device=wrong)
        assert "\n" not in str(caught.value)


def test_a_loaded_model_can_be_trained_and_draws_nothing(folder):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model, _ = load_pretrained(folder)
    assert torch.equal(torch.rand(1), expected), "loading moved torch's random state"
    before = (folder / "model.safetensors").read_bytes()
    AutoregressiveWrapper(model)(ids(2, 5)).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(p.grad is not None for p in model.parameters())
    assert (folder / "model.safetensors").read_bytes() == before


def test_everybody_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        save_pretrained(tiny(), tmp_path / "m", ByteTokenizer())
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "m").iterdir()} == {0o644}


def test_every_id_that_ends_a_text_is_in_the_generation_config(tmp_path):
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    tokenizer.stop_ids = (260, 261)
    save_pretrained(tiny(num_tokens=tokenizer.vocab_size), tmp_path / "m", tokenizer)
    assert json.loads((tmp_path / "m/generation_config.json").read_text())["eos_token_id"] == [258, 260, 261]


DRAWING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05, "transformers_version": "4.45.0"}


def test_the_generation_config_survives(tmp_path):
    """Loading, a step of DPO and saving, and that again; the ids are the tokenizer's, the others that end a text too."""
    tokenizer = ByteTokenizer(ROLE_MARKERS)
    save_pretrained(tiny(num_tokens=tokenizer.vocab_size), tmp_path / "m", tokenizer)
    (tmp_path / "m/generation_config.json").write_text(json.dumps(DRAWING | {"eos_token_id": [7, 8], "pad_token_id": 9}))
    model, _ = load_pretrained(tmp_path / "m")
    dpo = DPO(model)
    dpo(ids(2, 5), ids(2, 5)).backward()
    torch.optim.SGD(dpo.parameters(), lr=0.1).step()
    tokenizer.stop_ids = (260,)
    for i, saved in enumerate((dpo, dpo.ref_model, AutoregressiveWrapper(model))):
        save_pretrained(saved, tmp_path / str(i), tokenizer)
        save_pretrained(load_pretrained(tmp_path / str(i))[0], tmp_path / "again", tokenizer)
        for folder in (str(i), "again"):
            found = json.loads((tmp_path / folder / "generation_config.json").read_text())
            assert found == DRAWING | {"bos_token_id": 257, "eos_token_id": [258, 260], "pad_token_id": 256}
            assert json.loads((tmp_path / folder / "config.json").read_text())["eos_token_id"] == [258, 260]


@pytest.mark.parametrize("drawn", [None, DRAWING | {"eos_token_id": [4, 5]}])
def test_without_a_tokenizer_the_ids_are_the_folders(tmp_path, drawn):
    save_pretrained(tiny(**LLAMA), tmp_path / "m")
    change_config(tmp_path / "m", bos_token_id=3, eos_token_id=4, pad_token_id=0)
    (tmp_path / "m/generation_config.json").unlink()
    if drawn is not None:
        (tmp_path / "m/generation_config.json").write_text(json.dumps(drawn))
    save_pretrained(load_pretrained(tmp_path / "m")[0], tmp_path / "again")
    ends = {"bos_token_id": 3, "eos_token_id": 4 if drawn is None else [4, 5], "pad_token_id": 0}
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == (drawn or {}) | ends
    assert json.loads((tmp_path / "again/config.json").read_text()).items() >= ends.items()


def test_a_generation_config_that_is_none_is_told(folder):
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"generation_config.json: must hold one JSON object"):
        load_pretrained(folder)


GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


# -- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SHAPES if n not in XALIGN])
def test_transformers_opens_ours(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = tiny(**SHAPES[name], max_seq_len=64)
    save_pretrained(model, tmp_path / "m")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = ids(3, 12)
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() <= 1e-4
        greedy = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    assert torch.equal(greedy[:, 12:], AutoregressiveWrapper(model).generate(tokens, 20, temperature=0))


def test_transformers_opens_ours_in_bfloat16(tmp_path):
    from transformers import AutoModelForCausalLM

    save_pretrained(tiny(**LLAMA).bfloat16(), tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_theirs_opens_here(tmp_path, tied, kv_heads):
    theirs, _ = llama(tied=tied, kv_heads=kv_heads)
    theirs.save_pretrained(tmp_path / "m")
    ours, tokenizer = load_pretrained(tmp_path / "m")
    assert tokenizer is None
    tokens = ids(3, 12)
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() <= 1e-4
        greedy = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    assert torch.equal(greedy[:, 12:], AutoregressiveWrapper(ours).generate(tokens, 20, temperature=0))
    save_pretrained(ours, tmp_path / "again")
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# -- atomicity ------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("point", ["save_weights", "write_atomically", "os.rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_crash_in_the_middle_leaves_the_old_folder(folder, monkeypatch, point, error):
    before, neighbours = contents(folder), sorted(p.name for p in folder.parent.iterdir())

    def crash(*args, **kwargs):
        raise error

    if point == "os.rename":
        calls = []
        rename = Path.rename

        def second_fails(self, target):
            calls.append(target)
            if len(calls) == 2:
                crash()
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", second_fails)
    else:
        monkeypatch.setattr(checkpoint, point, crash)
    with pytest.raises(type(error)):
        save_pretrained(tiny(seed=1, **LLAMA), folder)
    assert contents(folder) == before and sorted(p.name for p in folder.parent.iterdir()) == neighbours


def test_saving_never_replaces_a_folder_with_other_things_in_it(folder):
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        save_pretrained(tiny(seed=1), folder)
    assert (folder / "thesis.tex").read_text() == "years of work"
    for above in (folder.parent, Path()):
        with pytest.raises(CheckpointError):
            save_pretrained(tiny(seed=1), above)


def test_saving_replaces_the_whole_folder(folder):
    (folder / "tokenizer_config.json").write_text("of the older model")
    save_pretrained(tiny(seed=1), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_model_card_and_a_licence_stay_when_the_model_is_replaced(folder):
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (folder / name).write_text(f"my {name}")
    save_pretrained(tiny(seed=1, **LLAMA), folder)
    assert all((folder / name).read_text() == f"my {name}" for name in ("README.md", "LICENSE", ".gitattributes"))
    equal_bits(load_pretrained(folder)[0], tiny(seed=1, **LLAMA))
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(CheckpointError, match=r"README\.md"):
        save_pretrained(tiny(), folder)


def test_what_transformers_wrote_is_replaced_but_not_pickled_weights(tmp_path):
    theirs, ours = llama()
    theirs.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                 "chat_template.jinja"):
        (tmp_path / "m" / name).write_text("of the older model")
    save_pretrained(ours, tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    (tmp_path / "m/pytorch_model.bin").write_bytes(b"the only copy")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        save_pretrained(ours, tmp_path / "m")


def test_write_atomically_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "f"
    write_atomically(file, "old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomically(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_atomic_folder_makes_its_parents(tmp_path):
    with atomic_folder(tmp_path / "a/b/c") as inside:
        (inside / "f").write_text("x")
        assert not (tmp_path / "a/b/c").exists()
    assert (tmp_path / "a/b/c/f").read_text() == "x"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nothing can be made")
def test_a_place_that_cannot_be_written_is_one_line():
    for place in ("/proc/x", "/proc/x/y"):
        with pytest.raises(CheckpointError, match=f"^{place} can't be written") as caught:
            save_pretrained(tiny(), place)
        assert "\n" not in str(caught.value)


def test_what_killed_saves_left_is_removed_by_the_next(tmp_path):
    save_pretrained(tiny(**LLAMA), tmp_path / "m")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    owners = (dead.pid, host), (os.getpid(), host), (os.getppid(), host), (dead.pid, "far")
    names = [f".m.{pid}@{at}.tmp" for pid, at in owners]
    for name in (*names, ".mm.1.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "m/README.md").write_text("mine")
    (tmp_path / "m").rename(tmp_path / f".m.{dead.pid}@{host}.old")  # killed between its two renames
    save_pretrained(tiny(seed=1, **LLAMA), tmp_path / "m")
    assert {p.name for p in tmp_path.iterdir()} == {"m", names[2], names[3], ".mm.1.tmp"}
    assert (tmp_path / "m/README.md").read_text() == "mine"
    equal_bits(load_pretrained(tmp_path / "m")[0], tiny(seed=1, **LLAMA))


RACE = """
import sys, time
from xalign.checkpoint import atomic_folder
end = time.monotonic() + 2
while time.monotonic() < end:
    with atomic_folder(sys.argv[1]) as inside:
        (inside / "config.json").write_text(sys.argv[2])
        (inside / "generation_config.json").write_text(sys.argv[2])
"""


def test_processes_that_save_at_once_replace_one_anothers(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/README.md").write_text("mine")
    both = [subprocess.Popen([sys.executable, "-c", RACE, tmp_path / "m", name], stderr=subprocess.PIPE) for name in "abc"]
    assert [p.communicate()[1] for p in both] == [b""] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    files = contents(tmp_path / "m")
    assert files.pop("README.md") == b"mine" and len(files) == 2 and len(set(files.values())) == 1


# -- damage ---------------------------------------------------------------------------------------------------------


def change_config(folder: Path, remove=(), **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json there"),
    "no folder": (shutil.rmtree, "no config.json there"),
    "broken JSON": (lambda f: (f / "config.json").write_text('{"a": 1,\n "b"'), r"config.json:2: no JSON \("),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: missing or wrong field"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json: missing or wrong field"),
    "no field": (lambda f: change_config(f, remove=["hidden_size"]), "hidden_size is missing, allowed is"),
    "text for a number": (lambda f: change_config(f, vocab_size="many"), "vocab_size is 'many', allowed is a whole number"),
    "no heads": (lambda f: change_config(f, num_attention_heads=0, head_dim=None), "num_attention_heads is 0, allowed is"),
    "odd head": (lambda f: change_config(f, head_dim=7), "config.json: .*rotary_dim is 7, allowed is an even number"),
    "heads that don't divide": (lambda f: change_config(f, num_key_value_heads=3), "allowed is a divisor of heads = 4"),
    "other family": (lambda f: change_config(f, model_type="bert"), "model_type is 'bert', allowed is llama, .* or xalign"),
    "no family": (lambda f: change_config(f, remove=["model_type"]), "model_type is .*None"),
    "rope of another kind": (lambda f: change_config(f, rope_scaling={"rope_type": "yarn"}), "rope_type is 'yarn' in one"),
    "other activation": (lambda f: change_config(f, hidden_act="relu"), "hidden_act is 'relu', allowed is"),
    "a vocabulary beyond memory": (lambda f: change_config(f, vocab_size=10**15), r"has shape \(300, 32\), allowed is"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights there, allowed is model.safetensors, or"),
    "a pointer for weights": (lambda f: (f / "model.safetensors").write_text(POINTER), "tensors: is a Git LFS pointer, .*`git"),
    "a pointer for the tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "json: is a Git LFS pointer"),
    "weights are a folder": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "can't be"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "can't be read as safetensors"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "can't be read as safetensors"),
    "a byte short": (lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 1), "can't be"),
    "no tensor": (lambda f: change_tensors(f, lambda t: t.pop(Q)), f"lacks tensor {Q}$"),
    "two lack": (lambda f: change_tensors(f, lambda t: (t.pop(Q), t.pop("lm_head.weight"))), "lacks tensor .* and 1 more"),
    "one too many": (lambda f: change_tensors(f, lambda t: t.update(x=torch.zeros(1))), "has the unknown tensor x$"),
    "other shape": (lambda f: change_tensors(f, lambda t: t.update({Q: t[Q][:31].clone()})),
                    r"q_proj.weight has shape \(31, 32\), allowed is the shape that config.json gives, \(32, 32\)"),
    "NaN": (lambda f: change_tensors(f, lambda t: t[Q][3, 4].fill_(float("nan"))), f"{Q} holds values that are not finite"),
    "infinity": (lambda f: change_tensors(f, lambda t: t[Q][3, 4].fill_(float("-inf"))), "not finite"),
    "whole numbers": (lambda f: change_tensors(f, lambda t: t.update({Q: t[Q].int()})), f"{Q} is torch.int32, allowed is"),
    "float8": (lambda f: change_tensors(f, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), "is torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_clear_line(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_xalign_folder_with_an_unknown_option(tmp_path):
    save_pretrained(tiny(), tmp_path / "m")
    options = json.loads((tmp_path / "m/config.json").read_text())["xalign"]
    options["attn_layers"]["ff_swich"] = True
    change_config(tmp_path / "m", xalign=options)
    with pytest.raises(CheckpointError, match=r"config.json: .*no option 'ff_swich', did you mean 'ff_swish'"):
        load_pretrained(tmp_path / "m")


def test_a_damaged_tokenizer_is_told(folder):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: not valid JSON"):
        load_pretrained(folder)


def test_mixed_dtypes_become_one(folder):
    change_tensors(folder, lambda t: t.update({Q: t[Q].bfloat16()}))
    model, _ = load_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model(ids(1, 3))


def test_training_state(folder, tmp_path):
    state = {"step": 3, "rng": torch.get_rng_state(), "window": {"loss": (1.5, 2.0)}, "optimizer": {0: torch.ones(2)}}
    save_pretrained(tiny(), tmp_path / "c", state=state)
    again = load_state(tmp_path / "c")
    assert again["step"] == 3 and again["window"] == state["window"] and torch.equal(again["rng"], state["rng"])
    (tmp_path / "c/training/state.pt").write_bytes(b"junk")
    for place in (tmp_path / "c", folder):
        with pytest.raises(CheckpointError, match="no usable training state") as caught:
            load_state(place)
        assert "\n" not in str(caught.value)


def test_every_error_here_is_ours_and_the_builtin():
    assert issubclass(CheckpointError, XalignError) and issubclass(CheckpointError, OSError)
