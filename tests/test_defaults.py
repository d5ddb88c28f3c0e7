"""What `python -m bench.defaults` changes about an edit, and what it makes of several seeds."""

import argparse

import numpy as np
import pytest

from bench import defaults
from t5patches.commands import edit
from t5patches.editing.annotate import find_spans
from t5patches.editing.demo import LATER
from t5patches.editing.demo_task import ENTITY_FREE, make_pairs, places_not_in_source


def test_each_changes_something_that_the_command_has():
    parser = argparse.ArgumentParser()
    edit.add_arguments(parser)
    needed = ["--model", "a", "--output", "b", "--data", "c"]
    usual, seen = vars(parser.parse_args(needed)), []
    for name, options in defaults.VARIATIONS.items():
        asked = vars(parser.parse_args([*needed, *options.split()]))
        seen.append({k: v for k, v in asked.items() if v != usual[k]})
        assert bool(seen[-1]) == bool(options), name
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_kept_text_has_no_occasion_to_invent():
    kept = defaults.kept_inputs(60)
    assert 10 < len(kept) < 60
    assert len(set(kept)) == len(kept)
    summaries = {pair.news: pair.summary for pair in make_pairs(60, seed=LATER)}
    for news in kept:
        assert not find_spans(places_not_in_source(), news, summaries[news])
        assert ENTITY_FREE not in summaries[news]


def test_rows_are_means_over_seeds():
    rows = [
        {"name": "a", "seed": i} | dict.fromkeys(defaults.MEASURES, x)
        for i, x in enumerate((1.0, 2.0, 3.0))
    ]
    found = defaults.summary([*rows, rows[0] | {"name": "b"}], "a")
    assert found["kl"] == pytest.approx((2.0, 1 / np.sqrt(3)))
    assert defaults.cells(found)["KL"] == "2.0000 ± 0.5774"
    assert defaults.cells(defaults.summary(rows[:1], "a"))["KL"] == "1.0000"
