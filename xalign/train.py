"""The training programs from flags to report: `run_sft` and `run_dpo`."""

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from xalign.checkpoint import load_pretrained, save_pretrained
from xalign.config import DPOConfig, SFTConfig, flatten
from xalign.data.collate import (
    EncodedPair,
    Schedule,
    TruncationMode,
    TruncationReport,
    collate_pairs,
    encode_pair,
    mixture,
    truncate_pair,
)
from xalign.data.records import Example, PreferencePair
from xalign.data.sources import read_examples
from xalign.dpo import DPO
from xalign.errors import ConfigError, DataError, Diverged
from xalign.evaluation.compare import compare, quick
from xalign.evaluation.metrics import pairs_logps, sample
from xalign.evaluation.report import write_report
from xalign.hf import torch_dtype
from xalign.nn.transformer import TransformerWrapper
from xalign.objectives import Preference
from xalign.runs import SAMPLES, RunFolder
from xalign.stages import (
    EMBEDDED,
    choose_device,
    count_steps,
    encode_examples,
    hold_out,
    imitate,
    is_toy,
    load_model,
    loop_options,
    micro_batches,
    preference_data,
    prompt_text,
    say,
    scratch_model,
    scratch_tokenizer,
    sft_loop,
    show_record,
    window,
)
from xalign.tokenizers import Tokenizer
from xalign.training import autocast, train

# settings that may differ when a run is resumed: they change nothing in what is computed
VOLATILE = ("resume", "overwrite", "dry_run", "report_to", "output_dir")


def claim(config: Any, program: str) -> RunFolder:
    """Take the run's folder for this process and configuration; see `RunFolder.claim`."""
    run = config.run
    folder = RunFolder(run.output_dir or Path("runs") / (run.run_name or program))
    if run.resume and not (folder.path / "config.json").exists():
        raise ConfigError(f"--resume: there is no run in {folder.path}")
    if run.resume and run.overwrite:
        raise ConfigError("--resume and --overwrite are both given, allowed is one of them")
    settings = {"program": program, **{k: v for k, v in flatten(config).items() if k not in VOLATILE}}
    settings["data_sha256"] = data_digest(settings)
    folder.claim({k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}, run.overwrite)
    return folder


def data_digest(settings: dict[str, Any]) -> str:
    """A hash of what the data files hold, so that a run never goes on with other data under the same name."""
    whole = hashlib.sha256()
    for name in ("dataset", "eval_dataset", "sft_dataset"):
        value = settings.get(name) or ()
        for path in (value,) if isinstance(value, str) else value:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def check(config: Any) -> None:
    """Refuse before anything is read or trained what could only fail after it."""
    if not config.model.model:
        with torch.device("meta"):
            scratch_model(config.model, config.model.vocab_size, 0)
    if isinstance(config, DPOConfig):
        preference(config, nn.Identity())


def start_reporting(config: Any, run: RunFolder) -> None:
    if config.run.report_to == "wandb":
        run.start_wandb(config.run.run_name or run.path.name, flatten(config))


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- imitation ------------------------------------------------------------------------------------------------------


def run_sft(config: SFTConfig) -> None:
    """`xalign sft`: tokenizer and model from scratch, or --model, trained on text; ends in <folder>/policy."""
    check(config)
    data, training = config.data, config.training
    files = data.dataset or (str(EMBEDDED / "corpus.txt"),)
    if data.dataset_weights and len(data.dataset_weights) != len(files):
        raise ConfigError(f"--dataset-weights has {len(data.dataset_weights)} numbers for {len(files)} files, allowed is "
                          "one each")
    device, dtype = choose_device(config.run.device), config.run.dtype
    sets = [read_examples(file, every_turn=True) for file in files]
    weights = data.dataset_weights or (1.0,) * len(sets)
    rows = [sets[i][j] for i, j in mixture([len(s) for s in sets], weights, training.seed, 0)]
    if data.eval_dataset:
        held_out = read_examples(data.eval_dataset, every_turn=True)
    else:
        rows, held_out = hold_out(rows, lambda e: f"{e.prompt}{e.completion}", 20, training.seed)
    if config.model.model:
        model, tokenizer = load_model(config.model.model, dtype, device)
    else:
        tokenizer = scratch_tokenizer((t for e in rows for t in (e.prompt, e.completion) if t), config.model.vocab_size)
        model = scratch_model(config.model, tokenizer.vocab_size, training.seed).to(device, torch_dtype(dtype))
    max_length = window(data.max_length, model)
    examples = encode_examples(rows, tokenizer, max_length, data.truncation_mode)
    if config.run.dry_run:
        print(f"{parameter_count(model):,} parameters, {tokenizer.vocab_size:,} pieces; first of {len(examples):,} records:")
        print(show_record(tokenizer, examples[0].ids, examples[0].loss_mask))
        return
    held = encode_examples(held_out, tokenizer, max_length, data.truncation_mode)
    with claim(config, "sft") as run:
        policy = run.path / "policy"
        if policy.exists():
            say(f"{run.path} is finished (--overwrite trains it anew); the model is in")
        else:
            start_reporting(config, run)
            model.attn_layers.gradient_checkpointing = training.gradient_checkpointing
            imitate(model, tokenizer, examples, held, run, loop_options(training, config.run),
                    batch_size=training.batch_size, accumulation=training.gradient_accumulation_steps,
                    epochs=training.num_train_epochs, max_steps=training.max_steps)
            save_pretrained(model, policy, tokenizer)
        print(policy)


# -- preferences ----------------------------------------------------------------------------------------------------


def run_dpo(config: DPOConfig) -> None:
    """`train_dpo.py`: (tokenizer and SFT,) reference, DPO, evaluation, report; every finished stage is kept."""
    check(config)
    device = choose_device(config.run.device)
    pairs, held_out, examples = preference_data(config.data, config.training.seed)
    if config.run.dry_run:
        return dry_run(config, pairs, examples, device)
    with claim(config, "dpo") as run:
        report = run.path / "report.md"
        if report.exists():
            say(f"{run.path} is finished; --overwrite runs it anew. From its report:")
            print(report.read_text(encoding="utf-8").split("## Samples")[0].strip())
        else:
            start_reporting(config, run)
            print(prefer(config, run, pairs, held_out, examples, device))
            say(f"report: {report}")


def prefer(config: DPOConfig, run: RunFolder, pairs: list[PreferencePair], held_out: list[PreferencePair],
           examples: list[Example], device: torch.device) -> str:
    """All stages in a run folder; gives the table of the report."""
    started = time.time()
    given = load_model(config.loss.ref_model, config.run.dtype, device) if config.loss.ref_model else None
    policy, tokenizer = base_model(config, run, examples, device)
    if given is not None and not same_ids(given[1], tokenizer, pairs):
        raise ConfigError(f"--ref-model {config.loss.ref_model} has another tokenizer than the policy, allowed is the same")
    untrained, gold_known = None, is_toy(p.prompt for p in held_out)
    if gold_known and not config.model.model:
        untrained = scratch_model(config.model, tokenizer.vocab_size, config.training.seed).to(device)
    dpo = preference(config, policy, given[0] if given is not None else None)
    max_length = window(config.data.max_length, policy)
    train_pairs = encode_pairs(pairs, tokenizer, max_length, config.data.truncation_mode, "train")
    eval_pairs = encode_pairs(held_out, tokenizer, max_length, config.data.truncation_mode, "held out")
    if not (run.path / "policy").exists():
        align(config, run, dpo, tokenizer, train_pairs, eval_pairs, held_out)
        save_pretrained(policy, run.path / "policy", tokenizer)
    else:
        policy.load_state_dict(load_pretrained(run.path / "policy", device=device)[0].state_dict())
    e = config.evaluation
    result = compare(dpo, untrained, tokenizer, held_out, eval_pairs, gold_known=gold_known,
                     prompts=e.eval_prompts, samples=e.eval_samples, max_new_tokens=e.eval_max_new_tokens,
                     seed=config.training.seed)
    result.numbers["seconds"] = round(time.time() - started, 1)
    title = f"{config.loss.loss_type} on {config.data.dataset or 'the toy world'}"
    return write_report(run.path, title, result, flatten(config))


def preference(config: DPOConfig, policy: nn.Module, reference: nn.Module | None = None) -> DPO:
    """The loss module; raises `ConfigError` for settings that the loss does not allow."""
    loss = config.loss
    return DPO(policy, beta=loss.beta, ref_model=reference, loss=loss.loss_type, label_smoothing=loss.label_smoothing)


def same_ids(one: Tokenizer, other: Tokenizer, pairs: list[PreferencePair]) -> bool:
    """Whether two tokenizers agree, judged by their size and the beginning of the data."""
    first = [encode_pair(p, t) for t in (one, other) for p in pairs[:20]]
    return one.vocab_size == other.vocab_size and first[: len(first) // 2] == first[len(first) // 2 :]


def from_scratch(config: DPOConfig, examples: list[Example], device: torch.device) -> tuple[TransformerWrapper, Tokenizer]:
    tokenizer = scratch_tokenizer((t for e in examples for t in (e.prompt, e.completion) if t), config.model.vocab_size)
    model = scratch_model(config.model, tokenizer.vocab_size, config.training.seed)
    return model.to(device, torch_dtype(config.run.dtype)), tokenizer


def dry_run(config: DPOConfig, pairs: list[PreferencePair], examples: list[Example], device: torch.device) -> None:
    """Show one rendered, tokenised and masked pair, and the parameter count."""
    if config.model.model:
        model, tokenizer = load_model(config.model.model, config.run.dtype, device)
    else:
        model, tokenizer = from_scratch(config, examples, device)
    max_length = window(config.data.max_length, model)
    encoded = encode_pairs(pairs, tokenizer, max_length, config.data.truncation_mode, "train")
    print(f"{parameter_count(model):,} parameters, {tokenizer.vocab_size:,} pieces, {len(encoded):,} pairs; the first:")
    for side in ("chosen", "rejected"):
        prompt, completion = encoded[0].prompt, getattr(encoded[0], side)
        print(f"\n{side}:")
        print(show_record(tokenizer, prompt + completion, [False] * len(prompt) + [True] * len(completion)))


def base_model(config: DPOConfig, run: RunFolder, examples: list[Example],
               device: torch.device) -> tuple[TransformerWrapper, Tokenizer]:
    """The model before alignment, kept in <run>/reference: --model, or one trained on `examples` from scratch."""
    saved = run.path / "reference"
    if not saved.exists():
        if config.model.model:
            model, tokenizer = load_model(config.model.model, config.run.dtype, device)
        else:
            say("training a tokenizer and a model from scratch")
            model, tokenizer = from_scratch(config, examples, device)
            say(f"{parameter_count(model):,} parameters, {tokenizer.vocab_size:,} pieces")
            model.attn_layers.gradient_checkpointing = config.training.gradient_checkpointing
            encoded = encode_examples(examples, tokenizer, window(config.data.max_length, model), "keep_start")
            held_out = min(len(encoded) // 40, 200)
            imitate(model, tokenizer, encoded[held_out:], encoded[:held_out], run.part("sft"),
                    sft_loop(config.sft, config.training, config.run), batch_size=config.sft.sft_batch_size,
                    epochs=config.sft.sft_epochs)
        save_pretrained(model, saved, tokenizer)
    return load_model(str(saved), config.run.dtype, device)


def encode_pairs(pairs: list[PreferencePair], tokenizer: Tokenizer, max_length: int, mode: TruncationMode,
                 name: str) -> list[EncodedPair]:
    """Tokenise and truncate pairs, and say what that cost."""
    report = TruncationReport()
    cut = [truncate_pair(encode_pair(p, tokenizer), max_length, mode, report) for p in pairs]
    encoded = [p for p in cut if p is not None]
    say(f"{name} pairs: {report}")
    if not encoded:
        raise DataError(f"no pair is left after truncation to {max_length} tokens ({report})")
    return encoded


def align(config: DPOConfig, run: RunFolder, dpo: DPO, tokenizer: Tokenizer, pairs: list[EncodedPair],
          eval_pairs: list[EncodedPair], held_out: list[PreferencePair]) -> None:
    """Preference training of `dpo.policy_model`, from a checkpoint where there is one."""
    training, options = config.training, loop_options(config.training, config.run)
    policy = dpo.policy_model
    assert isinstance(policy, TransformerWrapper)
    device = policy.token_emb.weight.device
    policy.attn_layers.gradient_checkpointing = training.gradient_checkpointing
    size = training.batch_size
    order = Schedule([len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs],
                     size * training.gradient_accumulation_steps, training.seed)
    steps = count_steps(len(order), training.num_train_epochs, training.max_steps)
    known = eval_known = None
    with autocast(device, training.bf16):
        if dpo.ref_model is not None and config.loss.precompute_ref_log_probs:
            visited = sorted({row for step in range(min(steps, len(order))) for row in order.batch(step)})
            some = pairs_logps(dpo, dpo.ref_model, [pairs[i] for i in visited], tokenizer.pad_id,  # type: ignore[arg-type]
                               progress="reference")
            known = tuple(torch.full((len(pairs),), float("nan")).index_copy(0, torch.tensor(visited), t) for t in some)
        if dpo.ref_model is not None:
            eval_known = pairs_logps(dpo, dpo.ref_model, eval_pairs, tokenizer.pad_id)  # type: ignore[arg-type]
    objective = Preference(dpo, known)  # type: ignore[arg-type]
    batches = micro_batches(order, size, lambda rows: collate_pairs([pairs[i] for i in rows], tokenizer.pad_id, rows))
    if config.loss.ref_model is None:
        check_first_loss(objective, batches(0)[0].to(device), training.bf16)

    def evaluate(step: int) -> dict[str, float]:
        prompts = [p.prompt for p in held_out[:4]]
        for prompt, row in zip(prompts, sample(policy, tokenizer, prompts, 1, config.evaluation.eval_max_new_tokens, step),
                               strict=True):
            run.log(SAMPLES, {"step": step, "prompt": prompt_text(prompt), "completion": row[0].text})
        if eval_known is None:
            return {}
        with autocast(device, training.bf16):
            return quick(dpo, eval_pairs, eval_known, tokenizer.pad_id)

    train(policy, objective, batches, steps, len(order), options, run, tokenizer, title="dpo", evaluate=evaluate)


def check_first_loss(objective: Preference, batch: Any, bf16: bool) -> None:
    """Policy and reference are equal, so the loss must be the one at four equal log-probabilities: ln 2 for DPO."""
    dpo = objective.dpo
    zero, one = torch.zeros(1), torch.ones(1)
    expected = float(dpo.pair_losses(zero, zero, zero, zero, one, one))
    dpo.policy_model.eval()
    with torch.no_grad(), autocast(batch.chosen.device, bf16):
        first = float(objective(batch)[0])
    if not abs(first - expected) <= (0.05 if bf16 else 1e-3) * max(1.0, abs(expected)):
        raise Diverged(f"the first loss is {first:.4f} although policy and reference are equal, expected is {expected:.4f}: "
                       "the model gives different log-probabilities for the same tokens")
