"""What `make frontier` reads off its curves."""

import math

import pytest

from bench import frontier
from t5patches.editing.evaluate import Measure
from t5patches.editing.report import Row
from t5patches.editing.train import OBJECTIVES


def curve(*points):
    return [
        Row("ul", 1.0, 0, {"prevalence_sampled": Measure(x, 0.0), "kl": Measure(y, 0.0)})
        for x, y in points
    ]


def test_a_kl_is_read_off_between_two_strengths():
    falling = curve((20.0, 0.001), (10.0, 0.004), (4.0, 0.016))
    assert frontier.kl_at(falling, 30.0) == 0.001
    assert frontier.kl_at(falling, 10.0) == 0.004
    assert frontier.kl_at(falling, 7.0) == pytest.approx(math.sqrt(0.004 * 0.016))
    assert frontier.kl_at(falling, 2.0) is None
    # What strength brings closer again counts too.
    assert frontier.kl_at([*falling, *curve((1.0, 0.002))], 5.0) == 0.002


def test_every_objective_has_a_curve():
    """But for the two that give up the original's distribution at kept tokens."""
    named = {edit.objective for edits in frontier.CURVES.values() for edit in edits}
    assert named == set(OBJECTIVES) - {"tnfll", "tnrll"}
