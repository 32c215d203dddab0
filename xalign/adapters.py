"""LoRA adapters as the programs' settings ask for them, and in a folder as peft has it: adapter_config.json, and
adapter_model.safetensors with Hugging Face's names."""

import json
import math
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from xalign.checkpoint import STATE, _network, _NoDraws, atomic_folder, load_state
from xalign.config import LoRAOptions
from xalign.disk import write_atomically
from xalign.errors import CheckpointError, ConfigError
from xalign.hf import to_hf
from xalign.nn.lora import apply_lora, load_lora, lora_state_dict
from xalign.nn.transformer import Decoder, TransformerWrapper
from xalign.tokenizer_base import read_json
from xalign.weights import _Reader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, PARTS = "base_model.model.", {"A.weight": "lora_a", "B.weight": "lora_b"}
# Fields that are read here, and those that say no more than the tensors do. Any other one that is on is refused: it changes
# what is computed; so do ways to begin that change the base.
KNOWN = {"task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "revision",
         "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
         "fan_in_fan_out", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size"}
ALLOWED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


def adapt(model: nn.Module, options: LoRAOptions, seed: int = 0) -> None:
    """Put the adapters that the settings ask for on a model; none without `lora_r`. A seed gives the same adapters.

    Layers go by our names or by those of the model's Hugging Face folder (c_proj of GPT-2 is two of ours). Raises `ConfigError`
    for other names.
    """
    if options.lora_r is None:
        return
    theirs: dict[str, list[str]] = {"all-linear": []}
    for ours, name in _names(model).items():
        theirs.setdefault(name.rpartition(".")[2], []).append(ours.rpartition(".")[2])
    wanted = options.lora_target_modules
    targets = [ours for name in wanted for ours in dict.fromkeys(theirs.get(name, [name]))]
    torch.manual_seed(seed)
    try:
        with _NoDraws() if next(model.parameters()).is_meta else nullcontext():
            apply_lora(model, options.lora_r, options.lora_alpha, options.lora_dropout,
                       None if not wanted or "all-linear" in wanted else targets, options.use_rslora)
    except ConfigError as error:
        raise ConfigError(f"--lora-target-modules: {error}") from None


def unplaced(model: nn.Module) -> str:
    """A layer with an adapter that has no place in peft's folder (see `save_adapter`), or ""."""
    layers = {name.removesuffix(".scale") for name in lora_state_dict(model) if name.endswith(".scale")}
    return min(layers - _names(model).keys(), default="")


def save_adapter(model: nn.Module, path: str | os.PathLike, base: str | None = None) -> None:
    """Write a model's adapters, whole or not at all; `base` is where the model without them is, a folder or the hub's name.

    Raises `ConfigError` for a model without adapters, `CheckpointError` where the folder can't be written, and for layers that
    share a tensor with others in the model's Hugging Face folder (GPT-2's and NeoX's queries, keys and values).
    """
    names, state = _names(model), lora_state_dict(model)
    if fused := unplaced(model):
        raise CheckpointError(f"{fused} shares its tensor in a Hugging Face folder with others, and its adapter has no "
                              "place there: allowed are adapters of other layers, or to merge")
    layers = {name.removesuffix(".scale"): float(scale) for name, scale in state.items() if name.endswith(".scale")}
    ranks = {names[layer]: len(state[f"{layer}.lora_a"]) for layer in layers}
    alphas = {names[layer]: scale * ranks[names[layer]] for layer, scale in layers.items()}
    rank, alpha = (next(iter(of.values())) for of in (ranks, alphas))
    ends = {name.rpartition(".")[2] for name in ranks}
    all_of_them = {name for name in names.values() if name.rpartition(".")[2] in ends} == ranks.keys()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": rank,
              "lora_alpha": alpha, "target_modules": sorted(ends if all_of_them else ranks), "bias": "none",
              "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
              "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha}}
    tensors = {f"{PREFIX}{names[layer]}.lora_{theirs}": state[f"{layer}.{ours}"].contiguous()
               for layer in layers for theirs, ours in PARTS.items()}
    with atomic_folder(path) as folder:
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # its way to say that the disk is full
            raise CheckpointError(f"{path} can't be written ({error})") from error
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Put a folder's adapters on a model, quantised or not, or in the place of those that it has.

    The folder is one of `save_adapter` or of peft, or a checkpoint of a training of adapters.
    Raises `CheckpointError` for a damaged folder and for adapters that are more than W x + s B A x, `ConfigError` for those of
    another model.
    """
    file, config = Path(path) / WEIGHTS, read_json(Path(path) / CONFIG)
    if not config and (Path(path) / STATE).is_file() and "adapters" in (state := load_state(path)):
        load_lora(model, state["adapters"])
        return
    if not config:
        raise CheckpointError(f"{path}: no {CONFIG} there, allowed is a folder of adapters: ours, peft's, or a checkpoint")
    for field, value in {"peft_type": "none", **config}.items():
        if value and field not in KNOWN and value not in (allowed := ALLOWED.get(field, (None,))):
            raise CheckpointError(f"{Path(path) / CONFIG}: {field} is {value!r}, allowed is {allowed[0]!r}")
    ours, reader, state = {theirs: name for name, theirs in _names(model).items()}, _Reader(), {}
    for name in reader.names(file):
        layer, _, side = name.removeprefix(PREFIX).rpartition(".lora_")
        if layer not in ours or side not in PARTS:
            raise CheckpointError(f"{file}: {name} belongs to no layer of this model, allowed are lora_A and lora_B of its own")
        tensor = reader.get(file, name)
        state[f"{ours[layer]}.{PARTS[side]}"] = tensor.clone()  # it is the mapped file
        if side == "A.weight":
            alpha, told, rank = _told(config, "alpha", layer), _told(config, "rank", layer), len(tensor)
            if told != rank or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise CheckpointError(f"{Path(path) / CONFIG}: r is {told!r} and lora_alpha {alpha!r} for {layer}, allowed are "
                                      f"the tensors' rank, {rank}, and a finite number > 0")
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            state[f"{ours[layer]}.scale"] = torch.tensor(scale, dtype=torch.float64)
    load_lora(model, state)


def _told(config: dict[str, Any], what: str, layer: str) -> Any:
    """The alpha or rank that peft's config has for a layer."""
    own = [value for key, value in (config.get(f"{what}_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", layer)]
    return (own or [config.get({"alpha": "lora_alpha", "rank": "r"}[what], 8)])[0]


def _names(model: nn.Module) -> dict[str, str]:
    """Those layers of a model's network that are a module of their own in its Hugging Face folder, with their name there."""
    network = _network(model)
    with _NoDraws(), torch.device("meta"):  # the names are those of a model without adapters
        plain = TransformerWrapper(**network.config, attn_layers=Decoder(**network.attn_layers.config))
    entries = [entry for entry in to_hf(plain)[1].entries if len(entry.ours) == 1]
    return {entry.ours[0].removesuffix(".weight"): entry.file.removesuffix(".weight") for entry in entries}
