"""What is read off a curve, its standard error, and the sentence that it gives."""

import math

import numpy as np
import pytest

from t5patches.editing.curves import kl_at, who_is_closest
from t5patches.editing.evaluate import Measure, ratio


def curve(*points, error=0.0):
    return [{"prevalence_sampled": Measure(x, 0.0), "kl": Measure(y, error * y)} for x, y in points]


def value(points, prevalence):
    found = kl_at(points, prevalence)
    return None if found is None else found.value


def test_a_kl_is_read_off_between_two_strengths():
    falling = curve((20.0, 0.001), (10.0, 0.004), (4.0, 0.016))
    assert value(falling, 30.0) == 0.001
    assert value(falling, 10.0) == 0.004
    assert value(falling, 7.0) == pytest.approx(math.sqrt(0.004 * 0.016))
    assert value(falling, 2.0) is None
    # What strength brings closer again counts too.
    assert value([*falling, *curve((1.0, 0.002))], 5.0) == 0.002
    # A KL of 0 has no logarithm.
    assert value(curve((20.0, 0.0), (4.0, 0.016)), 7.0) == 0.016
    assert kl_at([], 5.0) is None


def test_its_error_is_that_of_repeated_experiments():
    """Two strengths measured on the same inputs, with 4% left between them."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        hard = rng.gamma(2.0, 1.0, 300)  # inputs that are hard are so for both strengths
        strengths = [
            {"prevalence_sampled": ratio(100 * (rng.random(300) < p)), "kl": ratio(k * hard)}
            for p, k in ((0.06, 0.004), (0.02, 0.009))
        ]
        measure = kl_at(strengths, 4.0)
        # Where both are below or above by chance there is nothing between them.
        if measure is not None and len({measure.value} & {s["kl"].value for s in strengths}) == 0:
            found.append(measure)
    assert len(found) > 350
    spread = np.std([measure.value for measure in found])
    assert np.median([measure.error for measure in found]) == pytest.approx(spread, rel=0.2)
    assert len(found[0].samples) == 300


def test_the_sentence_names_winner_rival_and_error():
    curves = {
        "A": curve((8.0, 0.010), (1.0, 0.020), error=0.01),
        "B": curve((9.0, 0.012), (1.5, 0.021), error=0.2),
        "C": curve((9.0, 0.040), error=0.01),
    }
    assert who_is_closest(curves, ["A", "B"]) == [
        "Where at most 10% of the sampled outputs may have something unwanted, A is closest to the "
        "original: KL 0.0100 ± 0.0001; B is 0.0020 ± 0.0024 further away, no telling them apart; "
        "C is 0.0300 ± 0.0004 further away.",
        "Where at most 5% of the sampled outputs may have something unwanted, A is closest to the "
        f"original: KL {value(curves['A'], 5.0):.4f} ± 0.0001; B is "
        f"{value(curves['B'], 5.0) - value(curves['A'], 5.0):.4f} ± 0.0023 further away, no "
        "telling them apart; 1 of 3 methods leave more.",
        "Where at most 2% of the sampled outputs may have something unwanted, A is closest to the "
        f"original: KL {value(curves['A'], 2.0):.4f} ± 0.0002; B is "
        f"{value(curves['B'], 2.0) - value(curves['A'], 2.0):.4f} ± 0.0038 further away, no "
        "telling them apart; 1 of 3 methods leave more.",
    ]
    # What is true of several shares is said once.
    (one,) = who_is_closest({"A": curve((1.0, 0.01)), "B": curve((1.0, 0.02))})
    assert one.startswith("Where at most 10, 5 or 2% of the sampled outputs")
    assert who_is_closest({"A": curve((90.0, 0.01))})[0].endswith("unwanted, no method does.")


def test_methods_are_compared_on_the_same_inputs():
    """The inputs differ more than the methods do, which pairs see and single errors do not."""
    hard = np.random.default_rng(1).gamma(2.0, 1.0, 200)
    left = ratio([0.0] * 200)
    both = {
        name: [{"prevalence_sampled": left, "kl": ratio(factor * hard)}]
        for name, factor in (("A", 0.010), ("B", 0.011))
    }
    (sentence,) = who_is_closest(both)
    assert "no telling" not in sentence
    alone = {
        name: [{key: Measure(m.value, m.error) for key, m in point.items()} for point in points]
        for name, points in both.items()
    }
    assert "no telling" in who_is_closest(alone)[0]
