"""The decoding engine: whoever shares its places, its caches and its graphs, each text is the one it would be alone."""

import copy
import functools
import gc
import heapq
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from captured import no_short_draws, on_a_gpu, step_without_values
from conftest import LLAMA, ids, tiny, tiny_ar
from hypothesis import given, settings
from hypothesis import strategies as st

from xalign import AutoregressiveWrapper, load_pretrained, sampling, save_pretrained
from xalign.backends.base import SamplingParams
from xalign.backends.native import NativeBackend
from xalign.cli import main
from xalign.errors import ConfigError
from xalign.nn import decoding
from xalign.nn.cache import DecodeBuffer
from xalign.nn.decoding import COMMON, window_start
from xalign.nn.engine import rounds
from xalign.tokenizers import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"llama": {}, "grouped": {"attn_kv_heads": 2}, "alibi": {"rotary_pos_emb": False, "alibi_pos_bias": True},
          "absolute": {"rotary_pos_emb": False}, "qk norm": {"attn_qk_norm": True}, "window": {"attn_sliding_window": 4}}
EVERY = pytest.mark.parametrize("shape", SHAPES)
LISTED = [ids(1, n, seed=n)[0] for n in (3, 7, 1, 5, 2, 9)]
FILTERS = {"temperature": 1.3, "top_k": 9, "top_p": 0.95, "min_p": 0.01}
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2, "logit_bias": {3: 1.5, 6: -2.0},
             "bad_words": [[2], [8, 1], [1, 4, 4]], "min_new_tokens": 3}


@functools.cache
def model_of(shape="llama", window=32, dtype=torch.float32):
    return tiny_ar(max_seq_len=window, **SHAPES[shape]).to(dtype)


def sharp(tokens=17, window=4096, **options):
    """A model without attention to speak of: texts of any length cost little and never tie."""
    return tiny_ar(num_tokens=tokens, max_seq_len=window, depth=1, dim=16, heads=2, **options)


@torch.no_grad()
def by_hand(model, prompt, key, steps, *, eos_token=(), stop=(), temperature=1.0, top_k=None, top_p=None, min_p=None,
            repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, bad_words=(),
            min_new_tokens=0):
    """The text that `generate` promises, and its log-probabilities: one row, no cache, one rule after the other."""
    text, logps, v = prompt.tolist(), [], model.net.num_tokens
    eos = [eos_token] if isinstance(eos_token, int) else list(eos_token)
    while len(logps) < steps:
        new = text[len(prompt) :]
        x = raw = model.net(torch.tensor([text[window_start(len(text), model.max_seq_len) :]]))[:, -1].float()
        for token, value in (logit_bias or {}).items():
            x = x.index_add(1, torch.tensor([token]), torch.tensor([[value]]))
        x = sampling.repetition_penalty(x, torch.tensor([text]), repetition_penalty)
        x = sampling.count_penalty(x, torch.tensor([new], dtype=torch.long), presence_penalty, frequency_penalty)
        for *head, last in bad_words:
            if len(head) <= len(text) and text[len(text) - len(head) :] == head:
                x = x.index_fill(1, torch.tensor([last]), float("-inf"))
        if len(new) < min_new_tokens:
            x = x.index_fill(1, torch.tensor(eos, dtype=torch.long), float("-inf"))
        if temperature:
            x = sampling.temperature(x, temperature)
            x = x if top_k is None else sampling.top_k(x, k=top_k)
            x = x if top_p is None else sampling.top_p(x, top_p)
            x = x if min_p is None else sampling.min_p(x, min_p)
            x = x + sampling.gumbel(key[None], torch.tensor([len(text)]), v)
        token = int(x.argmax())
        text.append(token)
        logps.append(float(raw.log_softmax(-1)[0, token]))
        new = text[len(prompt) :]
        if token in eos or any(len(s) <= len(new) and new[len(new) - len(s) :] == list(s) for s in stop):
            break
    return text[len(prompt) :], logps


def check_by_hand(model, prompts, steps, out, seed, copies=1, tolerance=1e-4, **options):
    """`out` = (tokens, logps) of `generate` is what each row would write by itself."""
    tokens, logps = (t.unsqueeze(1) if copies == 1 else t for t in out)
    keys = sampling.row_keys(seed, len(prompts), copies).view(-1, copies)
    longest = 0
    for i, prompt in enumerate(prompts):
        own = {k: v[i].item() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        for s in range(copies):
            text, values = by_hand(model, prompt, keys[i, s], steps, **own)
            n, longest = len(text), max(longest, len(text))
            assert tokens[i, s].tolist() == text + [model.pad_value] * (tokens.shape[-1] - n), (i, s)
            torch.testing.assert_close(logps[i, s, :n], torch.tensor(values), atol=tolerance, rtol=tolerance)
            assert not logps[i, s, n:].any()
    assert tokens.shape == logps.shape == (len(prompts), copies, longest)


def text_options(options):
    """Those that change a text."""
    return {k: v for k, v in options.items() if k in by_hand.__wrapped__.__kwdefaults__}


class Watch:
    """What a generation asks of the network: rows and cells of cache of each step, tokens (r, n) of each prompts' pass."""

    def __init__(self, model):
        self.rows, self.cells, self.passes, self.buffers, self.types, self.bytes = [], [], [], [], set(), []
        net = model.net
        self.patch = mock.patch.multiple(net, forward=functools.partial(self.forward, net.forward),
                                         step=functools.partial(self.step, net.step),
                                         decode_buffer=functools.partial(self.decode_buffer, net.decode_buffer))

    def forward(self, real, tokens, *args, **kwargs):
        self.passes.append(tuple(tokens.shape))
        return real(tokens, *args, **kwargs)

    def step(self, real, tokens, buffer, live=None):
        self.rows.append(len(tokens))
        self.cells.append(sum(k.shape[0] * k.shape[2] for k in (buffer.keys[0], *buffer.far_keys[:1])))
        return real(tokens, buffer, live)

    def decode_buffer(self, real, *args, **kwargs):
        assert not any(ref() for ref in self.buffers), "two caches at once"
        buffer = real(*args, **kwargs)
        self.buffers.append(weakref.ref(buffer))
        self.types.add(buffer.keys[0].dtype)
        self.bytes.append(sum(t.nbytes for t in (*buffer.keys, *buffer.values, *buffer.far_keys, *buffer.far_values)))
        return buffer

    def __enter__(self):
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()


def left_behind(model) -> bool:
    """Whether anything of a generation is still in the model."""
    return any(m.__dict__.get(key) is not None for m in model.modules() for key in ("packed", "joint"))


# ---- each text is what it would be alone

TEXTS = st.lists(st.lists(st.integers(0, 16), min_size=1, max_size=12), min_size=1, max_size=5)
HOW = {"greedy": {"temperature": 0.0}, "plain": {}, "filters": FILTERS, "penalties": {"temperature": 0.8} | PENALTIES,
       "greedy penalties": {"temperature": 0.0} | PENALTIES}
ENDS = [{}, {"eos_token": [3, 5]}, {"eos_token": 4, "stop": [[7, 8], [2]]}, {"stop": [[1], [9, 9, 9], [0]]}]


@settings(max_examples=100)
@given(shape=st.sampled_from(list(SHAPES)), window=st.sampled_from([1, 2, 3, 5, 8, 40]), texts=TEXTS, steps=st.integers(0, 12),
       shared=st.sampled_from([0, 0, 15, 16, 18]), copies=st.integers(1, 3), how=st.sampled_from(list(HOW)),
       ends=st.sampled_from(ENDS), batch=st.sampled_from([None, 1, 2, 3]), tight=st.booleans(), gpu=st.sampled_from("neg"),
       double=st.booleans(), seed=st.integers(0, 2**40))
def test_every_text_is_the_one_by_hand(shape, window, texts, steps, shared, copies, how, ends, batch, tight, gpu, double, seed):
    model = model_of(shape, window, torch.float64 if double else torch.float32)
    prompts = [torch.tensor([5, 2] * (shared // 2) + [1] * (shared % 2) + text) for text in texts]
    options = HOW[how] | ends
    cache = max(decoding.room(len(p), steps, copies, window) for p in prompts) * 2 if tight else None
    run = functools.partial(model.generate, prompts, steps, num_samples=copies, seed=seed, return_logprobs=True,
                            batch_size=batch and batch * copies, cache_tokens=cache, **options)
    if gpu == "n":
        out = run()
    else:
        with on_a_gpu(model, graphs=gpu == "g"):
            out = run()
    check_by_hand(model, prompts, steps, out, seed, copies, **options)
    assert not left_behind(model)


@EVERY
def test_options_of_each_row_follow_it_to_its_place(shape):
    model, b = model_of(shape, 8), len(LISTED)
    torch.manual_seed(1)
    rows = {"temperature": torch.rand(b) * 2, "top_k": torch.randint(1, 18, (b,)), "top_p": torch.rand(b),
            "min_p": torch.rand(b) * 0.2, "repetition_penalty": 0.5 + torch.rand(b), "presence_penalty": torch.rand(b),
            "frequency_penalty": torch.rand(b) - 0.5}
    seeds = torch.arange(b) * 7
    for batch, gpu in ((None, False), (2, True), (5, False)):
        with on_a_gpu(model) if gpu else nullcontext():
            out = model.generate(LISTED, 14, seed=seeds, eos_token=[3, 5], return_logprobs=True, batch_size=batch, **rows)
        check_by_hand(model, LISTED, 14, out, seeds, eos_token=[3, 5], **rows)


def test_a_row_that_ended_with_a_full_window_stands_still_there():
    """Its next position would be one that a model of learnt positions doesn't have; cached or not."""
    for seed in range(20):
        model = tiny_ar(seed, max_seq_len=8, **SHAPES["absolute"])
        prompts = [ids(1, n, seed=n)[0] for n in (8, 3, 2)]
        free = model.generate(prompts, 4, temperature=0)
        end = int(free[0, 0])
        if end in free[1:, :3]:
            continue
        for cache_kv in (True, False):
            for copies in ({}, {"num_samples": 2}):
                options = {"temperature": 0, "eos_token": end}
                out = model.generate(prompts, 4, cache_kv=cache_kv, return_logprobs=True, **copies, **options)
                check_by_hand(model, prompts, 4, out, 0, copies.get("num_samples", 1), **options)
        return
    pytest.fail("no model whose first row ends first")


@settings(max_examples=40)
@given(shape=st.sampled_from(list(SHAPES)), window=st.sampled_from([1, 2, 3, 8, 40]), texts=TEXTS,
       shared=st.sampled_from([0, 17]), steps=st.integers(1, 12), beams=st.integers(1, 4), seed=st.integers(0, 9))
def test_beams_with_and_without_their_cache(shape, window, texts, shared, steps, beams, seed):
    """Past the window, with a common beginning, batched or alone."""
    model = model_of(shape, window, torch.float64)
    prompts = [torch.tensor([5] * shared + text) for text in texts]
    options = {"beams": beams, "eos_token": 3, "return_beams_and_scores": True}
    found, scores = model.beam_search(prompts, steps, **options)
    for again in ({"cache_kv": False}, {}):
        other, other_scores = model.beam_search(prompts, steps, **options | again)
        assert torch.equal(found, other)
        torch.testing.assert_close(scores, other_scores)
    i = seed % len(prompts)
    own, own_scores = model.beam_search([prompts[i]], steps, cache_kv=False, **options)
    assert torch.equal(own[:, 0], found[:, i, : own.shape[-1]])
    torch.testing.assert_close(own_scores[:, 0], scores[:, i])


# ---- places


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.one_of(st.none(), st.integers(1, 8)),
       st.one_of(st.none(), st.integers(40, 200)))
def test_rounds_hold_everyone_once_and_no_more_than_fits(needs, places, cache):
    plan = rounds(needs, places, cache)
    assert sorted(i for group, _ in plan for i in group) == list(range(len(needs)))
    for group, count in plan:
        most = max(needs[i] for i in group)
        assert 1 <= count <= len(group) and count <= (places or count) and count * most <= (cache or count * most)
        assert count == min(len(group), places or len(group), (cache or 10**9) // most), "no place is given away"
        assert cache is None or all(2 * needs[i] > most for i in group)


def last_step(lengths, places):
    """When the last text ends if each free place goes to the next in the row."""
    busy = [0] * places
    for n in lengths:
        heapq.heapreplace(busy, busy[0] + n)
    return max(busy)


def test_a_free_place_goes_to_the_next_prompt():
    model = sharp()
    prompts = [ids(1, 1 + 7 * i % 11, seed=i)[0] for i in range(30)]
    options = {"temperature": 1.5, "eos_token": [3, 5]}
    keys = sampling.row_keys(6, 30)
    lengths = [len(by_hand(model, p, key, 40, **options)[0]) for p, key in zip(prompts, keys, strict=True)]
    assert len(set(lengths)) > 10 and max(lengths) == 40
    order = sorted(range(30), key=lambda i: -len(prompts[i]))
    with Watch(model) as watch:
        out = model.generate(prompts, 40, batch_size=4, return_logprobs=True, seed=6, **options)
    assert set(watch.rows) <= {4, 2, 1} and sorted(watch.rows, reverse=True) == watch.rows
    assert len(watch.rows) == last_step([lengths[i] for i in order], 4)
    check_by_hand(model, prompts, 40, out, 6, **options)
    with on_a_gpu(model), Watch(model) as late:
        assert torch.equal(model.generate(prompts, 40, batch_size=4, seed=6, **options), out[0])
    assert set(late.rows) == {4}, "a graph's rows stay"


def test_an_end_is_known_late_on_a_gpu_but_is_known():
    """All end at once, of 200 steps: two looks later nothing is left to do; a refill doesn't delay the ends of the others."""
    model = sharp()
    prompts = [ids(1, 3, seed=i)[0] for i in range(6)]
    every = {"temperature": 0, "eos_token": list(range(17))}
    with on_a_gpu(model, graphs=False), Watch(model) as watch:
        assert model.generate(prompts, 200, **every).shape == (6, 1)
    assert len(watch.rows) == 16
    with on_a_gpu(model, graphs=False), Watch(model) as watch:
        assert model.generate(prompts, 200, batch_size=2, **every).shape == (6, 1)
    assert len(watch.rows) <= 3 * 16


def test_late_flags_know_their_places():
    """Eagerly on a GPU places are dropped: what was asked before means others then."""
    model = model_of()
    prompts = [ids(1, n, seed=n)[0] for n in range(1, 12)]
    for seed in range(8):
        options = {"seed": seed, "eos_token": [3, 5], "temperature": 1.5, "repetition_penalty": 1.1}
        with on_a_gpu(model, graphs=False), Watch(model) as watch:
            out = model.generate(prompts, 70, **options)
        assert torch.equal(out, model.generate(prompts, 70, **options))
        assert len(set(watch.rows)) > 1, "places were dropped"


@pytest.mark.parametrize("shape", ["llama", "alibi"])
def test_a_text_that_went_astray_leaves_nothing_to_the_next_in_its_place(shape):
    """An overflow stays in its own row."""
    model = tiny_ar(**SHAPES[shape])
    with torch.no_grad():
        model.net.token_emb.weight[16] = float("nan")
    astray, good = [torch.tensor([16] * 12)] * 2, [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([7])]
    for copies, gpu in ((1, False), (1, True), (2, False), (2, True)):
        keys = torch.cat((torch.zeros(2, dtype=torch.long), torch.arange(3)))
        with on_a_gpu(model) if gpu else nullcontext():
            out = model.generate(astray + good, 6, seed=keys, num_samples=copies, batch_size=2 * copies, bad_words=[[16]])
        alone = model.generate(good, 6, seed=torch.arange(3), num_samples=copies, bad_words=[[16]])
        assert torch.equal(out[2:], alone)


def test_empty_places_are_dropped():
    model = sharp()
    prompts = [ids(1, 4, seed=i)[0] for i in range(16)]
    options = {"temperature": 1.5, "eos_token": [3, 5]}
    with Watch(model) as watch:
        out = model.generate(prompts, 60, seed=0, num_samples=2, return_logprobs=True, **options)
    check_by_hand(model, prompts, 60, out, 0, 2, **options)
    lengths = sorted((out[1] != 0).sum(-1).amax(1).tolist())
    assert watch.rows[0] == 32 and min(watch.rows) < 8
    for step, rows in enumerate(watch.rows):
        living = sum(n > step for n in lengths)
        assert living <= rows // 2 <= max(1, 2 * living - 1), "fewer than half of the places are empty"


@pytest.mark.parametrize("window", [12, 64])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("shape", ["llama", "window"])
def test_the_cache_never_holds_more_than_it_may(shape, copies, window):
    """Also once windows move and copies hold theirs apart."""
    model = model_of(shape, window)
    prompts = [ids(1, n, seed=n)[0] for n in (3, 12, 1, 30, 2, 9, 14, 5)]
    need = max(decoding.room(len(p), 10, copies, window) for p in prompts)
    for cache in (need, 3 * need + 5):
        with Watch(model) as watch:
            out = model.generate(prompts, 10, seed=2, num_samples=copies, eos_token=3, cache_tokens=cache, return_logprobs=True)
        assert max(watch.cells) <= cache
        check_by_hand(model, prompts, 10, out, 2, copies, eos_token=3)
    with pytest.raises(ConfigError, match=rf"cache_tokens is {need - 1}, allowed is at least what prompt \d needs, {need}"):
        model.generate(prompts, 10, num_samples=copies, cache_tokens=need - 1)


@pytest.mark.parametrize("name", ["batch_size", "cache_tokens"])
def test_bad_bounds_are_told(name):
    for bad in (0, -1, 1.5, True, float("nan")):
        with pytest.raises(ValueError, match=f"{name} is .*allowed is a whole number >= 1"):
            tiny_ar().generate(ids(2, 3), 2, **{name: bad})
    with pytest.raises(TypeError, match=f"stream takes no {name}"):
        next(tiny_ar().stream(ids(2, 3), 2, **{name: 2}))


def test_progress_adds_up():
    model = model_of()
    for options in ({}, {"batch_size": 2}, {"cache_tokens": 60}, {"eos_token": [3, 5, 7]}, {"num_samples": 3, "batch_size": 6},
                    {"eos_token": list(range(17))}, {"cache_kv": False}):
        told = []
        model.generate(LISTED, 9, seed=1, progress=told.append, **options)
        assert sum(told) == len(LISTED) and all(isinstance(n, int) and n > 0 for n in told)


def test_an_exception_leaves_the_model_as_it_was():
    model = tiny_ar().train()
    model.net.attn_layers.layers[1].eval()
    before, tokens = [m.training for m in model.modules()], ids(2, 4)
    alone = tiny_ar().generate(LISTED, 9, temperature=0)

    def fail(*_):
        assert left_behind(model) and not any(m.training for m in model.net.modules()), "in the middle of it"
        raise KeyboardInterrupt

    for broken in ({"progress": fail}, {"filter_logits_fn": fail}):
        with pytest.raises(KeyboardInterrupt):
            model.generate(LISTED, 9, batch_size=2, **broken)
        assert [m.training for m in model.modules()] == before and not left_behind(model)
        assert model.net(tokens).requires_grad
        assert torch.equal(model.generate(LISTED, 9, temperature=0), alone)


# ---- what all prompts begin with


def shared(n, tails, v=17):
    start = ids(1, n, v, seed=99)[0]
    return [torch.cat((start, ids(1, t, v, seed=i)[0])) if t else start for i, t in enumerate(tails)]


CASES = {"tails": (shared(30, (3, 9, 1)), 30), "equal": (shared(20, (0, 0, 0)), 19), "one in another": (shared(25, (0, 4)), 24),
         "just enough": (shared(COMMON, (1, 1)), COMMON), "one too few": (shared(COMMON - 1, (2, 2)), 0),
         "the last token is no part of it": (shared(COMMON, (0, 0)), 0),
         "nothing": ([ids(1, 30, seed=i)[0] for i in (1, 2)], 0),
         "alone": (shared(30, (5,)), 0), "beyond the window": ([torch.cat((p, ids(1, 40)[0])) for p in shared(30, (3, 9))], 0)}


@pytest.mark.parametrize("shape", ["llama", "alibi", "absolute"])
@pytest.mark.parametrize("case", CASES)
def test_a_common_beginning_runs_once(shape, case):
    prompts, n = CASES[case]
    if case not in ("alone", "one too few"):
        assert n == 0 or n >= COMMON
    model = model_of(shape, 48)
    for copies in (1, 2):
        options = {"seed": 3, "num_samples": copies, "return_logprobs": True, "eos_token": 3}
        with Watch(model) as watch:
            out = model.generate(prompts, 12, **options)
        with mock.patch.object(decoding, "COMMON", 10**9), Watch(model) as plain:
            again = model.generate(prompts, 12, **options)
        assert torch.equal(out[0], again[0])
        torch.testing.assert_close(out[1], again[1], atol=1e-5, rtol=1e-5)
        longest = max(len(p) for p in prompts) - 1
        if n:
            rest = [(len(prompts), longest - n)] if longest > n else []
            assert watch.passes[: 1 + len(rest)] == [(1, n), *rest]
        else:
            assert watch.passes == plain.passes
        check_by_hand(model, prompts, 12, out, 3, copies, eos_token=3)


def test_a_common_beginning_lasts_while_places_change_hands_and_windows_move():
    model = model_of("llama", 40)
    prompts = shared(20, (3, 9, 1, 14, 2, 7))
    for options in ({"batch_size": 2}, {"num_samples": 2, "batch_size": 4}, {"num_samples": 2, "cache_tokens": 250}):
        with Watch(model) as watch:
            out = model.generate(prompts, 30, seed=1, eos_token=[3, 5], return_logprobs=True, **options)
        assert (1, 20) in watch.passes
        check_by_hand(model, prompts, 30, out, 1, options.get("num_samples", 1), eos_token=[3, 5])
    assert torch.equal(model.beam_search(prompts, 30, beams=2), model.beam_search(prompts, 30, beams=2, cache_kv=False))


def test_a_prompts_pass_is_cut_into_pieces():
    model = model_of("llama", 64)
    prompts = [ids(1, n, seed=n)[0] for n in (30, 3, 17, 50, 9)]
    with mock.patch.object(decoding, "PREFILL", 40), Watch(model) as watch:
        out = model.generate(prompts, 5, temperature=0)
    assert watch.passes == [(1, 49), (1, 29), (2, 16), (1, 2)]
    assert torch.equal(out, model.generate(prompts, 5, temperature=0))


# ---- the step is static


def ready(model, prompts, steps, **options):
    """An engine before its first step, whose steps are static."""
    with no_short_draws():
        run = model._engine(prompts, steps, engine="compile", **options)
    with torch.no_grad():
        run.begin(*run.plan[0])
        run.admit()
        run.state.prepare(run.active)
    return run


ALL = FILTERS | PENALTIES | {"eos_token": [3, 5], "stop": [[7, 8], [1, 2, 3]], "return_logprobs": True}
STATIC = {"greedy": {"temperature": 0}, "everything": ALL, "copies": ALL | {"num_samples": 2},
          "tensors": {"temperature": torch.tensor([0.0, 1.0]), "top_p": torch.tensor(0.9), "top_k": torch.tensor([3, 9]),
                      "repetition_penalty": torch.tensor([1.0, 2.0]), "presence_penalty": torch.tensor([1.0, 0.5])}}


@EVERY
@pytest.mark.parametrize("options", STATIC.values(), ids=STATIC)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_a_step_reads_nothing_and_has_the_same_shapes_whatever_happens(shape, options, kind):
    """Without values at all, or on a device that isn't the host's."""
    run = ready(model_of(shape), LISTED[:2], 9, **options)
    state = step_without_values(run, kind).state
    assert state.text.shape == run.state.text.shape and state.text.device.type == ("meta" if kind == "meta" else "cpu")
    assert [k.shape for k in state.buffer.keys] == [k.shape for k in run.state.buffer.keys]


@pytest.mark.parametrize("plant", [lambda x: x * (1 + int(x.argmax() < 0)), lambda x: x if bool((x > -9e9).all()) else -x,
                                   lambda x: x[:, (x[0] > -9e9)], lambda x: x + torch.tensor([0.0] * 17),
                                   lambda x: x.index_fill(1, x[0].isnan().nonzero()[:, 0], 0.0), lambda x: x * x.max().item()])
def test_a_planted_read_is_caught(plant):
    model = model_of()
    for kind in ("fake", "meta"):
        with pytest.raises(RuntimeError, match="in a step"):
            step_without_values(ready(model, LISTED[:2], 9, filter_logits_fn=plant), kind)
    with on_a_gpu(model), pytest.raises(RuntimeError, match="in a step"):
        model.generate(LISTED, 9, filter_logits_fn=plant)
    with on_a_gpu(model, graphs=False):
        assert model.generate(LISTED, 9, filter_logits_fn=plant, seed=1).shape == (6, 9)


@EVERY
@pytest.mark.parametrize("copies", [1, 2])
def test_a_graph_is_replayed_for_all_steps(shape, copies):
    """Captured once, or once more when the copies part; everything on; draws differ from replay to replay."""
    model, prompts = model_of(shape, 16), LISTED[:4]
    for ends in (ENDS[2], {}):
        options = FILTERS | PENALTIES | ends
        with on_a_gpu(model) as graphs:
            out = model.generate(prompts, 8, num_samples=copies, seed=5, return_logprobs=True, **options)
        assert len(graphs) == 1
        check_by_hand(model, prompts, 8, out, 5, copies, **options)
    with on_a_gpu(model) as graphs:
        out = model.generate(prompts, 26, num_samples=copies, seed=5, return_logprobs=True, **options)
    assert len(graphs) == copies
    check_by_hand(model, prompts, 26, out, 5, copies, **options)


def test_replays_differ():
    model = model_of()
    with on_a_gpu(model) as graphs:
        texts = model.generate(ids(1, 3).expand(5, -1), 20, seed=1).tolist()
    assert min(len(set(row)) for row in texts) > 3 and len({tuple(row) for row in texts}) == 5
    with on_a_gpu(model) as graphs:
        assert torch.stack(list(model.stream(ids(1, 3).expand(5, -1), 20, seed=1)), -1).tolist() == texts
    assert len(graphs) == 1


def test_a_graph_takes_new_prompts():
    model = model_of("absolute", 16)
    prompts = [ids(1, n, seed=n)[0] for n in (3, 12, 1, 30, 2, 9, 14, 5, 5, 6)]
    with on_a_gpu(model) as graphs:
        out = model.generate(prompts, 30, batch_size=3, seed=4, **ALL)
    assert len(graphs) == 1
    check_by_hand(model, prompts, 30, out, 4, **text_options(ALL))


def test_engines_that_are_none():
    model = model_of()
    for options, message in (({"engine": "graph"}, "'eager', 'compile', and on CUDA 'graph'"),
                             ({"engine": "fast"}, "engine is 'fast'"),
                             ({"engine": "compile", "cache_kv": False}, "cache_kv is False")):
        with pytest.raises(ValueError, match=message):
            model.generate(LISTED, 3, **options)
    with on_a_gpu(model) as graphs:
        assert torch.equal(model.generate(LISTED, 9, seed=1, cache_kv=False), model.generate(LISTED, 9, seed=1))
    assert len(graphs) == 1, "without a cache there is no graph"


@pytest.mark.slow
def test_a_compiled_step_writes_the_same():
    """Half a minute of compiling; once for one set of shapes, however the numbers change."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    model, compiles = model_of("grouped", 12), []
    torch._dynamo.reset()
    options = {"temperature": 0.9, "repetition_penalty": 1.2, "eos_token": [3, 5], "return_logprobs": True}
    for seed in range(3):
        torch._dynamo.utils.counters.clear()
        out = model.generate(LISTED, 30, seed=seed, engine="compile", batch_size=3, **options)
        compiles.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        again = model.generate(LISTED, 30, seed=seed, batch_size=3, **options)
        assert torch.equal(out[0], again[0])
        torch.testing.assert_close(out[1], again[1], atol=1e-5, rtol=1e-5)
    assert compiles == [1, 0, 0]


# ---- types, modes, threads


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 0.15), (torch.float16, 0.05)])
@EVERY
def test_other_types(shape, dtype, tolerance):
    """Log-probabilities of its own text, with every cache in use."""
    model = model_of(shape, 24, dtype)
    prompts = shared(17, (1, 4, 2, 6))
    for copies in (1, 2):
        with Watch(model) as watch:
            tokens, logps = model.generate(prompts, 12, seed=1, num_samples=copies, batch_size=3 * copies, return_logprobs=True)
        assert watch.types == {torch.float64 if dtype == torch.float64 else torch.float32}
        assert logps.dtype == torch.float32
        for prompt, texts, values in zip(prompts, tokens.view(4, copies, -1), logps.view(4, copies, -1), strict=True):
            for text, value in zip(texts, values, strict=True):
                n = 24 - len(prompt)  # up to where the window moves
                whole = torch.cat((prompt, text))[None, :24]
                own = model.net(whole).float().log_softmax(-1)[0, len(prompt) - 1 : -1].gather(-1, text[:n, None])[:, 0]
                torch.testing.assert_close(value[:n], own, atol=tolerance, rtol=tolerance)


def test_autocast_around_it():
    model, prompts = model_of("grouped"), LISTED
    with torch.autocast("cpu", torch.bfloat16):
        tokens, logps = model.generate(prompts, 10, seed=1, num_samples=2, batch_size=6, return_logprobs=True)
        for prompt, texts, values in zip(prompts, tokens, logps, strict=True):
            for text, value in zip(texts, values, strict=True):
                own = model.net(torch.cat((prompt, text))[None]).float().log_softmax(-1)[0, len(prompt) - 1 : -1]
                torch.testing.assert_close(value, own.gather(-1, text[:, None])[:, 0], atol=0.1, rtol=0.1)
        assert torch.equal(torch.stack(list(model.stream(prompts, 10, seed=1)), -1), model.generate(prompts, 10, seed=1))
        model.beam_search(prompts, 5)
    assert not left_behind(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_is_whole_after_generating(dtype, tmp_path):
    """It trains, also when a text was written in the middle of a step or in inference mode; it is copied, saved and moved."""
    model, fresh, tokens = tiny_ar().to(dtype), tiny_ar().to(dtype), ids(2, 6)
    for wrapper in (model, fresh):
        loss = wrapper(tokens)
        if wrapper is model:
            with torch.inference_mode():
                model.generate(LISTED, 5, num_samples=2)
            model.generate(LISTED, 5)
            list(model.stream(LISTED, 3))
            model.beam_search(LISTED, 3)
        loss.backward()
        wrapper(ids(2, 6, seed=1)).backward()
        with torch.no_grad():
            torch.optim.AdamW(wrapper.parameters(), lr=0.1).step()
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
    written = fresh.generate(LISTED, 9, temperature=0)
    save_pretrained(model, tmp_path / "m")
    saved = AutoregressiveWrapper(load_pretrained(tmp_path / "m", dtype=dtype)[0])
    copied, moved = copy.deepcopy(model), copy.deepcopy(model).float().to(dtype)
    torch.save(model.state_dict(), tmp_path / "s.pt")
    loaded = tiny_ar(3).to(dtype)
    loaded.load_state_dict(torch.load(tmp_path / "s.pt"))
    for other in (model, saved, copied, loaded, *([moved] if dtype == torch.float32 else [])):
        assert torch.equal(other.generate(LISTED, 9, temperature=0), written)
    memory, other = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (model, copied))
    assert not memory & other
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(copied.generate(LISTED, 9, temperature=0), written)
    assert not torch.equal(model.generate(LISTED, 9, temperature=0), written)


def test_hooks_are_called_while_generating():
    model, seen = tiny_ar(), []
    attn = model.net.attn_layers.layers[0].attn
    hook = lambda layer, x, y: seen.append(layer) or y * 3  # noqa: E731
    handles = [layer.register_forward_hook(hook) for layer in (attn.to_q, attn.to_out)]
    out = model.generate(LISTED, 5, temperature=0, return_logprobs=True)
    assert {id(s) for s in seen} == {id(attn.to_q), id(attn.to_out)}
    check_by_hand(model, LISTED, 5, out, 0, temperature=0)
    for handle in handles:
        handle.remove()
    assert not torch.equal(out[0], model.generate(LISTED, 5, temperature=0))


def test_a_copy_made_meanwhile_is_a_model_of_its_own():
    model, copies = tiny_ar(), []
    model.generate(LISTED, 3, progress=lambda n: copies.append(copy.deepcopy(model)))
    assert not left_behind(copies[0])
    with torch.no_grad():
        copies[0].net.to_logits.weight.neg_()
    assert not torch.equal(copies[0].generate(LISTED, 3, temperature=0), model.generate(LISTED, 3, temperature=0))


def test_a_stream_sees_what_is_learnt_between_two_steps():
    texts = []
    for packed in (True, False):
        model = tiny_ar()
        with nullcontext() if packed else mock.patch("xalign.nn.linear._call", lambda layers: None):
            steps = []
            for step in model.stream(LISTED, 12, temperature=0):
                steps.append(step)
                model.zero_grad()
                model(ids(2, 6, seed=len(steps))).backward()
                torch.optim.SGD(model.parameters(), lr=0.5).step()
        texts.append(torch.stack(steps, -1))
    assert torch.equal(*texts)


def test_a_reader_may_generate_and_train_between_two_steps():
    """Modes and gradients are the reader's; a text within a text changes neither."""
    model = tiny_ar().train()
    expected = model.generate(LISTED, 8, seed=2)
    steps = []
    for step in model.stream(LISTED, 8, seed=2):
        assert model.net.training and torch.is_grad_enabled() and not left_behind(model)
        model.generate(LISTED, 2)
        model(ids(2, 4)).backward()
        steps.append(step)
    assert torch.equal(torch.stack(steps, -1), expected)
    two = [model.stream(LISTED, 8, seed=s) for s in (2, 3)]
    pairs = list(zip(*two, strict=True))
    assert torch.equal(torch.stack([a for a, _ in pairs], -1), expected)
    assert torch.equal(torch.stack([b for _, b in pairs], -1), model.generate(LISTED, 8, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_share_a_model(dtype):
    model = tiny_ar().to(dtype)
    expected = [model.generate(LISTED, 25, seed=s, batch_size=3, eos_token=3) for s in range(4)]
    out, errors = {}, []

    def work(s):
        try:
            for _ in range(2):
                out[s] = model.generate(LISTED, 25, seed=s, batch_size=3, eos_token=3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(torch.equal(out[s], expected[s]) for s in range(4)) and not left_behind(model)


# ---- odd prompts and models


def test_prompts_of_every_kind():
    model, plain = model_of(), ids(3, 6)
    expected = model.generate(plain, 7, seed=1)
    strided = torch.stack((plain, plain + 1), -1)[..., 0]
    turned = plain.T.contiguous().T
    assert not strided.is_contiguous() and not turned.is_contiguous()

    class Own(torch.Tensor):
        pass

    kinds = [strided, turned, plain.int(), plain.to(torch.uint8), torch.nn.Parameter(plain, requires_grad=False),
             plain.as_subclass(Own), list(plain), list(plain.int()), [p.tolist() for p in plain], tuple(plain)]
    for prompts in kinds:
        out = model.generate(prompts, 7, seed=1)
        assert torch.equal(out, expected) and not out.requires_grad
    assert torch.equal(model.generate(plain.int(), 7, seed=1, prompt_lens=torch.tensor([6, 6, 6])), expected)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("copies", [1, 2])
@EVERY
def test_the_smallest_windows(shape, copies, window):
    model = model_of(shape, window)
    out = model.generate(LISTED, 7, seed=1, num_samples=copies, return_logprobs=True, batch_size=2 * copies, eos_token=3)
    check_by_hand(model, LISTED, 7, out, 1, copies, eos_token=3)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_single_tokens(copies):
    """A far cache of which nothing is in use."""
    model = model_of()
    prompts = [torch.tensor([i]) for i in range(4)]
    out = model.generate(prompts, 6, seed=1, num_samples=copies, return_logprobs=True)
    check_by_hand(model, prompts, 6, out, 1, copies)
    assert torch.equal(model.beam_search(prompts, 6, beams=copies), model.beam_search(prompts, 6, beams=copies, cache_kv=False))


def test_few_words_and_few_steps():
    one = tiny_ar(num_tokens=1)
    assert not one.generate(torch.zeros(2, 3, dtype=torch.long), 4, num_samples=2, **FILTERS).any()
    tokens, logps = one.generate(torch.zeros(2, 3, dtype=torch.long), 4, eos_token=0, return_logprobs=True)
    assert tokens.tolist() == [[0], [0]] and not logps.any()
    two = tiny_ar(num_tokens=2)
    prompts = [ids(1, n, 2, seed=n)[0] for n in (4, 1, 20)]
    out = two.generate(prompts, 9, seed=1, return_logprobs=True, batch_size=2, **FILTERS)
    check_by_hand(two, prompts, 9, out, 1, **FILTERS)
    model = model_of()
    for steps in (0, 1):
        for options in ({}, {"num_samples": 2}, {"batch_size": 2}, {"eos_token": 3}, {"cache_tokens": 40}):
            out = model.generate(LISTED, steps, seed=1, return_logprobs=True, **options)
            assert out[0].shape == (6, *([2] if "num_samples" in options else []), steps)
            check_by_hand(model, LISTED, steps, out, 1, options.get("num_samples", 1), **text_options(options))


# ---- memory


def test_a_buffer_is_as_large_as_it_says():
    buffer = DecodeBuffer(3, 8, 2, 5, 4, torch.float32, torch.device("cpu"), groups=2, far=7)
    assert {tuple(t.shape) for t in (*buffer.keys, *buffer.values)} == {(8, 2, 5, 4)} and len(buffer.keys) == 3
    assert {tuple(t.shape) for t in (*buffer.far_keys, *buffer.far_values)} == {(2, 2, 7, 4)}


def test_samples_hold_a_long_prompt_once():
    model = sharp(window=1024)
    prompts = [ids(1, 600, seed=i)[0] for i in range(2)]
    sizes = {}
    for copies in (1, 8):
        with Watch(model) as watch:
            model.generate(prompts, 8, num_samples=copies)
        (sizes[copies],) = watch.bytes
        assert sum(rows for rows, _ in watch.passes) == 2
    token = 2 * 2 * 8 * 4  # bytes: keys and values of two heads of 8 in one layer, fp32
    assert sizes == {1: 2 * (600 + 8) * token, 8: 2 * (600 + 8 * (8 + 1)) * token}
    with Watch(model) as watch:
        model.beam_search(prompts, 8, beams=8)
    assert watch.bytes == [sizes[8]]


def test_nothing_of_a_generation_is_kept():
    """Caches go when it ends, and don't wait for a garbage collector, which knows nothing of memory on a GPU."""
    model = tiny_ar()
    gc.disable()
    try:
        with Watch(model) as watch:
            model.generate(LISTED, 6)
            model.generate(LISTED, 40, num_samples=2, batch_size=4)
            list(model.stream(LISTED, 5))
            next(model.stream(LISTED, 5))
            model.beam_search(LISTED, 40)
            with pytest.raises(ZeroDivisionError):
                model.generate(LISTED, 6, progress=lambda n: n / 0)
        assert len(watch.buffers) >= 8 and not any(ref() for ref in watch.buffers)
    finally:
        gc.enable()


# ---- text in, text out


@functools.cache
def backend_model(window=64):
    return tiny(**LLAMA, num_tokens=300, max_seq_len=window, sharp=3.0)


TEXT = ["x", "a longer prompt than the others", "", "x", "🦊", "middle", "a longer prompt than that"]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 3}, {"beams": 3},
                                     {"seed": 3, "n": 3, "top_k": 20, "repetition_penalty": 1.2},
                                     {"seed": 2, "min_new_tokens": 4, "presence_penalty": 0.5}])
@pytest.mark.parametrize("window", [16, 64])
def test_bounds_change_no_completion(options, window):
    params = SamplingParams(max_new_tokens=12, **options)
    model, tokenizer = backend_model(window), ByteTokenizer()
    told = []
    for batch, cache in ((64, None), (1, None), (4, 300), (3, 10**6), (64, 150)):
        backend = NativeBackend(model, tokenizer, batch, cache)
        told.append([[(c.text, c.token_ids, c.finish_reason) for c in row] for row in backend.generate(TEXT, params)])
    assert all(other == told[0] for other in told[1:])
    assert [len(row) for row in told[0]] == [params.n] * len(TEXT)
    alone = NativeBackend(model, tokenizer).generate(TEXT[:1], params)
    assert [c.token_ids for c in alone[0]] == [c[1] for c in told[0][0]]


def test_prompts_with_stops_of_their_own():
    """Each group ends by its own; the draws know a prompt's index alone."""
    tokenizer, model = ByteTokenizer(), backend_model()
    backend = NativeBackend(model, tokenizer, batch_size=2)
    params = SamplingParams(max_new_tokens=40, seed=3, n=2)

    def rendered(_, text, template=None):
        return mock.Mock(ids=[1 + len(text), 7], stops={len(text) % 3, 250 + len(text) % 2})

    with mock.patch("xalign.backends.native.render_prompt", rendered):
        together = backend.generate(TEXT, params)
        wrapper = AutoregressiveWrapper(model, pad_value=tokenizer.pad_id)
        for i, text in enumerate(TEXT):
            one = rendered(None, text)
            keys = sampling.row_keys(3, len(TEXT))[i : i + 1]
            own = wrapper.generate([torch.tensor(one.ids)], 40, seed=keys, num_samples=2, eos_token=sorted(one.stops))[0]
            for completion, row in zip(together[i], own.tolist(), strict=True):
                end = next((j for j, t in enumerate(row) if t in one.stops), len(row) - 1)
                assert list(completion.token_ids) == row[: end + 1]
                assert completion.finish_reason == ("stop" if row[end] in one.stops else "length")
    assert len({c.finish_reason for row in together for c in row}) == 2


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"beams": 2}])
def test_the_bar_counts_prompts(options, capsys):
    params = SamplingParams(max_new_tokens=4, **options)
    NativeBackend(backend_model(), ByteTokenizer(), batch_size=6).generate(TEXT, params, "told")
    assert "told: 100%" in (err := capsys.readouterr().err) and f"{len(TEXT)}/{len(TEXT)}" in err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "model"
    save_pretrained(tiny(**LLAMA, num_tokens=300, max_seq_len=4096), path, ByteTokenizer())
    return path


@pytest.mark.parametrize("more", [[], ["-n", 3], ["--beams", 2]])
def test_a_cache_that_is_too_small_is_one_line(folder, more, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in ["--model", folder, "-p", "a prompt", "--json", "--cache-tokens", 20, *more]], "generate")
    out, err = capsys.readouterr()
    told = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and out == "" and "Traceback" not in err
    assert len(told) == 1 and "cache_tokens is 20, allowed is at least what prompt 0 needs" in told[0]


def test_an_interrupt_is_one_line(folder, tmp_path):
    (tmp_path / "p.txt").write_text("hello\n" * 50)
    command = [sys.executable, ROOT / "generate.py", "--model", folder, "--prompts", tmp_path / "p.txt", "--batch-size", "2",
               "--max-new-tokens", "3000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        assert process.stderr.read(9).strip().startswith("generate")
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in rest and rest.rstrip().endswith("stopped"), rest
