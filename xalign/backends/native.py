"""Our own engine: prompts (text or messages) to completions, many at once."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from xalign import sampling
from xalign.backends.base import Completion, SamplingParams
from xalign.data.chat_template import Rendered, render_prompt
from xalign.data.records import Text
from xalign.nn.autoregressive import AutoregressiveWrapper
from xalign.nn.cache import Kept
from xalign.nn.decoding import room
from xalign.nn.engine import rounds
from xalign.nn.transformer import TransformerWrapper
from xalign.stopping import StopStrings, Utf8Stream
from xalign.tokenizers import Tokenizer

DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
           "min_new_tokens")


class NativeBackend:
    """`generate` and `stream` for one model and its tokenizer.

    At most `batch_size` rows run together, and their cache holds at most `cache_tokens` tokens (None: no bound).
    """

    def __init__(self, model: TransformerWrapper, tokenizer: Tokenizer, batch_size: int = 64, cache_tokens: int | None = None):
        self.wrapper = AutoregressiveWrapper(model, pad_value=tokenizer.pad_id)
        self.tokenizer, self.batch_size, self.cache_tokens = tokenizer, batch_size, cache_tokens
        self.kept: Kept | None = None  # of `stream`: what a chat has run so far
        self.streamed: list[int] = []  # the token ids of the newest stream, and whether an end was among them
        self.ended = False

    def generate(self, prompts: Sequence[Text | Rendered], params: SamplingParams,
                 progress: str = "") -> list[list[Completion]]:
        """`params.n` completions of each prompt, in the prompts' order; `progress` names a progress bar."""
        rendered = [self._rendered(prompt) for prompt in prompts]
        results: list[list[Completion]] = [[] for _ in prompts]
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, r in enumerate(rendered):
            alike.setdefault(tuple(sorted(r.stops)), []).append(i)
        with tqdm(total=len(prompts), desc=progress, unit="prompt", disable=not progress, mininterval=1) as bar:
            for stops, rows in alike.items():
                tokens, logps = self._tokens([rendered[i].ids for i in rows], rows, stops, params, bar.update)
                for row, i in enumerate(rows):
                    results[i] = [self._completion(text, None if logps is None else logps[row, n], stops, params)
                                  for n, text in enumerate(tokens[row].tolist())]
        return results

    def _tokens(self, ids: list[list[int]], rows: list[int], stops: Sequence[int], params: SamplingParams,
                progress: Callable[[int], object]) -> tuple[Tensor, Tensor | None]:
        """Token ids and their log-probabilities (None of beams), (b, n, m) each."""
        prompts = [torch.tensor(row) for row in ids]
        if params.beams > 1:
            return self._beams(prompts, stops, params, progress), None
        options: dict[str, Any] = {name: getattr(params, name) for name in DRAWING}
        seeds = None if params.seed is None else sampling.row_keys(params.seed, max(rows) + 1)[rows]
        options |= {"seed": seeds, "num_samples": params.n, "eos_token": stops, "batch_size": self.batch_size,
                    "cache_tokens": self.cache_tokens, "progress": progress}
        tokens, logps = self.wrapper.generate(prompts, params.max_new_tokens, return_logprobs=True, **options)
        return (tokens, logps) if params.n > 1 else (tokens[:, None], logps[:, None])

    def _beams(self, prompts: list[Tensor], stops: Sequence[int], params: SamplingParams,
               progress: Callable[[int], object]) -> Tensor:
        """The best text of each prompt, (b, 1, m): batches of similar length, behind their end the pad token."""
        best: list[Tensor] = [prompts[0]] * len(prompts)
        needs = [room(len(p), params.max_new_tokens, params.beams, self.wrapper.max_seq_len) for p in prompts]
        for group, places in rounds(needs, max(1, self.batch_size // params.beams), self.cache_tokens):
            for at in range(0, len(group), places):
                rows = group[at : at + places]
                found = self.wrapper.beam_search([prompts[i] for i in rows], params.max_new_tokens, params.beams, stops,
                                                 params.length_penalty)
                for i, text in zip(rows, found, strict=True):
                    best[i] = text
                progress(len(rows))
        return pad_sequence(best, batch_first=True, padding_value=self.wrapper.pad_value)[:, None]

    def _completion(self, tokens: list[int], logps: Tensor | None, stops: Sequence[int], params: SamplingParams) -> Completion:
        reader = _Reader(self.tokenizer, stops, params.stop)
        text, used = "", 0
        while used < len(tokens) and not reader.ended:
            text += reader.push(tokens[used])
            used += 1
        text += reader.flush()
        return Completion(text, tuple(tokens[:used]), "stop" if reader.ended else "length",
                          None if logps is None else float(logps[:used].sum()))

    def _rendered(self, prompt: Text | Rendered) -> Rendered:
        return prompt if isinstance(prompt, Rendered) else render_prompt(self.tokenizer, prompt)

    def stream(self, prompt: Text | Rendered, params: SamplingParams) -> Generator[str, None, None]:
        """The text of one completion in pieces as they come; stop strings and unfinished characters never show."""
        rendered = self._rendered(prompt)
        self.streamed, self.ended = [], False
        reader = _Reader(self.tokenizer, rendered.stops, params.stop)
        options: dict[str, Any] = {name: getattr(params, name) for name in DRAWING}
        seeds = None if params.seed is None else sampling.row_keys(params.seed, 1)
        steps = self.wrapper.stream([torch.tensor(rendered.ids)], params.max_new_tokens, rendered.stops, seed=seeds,
                                    kept=self.kept, **options)
        with contextlib.closing(steps):
            for step in steps:
                self.streamed.append(int(step))
                text, self.ended = reader.push(int(step)), reader.ended
                yield text
                if reader.ended:
                    break
        yield reader.flush()


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
