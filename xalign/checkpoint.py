"""Save, load and resume, atomically. A checkpoint folder is a Hugging Face folder; training state lies in `training/`."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from xalign import hf
from xalign.dpo import DPO, unwrap
from xalign.errors import CheckpointError
from xalign.nn.transformer import TransformerWrapper
from xalign.tokenizers import Tokenizer, load_tokenizer

# what a checkpoint folder may hold: a folder with anything else is never replaced
OWN = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "training"}
WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "training/state.pt"


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
    """A folder to fill that appears under its name only when the block has ended well; it replaces an older one."""
    path = Path(path).resolve()
    foreign = sorted({p.name for p in path.iterdir()} - OWN) if path.is_dir() else []
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
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _network(model: nn.Module) -> TransformerWrapper:
    network = unwrap(model.policy_model if isinstance(model, DPO) else model)
    if not isinstance(network, TransformerWrapper):
        raise CheckpointError(f"{type(network).__name__} can't be saved, allowed is a TransformerWrapper or a wrapper of one")
    return network


def save_pretrained(model: nn.Module, path: str | os.PathLike, tokenizer: Tokenizer | None = None,
                    state: dict[str, Any] | None = None) -> None:
    """Write a checkpoint folder, whole or not at all; wrappers are unwrapped, `state` goes to training/state.pt."""
    network = _network(model)
    with atomic_folder(path) as folder:
        config, tensors = hf.to_hf(network, tokenizer)
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # its way to say that the disk is full
            raise CheckpointError(f"{path} can't be written ({error})") from error
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read
        ends = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None}
        write_atomically(folder / "generation_config.json", json.dumps(ends, indent=2) + "\n")
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


def load_pretrained(path: str | os.PathLike, dtype: str | torch.dtype | None = None,
                    device: str | torch.device | None = None) -> tuple[TransformerWrapper, Tokenizer | None]:
    """A model and its tokenizer (None where the folder has none) from a checkpoint folder, in eval mode.

    `dtype` None keeps the file's. Raises `CheckpointError` for a missing or damaged folder, tensors of another shape,
    missing or unknown ones, and values that are not finite.
    """
    folder = Path(path)
    wanted = hf.torch_dtype(dtype)
    if not (folder / WEIGHTS).exists() and (folder / "policy" / CONFIG).is_file():
        raise CheckpointError(f"{path} is a run's folder, allowed is a model's: {folder / 'policy'}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{path}: no {CONFIG} there, allowed is a folder in Hugging Face layout")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with torch.device("meta"):  # no memory, no draws: the file's tensors take these places
            model, names = hf.from_hf(config, str(folder / CONFIG))
    except CheckpointError:
        raise
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / CONFIG}:{error.lineno}: no JSON ({error.msg})") from error
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: missing or wrong field ({error})") from error
    load_weights(model, folder / WEIGHTS, names)
    return model.to(device=device, dtype=wanted or model.token_emb.weight.dtype).eval(), load_tokenizer(folder)


def load_weights(model: nn.Module, path: Path, names: dict[str, str]) -> None:
    """Put the tensors of a safetensors file into a model; `names` maps the model's names to the file's."""
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            wanted = set(names.values())
            for problem, keys in (("lacks", wanted - present), ("has the unknown", present - wanted)):
                if keys:
                    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                    raise CheckpointError(f"{path}: {problem} tensor {min(keys)}{more}")
            tensors = {name: file.get_tensor(key) for name, key in names.items()}
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read as safetensors ({error})") from error
    for name, parameter in model.state_dict().items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"{path}: {names[name]} has shape {tuple(tensor.shape)}, allowed is the shape that "
                                  f"{CONFIG} gives, {tuple(parameter.shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise CheckpointError(f"{path}: {names[name]} is {tensor.dtype}, allowed is float32, bfloat16 or float16")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {names[name]} holds values that are not finite (NaN or infinity)")
    model.load_state_dict(tensors, assign=True)
