"""Generation: sampling, stopping, streaming and beam search, each against its definition and against transformers."""

import itertools
import math

import pytest
import torch
from conftest import LLAMA, ids, llama, tiny, tiny_ar
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from xalign import AutoregressiveWrapper, sampling
from xalign.nn.decoding import window_start

SHAPES = {"llama": {}, "grouped": {"attn_kv_heads": 2}, "alibi": {"rotary_pos_emb": False, "alibi_pos_bias": True},
          "absolute": {"rotary_pos_emb": False}, "qk norm": {"attn_qk_norm": True}, "window": {"attn_sliding_window": 4}}
EVERY = pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
LISTED = [ids(1, n, seed=n)[0] for n in (3, 7, 1, 5)]


class Fixed(nn.Module):
    """A stand-in for the network: after token t comes `logits[t]`, whatever came before."""

    def __init__(self, logits, max_seq_len=64):
        super().__init__()
        self.token_emb = nn.Embedding.from_pretrained(logits, freeze=False)
        self.num_tokens, self.max_seq_len = logits.shape[-1], max_seq_len

    def forward(self, tokens, mask=None, *, cache=None, input_not_include_cache=False, return_intermediates=False,
                return_embeddings=False):
        return self.token_emb(tokens)

    def logits(self, hidden):
        return hidden


def chain(successors, v=6, **options):
    """A model that always writes `successors[t]` after t."""
    logits = torch.full((v, v), -50.0)
    for a, b in successors.items():
        logits[a, b] = 50.0
    return AutoregressiveWrapper(Fixed(logits), **options)


# ---- by hand

def test_eos_is_kept_then_pads_and_the_width_is_the_longest_row():
    model = chain({0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 0}, pad_value=5)
    prompts = torch.tensor([[0, 1], [0, 2], [0, 0]])
    out = model.generate(prompts, 10, eos_token=4, cache_kv=False)
    assert out.tolist() == [[2, 3, 4, 5], [3, 4, 5, 5], [1, 2, 3, 4]]
    assert model.generate(prompts, 2, eos_token=4, cache_kv=False).tolist() == [[2, 3], [3, 4], [1, 2]]
    assert model.generate(prompts, 10, eos_token=[4, 3], cache_kv=False).tolist() == [[2, 3, 5], [3, 5, 5], [1, 2, 3]]


def test_an_eos_in_the_prompt_ends_nothing():
    """trap 8: x-transformers stops at an EOS inside the prompt."""
    model = chain({0: 1, 1: 2, 2: 3, 3: 4, 4: 0, 5: 0})
    for row in ([4, 0], [0, 4], [4, 4]):
        out = model.generate(torch.tensor([row]), 6, eos_token=4, cache_kv=False)
        assert out.tolist() == ([[1, 2, 3, 4]] if row[-1] == 0 else [[0, 1, 2, 3, 4]])


def test_pad_equal_to_eos_blanks_nothing():
    """trap 8: in x-transformers pad == eos blanks shorter rows."""
    model = chain({0: 1, 1: 2, 2: 3, 3: 4, 4: 0, 5: 0}, pad_value=4)
    prompts = [torch.tensor([2]), torch.tensor([4, 4, 4, 0]), torch.tensor([4])]
    out = model.generate(prompts, 9, eos_token=4, cache_kv=False)
    assert out.tolist() == [[3, 4, 4, 4, 4], [1, 2, 3, 4, 4], [0, 1, 2, 3, 4]]


def test_stop_sequences_end_a_row_and_are_kept():
    model = chain({0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 0}, pad_value=0)
    prompts = torch.tensor([[0], [2], [3]])
    out = model.generate(prompts, 5, stop=[[3, 4]], cache_kv=False)
    assert out.tolist() == [[1, 2, 3, 4, 0], [3, 4, 0, 0, 0], [4, 5, 0, 1, 2]]
    # one that begins in the prompt is none
    assert model.generate(torch.tensor([2, 3]), 3, stop=[[3, 4]], cache_kv=False).tolist() == [4, 5, 0]
    assert model.generate(prompts, 9, stop=[[3, 4], [5]], eos_token=1, cache_kv=False).tolist() == [[1, 0], [3, 4], [4, 5]]


def test_no_tokens_asked_for():
    """trap 9: seq_len=0 crashes x-transformers."""
    model = tiny_ar()
    assert model.generate(ids(3, 4), 0).shape == (3, 0)
    assert model.generate(ids(3, 4)[0], 0).shape == (0,)
    assert model.generate(LISTED, 0, num_samples=2).shape == (4, 2, 0)
    tokens, logps = model.generate(ids(3, 4), 0, return_logprobs=True)
    assert tokens.shape == logps.shape == (3, 0) and tokens.dtype == torch.long
    assert list(model.stream(ids(3, 4), 0)) == []
    assert model.beam_search(ids(3, 4), 0).shape == (3, 0)
    beams, scores = model.beam_search(ids(3, 4), 0, beams=2, return_beams_and_scores=True)
    assert beams.shape == (2, 3, 0) and scores.shape == (2, 3)


EMPTY = {"no columns": torch.zeros(2, 0).long(), "nothing": torch.zeros(0).long(), "no list": [],
         "one of a list": [torch.tensor([1]), torch.zeros(0).long()], "no rows": torch.zeros(0, 3).long(),
         "3-D": torch.zeros(1, 2, 3).long(), "0-D": torch.tensor(3)}


@pytest.mark.parametrize("prompts", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("method", ["generate", "beam_search"])
def test_an_empty_prompt_is_told(prompts, method):
    """trap 9: an empty prompt crashes x-transformers obscurely."""
    with pytest.raises(ValueError, match=r"prompt.*allowed is"):
        getattr(tiny_ar(), method)(prompts, 3)


def test_shapes():
    model = tiny_ar()
    assert model.generate(ids(3, 4), 5).shape == (3, 5)
    assert model.generate(ids(3, 4)[0], 5).shape == (5,)
    assert model.generate(LISTED, 5).shape == (4, 5)
    assert model.generate(ids(3, 4), 5, num_samples=2).shape == (3, 2, 5)
    assert model.generate(ids(3, 4)[0], 5, num_samples=2).shape == (2, 5)
    assert model.generate(LISTED[:1], 5).shape == (1, 5)
    assert model.generate(LISTED[:1], 5, beams=2).shape == (1, 5)
    tokens, logps = model.generate(ids(3, 4), 5, num_samples=2, return_logprobs=True)
    assert tokens.shape == logps.shape == (3, 2, 5)


# ---- equalities

@EVERY
def test_cached_equals_uncached_also_past_the_window(options):
    """trap 16, trap 10: rows of unequal length slide past max_seq_len, cached or not."""
    model = tiny_ar(max_seq_len=10, **options)
    for kwargs in ({"temperature": 0}, {"seed": 3}, {"seed": 5, "num_samples": 2, "top_p": 0.8}, {"beams": 3}):
        args = {"eos_token": 4} | kwargs
        assert torch.equal(model.generate(LISTED, 24, **args), model.generate(LISTED, 24, cache_kv=False, **args))


@EVERY
def test_a_row_does_not_depend_on_its_mates(options):
    """trap 10: batch == single past max_seq_len, absolute positions included."""
    model = tiny_ar(max_seq_len=10, **options)
    seeds = torch.tensor([5, 6, 7, 8])
    for kwargs in ({"temperature": 0}, {"seed": seeds}):
        together = model.generate(LISTED, 24, **kwargs)
        for i, prompt in enumerate(LISTED):
            own = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            assert torch.equal(model.generate(prompt, 24, **own), together[i])
            assert torch.equal(model.generate([prompt], 24, **own)[0], together[i])
    beams, scores = model.beam_search(LISTED, 14, beams=3, eos_token=4, return_beams_and_scores=True)
    for i, prompt in enumerate(LISTED):
        own, own_scores = model.beam_search(prompt, 14, beams=3, eos_token=4, return_beams_and_scores=True)
        assert torch.equal(own, beams[:, i, : own.shape[-1]]) and not beams[:, i, own.shape[-1] :].any()
        torch.testing.assert_close(own_scores, scores[:, i])


@EVERY
def test_going_on_from_a_partial_text_gives_the_same_text(options):
    """At any point, also past the window; draws are keyed by position."""
    model = tiny_ar(max_seq_len=10, **options)
    for kwargs in ({"temperature": 0}, {"seed": 11}, {"seed": 3, "top_k": 5, "repetition_penalty": 1.4}):
        whole = model.generate(ids(2, 4), 20, **kwargs)
        for cut in (1, 5, 6, 7, 13, 19):
            rest = model.generate(torch.cat((ids(2, 4), whole[:, :cut]), 1), 20 - cut, **kwargs)
            assert torch.equal(rest, whole[:, cut:])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 33])
def test_window_rule(size):
    """A full window is cut to its newest half; the rule looks at the length alone."""
    for n in range(1, 200):
        start = window_start(n, size)
        assert 0 < n - start <= size and (start == 0 if n <= size else n - start >= max(1, size // 2))
        if n > size and start != window_start(n - 1, size):
            assert n - start == max(1, size // 2) and n - 1 - window_start(n - 1, size) == size


def test_past_the_window_the_model_sees_the_newest_half():
    """trap 10: the rule, by hand."""
    model, text = tiny_ar(max_seq_len=8), ids(1, 6)
    for _ in range(16):
        n = text.shape[1]
        start = window_start(n, 8)
        nxt = model.net(text[:, start:])[:, -1].argmax(-1, keepdim=True)
        text = torch.cat((text, nxt), 1)
    assert torch.equal(model.generate(ids(1, 6), 16, temperature=0), text[:, 6:])
    assert torch.equal(model.generate(text[:, :17], 5, temperature=0), text[:, 17:22])  # a prompt beyond the window


def test_prompt_lens_and_lists_are_the_same():
    model = tiny_ar()
    width = max(map(len, LISTED))
    padded = torch.stack([torch.cat((p, torch.full((width - len(p),), 9))) for p in LISTED])
    expected = model.generate(LISTED, 8, seed=1)
    for lens in (torch.tensor([3, 7, 1, 5]), [3, 7, 1, 5]):
        assert torch.equal(model.generate(padded, 8, prompt_lens=lens, seed=1), expected)
    assert torch.equal(model.beam_search(padded, 8, prompt_lens=[3, 7, 1, 5]), model.beam_search(LISTED, 8))
    for bad in ([3, 7, 1], [3, 8, 1, 5], [3, 7, -1, 5], [3, 7, 0, 5]):
        with pytest.raises(ValueError, match="allowed is"):
            model.generate(padded, 8, prompt_lens=bad)
    with pytest.raises(ValueError, match="list of prompts"):
        model.generate(LISTED, 8, prompt_lens=[3, 7, 1, 5])


def test_seeds():
    model, prompts = tiny_ar(), ids(1, 4).expand(6, -1)
    a = model.generate(prompts, 12, seed=1)
    assert torch.equal(a, model.generate(prompts, 12, seed=1)) and not torch.equal(a, model.generate(prompts, 12, seed=2))
    assert len({tuple(r) for r in a.tolist()}) == 6  # equal prompts, different rows
    own = model.generate(prompts, 12, seed=torch.tensor([4, 4, 5, 5, 6, 4]))
    assert len({tuple(r) for r in own.tolist()}) == 3
    gen = [model.generate(prompts, 12, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(gen[0], gen[1]) and not torch.equal(gen[0], gen[2])
    g = torch.Generator().manual_seed(0)
    assert not torch.equal(model.generate(prompts, 12, generator=g), model.generate(prompts, 12, generator=g))
    torch.manual_seed(3)
    free = model.generate(prompts, 12)
    assert not torch.equal(free, model.generate(prompts, 12))
    torch.manual_seed(3)
    assert torch.equal(free, model.generate(prompts, 12))
    with pytest.raises(ValueError, match="seed and generator"):
        model.generate(prompts, 3, seed=1, generator=g)
    with pytest.raises(ValueError, match="seed has shape"):
        model.generate(prompts, 3, seed=torch.tensor([1, 2]))


def test_samples_of_a_prompt_differ_and_more_of_them_change_none():
    model, prompts = tiny_ar(), ids(3, 4)
    two, five = (model.generate(prompts, 12, seed=1, num_samples=s) for s in (2, 5))
    assert torch.equal(five[:, :2], two)
    assert len({tuple(r) for r in five.flatten(0, 1).tolist()}) == 15
    assert torch.equal(five[:, 0], model.generate(prompts, 12, seed=1))


def test_parameters_a_row():
    """trap 12: per-row temperature, top-k, top-p, min-p."""
    model, prompts, seeds = tiny_ar(), ids(4, 4), torch.arange(4)
    values = {"temperature": [0.0, 0.5, 1.0, 2.0], "top_k": [1, 2, 5, 17], "top_p": [0.0, 0.5, 0.9, 1.0],
              "min_p": [0.0, 0.1, 0.5, 1.0], "repetition_penalty": [1.0, 1.3, 2.0, 0.7]}
    together = model.generate(prompts, 10, seed=seeds, num_samples=2, **{k: torch.tensor(v) for k, v in values.items()})
    for i in range(4):
        alone = model.generate(prompts[i], 10, seed=seeds[i : i + 1], num_samples=2, **{k: v[i] for k, v in values.items()})
        assert torch.equal(alone, together[i])
    greedy = model.generate(prompts, 10, temperature=torch.tensor(0.0), seed=9)
    assert torch.equal(greedy, model.generate(prompts, 10, temperature=0))
    with pytest.raises(ValueError, match=r"top_p has shape \(3,\), allowed is a number or \(4,\)"):
        model.generate(prompts, 3, top_p=torch.ones(3))


def test_order_of_the_filters():
    """Repetition penalty, temperature, top-k, top-p, min-p, then the given filters, on fp32 logits."""
    model, prompt = tiny_ar(), ids(1, 6)
    seen = []

    def last(logits, scale):
        seen.append(logits.clone())
        return logits * scale

    out = model.generate(prompt, 4, seed=0, repetition_penalty=1.5, temperature=0.7, top_k=9, top_p=0.9, min_p=0.05,
                         filter_logits_fn=[last, "top_k"], filter_kwargs=[{"scale": 2.0}, {"k": 3}])
    text = prompt
    for t in range(4):
        x = model.net(text)[:, -1]
        x = sampling.temperature(sampling.repetition_penalty(x, text, 1.5), 0.7)
        x = sampling.min_p(sampling.top_p(sampling.top_k(x, k=9), 0.9), 0.05)
        torch.testing.assert_close(seen[t], x, atol=1e-4, rtol=1e-4)
        x = sampling.top_k(x * 2, k=3) + sampling.gumbel(sampling.row_keys(0, 1), torch.tensor([6 + t]), 17)
        assert torch.equal(x.argmax(-1), out[:, t])
        text = torch.cat((text, out[:, t : t + 1]), 1)


def test_filters_see_fp32_logits_of_a_bf16_model():
    model, dtypes = tiny_ar().bfloat16(), []
    model.generate(ids(2, 3), 2, filter_logits_fn=lambda x: dtypes.append(x.dtype) or x)
    assert dtypes == [torch.float32] * 2


def test_the_repetition_penalty_does_not_see_the_padding():
    model = tiny_ar()
    together = model.generate(LISTED, 8, temperature=0, repetition_penalty=3.0)
    for prompt, row in zip(LISTED, together, strict=True):
        assert torch.equal(model.generate(prompt, 8, temperature=0, repetition_penalty=3.0), row)


@pytest.mark.parametrize("shape", ["llama", "absolute"])
def test_logprobs_are_the_models_own(shape):
    """Of the sampled tokens under the unfiltered model at temperature 1; 0 behind the end."""
    model = tiny_ar(pad_value=2, **SHAPES[shape])
    tokens, logps = model.generate(LISTED, 12, seed=2, eos_token=[3, 5], temperature=0.6, top_k=4, repetition_penalty=1.2,
                                   num_samples=3, return_logprobs=True)
    assert torch.equal(tokens, model.generate(LISTED, 12, seed=2, eos_token=[3, 5], temperature=0.6, top_k=4,
                                              repetition_penalty=1.2, num_samples=3))
    assert logps.dtype == torch.float32
    for prompt, rows, values in zip(LISTED, tokens, logps, strict=True):
        for row, value in zip(rows, values, strict=True):
            ends = (torch.isin(row, torch.tensor([3, 5]))).nonzero()
            n = int(ends[0]) + 1 if len(ends) else 12
            text = torch.cat((prompt, row[:n]))[None]
            own = model.net(text).log_softmax(-1)[0, len(prompt) - 1 : -1].gather(-1, row[:n, None])[:, 0]
            torch.testing.assert_close(value[:n], own, atol=1e-5, rtol=1e-5)
            assert not value[n:].any() and (row[n:] == 2).all()


def test_stream_stacked_is_generate():
    model = tiny_ar(pad_value=2, max_seq_len=10)
    one = ids(1, 4)[0]
    for prompts, extra in ((LISTED, {}), (ids(3, 4), {"num_samples": 2}), (one, {}), (one, {"num_samples": 3})):
        options = {"eos_token": [3, 5], "seed": 4, "top_p": 0.9, "temperature": 1.3, "stop": [[7, 8]]} | extra
        steps = list(model.stream(prompts, 20, **options))
        assert torch.equal(torch.stack(steps, -1), model.generate(prompts, 20, **options))
    first = next(iter(model.stream(ids(3, 4), 5)))
    assert first.shape == (3,)


# ---- modes and care

def test_mode_is_restored_for_every_submodule_also_after_an_exception():
    """trap 15."""
    model = tiny_ar().train()
    model.net.attn_layers.layers[1].eval()  # a frozen part

    def broken(_):
        raise KeyError("broken")

    before = [m.training for m in model.modules()]
    assert True in before and False in before
    inside = []

    def spy(x):
        inside.append(any(m.training for m in model.net.modules()))
        return x

    model.generate(ids(2, 3), 3, filter_logits_fn=spy)
    model.beam_search(ids(2, 3), 3)
    assert not any(inside) and [m.training for m in model.modules()] == before
    with pytest.raises(KeyError):
        model.generate(ids(2, 3), 3, filter_logits_fn=broken)
    with pytest.raises(ValueError):
        model.generate(torch.tensor([[99]]), 3)
    with pytest.raises(ValueError):
        model.beam_search(torch.tensor([[99]]), 3)
    assert [m.training for m in model.modules()] == before
    stream = model.stream(ids(2, 3), 3, filter_logits_fn=spy)
    for _ in stream:
        assert [m.training for m in model.modules()] == before
    assert not any(inside)
    with pytest.raises(KeyError):
        list(model.stream(ids(2, 3), 3, filter_logits_fn=broken))
    assert [m.training for m in model.modules()] == before


def test_no_gradients_and_inputs_untouched():
    model, prompts = tiny_ar(), ids(2, 3)
    before = prompts.clone()
    tokens, logps = model.generate(prompts, 4, return_logprobs=True)
    assert not tokens.requires_grad and not logps.requires_grad and torch.equal(prompts, before)
    for step in model.stream(prompts, 2):
        assert torch.is_grad_enabled() and not step.requires_grad


def test_a_cached_step_runs_one_token_in_place_and_copies_no_cache():
    """trap 14, trap 17: no growth by cat, no whole sequence a step; beams copy only what is theirs."""
    model, prompts, where = tiny_ar(), [], []
    forward, step = model.net.forward, model.net.step

    def spy(tokens, **kwargs):
        prompts.append(tuple(tokens.shape))
        return forward(tokens, **kwargs)

    def spy_step(tokens, buffer, live=None):
        where.append((len(tokens), *(t.data_ptr() for t in (*buffer.keys, *buffer.values, *buffer.far_keys))))
        return step(tokens, buffer, live)

    model.net.forward, model.net.step = spy, spy_step
    model.generate(ids(2, 6), 8)
    assert prompts == [(2, 5)] and len(where) == 8 and len(set(where)) == 1 and where[0][0] == 2
    for several in (lambda: model.beam_search(ids(2, 6), 8, beams=3), lambda: model.generate(ids(2, 6), 8, num_samples=3)):
        prompts.clear(), where.clear()
        several()
        assert prompts == [(2, 5)], "each prompt runs once"
        assert len(where) == 8 and len(set(where)) == 1 and where[0][0] == 6


@EVERY
@pytest.mark.parametrize("static", [False, True])
def test_rows_that_share_a_prompt_see_what_each_would_alone(options, static):
    model, v = tiny(**(LLAMA | options)), 17
    prompts, lengths, own = ids(2, 9, v), torch.tensor([9, 5]), ids(6, 5, v, seed=1)
    with torch.no_grad():
        buffer = model.decode_buffer(6, 5, groups=2, far=10, static=static)
        for t in (*buffer.far_keys, *buffer.keys):
            t.fill_(1e4)
        buffer.fill(torch.tensor([0, 1]), model(prompts, return_intermediates=True)[1], lengths)
        out = torch.stack([model.step(own[:, i], buffer) for i in range(3)], 1)
        order = torch.tensor([2, 2, 0, 3, 5, 4])
        held = [(t, t.clone()) for t in (*buffer.far_keys, *buffer.far_values)]
        buffer.reorder(order)
        for kept, copy in held:
            assert torch.equal(kept, copy), "trap 17: the shared prompt is not copied at each step of a beam search"
        out = torch.cat((out[order], model.step(own[:, 3], buffer)[:, None]), 1)
        texts = torch.cat((own[order, :3], own[:, 3:4]), 1)
        for i in range(6):
            whole = torch.cat((prompts[i // 3, : lengths[i // 3]], texts[i]))[None]
            torch.testing.assert_close(out[i], model(whole)[0, -4:], atol=1e-5, rtol=1e-5)
        # a prompt that takes a place anew
        buffer.fill(torch.tensor([1]), model(prompts[:1], return_intermediates=True)[1], lengths[:1])
        buffer.even = False
        out = model.step(own[:, 0], buffer)
        for i in (3, 4, 5):
            alone = model(torch.cat((prompts[0], own[i, :1]))[None])[0, -1]
            torch.testing.assert_close(out[i], alone, atol=1e-5, rtol=1e-5)


# ---- the distribution

@torch.no_grad()
def test_generated_text_has_the_models_distribution():
    """Two tokens jointly, over 20k samples of one prompt."""
    model = tiny_ar(num_tokens=6, sharp=3.0)
    out = model.generate(torch.tensor([2, 1]), 2, num_samples=20_000, seed=0, temperature=1.4, top_k=5)
    joint = torch.zeros(6, 6, dtype=torch.double)
    first = sampling.top_k(sampling.temperature(model.net(torch.tensor([[2, 1]]))[0, -1], 1.4), k=5).softmax(-1)
    for a in range(6):
        second = sampling.top_k(sampling.temperature(model.net(torch.tensor([[2, 1, a]]))[0, -1], 1.4), k=5).softmax(-1)
        joint[a] = first[a].double() * second.double()
    counts = torch.bincount(out[:, 0] * 6 + out[:, 1], minlength=36).double()
    assert not counts[joint.flatten() == 0].any()
    likely = joint.flatten() * 20_000 >= 5
    expected = joint.flatten()[likely] / joint.flatten()[likely].sum() * counts[likely].sum()
    assert likely.sum() > 10 and stats.chisquare(counts[likely].numpy(), expected.numpy()).pvalue > 1e-3


# ---- the peer

PAD = 11  # not 0, which transformers' beam search takes for none


def theirs_generate(theirs, prompts, steps, **options):
    """transformers' generate on a list of prompts, left-padded; only the new tokens."""
    width = max(map(len, prompts))
    tokens = torch.stack([torch.cat((torch.zeros(width - len(p)).long(), p)) for p in prompts])
    mask = torch.stack([torch.cat((torch.zeros(width - len(p)), torch.ones(len(p)))) for p in prompts]).long()
    out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=PAD,
                          return_dict_in_generate=True, **options)
    return out.sequences[:, width:], out


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_tokens_equal_transformers(kv_heads):
    theirs, ours = llama(kv_heads=kv_heads)
    wrapped = AutoregressiveWrapper(ours, pad_value=PAD)
    for eos in (None, 4):
        expected, _ = theirs_generate(theirs, LISTED, 20, eos_token_id=eos)
        out = wrapped.generate(LISTED, 20, temperature=0, eos_token=eos)
        assert torch.equal(out, expected[:, : out.shape[1]]) and (expected[:, out.shape[1] :] == PAD).all()
    expected, _ = theirs_generate(theirs, LISTED[:1], 20, eos_token_id=None, repetition_penalty=1.3)
    assert torch.equal(wrapped.generate(LISTED[:1], 20, temperature=0, repetition_penalty=1.3), expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -0.5])
def test_beam_search_equals_transformers(seed, penalty):
    """trap 17: EOS, length penalty, unequal prompts: tokens and scores of every beam, best first."""
    theirs, ours = llama(vocab=13, depth=1, seed=seed)
    wrapped, prompts = AutoregressiveWrapper(ours, pad_value=PAD), [p % 13 for p in LISTED[:3]]
    for w, eos in ((1, None), (3, 5), (4, [5, 7]), (2, None), (2, [0, 1, 2, 3, 4, 5, 6, 7])):
        sequences, out = theirs_generate(theirs, prompts, 9, num_beams=w, num_return_sequences=w, early_stopping="never",
                                         length_penalty=penalty, eos_token_id=eos, output_scores=True)
        beams, scores = wrapped.beam_search(prompts, 9, beams=w, eos_token=eos, length_penalty=penalty,
                                            return_beams_and_scores=True)
        expected = sequences.view(3, w, -1).transpose(0, 1)
        m = beams.shape[-1]
        assert torch.equal(beams, expected[..., :m]) and (expected[..., m:] == PAD).all(), (w, eos)
        if w > 1:
            torch.testing.assert_close(scores, out.sequences_scores.view(3, w).T, atol=1e-4, rtol=1e-4)
        best = wrapped.beam_search(prompts, 9, beams=w, eos_token=eos, length_penalty=penalty)
        assert torch.equal(best, beams[0, :, : best.shape[1]]) and (beams[0, :, best.shape[1] :] == PAD).all()
        if w > 1:
            assert torch.equal(wrapped.generate(prompts, 9, beams=w, eos_token=eos, length_penalty=penalty), best)


# ---- the definition

def every_text(model, prompt, steps, eos, penalty):
    """All texts that end with EOS or have `steps` tokens, by score, best first."""
    v, found = model.net.num_tokens, []
    for n in range(1, steps + 1):
        for text in itertools.product(range(v), repeat=n):
            inner = all(t not in eos for t in text[:-1])
            if inner and (text[-1] in eos or n == steps):
                whole = torch.cat((prompt, torch.tensor(text)))[None]
                logp = model.net(whole).log_softmax(-1)[0, len(prompt) - 1 : -1].gather(-1, torch.tensor(text)[:, None]).sum()
                found.append((float(logp) / n**penalty, text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("eos", [(2,), (0, 2), ()])
@torch.no_grad()
def test_a_beam_of_full_width_finds_what_enumeration_finds(penalty, eos):
    """trap 17: more beams than the vocabulary has words."""
    model = tiny_ar(num_tokens=4, depth=1, pad_value=1, sharp=4.0)
    prompt = torch.tensor([3, 1])
    expected = every_text(model, prompt, 3, eos, penalty)
    w = 64
    beams, scores = model.beam_search(prompt, 3, beams=w, eos_token=eos, length_penalty=penalty, return_beams_and_scores=True)
    assert beams.shape[0] == w
    for i, (score, text) in enumerate(expected[:w]):
        torch.testing.assert_close(float(scores[i]), score, atol=1e-5, rtol=1e-5)
        assert beams[i].tolist() == list(text) + [1] * (beams.shape[-1] - len(text))
    assert (scores[len(expected) :] == -math.inf).all() and (beams[len(expected) :] == 1).all()
    assert model.beam_search(prompt, 3, beams=w, eos_token=eos, length_penalty=penalty).tolist() == list(expected[0][1])


def test_the_search_goes_on_while_a_longer_text_may_win():
    """trap 17: a finished text leads until length has diluted the cost of the other one."""
    p = torch.full((3, 3), 1e-4)
    p[0] = torch.tensor([1e-4, 0.49, 0.51])  # 2 ends
    p[1] = torch.tensor([1e-4, 1.0, 1e-4])
    model = AutoregressiveWrapper(Fixed((p / p.sum(-1, keepdim=True)).log()))
    best = model.beam_search(torch.tensor([0]), 5, beams=1, eos_token=2, length_penalty=1.0, cache_kv=False)
    assert best.tolist() == [1, 1, 1, 1, 1]
    assert model.beam_search(torch.tensor([0]), 5, beams=1, eos_token=2, length_penalty=0.0, cache_kv=False).tolist() == [2]


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 8), st.sampled_from([0.0, 0.6, 1.0, 1.5]))
@torch.no_grad()
def test_beam_scores_are_what_they_say(seed, w, steps, penalty):
    model, prompts, eos = tiny_ar(seed % 7, pad_value=16), [p for p in LISTED], 3
    beams, scores = model.beam_search(prompts, steps, beams=w, eos_token=eos, length_penalty=penalty,
                                      return_beams_and_scores=True)
    assert (scores.diff(dim=0) <= 0).all()
    for i, prompt in enumerate(prompts):
        assert len({tuple(t) for t in beams[:, i].tolist()}) == w
        for text, score in zip(beams[:, i], scores[:, i], strict=True):
            ends = (text == eos).nonzero()
            n = int(ends[0]) + 1 if len(ends) else steps
            assert (text[n:] == 16).all()
            own = model.net(torch.cat((prompt, text[:n]))[None]).log_softmax(-1)[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(own.gather(-1, text[:n, None]).sum() / n**penalty, score, atol=1e-4, rtol=1e-4)


def test_one_beam_is_greedy():
    model = tiny_ar(max_seq_len=10)
    assert torch.equal(model.beam_search(LISTED, 20, beams=1), model.generate(LISTED, 20, temperature=0))
