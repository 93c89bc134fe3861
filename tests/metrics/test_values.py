from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from cmbench.metrics.values import normal_interval, share_interval


@given(st.integers(1, 500), st.floats(0, 1))
def test_share_interval_is_wilsons(count: int, share: float) -> None:
    hits = round(share * count)
    theirs = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert share_interval(hits / count, count) == pytest.approx(theirs, abs=1e-9)


def test_normal_interval() -> None:
    low, high = normal_interval(2.0, 1.0)
    assert high - low == pytest.approx(2 * 1.959964, rel=1e-6)
    assert np.mean([low, high]) == 2.0
