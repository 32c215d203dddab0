"""Save, load and resume, atomically. A checkpoint folder is a Hugging Face folder; training state lies in `training/`."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.overrides import TorchFunctionMode

from xalign import hf, hub
from xalign.dpo import DPO, unwrap
from xalign.errors import CheckpointError
from xalign.families import Layout
from xalign.nn.transformer import TransformerWrapper
from xalign.tokenizer_json import FILES as TOKENIZER_FILES
from xalign.tokenizers import Tokenizer, load_tokenizer
from xalign.weights import INDEX, SHARD, SINGLE, load_weights, save_weights

CONFIG, GENERATION, STATE = "config.json", "generation_config.json", "training/state.pt"
# What a save replaces, whoever wrote it (we, transformers, the hub): a mixture of two models' files would load as a third.
OWN = {CONFIG, GENERATION, SINGLE, INDEX, "training", *TOKENIZER_FILES, "chat_template.json"}
# What people write about a model stays beside its new weights. A folder with anything else (pickled weights too: the only
# copy, maybe) is never replaced.
KEPT = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", ".gitattributes"}


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file whole or not at all: a temporary neighbour is renamed onto it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill that appears under its name only when the block has ended well; it replaces an older one.

    Raises `CheckpointError` where there is something else than a checkpoint; a model card and a licence move in.
    """
    path = Path(path).resolve()
    foreign = sorted(p.name for p in path.iterdir() if not _is_own(p)) if path.is_dir() else []
    if foreign or (path.exists() and not path.is_dir()):
        what = f"holds {foreign[0]!r}, which is no part of a checkpoint" if foreign else "is a file"
        raise CheckpointError(f"{path} {what}: allowed is a new folder, or a checkpoint's to replace")
    if Path.cwd().is_relative_to(path):
        raise CheckpointError(f"{path} is the working directory or above it, allowed is another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} can't be made ({error.strerror})") from error
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for kept in (p for p in path.glob("*") if p.name in KEPT):
            shutil.copy2(kept, temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_own(entry: Path) -> bool:
    return entry.name in OWN or bool(SHARD.fullmatch(entry.name)) or (entry.name in KEPT and entry.is_file())


def _network(model: nn.Module) -> TransformerWrapper:
    network = unwrap(model.policy_model if isinstance(model, DPO) else model)
    if not isinstance(network, TransformerWrapper):
        raise CheckpointError(f"{type(network).__name__} can't be saved, allowed is a TransformerWrapper or a wrapper of one")
    return network


def save_pretrained(model: nn.Module, path: str | os.PathLike, tokenizer: Tokenizer | None = None,
                    state: dict[str, Any] | None = None, max_shard_size: int = 5 * 10**9) -> None:
    """Write a checkpoint folder, whole or not at all; wrappers are unwrapped, `state` goes to training/state.pt.

    Weights of more than `max_shard_size` bytes become shards with an index. Raises `CheckpointError` for a folder that holds
    something else than a checkpoint, and when the disk is full.
    """
    network = _network(model)
    with atomic_folder(path) as folder:
        config, layout = hf.to_hf(network, tokenizer)
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        try:
            written = save_weights(network, folder, layout, max_shard_size)
        except SafetensorError as error:  # its way to say that the disk is full
            raise CheckpointError(f"{path} can't be written ({error})") from error
        for file in written:
            file.chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read
        ends = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
        if tokenizer is not None and (more := set(tokenizer.stop_ids) - {tokenizer.eos_id}):
            ends["eos_token_id"] = [*([tokenizer.eos_id] if tokenizer.eos_id is not None else []), *sorted(more)]
        write_atomically(folder / GENERATION, json.dumps(ends, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(folder)
        if state is not None:
            (folder / STATE).parent.mkdir()
            try:
                torch.save(state, folder / STATE)
            except RuntimeError as error:  # torch's way
                raise CheckpointError(f"{path} can't be written ({str(error).splitlines()[0]})") from error


def load_state(path: str | os.PathLike) -> dict[str, Any]:
    """The training state of a checkpoint folder."""
    try:
        return torch.load(Path(path) / STATE, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: no usable training state ({str(error).splitlines()[0]})") from error


class _NoDraws(TorchFunctionMode):
    """Leave new weights as they are: on the meta device torch draws through sympy, 0.7 s and 80 MB for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def load_pretrained(path: str | os.PathLike, dtype: str | torch.dtype | None = None,
                    device: str | torch.device | None = None, *, allow_pickle: bool = False,
                    revision: str | None = None) -> tuple[TransformerWrapper, Tokenizer | None]:
    """A model and its tokenizer (None where the folder has none) from a folder or a hub's `owner/name`, in eval mode.

    `dtype` None keeps the file's; `revision` is a branch, tag or commit on the hub. Weights are safetensors, one file or
    shards; pickled ones only with `allow_pickle`, and then without running their code. The peak of memory is about one copy
    of the weights in `dtype`. Raises `CheckpointError` for a missing or damaged folder, tensors of another shape or kind,
    missing or unknown ones, values that are not finite, an architecture that is not supported, and trouble with the hub.
    """
    wanted = hf.torch_dtype(dtype)
    model, layout, folder = outline(path, allow_pickle=allow_pickle, revision=revision)
    tokenizer = load_tokenizer(folder)  # before the weights: what is wrong with it is told at once
    load_weights(model, folder, layout, wanted, device, allow_pickle)
    return model.eval(), tokenizer


def outline(path: str | os.PathLike, *, allow_pickle: bool = False,
            revision: str | None = None) -> tuple[TransformerWrapper, Layout, Path]:
    """A checkpoint's model on the meta device, without weights, with their layout and the folder; see `load_pretrained`."""
    folder = Path(path)
    if hub.is_hub_name(str(path)):
        folder = hub.model_folder(str(path), revision, allow_pickle=allow_pickle)
    elif revision is not None:
        raise CheckpointError(f"{path} is a folder, and revision is {revision!r}: allowed is a hub's name, or no revision")
    if not (folder / SINGLE).exists() and (folder / "policy" / CONFIG).is_file():
        raise CheckpointError(f"{path} is a run's folder, allowed is a model's: {folder / 'policy'}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{path}: no {CONFIG} there, allowed is a folder in Hugging Face layout")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with _NoDraws(), torch.device("meta"):  # no memory: the file's tensors take these places
            model, layout = hf.from_hf(config, str(folder / CONFIG))
    except CheckpointError:
        raise
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / CONFIG}:{error.lineno}: no JSON ({error.msg})") from error
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: missing or wrong field ({error})") from error
    return model, layout, folder
