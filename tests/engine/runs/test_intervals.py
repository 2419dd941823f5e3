from __future__ import annotations

import pytest
from scipy.stats import binomtest

from src.engine.runs.intervals import share_interval


@pytest.mark.parametrize(("right", "images"), [(0, 5), (5, 5), (90, 100), (1, 1), (700, 1000)])
def test_wilsons_interval_is_scipys(right, images):
    expected = binomtest(right, images).proportion_ci(0.95, "wilson")
    assert share_interval(right / images, images) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_without_images_everything_is_possible():
    assert share_interval(0.0, 0) == (0.0, 1.0)
