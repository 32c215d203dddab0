"""The stages that the training programs are made of: data, tokenizer and model from scratch, imitation, reference."""

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from xalign.checkpoint import load_pretrained
from xalign.config import ModelOptions, PreferenceDataOptions, RunOptions, SFTOptions, TrainingOptions
from xalign.data import toyworld
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS
from xalign.data.collate import EncodedExample, Schedule, TruncationReport, collate_examples, encode_example, truncate_example
from xalign.data.records import Example, PreferencePair, Text
from xalign.data.sources import ReadReport, pair_to_example, read_examples, read_pairs
from xalign.errors import CheckpointError, ConfigError, DataError
from xalign.logprobs import scored_logprobs
from xalign.nn.decoding import evaluating
from xalign.nn.transformer import Decoder, TransformerWrapper
from xalign.objectives import SFT
from xalign.runs import RunFolder
from xalign.tokenizers import Tokenizer, train_sentencepiece
from xalign.training import LoopOptions, autocast, train

T = TypeVar("T")
EMBEDDED = Path(__file__).resolve().parent.parent / "data"


def say(text: str) -> None:
    """A line of progress, on stderr: stdout is for answers."""
    print(text, file=sys.stderr, flush=True)


def choose_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from error
    return device


def preference_data(options: PreferenceDataOptions,
                    seed: int) -> tuple[list[PreferencePair], list[PreferencePair], list[Example]]:
    """Training pairs, held-out pairs, and the examples to imitate before alignment."""
    report = ReadReport()
    train_file = options.dataset or str(EMBEDDED / "train.jsonl")
    pairs = read_pairs(train_file, identical=options.identical, report=report)
    say(f"{train_file}: {report}")
    eval_file = options.eval_dataset or (None if options.dataset else str(EMBEDDED / "test.jsonl"))
    if eval_file:
        held_out = read_pairs(eval_file, identical=options.identical)
    else:
        pairs, held_out = hold_out(pairs, lambda pair: str(pair.prompt or (pair.chosen, pair.rejected)), 10, seed)
        say(f"{len(held_out):,} pairs are held out for evaluation")
    if options.sft_dataset:
        examples = read_examples(options.sft_dataset, every_turn=True)
    elif options.dataset:
        examples = [pair_to_example(p, every_turn=True) for p in pairs]
    else:  # prompts are drawn at random, so learning them by heart would only take room
        documents = read_examples(str(EMBEDDED / "corpus.txt"))
        examples = [Example(*toyworld.split_document(str(d.completion)), d.where) for d in documents]
    return pairs, held_out, examples


def hold_out(records: Sequence[T], key: Callable[[T], str], one_in: int, seed: int) -> tuple[list[T], list[T]]:
    """Split records into (train, held out), about one key in `one_in`; records with the same key stay together."""
    keys = sorted({key(r) for r in records})
    if len(keys) < 2:
        raise DataError(f"{len(keys)} different prompt can't be split into training and held-out data, allowed is at least 2 "
                        "(or give --eval-dataset)")
    chosen = set(random.Random(f"hold out {seed}").sample(keys, max(1, len(keys) // one_in)))
    return [r for r in records if key(r) not in chosen], [r for r in records if key(r) in chosen]


def is_toy(prompts: Iterable[Text]) -> bool:
    """Whether the gold reward is known: all prompts are ones that the toy world's grammar writes."""
    return all(isinstance(p, str) and toyworld.read_prompt(p) is not None for p in prompts)


def scratch_tokenizer(texts: Iterable[Text], vocab_size: int) -> Tokenizer:
    """A SentencePiece tokenizer of the texts; for conversations with role markers and our chat template."""
    plain: list[str] = []
    conversational = False
    for text in texts:
        conversational |= not isinstance(text, str)
        plain += [text] if isinstance(text, str) else [m.content for m in text]
    tokenizer = train_sentencepiece(plain, vocab_size, user_defined_symbols=ROLE_MARKERS if conversational else ())
    tokenizer.chat_template = DEFAULT_TEMPLATE if conversational else None
    return tokenizer


def scratch_model(options: ModelOptions, vocab_size: int, seed: int) -> TransformerWrapper:
    """An untrained Llama-shaped decoder with tied embeddings; the same seed gives the same weights."""
    if options.heads < 1 or options.dim % (2 * options.heads):
        raise ConfigError(f"dim is {options.dim}, allowed is a multiple of 2 * heads = {2 * options.heads}")
    torch.manual_seed(seed)
    inner = -(-options.dim * 8 // 3 // 32) * 32
    layers = Decoder(dim=options.dim, depth=options.depth, heads=options.heads, attn_dim_head=options.dim // options.heads,
                     attn_kv_heads=options.kv_heads, attn_dropout=options.dropout, ff_dropout=options.dropout, attn_flash=True,
                     rotary_pos_emb=True, use_rmsnorm=True, ff_inner_dim=inner, ff_glu=True, ff_swish=True, ff_no_bias=True)
    return TransformerWrapper(num_tokens=vocab_size, max_seq_len=options.max_seq_len, tie_embedding=True,
                              emb_dropout=options.dropout, attn_layers=layers)


def load_model(path: str, dtype: str | None, device: torch.device) -> tuple[TransformerWrapper, Tokenizer]:
    """A model with its tokenizer, whose ids it knows."""
    model, tokenizer = load_pretrained(path, dtype, device)
    if tokenizer is None:
        raise ConfigError(f"{path}: there is no tokenizer in this folder, allowed is a folder with one")
    if tokenizer.vocab_size > model.num_tokens:
        raise CheckpointError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model embeds only {model.num_tokens}")
    return model, tokenizer


def window(max_length: int, model: TransformerWrapper) -> int:
    """Tokens that a record may have: `max_length`, or the model's positions where they are fewer."""
    if max_length > model.max_seq_len:
        say(f"records are cut to the model's {model.max_seq_len} positions (--max-length is {max_length})")
    return min(max_length, model.max_seq_len)


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int, mode: Any) -> list[EncodedExample]:
    """Tokenise and truncate examples, and say what that cost."""
    report = TruncationReport()
    encoded = [part for e in examples for part in truncate_example(encode_example(e, tokenizer), max_length, mode, report)]
    say(f"to imitate: {report}")
    if not encoded:
        raise DataError(f"nothing is left to imitate after truncation to {max_length} tokens ({report})")
    return encoded


@torch.no_grad()
def mean_nll(model: nn.Module, examples: Sequence[EncodedExample], pad_id: int, size: int = 32) -> float:
    """Cross-entropy of the scored tokens, nats a token."""
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    total = count = 0.0
    with evaluating(model):
        for at in range(0, len(order), size):
            batch = collate_examples([examples[i] for i in order[at : at + size]], pad_id).to(device)
            logps, scored = scored_logprobs(model, batch.tokens, batch.loss_mask)
            total, count = total - float(logps.masked_fill(~scored, 0.0).sum()), count + float(scored.sum())
    return total / max(1.0, count)


def loop_options(training: TrainingOptions, run: RunOptions, **changes: Any) -> LoopOptions:
    values = {**vars(training), **vars(run), **changes}
    return LoopOptions(**{name: values[name] for name in LoopOptions.__dataclass_fields__})


def count_steps(per_epoch: int, epochs: float, max_steps: int = -1) -> int:
    """Optimizer steps of a training, at least one."""
    return max_steps if max_steps > 0 else max(1, round(per_epoch * epochs))


def micro_batches(order: Schedule, size: int, collate: Callable[[list[int]], Any]) -> Callable[[int], list[Any]]:
    """A step's rows, collated `size` at a time."""
    def batches(step: int) -> list[Any]:
        rows = order.batch(step)
        return [collate(rows[at : at + size]) for at in range(0, len(rows), size)]

    return batches


def imitate(model: TransformerWrapper, tokenizer: Tokenizer, examples: Sequence[EncodedExample],
            held_out: Sequence[EncodedExample], run: RunFolder, options: LoopOptions, *, batch_size: int, accumulation: int = 1,
            epochs: float, max_steps: int = -1) -> None:
    """Supervised fine-tuning of `model` in place; its log and checkpoints are in `run`."""
    order = Schedule([len(e.ids) for e in examples], batch_size * accumulation, options.seed)
    device = next(model.parameters()).device

    def collate(rows: list[int]) -> Any:
        return collate_examples([examples[i] for i in rows], tokenizer.pad_id, rows)

    def evaluate(step: int) -> dict[str, float]:
        with autocast(device, options.bf16):
            nll = mean_nll(model, held_out, tokenizer.pad_id)
        return {"eval/loss": nll, "eval/perplexity": float(torch.tensor(nll).exp())}

    train(model, SFT(model), micro_batches(order, batch_size, collate), count_steps(len(order), epochs, max_steps), len(order),
          options, run, tokenizer, title="sft", evaluate=evaluate if held_out else None)


def sft_loop(options: SFTOptions, training: TrainingOptions, run: RunOptions) -> LoopOptions:
    """The imitation stage of a preference run: its own rate, the run's precision, seed and logging."""
    return loop_options(training, run, learning_rate=options.sft_learning_rate, warmup_steps=options.sft_warmup_steps,
                        lr_scheduler_type="cosine", eval_steps=4 * run.eval_steps, save_steps=4 * run.save_steps)


def show_record(tokenizer: Tokenizer, ids: Sequence[int], scored: Sequence[bool]) -> str:
    """One record as a table of tokens for a person to check: position, id, text, scored."""
    rows = enumerate(zip(ids, scored, strict=True))
    return "\n".join(f"{i:5d} {t:6d} {'scored' if s else '      '} {tokenizer.decode([t])!r}" for i, (t, s) in rows)



def prompt_text(prompt: Text) -> str:
    """A prompt as a person reads it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.role}: {m.content}" for m in prompt)
