"""What is left on inputs held out, closeness there, and when training stops by them."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import test_train
from editing_samples import example, logits, tiny_model, tiny_params

from t5patches.editing import train as train_module
from t5patches.editing.data import to_arrays
from t5patches.editing.held_out import (
    HeldOut,
    Look,
    held_out_examples,
    held_out_inputs,
    verdict,
)
from t5patches.editing.plan import plan_memory
from t5patches.editing.train import (
    Batches,
    Step,
    TrainSettings,
    cache_teacher,
    finished_run,
    train,
)
from t5patches.model.lora import Lora
from t5patches.model.tokenizer import messages_of

pytestmark = pytest.mark.usefixtures("shared_programs")

MODEL = tiny_model(dropout_rate=0.1)


def looks(*pairs):
    return [Look(10 * i, left, kl) for i, (left, kl) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("pairs", "best", "why"),
    [
        ([(0.5, 0)], 0, None),
        # At first both move, and for as long as less is left training goes on.
        ([(0.5, 0), (0.4, 0.1), (0.3, 0.2), (0.2, 0.3), (0.19, 0.9)], 4, None),
        ([(0.5, 0), (0.4, 0.1), (0.02, 0.2)], 2, "reached"),
        # The first look may find it so.
        ([(0.01, 0)], 0, "reached"),
        ([(0.5, 0), (0.2, 0.1), *[(0.3, 0.2), (0.2, 0.3)] * 2], 1, None),
        ([(0.5, 0), (0.2, 0.1), *[(0.3, 0.2), (0.2, 0.3)] * 2, (0.21, 0.2)], 1, "closeness"),
        # No less is left, but the model comes closer again.
        ([(0.5, 0), (0.2, 0.3), *[(0.3, 0.2)] * 9], 1, None),
        ([(0.5, 0), (0.2, 0.3), *[(0.3, 0.4)] * 3, (0.2, 0.2), *[(0.21, 0.4)] * 4], 1, None),
        ([(0.5, 0), *[(0.6, 0.3), (0.6, 0.4)] * 3], 0, "closeness"),
    ],
)
def test_training_stops_when_it_is_reached_or_closeness_turns(pairs, best, why):
    assert verdict(looks(*pairs), 0.02) == (best, why)


def many(count, marked, samples=1):
    made = [
        example(f"news {i}", "a fire in Paris", *(["Paris"] if i < marked else []))
        for i in range(count)
    ]
    return list(itertools.chain.from_iterable([e] * samples for e in made))


def test_a_tenth_of_the_inputs_is_held_out_with_all_outputs_to_them():
    examples = many(60, 40, samples=3)
    chosen = held_out_inputs(examples, seed=0)
    assert len(set(chosen)) == len(chosen) == 6
    by_input = {messages_of(e.inputs): any(e.marked) for e in examples}
    assert sum(by_input[inputs] for inputs in chosen) == 4
    assert chosen == held_out_inputs(examples[::-1], seed=0)
    assert chosen != held_out_inputs(examples, seed=1)
    held = held_out_examples(examples, chosen)
    assert len(held) == 18
    assert {messages_of(e.inputs) for e in held} == set(chosen)
    # No more than training has time to look at: an output to each input before a second.
    big = many(1000, 900, samples=5)
    chosen = held_out_inputs(big, seed=0)
    held = held_out_examples(big, chosen)
    assert (len(chosen), len(held)) == (64 + 10, 256)
    counts = {}
    for e in held:
        counts[e.input_ids] = counts.get(e.input_ids, 0) + 1
    assert set(counts.values()) == {3, 4}
    with pytest.raises(ValueError, match="something marked, and there are 1: give more data"):
        held_out_inputs(many(20, 1), seed=0)


def test_marked_outputs_are_looked_at_before_the_others_to_their_input():
    examples = [*many(20, 0, samples=150), *many(20, 20, samples=2)]
    held = held_out_examples(examples, held_out_inputs(examples, seed=0))
    assert (len(held), sum(any(e.marked) for e in held)) == (256, 4)


def lucky_too():
    """With a set where the token that was said is none of the unwanted."""
    first, second, third, fourth = test_train.examples()
    return [first, second, dataclasses.replace(third, negatives={0: (5, 6)}), fourth]


def test_what_is_measured_is_the_mass_of_the_sets_and_the_divergence_of_the_rest(tmp_path):
    arrays = to_arrays(lucky_too(), pad_id=0, negatives=3)
    params, original = tiny_params(0), tiny_params(1)
    teacher = cache_teacher(tmp_path, MODEL, original, arrays, batch_size=3, dtype="float32")
    watch = HeldOut(MODEL, arrays, teacher, until=0.1, batch_size=3)
    watch.look(20, params, None, MODEL.head_params(original))
    of_model = jax.jit(functools.partial(logits, tiny_model()))
    z, r = (np.asarray(of_model(p, arrays), np.float64) for p in (params, original))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (z, r))
    ids, weights = arrays["edit_ids"], arrays["weights"]
    marked = weights < 0
    marked[2, 0] = False
    mass = [sum(p[(*at, i)] for i in set(ids[tuple(at)]) - {-1}) for at in np.argwhere(marked)]
    kl = (q * np.log(q / p)).sum(-1)[weights > 0]
    (look,) = watch.looks
    assert look.step == 20
    assert look.left == pytest.approx(np.mean(mass), rel=1e-4)
    assert look.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert max(len(set(x) - {-1}) for x in ids[weights < 0]) == 3
    nowhere = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    with pytest.raises(FloatingPointError, match="after 30 updates nan is left on inputs held out"):
        watch.look(30, nowhere, None, MODEL.head_params(original))


SETTINGS = TrainSettings(
    objective="tnff", negatives=3, steps=10, batch_size=2, checkpoint_every=5, learning_rate=1e-2,
    until=0.001,
)  # fmt: skip


@pytest.fixture
def often(monkeypatch):
    """A look at every second update."""
    monkeypatch.setattr(train_module, "CHECK_EVERY", 2)


def run(directory, settings=SETTINGS, **changes):
    examples = lucky_too()
    arguments = {
        "model": MODEL,
        "params": tiny_params(),
        "arrays": to_arrays(examples, pad_id=0, negatives=settings.negatives),
        "held_out": to_arrays(
            [example("a fire", "the fire in Paris", "Paris"), examples[1]], pad_id=0, negatives=2
        ),
    }
    return train(settings=settings, directory=directory, **arguments | changes)


def test_a_run_stops_and_keeps_its_best_state_also_when_it_was_killed(often, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    assert [look.step for look in whole.looks] == list(range(0, 11, 2))
    assert whole.looks[0].kl == pytest.approx(0, abs=1e-6)
    lefts = [look.left for look in whole.looks]
    assert lefts[-1] < lefts[0]
    arrays = to_arrays(lucky_too(), pad_id=0, negatives=3)
    for step, marked in enumerate(whole.history["marked"]):
        batch = Batches(arrays, SETTINGS, 0).at(step)
        assert marked == (batch["weights"] < 0).sum() - (batch["edit_ids"][:, 0, 0] == 5).sum()
    # Reached at the third look of the same run: it ends there, with that state.
    early = dataclasses.replace(SETTINGS, until=sorted(lefts)[-3])
    first = next(i for i, left in enumerate(lefts) if left <= early.until)
    assert 0 < first < 6
    with monkeypatch.context() as patched:
        real = Batches.at
        stop = 2 * first - 1

        def killed(self, step):
            if step == stop:
                raise KeyboardInterrupt
            return real(self, step)

        patched.setattr(Batches, "at", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "early", early)
    assert finished_run(tmp_path / "early", tiny_params()) is None
    stopped = run(tmp_path / "early", early)
    assert stopped.looks == whole.looks[: first + 1]
    assert stopped.history["loss"] == whole.history["loss"][: 2 * first]
    found = finished_run(tmp_path / "early", tiny_params())
    assert test_train.equal(found.params, stopped.params)
    assert list(found.looks) == stopped.looks
    with pytest.raises(ValueError, match=r"differs in until"):
        run(tmp_path / "early", SETTINGS)
    with pytest.raises(ValueError, match=r"differs in held_out"):
        run(tmp_path / "early", early, held_out=to_arrays(test_train.examples(), pad_id=0))
    assert run(tmp_path / "early", dataclasses.replace(early, steps=20)).looks == stopped.looks
    # Nothing is left to do.
    with pytest.raises(ValueError, match=r"0\.00\d+ is left before any update, and until is 0\.9"):
        run(tmp_path / "none", dataclasses.replace(early, until=0.9))


def test_the_state_that_is_kept_is_the_best_and_not_the_last(often, tmp_path, monkeypatch):
    seen = []

    def look(self, step, trained, base, original):
        seen.append(jax.device_get(trained))
        left = [0.5, 0.2, *[0.3] * 5][len(seen) - 1]
        self.looks.append(Look(step, left, 0.1 * len(seen)))
        if left == 0.2:
            self.best = seen[-1]

    monkeypatch.setattr(HeldOut, "look", look)
    trained = run(tmp_path / "run", dataclasses.replace(SETTINGS, steps=20))
    assert [found.step for found in trained.looks] == [0, 2, 4, 6, 8, 10, 12]
    assert test_train.equal(trained.params, seen[1])
    assert not test_train.equal(trained.params, seen[-1])
    assert test_train.equal(finished_run(tmp_path / "run", tiny_params()).params, seen[1])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"objective": "ul", "average": 0.5},
    {"objective": "ul", "lora": Lora(2)},
    {"objective": "tnrf", "lora": Lora(2)},
    {"objective": "ul", "lora": Lora(2), "own": True},
    {"objective": "tnff", "lora": Lora(2), "own": True},
    {"objective": "tnff", "own": True, "average": 0.9},
])  # fmt: skip
def test_closeness_is_to_the_original_whatever_is_trained(often, tmp_path, changes):
    own = {"original": tiny_params(1)} if changes.pop("own", False) else {}
    trained = run(tmp_path / "run", dataclasses.replace(SETTINGS, **changes), **own)
    first = trained.looks[0]
    assert (first.kl == pytest.approx(0, abs=1e-6)) != bool(own)
    assert trained.looks[1].kl > 1e-5
    assert trained.looks[1].left != first.left
    found = finished_run(tmp_path / "run", trained.params)
    assert test_train.equal(found.params, trained.params)


UNLIKELY = TrainSettings(objective="ul", steps=10, batch_size=2, until=0.1)


def test_only_the_originals_head_is_held_to_measure_closeness():
    step = Step(MODEL, UNLIKELY, to_arrays(test_train.examples(), pad_id=0))
    (head,) = jax.tree.leaves(step.place(tiny_params(), tiny_params(1)))
    np.testing.assert_array_equal(head, *jax.tree.leaves(MODEL.head_params(tiny_params(1))))


@pytest.mark.slow
def test_the_best_state_is_planned_where_it_lies_in_the_same_memory():
    step = Step(MODEL, UNLIKELY, to_arrays(test_train.examples(), pad_id=0))
    plan = plan_memory(step, UNLIKELY)
    assert plan.copies == plan.parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"until": 0.0}, r"until is 0\.0: a probability above 0"),
        ({"until": 1.5}, r"until is 1\.5: a probability"),
        ({"until": 0.1, "steps": 15}, "looks at every 10th update: give a multiple of 10"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**changes)


def test_until_and_held_out_go_together(often, tmp_path):
    for settings, held in ((SETTINGS, None), (dataclasses.replace(SETTINGS, until=None), {})):
        with pytest.raises(ValueError, match="until and held_out go together"):
            run(tmp_path / "run", settings, held_out=held)
    clean = example("a fire", "the fire in Paris")
    for held in (clean, dataclasses.replace(clean, negatives={0: (5, 6)})):
        with pytest.raises(ValueError, match="nothing that was said is pushed down"):
            run(tmp_path / "run", held_out=to_arrays([held], pad_id=0, negatives=2))
    assert not (tmp_path / "run").exists()
