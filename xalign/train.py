"""The training programs from flags to report: `run_sft` and `run_dpo`."""

import shutil
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from xalign import distributed
from xalign.adapters import adapt, save_adapter, unplaced
from xalign.checkpoint import load_pretrained, save_pretrained
from xalign.checks import Config, check, claim, moved, preference
from xalign.config import DPOConfig, QuantOptions, RewardConfig, SFTConfig, flatten
from xalign.data.chat_template import render_prompt
from xalign.data.collate import (
    EncodedExample,
    EncodedLabelled,
    EncodedPair,
    Schedule,
    collate_labelled,
    collate_pairs,
    encode_labelled,
)
from xalign.data.records import Example, Labelled, PreferencePair
from xalign.data.store import Store
from xalign.dpo import DPO
from xalign.errors import ConfigError, Diverged
from xalign.evaluation.compare import compare, quick
from xalign.evaluation.metrics import pairs_logps, sample
from xalign.evaluation.report import write_report
from xalign.hf import torch_dtype
from xalign.nn.lora import has_lora, load_lora, lora_state_dict, merge
from xalign.nn.transformer import TransformerWrapper
from xalign.objectives import KTO, Preference
from xalign.prepare import (
    Source,
    Split,
    encode_examples,
    encode_pairs,
    encode_texts,
    example_data,
    in_memory,
    on_disk,
    preference_data,
    say,
    unpaired,
)
from xalign.reference import reference_logps
from xalign.runs import CONFIG, SAMPLES, RunFolder, read_json
from xalign.stages import (
    LanguageWatch,
    add_watched,
    choose_device,
    count_steps,
    imitate,
    is_toy,
    load_model,
    loop_options,
    micro_batches,
    parameter_count,
    peek,
    prompt_text,
    quantisation,
    scratch_model,
    scratch_tokenizer,
    settle_template,
    sft_loop,
    window,
)
from xalign.tokenizers import Tokenizer
from xalign.training import autocast, train
from xalign.watch import missing_end, sampled_kl, unbalanced, warn


def start_reporting(config: Any, run: RunFolder) -> None:
    if config.run.report_to == "wandb":
        run.start_wandb(config.run.run_name or run.path.name, flatten(config))


# -- imitation ------------------------------------------------------------------------------------------------------


def run_sft(config: SFTConfig) -> None:
    """`xalign sft`: tokenizer and model from scratch, or --model, trained on text; ends in <folder>/policy."""
    check(config)
    device = choose_device(config.run.device)
    if config.run.dry_run:
        from xalign.rehearsal import rehearse_sft

        return rehearse_sft(config, device)
    with claim(config, "sft") as run:
        policy = run.path / "policy"
        if distributed.once(policy.exists):
            say(f"{run.path} is finished (--overwrite trains it anew); the model is in")
        else:
            start_reporting(config, run)
            data, training = example_data(config.data, config.training.seed), config.training
            model, tokenizer = first_model(config, (e for e in data.train()), device)
            settle_template(config.model.model, tokenizer, peek(data))
            max_length, mode = window(config.data.max_length, model), config.data.truncation_mode
            examples = on_disk(run.path / "tokens", EncodedExample, encode_examples, data.train, tokenizer, max_length, mode,
                               "to imitate", count=data.count, key=data_key(config, run))
            held = in_memory(encode_examples, data.held_out, tokenizer, max_length, mode, "held out")
            model.attn_layers.gradient_checkpointing = training.gradient_checkpointing
            put_adapters(config, model)
            imitate(model, tokenizer, examples, held, run, loop_options(training, config.run),
                    batch_size=training.batch_size, accumulation=training.gradient_accumulation_steps,
                    epochs=training.num_train_epochs, max_steps=training.max_steps, tokens=training.micro_batch_tokens)
            distributed.once(lambda: finish(config, run, model, tokenizer, config.model.model))
        forget(run, "tokens")
        print(policy)


def first_model(config: Config, examples: Iterable[Example],
                device: torch.device) -> tuple[TransformerWrapper, Tokenizer]:
    """--model, or an untrained model of the shape that is set, with a tokenizer of the examples' text."""
    if config.model.model:
        return given_model(config, config.model.model, device, config.quant if isinstance(config, SFTConfig) else None)
    texts = (t for e in examples for t in (e.prompt, e.completion) if t)
    tokenizer = distributed.once(lambda: scratch_tokenizer(texts, config.model.vocab_size))
    model = scratch_model(config.model, tokenizer.vocab_size, config.training.seed)
    return model.to(device, torch_dtype(config.run.dtype)), tokenizer


def given_model(config: Config, path: str, device: torch.device,
                quant: QuantOptions | None = None) -> tuple[TransformerWrapper, Tokenizer]:
    """The model of --model or --ref-model; the revision is --model's."""
    revision = config.model.revision if path == config.model.model else None
    return load_model(path, config.run.dtype, device, allow_pickle=config.model.allow_pickle, revision=revision, quant=quant)


def put_adapters(config: Config, model: TransformerWrapper) -> None:
    """Put the adapters on that the settings ask for: from then on they alone are trained."""
    adapt(model, config.lora, config.training.seed)
    if has_lora(model):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"{trained:,} parameters of adapters are trained, the model's own are frozen")


def finish(config: DPOConfig | SFTConfig, run: RunFolder, model: TransformerWrapper, tokenizer: Tokenizer,
           base: str | None) -> None:
    """Write <run>/policy. Adapters go to <run>/adapter, as peft has them, and in policy/ they are merged: into the weights, or
    where these are quantised into those of `base`, loaded anew."""
    if has_lora(model):
        if layer := unplaced(model):
            say(f"there is no {run.path / 'adapter'}: {layer} shares its tensor in a Hugging Face folder with others")
        else:
            save_adapter(model, run.path / "adapter", config.model.model or base)
        if quantisation(config.quant)[0]:
            assert base is not None
            say(f"the adapters are merged into the weights of {base} as they were before they were quantised")
            device = model.token_emb.weight.device
            model = load_lora(given_model(config, base, device)[0], lora_state_dict(model))
        merge(model)
    save_pretrained(model, run.path / "policy", tokenizer)


def data_key(config: Config, run: RunFolder) -> dict[str, Any]:
    """What the records of a run depend on: all its data settings, the files' contents, and the seed of the split."""
    return {**vars(config.data), "data_sha256": read_json(run.path / CONFIG)["data_sha256"], "seed": config.training.seed}


def forget(run: RunFolder, *names: str) -> None:
    """Remove what only a stage that is over needed."""
    if distributed.rank() == 0:
        for name in names:
            shutil.rmtree(run.path / name, ignore_errors=True)


# -- preferences ----------------------------------------------------------------------------------------------------


def run_dpo(config: DPOConfig) -> None:
    """`train_dpo.py`: (tokenizer and SFT,) reference, DPO, evaluation, report; every finished stage is kept."""
    check(config)
    device = choose_device(config.run.device)
    if config.run.dry_run:
        from xalign.rehearsal import rehearse_dpo

        return rehearse_dpo(config, device)
    with claim(config, "dpo") as run:
        report, policy = run.path / "report.md", run.path / "policy"
        if distributed.once(lambda: report.exists() and policy.exists()):
            say(f"{run.path} is finished; --overwrite runs it anew. From its report:")
            print(report.read_text(encoding="utf-8").split("## Samples")[0].strip())
        else:
            if distributed.once(report.exists):
                say(f"{policy} is missing although there is a report; it is made again, from a checkpoint where there is one")
            labelled = preference(config, nn.Identity()).labelled
            data, examples = preference_data(config.data, config.training.seed, labelled)
            start_reporting(config, run)
            print(prefer(config, run, data, examples, device))
            say(f"report: {report}")


def prefer(config: DPOConfig, run: RunFolder, data: Split[Any], examples: Source[Example],
           device: torch.device) -> str:
    """All stages in a run folder; gives the table of the report."""
    started = time.time()
    given = given_model(config, config.loss.ref_model, device) if config.loss.ref_model else None
    policy, tokenizer = base_model(config, run, data, examples, device)
    if given is not None and not same_ids(given[1], tokenizer, list(islice(data.train(), 20))):
        raise ConfigError(f"--ref-model {config.loss.ref_model} has another tokenizer than the policy, allowed is the same")
    held_out = data.held_out
    put_adapters(config, policy)
    dpo = preference(config, policy, given[0] if given is not None else None)
    max_length, mode = window(config.data.max_length, policy), config.data.truncation_mode
    kind, encode, what = (EncodedLabelled, encode_texts, "texts") if dpo.labelled else (EncodedPair, encode_pairs, "pairs")
    eval_rows = in_memory(encode, held_out, tokenizer, max_length, mode, f"held out {what}")
    finished = run.path / "policy"
    if not distributed.once(finished.exists):
        rows = on_disk(run.path / "tokens", kind, encode, data.train, tokenizer, max_length, mode,
                       f"train {what}", count=data.count, key=data_key(config, run))
        align(config, run, dpo, tokenizer, rows, eval_rows, held_out)
        distributed.once(lambda: finish(config, run, policy, tokenizer, str(run.path / "reference")))
    elif config.lora.lora_r is None:
        policy.load_state_dict(load_pretrained(finished, device=device)[0].state_dict())
    distributed.leave_to_first()
    forget(run, "tokens", "tokens-sft", "reference-logps")
    if dpo.labelled and isinstance(held_out[0], PreferencePair):  # which tell more as pairs
        eval_rows = in_memory(encode_pairs, held_out, tokenizer, max_length, mode, "held out pairs")
    # a loss that asks for none, adapters that play it when they are off, one that moved: the first is read again
    reference = dpo.ref_model
    if reference is None or config.loss.sync_ref_model:
        first = config.loss.ref_model
        reference = (given_model(config, first, device) if first else
                     load_pretrained(run.path / "reference", config.run.dtype, device))[0]
    if config.lora.lora_r is not None:  # from here on the policy is what was written: without adapters, not quantised
        del policy, dpo
        dpo = preference(config, load_pretrained(finished, device=device)[0], reference)
    untrained, gold_known = None, is_toy(p.prompt for p in held_out)
    if gold_known and not config.model.model:
        untrained = scratch_model(config.model, tokenizer.vocab_size, config.training.seed).to(device)
    e = config.evaluation
    assert isinstance(reference, TransformerWrapper)
    result = compare(dpo, reference, untrained, tokenizer, held_out, eval_rows, gold_known=gold_known,
                     prompts=e.eval_prompts, samples=e.eval_samples, max_new_tokens=e.eval_max_new_tokens,
                     seed=config.training.seed)
    add_watched(result, e, tokenizer, reference, dpo.policy_model)
    result.numbers["seconds"] = round(time.time() - started, 1)
    title = f"{config.loss.loss_type} on {config.data.dataset or 'the toy world'}"
    return write_report(run.path, title, result, flatten(config))


def same_ids(one: Tokenizer, other: Tokenizer, records: list[PreferencePair | Labelled]) -> bool:
    """Whether two tokenizers agree, judged by their size and the beginning of the data."""
    first = [encode_labelled(text, t) for t in (one, other) for r in records[:20] for text in unpaired(r)]
    return one.vocab_size == other.vocab_size and first[: len(first) // 2] == first[len(first) // 2 :]


def base_model(config: DPOConfig | RewardConfig, run: RunFolder, data: Split[Any], examples: Source[Example],
               device: torch.device, name: str = "reference") -> tuple[TransformerWrapper, Tokenizer]:
    """The model before alignment, kept in <run>/`name`: --model, or one trained on `examples` from scratch."""
    saved = run.path / name
    if not distributed.once(saved.exists):
        if not config.model.model:
            say("training a tokenizer and a model from scratch")
        model, tokenizer = first_model(config, (e for e in examples()), device)
        settle_template(config.model.model, tokenizer, peek(data))
        if not config.model.model:
            say(f"{parameter_count(model):,} parameters, {tokenizer.vocab_size:,} pieces")
            model.attn_layers.gradient_checkpointing = config.training.gradient_checkpointing
            encoded = on_disk(run.path / "tokens-sft", EncodedExample, encode_examples, examples, tokenizer,
                              window(config.data.max_length, model), "keep_start", "to imitate", key=data_key(config, run))
            held_out = min(len(encoded) // 40, 200)
            imitate(model, tokenizer, encoded[held_out:], list(encoded[:held_out]), run.part("sft"),
                    sft_loop(config.sft, config.training, config.run), batch_size=config.sft.sft_batch_size,
                    epochs=config.sft.sft_epochs)
        distributed.once(lambda: save_pretrained(model, saved, tokenizer))
        del model
    return load_model(str(saved), config.run.dtype, device, quant=config.quant)


def align(config: DPOConfig, run: RunFolder, dpo: DPO, tokenizer: Tokenizer, rows: Store[Any], eval_rows: list[Any],
          held_out: list[PreferencePair | Labelled]) -> None:
    """Preference training of `dpo.policy_model`, from a checkpoint where there is one."""
    training, options = config.training, loop_options(config.training, config.run)
    policy = dpo.policy_model
    assert isinstance(policy, TransformerWrapper)
    device = policy.token_emb.weight.device
    policy.attn_layers.gradient_checkpointing = training.gradient_checkpointing
    size = training.batch_size
    order = Schedule(rows.lengths, size * training.gradient_accumulation_steps, training.seed, rank=distributed.rank(),
                     world_size=distributed.size(), processes=run.processes)
    steps = count_steps(len(order), training.num_train_epochs, training.max_steps)
    if held_out:
        warn(missing_end(rows, render_prompt(tokenizer, held_out[0].prompt).stops))
    if dpo.labelled:
        weights = [dpo.components[0].options.get(f"{kind}desirable_weight", 1.0) for kind in ("", "un")]
        warn(unbalanced(int(rows.labels.sum()), int((~rows.labels).sum()), *weights))
    known = eval_known = None
    moving = moved(config, dpo)
    watched = LanguageWatch(config.evaluation, tokenizer, policy)
    with autocast(device, training.bf16):
        if dpo.compares and config.loss.precompute_ref_log_probs and moving is None:
            folder = Path(config.loss.reference_cache) if config.loss.reference_cache else run.path / "reference-logps"
            with dpo.reference() as reference:
                known = reference_logps(dpo, reference, rows, visited(len(rows), order, steps), tokenizer.pad_id, folder,
                                        bf16=training.bf16, device=device.type, ld_alpha=dpo.ld_alpha)
        if dpo.compares and distributed.rank() == 0:  # which evaluates
            with dpo.reference() as reference:
                eval_known = pairs_logps(dpo, reference, eval_rows, tokenizer.pad_id)  # type: ignore[arg-type]
    objective = KTO(dpo, known) if dpo.labelled else Preference(dpo, known)
    collate = collate_labelled if dpo.labelled else collate_pairs
    batches = micro_batches(order, size, lambda batch: collate([rows[i] for i in batch], tokenizer.pad_id, batch),
                            training.micro_batch_tokens)
    if config.loss.ref_model is None:
        check_first_loss(objective, batches(0)[0].to(device), training.bf16)

    def evaluate(step: int) -> dict[str, float]:
        prompts = [p.prompt for p in held_out[:4]]
        texts = [row[0] for row in sample(policy, tokenizer, prompts, 1, config.evaluation.eval_max_new_tokens, step)]
        for prompt, text in zip(prompts, texts, strict=True):
            run.log(SAMPLES, {"step": step, "prompt": prompt_text(prompt), "completion": text.text})
        drawn = [(render_prompt(tokenizer, p).ids, list(t.token_ids)) for p, t in zip(prompts, texts, strict=True)]
        kl: dict[str, float] = {}
        with autocast(device, training.bf16):
            if dpo.compares:  # other losses have no reference in memory
                kl = sampled_kl(policy, dpo.reference, drawn)
            return kl | watched(policy, step) | quick(dpo, eval_rows, eval_known, tokenizer.pad_id)

    if known is not None and dpo.ref_model is not None:
        dpo.ref_model.to("cpu")  # all that training asks of it is known; its room on a GPU is worth a larger batch
    train(policy, objective, batches, steps, len(order), options, run, tokenizer, title="dpo", evaluate=evaluate,
          reference=dpo.ref_model if known is None else None, moving=moving)
    if known is not None and dpo.ref_model is not None:
        dpo.ref_model.to(device)


def visited(pairs: int, order: Schedule, steps: int) -> torch.Tensor:
    """Which pairs the processes visit together in so many steps, (pairs,)."""
    visits = torch.zeros(pairs)
    for step in range(min(steps, len(order))):
        visits[order.batch(step)] = 1
    return distributed.total(visits) > 0


def check_first_loss(objective: Preference | KTO, batch: Any, bf16: bool) -> None:
    """Policy and reference are equal, so the loss must be what it is for equal log-probabilities: ln 2 for DPO."""
    objective.dpo.policy_model.eval()
    with torch.no_grad(), autocast(batch.chosen.device, bf16):
        first, expected = float(objective(batch)[0]), float(objective.expected(batch))
    if not abs(first - expected) <= (0.05 if bf16 else 1e-3) * max(1.0, abs(expected)):
        raise Diverged(f"the first loss is {first:.4f} although policy and reference are equal, expected is {expected:.4f}: "
                       "the model gives different log-probabilities for the same tokens")
