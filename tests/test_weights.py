"""Tensors in and out of folders: shards, pickles, memory, and every mixture and damage that is refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, ids, llama, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xalign import AutoregressiveWrapper, load_pretrained, save_pretrained
from xalign.errors import CheckpointError, ConfigError
from xalign.hf import to_hf
from xalign.weights import save_weights

Q, EMBEDDING = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"
SMALL = 10_000  # bytes a shard: a tiny model takes several


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal_tensors(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


def index(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def change_index(folder: Path, change) -> None:
    content = index(folder)
    change(content["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def change_shard(folder: Path, change) -> None:
    """Change the tensors of the shard that holds `Q`."""
    path = folder / index(folder)["weight_map"][Q]
    content = load_file(path)
    change(content)
    save_file(content, path)


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_pretrained(tiny(**LLAMA), tmp_path / "sharded", max_shard_size=SMALL)
    return tmp_path / "sharded"


@pytest.fixture
def pickled(tmp_path) -> Path:
    """What old folders hold, `lm_head` and embedding of a tied model being one storage."""
    save_pretrained(tiny(**LLAMA, tie_embedding=True), tmp_path / "safe")
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(tmp_path / "safe/config.json", folder)
    content = tensors(tmp_path / "safe")
    torch.save(content | {"lm_head.weight": content[EMBEDDING]}, folder / "pytorch_model.bin")
    return folder


# -- shards ---------------------------------------------------------------------------------------------------------


def test_shards_carry_the_names_and_the_index_of_the_ecosystem(sharded, tmp_path):
    files = sorted(p.name for p in sharded.glob("*.safetensors"))
    n = len(files)
    assert n > 3 and files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    content = tensors(sharded)
    assert index(sharded)["metadata"]["total_size"] == sum(t.nbytes for t in content.values())
    assert {name: file for file in files for name in load_file(sharded / file)} == index(sharded)["weight_map"]
    save_pretrained(tiny(**LLAMA), tmp_path / "one")
    equal_tensors(content, tensors(tmp_path / "one"))
    again, _ = load_pretrained(sharded)
    save_pretrained(again, tmp_path / "again", max_shard_size=SMALL)
    for file in files:
        assert (sharded / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@given(st.integers(1, 120_000))
def test_every_tensor_lies_in_one_shard_no_larger_than_allowed(tmp_path_factory, limit):
    model = tiny(**LLAMA)
    folder = tmp_path_factory.mktemp("shards")
    written = save_weights(model, folder, to_hf(model)[1], limit)
    assert sorted(folder.iterdir()) == sorted(written)
    shards = [load_file(p) for p in written if p.suffix == ".safetensors"]
    assert sum(len(s) for s in shards) == len(model.state_dict())
    assert all(len(s) == 1 or sum(t.nbytes for t in s.values()) <= limit for s in shards)
    assert (len(shards) == 1) == (written[-1].name == "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_our_shards_and_we_theirs(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    theirs, ours = llama(tied=tied)
    save_pretrained(ours, tmp_path / "ours", max_shard_size=SMALL)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    equal_tensors(opened.state_dict(), theirs.state_dict())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    back, _ = load_pretrained(tmp_path / "theirs")
    assert torch.equal(back(ids(2, 9)), ours(ids(2, 9)))


def test_fused_and_transposed_tensors_of_gpt2_come_back_bit_for_bit(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours, _ = load_pretrained(tmp_path / "theirs")
    assert all(p.is_contiguous() for p in ours.parameters())
    save_pretrained(ours, tmp_path / "ours", max_shard_size=20_000)
    equal_tensors(tensors(tmp_path / "theirs"), tensors(tmp_path / "ours"))
    name = "transformer.h.1.attn.c_attn.weight"
    file = tmp_path / "ours" / index(tmp_path / "ours")["weight_map"][name]
    content = load_file(file)
    for wrong in (content[name][:, :-1], content[name][:31], content[name].T, content[name][0]):
        save_file(content | {name: wrong.contiguous()}, file)
        with pytest.raises(CheckpointError, match=rf"{name} has shape \({wrong.shape[0]},.*gives, \(32, 96\)"):
            load_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("size, shards", [(SMALL, 11), ("10KB", 11), ("10.0 KiB", 11), (1e4, 11), ("1GiB", 1), ("5GB", 1)])
def test_a_shards_size_may_be_said_as_text(tmp_path, size, shards):
    save_pretrained(tiny(**LLAMA), tmp_path / "m", max_shard_size=size)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == shards


@pytest.mark.parametrize("size", [0, -1, 0.5, float("nan"), "", "5 gigabytes", "-1GB", "0GB", "GB", None, True, [1]])
def test_any_other_size_of_a_shard_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=r"max_shard_size is .*, allowed is a number of bytes >= 1, or text such as '5GB'"):
        save_pretrained(tiny(**LLAMA), tmp_path / "m", max_shard_size=size)
    assert not (tmp_path / "m").exists()


DAMAGES = {
    "a shard is missing": (lambda f: (f / index(f)["weight_map"][Q]).unlink(),
                           r"model-\d+-of-\d+.safetensors: is not there, but model.safetensors.index.json looks there"),
    "a shard is cut": (lambda f: os.truncate(f / index(f)["weight_map"][Q], 900), "can't be read as safetensors"),
    "a shard is empty": (lambda f: (f / index(f)["weight_map"][Q]).write_bytes(b""), "can't be read as safetensors"),
    "an unknown tensor": (lambda f: change_index(f, lambda m: m.update(x=m[Q])), "index.json: looks for x in model-0"),
    "the wrong shard": (lambda f: change_index(f, lambda m: m.update({Q: m[EMBEDDING]})), f"looks for {Q} in model-00001-of"),
    "in two shards": (lambda f: change_shard(f, lambda t: t.update({EMBEDDING: torch.zeros(17, 32)})),
                      f"holds {EMBEDDING}, and so does model-00001"),
    "no tensor": (lambda f: (change_shard(f, lambda t: t.pop(Q)), change_index(f, lambda m: m.pop(Q))), f"lacks tensor {Q}$"),
    "broken JSON": (lambda f: (f / "model.safetensors.index.json").write_text('{\n"weight_map": {'), "index.json:2: no JSON"),
    "not UTF-8": (lambda f: (f / "model.safetensors.index.json").write_bytes(b"\xff"), "index.json: can't be read"),
    "a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json: weight_map is 'None', allowed is"),
    "an empty map": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'), r"weight_map is '{}'"),
    "a file elsewhere": (lambda f: change_index(f, lambda m: m.update({Q: "../secret"})), "lies in '../secret', allowed"),
    "a number for a file": (lambda f: change_index(f, lambda m: m.update({Q: 3})), "lies in 3, allowed is a file"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "holds model-00001-of-.* but no model.safet"),
    "an older single file": (lambda f: save_file(tensors(f), f / "model.safetensors"),
                             "holds both model.safetensors and model.safetensors.index.json"),
    "a single file, and shards without index": (
        lambda f: (save_file(tensors(f), f / "model.safetensors"), (f / "model.safetensors.index.json").unlink()),
        "holds both model.safetensors and model-00001-of"),
    "NaN": (lambda f: change_shard(f, lambda t: t[Q][0, 0].fill_(float("nan"))), f"model-.*{Q} holds values that are not"),
    "int8": (lambda f: change_shard(f, lambda t: t.update({Q: t[Q].char()})), f"{Q} is torch.int8, allowed is float32"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_shards_are_one_clear_line(sharded, name):
    damage, message = DAMAGES[name]
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(sharded)
    assert "\n" not in str(caught.value) and str(sharded) in str(caught.value)


def test_an_index_may_name_the_single_file(tmp_path):
    save_pretrained(tiny(**LLAMA), tmp_path / "m")
    weight_map = dict.fromkeys(tensors(tmp_path / "m"), "model.safetensors")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_pretrained(tmp_path / "m")[0](ids(1, 5)), tiny(**LLAMA)(ids(1, 5)))


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path):
    model = tiny(**LLAMA, tie_embedding=True)
    save_pretrained(model, tmp_path / "m")
    content = tensors(tmp_path / "m")
    save_file(content | {"lm_head.weight": content[EMBEDDING].clone()}, tmp_path / "m/model.safetensors")
    assert torch.equal(load_pretrained(tmp_path / "m")[0](ids(1, 5)), model(ids(1, 5)))
    for other in (content[EMBEDDING] + 1, content[EMBEDDING].bfloat16(), content[EMBEDDING][:-1].clone()):
        save_file(content | {"lm_head.weight": other}, tmp_path / "m/model.safetensors")
        with pytest.raises(CheckpointError, match=f"lm_head.weight differs from {EMBEDDING} but config.json ties"):
            load_pretrained(tmp_path / "m")


def test_values_that_the_wanted_dtype_cannot_hold(tmp_path):
    model = tiny(**LLAMA)
    with torch.no_grad():
        model.attn_layers.layers[1].attn.to_q.weight[0, 0] = 1e5
    save_pretrained(model, tmp_path / "m")
    load_pretrained(tmp_path / "m", dtype="bf16")
    with pytest.raises(CheckpointError, match=f"{Q} holds values beyond torch.float16"):
        load_pretrained(tmp_path / "m", dtype="fp16")


# -- pickles --------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_unless_asked_for(pickled):
    with pytest.raises(CheckpointError, match=r"pickled \(pytorch_model.bin\).* allowed is .*allow_pickle=True") as caught:
        load_pretrained(pickled)
    assert "\n" not in str(caught.value)
    model, _ = load_pretrained(pickled, allow_pickle=True)
    assert torch.equal(model(ids(2, 9)), tiny(**LLAMA, tie_embedding=True)(ids(2, 9)))
    (pickled / "pytorch_model.bin").write_bytes(b"")  # the model is no mapping of it
    assert torch.equal(model(ids(2, 9)), tiny(**LLAMA, tie_embedding=True)(ids(2, 9)))


def test_pickles_in_shards_and_of_the_format_before_zip(pickled):
    content = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    names = sorted(content)
    halves = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for i, (file, part) in enumerate(halves.items()):
        torch.save({k: content[k] for k in part}, pickled / file, _use_new_zipfile_serialization=bool(i))
    (pickled / "pytorch_model.bin").unlink()
    weight_map = {k: file for file, part in halves.items() for k in part}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="pickled"):
        load_pretrained(pickled)
    model, _ = load_pretrained(pickled, allow_pickle=True)
    assert torch.equal(model(ids(2, 9)), tiny(**LLAMA, tie_embedding=True)(ids(2, 9)))


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["a bomb", "a zipped bomb", "junk", "empty", "a list", "numbers"])
def test_a_pickle_runs_no_code_and_a_bad_one_is_one_clear_line(pickled, tmp_path, kind):
    target = tmp_path / "boom"
    content = {"junk": b"junk", "empty": b"", "a bomb": pickle.dumps({"x": Bomb(target)})}
    if kind in content:
        (pickled / "pytorch_model.bin").write_bytes(content[kind])
    else:
        objects = {"a list": [torch.zeros(2)], "numbers": {"epoch": 3}, "a zipped bomb": {"x": Bomb(target)}}
        torch.save(objects[kind], pickled / "pytorch_model.bin")
    message = {"a list": "its content is a list, allowed is tensors", "numbers": "epoch is a int, allowed is tensors"}
    with pytest.raises(CheckpointError, match=message.get(kind, r"_model.bin: can't be read as pickled weights")) as caught:
        load_pretrained(pickled, allow_pickle=True)
    text = str(caught.value)
    assert "\n" not in text and "\x1b" not in text and "weights_only" not in text and not target.exists()
    assert kind != "a zipped bomb" or "its pickle asks for posix.mkdir, which only code could need" in text


def test_safetensors_go_before_pickles(pickled):
    shutil.copy(pickled.parent / "safe/model.safetensors", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"junk")
    load_pretrained(pickled, allow_pickle=True)


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [5 * 10**9, SMALL])
def test_the_file_may_change_vanish_or_be_saved_over_while_the_model_lives(tmp_path, shard):
    save_pretrained(tiny(**LLAMA), tmp_path / "m", max_shard_size=shard)
    before = tensors(tmp_path / "m")
    model, _ = load_pretrained(tmp_path / "m")
    save_pretrained(model, tmp_path / "m", max_shard_size=shard)  # over what it was read from
    equal_tensors(tensors(tmp_path / "m"), before)
    AutoregressiveWrapper(model)(ids(2, 5)).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    equal_tensors(tensors(tmp_path / "m"), before)
    model, _ = load_pretrained(tmp_path / "m")
    for file in (tmp_path / "m").glob("*.safetensors"):
        with open(file, "r+b") as f:  # in place: a mapping would see it
            f.write(b"\xff" * 2000)
            f.truncate(2000)
    assert torch.equal(model(ids(2, 9)), tiny(**LLAMA)(ids(2, 9)))


MEASURE = """
import sys
import torch
from xalign import load_pretrained, save_pretrained
small, big, out, dtype, shard = sys.argv[1:]
def field(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))
load_pretrained(small, allow_pickle=True)  # what is imported late
start = field("VmRSS")
model, _ = load_pretrained(big, dtype, allow_pickle=True)
loaded = field("VmHWM") - start
assert "sympy" not in sys.modules, "drawing weights on the meta device costs 80 MB"
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
start = field("VmRSS")
save_pretrained(model, out, max_shard_size=int(shard))
print(sum(p.nbytes for p in model.parameters()), loaded, field("VmHWM") - start)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind, dtype", [("one", "fp32"), ("one", "bf16"), ("shards", "fp32"), ("shards", "bf16"),
                                         ("pickle", "fp32")])
def test_the_peak_is_about_one_copy_of_the_weights(tmp_path_factory, kind, dtype):
    root = tmp_path_factory.getbasetemp() / "memory"
    if not root.exists():
        root.mkdir()
        big = tiny(**LLAMA, num_tokens=15_000, dim=512, depth=12, heads=8, attn_dim_head=64)
        save_pretrained(tiny(**LLAMA), root / "small")
        save_pretrained(big, root / "one")
        save_pretrained(big, root / "shards", max_shard_size=10**8)
        (root / "pickle").mkdir()
        shutil.copy(root / "one/config.json", root / "pickle")
        torch.save(tensors(root / "one"), root / "pickle/pytorch_model.bin")
    done = subprocess.run([sys.executable, "-c", MEASURE, root / "small", root / kind, root / "out", dtype, "100000000"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    copy, loading, saving = (int(n) for n in done.stdout.split())
    assert copy > 2 * 10**8 / (1 if dtype == "fp32" else 2)
    assert copy < loading < 1.25 * copy + 60 * 10**6, f"loading took {loading / copy:.2f} copies"
    assert saving < 0.25 * copy + 60 * 10**6, f"saving took {saving / copy:.2f} copies"
