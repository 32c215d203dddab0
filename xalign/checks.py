"""What settings ask for, looked at before anything is read or trained: the run's folder, the loss, and what can't be done."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from xalign import distributed
from xalign.adapters import adapt
from xalign.checkpoint import outline
from xalign.config import DPOConfig, RewardConfig, SFTConfig, flatten
from xalign.dpo import DPO
from xalign.errors import ConfigError
from xalign.objectives import Moving
from xalign.prepare import data_digest
from xalign.runs import RunFolder
from xalign.stages import quantisation, scratch_model

# settings that may differ when a run is resumed: they change nothing in what is computed
VOLATILE = ("profile", "resume", "overwrite", "dry_run", "report_to", "output_dir", "reference_cache", "parallel",
            "checkpoint_type")
Config = DPOConfig | RewardConfig | SFTConfig


def claim(config: Any, program: str) -> RunFolder:
    """Take the run's folder for this process and configuration; see `RunFolder.claim`."""
    run = config.run
    folder = RunFolder(run.output_dir or Path("runs") / (run.run_name or program))
    if run.resume and not (folder.path / "config.json").exists():
        raise ConfigError(f"--resume: there is no run in {folder.path}")
    if run.resume and run.overwrite:
        raise ConfigError("--resume and --overwrite are both given, allowed is one of them")
    settings = {"program": program, **{k: v for k, v in flatten(config).items() if k not in VOLATILE}}
    names = [settings.get(name) or () for name in ("dataset", "eval_dataset", "sft_dataset", "eval_text")]
    files = [file for value in names for file in ((value,) if isinstance(value, str) else value)]
    settings["data_sha256"] = distributed.once(lambda: data_digest(files))
    folder.claim({k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}, run.overwrite)
    return folder


def check(config: Any) -> None:
    """Refuse before anything is read or trained what could only fail after it."""
    refuse_half_adapters(config)
    refuse_sharded_adapters(config)
    if config.model.model:
        refuse_unused(config)
        if config.lora.lora_r is not None:
            given = config.model
            adapt(outline(str(given.model), allow_pickle=given.allow_pickle, revision=given.revision,
                          rewards=isinstance(config, RewardConfig))[0], config.lora)
    else:
        if config.model.revision is not None:
            raise ConfigError(f"--revision {config.model.revision} goes with --model")
        with torch.device("meta"):
            adapt(scratch_model(config.model, config.model.vocab_size, 0), config.lora)
    if not isinstance(config, DPOConfig):
        return
    cache = config.loss.reference_cache
    if cache and Path(cache).exists() and not Path(cache).is_dir():
        raise ConfigError(f"--reference-cache {cache} is a file, allowed is a folder, which need not exist")
    asked = preference(config, nn.Identity())
    moved(config, asked)
    if not asked.compares and config.loss.ref_model:
        raise ConfigError(f"--ref-model is {config.loss.ref_model}, but the loss {config.loss.loss_type} asks for no "
                          "reference: allowed is to leave it out")


def refuse_sharded_adapters(config: Any) -> None:
    """Adapters are small: every process holds them whole, and their frozen base too."""
    t = config.run
    sharded = "--parallel fsdp" if t.parallel == "fsdp" else "--checkpoint-type sharded" * (t.checkpoint_type == "sharded")
    if sharded and config.lora.lora_r is not None:
        raise ConfigError(f"{sharded} and --lora-r {config.lora.lora_r} are both given, allowed is one of them")


def refuse_unused(config: Any) -> None:
    """Settings of a model from scratch say nothing about a given one: whoever sets one expects something else."""
    given = ("model", "revision", "allow_pickle")
    groups = [config.model, *([config.sft] if isinstance(config, DPOConfig | RewardConfig) else [])]
    unused = [(f, getattr(g, f.name)) for g in groups for f in fields(g) if f.name not in given]
    names = [f.name for f, value in unused if value != f.default]
    names += ["sft_dataset"] if getattr(config.data, "sft_dataset", None) else []
    if names:
        raise ConfigError(f"--{names[0].replace('_', '-')} is for a model from scratch, but --model is {config.model.model}: "
                          "allowed is one of them")


def refuse_half_adapters(config: Config) -> None:
    """Refuse settings of adapters without adapters: whoever sets one expects them."""
    quantisation(config.quant)
    if config.lora.lora_r is not None:
        if isinstance(config, SFTConfig) and not config.model.model:
            raise ConfigError(f"--lora-r is {config.lora.lora_r} for a model from scratch, allowed are adapters of a --model")
        return
    for flag in ("load_in_8bit", "load_in_4bit"):
        if getattr(config.quant, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} without --lora-r: quantised weights can't be trained, allowed is to "
                              "train adapters (--lora-r 16), or without quantisation")
    for f in fields(config.lora):
        if getattr(config.lora, f.name) != f.default:
            raise ConfigError(f"--{f.name.replace('_', '-')} goes with --lora-r, the adapters' rank")


def preference(config: DPOConfig, policy: nn.Module, reference: nn.Module | None = None) -> DPO:
    """The loss module; raises `ConfigError` for settings that the loss does not allow."""
    loss = config.loss
    try:
        weights = [float(weight) for weight in loss.loss_weights.split(",")] if loss.loss_weights else None
    except ValueError:
        raise ConfigError(f"--loss-weights is {loss.loss_weights}, allowed are numbers with commas between them") from None
    own = ("gamma", "alpha", "tau", "desirable_weight", "undesirable_weight")
    return DPO(policy, beta=loss.beta, ref_model=reference, loss=loss.loss_type, label_smoothing=loss.label_smoothing,
               loss_weights=weights, loss_options={name: getattr(loss, name) for name in own}, divergence=loss.f_divergence,
               divergence_alpha=loss.f_alpha, ld_alpha=loss.ld_alpha, use_weighting=loss.use_weighting,
               share_prefix=loss.share_prefix, packed=loss.packed)


def moved(config: DPOConfig, dpo: DPO) -> Moving | None:
    """The reference that follows the policy, where the settings ask for one. Raises `ConfigError` for those that don't fit."""
    loss, run = config.loss, config.run
    if loss.sync_ref_model:
        against = {"--parallel fsdp": run.parallel == "fsdp", "--checkpoint-type sharded": run.checkpoint_type == "sharded",
                   "--lora-r": config.lora.lora_r is not None, "--reference-cache": loss.reference_cache is not None}
        if given := [flag for flag, is_given in against.items() if is_given]:
            raise ConfigError(f"--sync-ref-model and {given[0]} are both given, allowed is one of them: the reference changes, "
                              "and is held whole beside the policy")
        return Moving(dpo, loss.ref_model_mixup_alpha, loss.ref_model_sync_steps)
    for f in fields(loss):
        if f.name in ("ref_model_mixup_alpha", "ref_model_sync_steps") and getattr(loss, f.name) != f.default:
            raise ConfigError(f"--{f.name.replace('_', '-')} goes with --sync-ref-model")
    return None
