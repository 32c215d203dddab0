"""Whole optimizer steps of preference training: xalign, a plain loop of four forwards, x-transformers' DPO, trl's trainer.

All begin with the same weights and the same other reference, and have a learning rate of 0: each step does its whole work, but
is the first one once more, so that losses and gradient norms can be held against each other at every step.
"""

import contextlib
import copy
import gzip
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import models
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from xalign import DPO
from xalign.data.collate import EncodedPair, PairBatch, Schedule, collate_pairs, truncate_pair
from xalign.nn import products
from xalign.objectives import Preference
from xalign.optim import adamw
from xalign.training import autocast

BETA, MAX_NORM, PAIRS, LONGEST = 0.1, 1.0, 8, 512
CPU = torch.device("cpu")
HH = Path(__file__).parents[2] / "shared/data/hh-harmless-base.train.jsonl.gz"
OURS, ONLINE, PLAIN, XT, TRL, COMPACT = (
    "xalign", "xalign, reference in the step", "plain", "x-transformers", "TRL", "TRL, head compacted")
WORDS = ["pad", "eos", *"abcdefghijklmno"]  # of the few texts that trl's trainer is made with; ids of the steps are given


@dataclass
class Case:
    """Pairs, as a batch of ours, with the reference's log-probabilities (chosen, rejected), (b,) each, where they are known."""

    pairs: list[EncodedPair]
    batch: PairBatch
    known: tuple[Tensor, Tensor]

    def first(self) -> "Case":
        """The first pair alone."""
        return Case(self.pairs[:1], collate_pairs(self.pairs[:1], 0), (self.known[0][:1], self.known[1][:1]))

    def trl(self, collator: Any) -> dict[str, Tensor]:
        return collator([{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected,
                          "ref_chosen_logps": float(w), "ref_rejected_logps": float(r)}
                         for p, w, r in zip(self.pairs, *self.known, strict=True)])


Step = Callable[[Case], tuple[float, float]]  # -> loss, norm of the gradient before it is clipped


def case(pairs: list[EncodedPair], reference: LlamaForCausalLM | None = None) -> Case:
    batch = collate_pairs(pairs, 0)
    known = torch.zeros(2, len(pairs)) if reference is None else torch.stack(sums(reference, batch))
    return Case(pairs, batch, (known[0], known[1]))


def drawn(lengths: list[tuple[int, int, int]], vocab: int) -> list[EncodedPair]:
    """Pairs of random ids with these lengths of prompt, chosen and rejected."""
    generator = torch.Generator().manual_seed(1)
    return [EncodedPair(*(torch.randint(1, vocab, (n,), generator=generator).tolist() for n in row)) for row in lengths]


def real_lengths(count: int) -> list[list[tuple[int, int, int]]]:
    """`count` steps of an epoch of our schedule over HH, from short to long ones: 8 dialogues of like length, 4 characters a
    token."""
    pairs = []
    for line in gzip.decompress(HH.read_bytes()).decode().splitlines():
        sides = [json.loads(line)[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
        prompt, chosen, rejected = (len(text) // 4 + 1 for text in (sides[0][0] + sides[0][1], sides[0][2], sides[1][2]))
        pair = truncate_pair(EncodedPair([1] * prompt, [1] * chosen, [2] * rejected), LONGEST, "keep_end")
        if pair is not None:
            pairs.append(pair)
    schedule = Schedule([pair.length for pair in pairs], PAIRS, seed=0)
    rows = sorted(([pairs[i] for i in schedule.batch(step)] for step in range(len(schedule))),
                  key=lambda row: sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in row))
    some = [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]
    return [[(len(p.prompt), len(p.chosen), len(p.rejected)) for p in row] for row in some]


def least_flops(config: LlamaConfig, lengths: list[tuple[int, int, int]]) -> float:
    """F_shared of performance.md: a forward pass over prompts once and both completions, causal attention counted exactly, of
    the last layer's prompt positions keys and values alone, and the head at completions; multiply-add = 2."""
    d, depth, e = config.hidden_size, config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * e, config.num_key_value_heads * e
    block = 2 * d * queries + 2 * d * keys + 3 * d * config.intermediate_size
    total = 0.0
    for p, *sides in lengths:
        total += 2 * block * depth * (p + sum(sides)) - 2 * (block - 2 * d * keys) * p
        total += 4 * queries * ((depth - 1) * p * (p + 1) / 2 + depth * sum(c * p + c * (c + 1) / 2 for c in sides))
        total += 2 * d * config.vocab_size * sum(sides)
    return total


def finished(loss: Tensor, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), float(norm)


class Xalign:
    """What `train_dpo.py` does in a step, with the reference's log-probabilities known or not."""

    def __init__(self, theirs: LlamaForCausalLM, reference: LlamaForCausalLM | None = None):
        net = models.ours_of(theirs).requires_grad_(True).train()
        self.dpo = DPO(net, BETA, ref_model=None if reference is None else models.ours_of(reference))
        self.optimizer, self.parameters = adamw(self.dpo, 0.0), list(self.dpo.parameters())

    def step(self, known: bool = True, bf16: bool = False, onednn: bool = True, share_prefix: bool = True,
             packed: bool = True) -> Step:
        objective = Preference(self.dpo)

        def step(case: Case) -> tuple[float, float]:
            self.dpo.share_prefix, self.dpo.packed = share_prefix, packed
            objective.ref_logps = case.known if known else None
            with contextlib.nullcontext() if onednn else patch.object(products, "_onednn", lambda x: False):
                with autocast(CPU, bf16):
                    loss, _ = objective(case.batch)
                return finished(loss, self.parameters, self.optimizer)

        return step


def sums(model: LlamaForCausalLM, batch: PairBatch) -> list[Tensor]:
    """Log-probabilities of both sides' completions, (b,) each: two forward passes, full logits, log-softmax."""
    found = []
    for tokens, mask, prompt in ((batch.chosen, batch.chosen_mask, batch.chosen_prompt_mask),
                                 (batch.rejected, batch.rejected_mask, batch.rejected_prompt_mask)):
        with contextlib.nullcontext() if model.training else torch.no_grad():
            logits = model(tokens, attention_mask=None if mask.all() else mask.long(), use_cache=False).logits
            # autocast leaves log_softmax in bf16 on a CPU: sums of hundreds of nats would be whole numbers
            each = logits.float().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
            found.append((each * (mask & ~prompt)[:, 1:]).sum(1))
    return found


def plain(theirs: LlamaForCausalLM, reference: LlamaForCausalLM, bf16: bool = False) -> Step:
    theirs.requires_grad_(True).train()
    parameters = list(theirs.parameters())
    optimizer = torch.optim.AdamW(parameters, 0.0, fused=True)

    def step(case: Case) -> tuple[float, float]:
        with autocast(CPU, bf16):
            chosen, rejected = sums(theirs, case.batch)
            ref_chosen, ref_rejected = sums(reference, case.batch)
            loss = -F.logsigmoid(BETA * (chosen - ref_chosen - rejected + ref_rejected)).mean()
        return finished(loss, parameters, optimizer)

    return step


def x_transformers(theirs: LlamaForCausalLM, reference: LlamaForCausalLM) -> Step:
    """For completions of one length alone: it takes means over tokens, here by a beta that makes sums of them; its mask begins
    a token too late, here the prompt's is a token shorter. A bias that Llama lacks stays 0."""
    from x_transformers.dpo import DPO as Theirs

    dpo = Theirs(models.x_transformers_of(theirs).net.train(), beta=BETA)
    dpo.ref_model.load_state_dict(models.x_transformers_of(reference).net.state_dict())
    for name, parameter in dpo.policy_model.named_parameters():
        parameter.requires_grad_(not name.endswith("proj.bias"))
    parameters = [p for p in dpo.policy_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.0, fused=True)

    def step(case: Case) -> tuple[float, float]:
        b = case.batch
        dpo.beta = BETA * len(case.pairs[0].chosen)
        prompt = b.chosen_prompt_mask.roll(-1, 1) & b.chosen_prompt_mask
        return finished(dpo(b.chosen, b.rejected, prompt_mask=prompt), parameters, optimizer)

    return step


class Trl:
    """trl's trainer: reference precomputed, no checkpointing, no logging; a step without its loop over data."""

    def __init__(self, theirs: LlamaForCausalLM):
        from datasets import Dataset, disable_progress_bars
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        backend = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="pad"))
        backend.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="pad", eos_token="eos")
        with (tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"),
              patch.dict(os.environ, TQDM_DISABLE="1")):
            options = DPOConfig(output_dir=folder, beta=BETA, report_to=[], use_cpu=True, bf16=False, max_length=None,
                                per_device_train_batch_size=PAIRS, gradient_checkpointing=False, disable_tqdm=True,
                                precompute_ref_log_probs=True, logging_strategy="no", learning_rate=0.0)
            self.trainer = DPOTrainer(
                model=theirs.requires_grad_(True), args=options, processing_class=tokenizer,
                train_dataset=Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d"}]))
        self.trainer.create_optimizer()
        self.parameters = list(theirs.parameters())

    def step(self, bf16: bool = False, compact: bool = False) -> Step:
        """`compact` is trl's path on a GPU: its head scores completions alone. No option gives it on a CPU."""
        import trl.trainer.utils

        trainer = self.trainer

        def step(case: Case) -> tuple[float, float]:
            inputs = case.trl(trainer.data_collator)
            model = trainer.model.train()
            with patch.object(trl.trainer.utils, "_use_triton", lambda device: compact):
                with autocast(CPU, bf16):  # as accelerate does it
                    loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
                trainer.accelerator.backward(loss)
            norm = trainer.accelerator.clip_grad_norm_(self.parameters, MAX_NORM)
            trainer.optimizer.step()
            model.zero_grad()
            return float(loss.detach()), float(norm)

        return step


@dataclass
class Models:
    """The policy of random weights, the reference, which is a little different, and engines that are made when asked for."""

    vocab: int
    depth: int

    def __post_init__(self) -> None:
        self.policy = models.llama(self.vocab, self.depth)
        self.reference = copy.deepcopy(self.policy)
        generator = torch.Generator().manual_seed(2)
        for p in self.reference.parameters():
            p.add_(0.1 * p.std() * torch.randn(p.shape, generator=generator))

    def own(self) -> LlamaForCausalLM:
        return copy.deepcopy(self.policy)

    def xalign(self) -> Xalign:
        return Xalign(self.own(), self.reference)

    def plain(self, bf16: bool = False) -> Step:
        return plain(self.own(), self.reference, bf16)

    def x_transformers(self) -> Step:
        return x_transformers(self.own(), self.reference)

    def trl(self) -> Trl:
        return Trl(self.own())


# ---- the most memory of a step

def resident() -> int:
    """Bytes that this process has had at most; not getrusage's ru_maxrss, which begins with the parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def alone(engine: str, vocab: int, depth: int) -> Iterator[Step]:
    """The engine and nothing else, as a program would have it."""
    theirs = models.llama(vocab, depth)
    if engine == PLAIN:
        yield plain(theirs, copy.deepcopy(theirs))
    else:
        yield Xalign(theirs).step() if engine == OURS else Trl(theirs).step()


def peak(engine: str, vocab: str, depth: str, prompt: str, completion: str, threads: str) -> None:
    """Print the bytes that a step of `engine` takes, above what its libraries take; in a process of its own."""
    torch.set_num_threads(int(threads))
    shape = [(int(prompt), int(completion), int(completion))] * PAIRS
    for step in alone(engine, 64, 1):
        step(case(drawn([(4, 2, 2)], 64)))
    before = resident()
    for step in alone(engine, int(vocab), int(depth)):
        for lengths in ([(4, 2, 2)], shape):  # the first makes the optimizer's state
            step(case(drawn(lengths, int(vocab))))
    print(resident() - before)
