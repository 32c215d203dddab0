"""A model of ours in EleutherAI's lm-evaluation-harness: `XalignLM`, there `--model xalign`.

Numbers are those of its own `hf` model (docs/lm-eval.md says what differs); a context that several continuations share is run
once, and the head runs for continuations alone.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from xalign import distributed, sampling
from xalign.backends.base import Completion, SamplingParams
from xalign.backends.native import NativeBackend
from xalign.config import QuantOptions
from xalign.data.chat_template import Rendered, render, render_text
from xalign.data.records import Message
from xalign.errors import ConfigError, DataError, reject_unknown
from xalign.generate_config import PromptOptions, SamplingOptions
from xalign.loading import load
from xalign.logprobs import best_logprobs
from xalign.scoring import parse
from xalign.stages import parameter_count
from xalign.watch import warn

try:
    import lm_eval.models  # noqa: F401 (fills the registry, which nobody fills any more once a model of ours is in it)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ConfigError("the evaluation harness needs lm-eval: pip install 'xalign[lm-eval]'") from error

ROWS = 64  # that are generated together with batch_size auto
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting, the first counts
DRAWING = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_new_tokens")
Answer = tuple[float, bool]


@dataclass
class Row:
    """The tokens that are run for a request, and the last of what follows them, which is scored."""

    request: int
    inputs: list[int]
    targets: list[int]

    @property
    def first(self) -> int:
        """The input behind which the first scored token stands."""
        return len(self.inputs) - len(self.targets)


@register_model("xalign")
class XalignLM(TemplateLM):
    """The model in a folder (or of a name on the hub), for `lm_eval.simple_evaluate(model=XalignLM(folder), tasks=...)`.

    `revision`, `adapter`, `allow_pickle`, `dtype`, `device` and the fields of `QuantOptions` are those of `xalign generate`
    (a device of CUDA's where there is none is lm-eval's default and means the CPU). `batch_size`: rows that run together at
    most, or "auto": as many as have up to `batch_tokens` tokens, a shared context counted once, and `max_batch_size` at most.
    `max_length`: tokens that are run at most (default: the model's window). `add_bos_token`: whether a text begins with BOS
    (default: as the tokenizer says). `prefix_token_id`: what an empty context is (default: BOS, else EOS). `seed`: of drawn
    texts. Raises `UnknownOption` for other arguments, `ConfigError` for values, and as loading does.
    """

    max_gen_toks = 256

    def __init__(self, pretrained: str | os.PathLike[str] | None = None, *, revision: str | None = None,
                 adapter: str | None = None, allow_pickle: bool = False, dtype: str | None = None, device: str | None = None,
                 batch_size: int | str = "auto", max_batch_size: int | None = None, batch_tokens: int = 16384,
                 max_length: int | None = None, add_bos_token: bool | None = None, prefix_token_id: int | None = None,
                 seed: int = 1234, **quant: Any):
        super().__init__()
        known = {field.name for field in fields(QuantOptions)} | {*XalignLM.__init__.__annotations__} - {"quant", "return"}
        reject_unknown("XalignLM", (name for name in quant if name not in known), known)
        self.batch_size = batch_size if not isinstance(batch_size, str) else batch_size.partition(":")[0]
        if isinstance(self.batch_size, str) and self.batch_size.isdecimal():
            self.batch_size = int(self.batch_size)
        numbers = {"batch_size": None if self.batch_size == "auto" else self.batch_size, "max_batch_size": max_batch_size,
                   "batch_tokens": batch_tokens, "max_length": max_length}
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                allowed = " or auto" if name == "batch_size" else ""
                raise ConfigError(f"{name} is {value!r}, allowed is a whole number >= 1{allowed}")
        if pretrained is None:
            raise ConfigError("no model is named, allowed is --model_args pretrained=FOLDER")
        if distributed.size() > 1:
            raise ConfigError(f"lm-eval in {distributed.size()} processes, allowed is one")
        device = None if str(device).startswith("cuda") and not torch.cuda.is_available() else device
        most = max_batch_size if self.batch_size == "auto" else int(self.batch_size)
        draw = SamplingOptions(batch_size=int(most or ROWS), dtype=None if dtype == "auto" else dtype, device=device, **quant)
        name = str(pretrained)
        asked = PromptOptions(model=name, revision=None if revision == "main" else revision, allow_pickle=allow_pickle)
        engine = load(name, asked, draw, adapter)
        assert isinstance(engine, NativeBackend)
        self.engine, self.net, self.tokenizer = engine, engine.wrapper.net, engine.tokenizer
        self._device = self.net.token_emb.weight.device
        self.name, self.rows, self.seed = name, most, seed
        self.tokens = batch_tokens if self.batch_size == "auto" else None
        self.max_length = self.net.max_seq_len if max_length is None else max_length
        if self.max_length > self.net.max_seq_len:
            raise ConfigError(f"max_length is {max_length}, allowed is up to the model's {self.net.max_seq_len}")
        tokenizer = self.tokenizer
        self.adds_bos = tokenizer.adds_bos if add_bos_token is None else add_bos_token
        self.special = {id: text for text, id in tokenizer.special_tokens.items()}
        prefixes = (prefix_token_id, tokenizer.bos_id, tokenizer.eos_id)
        self.prefix = next((id for id in prefixes if id is not None), None)
        if self.prefix is not None and self.prefix not in range(self.net.num_tokens):
            raise ConfigError(f"prefix_token_id is {self.prefix!r}, allowed is 0 to {self.net.num_tokens - 1}")

    # Texts to tokens

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        if self.prefix is None:
            raise ConfigError(f"{self.name}: its tokenizer has no BOS and no EOS to begin a text with, allowed is to say which "
                              "token does: prefix_token_id")
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, special tokens in it included, as transformers' tokenizers read them; one BOS at most in front."""
        adds = self.adds_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and self.prefix is not None:
            begun = self.special.get(self.prefix) or self.tokenizer.decode([self.prefix])
            adds = adds and not (begun and string.startswith(begun))
        ids = parse(self.tokenizer, string, "")
        return [self.tokenizer.bos_id, *ids] if adds and self.tokenizer.bos_id is not None else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation by the tokenizer's template; without a generation prompt its last message stays open."""
        if not self.tokenizer.chat_template:
            raise ConfigError(f"{self.name} has no chat template, allowed is lm-eval without --apply_chat_template")
        try:
            return self._written(chat_history, add_generation_prompt)
        except DataError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            warn(f"{self.name}: {error}; the system message is left out")
            return self._written(rest, add_generation_prompt)

    def _written(self, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        messages = [Message(turn["role"], turn["content"]) for turn in history]
        text = render(self.tokenizer, messages, None, add_generation_prompt, len(messages), spell=False).text
        if add_generation_prompt or not messages:
            return text
        last = messages[-1].content
        at = text.rfind(last.strip())
        if at < 0:
            raise DataError("the chat template does not write the last message as it is, so it can't be continued")
        return text[:at] + (last.lstrip() if text.startswith(last.lstrip(), at) else last.strip())

    # Log-probabilities

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        for request in requests:
            if not request.args[1]:
                raise DataError(f"no continuation to score after {_short(request.args[0])}")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            for pair in get_rolling_token_windows(token_list=self.tok_encode(request.args[0]), max_seq_len=self.max_length,
                                                  prefix_token=self.prefix_token_id, context_len=1):
                windows.append((request.args[:1], *make_disjoint_window(pair)))
                owners.append(i)
        totals, left = [0.0] * len(requests), Counter(owners)

        def done(window: int, answer: Answer) -> None:
            i = owners[window]
            totals[i] += answer[0]
            left[i] -= 1
            if not left[i]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, totals[i])

        self._run(windows, done, "windows", disable_tqdm)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              **_: Any) -> list[Answer]:
        answers: list[Answer] = [(0.0, False)] * len(requests)

        def done(i: int, answer: Answer) -> None:
            answers[i] = answer
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)

        self._run(requests, done, "loglikelihood", disable_tqdm)
        return answers

    def _run(self, requests: Sequence[tuple[Any, list[int], list[int]]], done: Callable[[int, Answer], None], what: str,
             quiet: bool) -> None:
        """Tell `done` of every request (texts, context, continuation) as it is scored."""
        alike: dict[Any, list[Row]] = defaultdict(list)
        for i, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(f"a continuation of {len(continuation)} tokens, allowed is 1 to {self.max_length}: "
                                f"{_short(texts[-1])}")
            context = context or [self.prefix_token_id]
            inputs = (context + continuation)[-self.max_length - 1 : -1]
            # what has only its BOS in common shares nothing, and goes with others of its length
            alike[tuple(context) if len(context) > 1 else i].append(Row(i, inputs, continuation))
        with tqdm(total=len(requests), desc=what, disable=quiet, mininterval=1) as bar:
            for batch in self._batches(alike.values()):
                for row, answer in self._score(batch):
                    done(row.request, answer)
                    bar.update()

    def _batches(self, alike: Any) -> Iterator[list[list[Row]]]:
        """Groups of rows that share their context, of equal size in a batch, the longest first."""
        most = self.rows
        groups = [group[at : at + (most or len(group))] for group in alike for at in range(0, len(group), most or len(group))]
        groups.sort(key=lambda group: (len(group), -max(len(row.inputs) for row in group)))
        batch: list[list[Row]] = []
        room = 0
        for group in groups:
            need = max(len(row.inputs) for row in group) + sum(len(row.targets) for row in group)
            full = bool(most) and (len(batch) + 1) * len(group) > (most or 0)
            if batch and (full or len(group) != len(batch[0]) or (self.tokens is not None and need > room)):
                yield batch
                batch = []
            room = (room if batch else self.tokens or 0) - need
            batch.append(group)
        if batch:
            yield batch

    @torch.no_grad()
    def _score(self, groups: list[list[Row]]) -> list[tuple[Row, Answer]]:
        """The log-probability of each row's targets, nats, and whether each of them is the likeliest token."""
        sides = len(groups[0])
        rows = [group[side] for side in range(sides) for group in groups]
        first, end = self._tensor([row.first for row in rows]), self._tensor([len(row.inputs) for row in rows])
        tokens = pad_sequence([torch.tensor(row.inputs) for row in rows], batch_first=True).to(self._device)
        begin = torch.zeros_like(first)
        if sides > 1:  # the continuations of a context branch where they, or what was cut off, differ
            several = tokens.view(sides, len(groups), -1)
            alike = (several == several[0]).all(0).long().cumprod(1).sum(1)
            begin = torch.minimum(alike, first.view(sides, -1).amin(0)).repeat(sides)
        at = self._tensor([(i, column) for i, row in enumerate(rows) for column in range(row.first, len(row.inputs))])
        hidden = self.net.branch_hidden(tokens, begin, end, sides, *at.unbind(1))
        logps, best = best_logprobs(self.net, hidden, self._tensor([target for row in rows for target in row.targets]))
        sizes = [len(row.targets) for row in rows]
        parts = zip(rows, logps.double().cpu().split(sizes), best.cpu().split(sizes), strict=True)
        return [(row, (float(logp.sum()), bool(greedy.all()))) for row, logp, greedy in parts]

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self._device)

    # Texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[SamplingParams, list[int]] = defaultdict(list)
        until = [_stop_strings(request.args[1]) for request in requests]
        for i, request in enumerate(requests):
            alike[self._params(request.args[1], until[i])].append(i)
        seeds = sampling.row_keys(self.seed, len(requests)).tolist()
        ends = render_text(self.tokenizer, "").stops
        for params, rows in alike.items():
            limit = self.max_length - params.max_new_tokens
            if limit < 1:
                raise ConfigError(f"max_gen_toks is {params.max_new_tokens}, allowed is less than the {self.max_length} tokens "
                                  "that the model sees")
            stops = [self.tokenizer.special_tokens.get(text) for text in params.stop]
            prompts = []
            for i in rows:
                ids = (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-limit:]
                prompts.append(Rendered(ids, [], "", ends + [id for id in stops if id is not None and id not in ends]))

            def done(place: int, completions: list[Completion], rows: list[int] = rows) -> None:
                i = rows[place]
                text = self.tokenizer.decode([id for id in completions[0].token_ids if id not in self.special])
                for end in until[i]:
                    text = text.partition(end)[0] if end else text
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)

            self.engine.generate(prompts, params, "" if disable_tqdm else "generate_until", seeds=[seeds[i] for i in rows],
                                 done=done)
        return texts

    def _params(self, asked: dict[str, Any], until: list[str]) -> SamplingParams:
        """What a request's generation_kwargs mean. Raises `UnknownOption` and `ConfigError` for what they may not be."""
        options = {name: value for name, value in asked.items() if name != "until"}
        steps = next((value for name in LENGTHS if (value := options.get(name)) is not None), self.max_gen_toks)
        sampled, beams = options.pop("do_sample", None), options.pop("num_beams", 1)
        temperature = options.pop("temperature", None)
        if beams != 1:
            raise ConfigError(f"num_beams is {beams}, allowed is 1: a beam knows no stop strings")
        if sampled is False or temperature is None:
            temperature = 1.0 if sampled else 0.0
        for name in LENGTHS:
            options.pop(name, None)
        reject_unknown("generation_kwargs", (name for name in options if name not in DRAWING),
                       ("until", "do_sample", "temperature", *LENGTHS, *DRAWING))
        if options.get("top_k") in (0, -1):
            del options["top_k"]
        options = {name: value for name, value in options.items() if value is not None}
        try:
            return SamplingParams(temperature=float(temperature), max_new_tokens=int(steps), stop=tuple(filter(None, until)),
                                  **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"generation_kwargs {asked}: {error}") from None

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model beside its results."""
        return {"model_num_parameters": parameter_count(self.net), "model_dtype": str(self.net.token_emb.weight.dtype)}


def _stop_strings(asked: dict[str, Any]) -> list[str]:
    until = asked.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:30]}...{text[-30:]}")
