"""task=binary: the threshold that a model.json from elsewhere may have."""

from __future__ import annotations

import pytest

from src.tasks.binary import Binary


@pytest.mark.parametrize("threshold", [(), (0.3, 0.4), (1.5,), (-0.1,), (float("nan"),)])
def test_a_hostile_threshold_is_refused(threshold):
    Binary(values={"threshold": (0.3,)}).check_values(("cats", "dogs"))
    with pytest.raises(ValueError, match="the threshold is not a number from 0 to 1"):
        Binary(values={"threshold": threshold}).check_values(("cats", "dogs"))
