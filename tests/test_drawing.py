"""The engine's draw against the operations that it stands for, one by one and over the whole vocabulary."""

import pytest
import torch
from conftest import ids, llama, tiny_ar
from hypothesis import given
from hypothesis import strategies as st

from xalign import drawing, sampling
from xalign.drawing import WIDTH, Draw, Penalties, largest

OPTIONS = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}


def logits_of(kind: str, rows: int, v: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(rows, v)
    if kind == "sharp":
        return 8 * x
    if kind == "tied":  # many equal values, also at every border
        return (2 * x).round()
    if kind == "flat":
        return torch.zeros(rows, v)
    if kind == "holes":
        return (4 * x).masked_fill(torch.rand(rows, v) < 0.9, float("-inf")).index_fill(1, torch.tensor([v // 2]), 1.0)
    if kind == "one hot":
        return torch.full((rows, v), -1e4).index_fill(1, torch.tensor([v - 1]), 50.0)
    return (4 * x).bfloat16().float() if kind == "bf16" else x


KINDS = ["plain", "sharp", "tied", "flat", "holes", "one hot", "bf16"]
DRAWS = dict(
    kind=st.sampled_from(KINDS), rows=st.integers(1, 4), v=st.sampled_from([1, 5, 64, 320, 321, 700, 5000]),
    seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 3, 50, 320, 600, 10**6]), top_p=st.sampled_from([None, 0.0, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.05, 1.0]))


@given(**DRAWS)
def test_short_and_long_way_draw_the_same_token(kind, rows, v, seed, **options):
    x, keys, position = logits_of(kind, rows, v, seed), sampling.row_keys(seed, rows), torch.arange(rows)
    elsewhere = Draw(options, [], rows, torch.device("meta"))  # like any device but the CPU it knows the long way only
    assert elsewhere.width == 0
    assert torch.equal(Draw(options, [], rows, x.device)(x, keys, position), elsewhere(x, keys, position))


@given(**DRAWS)
def test_the_short_way_keeps_exactly_what_the_operations_keep(kind, rows, v, seed, **options):
    x, draw = logits_of(kind, rows, v, seed), Draw(options, [], rows, torch.device("cpu"))
    found = draw.survivors(x) if draw.width else None
    if found is not None:
        scaled, index, settled = map(torch.from_numpy, found)
        spread = torch.full_like(x, float("-inf")).scatter_reduce(1, index, scaled, "amax")  # padding has any index
        assert torch.equal(spread[settled], draw.filtered(x)[settled])


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), data=st.data())
def test_a_row_draws_alike_whatever_its_mates(kind, seed, data):
    """Per-row options, and rows of which some take the long way."""
    mixed = torch.cat([logits_of(k, 1, 3000, seed + i) for i, k in enumerate([kind, "flat", "sharp", "tied"])])
    options = {"temperature": torch.tensor([0.7, 1.0, 0.0, 2.0]), "top_k": torch.tensor([5, 3000, 40, 7]),
               "top_p": torch.tensor([0.8, 0.9, 1.0, 0.5]), "min_p": torch.tensor([0.0, 0.1, 0.2, 0.0])}
    given_ = {k: v if k == "temperature" or data.draw(st.booleans()) else None for k, v in options.items()}
    keys, position = sampling.row_keys(seed, 4), torch.arange(4)
    draw = Draw(given_, [], 4, mixed.device)
    together, rows = draw(mixed, keys, position), torch.tensor([2, 0])
    assert torch.equal(draw(mixed[rows], keys[rows], position[rows], rows), together[rows])
    for i in range(4):
        own = {k: v if v is None else v[i : i + 1] for k, v in given_.items()}
        assert Draw(own, [], 1, mixed.device)(mixed[i : i + 1], keys[i : i + 1], position[i : i + 1]) == together[i]


def test_odd_values_in_tensors_are_clamped():
    x, keys = 5 * torch.randn(6, 3000), sampling.row_keys(0, 6)
    top_k = torch.tensor([float("nan"), float("inf"), -3.0, 2.5, 1e9, 300.0])
    draw = Draw(OPTIONS | {"top_k": top_k, "top_p": torch.full((6,), 0.9)}, [], 6, x.device)
    expected = (draw.filtered(x) + sampling.gumbel(keys, torch.zeros(6, dtype=torch.long), 3000)).argmax(-1)
    assert torch.equal(draw(x, keys, torch.zeros(6, dtype=torch.long)), expected)
    assert draw.width == 300 and draw.survivors(x)[2].tolist() == [False, False, True, True, False, True]


def test_of_equal_sums_the_lower_token_is_drawn_either_way(monkeypatch):
    monkeypatch.setattr(sampling, "gumbel", lambda keys, position, tokens: torch.zeros(()))
    monkeypatch.setattr(drawing, "gumbel", lambda keys, position, tokens: 0)
    x = torch.zeros(1, 1000).index_fill(1, torch.tensor([900, 3, 500]), 1.0)
    for device in ("cpu", "meta"):
        assert Draw(OPTIONS | {"top_k": 3}, [], 1, torch.device(device))(x, *torch.zeros(2, 1).long()) == 3


@given(st.lists(st.tuples(st.integers(-2**63, 2**63 - 1), st.integers(0, 2**40)), min_size=1, max_size=4), st.data())
def test_the_short_way_makes_the_same_noise(rows, data):
    """Bit by bit, whatever the key: of any number of tokens, wherever they stand in the array."""
    keys, position = torch.tensor(rows).T.contiguous()
    index = torch.randint(200_000, (len(rows), data.draw(st.integers(1, 70))))
    assert torch.equal(torch.from_numpy(drawing.gumbel(keys, position, index.numpy())), sampling.gumbel(keys, position, index))


@pytest.mark.parametrize("odd", [float("inf"), float("-inf")])
def test_rows_whose_largest_is_infinite_take_the_long_way(odd):
    x = torch.randn(2, 3000)
    x[0, slice(None) if odd == float("-inf") else 7] = odd
    draw = Draw(OPTIONS | {"top_k": 5, "top_p": 0.9}, [], 2, x.device)
    assert draw.survivors(x) is None and draw.survivors(x[1:]) is not None


def test_noise_in_parts_is_the_noise(monkeypatch):
    """Plain sampling makes the noise of some rows at a time."""
    x, keys, position = torch.randn(5, 90), sampling.row_keys(0, 5), torch.arange(5)
    whole = (x + sampling.gumbel(keys, position, 90)).argmax(-1)
    for chunk in (1, 90, 200, 10**6):
        monkeypatch.setattr(drawing, "CHUNK", chunk)
        assert torch.equal(Draw(OPTIONS, [], 5, x.device)(x, keys, position), whole)


@pytest.mark.parametrize("v", [64, 4096, 4100, 32_000])
@pytest.mark.parametrize("k", [1, 10, 51, WIDTH])
def test_largest_is_topk_with_ties_by_the_lower_index(v, k):
    for kind in KINDS:
        x, k = logits_of(kind, 3, v, 0), min(k, v)
        found = largest(x, k)
        if found is None:
            assert kind == "flat" or (kind == "tied" and v > 4000), "only where many are equal"
            continue
        values, index, counts, whole = map(torch.from_numpy, found)
        real = torch.arange(values.shape[1]) < counts
        assert bool(((counts >= k) | whole).all()) or kind in ("one hot", "tied")
        assert bool((values[~real] == float("-inf")).all())
        expected = x.topk(values.shape[1]).values
        assert torch.equal(values, expected.masked_fill(~real, float("-inf"))), "nothing between is left out"
        assert torch.equal(x.gather(1, index)[real], values[real])
        assert torch.equal(whole, (x > float("-inf")).sum(1, keepdim=True) == counts)
        same = (values[:, 1:] == values[:, :-1]) & real[:, 1:]
        assert bool((index[:, 1:] > index[:, :-1])[same].all())


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), v=st.sampled_from([1, 5, 700, 32_000, 128_256]))
def test_the_mass_is_as_close_to_the_sum_as_it_says(kind, seed, v):
    x = logits_of(kind, 2, v, seed)
    exact = sampling.weights(x).sum(-1, keepdim=True, dtype=torch.float64)
    assert bool(((torch.from_numpy(drawing.mass(x, x.argmax(-1).numpy())) / exact - 1).abs() < drawing.CLOSE / 4).all())


def test_where_the_mass_is_too_near_to_the_border_it_is_summed(monkeypatch):
    """With a mass that is always in doubt the draw is the same."""
    x, keys, position = 5 * torch.randn(4, 3000), sampling.row_keys(0, 4), torch.arange(4)
    draw = Draw(OPTIONS | {"top_p": 0.9}, [], 4, x.device)
    expected, kept = draw(x, keys, position), draw.filtered(x) > float("-inf")
    monkeypatch.setattr(drawing, "CLOSE", 0.2)
    monkeypatch.setattr(drawing, "mass", lambda x, top, own=drawing.mass: 1.1 * own(x, top))
    assert torch.equal(draw(x, keys, position), expected)
    assert (draw.survivors(x)[0] > float("-inf")).sum(1).tolist() == kept.sum(1).tolist()


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12, unique=True), st.data())
def test_the_short_way_stops_where_the_mass_is_reached_but_for_rounding(counts, data):
    counts = sorted(counts, reverse=True)
    keep = data.draw(st.integers(1, len(counts) - 1))
    x = torch.full((1, 400), float("-inf"))
    x[0, : len(counts)] = torch.tensor(counts, dtype=torch.float).log()
    draw = Draw(OPTIONS | {"top_p": sum(counts[:keep]) / sum(counts)}, [], 1, x.device)
    assert int((draw.survivors(x)[0] > float("-inf")).sum()) == int((draw.filtered(x) > float("-inf")).sum()) == keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_short_way_settles_what_language_models_give(dtype):
    """bf16 logits too, which tie at most borders."""
    torch.manual_seed(0)
    x = (6 * torch.randn(8, 32_000)).to(dtype).float()
    for more in ({"top_p": 0.9}, {"top_k": 50, "top_p": 0.9, "min_p": 0.05}, {"min_p": 0.1}, {"top_k": 50}):
        assert bool(Draw(OPTIONS | more, [], 8, x.device).survivors(x)[2].all()), more
    assert Draw(OPTIONS | {"top_p": 0.9}, [], 8, x.device).survivors(torch.zeros(8, 32_000)) is None


def test_a_compiled_draw_is_one_graph_and_draws_the_same():
    x, keys, position = 4 * torch.randn(2, 3000), sampling.row_keys(0, 2), torch.arange(2)
    draw = Draw(OPTIONS | {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05}, [], 2, x.device)
    compiled = torch.compile(draw.__call__, backend="eager", fullgraph=True)
    assert draw.width and torch.equal(compiled(x, keys, position), draw(x, keys, position))


def test_options_that_change_nothing_cost_nothing():
    draw = Draw({"temperature": 1, "top_k": None, "top_p": 1.0, "min_p": 0.0}, [], 2, torch.device("cpu"))
    assert not draw.options and not draw.width


# ---- penalties


def test_penalties_by_hand():
    eos = torch.tensor([4])
    # behind a row's length stands garbage, here ids that no vocabulary of 5 has
    text, lengths = torch.tensor([[1, 2, 1, 0, 99, -7], [3, 3, 3, 1, 3, 0]]), torch.tensor([4, 5])
    penalise = Penalties(5, text.device, eos, repetition=2.0, presence=0.5, frequency=torch.tensor([0.25, 1.0]),
                         logit_bias={0: 3.0, 2: float("-inf")}, bad_words=[[3], [2, 1, 0]], min_new_tokens=4)
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, -2.0, 3.0, 4.0, 5.0]])
    out = penalise(logits, text, torch.tensor([3, 5]), torch.tensor([1, 2]))
    inf = float("inf")
    # row 0: 1 and 2 were seen, once each generated; 2 1 would be completed by 0; the end may not come yet
    first = [-inf, 2 / 2 - 0.5 - 0.25, -inf, -inf, -inf]
    assert out.tolist() == [first, [1.0 + 3, -4 - 0.5 - 1, -inf, -inf, -inf]]
    # after 2 1 0 comes anything, and after four tokens the end
    assert penalise(logits, text, lengths, torch.tensor([0, 2]))[0].tolist() == [2 - 0.5 - 0.25, 1 - 0.5 - 0.5, -inf, -inf, 5]
    one = penalise(logits[1:], text[1:], lengths[1:], torch.tensor([2]), rows=torch.tensor([1]))
    assert torch.equal(one, out[1:]), "a row that is left keeps its request's options"


def test_penalties_that_say_nothing_are_none():
    assert not Penalties(5, torch.device("cpu"), torch.tensor([4]))
    assert Penalties(5, torch.device("cpu"), torch.tensor([4]), frequency=-0.1)


@pytest.mark.parametrize("options", [{"logit_bias": {5: 1.0}}, {"logit_bias": {"a": 1.0}}, {"logit_bias": {0: float("nan")}},
                                     {"logit_bias": torch.zeros(4)}, {"logit_bias": {0: float("inf")}}, {"bad_words": [[]]},
                                     {"bad_words": [[7]]}, {"bad_words": [[0], [1], [2], [3], [4]]}, {"presence": float("nan")},
                                     {"logit_bias": torch.full((5,), float("-inf"))}, {"frequency": float("inf")}])
def test_bad_penalties_are_told(options):
    with pytest.raises(ValueError, match="allowed"):
        Penalties(5, torch.device("cpu"), torch.tensor([4]), **options)


def test_bad_words_and_least_length_equal_transformers():
    theirs, ours = llama()
    from xalign import AutoregressiveWrapper

    words, prompt = [[3], [5, 6], [1, 2, 3], [9, 9]], ids(4, 5)
    free = AutoregressiveWrapper(ours).generate(prompt, 12, temperature=0)
    words += [free[i, 2:4].tolist() for i in range(4)]
    options = {"max_new_tokens": 12, "min_new_tokens": 6, "do_sample": False, "eos_token_id": int(free[0, 1]),
               "pad_token_id": 0, "bad_words_ids": words, "repetition_penalty": 1.3, "sequence_bias": [[[7], 2.5], [[8], -3.0]]}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, 5:]
    out = AutoregressiveWrapper(ours).generate(prompt, 12, temperature=0, eos_token=int(free[0, 1]), bad_words=words,
                                               min_new_tokens=6, repetition_penalty=1.3, logit_bias={7: 2.5, 8: -3.0})
    assert torch.equal(out, expected) and not torch.equal(out, free[:, : out.shape[1]])


def test_frequency_penalty_ends_repetition():
    model = tiny_ar()
    plain = model.generate(ids(1, 3), 30, temperature=0)[0]
    spread = model.generate(ids(1, 3), 30, temperature=0, frequency_penalty=50.0)[0]
    assert len(set(spread.tolist())) == 17 > len(set(plain.tolist()))
    samples = model.generate(ids(2, 3), 17, num_samples=2, presence_penalty=torch.tensor([1e4, 0.0]), seed=0)
    assert all(len(set(row.tolist())) == 17 for row in samples[0])


def test_beams_take_no_penalties():
    for option in ({"presence_penalty": 1.0}, {"bad_words": [[1]]}, {"min_new_tokens": 2}, {"logit_bias": torch.zeros(17)}):
        with pytest.raises(ValueError, match="beams is 2"):
            tiny_ar().generate(ids(1, 3), 4, beams=2, **option)
