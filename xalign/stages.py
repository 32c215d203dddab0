"""The stages that the training programs are made of: data, tokenizer and model from scratch, imitation, reference."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from xalign import distributed
from xalign.checkpoint import load_pretrained
from xalign.config import EvaluationOptions, ModelOptions, QuantOptions, RunOptions, SFTOptions, TrainingOptions
from xalign.data import toyworld
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS
from xalign.data.collate import EncodedExample, Schedule, collate_examples
from xalign.data.records import PreferencePair, Text
from xalign.data.store import Store
from xalign.errors import CheckpointError, ConfigError
from xalign.evaluation.figures import Comparison, add_text, alarm
from xalign.evaluation.metrics import example_logps, mean_nll
from xalign.nn.linear import Linear
from xalign.nn.quantize import WIDTH, QuantizedLinear, checked, quantize
from xalign.nn.transformer import Decoder, TransformerWrapper
from xalign.objectives import SFT
from xalign.prepare import Split, say, watched_text
from xalign.runs import RunFolder
from xalign.tokenizers import Tokenizer, train_sentencepiece
from xalign.training import LoopOptions, autocast, train
from xalign.watch import warn

# Characters that a tokenizer from scratch is trained on at most; of more text every 2nd, 4th, ... record is taken. The
# pieces of a small vocabulary are settled long before, and SentencePiece takes about 9 bytes of memory for each.
TOKENIZER_TEXT = 10_000_000


def choose_device(name: str | None) -> torch.device:
    try:
        device = distributed.own_device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from error
    return device


def is_toy(prompts: Iterable[Text]) -> bool:
    """Whether the gold reward is known: all prompts are ones that the toy world's grammar writes."""
    return all(isinstance(p, str) and toyworld.read_prompt(p) is not None for p in prompts)


def scratch_tokenizer(texts: Iterable[Text], vocab_size: int) -> Tokenizer:
    """A SentencePiece tokenizer of the texts; for conversations with role markers and our chat template."""
    conversational = False

    def plain() -> Iterator[str]:
        nonlocal conversational
        for text in texts:
            conversational |= not isinstance(text, str)
            yield from [text] if isinstance(text, str) else [m.content for m in text]

    sample = thinned(plain(), TOKENIZER_TEXT)
    tokenizer = train_sentencepiece(sample, vocab_size, user_defined_symbols=ROLE_MARKERS if conversational else ())
    tokenizer.chat_template = DEFAULT_TEMPLATE if conversational else None
    return tokenizer


def thinned(texts: Iterable[str], limit: int) -> list[str]:
    """All texts, or, where they have more than `limit` characters, every 2nd, 4th, ... so that the rest is below it."""
    kept: list[str] = []
    size, step = 0, 1
    for number, text in enumerate(texts):
        if number % step == 0:
            kept.append(text[:limit])
            size += len(kept[-1])
            while size > limit:
                kept, step = kept[::2], 2 * step
                size = sum(map(len, kept))
    return kept


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


def parameter_count(model: TransformerWrapper) -> int:
    return sum(p.numel() for p in model.parameters())


def load_model(path: str, dtype: str | None, device: torch.device, *, allow_pickle: bool = False, revision: str | None = None,
               quant: QuantOptions | None = None) -> tuple[TransformerWrapper, Tokenizer]:
    """A model, from a folder or the hub, with its tokenizer, whose ids it knows; quantised as `quant` says."""
    bits, method, group = quantisation(quant, device)
    model, tokenizer = load_pretrained(path, dtype, device, allow_pickle=allow_pickle, revision=revision)
    if tokenizer is None:
        raise ConfigError(f"{path}: there is no tokenizer in this folder, allowed is a folder with one")
    check_vocabulary(path, model, tokenizer)
    if quant is not None and bits:
        before = _megabytes(model)
        quantize(model, bits, group_size=group, head=quant.quant_head, method=method)
        say(f"{path}: {quantised(model)}; {before:.1f} MB -> {_megabytes(model):.1f} MB")
    return model, tokenizer


def quantisation(quant: QuantOptions | None, device: torch.device | None = None) -> tuple[int, str | None, int]:
    """Bits (0: none), method and group size that the settings ask for; refuses what can't be done (on this device)."""
    if quant is None or not (quant.load_in_8bit or quant.load_in_4bit):
        return 0, None, 0
    bits, method = 8 if quant.load_in_8bit else 4, "nf4" if quant.quant_type == "nf4" else None
    return bits, method, checked(bits, quant.quant_group_size, method, device)


def _megabytes(model: TransformerWrapper) -> float:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6


def quantised(model: TransformerWrapper) -> str:
    """What `quantize` did: "24 layers int4 (groups of 64), 4 layers int4 (groups of 32), bf16: embedding, norms, tied head"."""
    found = Counter[str]()
    for layer in (*model.attn_layers.modules(), model.to_logits):
        if isinstance(layer, QuantizedLinear):
            found[f"int4 (groups of {layer.group})" if layer.group else "int8"] += 1
        elif isinstance(layer, torch.nn.Linear) and type(layer) is not Linear:
            found["nf4"] += 1
    left = sum(type(layer) is Linear for layer in model.attn_layers.modules())
    rest = ["embedding", "norms", *[f"{left} layers whose inputs are no multiple of {WIDTH}"] * (left > 0),
            *["tied head"] * (model.to_logits is None), *["head"] * (type(model.to_logits) is Linear)]
    return f"{', '.join(f'{n} layers {kind}' for kind, n in found.items())}, bf16: {', '.join(rest)}"


def peek(data: Split[Any]) -> Iterator[Text]:
    """Completions of the held-out records and of the first to train on, to tell what kind of data it is."""
    some = chain(data.held_out, islice(data.train(), 100))
    return (record.chosen if isinstance(record, PreferencePair) else record.completion for record in some)


def settle_template(name: str | None, tokenizer: Tokenizer, texts: Iterable[Text]) -> None:
    """Give a tokenizer without a chat template ours where there are conversations: it is saved with the model, so that
    others render as the training did. Says so, and also if what is trained has no end. `name` is the model's.
    """
    chats = any(not isinstance(text, str) for text in texts)
    if chats and not tokenizer.chat_template:
        say(f"{name or 'the tokenizer'} has no chat template: xalign's own is used, and saved with the model")
        tokenizer.chat_template = DEFAULT_TEMPLATE
    if tokenizer.eos_id is None and (not chats or tokenizer.chat_template == DEFAULT_TEMPLATE):
        say(f"{name or 'the tokenizer'} has no EOS token: no text of the training ends, so the model learns no end")


def check_vocabulary(path: str, model: TransformerWrapper, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model.num_tokens:
        raise CheckpointError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model embeds only {model.num_tokens}")


def window(max_length: int, model: TransformerWrapper) -> int:
    """Tokens that a record may have: `max_length`, or the model's positions where they are fewer."""
    if max_length > model.max_seq_len:
        say(f"records are cut to the model's {model.max_seq_len} positions (--max-length is {max_length})")
    return min(max_length, model.max_seq_len)


def loop_options(training: TrainingOptions, run: RunOptions, **changes: Any) -> LoopOptions:
    values = {**vars(training), **vars(run), **changes}
    return LoopOptions(**{name: values[name] for name in LoopOptions.__dataclass_fields__})


def count_steps(per_epoch: int, epochs: float, max_steps: int = -1) -> int:
    """Optimizer steps of a training, at least one."""
    return max_steps if max_steps > 0 else max(1, round(per_epoch * epochs))


def micro_batches(order: Schedule, size: int, collate: Callable[[list[int]], Any],
                  tokens: int | None = None) -> Callable[[int], list[Any]]:
    """A step's rows, collated `size` at a time; with `tokens` as many as together are no longer, the longest first."""
    def batches(step: int) -> list[Any]:
        rows = order.batch(step)
        if tokens is None:
            return [collate(rows[at : at + size]) for at in range(0, len(rows), size)]
        parts: list[list[int]] = []
        room = 0
        for row in sorted(rows, key=lambda i: -order.lengths[i]):
            if not parts or order.lengths[row] > room or len(parts[-1]) == size:
                parts.append([])
                room = tokens
            parts[-1].append(row)
            room -= order.lengths[row]
        return [collate(part) for part in parts]

    return batches


def imitate(model: TransformerWrapper, tokenizer: Tokenizer, examples: Store[EncodedExample],
            held_out: Sequence[EncodedExample], run: RunFolder, options: LoopOptions, *, batch_size: int, accumulation: int = 1,
            epochs: float, max_steps: int = -1, tokens: int | None = None) -> None:
    """Supervised fine-tuning of `model` in place; its log and checkpoints are in `run`."""
    order = Schedule(examples.lengths, batch_size * accumulation, options.seed, rank=distributed.rank(),
                     world_size=distributed.size(), processes=run.processes)
    device = next(model.parameters()).device

    def collate(rows: list[int]) -> Any:
        return collate_examples([examples[i] for i in rows], tokenizer.pad_id, rows)

    def evaluate(step: int) -> dict[str, float]:
        with autocast(device, options.bf16):
            nll = mean_nll(model, held_out, tokenizer.pad_id)
        return {"eval/loss": nll, "eval/perplexity": float(torch.tensor(nll).exp())}

    batches = micro_batches(order, batch_size, collate, tokens)
    train(model, SFT(model), batches, count_steps(len(order), epochs, max_steps), len(order), options,
          run, tokenizer, title="sft", evaluate=evaluate if held_out else None)


def sft_loop(options: SFTOptions, training: TrainingOptions, run: RunOptions) -> LoopOptions:
    """The imitation stage of a preference run: its own rate, the run's precision, seed and logging."""
    return loop_options(training, run, learning_rate=options.sft_learning_rate, warmup_steps=options.sft_warmup_steps,
                        lr_scheduler_type="cosine", eval_steps=4 * run.eval_steps, save_steps=4 * run.save_steps, profile=False)


def prompt_text(prompt: Text) -> str:
    """A prompt as a person reads it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.role}: {m.content}" for m in prompt)


class LanguageWatch:
    """The perplexity of --eval-text while a policy is trained, against what it was before; above --perplexity-alert times that
    it warns, once."""

    def __init__(self, options: EvaluationOptions, tokenizer: Tokenizer, policy: TransformerWrapper):
        self.options, self.pad_id, self.told = options, tokenizer.pad_id, False
        self.examples: list[EncodedExample] = []
        if options.eval_text is not None and distributed.rank() == 0:  # which evaluates
            self.examples = watched_text(options.eval_text, tokenizer, policy.max_seq_len)
            self.before = mean_nll(policy, self.examples, self.pad_id)

    def __call__(self, policy: TransformerWrapper, step: int) -> dict[str, float]:
        """`eval/text_perplexity`, and its ratio to that before training; {} without a text."""
        if not self.examples:
            return {}
        nats = mean_nll(policy, self.examples, self.pad_id)
        ratio = math.exp(min(700.0, nats - self.before))
        told = alarm(ratio, self.options.perplexity_alert, Path(str(self.options.eval_text)).name)
        if told and not self.told:
            warn(f"dpo, step {step}: {told}")
            self.told = True
        return {"eval/text_perplexity": math.exp(min(700.0, nats)), "eval/text_perplexity_ratio": ratio}


def add_watched(result: Comparison, options: EvaluationOptions, tokenizer: Tokenizer, reference: TransformerWrapper,
                policy: torch.nn.Module) -> None:
    """The same in the end, for the report."""
    if options.eval_text is None:
        return
    text = watched_text(options.eval_text, tokenizer, reference.max_seq_len)
    models: dict[str, torch.nn.Module] = {"reference": reference, "policy": policy}
    logps = {name: example_logps(model, text, tokenizer.pad_id)[0] for name, model in models.items()}
    tokens = [float(sum(document.loss_mask[1:])) for document in text]
    warn(add_text(result, Path(options.eval_text).name, logps, tokens, options.perplexity_alert))
