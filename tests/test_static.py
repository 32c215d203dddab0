"""Nothing in a decoding loop reads a value on the host or has a shape that hangs on values: what a CUDA graph asks for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from xalign import sampling as S
from xalign.drawing import Draw, Penalties
from xalign.stopping import StopTokens

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")  # `Draw` takes its short way on the CPU alone


def check_static(function: Callable[..., Any], *examples: tuple) -> None:
    """Run `function` on fake tensors like the first example; record it there, and replay the record on every example.

    Fake tensors have no values, so that a host read or a data-dependent shape raises. What the record gives must be what the
    function gives, else a number of the first run was frozen into it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        function(*tree_map(lambda t: mode.from_tensor(t), examples[0]))
    record = make_fx(lambda *inputs: function(*inputs))(*examples[0])
    for example in examples:
        torch.testing.assert_close(record(*example), function(*example), rtol=0, atol=0, equal_nan=True)


def rows(*shape: int) -> list[tuple]:
    torch.manual_seed(0)
    return [(torch.randn(*shape),), (8 * torch.randn(*shape),), (torch.zeros(*shape),)]


def full(x: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full(x.shape[:-1], value)


def some(x: torch.Tensor) -> torch.Tensor:
    return (torch.arange(4) * 7 % 5).expand(*x.shape[:-1], 4)


OPS = {
    "temperature": lambda x: S.temperature(x, 0.7), "greedy": lambda x: S.temperature(x, 0),
    "temperatures": lambda x: S.temperature(x, full(x, 0.7)),
    "top_k": lambda x: S.top_k(x, k=3), "top_k fraction": S.top_k, "top_ks": lambda x: S.top_k(x, k=full(x, 3)),
    "top_p": lambda x: S.top_p(x, 0.6), "top_ps": lambda x: S.top_p(x, full(x, 0.6)),
    "min_p": lambda x: S.min_p(x, 0.2), "min_ps": lambda x: S.min_p(x, full(x, 0.2)), "top_a": S.top_a,
    "repetition": lambda x: S.repetition_penalty(x, some(x), 1.3),
    "repetitions": lambda x: S.repetition_penalty(x, some(x), full(x, 1.3), some(x) > 1),
    "counts": lambda x: S.count_penalty(x, some(x), 0.3, 0.2),
    "counts tensor": lambda x: S.count_penalty(x, some(x), full(x, 0.3), full(x, 0.2), some(x) > 1),
}


def test_every_operation_has_its_line():
    public = {f.__name__ for f in vars(S).values() if callable(f) and getattr(f, "__module__", "") == S.__name__
              and f.__code__.co_varnames[:1] == ("logits",) and not f.__name__.startswith("_")}
    covered = {name for f in OPS.values() for name in (*f.__code__.co_names, f.__name__)}
    assert public - covered == {"sample"}, "has a test of its own"


@pytest.mark.parametrize("op", OPS)
def test_operations_are_static(op):
    check_static(OPS[op], *rows(2, 3, 11))


def test_a_draw_with_a_generator_needs_no_host():
    with FakeTensorMode():
        assert S.sample(torch.randn(2, 3, 11)).shape == (2, 3)


def test_keys_and_noise_are_static():
    keys = S.row_keys(7, 4, 2, CPU)
    check_static(lambda k, n: S.gumbel(k, n, 11), (keys, torch.arange(8)), (keys + 1, torch.arange(8) * 3))
    check_static(lambda k, n: S.gumbel(k, n, n[:, None]), (keys, torch.arange(8)), (keys + 1, torch.arange(8) * 3))
    check_static(lambda seed: S.row_keys(seed, 4, 2, CPU), (torch.tensor(3),), (torch.tensor(-8),))
    check_static(lambda seeds: S.row_keys(seeds, 4, 2, CPU), (torch.arange(4),), (torch.arange(4) * 9,))


def state(text: list, lengths: list, prompt_lengths: list) -> tuple:
    return tuple(torch.tensor(t) for t in (text, lengths, prompt_lengths))


TEXTS = [state([[1, 2, 3, 0], [4, 4, 0, 0]], [3, 2], [1, 1]), state([[3, 1, 2, 5], [1, 2, 7, 9]], [4, 3], [1, 3])]


def test_stops_are_static():
    stops = StopTokens([7, 0], [[2, 3], [4]], CPU)
    check_static(stops.hits, *TEXTS)
    assert [stops.hits(*text).tolist() for text in TEXTS] == [[True, True], [False, False]]


@pytest.mark.parametrize("kept", [None, torch.tensor([1, 0])])
def test_penalties_are_static(kept):
    values = {"repetition": [1.3, 2.0], "presence": [0.1, 0.0], "frequency": [0.0, 0.5]}
    tensors = {name: torch.tensor(pair) for name, pair in values.items()}
    examples = [(x[0], *text) for x, text in zip(rows(2, 11), TEXTS, strict=False)]
    for options in (tensors, {"repetition": 1.3, "presence": 0.1, "frequency": 0.2}):
        penalise = Penalties(11, CPU, torch.tensor([7]), **options, logit_bias={3: 1.0, 5: float("-inf")},
                             bad_words=[[2], [2, 3], [1, 2, 3]], min_new_tokens=2)
        check_static(lambda x, *text, penalise=penalise: penalise(x, *text, kept), *examples)


@pytest.mark.parametrize("kept", [None, torch.tensor([1, 0, 1])])
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"temperature": torch.tensor([0.7, 0.0]), "top_k": torch.tensor([5, 40]), "top_p": torch.tensor([0.9, 1.0]),
     "min_p": torch.tensor([0.0, 0.1])}])
def test_the_draw_is_static_where_a_host_read_costs(options, kept):
    size = 2 if kept is None else len(kept)
    draw = Draw({"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | options, [S.top_a], 2, ELSEWHERE)
    check_static(lambda x, keys, position: draw(x, keys, position, kept),
                 *[(x[0], S.row_keys(i, size), torch.arange(size)) for i, x in enumerate(rows(size, 50))])


STEP = [0]


def counting(x: torch.Tensor) -> torch.Tensor:
    STEP[0] += 1
    return x + STEP[0]


@pytest.mark.parametrize("planted, error", [
    (lambda x: x * x.sum().item(), DataDependentOutputException),
    (lambda x: -x if bool(x.any()) else x, DataDependentOutputException),
    (lambda x: x[:, : int(x.amax())], DataDependentOutputException),
    (lambda x: x + torch.tensor(x.tolist()), DataDependentOutputException),
    (lambda x: x.nonzero(), DynamicOutputShapeException), (lambda x: x[x > 0], DynamicOutputShapeException),
    (lambda x: x.masked_select(x > 0), DynamicOutputShapeException), (lambda x: x.unique(), DynamicOutputShapeException),
    (lambda x: torch.from_numpy(x.numpy()), RuntimeError), (counting, AssertionError)])
def test_what_is_not_static_is_caught(planted, error):
    with pytest.raises(error):
        check_static(planted, *rows(2, 11))


def test_the_short_way_is_not_static():
    """So that the tests above are known to take the other one."""
    draw = Draw({"temperature": 1.0, "top_k": 5, "top_p": None, "min_p": None}, [], 2, CPU)
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        check_static(draw, (torch.randn(2, 5000), S.row_keys(0, 2), torch.arange(2)))
