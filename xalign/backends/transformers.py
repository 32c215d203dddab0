"""Any causal language model that transformers opens, batched. Draws are ours: a seed gives what it gives the native engine."""

import threading
import time
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from xalign import sampling
from xalign.backends.base import Backend, Completion, Done, SamplingParams, failure
from xalign.backends.text import cut, fitted_ids, special_ids
from xalign.data.records import Text
from xalign.errors import CheckpointError, ConfigError, DataError
from xalign.stopping import UNFINISHED, StopStrings


class TransformersBackend(Backend):
    """A local model by transformers' `generate`: left-padded batches of prompts of similar length.

    Filters, penalties and draws are `xalign.sampling`'s, put in as one logits processor in front of transformers' greedy
    choice; its own warpers, and the defaults of the model's generation_config.json other than end tokens, are not used.
    """

    def __init__(self, model: str, *, batch_size: int = 32, device: str | None = None, dtype: str | None = None,
                 name: str | None = None, trust_remote_code: bool = False):
        try:
            import transformers
        except ImportError:
            raise ConfigError("the backend transformers needs it: pip install 'xalign[transformers]'") from None
        self.tokenizer: Any
        self.library: Any = transformers
        self.trust = trust_remote_code
        self.name, self.batch_size, self.dtype = name or model, batch_size, dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = self._load(model)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{model}: no usable tokenizer ({' '.join(str(error).split())[:200]})") from error

    def _load(self, model: str) -> Any:
        try:
            net: Any = self.library.AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, self.dtype) if self.dtype else "auto", trust_remote_code=self.trust)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"{model}: transformers can't open it ({' '.join(str(error).split())[:200]})") from error
        return net.to(self.device).eval()

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def refresh(self, checkpoint: str) -> None:
        """The weights of a checkpoint; the tokenizer stays."""
        self.model = self._load(checkpoint)

    def stops(self, strings: Sequence[str] = ()) -> list[int]:
        """Ids that end a text: the tokenizer's, those of the model's generation_config, and of `strings` the special tokens."""
        given = self.model.generation_config.eos_token_id
        found = [self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given]),
                 *special_ids(self.tokenizer, strings)]
        return list(dict.fromkeys(i for i in found if i is not None))

    def generate(self, prompts: Sequence[Text], params: SamplingParams, progress: str = "", *,
                 seeds: Sequence[int] | None = None, done: Done | None = None) -> list[list[Completion]]:
        """See `Backend.generate`."""
        params, began = self.checked(params), time.monotonic()
        results: list[list[Completion]] = [[] for _ in prompts]
        ids: dict[int, list[int]] = {}
        if seeds is None:
            seed = params.seed if params.seed is not None else int(torch.randint(2**62, ()))
            seeds = sampling.row_keys(seed, len(prompts)).tolist()

        def finish(i: int, completions: list[Completion]) -> None:
            results[i] = completions
            bar.update()
            if done is not None:
                done(i, completions)

        with tqdm(total=len(prompts), desc=progress, unit="prompt", disable=not progress, mininterval=1) as bar:
            for i, prompt in enumerate(prompts):
                try:
                    ids[i] = fitted_ids(self.tokenizer, prompt, self.template, params, self.context)
                except DataError as error:
                    finish(i, [failure(str(error), self.name)] * params.n)
            for rows in self._groups({i: len(row) for i, row in ids.items()}, params):
                made = self._batch([ids[i] for i in rows], [seeds[i] for i in rows], params)
                for row, i in enumerate(rows):
                    finish(i, [self._completion(*made[row * params.n + k], params, began) for k in range(params.n)])
        return results

    def _groups(self, lengths: dict[int, int], params: SamplingParams) -> Iterator[list[int]]:
        """Batches of similar length, longest first; prompts whose answers end with the context only beside their equals."""
        order, size = sorted(lengths, key=lambda i: -lengths[i]), max(1, self.batch_size // params.n)
        while order:
            first = lengths[order[0]]
            tight = self.context is not None and first + params.max_new_tokens > self.context
            rows = [i for i in order[:size] if not tight or lengths[i] == first]
            order = order[len(rows) :]
            yield rows

    @torch.no_grad()
    def _batch(self, ids: list[list[int]], seeds: list[int], params: SamplingParams,
               streamer: Any = None) -> list[tuple[list[int], float | None]]:
        """New token ids, with the one that ended them, and their summed log-probability, of each prompt's n texts."""
        stops, width, n = self.stops(params.stop), max(map(len, ids)), params.n
        pad = next((i for i in (self.tokenizer.pad_token_id, *stops) if i is not None), 0)
        steps = params.max_new_tokens if self.context is None else min(params.max_new_tokens, self.context - width)
        if not steps:
            return [([], 0.0)] * (len(ids) * n)
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=self.device).repeat_interleave(n, 0)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        mask = mask.repeat_interleave(n, 0)
        keys = sampling.row_keys(torch.tensor(seeds), len(ids), n, self.device)
        draw = _Draw(params, keys, mask.bool(), stops)
        config = self.library.GenerationConfig(
            do_sample=False, num_beams=params.beams, length_penalty=params.length_penalty if params.beams > 1 else None,
            early_stopping="never" if params.beams > 1 else None, max_new_tokens=steps, eos_token_id=stops or None,
            pad_token_id=pad, repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True)
        criteria = [_Stopped(self.tokenizer, params.stop, width)] if params.stop else []
        out = self.model.generate(tokens, attention_mask=mask, generation_config=config, streamer=streamer,
                                  logits_processor=[draw] if params.beams == 1 else [], stopping_criteria=criteria)
        made: list[tuple[list[int], float | None]] = []
        for row, new in enumerate(out[:, width:].tolist()):
            used = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))
            if params.stop and self._stopped(
                new[:used], params.stop, whole=True
            ):  # behind a row that a string has ended stands the pad
                used = min(used, next((i + 1 for i in range(used) if self._stopped(new[: i + 1], params.stop)), used))
            made.append((new[:used], float(draw.logps[row, :used].sum()) if params.beams == 1 else None))
        return made

    def _stopped(self, tokens: list[int], stop: tuple[str, ...], whole: bool = False) -> bool:
        text = self.tokenizer.decode(tokens if whole else tokens[-tail_tokens(stop) :], skip_special_tokens=True)
        return any(s in text for s in stop)

    def _completion(self, tokens: list[int], logps: float | None, params: SamplingParams, began: float) -> Completion:
        ended = bool(tokens) and tokens[-1] in self.stops(params.stop)
        text = self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        text, ended = cut(text, params.stop, ended)
        return Completion(text, tuple(tokens), "stop" if ended else "length", logps, time.monotonic() - began, self.name)

    def stream(self, prompt: Text, params: SamplingParams) -> Iterator[str]:
        """See `Backend.stream`; the model runs in a thread of its own."""
        params = self.checked(params)
        ids = fitted_ids(self.tokenizer, prompt, self.template, params, self.context)
        seed = params.seed if params.seed is not None else int(torch.randint(2**62, ()))
        streamer = _Streamer()
        threading.Thread(
            target=self._produce, args=(ids, sampling.row_keys(seed, 1).tolist(), params, streamer), daemon=True
        ).start()
        tokens: list[int] = []
        shown, cutter, ended = 0, StopStrings(params.stop), False
        try:
            while not ended and (piece := streamer.pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                tokens += piece
                ended = bool(tokens) and tokens[-1] in self.stops(params.stop)
                text = self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
                whole = text if ended else text.rstrip(UNFINISHED)
                if len(whole) > shown:
                    yield cutter.push(whole[shown:])
                    shown = len(whole)
                ended = ended or cutter.stopped is not None
            self.ended = ended
            yield cutter.flush()
        finally:
            streamer.left = True

    def _produce(self, ids: list[int], seeds: list[int], params: SamplingParams, streamer: "_Streamer") -> None:
        try:
            self._batch([ids], seeds, params, streamer=streamer)
            streamer.pieces.put(None)
        except BaseException as error:  # it is raised where the text is read
            streamer.pieces.put(error)

    def close(self) -> None:
        del self.model


def tail_tokens(stop: Sequence[str]) -> int:
    """So many of the newest tokens hold a stop string that has just become complete: a token has a byte at least."""
    return max(len(s.encode()) for s in stop) + 4


class _Draw:
    """A logits processor: penalties, temperature, filters and noise, in the native engine's order; the largest is the draw."""

    def __init__(self, params: SamplingParams, keys: Tensor, mask: Tensor, stops: list[int]):
        self.params, self.keys, self.mask, self.stops = params, keys, mask, stops
        self.given, self.lengths = mask.shape[1], mask.sum(1)
        self.logps = torch.zeros(len(keys), params.max_new_tokens, device=keys.device)

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        params, logits = self.params, scores.float()
        new = tokens[:, self.given :]
        x = logits
        if params.repetition_penalty != 1:
            seen = torch.cat((self.mask, torch.ones_like(new, dtype=torch.bool)), 1)
            x = sampling.repetition_penalty(x, tokens, params.repetition_penalty, seen)
        if (params.presence_penalty or params.frequency_penalty) and new.shape[1]:
            x = sampling.count_penalty(x, new, params.presence_penalty, params.frequency_penalty)
        if new.shape[1] < params.min_new_tokens and self.stops:
            x = x.index_fill(-1, torch.tensor(self.stops, device=x.device), float("-inf"))
        if params.temperature:
            x = sampling.temperature(x, params.temperature)
            x = x if params.top_k is None else sampling.top_k(x, k=params.top_k)
            x = x if params.top_p is None else sampling.top_p(x, params.top_p)
            x = x if params.min_p is None else sampling.min_p(x, params.min_p)
            x = x + sampling.gumbel(self.keys, self.lengths + new.shape[1], x.shape[-1])
        choice = x.argmax(-1, keepdim=True)
        self.logps[:, new.shape[1]] = (logits.gather(-1, choice) - logits.logsumexp(-1, keepdim=True))[:, 0]
        return x


class _Stopped:
    """Ends a row whose new text holds a stop string, wherever token borders are; what was given is not looked at."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], given: int):
        self.tokenizer, self.stop, self.given, self.tail = tokenizer, stop, given, tail_tokens(stop)

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        new = tokens[:, self.given :][:, -self.tail :].tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=tokens.device)


class _Streamer:
    """Puts tokens into a queue as they come; the first that transformers shows is the prompt.

    A reader that has `left` ends the model's run.
    """

    def __init__(self) -> None:
        self.pieces: SimpleQueue[Any] = SimpleQueue()
        self.seen = self.left = False

    def put(self, tokens: Tensor) -> None:
        if self.left:
            raise InterruptedError
        if self.seen:
            self.pieces.put(tokens.reshape(-1).tolist())
        self.seen = True

    def end(self) -> None:
        """Nothing more comes; the queue is told by whoever runs the model."""
