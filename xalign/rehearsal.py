"""`--dry-run`: one record as the run would see it, and the memory that it needs; no weights are read or made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import nn

from xalign import distributed
from xalign.adapters import adapt
from xalign.checkpoint import outline
from xalign.config import DPOConfig, RewardConfig, SFTConfig
from xalign.data.collate import EncodedLabelled
from xalign.data.records import Example, PreferencePair
from xalign.dpo import DPO
from xalign.errors import ConfigError
from xalign.hf import torch_dtype
from xalign.memory import Workload, available, training_memory
from xalign.nn.transformer import TransformerWrapper
from xalign.prepare import (
    encode_examples,
    encode_pairs,
    encode_ranked,
    encode_texts,
    example_data,
    in_memory,
    preference_data,
    ranked_data,
)
from xalign.stages import (
    check_vocabulary,
    parameter_count,
    peek,
    quantisation,
    scratch_model,
    scratch_tokenizer,
    settle_template,
    window,
)
from xalign.tokenizers import Tokenizer, load_tokenizer

LOOKED_AT = 2_000  # records that are encoded, to tell what truncation costs


def rehearse_sft(config: SFTConfig, device: torch.device) -> None:
    """Show what `xalign sft` would train on and need."""
    data = example_data(config.data, config.training.seed)
    model, tokenizer = shape(config, data.train)
    settle_template(config.model.model, tokenizer, peek(data))
    length = window(config.data.max_length, model)
    encoded = in_memory(encode_examples, islice(data.train(), LOOKED_AT), tokenizer, length, config.data.truncation_mode,
                        "to imitate")
    print(f"{counted(config, model)}, {tokenizer.vocab_size:,} pieces; first of {data.count:,} records:")
    print(show_record(tokenizer, encoded[0].ids, encoded[0].loss_mask))
    show_memory(config, model, length, max(e.length for e in encoded), 1, "none", device)


def rehearse_dpo(config: DPOConfig, device: torch.device) -> None:
    """Show what `xalign dpo` would train on and need."""
    loss = DPO(nn.Identity(), beta=None, loss=config.loss.loss_type)
    data, examples = preference_data(config.data, config.training.seed, loss.labelled)
    model, tokenizer = shape(config, examples)
    settle_template(config.model.model, tokenizer, peek(data))
    length = window(config.data.max_length, model)
    encode, what = (encode_texts, "texts") if loss.labelled else (encode_pairs, "pairs")
    encoded = in_memory(encode, islice(data.train(), LOOKED_AT), tokenizer, length, config.data.truncation_mode,
                        f"train {what}")
    records = "pairs" if isinstance(data.held_out[0], PreferencePair) else "labelled records"
    told = {"chosen": "chosen", "rejected": "rejected"}
    if isinstance(encoded[0], EncodedLabelled):
        told = {"chosen": "desirable" if encoded[0].label else "undesirable", "rejected": "mismatched, to measure drift"}
    print(f"{counted(config, model)}, {tokenizer.vocab_size:,} pieces, {data.count:,} {records}; the first:")
    for side, title in told.items():
        prompt, completion = encoded[0].prompt, getattr(encoded[0], side)
        print(f"\n{title}:")
        print(show_record(tokenizer, prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    known = config.loss.precompute_ref_log_probs and not config.loss.sync_ref_model
    reference = ("idle" if known else "asked") if loss.compares else "late"
    other = None
    if config.loss.ref_model:
        other = outline(config.loss.ref_model, allow_pickle=config.model.allow_pickle)[0].to(torch_dtype(config.run.dtype))
    elif config.lora.lora_r is not None:
        reference = "late"
    show_memory(config, model, length, max(p.length for p in encoded), 1 if loss.labelled else 2, reference, device,
                other)


def rehearse_reward(config: RewardConfig, device: torch.device) -> None:
    """Show what `xalign reward` would train on and need."""
    data, examples = ranked_data(config.data, config.training.seed, config.reward.margin)
    model, tokenizer = shape(config, examples)
    settle_template(config.model.model, tokenizer, peek(data))
    length = window(config.data.max_length, model)
    encoded = in_memory(partial(encode_ranked, margin=config.reward.margin), islice(data.train(), LOOKED_AT), tokenizer, length,
                        config.data.truncation_mode, "train pairs")
    told = f", margin {encoded[0].margin}" * config.reward.margin
    print(f"{counted(config, model)}, {tokenizer.vocab_size:,} pieces, {data.count:,} pairs; the first{told}:")
    for side in ("chosen", "rejected"):
        ids = encoded[0].prompt + getattr(encoded[0], side)
        print(f"\n{side}, scored at its last token:")
        print(show_record(tokenizer, ids, [False] * (len(ids) - 1) + [True]))
    show_memory(config, model, length, max(p.length for p in encoded), 2, "none", device)


def counted(config: DPOConfig | RewardConfig | SFTConfig, model: TransformerWrapper) -> str:
    """The model's parameters in words; puts adapters on it where they are what is trained."""
    whole = f"{parameter_count(model):,} parameters"
    adapt(model, config.lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return whole if config.lora.lora_r is None else f"{whole} and {trained:,} of adapters, which are trained"


def shape(config: DPOConfig | RewardConfig | SFTConfig,
          examples: Callable[[], Iterator[Example]]) -> tuple[TransformerWrapper, Tokenizer]:
    """The model that a run begins with, on the meta device, and its tokenizer."""
    name = config.model.model
    if name:
        model, _, folder = outline(name, allow_pickle=config.model.allow_pickle, revision=config.model.revision,
                                   rewards=isinstance(config, RewardConfig))
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise ConfigError(f"{name}: there is no tokenizer in this folder, allowed is a folder with one")
        check_vocabulary(name, model, tokenizer)
    else:
        texts: Iterable = (t for e in examples() for t in (e.prompt, e.completion) if t)
        tokenizer = distributed.once(lambda: scratch_tokenizer(texts, config.model.vocab_size))
        with torch.device("meta"):
            model = scratch_model(config.model, tokenizer.vocab_size, config.training.seed)
    return model.to(torch_dtype(config.run.dtype)), tokenizer


def show_record(tokenizer: Tokenizer, ids: Sequence[int], scored: Sequence[bool]) -> str:
    """One record as a table of tokens for a person to check: position, id, scored, and its text, or its name if it has none.

    Other than `display.show_tokens` it shows ids, and the borders of tokens without colours.
    """
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    texts = (names.get(t) or tokenizer.decode_bytes([t]).decode("utf-8", "backslashreplace") for t in ids)
    rows = enumerate(zip(ids, scored, texts, strict=True))
    return "\n".join(f"{i:5d} {t:6d} {'scored' if s else '      '} {text!r}" for i, (t, s, text) in rows)


def show_memory(config: DPOConfig | RewardConfig | SFTConfig, model: TransformerWrapper, length: int, longest: int, sides: int,
                reference: str, device: torch.device, other: nn.Module | None = None) -> None:
    """The table of `memory`, for the batch as it may become at worst."""
    t = config.training
    bits, _, group = quantisation(config.quant, device)
    work = Workload(rows=sides * t.batch_size, length=length, accumulates=t.gradient_accumulation_steps > 1, bf16=t.bf16,
                    checkpointing=t.gradient_checkpointing, reference=reference, other=other,
                    device=device.type, bits=bits, group=group)
    print(f"\nMemory a device, in GB, for {t.batch_size} records of {length} tokens (the longest of the first "
          f"{LOOKED_AT:,} has {longest}):")
    print(training_memory(model, work).table(*available(device)))
