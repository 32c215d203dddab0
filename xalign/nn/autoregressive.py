"""`AutoregressiveWrapper`: the language-model loss, sampling, streaming and beam search around one decoder."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from xalign import sampling
from xalign.drawing import Draw, Penalties
from xalign.logprobs import scored_logprobs
from xalign.nn.cache import Kept
from xalign.nn.decoding import Decoding, Prompts, as_rows, evaluating, room
from xalign.nn.engine import Engine, rounds
from xalign.nn.linear import Packed
from xalign.nn.transformer import TransformerWrapper
from xalign.stopping import StopTokens

Ends = int | Sequence[int] | None
Number = float | Tensor
BEAM_OPTIONS = {"prompts", "seq_len", "eos_token", "prompt_lens", "cache_kv", "beams", "length_penalty"}


class AutoregressiveWrapper(nn.Module):
    """Next-token loss and generation around `net`.

    `ignore_index` marks tokens that are no target (and are read as `pad_value`); `pad_value` fills rows behind their end.
    """

    def __init__(self, net: TransformerWrapper, ignore_index: int = -100, pad_value: int = 0):
        super().__init__()
        self.net, self.ignore_index, self.pad_value = net, ignore_index, pad_value

    @property
    def max_seq_len(self) -> int:
        return self.net.max_seq_len

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean next-token cross-entropy, nats a scored token: tokens (b, n) -> (); 0 where nothing is scored.

        Not scored are `ignore_index` and, where a `mask` (b, n) is given, what is False in it.
        """
        scored = tokens != self.ignore_index
        inputs = tokens.masked_fill(~scored, self.pad_value)
        logps, scored = scored_logprobs(self.net, inputs, scored, mask)
        return -logps.masked_fill(~scored, 0.0).sum() / scored.sum().clamp(min=1)

    def generate(self, prompts: Prompts, seq_len: int, eos_token: Ends = None, temperature: Number = 1.0,
                 prompt_lens: Tensor | Sequence[int] | None = None, filter_logits_fn: Any = None,
                 filter_kwargs: dict | Sequence[dict] = {}, cache_kv: bool = True, *,  # noqa: B006
                 top_k: int | Tensor | None = None, top_p: Number | None = None, min_p: Number | None = None,
                 repetition_penalty: Number = 1.0, presence_penalty: Number = 0.0, frequency_penalty: Number = 0.0,
                 logit_bias: dict[int, float] | Tensor | None = None, bad_words: Sequence[Sequence[int]] | None = None,
                 min_new_tokens: int = 0, num_samples: int = 1, beams: int = 1, length_penalty: float = 1.0,
                 stop: Sequence[Sequence[int]] | None = None, seed: int | Tensor | None = None,
                 generator: torch.Generator | None = None, return_logprobs: bool = False, batch_size: int | None = None,
                 cache_tokens: int | None = None, engine: str | None = None,
                 progress: Callable[[int], object] | None = None,
                 finished: Callable[[int, Tensor, Tensor], object] | None = None) -> Any:
        """New tokens only, (b, m), m <= seq_len the longest row with its end; behind a row's end stands `pad_value`.

        `prompts` are (b, n) (right-padded where `prompt_lens` is given), (n,) -> (m,), or a list of 1-D tensors.
        A row ends with a generated `eos_token` (kept) or when its generated tokens end with a sequence of `stop` (kept).
        Order: `logit_bias` (by token id, or (v,)), repetition, presence and frequency penalty, `bad_words` (id sequences
        that are never completed), no end before `min_new_tokens`; then temperature (0 is greedy), top-k, top-p, min-p,
        `filter_logits_fn` (a name, a function or a list, each with its `filter_kwargs`), on fp32 logits; numbers, or
        tensors (b,) with a value a row.
        `num_samples` > 1 gives (b, num_samples, m). Draws depend on the seed, the row and the position alone; `seed` is
        an int, (b,) ints, or None for one from `generator` or torch's own. `return_logprobs` gives (tokens, logps): nats
        under the unfiltered model at temperature 1, 0 behind the end. A text that outgrows `max_seq_len` is cut to
        the newest half of the window and goes on. Raises `ValueError` for values out of range.

        At most `batch_size` rows run together, whose cache holds at most `cache_tokens` tokens; a row that ends makes room for
        the next prompt. `engine` is "eager", "graph" (a CUDA graph a step; what is None on CUDA) or "compile" (torch.compile).
        `progress` is called with the number of prompts that have just been finished, `finished` with a prompt's index, its
        tokens and its logps (num_samples, m), as soon as all its texts have ended.
        """
        sampled = {k: v for k, v in locals().items() if k not in BEAM_OPTIONS | {"self"}}
        if beams != 1:
            defaults = {**(self.generate.__kwdefaults__ or {}), "temperature": 1.0, "filter_logits_fn": None,
                        "filter_kwargs": {}}
            for name, value in sampled.items():
                if isinstance(value, Tensor) or value != defaults[name]:
                    raise ValueError(f"beams is {beams} and {name} is given, allowed is one of them")
            return self.beam_search(prompts, seq_len, beams, eos_token, length_penalty, prompt_lens, cache_kv=cache_kv)
        run = self._engine(prompts, seq_len, eos_token, prompt_lens=prompt_lens, cache_kv=cache_kv, **sampled)
        with self._decoding():
            for _ in run.run():
                pass
        longest = int(run.counts.max())
        single = isinstance(prompts, Tensor) and prompts.ndim == 1
        tokens, logps = (self._shape(t[:, :longest], single, num_samples) for t in (run.tokens, run.logps))
        return (tokens, logps) if return_logprobs else tokens

    def stream(self, prompts: Prompts, seq_len: int, eos_token: Ends = None, temperature: Number = 1.0, *,
               num_samples: int = 1, kept: Kept | None = None, **options: Any) -> Generator[Tensor, None, None]:
        """The tokens of `generate`, one step at a time as they come, (b,) each; stacked they equal it.

        Takes `generate`'s options except beams, `return_logprobs`, `batch_size`, `cache_tokens`, `progress` and `finished`.
        With `kept` a single prompt goes on from the cache that the call before left there, and leaves its own.
        """
        for name in options.keys() & {"return_logprobs", "batch_size", "cache_tokens", "progress", "finished"}:
            raise TypeError(f"stream takes no {name}")
        single = isinstance(prompts, Tensor) and prompts.ndim == 1
        run = self._engine(prompts, seq_len, eos_token, temperature, num_samples=num_samples, lockstep=True, kept=kept,
                           **options)
        steps, seen = run.run(), None
        try:
            while True:
                # between two steps the reader has its own modes, and may train
                with evaluating(self.net), torch.no_grad():
                    versions = [(id(p), 0 if p.is_inference() else p._version) for p in self.net.parameters()]
                    if versions != seen:
                        packed, seen = Packed(self.net), versions
                    with packed:
                        going = next(steps, self) is None
                        newest = run.newest() if going else None
                if newest is None:
                    return
                yield self._shape(newest[:, None], single, num_samples)[..., 0]
        finally:
            if kept is not None and hasattr(run, "state"):  # it has begun
                run.state.save(kept)

    def _decoding(self) -> ExitStack:
        """The state in which the model decodes: eval mode, no gradients, packed weights."""
        stack = ExitStack()
        stack.enter_context(evaluating(self.net))
        stack.enter_context(torch.no_grad())
        stack.enter_context(Packed(self.net))
        return stack

    @staticmethod
    def _shape(t: Tensor, single: bool, samples: int) -> Tensor:
        """(b * s, m) -> the caller's shape."""
        t = t.unflatten(0, (-1, samples))
        t = t if samples > 1 else t[:, 0]
        return t[0] if single else t

    def _engine(self, prompts: Prompts, seq_len: int, eos_token: Ends = None, temperature: Number = 1.0,
                prompt_lens: Tensor | Sequence[int] | None = None, filter_logits_fn: Any = None,
                filter_kwargs: dict | Sequence[dict] = {}, cache_kv: bool = True, *,  # noqa: B006
                top_k: int | Tensor | None = None, top_p: Number | None = None, min_p: Number | None = None,
                repetition_penalty: Number = 1.0, presence_penalty: Number = 0.0, frequency_penalty: Number = 0.0,
                logit_bias: dict[int, float] | Tensor | None = None, bad_words: Sequence[Sequence[int]] | None = None,
                min_new_tokens: int = 0, num_samples: int = 1, stop: Sequence[Sequence[int]] | None = None,
                seed: int | Tensor | None = None, generator: torch.Generator | None = None, return_logprobs: bool = False,
                batch_size: int | None = None, cache_tokens: int | None = None, engine: str | None = None,
                progress: Callable[[int], object] | None = None,
                finished: Callable[[int, Tensor, Tensor], object] | None = None, lockstep: bool = False,
                kept: Kept | None = None) -> Engine:
        """`generate`'s options, checked, as an engine that is ready to run."""
        device = self.net.token_emb.weight.device
        rows = as_rows(prompts, prompt_lens, device)
        b, s = len(rows), _whole("num_samples", num_samples, 1)
        steps = _whole("seq_len", seq_len, 0)
        per_row = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
                   "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
                   "frequency_penalty": frequency_penalty}
        for name, value in per_row.items():
            if isinstance(value, Tensor):
                if value.ndim and value.shape != (b,):
                    raise ValueError(f"{name} has shape {tuple(value.shape)}, allowed is a number or ({b},)")
                per_row[name] = value.to(device).repeat_interleave(s) if value.ndim else value.to(device)
        if kept is not None and (b * s != 1 or not cache_kv):
            raise ValueError(f"kept goes with one row, cached: there are {b * s}, and cache_kv is {cache_kv}")
        stops = StopTokens(eos_token, stop, device)
        penalise = Penalties(self.net.num_tokens, device, stops.eos, logit_bias=logit_bias, bad_words=bad_words,
                             min_new_tokens=_whole("min_new_tokens", min_new_tokens, 0),
                             **{name: per_row.pop(f"{name}_penalty") for name in ("repetition", "presence", "frequency")})
        draw = Draw(per_row, sampling.compose(filter_logits_fn, filter_kwargs), b * s, device)
        keys = sampling.row_keys(self._seed(seed, generator, device), b, s, device)
        engine = ("graph" if device.type == "cuda" and cache_kv else "eager") if engine is None else engine
        if engine != "eager" and not cache_kv:
            raise ValueError(f"engine is {engine!r} and cache_kv is False, allowed is 'eager'")
        if engine not in ("eager", "graph", "compile") or (engine == "graph" and device.type != "cuda"):
            raise ValueError(f"engine is {engine!r}, allowed is 'eager', 'compile', and on CUDA 'graph'")
        for name, value in (("batch_size", batch_size), ("cache_tokens", cache_tokens)):
            if value is not None:
                _whole(name, value, 1)
        plan = rounds([room(len(r), steps, s, self.max_seq_len) for r in rows],
                      None if batch_size is None else max(1, batch_size // s), cache_tokens)
        return Engine(self.net, rows, steps, plan, copies=s, cached=cache_kv, penalise=penalise, draw=draw, stops=stops,
                      keys=keys, pad=self.pad_value, score=return_logprobs, mode=engine, lockstep=lockstep, progress=progress,
                      finished=finished, kept=kept)

    @staticmethod
    def _seed(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> int | Tensor:
        if seed is not None:
            if not isinstance(seed, (int, Tensor)):
                raise ValueError(f"seed is {seed!r}, allowed is a whole number or a tensor of them")
            if generator is not None:
                raise ValueError("seed and generator are both given, allowed is one of them")
            return seed
        source = device if generator is None else generator.device
        return torch.randint(2**62, (), generator=generator, device=source).to(device)

    @torch.no_grad()
    def beam_search(self, prompts: Prompts, seq_len: int, beams: int = 4, eos_token: Ends = None, length_penalty: float = 1.0,
                    prompt_lens: Tensor | Sequence[int] | None = None, return_beams_and_scores: bool = False, *,
                    cache_kv: bool = True) -> Any:
        """The best of `beams` hypotheses by sum of log-probabilities / length ** length_penalty, (b, m) new tokens.

        Length counts generated tokens with the end token. Finished hypotheses are kept; a row's search ends when no live
        one can still win (transformers' early_stopping="never"). With `return_beams_and_scores`: (beams, b, m) and
        (beams, b), best first; where a vocabulary has too few continuations the rest scores -inf.
        """
        net, w, steps = self.net, _whole("beams", beams, 1), _whole("seq_len", seq_len, 0)
        if not math.isfinite(length_penalty):
            raise ValueError(f"length_penalty is {length_penalty}, allowed is a finite number")
        device, v = net.token_emb.weight.device, net.num_tokens
        rows = as_rows(prompts, prompt_lens, device)
        b, stops = len(rows), StopTokens(eos_token, None, device)
        candidates = min(max(2, 1 + len(stops.eos)) * w, w * v)
        neg_inf = float("-inf")
        live_scores = torch.full((b, w), neg_inf, device=device)
        live_scores[:, 0] = 0.0
        live = torch.full((b, w, steps), self.pad_value, dtype=torch.long, device=device)
        best, best_scores, best_lengths = live.clone(), torch.full_like(live_scores, neg_inf), live.new_zeros(b, w)
        rank, first_row = torch.arange(candidates, device=device), torch.arange(b, device=device)[:, None] * w

        with self._decoding():
            everywhere, state = list(range(b)), Decoding(net, rows, steps, copies=w, cached=cache_kv)
            state.admit(everywhere, everywhere)
            for t in range(steps):
                state.prepare(everywhere)
                logps = state.logits().float().log_softmax(-1)
                total = (live_scores[..., None] + logps.view(b, w, v)).view(b, w * v)
                scores, index = total.topk(candidates)
                beam, token = index // v, index % v
                texts = live.gather(1, beam[..., None].expand(-1, -1, steps))
                texts[:, :, t] = token
                ends = torch.isin(token, stops.eos) if t + 1 < steps else torch.ones_like(token, dtype=torch.bool)
                # only an end among the best w candidates is a hypothesis, as in transformers' search
                ended = (scores / (t + 1) ** length_penalty).masked_fill(~(ends & (rank < w)), neg_inf)
                best_scores, keep = torch.cat((best_scores, ended), 1).topk(w)
                best = torch.cat((best, texts), 1).gather(1, keep[..., None].expand(-1, -1, steps))
                best_lengths = torch.cat((best_lengths, torch.full_like(token, t + 1)), 1).gather(1, keep)
                live_scores, keep = scores.masked_fill(ends, neg_inf).topk(w)
                live = texts.gather(1, keep[..., None].expand(-1, -1, steps))
                longest = steps if length_penalty > 0 else t + 1
                if t + 1 == steps or bool((live_scores[:, 0] / longest**length_penalty <= best_scores[:, -1]).all()):
                    break
                if w > 1:
                    state.reorder((first_row + beam.gather(1, keep)).view(-1))
                state.append(token.gather(1, keep).view(-1))
                state.advance(everywhere)
        best_lengths = best_lengths.masked_fill(best_scores == neg_inf, 0)
        behind = torch.arange(steps, device=device) >= best_lengths[..., None]
        best = best.masked_fill(behind, self.pad_value)
        chosen = best if return_beams_and_scores else best[:, :1]
        used = best_lengths if return_beams_and_scores else best_lengths[:, :1]
        chosen = chosen[..., : int(used.max()) if steps else 0].transpose(0, 1)
        single = isinstance(prompts, Tensor) and prompts.ndim == 1
        if return_beams_and_scores:
            scores = best_scores.T
            return (chosen[:, 0], scores[:, 0]) if single else (chosen, scores)
        return chosen[0, 0] if single else chosen[0]


def _whole(name: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not low <= value < math.inf or int(value) != value:
        raise ValueError(f"{name} is {value!r}, allowed is a whole number >= {low}")
    return int(value)
