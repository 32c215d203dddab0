"""The tensors of a model folder: which file holds which, read into a model one by one, written in shards.

Knows files, not families: an `xalign.families.Layout` says which tensor of the folder is which parameter of ours.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xalign.errors import CheckpointError, ConfigError
from xalign.families import Layout
from xalign.hf import FLOAT_NAMES, FLOATS

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
POINTER = b"version https://git-lfs"
UNITS = {"": 1, **{f"{u}{i}B": (1024 if i else 1000) ** n for n, u in enumerate("KMGT", 1) for i in ("", "i")}}
# The pages of a mapping count as this process's memory once they were touched, so it is dropped after so many bytes.
TOUCHED = 32 * 2**20


def load_weights(model: nn.Module, folder: Path, layout: Layout, dtype: torch.dtype | None = None,
                 device: str | torch.device | None = None, allow_pickle: bool = False) -> None:
    """Put a folder's tensors into a model on the meta device; `dtype` None is that of the folder's embedding.

    Every tensor is copied out of the mapped file, in `dtype` on `device`, before the next is touched: the peak is one copy
    of the weights and a window of the file. A model that *is* the mapping would save that copy where nothing is
    converted, but would change when somebody writes into the file and crash (SIGBUS) when it becomes shorter.
    Raises `CheckpointError` as `load_pretrained` says.
    """
    reader, source, places = _locate(folder, allow_pickle)
    found: dict[str, str] = {}  # the layout's name -> the file's
    ignored = []
    for name in places:
        canonical = layout.canonical(name)
        if canonical is None:
            ignored.append(name)
            continue
        if canonical in found:
            raise CheckpointError(f"{source}: tensors {found[canonical]} and {name} are the same one, allowed is one of them")
        found[canonical] = name
    wanted = {entry.file for entry in layout.entries}
    lacking, unknown = wanted - found.keys(), {found[k] for k in found.keys() - wanted}
    if layout.head in lacking:
        others = f", only the unknown {_and_more(sorted(unknown))}" if unknown else ""
        raise CheckpointError(f"{source}: holds no trained reward head {layout.head}{others}: allowed is a reward model's "
                              "folder, or its head's own name (--value-head-prefix)")
    for problem, keys in (("lacks", lacking), ("has the unknown", unknown)):
        if keys:
            raise CheckpointError(f"{source}: {problem} tensor {_and_more(sorted(keys))}")

    embedding = found[next(e.file for e in layout.entries if e.ours[0].endswith("token_emb.weight"))]
    for head in (name for name in ignored if layout.aliases.get(name, name) in layout.ignored):
        one, two = reader.get(places[head], head), reader.get(places[embedding], embedding)
        if one.dtype != two.dtype or not one.equal(two):  # then transformers 4 ties them all the same, and 5 doesn't
            raise CheckpointError(f"{places[head]}: {head} differs from {embedding} but config.json ties them, allowed is one "
                                  "of them")
    empty = model.state_dict()
    if dtype is None:
        dtype = _float(reader.get(places[embedding], embedding), f"{places[embedding]}: {embedding}").dtype
    loaded = {}
    for entry in sorted(layout.entries, key=lambda e: places[found[e.file]]):  # file after file
        name = found[entry.file]
        what = f"{places[name]}: {name}"
        tensor = reader.get(places[name], name)
        ours = [empty[key] for key in entry.ours]
        if entry.file == layout.head and tensor.ndim == 2 and len(tensor) != 1:
            raise CheckpointError(f"{what} is a head {len(tensor)} wide, allowed is 1: one reward a text")
        try:
            parts = entry.split(_float(tensor, what))
        except (RuntimeError, ValueError, IndexError):  # what can't be cut has another shape
            parts = ()
        if [part.shape for part in parts] != [place.shape for place in ours]:
            raise CheckpointError(f"{what} has shape {tuple(tensor.shape)}, allowed is the shape that config.json gives, "
                                  f"{tuple(entry.join(ours).shape)}")
        for key, part in zip(entry.ours, parts, strict=True):
            loaded[key] = torch.empty(part.shape, dtype=dtype, device=device).copy_(part)
            if not _finite(loaded[key]):
                why = f"values beyond {dtype}" if _finite(part) else "values that are not finite (NaN or infinity)"
                raise CheckpointError(f"{what} holds {why}")
    model.load_state_dict(loaded, assign=True)


def shard_bytes(size: int | float | str) -> float:
    """A shard's size in bytes: a number, or text such as "5GB" or "500MiB". Raises `ConfigError` for anything else."""
    said = re.fullmatch(r"(\d+(?:\.\d+)?) *((?:[KMGT]i?B)?)", size) if isinstance(size, str) else None
    value = float(said[1]) * UNITS[said[2]] if said else size
    if isinstance(value, bool | str) or not isinstance(value, int | float) or not value >= 1:
        raise ConfigError(f"max_shard_size is {size!r}, allowed is a number of bytes >= 1, or text such as '5GB'")
    return value


def save_weights(model: nn.Module, folder: Path, layout: Layout, max_shard_size: float) -> list[Path]:
    """Write a model's tensors into a new folder, in shards and an index where they take more than `max_shard_size` bytes.

    Gives the paths written. A shard is gathered, written and let go before the next.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shards: list[list] = [[]]
    total, room = 0, 0.0
    for entry in layout.entries:
        size = sum(tensors[name].nbytes for name in entry.ours)
        if shards[-1] and size > room:
            shards.append([])
        if not shards[-1]:
            room = max_shard_size
        shards[-1].append(entry)
        room -= size
        total += size
    several = len(shards) > 1
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        path = folder / (f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if several else SINGLE)
        save_file({entry.file: entry.join([tensors[name] for name in entry.ours]).contiguous() for entry in shard}, path,
                  metadata={"format": "pt"})
        written.append(path)
        weight_map |= {entry.file: path.name for entry in shard}
    if several:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        written.append(folder / INDEX)
        written[-1].write_text(json.dumps(index, indent=2) + "\n")
    return written


class _Reader:
    """Tensors of safetensors files by name, one file open at a time. They are the mapped file itself: to be copied."""

    kind = "safetensors"

    def __init__(self) -> None:
        self.path: Path | None = None
        self.file: Any = None
        self.touched = 0

    def get(self, path: Path, name: str) -> Tensor:
        with self._reading(path):
            if path != self.path or self.touched > TOUCHED:
                self.path = self.file = None  # the old mapping goes before the new one comes
                self.path, self.file, self.touched = path, self.open(path), 0
            tensor = self.file.get_tensor(name)
        self.touched += tensor.nbytes
        return tensor

    def names(self, path: Path) -> list[str]:
        """The tensors in a file."""
        with self._reading(path):
            return list(self.open(path).keys())

    def open(self, path: Path) -> Any:
        return safe_open(path, framework="pt")

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file makes safetensors and torch raise nearly anything
            refuse_pointer(path)
            raise CheckpointError(f"{path}: can't be read as {self.kind} ({one_reason(error)})") from error


class _PickleReader(_Reader):
    """The same for pickles, by torch's loader that runs no code of theirs."""

    kind = "pickled weights"

    def open(self, path: Path) -> "_Pickle":
        # files of before torch 1.6 are no zip and can't be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        for name, tensor in content.items() if isinstance(content, dict) else [("its content", content)]:
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path}: {name} is a {type(tensor).__name__}, allowed is tensors by their names")
        return _Pickle(content)


class _Pickle(dict):
    get_tensor = dict.__getitem__


def _locate(folder: Path, allow_pickle: bool) -> tuple[_Reader, Path, dict[str, Path]]:
    """How to read a folder's tensors, the file that speaks for all of them, and the file of each.

    A folder that holds two answers (left of two saves) is refused.
    """
    reader, single, index = _Reader(), folder / SINGLE, folder / INDEX
    shards = sorted(p.name for p in folder.iterdir() if SHARD.fullmatch(p.name))
    if not single.exists() and not index.exists():
        if shards:
            raise CheckpointError(f"{folder}: holds {shards[0]} but no {INDEX}, allowed is both")
        pickles = [name for name in (PICKLE_INDEX, PICKLE) if (folder / name).exists()]
        if pickles and not allow_pickle:
            raise CheckpointError(f"{folder}: the weights are pickled ({pickles[0]}), and a pickle can run code: allowed is "
                                  f"{SINGLE}, or --allow-pickle (allow_pickle=True), which reads only tensors")
        if not pickles:
            raise CheckpointError(f"{folder}: no weights there, allowed is {SINGLE}, or shards with {INDEX}, or with "
                                  f"--allow-pickle {PICKLE}")
        reader, single, index = _PickleReader(), folder / PICKLE, folder / PICKLE_INDEX
    if not index.exists():
        if shards:
            raise CheckpointError(f"{folder}: holds both {SINGLE} and {shards[0]}, allowed is one of them")
        return reader, single, dict.fromkeys(reader.names(single), single)
    weight_map = _weight_map(index)
    # an index may name the single file (mlx writes it so), but not shards beside it
    if single.exists() and set(weight_map.values()) != {single.name}:
        raise CheckpointError(f"{folder}: holds both {single.name} and {index.name}, allowed is one of them")
    places: dict[str, Path] = {}
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if not path.exists():
            names = [name for name, its in weight_map.items() if its == file]
            raise CheckpointError(f"{path}: is not there, but {index.name} looks there for {_and_more(names)}")
        for name in reader.names(path):
            if name in places:
                raise CheckpointError(f"{path}: holds {name}, and so does {places[name].name}: allowed is one of them")
            places[name] = path
    for name, file in weight_map.items():
        if places.get(name) != folder / file:
            raise CheckpointError(f"{index}: looks for {name} in {file}, which lacks it")
    return reader, index, places


def _weight_map(index: Path) -> dict[str, str]:
    """The files by tensor that an index names."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{index}:{error.lineno}: no JSON ({error.msg})") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: can't be read ({error})") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {str(weight_map)[:40]!r}, allowed is the file name of every tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or os.path.basename(file) != file:
            raise CheckpointError(f"{index}: {name} lies in {file!r}, allowed is a file of the same folder")
    return weight_map


def refuse_pointer(path: Path) -> None:
    """Raise for the few lines that git leaves in place of a large file where git-lfs did not fetch it."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise CheckpointError(f"{path}: is a Git LFS pointer, allowed is the file itself: `git lfs pull` fetches it")


def one_reason(error: Exception) -> str:
    """What a reader of tensors says, in a line; torch's refusals of a pickle advise to let it run its code."""
    text = str(error)
    if "weights_only" in text:
        if asked := re.search(r"GLOBAL ([\w.]+)", text):
            return f"its pickle asks for {asked[1]}, which only code could need"
        inner = re.search(r"WeightsUnpickler error:\s*(.*)", text)
        return "its pickle is damaged, or asks for more than tensors" + (f": {inner[1].strip()}" if inner else "")
    return text.splitlines()[0] if text else type(error).__name__


def _and_more(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _float(tensor: Tensor, what: str) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{what} is {tensor.dtype}, allowed is {FLOAT_NAMES}")
    return tensor


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a temporary of the tensor's size: the extremes carry NaN along."""
    return tensor.numel() == 0 or all(bool(t.isfinite()) for t in tensor.aminmax())
