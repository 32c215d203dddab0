"""The engine's draw against the operations that it stands for, one by one and over the whole vocabulary."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xalign import sampling
from xalign.drawing import NUCLEUS, Draw, largest

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
    return x.bfloat16().float() if kind == "bf16" else x


KINDS = ["plain", "sharp", "tied", "flat", "holes", "one hot", "bf16"]


@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 4), v=st.sampled_from([1, 5, 64, 700, 5000]),
       seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0]),
       top_k=st.sampled_from([None, 1, 3, 50, 600, 10**6]),
       top_p=st.sampled_from([None, 0.0, 0.3, 0.9, 0.999, 1.0]), min_p=st.sampled_from([None, 0.0, 0.05, 1.0]))
def test_short_and_long_way_draw_the_same_token(kind, rows, v, seed, temperature, top_k, top_p, min_p):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    x, keys, position = logits_of(kind, rows, v, seed), sampling.row_keys(seed, rows), torch.arange(rows)
    draw = Draw(options, [], rows, x.device)
    expected = (draw.filtered(x) + sampling.gumbel(keys, position, v)).argmax(-1)
    assert torch.equal(draw(x, keys, position), expected)


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), data=st.data())
def test_a_row_draws_alike_whatever_its_mates(kind, seed, data):
    """Per-row options, and rows of which some take the long way."""
    mixed = torch.cat([logits_of(k, 1, 3000, seed + i) for i, k in enumerate([kind, "flat", "sharp", "tied"])])
    options = {"temperature": torch.tensor([0.7, 1.0, 0.0, 2.0]), "top_k": torch.tensor([5, 3000, 40, 7]),
               "top_p": torch.tensor([0.8, 0.9, 1.0, 0.5]), "min_p": torch.tensor([0.0, 0.1, 0.2, 0.0])}
    given_ = {k: v if k == "temperature" or data.draw(st.booleans()) else None for k, v in options.items()}
    keys, position = sampling.row_keys(seed, 4), torch.arange(4)
    together = Draw(given_, [], 4, mixed.device)(mixed, keys, position)
    for i in range(4):
        own = {k: v if v is None else v[i : i + 1] for k, v in given_.items()}
        assert Draw(own, [], 1, mixed.device)(mixed[i : i + 1], keys[i : i + 1], position[i : i + 1]) == together[i]


def test_odd_values_in_tensors_are_clamped():
    x, keys = 5 * torch.randn(5, 3000), sampling.row_keys(0, 5)
    top_k = torch.tensor([float("nan"), float("inf"), -3.0, 2.5, 1e9])
    draw = Draw(OPTIONS | {"top_k": top_k, "top_p": torch.full((5,), 0.9)}, [], 5, x.device)
    expected = (draw.filtered(x) + sampling.gumbel(keys, torch.zeros(5, dtype=torch.long), 3000)).argmax(-1)
    assert torch.equal(draw(x, keys, torch.zeros(5, dtype=torch.long)), expected)


@pytest.mark.parametrize("v", [64, 4096, 4100, 32_000])
@pytest.mark.parametrize("k", [1, 10, 51, NUCLEUS + 1])
def test_largest_is_topk_with_ties_by_the_lower_index(v, k):
    for kind in KINDS:
        x, k = logits_of(kind, 3, v, 0), min(k, v)
        values, index = largest(x, k)
        assert torch.equal(values, x.topk(k).values) and torch.equal(x.gather(1, index), values)
        same = values[:, 1:] == values[:, :-1]
        assert bool((index[:, 1:] > index[:, :-1])[same].all())


def test_the_short_way_settles_what_language_models_give():
    torch.manual_seed(0)
    x = 6 * torch.randn(8, 32_000)
    for more in ({"top_p": 0.9}, {"top_k": 50, "top_p": 0.9, "min_p": 0.05}, {"min_p": 0.1}):
        assert bool(Draw(OPTIONS | more, [], 8, x.device).survivors(x)[2].all()), more
    assert not bool(Draw(OPTIONS | {"top_p": 0.9}, [], 8, x.device).survivors(torch.zeros(8, 32_000))[2].any())
