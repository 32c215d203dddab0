"""Save, load and resume, atomically. A checkpoint folder is a Hugging Face folder; training state lies in `training/`."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from torch.overrides import TorchFunctionMode

from xalign import distributed, hf, hub
from xalign.disk import write_atomically, writing
from xalign.dpo import DPO, unwrap
from xalign.errors import CheckpointError, ConfigError
from xalign.families import Layout
from xalign.nn.lora import has_lora, load_lora, lora_state_dict
from xalign.nn.reward import RewardModel
from xalign.nn.transformer import TransformerWrapper
from xalign.tokenizer_base import read_json
from xalign.tokenizer_json import FILES as TOKENIZER_FILES
from xalign.tokenizers import Tokenizer, load_tokenizer
from xalign.weights import INDEX, SHARD, SINGLE, load_weights, one_reason, refuse_pointer, save_weights, shard_bytes

CONFIG, GENERATION, STATE = "config.json", "generation_config.json", "training/state.pt"
# What a save replaces, whoever wrote it (we, transformers, the hub): a mixture of two models' files would load as a third.
OWN = {CONFIG, GENERATION, SINGLE, INDEX, "training", *TOKENIZER_FILES, "chat_template.json", "adapter_config.json",
       "adapter_model.safetensors"}
# What people write about a model stays beside its new weights. A folder with anything else (pickled weights too: the only
# copy, maybe) is never replaced.
KEPT = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", ".gitattributes"}


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill that appears under its name only when the block has ended well; it replaces an older one.

    Of two processes that do so at once the later one wins. Raises `CheckpointError` where there is something else than a
    checkpoint, and where it can't be written; a model card and a licence move in.
    """
    path = Path(path).resolve()
    try:
        if Path.cwd().is_relative_to(path):
            raise CheckpointError(f"{path} is the working directory or above it, allowed is another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        # The host is in the name because a process id means nothing on another one.
        temporary, old = (path.with_name(f".{path.name}.{os.getpid()}@{_host()}.{kind}") for kind in ("tmp", "old"))
        with _alone(path.parent):
            _sweep(path)
            foreign = sorted(p.name for p in path.iterdir() if not _is_own(p)) if path.is_dir() else []
            if foreign or (path.exists() and not path.is_dir()):
                what = f"holds {foreign[0]!r}, which is no part of a checkpoint" if foreign else "is a file"
                raise CheckpointError(f"{path} {what}: allowed is a new folder, or a checkpoint's to replace")
            temporary.mkdir()
        try:
            yield temporary
            with _alone(path.parent):
                for kept in (p for p in path.glob("*") if p.name in KEPT):
                    shutil.copy2(kept, temporary)
                try:
                    if path.exists():
                        path.rename(old)
                    temporary.rename(path)
                finally:
                    if old.exists() and not path.exists():
                        old.rename(path)
        finally:
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} can't be written ({error.strerror or error})") from error


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Hold a lock on a folder, so that of two saves into it one swaps its folders after the other."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks have no such locks; then a race is an error, never a mixture
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Undo what saves to `path` left that were killed on this host: a folder moved away comes back, half ones go."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d{1,7})@" + re.escape(_host()) + r"\.(tmp|old)")
    for leftover, name in [(p, m) for p in path.parent.iterdir() if (m := pattern.fullmatch(p.name))]:
        try:
            if int(name[1]) == os.getpid():  # of a process before this one
                raise ProcessLookupError
            os.kill(int(name[1]), 0)
        except ProcessLookupError:
            if name[2] == "old" and not path.exists():
                leftover.rename(path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:  # it lives, and is another user's
            continue


def _host() -> str:
    return os.uname().nodename


def _is_own(entry: Path) -> bool:
    return entry.name in OWN or bool(SHARD.fullmatch(entry.name)) or (entry.name in KEPT and entry.is_file())


def _network(model: nn.Module) -> TransformerWrapper:
    network = unwrap(model.policy_model if isinstance(model, DPO) else model)
    if not isinstance(network, TransformerWrapper):
        raise CheckpointError(f"{type(network).__name__} can't be saved, allowed is a TransformerWrapper or a wrapper of one")
    return network


def _whole(network: TransformerWrapper) -> TransformerWrapper:
    if has_lora(network):
        raise CheckpointError("a model with LoRA adapters can't be saved whole, allowed is xalign.nn.lora.merge(model) before, "
                              "or xalign.adapters.save_adapter(model, folder)")
    return network


def save_pretrained(model: nn.Module, path: str | os.PathLike, tokenizer: Tokenizer | None = None,
                    state: dict[str, Any] | None = None, max_shard_size: int | float | str = 5 * 10**9) -> None:
    """Write a checkpoint folder, whole or not at all; wrappers are unwrapped, `state` goes to training/state.pt.

    A `RewardModel` becomes a folder for transformers' `AutoModelForSequenceClassification`, with `score.weight`, `mean` and
    `std`; without `tokenizer` with its own, whose pad becomes another token where it is one that ends a text.

    Weights of more than `max_shard_size` bytes (or "5GB", "500MiB") become shards with an index. generation_config.json is
    the one that the model was loaded with; the ids in it, and in config.json, are the tokenizer's where there is one.
    Raises `CheckpointError` for a folder that holds something else than a checkpoint or can't be written (a full disk, say),
    `ConfigError` for another `max_shard_size`.
    """
    network, room = _whole(_network(model)), shard_bytes(max_shard_size)
    rewards = model if isinstance(model, RewardModel) else None
    if rewards is not None and (tokenizer := tokenizer or rewards.tokenizer) is not None:
        tokenizer = tokenizer.padded_apart() or tokenizer
    with atomic_folder(path) as folder:
        config, layout = hf.to_hf(network, tokenizer) if rewards is None else hf.reward_to_hf(rewards, tokenizer)
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        try:
            written = save_weights(rewards or network, folder, layout, room)
        except SafetensorError as error:  # its way to say that the disk is full
            raise CheckpointError(f"{path} can't be written ({error})") from error
        for file in written:
            file.chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read
        if rewards is None:
            write_atomically(folder / GENERATION, json.dumps(hf.generation(network, tokenizer), indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(folder)
        if state is not None:
            _save_state(folder, state)


def _save_state(folder: Path, state: dict[str, Any]) -> None:
    (folder / STATE).parent.mkdir()
    with writing(folder / STATE), open(folder / STATE, "wb") as opened:  # of a path torch won't tell why it failed
        torch.save(state, opened)


def save_trained(model: nn.Module, path: str | os.PathLike, tokenizer: Tokenizer | None, state: dict[str, Any]) -> None:
    """Write a checkpoint to go on from: `save_pretrained`'s, or of a model with adapters these and `state` alone."""
    if not has_lora(model):
        return save_pretrained(model, path, tokenizer, state)
    head = {"head": model.head.weight.detach()} if isinstance(model, RewardModel) else {}
    with atomic_folder(path) as folder:
        _save_state(folder, state | head | {"adapters": lora_state_dict(model), "frozen": frozen_bits(model)})


def load_trained(path: str | os.PathLike) -> tuple[nn.Module | Path, dict[str, Any]]:
    """Model and state of a checkpoint of `save_trained`; of adapters, which are in the state, and of one in shards, which
    `sharding` reads, the folder in the model's place.

    Raises `CheckpointError` for a damaged folder.
    """
    state = load_state(path)
    if "files" in state:
        return Path(path), state
    if "adapters" not in state:
        return (load_reward(path) if holds_reward(path) else load_pretrained(path)[0]), state
    if not all(bool(t.isfinite().all()) for t in state["adapters"].values()):
        raise CheckpointError(f"{path}: the adapters hold values that are not finite")
    return Path(path), state


def put_trained(model: nn.Module, found: nn.Module | Path, state: dict[str, Any]) -> None:
    """Put what `load_trained` found on a model of the same shape; the state lets adapters go.

    Raises `CheckpointError` for adapters of other weights, `ConfigError` for those of another shape.
    """
    if isinstance(found, nn.Module):
        model.load_state_dict(found.state_dict())
        return
    if state.pop("frozen") != frozen_bits(model):
        raise CheckpointError(f"{found} holds adapters of other weights than the model's, allowed are the same as before")
    load_lora(model, state.pop("adapters"))
    if isinstance(model, RewardModel):
        with torch.no_grad():
            model.head.weight.copy_(state.pop("head"))


def frozen_bits(model: nn.Module) -> int:
    """A sum that tells apart the weights under adapters (of a quantised model what stayed plain: packing differs by CPU)."""
    return distributed.checksum([p for p in model.parameters() if not p.requires_grad])


def load_state(path: str | os.PathLike) -> dict[str, Any]:
    """The training state of a checkpoint folder."""
    try:
        return torch.load(Path(path) / STATE, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: no usable training state ({one_reason(error)})") from error


class _NoDraws(TorchFunctionMode):
    """Leave new weights as they are: on the meta device torch draws through sympy, 0.7 s and 80 MB for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func in (nn.init.normal_, nn.init.kaiming_uniform_) else func(*args, **(kwargs or {}))


def load_pretrained(path: str | os.PathLike, dtype: str | torch.dtype | None = None,
                    device: str | torch.device | None = None, *, allow_pickle: bool = False,
                    revision: str | None = None) -> tuple[TransformerWrapper, Tokenizer | None]:
    """A model and its tokenizer (None where the folder has none) from a folder or a hub's `owner/name`, in eval mode.

    `dtype` None keeps the file's; `revision` is a branch, tag or commit on the hub. Weights are safetensors, one file or
    shards; pickled ones only with `allow_pickle`, and then without running their code. The peak of memory is about one copy
    of the weights in `dtype`. Raises `CheckpointError` for a missing or damaged folder, tensors of another shape or kind,
    missing or unknown ones, values that are not finite, an architecture that is not supported, and trouble with the hub;
    `ConfigError` for a device that can't be used here.
    """
    wanted = hf.torch_dtype(dtype)
    _check_device(device)
    model, layout, folder = outline(path, allow_pickle=allow_pickle, revision=revision)
    tokenizer = load_tokenizer(folder)  # before the weights: what is wrong with it is told at once
    load_weights(model, folder, layout, wanted, device, allow_pickle)
    return model.eval(), tokenizer


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises many kinds
        raise ConfigError(f"device is {device!r}, not usable here ({str(error).splitlines()[0]})") from error


def load_reward(path: str | os.PathLike, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
                value_head_prefix: str | None = None, *, allow_pickle: bool = False,
                revision: str | None = None) -> RewardModel:
    """A reward model from a folder or a hub's `owner/name`, in eval mode, as `RewardModel.from_pretrained`; its tokenizer is
    `.tokenizer` (None where there is none), and `mean`, `std` and `normalize_reward` are those of config.json.

    The folder is ours, one of transformers' `AutoModelForSequenceClassification` with one label, or OpenRLHF's: a decoder, and
    a head 1 wide that is `value_head_prefix`.weight (None: config.json's field of this name, or score). Other arguments and
    errors are `load_pretrained`'s; a folder without a trained head, and a head of another width, are `CheckpointError`s.
    """
    wanted = hf.torch_dtype(dtype)
    _check_device(device)
    folder, config = _folder(path, allow_pickle, revision)
    model, layout = _outline(folder, config, value_head_prefix)
    assert isinstance(model, RewardModel)
    model.tokenizer = load_tokenizer(folder)
    load_weights(model, folder, layout, wanted, device, allow_pickle)
    if not bool(model.head.weight.any()):
        raise CheckpointError(f"{path}: the reward head {layout.head} is all 0, allowed is a trained one")
    return model.eval()


def holds_reward(path: str | os.PathLike, *, allow_pickle: bool = False, revision: str | None = None) -> bool:
    """Whether a folder, or a hub's `owner/name`, holds a reward model, by its config.json."""
    return hf.is_reward(_folder(path, allow_pickle, revision)[1])


RewardModel.from_pretrained = staticmethod(load_reward)
RewardModel.save_pretrained = save_pretrained


def outline(path: str | os.PathLike, *, allow_pickle: bool = False, revision: str | None = None,
            rewards: bool = False) -> tuple[TransformerWrapper, Layout, Path]:
    """A checkpoint's model on the meta device, without weights, with their layout and the folder; see `load_pretrained`.

    With `rewards` it may be a reward model's, of which the decoder is what is given.
    """
    folder, config = _folder(path, allow_pickle, revision)
    if hf.is_reward(config) and not rewards:
        raise CheckpointError(f"{path} is a reward model's folder, allowed is a language model's: "
                              "RewardModel.from_pretrained opens it")
    model, layout = _outline(folder, config, None if hf.is_reward(config) else False)
    return _network(model), layout, folder


def _folder(path: str | os.PathLike, allow_pickle: bool, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """A model's folder, fetched where it is on the hub, and its config.json."""
    folder = Path(path)
    if hub.is_hub_name(str(path)):
        folder = hub.model_folder(str(path), revision, allow_pickle=allow_pickle)
    elif revision is not None:
        raise CheckpointError(f"{path} is a folder, and revision is {revision!r}: allowed is a hub's name, or no revision")
    for part in ("policy", "reward"):
        if not (folder / SINGLE).exists() and (folder / part / CONFIG).is_file():
            raise CheckpointError(f"{path} is a run's folder, allowed is a model's: {folder / part}")
    if not (folder / CONFIG).is_file():
        if (folder / STATE).is_file():
            raise CheckpointError(f"{path} holds a training's shards, allowed is a model's folder, such as the run's policy")
        raise CheckpointError(f"{path}: no {CONFIG} there, allowed is a folder in Hugging Face layout")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / CONFIG}:{error.lineno}: no JSON ({error.msg})") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: missing or wrong field ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG}: missing or wrong field (it holds a {type(config).__name__}, no object)")
    return folder, config


def _outline(folder: Path, config: dict[str, Any], head: str | Literal[False] | None = False) -> tuple[nn.Module, Layout]:
    """A folder's model on the meta device, and its layout; a reward model unless `head`, its name or None, is False."""
    where = str(folder / CONFIG)
    try:
        with _NoDraws(), torch.device("meta"):  # no memory: the file's tensors take these places
            model, layout = hf.from_hf(config, where) if head is False else hf.reward_from_hf(config, where, head)
    except CheckpointError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{where}: missing or wrong field ({error})") from error
    for name in TOKENIZER_FILES:
        refuse_pointer(folder / name)
    generation = {k: config[k] for k in hf.IDS if config.get(k) is not None} | read_json(folder / GENERATION)
    _network(model).generation = generation
    return model, layout
