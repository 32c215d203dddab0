"""Our own engine: prompts (text or messages) to completions, many at once."""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from xalign import sampling
from xalign.backends.base import Backend, Completion, Done, SamplingParams, failure, fit
from xalign.checkpoint import load_pretrained
from xalign.data.chat_template import Rendered, render_prompt
from xalign.data.records import Text
from xalign.errors import ConfigError, DataError
from xalign.nn.autoregressive import AutoregressiveWrapper
from xalign.nn.cache import Kept
from xalign.nn.decoding import room
from xalign.nn.engine import rounds
from xalign.nn.transformer import TransformerWrapper
from xalign.stopping import UNFINISHED, StopStrings, Utf8Stream
from xalign.tokenizers import Tokenizer

DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
           "min_new_tokens")


class NativeBackend(Backend):
    """`generate` and `stream` for one model and its tokenizer.

    At most `batch_size` rows run together, and their cache holds at most `cache_tokens` tokens (None: no bound). With a
    `context` prompt and answer have so many tokens together (see `fit`); without, the model's window moves along.
    """

    def __init__(self, model: TransformerWrapper, tokenizer: Tokenizer, batch_size: int = 64,
                 cache_tokens: int | None = None, *, name: str = "native", context: int | None = None):
        self.wrapper = AutoregressiveWrapper(model, pad_value=tokenizer.pad_id)
        self.tokenizer, self.batch_size, self.cache_tokens = tokenizer, batch_size, cache_tokens
        self.name, self.context = name, context
        self.kept: Kept | None = None  # of `stream`: what a chat has run so far
        self.streamed: list[int] = []  # the token ids of the newest stream

    def refresh(self, checkpoint: str) -> None:
        """The weights of a checkpoint folder (or hub name); its tokenizer is taken for the same."""
        weight = self.wrapper.net.token_emb.weight
        model, _ = load_pretrained(checkpoint, None, weight.device)
        if (new := model.token_emb.weight).shape != weight.shape:
            raise ConfigError(f"{checkpoint}: embeds {tuple(new.shape)}, allowed is {tuple(weight.shape)} as {self.name} has")
        self.wrapper = AutoregressiveWrapper(model.to(weight.dtype), pad_value=self.tokenizer.pad_id)
        self.kept = None if self.kept is None else Kept()

    def generate(self, prompts: Sequence[Text | Rendered], params: SamplingParams, progress: str = "", *,
                 seeds: Sequence[int] | None = None, done: Done | None = None) -> list[list[Completion]]:
        """See `Backend.generate`."""
        began = time.monotonic()
        results: list[list[Completion]] = [[] for _ in prompts]
        alike: dict[tuple[int, ...], list[int]] = {}
        rendered: dict[int, list[int]] = {}
        if seeds is None and params.seed is not None and prompts:
            seeds = sampling.row_keys(params.seed, len(prompts)).tolist()

        def finish(i: int, completions: list[Completion]) -> None:
            results[i] = completions
            if done is not None:
                done(i, completions)

        with tqdm(total=len(prompts), desc=progress, unit="prompt", disable=not progress, mininterval=1) as bar:
            for i, prompt in enumerate(prompts):
                try:
                    r = self._rendered(prompt)
                    rendered[i] = r.ids[len(r.ids) - fit(len(r.ids), params, self.context) :]
                except DataError as error:
                    if self.context is None:
                        raise
                    finish(i, [failure(str(error), self.name)] * params.n)
                    bar.update()
                else:
                    alike.setdefault(tuple(sorted(r.stops)), []).append(i)
            for stops, rows in alike.items():
                def take(row: int, tokens: Tensor, logps: Tensor | None, rows: list[int] = rows,
                         stops: tuple[int, ...] = stops) -> None:
                    end = tokens.shape[1] if self.context is None else self.context - len(rendered[rows[row]])
                    finish(rows[row], [self._completion(text[:end], None if logps is None else logps[n], stops, params, began)
                                       for n, text in enumerate(tokens.tolist())])

                self._run([rendered[i] for i in rows], None if seeds is None else [seeds[i] for i in rows], stops, params,
                          bar.update, take)
        return results

    def _run(self, ids: list[list[int]], seeds: list[int] | None, stops: Sequence[int], params: SamplingParams,
             progress: Callable[[int], object], take: Callable[[int, Tensor, Tensor | None], None]) -> None:
        """Give `take` each row's token ids and their log-probabilities (None of beams), (n, m) each, as they end."""
        prompts = [torch.tensor(row) for row in ids]
        if params.beams > 1:
            return self._beams(prompts, stops, params, progress, take)
        options: dict[str, Any] = {name: getattr(params, name) for name in DRAWING}
        options |= {"seed": None if seeds is None else torch.tensor(seeds), "num_samples": params.n, "eos_token": stops,
                    "batch_size": self.batch_size, "cache_tokens": self.cache_tokens, "progress": progress, "finished": take}
        steps = params.max_new_tokens if self.context is None else min(params.max_new_tokens, self.context - min(map(len, ids)))
        self.wrapper.generate(prompts, steps, return_logprobs=True, **options)
        if not steps:
            nothing = torch.zeros(params.n, 0)
            for row in range(len(prompts)):
                take(row, nothing, nothing)

    def _beams(self, prompts: list[Tensor], stops: Sequence[int], params: SamplingParams,
               progress: Callable[[int], object], take: Callable[[int, Tensor, Tensor | None], None]) -> None:
        """The best text of each prompt, batches of similar length."""
        needs = [room(len(p), params.max_new_tokens, params.beams, self.wrapper.max_seq_len) for p in prompts]
        for group, places in rounds(needs, max(1, self.batch_size // params.beams), self.cache_tokens):
            for at in range(0, len(group), places):
                rows = group[at : at + places]
                found = self.wrapper.beam_search([prompts[i] for i in rows], params.max_new_tokens, params.beams, stops,
                                                 params.length_penalty)
                for i, text in zip(rows, found, strict=True):
                    take(i, text[None], None)
                progress(len(rows))

    def _completion(self, tokens: list[int], logps: Tensor | None, stops: Sequence[int], params: SamplingParams,
                    began: float) -> Completion:
        reader = _Reader(self.tokenizer, stops, params.stop)
        text, used = "", 0
        while used < len(tokens) and not reader.ended:
            text += reader.push(tokens[used])
            used += 1
        text += reader.flush()
        text = text if reader.ended or self.context is None else text.rstrip(UNFINISHED)
        return Completion(text, tuple(tokens[:used]), "stop" if reader.ended else "length",
                          None if logps is None else float(logps[:used].sum()), time.monotonic() - began, self.name)

    def _rendered(self, prompt: Text | Rendered) -> Rendered:
        return prompt if isinstance(prompt, Rendered) else render_prompt(self.tokenizer, prompt, self.template)

    def stream(self, prompt: Text | Rendered, params: SamplingParams) -> Generator[str, None, None]:
        """The text of one completion in pieces as they come; stop strings and unfinished characters never show."""
        rendered = self._rendered(prompt)
        ids = rendered.ids[len(rendered.ids) - fit(len(rendered.ids), params, self.context) :]
        self.streamed, self.ended = [], False
        reader = _Reader(self.tokenizer, rendered.stops, params.stop)
        options: dict[str, Any] = {name: getattr(params, name) for name in DRAWING}
        seeds = None if params.seed is None else sampling.row_keys(params.seed, 1)
        left = params.max_new_tokens if self.context is None else min(params.max_new_tokens, self.context - len(ids))
        steps = self.wrapper.stream([torch.tensor(ids)], left, rendered.stops, seed=seeds, kept=self.kept, **options)
        held = ""  # what would go if the text were cut off here
        with contextlib.closing(steps):
            for step in steps:
                self.streamed.append(int(step))
                text = held + reader.push(int(step))
                self.ended = reader.ended
                whole = text if self.context is None or reader.ended else text.rstrip(UNFINISHED)
                yield whole
                held = text[len(whole) :]
                if reader.ended:
                    break
        rest = held + reader.flush()
        yield rest if self.context is None or reader.ended else rest.rstrip(UNFINISHED)


class _Reader:
    """Tokens one by one to the text that is safe to show; `ended` once a stop token or a stop string is complete."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[int], strings: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.characters, self.cutter, self.ended = Utf8Stream(), StopStrings(strings), False

    def push(self, token: int) -> str:
        if token in self.stops:
            self.ended = True
            return ""
        text = self.cutter.push(self.characters.push(self.tokenizer.decode_bytes([token])))
        self.ended = self.cutter.stopped is not None
        return text

    def flush(self) -> str:
        return self.cutter.push(self.characters.flush()) + self.cutter.flush()
