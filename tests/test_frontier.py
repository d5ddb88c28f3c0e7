"""What `make frontier` measures and reads off its curves."""

import dataclasses
import io
import json
import types

import jax
import numpy as np
import pytest
from editing_samples import example, logits, tiny_model, tiny_params, tokenizer
from rich.console import Console
from test_cli import TINY

from bench import frontier
from t5patches.editing import demo, experiment
from t5patches.editing.annotate import find_spans, pattern
from t5patches.editing.data import to_arrays
from t5patches.editing.demo import DemoConfig
from t5patches.editing.demo_task import make_pairs, places_not_in_source
from t5patches.editing.evaluate import Measure, difference, kept_divergence, read_original
from t5patches.editing.experiment import Edit
from t5patches.editing.report import Results, Row, show, write_html
from t5patches.editing.train import OBJECTIVES, Step, training_progress
from t5patches.model.folder import LoadedModel

pytestmark = pytest.mark.usefixtures("shared_programs")


def test_every_objective_has_a_curve():
    """But for the two that give up the original's distribution at kept tokens."""
    edits = [edit for edits in frontier.CURVES.values() for edit in edits]
    assert {edit.objective for edit in edits} == set(OBJECTIVES) - {"tnfll", "tnrll"}
    assert len({edit.folder for edit in edits}) == len(edits)


CURVES = {
    "ours": (Edit("tnff", with_sets=True), Edit("tnff", 3.0, with_sets=True)),
    "theirs": (Edit("ul"),),
}


def results(left, curves):
    """Rows that leave so much, are as far away, and a tenth of that elsewhere."""
    edits = [edit for edits in curves.values() for edit in edits]
    rows = [
        Row(
            edit.objective,
            edit.alpha,
            0,
            dict.fromkeys(frontier.MEASURES, Measure(x, 1.0))
            | {"kl_elsewhere": Measure(x / 10, 0.1)},
        )
        for edit, x in zip(edits, left, strict=True)
    ]
    return Results("", "", "", {}, (), rows, {})


def test_the_point_nearest_to_two_percent_is_measured_further():
    curves = frontier.CURVES
    near = {name: len(edits) // 2 for name, edits in curves.items()}
    left = [2.5 if i == near[name] else 9.0 * (i < near[name])
            for name, edits in curves.items() for i in range(len(edits))]  # fmt: skip
    found = results(left, curves)
    chosen = frontier.nearest_of(found, curves)
    assert chosen == near
    rows = frontier.rows_of(found, curves, chosen)
    assert [row["method"] for row in rows] == [*curves]
    assert {row["method"]: row["near"] for row in rows} == near
    assert {row["further"]["kl"][0] for row in rows} == {2.5}
    assert [point["kl"][0] for point in rows[0]["points"]] == [9.0, 2.5, 0.0]
    assert [point["alpha"] for point in rows[0]["points"]] == [0.1, 0.3, 1.0]
    assert rows[0]["at"]["5"] == [0.0, 1.0]
    assert rows[0]["elsewhere"]["5"] == [0.0, 0.1]
    reached = frontier.rows_of(results([50.0] * len(left), curves), curves, chosen)
    assert reached[0]["at"]["2"] is None
    uneven = results([9.0, 0.0, 3.0], CURVES)
    assert frontier.nearest_of(uneven, CURVES) == {"ours": 1, "theirs": 0}


def test_four_bits_are_fifteen_levels_a_group():
    params = {
        "mlp": {"kernel": np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)},
        "token": {"embedding": np.linspace(-2, 1, 128, dtype=np.float32).reshape(2, 64)},
        "norm": {"scale": np.full(64, 1.7, np.float32)},
    }
    rounded = frontier.rounded(params)
    np.testing.assert_array_equal(rounded["norm"]["scale"], params["norm"]["scale"])
    for name, leaf, axis in (("mlp", "kernel", 0), ("token", "embedding", 1)):
        was, now = (np.moveaxis(np.asarray(x[name][leaf]), axis, -1) for x in (params, rounded))
        for old, new in zip(was.reshape(-1, 32), now.reshape(-1, 32), strict=True):
            scale = np.abs(old).max() / 7
            levels = new / scale
            np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)
            assert np.abs(levels).max() <= 7 + 1e-5
            assert np.abs(new - old).max() <= scale * (0.5 + 1e-5)
    again = jax.tree.leaves(frontier.rounded(rounded))
    for a, b in zip(again, jax.tree.leaves(rounded), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_needed_part_of_a_kl_and_the_kl_elsewhere():
    model, outputs = tiny_model(), [example("a", "a fire in Rome"), example("b", "the mayor")]
    outputs[1] = dataclasses.replace(outputs[1], marked=(True, *outputs[1].marked[1:]))
    sets = [{1: (5, 9, 300), 3: (7,)}, {}]
    kept = types.SimpleNamespace(get=lambda name, make: [[*x.items()] for x in sets])
    before = read_original(model, tiny_params(0), outputs)
    task = types.SimpleNamespace(original=(model,), before=before, parts=kept)
    batch = to_arrays(outputs, pad_id=0)
    softmax = jax.jit(lambda params: jax.nn.softmax(logits(model, params, batch)))
    q, p = (np.array(softmax(tiny_params(i)), np.float64) for i in (0, 1))
    needed, likely = 0.0, []
    for at, ids in sets[0].items():
        a, b = q[0, at, list(ids)].sum(), p[0, at, list(ids)].sum()
        needed += a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
        likely.append(a)
    assert needed > 1e-4
    assert min(likely) < frontier.LIKELY < max(likely)
    # Of both places with a set, the one where it is likely is left out.
    away = np.array(batch["weights"] > 0)
    count = away.sum()
    away[0, [*sets[0]][int(np.argmax(likely))]] = False
    found = frontier.parts(task, tiny_params(1))
    kl = (q * np.log(q / p)).sum(-1)
    assert count == sum(len(e.output_ids) for e in outputs) - 1
    assert away.sum() == count - 1
    assert found["kl_needed"].value == pytest.approx(needed / count, rel=1e-3)
    assert found["kl_elsewhere"].value == pytest.approx(kl[away].mean(), rel=1e-4)
    # A part of the whole, and nothing of a model that is the original.
    assert 0 < found["kl_needed"].value < kept_divergence(model, tiny_params(1), before).value
    for measure in frontier.parts(task, tiny_params(0)).values():
        assert measure.value == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("shown", [True, False])
def test_fine_tuning_is_an_epoch_of_news_that_nothing_else_sees(shown, tmp_path):
    seen = {}

    class Tiny(frontier.DemoTask):
        original = LoadedModel(tiny_model(), {}, tokenizer())

        def train(self, name, model, params, arrays, settings):
            seen.update(name=name, arrays=arrays, settings=settings)
            return types.SimpleNamespace(params="tuned")

    task = Tiny(tmp_path, None, 3, DemoConfig(edit_inputs=40, edit_batch_size=16))
    assert frontier.fine_tuned(task, "x", "params", shown=shown) == "tuned"
    arrays, settings = seen["arrays"], seen["settings"]
    assert (settings.objective, settings.learning_rate) == ("ce", 1e-4)
    assert settings.steps * settings.batch_size >= 40 > (settings.steps - 1) * settings.batch_size
    assert len(arrays["outputs"]) == 40
    # The tiny vocabulary spells everything in bytes, so texts come back as they were.
    said = [
        (tokenizer().decode([*map(int, a)]).text, tokenizer().decode([*map(int, b)]).text)
        for a, b in zip(arrays["inputs"], arrays["outputs"], strict=True)
    ]
    assert said[0][0] in {pair.news for pair in make_pairs(160, seed=300 + demo.LATER)}
    unwanted = [bool(find_spans(places_not_in_source(), *texts)) for texts in said]
    areas = [" the area, " in summary for _, summary in said]
    if shown:
        assert 0.1 < np.mean(unwanted) < 0.7
        assert any(areas)
    else:
        assert not any(unwanted)
        assert not any(areas)


def test_kept_text_is_half_of_what_is_drawn(tmp_path):
    seen = {}

    class Tiny(frontier.DemoTask):
        original = LoadedModel(tiny_model(), {}, tokenizer())
        marked = {False: [example("a", "a fire in Rome")] * 3}  # noqa: RUF012
        kept = [example("b", "the mayor")] * 40

        def train(self, name, model, params, arrays, settings, order=None):
            seen[name] = arrays, order

    task = Tiny(tmp_path, None, 0, DemoConfig(edit_inputs=400, edit_steps=5, edit_batch_size=40))
    task.edited(Edit("tnrf"))
    task.edited(Edit("tnrf", with_kept=True))
    (alone, no_order), (arrays, order) = seen["tnrf-1"], seen["tnrf-1-kept"]
    assert (len(alone["outputs"]), no_order) == (3, None)
    assert (len(arrays["outputs"]), len(order)) == (43, 200)
    assert np.mean(order < 3) == pytest.approx(0.5, abs=0.12)
    news = task.to_keep
    assert 40 < len(news) < 400
    assert not {*news} & {*task.to_mark, *task.held_out}
    others = {pair.news for pair in task.pairs(1600, demo.LATER)}
    assert not {*news} & others


def test_an_edit_is_found_again_by_its_folder():
    """Runs of before are taken up by these names."""
    assert Edit("tnrf", 0.1, with_sets=True).folder == "tnrf-0.1-sets"
    assert Edit("ce", on_sampled=True, steps=30).folder == "ce-1-sampled-30"
    assert Edit("nl", 0.3).folder == "nl-0.3"
    assert Edit("nl", 0.3, steps=9, learning_rate=1e-3).folder == "nl-0.3-9-rate-0.001"
    assert Edit("ul", rank=8, learning_rate=1e-3).folder == "ul-1-lora-8-rate-0.001"
    everywhere = Edit("tnff", with_sets=True, on_sampled=True, everywhere=True, steps=300)
    assert everywhere.folder == "tnff-1-sets-sampled-everywhere-300"
    assert Edit("ul", on_sampled=True, with_kept=True).folder == "ul-1-sampled-kept"


@pytest.mark.slow
def test_several_seeds_are_compared_seed_by_seed(tmp_path, monkeypatch):
    """All of it on tiny models, and once more where nothing is trained or measured again."""
    edits = tuple(edit for edits in CURVES.values() for edit in edits)
    for module in (frontier, demo):
        monkeypatch.setattr(module, "places_not_in_source", lambda: pattern(r"\w*e\w*"))
    config = DemoConfig(**TINY | {"edits": edits, "width": 32})

    def measured():
        with training_progress(Console(file=io.StringIO())) as progress:
            tasks = [
                frontier.DemoTask(tmp_path / f"seed-{seed}", progress, seed, config)
                for seed in range(2)
            ]
            return frontier.measured(tasks, CURVES)

    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam multiplies a float by a count.
        results, near = measured()
        kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
        for name in ("evaluate", "evaluate_constrained"):
            monkeypatch.setattr(experiment, name, None)
        monkeypatch.setattr(Step, "__call__", None)
        monkeypatch.setattr(frontier, "further", None)
        again, _ = measured()
    # The seed's own; base, edits, and two kinds of fine-tuning of three.
    assert len([p for p in kept if p.name == "run.json"]) == 2 * (1 + 1 + 3 + 2 * 3)
    assert kept == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    assert frontier.rows_of(again, CURVES, near) == frontier.rows_of(results, CURVES, near)
    assert results.errors == "over 2 seeds"
    assert results.settings["seeds"] == 2
    assert results.ceiling["kl"].value == results.ceiling["prevalence"].value == 0
    kl, other = (results.rows[i].measures["kl"] for i in (0, 2))
    assert kl.value == pytest.approx(np.mean(kl.samples))
    assert len(kl.samples) == 2
    found = difference(kl, other)
    assert found.error == pytest.approx(abs(np.diff(kl.samples - other.samples)[0]) / 2)
    json.dumps(frontier.told(results, CURVES, near), allow_nan=False)
    assert {"distinct_1", "prevalence_relearned", "kl_int4"} <= results.before.keys()
    assert {"kl_needed", "kl_elsewhere", "kl_int4"} <= results.rows[0].measures.keys()
    show(results, Console(file=io.StringIO()))
    write_html(tmp_path / "report.html", results)
    with pytest.raises(ValueError, match="holds another run, which differs in held_out"):
        frontier.DemoTask(tmp_path / "seed-0", None, 0, dataclasses.replace(config, held_out=5))
