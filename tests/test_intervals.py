"""Wilson's interval beside scipy's, and by its own definition where there are halves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xalign.evaluation.intervals import wilson


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts):
    from scipy.stats import binomtest

    assert wilson(*counts) == pytest.approx(tuple(binomtest(*counts).proportion_ci(0.95, "wilson")), abs=1e-12)


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0.1, 4))
def test_its_ends_are_the_shares_that_lie_z_standard_errors_away(n, share, z):
    low, high = wilson(share * n, n, z)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-6)


@pytest.mark.parametrize("counts", [(1, 0), (-1, 4), (5, 4), (1, 4, -1.0), (math.nan, 4)])
def test_what_are_no_counts(counts):
    with pytest.raises(ValueError, match="allowed are"):
        wilson(*counts)
