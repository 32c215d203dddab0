"""Names on the hub: a small hub on this machine answers the real client; the cache, offline; every refusal is one line."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, ids, tiny
from huggingface_hub import constants

from xalign import hub, load_pretrained, save_pretrained
from xalign.errors import CheckpointError, DataError, XalignError

SHA, OLD_SHA = "a" * 40, "b" * 40
MODEL = tiny(**LLAMA)


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Hub:
    """Repositories by ("models" | "datasets", name): {path: bytes}, or (status, error code) to refuse with; what was asked."""

    def __init__(self) -> None:
        self.repos: dict = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args) -> None: ...

            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                outer.asked.append(path)
                kind, _, rest = path.removeprefix("/api/").partition("/") if path.startswith("/api/") else ("", "", path[1:])
                if not kind:
                    kind = "datasets" if rest.startswith("datasets/") else "models"
                    rest = rest.removeprefix("datasets/")
                owner, name, *more = rest.split("/")
                repo = outer.repos.get((kind, f"{owner}/{name}"), (404, "RepoNotFound"))
                if isinstance(repo, tuple):
                    return self.reply(repo[0], b"{}", {"X-Error-Code": repo[1]} if repo[1] else {}, body)
                if not more or more[0] == "revision":
                    revision = more[1] if more else "main"
                    if revision not in ("main", "v1", SHA):
                        return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                    info = {"id": f"{owner}/{name}", "sha": SHA, "siblings": [{"rfilename": f} for f in repo]}
                    return self.reply(200, json.dumps(info).encode(), {}, body)
                if more[0] == "tree":
                    tree = [{"type": "file", "path": f, "size": len(d), "oid": oid(d)} for f, d in repo.items()]
                    return self.reply(200, json.dumps(tree).encode(), {}, body)
                data = repo["/".join(more[2:])]  # resolve/<commit>/<file>
                self.reply(200, data, {"ETag": f'"{oid(data)}"', "X-Repo-Commit": SHA}, body)

            def reply(self, status: int, data: bytes, headers: dict, body: bool) -> None:
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def downloads(self) -> set[str]:
        return {path.split("/resolve/")[1].partition("/")[2] for path in self.asked if "/resolve/" in path}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the client's, which is offline as all tests are."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    return tmp_path / "hub"


@pytest.fixture
def online(cache, monkeypatch):
    """A hub on this machine, and a client that asks it."""
    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "model"
    save_pretrained(MODEL, path, max_shard_size=10_000)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def into_cache(cache: Path, kind: str, name: str, content: dict[str, bytes]) -> None:
    """As the client keeps a repository: refs/main names a commit, snapshots/<commit> holds links to blobs."""
    root = cache / f"{kind}--{name.replace('/', '--')}"
    for i, (file, data) in enumerate(content.items()):
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        (root / "blobs" / str(i)).write_bytes(data)
        link = root / "snapshots" / SHA / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / "blobs" / str(i), link.parent))
    (root / "refs").mkdir()
    (root / "refs/main").write_text(SHA)


def one_line(error: XalignError, name: str) -> None:
    assert str(error).startswith(name) and "\n" not in str(error) and len(str(error)) < 400


# -- names ----------------------------------------------------------------------------------------------------------


def test_what_is_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "EleutherAI/pythia-70m", "trl-lib/ultrafeedback_binarized"):
        assert hub.is_hub_name(name)
    for name in ("gpt2", "runs/demo", "./a/b", "/a/b", "a/b/c", "../a", "a/..", "a/b.jsonl", "data/x.jsonl.gz",
                 "data/x.parquet", "a/", "~/a", "a b/c", "", "é/a", "w/model.safetensors"):
        assert not hub.is_hub_name(name), name


# -- models ---------------------------------------------------------------------------------------------------------


def test_a_model_comes_from_the_hub_without_other_programs_weights(online, folder):
    others = ("pytorch_model.bin", "model.gguf", "model.onnx", "onnx/model.onnx", "original/params.json", "tf_model.h5",
              "consolidated.safetensors", "original/model.safetensors", "adapter_model.safetensors", "flax_model.msgpack")
    online.repos["models", "me/llama"] = files(folder) | dict.fromkeys(others, b"junk") | {"tokenizer_config.json": b"{}"}
    for _ in range(2):
        model, tokenizer = load_pretrained("me/llama")
        assert torch.equal(model(ids(2, 9)), MODEL(ids(2, 9))) and tokenizer is None
    assert online.downloads() == set(files(folder)) | {"tokenizer_config.json"}
    assert sum("/resolve/" in p and p.endswith("config.json") for p in online.asked) <= 6, "the second time is from the cache"
    load_pretrained("me/llama", revision="v1")
    constants.HF_HUB_OFFLINE = True  # put back by the fixture
    load_pretrained("me/llama", revision="v1")


def test_pickled_weights_come_only_when_asked_for(online, tmp_path):
    save_pretrained(tiny(use_abs_pos_emb=False), tmp_path / "m")
    content = files(tmp_path / "m")
    model = load_pretrained(tmp_path / "m")[0]
    del content["model.safetensors"]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    online.repos["models", "me/old"] = content | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    with pytest.raises(CheckpointError):
        load_pretrained("me/old")
    assert "pytorch_model.bin" not in online.downloads()
    again, _ = load_pretrained("me/old", allow_pickle=True)
    assert torch.equal(again(ids(2, 9)), model(ids(2, 9)))


REFUSALS = {
    "no such model": ((404, "RepoNotFound"), "the hub has no such model"),
    "private": ((401, "RepoNotFound"), "the hub has no such model .or a private one: `hf auth login`"),
    "gated": ((403, "GatedRepo"), r"gated: ask for access at https://huggingface.co/me/x, then `hf auth login`"),
    "gated, not logged in": ((401, "GatedRepo"), r"gated: ask for access at https://huggingface.co/me/x, then `hf auth login`"),
    "forbidden": ((403, ""), "gated: ask for access"),
    "overloaded": ((503, ""), r"the hub answers 503 .*: try again later"),
    "broken": ((400, ""), r"the hub answers 400 .*: try again later"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_refuses_is_one_line(online, name):
    answer, message = REFUSALS[name]
    online.repos["models", "me/x"] = online.repos["datasets", "me/x"] = answer
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained("me/x")
    one_line(caught.value, "me/x: no such file or folder, and ")
    with pytest.raises(DataError, match=message.replace("model", "dataset").replace("co/me", "co/datasets/me")) as told:
        hub.dataset_files("me/x")
    one_line(told.value, "me/x: no such file or folder, and ")


def test_an_unknown_revision_is_one_line(online, folder):
    online.repos["models", "me/llama"] = files(folder)
    with pytest.raises(CheckpointError, match="has no revision 'v9', allowed is a branch, a tag or a commit") as caught:
        load_pretrained("me/llama", revision="v9")
    one_line(caught.value, "me/llama")
    with pytest.raises(CheckpointError, match="revision is 'v1': allowed is a hub's name, or no revision"):
        load_pretrained(folder, revision="v1")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug\nof theirs"), ValueError()])
def test_whatever_else_the_client_raises_is_one_line(online, monkeypatch, error):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=rf"the hub can't be used \({type(error).__name__}: .*\)") as caught:
        load_pretrained("me/llama")
    one_line(caught.value, "me/llama")


def test_no_network_is_one_line_and_the_cache_does(online, cache, folder):
    online.server.shutdown()
    online.server.server_close()
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="hub can't be reached, and its cache lacks this model") as caught:
        load_pretrained("me/llama")
    one_line(caught.value, "me/llama")
    with pytest.raises(DataError, match="hub can't be reached, and its cache lacks this dataset"):
        hub.dataset_files("me/data")
    assert time.monotonic() - began < 4, "the client tried again and again"
    into_cache(cache, "models", "me/llama", files(folder))
    assert torch.equal(load_pretrained("me/llama")[0](ids(2, 9)), MODEL(ids(2, 9)))


def test_offline_the_cache_does_and_what_it_lacks_is_one_line(cache, folder):
    with pytest.raises(CheckpointError, match=r"cache lacks this model, .* HF_HUB_OFFLINE is set") as caught:
        load_pretrained("me/llama")
    one_line(caught.value, "me/llama")
    into_cache(cache, "models", "me/llama", files(folder))
    assert torch.equal(load_pretrained("me/llama")[0](ids(2, 9)), MODEL(ids(2, 9)))
    missing = next((cache / "models--me--llama/snapshots" / SHA).glob("model-00002*"))
    missing.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*: is not there, but model.safetensors.index.json"):
        load_pretrained("me/llama")


def test_in_a_real_process_offline(tmp_path, folder):
    into_cache(tmp_path / "hub", "models", "me/llama", files(folder))
    code = ("import sys\nfrom xalign import load_pretrained\nfrom xalign.errors import XalignError\n"
            "try: print(load_pretrained(sys.argv[1])[0].num_tokens)\nexcept XalignError as error: print(error)")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def run(name: str) -> str:
        command = [sys.executable, "-c", code, name]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("me/llama") == "17\n"
    assert run("me/other") == ("me/other: no such file or folder, and the hub's cache lacks this model, or a part of it, and "
                               "HF_HUB_OFFLINE is set: download it without\n")


def test_without_the_package_the_line_says_what_to_install(monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError, match=r"needs huggingface_hub: pip install 'xalign\[hf\]'"):
        load_pretrained("me/llama")
    with pytest.raises(DataError, match=r"needs huggingface_hub: pip install 'xalign\[hf\]'"):
        hub.dataset_files("me/data")


# -- datasets -------------------------------------------------------------------------------------------------------

PREFS = dict.fromkeys(["README.md", "dataset_infos.json", *(f"data/{s}-00000-of-00001-0a1b2c3d.parquet" for s in (
    "test_gen", "test_prefs", "train_gen", "train_prefs", "train_sft"))], b"x")
PLAIN = dict.fromkeys([".gitattributes", "data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet",
                       "data/test-00000-of-00001.parquet", "train.jsonl"], b"x")
TWO = dict.fromkeys([f"{config}/{split}.jsonl.gz" for config in ("helpful", "harmless") for split in ("train", "test")], b"x")
CHOICES = [
    (PREFS, "", ["data/train_prefs-00000-of-00001-0a1b2c3d.parquet"]),
    (PREFS, ":train_sft", ["data/train_sft-00000-of-00001-0a1b2c3d.parquet"]),
    (PLAIN, "", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
    (PLAIN, ":test", ["data/test-00000-of-00001.parquet"]),
    (TWO, ":helpful/test", ["helpful/test.jsonl.gz"]),
    (TWO, ":harmless/train", ["harmless/train.jsonl.gz"]),
    ({"alpaca_eval.json": b"[]", "x.py": b""}, "", ["alpaca_eval.json"]),
    ({"default/train-0-of-1.parquet": b"x", "other/train-0-of-1.parquet": b"x"}, "", ["default/train-0-of-1.parquet"]),
]


@pytest.mark.parametrize("where", ["online", "offline"])
@pytest.mark.parametrize("content, suffix, expected", CHOICES)
def test_the_files_of_a_split(online, cache, monkeypatch, where, content, suffix, expected):
    if where == "online":
        online.repos["datasets", "me/data"] = content
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        into_cache(cache, "datasets", "me/data", content)
    found = hub.dataset_files(f"me/data{suffix}")
    root = cache / "datasets--me--data/snapshots" / SHA
    assert [p.relative_to(root).as_posix() for p in found] == expected and all(p.read_bytes() == content[e] for p, e in zip(
        found, expected, strict=True))
    assert online.downloads() == (set(expected) if where == "online" else set())


def test_what_was_downloaded_is_there_offline(online, monkeypatch):
    online.repos["datasets", "me/data"] = PLAIN
    online_files = hub.dataset_files("me/data:test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.dataset_files("me/data:test") == online_files
    with pytest.raises(DataError, match=r"no such split, allowed is one of me/data:test$"):
        hub.dataset_files("me/data:train")


@pytest.mark.parametrize("content, suffix, message", [
    (TWO, "", "2 splits fit, allowed is one of me/data:harmless/train, me/data:helpful/train$"),
    (TWO, ":test", "2 splits fit, allowed is one of me/data:harmless/test, me/data:helpful/test$"),
    (TWO, ":validation", "no such split, allowed is one of me/data:harmless/test, .*, me/data:helpful/train$"),
    (TWO, ":other/train", "no such split"),
    (PREFS, ":train", "no such split, allowed is one of me/data:test_gen"),
    ({"a.parquet": b"", "b.parquet": b""}, "", "2 splits fit, allowed is one of me/data:a, me/data:b$"),
    ({"README.md": b"", "data.csv": b""}, "", "no data there, allowed are files that end in one of .parquet, .jsonl"),
    (TWO, ":a/b/c", "no name of a dataset, allowed is owner/name, owner/name:split or owner/name:config/split"),
])
def test_no_or_several_splits_are_one_line(online, content, suffix, message):
    online.repos["datasets", "me/data"] = content
    with pytest.raises(DataError, match=message) as caught:
        hub.dataset_files(f"me/data{suffix}")
    one_line(caught.value, f"me/data{suffix}")


def test_the_cache_is_never_written_by_a_save_elsewhere(cache, tmp_path, folder):
    into_cache(cache, "models", "me/llama", files(folder))
    before = {str(p): p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    save_pretrained(load_pretrained("me/llama")[0], tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine")
    assert {str(p): p.read_bytes() for p in cache.rglob("*") if p.is_file()} == before
