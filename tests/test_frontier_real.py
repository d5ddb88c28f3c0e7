"""What `make frontier-real` does with a model of a folder: on a tiny one."""

import io
import json
import math
import re

import jax
import numpy as np
import pytest
from rich.console import Console
from test_decoder_commands import place  # noqa: F401

from bench import frontier, frontier_real
from t5patches.editing.annotate import find_spans
from t5patches.editing.train import training_progress

pytestmark = pytest.mark.usefixtures("shared_programs")

CURVES = {
    "ours": frontier.by_updates("tnrf", 1, 2, with_sets=True),
    "theirs": frontier.by_updates("ce", 1, 2, on_sampled=True),
}


@pytest.fixture
def habit(place, tmp_path, monkeypatch):  # noqa: F811
    for name, value in {"MARKING": 6, "HELD_OUT": 5, "LATER": 3, "LENGTH": 6}.items():
        monkeypatch.setattr(frontier_real, name, value)
    (tmp_path / "rules.toml").write_text('[[rule]]\npattern = "[a-f]"\n')
    inputs = [f"news number {i}" for i in range(20)]
    with training_progress(Console(file=io.StringIO())) as progress:
        rules, folder = tmp_path / "rules.toml", str(place / "model")
        yield frontier_real.Habit(
            tmp_path / "about", progress, 0, "about", folder, rules, inputs, CURVES
        )


def test_no_method_is_asked_twice_and_each_has_its_folder():
    edits = [edit for edits in frontier_real.CURVES.values() for edit in edits]
    assert len({edit.folder for edit in edits}) == len(edits)
    # But for one, which wants more updates, other rates and adapters they are methods of the other
    # frontier.
    own = {"TNFF, sets, sampled", *(f"TNRF, sets, rate {x:g}" for x in frontier_real.RATES)}
    own |= {name for name in frontier_real.CURVES if name.endswith(", adapter")}
    assert frontier_real.CURVES.keys() - frontier.CURVES.keys() == own


@pytest.mark.slow
def test_all_of_it_on_a_tiny_model(habit, monkeypatch):
    monkeypatch.setattr(frontier, "GROUP", 16)
    with jax.numpy_dtype_promotion("standard"):
        results, near = frontier.measured([habit], CURVES)
    assert [row.curve for row in results.rows] == ["ours", "ours", "theirs", "theirs"]
    json.dumps(frontier.told(results, CURVES, near), allow_nan=False)
    assert "prevalence_stated" in results.before


def test_the_time_of_an_edit_is_told_but_of_one_that_was_begun_before(habit):
    whole, begun = habit.edits[:2]
    (habit.directory / begun.folder).mkdir()
    with jax.numpy_dtype_promotion("standard"):
        for edit in (whole, begun):
            habit.edited(edit)
    seconds = {
        edit: habit.once(f"{edit.folder}-seconds", dict)["seconds"] for edit in habit.edits[:2]
    }
    assert seconds[whole].value > 0
    assert math.isnan(seconds[begun].value)
    with jax.numpy_dtype_promotion("standard"):
        assert habit.edited(whole).history
    assert habit.once(f"{whole.folder}-seconds", dict)["seconds"] == seconds[whole]


def test_an_adapter_is_merged_before_it_is_measured(habit):
    edit = frontier.Edit("ul", on_sampled=True, steps=2, rank=1, learning_rate=1e-2)
    with jax.numpy_dtype_promotion("standard"):
        edited = habit.edited(edit).params
    changes = jax.tree.map(
        lambda a, b: np.asarray(a) - np.asarray(b), edited, habit.original.params
    )
    ranks = [np.linalg.matrix_rank(x, tol=1e-6) for x in jax.tree.leaves(changes) if x.any()]
    assert ranks
    assert set(ranks) == {1}


def test_what_is_learnt_from_and_what_is_measured(habit):
    marked, held_out = habit.marked[True], habit.outputs
    later = {shown: habit.later(shown=shown) for shown in (True, False)}
    # Inputs are of one use each.
    used = [{e.inputs for e in part} for part in (marked, held_out, later[True])]
    assert [len(part) for part in used] == [6, 5, 3]
    assert len(set.union(*used)) == 14
    # What was marked has a correction that has nothing to mark; what is learnt later has no marks.
    assert any(e.spans for e in marked)
    for e in marked:
        assert bool(e.spans) == (e.corrected is not None)
        whole_words = re.sub(r"\w*$", "", e.corrected or "", count=1)
        assert not find_spans(habit.rule, e.inputs, whole_words)
    assert not any(any(e.marked) for part in later.values() for e in part)
    assert any(find_spans(habit.rule, e.inputs, e.outputs) for e in later[True])
    assert not any(find_spans(habit.rule, e.inputs, e.outputs) for e in later[False])
