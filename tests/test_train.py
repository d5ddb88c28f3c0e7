"""Training: the right loss, the frozen original, and runs that survive being killed."""

import dataclasses
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from editing_samples import example, logits, tiny_model, tiny_params
from harness import slow_unless
from rich.console import Console

import t5patches_kernels as kernels
from t5patches.editing import train as train_module
from t5patches.editing.data import Example, to_arrays
from t5patches.editing.plan import plan_memory
from t5patches.editing.states import States
from t5patches.editing.train import (
    TARGETED,
    Batches,
    Step,
    TrainSettings,
    finished_run,
    token_loss,
    train,
    training_progress,
)
from t5patches.model.lora import Lora
from t5patches.model.placement import make_mesh
from t5patches.runs.fingerprints import fingerprint

pytestmark = pytest.mark.usefixtures("shared_programs")

# Dropout, so that a resumed run must also draw what the unbroken one drew.
MODEL = tiny_model(dropout_rate=0.1)
SETTINGS = TrainSettings(steps=6, batch_size=3, checkpoint_every=2, learning_rate=1e-2)


def examples() -> list[Example]:
    marked = example("news of a fire", "a fire in Paris", "Paris")
    position = marked.marked.index(True)
    return [
        dataclasses.replace(marked, negatives={position: (9, 8)}),
        example("news of a flood", "a flood in New York", "New York"),
        example("other news", "the mayor sold the bridge"),
        example("more news", "Rome is near", "Rome"),
    ]


def equal(a, b) -> bool:
    return jax.tree.all(
        jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        trained = train(
            MODEL,
            tiny_params(),
            to_arrays(examples(), pad_id=0),
            SETTINGS,
            directory,
            original=tiny_params(1),
        )
    return directory, trained


def again(directory, **changes):
    """The same run, with some of it changed."""
    arguments = {
        "model": MODEL,
        "params": tiny_params(),
        "arrays": to_arrays(examples(), pad_id=0),
        "settings": SETTINGS,
        "original": tiny_params(1),
    }
    return train(directory=directory, **arguments | changes)


# The loss.


def dense_loss(objective, logits, frozen, batch, settings):
    targets, weights = batch["outputs"], batch["weights"]
    common = {"z_loss": settings.z_loss, "implementation": "reference"}
    edits = kernels.Edits(batch["edit_ids"], batch["edit_factors"]) if settings.negatives else None
    if objective in TARGETED:
        return kernels.targeted_negative_loss(
            logits,
            frozen,
            targets,
            weights,
            objective=objective,
            alpha=settings.alpha,
            smoothing=settings.spread / logits.shape[-1],
            edits=edits,
            **common,
        )
    if objective == "ul":
        loss = functools.partial(kernels.unlikelihood_loss, edits=edits)
    elif objective == "nl":
        loss = functools.partial(kernels.negative_likelihood_loss, threshold=settings.threshold)
    else:
        smoothed = functools.partial(
            kernels.cross_entropy_loss, label_smoothing=settings.label_smoothing
        )
        return smoothed(logits, targets, weights, **common)
    return loss(logits, targets, weights, alpha=settings.alpha, **common)


@pytest.mark.parametrize(
    ("objective", "tied"),
    [slow_unless((i + 2 * tied) % 4 == 0, objective, tied)
     for i, objective in enumerate(kernels.TRAINING_OBJECTIVES) for tied in (False, True)],
)  # fmt: skip
def test_the_loss_is_that_of_the_logits(objective, tied):
    model = tiny_model(logits_via_embedding=tied)
    params, original = tiny_params(0), tiny_params(1)
    settings = TrainSettings(
        objective=objective,
        alpha=1.0 if objective == "ce" else 3.0,
        negatives=0 if objective in ("nl", "ce") or tied else 2,
        z_loss=1e-2,
        label_smoothing=0.1 if objective == "ce" else 0.0,
        spread=0.1,
        threshold=-5.8,
        implementation="reference",
    )
    batch = to_arrays(examples(), pad_id=0, negatives=settings.negatives)
    if objective == "ce":
        batch["weights"] = np.abs(batch["weights"])
    got = token_loss(model, params, original, batch, settings)
    dense, frozen = (logits(model, p, batch) for p in (params, original))
    want = dense_loss(objective, dense, frozen, batch, settings)
    counts = batch["weights"] != 0
    for name in ("loss", "z_loss", "log_prob", "correct"):
        found = np.where(counts, getattr(want, name), 0)
        np.testing.assert_allclose(getattr(got, name), found, rtol=1e-5, atol=1e-6)


def test_a_targeted_loss_needs_the_original():
    with pytest.raises(ValueError, match="tnff needs the parameters of the original model"):
        token_loss(MODEL, tiny_params(), None, to_arrays(examples(), pad_id=0), SETTINGS)


def test_the_original_is_an_argument_of_the_compiled_step():
    batch = to_arrays(examples(), pad_id=0)
    state = train_module._State(
        tiny_params(), train_module._optimizer(SETTINGS).init(tiny_params())
    )
    step = functools.partial(train_module.update, model=MODEL, settings=SETTINGS)
    frozen = train_module.Frozen(None, tiny_params(1))
    traced = jax.make_jaxpr(step)(state, frozen, batch, 0, 0)
    largest = max((np.size(c) for c in traced.consts), default=0)
    assert largest < max(np.size(x) for x in jax.tree.leaves(tiny_params()))


# Runs.


def test_a_run_leaves_the_callers_parameters_alone(unbroken):
    _, trained = unbroken
    assert not equal(trained.params, tiny_params())
    # Both are still there: donated memory would raise here.
    assert np.isfinite(sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tiny_params(0))))
    assert np.isfinite(sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tiny_params(1))))


def test_the_history_counts_what_was_marked(unbroken):
    _, trained = unbroken
    assert set(trained.history) == {"loss", "marked", "said"}
    assert {len(values) for values in trained.history.values()} == {SETTINGS.steps}
    arrays = to_arrays(examples(), pad_id=0)
    for step in range(SETTINGS.steps):
        batch = Batches(arrays, SETTINGS, 0).at(step)
        assert trained.history["marked"][step] == (batch["weights"] < 0).sum()
        assert 0 <= trained.history["said"][step] <= trained.history["marked"][step]


def test_a_run_that_was_killed_ends_where_an_unbroken_one_does(unbroken, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    taken = []

    def at(self, step, real=Batches.at):
        taken.append(step)
        if taken == [0, 1, 2, 3, 4, 5]:
            raise Killed
        return real(self, step)

    monkeypatch.setattr(Batches, "at", at)
    with pytest.raises(Killed):
        again(tmp_path / "run")
    assert finished_run(tmp_path / "run", tiny_params()) is None
    resumed = again(tmp_path / "run")
    assert taken[6:] == [4, 5]  # from the checkpoint, in the same order
    assert equal(resumed.params, unbroken[1].params)
    assert resumed.history == unbroken[1].history


def test_a_run_gets_more_steps_and_ends_where_a_longer_one_does(unbroken, tmp_path):
    order = np.arange(18) % 4
    ordered = again(tmp_path / "ordered", order=order)
    with pytest.raises(ValueError, match=r"differs in order \(.* there, None asked for\)"):
        again(tmp_path / "ordered")
    for name, more, whole in (("a", {}, unbroken[1]), ("b", {"order": order}, ordered)):
        first = {key: x[:12] for key, x in more.items()}
        shorter = dataclasses.replace(SETTINGS, steps=4, checkpoint_every=3, chunk_bytes=1 << 20)
        again(tmp_path / name, settings=shorter, **first)
        if more:
            with pytest.raises(ValueError, match=r"differs in order"):
                again(tmp_path / name, order=order[::-1])
        longer = again(tmp_path / name, **more)
        assert equal(longer.params, whole.params)
        assert longer.history == whole.history
        with pytest.raises(ValueError, match=r"differs in steps \(6 there, 4 asked for\)"):
            again(tmp_path / name, settings=shorter, **first)
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert TrainSettings(**run["settings"]) == SETTINGS


CHILD = """
import sys
sys.path.insert(0, "tests")
import test_train
test_train.again(sys.argv[1])
"""


def test_a_process_that_was_killed_leaves_a_run_to_go_on_from(unbroken, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "run")])
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "2").exists():
        assert child.poll() is None or child.returncode == 0
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    # The child may have been faster than the signal.
    finished = finished_run(tmp_path / "run", tiny_params())
    resumed = finished or again(tmp_path / "run")
    assert equal(resumed.params, unbroken[1].params)
    assert resumed.history == unbroken[1].history


def test_a_finished_run_is_loaded_and_never_overwritten(unbroken, tmp_path):
    directory, trained = unbroken
    found = finished_run(directory, tiny_params())
    assert equal(found.params, trained.params)
    assert found.history == trained.history
    assert equal(again(directory).params, trained.params)
    assert finished_run(tmp_path, tiny_params()) is None


@pytest.mark.parametrize("how", ["removed", "empty", "halved"])
def test_a_spoilt_state_is_refused_in_words(how, tmp_path):
    like = {"params": {"x": jnp.ones((64, 64))}}
    with States(tmp_path) as states:
        states.save(2, like, {"history": {}})
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for file in files:
        content = file.read_bytes()
        file.write_bytes(b"" if how == "empty" else content[: len(content) // 2])
        if how == "removed":
            file.unlink()
    with (
        States(tmp_path) as states,
        pytest.raises(ValueError, match=r"cannot be read .* it is spoilt"),
    ):
        states.restore(like, "history")


def test_a_state_of_another_version_is_refused_in_words(tmp_path):
    with States(tmp_path) as states:
        states.save(2, {"state": {"x": np.ones(2)}}, {"history": {}})
        assert list(states.restore({}, "history")) == ["history"]
        for like in ({"params": {"x": np.ones(2)}}, {"state": {"y": np.ones(2)}}):
            with pytest.raises(ValueError, match=r"cannot be read .* of another version of t5pat"):
                states.restore(like, "history")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"settings": dataclasses.replace(SETTINGS, alpha=2.0)},
            "alpha (1.0 there, 2.0 asked for)",
        ),
        ({"model": tiny_model(dropout_rate=0.2)}, "dropout_rate (0.1 there, 0.2 asked for)"),
        ({"params": tiny_params(2)}, "params ("),
        # The edited parameters must not become the teacher.
        ({"original": tiny_params(2)}, "original ("),
        ({"arrays": to_arrays(examples()[:3], pad_id=0)}, "data ("),
    ],
)
def test_another_run_is_refused(unbroken, changes, named):
    with pytest.raises(ValueError, match=re.escape(f"differs in {named}")) as error:
        again(unbroken[0], **changes)
    assert "choose another directory" in str(error.value)


def test_the_original_defaults_to_the_start(unbroken, tmp_path, monkeypatch):
    described = []
    monkeypatch.setattr(train_module, "claim", lambda _, run, **__: described.append(run))
    monkeypatch.setattr(train_module, "States", None)
    for original in (None, tiny_params(0)):
        with pytest.raises(TypeError, match="'NoneType' object"):
            again(tmp_path, original=original)
    assert described[0] == described[1]


def test_all_devices_reach_what_one_does(tmp_path):
    settings = dataclasses.replace(SETTINGS, batch_size=8, learning_rate=1e-3)
    arrays = to_arrays(examples(), pad_id=0)
    mesh = make_mesh(2)  # 4 rows of examples, 2 halves of the vocabulary
    one = again(tmp_path / "one", settings=settings, arrays=arrays)
    many = again(tmp_path / "many", settings=settings, arrays=arrays, mesh=mesh)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, one.params, many.params)
    np.testing.assert_allclose(one.history["loss"], many.history["loss"], rtol=1e-4)
    embedding = many.params["token_embedder"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (165, 16)
    assert equal(finished_run(tmp_path / "many", tiny_params()).params, many.params)


def test_sizes_that_the_devices_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a batch of 3 examples cannot be divided by 8 devices"):
        again(tmp_path, mesh=make_mesh())
    settings = dataclasses.replace(SETTINGS, batch_size=8)
    with pytest.raises(ValueError, match="a vocabulary of 330 cannot be divided by 4 devices"):
        again(tmp_path / "other", settings=settings, mesh=make_mesh(4))
    with pytest.raises(ValueError, match="model_parallel is 3 and there are 8 devices"):
        make_mesh(3)


def test_an_order_decides_which_rows_are_taken(tmp_path, monkeypatch):
    order = np.arange(SETTINGS.steps * SETTINGS.batch_size) % 4
    taken = Batches(to_arrays(examples(), pad_id=0), SETTINGS, 0, order).at(1)
    want = to_arrays(examples(), pad_id=0)["outputs"][[3, 0, 1]]
    np.testing.assert_array_equal(taken["outputs"], want)
    for wrong in (order[:-1], order + 1, order - 1):
        with pytest.raises(ValueError, match=r"order has \d+ places from row .*needed are 18"):
            again(tmp_path, order=wrong)
    described = []
    monkeypatch.setattr(train_module, "claim", lambda _, run, **__: described.append(run))
    monkeypatch.setattr(train_module, "States", None)
    for given in (None, order, order[::-1]):
        with pytest.raises(TypeError, match="'NoneType' object"):
            again(tmp_path, order=given)
    assert "order" not in described[0]
    assert described[1]["order"] != described[2]["order"]


def one_long() -> list[Example]:
    return [*examples(), example("a fire " * 40, "it closed the library in Paris " * 4, "Paris")]


def test_a_batch_is_as_long_as_its_rows_and_few_lengths_are_compiled(tmp_path, monkeypatch):
    arrays = to_arrays(one_long(), pad_id=0)
    settings = dataclasses.replace(SETTINGS, steps=4, batch_size=2, seed=1)
    batches = Batches(arrays, settings, 0)
    longest = arrays["inputs"].shape[1], arrays["outputs"].shape[1]
    shapes = batches.shapes()
    assert len(shapes) == 2
    assert max(shapes) == longest
    assert 4 * min(shapes)[0] < longest[0]
    for step in range(settings.steps):
        batch = batches.at(step)
        assert (batch["inputs"].shape[1], batch["weights"].shape[1]) in shapes
        full = {name: array[batches._rows(step)] for name, array in arrays.items()}
        for name, array in batch.items():
            np.testing.assert_array_equal(array, full[name][:, : array.shape[1]])
            assert not full[name][:, array.shape[1] :].any()
    # Padding changes what comes of it by rounding alone.
    model = tiny_model()
    one = again(tmp_path / "one", model=model, arrays=arrays, settings=settings)
    monkeypatch.setattr(train_module, "_padded", lambda length, longest: longest)
    assert len(Batches(arrays, settings, 0).shapes()) == 1
    other = again(tmp_path / "other", model=model, arrays=arrays, settings=settings)
    np.testing.assert_allclose(one.history["loss"], other.history["loss"], rtol=1e-4)
    assert one.history["marked"] == other.history["marked"]
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
    jax.tree.map(close, one.params, other.params)


def test_batches_of_like_lengths_stay_as_long_as_all():
    arrays = to_arrays(examples(), pad_id=0)
    longest = arrays["inputs"].shape[1], arrays["outputs"].shape[1]
    assert Batches(arrays, SETTINGS, 0).shapes() == {longest: SETTINGS.steps}


def test_lengths_count_what_is_trained_on_even_where_the_model_said_padding():
    arrays = to_arrays(one_long(), pad_id=0)
    arrays["outputs"][:4] = 0  # with weights that are not 0
    arrays["weights"][:4, :60] = 1
    order = np.arange(8) % 4
    batch = Batches(arrays, dataclasses.replace(SETTINGS, batch_size=4, steps=2), 0, order).at(0)
    assert batch["weights"].shape[1] >= 60


@pytest.mark.slow  # test_edit resumes runs of one length
def test_a_run_of_several_lengths_is_resumed_bit_for_bit(tmp_path):
    arrays = to_arrays(one_long(), pad_id=0)
    settings = dataclasses.replace(SETTINGS, steps=4, batch_size=2, seed=1)
    whole = again(tmp_path / "whole", arrays=arrays, settings=settings)
    again(tmp_path / "more", arrays=arrays, settings=dataclasses.replace(settings, steps=2))
    more = again(tmp_path / "more", arrays=arrays, settings=settings)
    assert equal(whole.params, more.params)
    assert whole.history == more.history


def test_progress_shows_loss_what_is_still_likeliest_and_speed(tmp_path):
    out = io.StringIO()
    with training_progress(Console(file=out, width=120)) as progress:
        again(tmp_path / "tnff-here", progress=progress)
    shown = out.getvalue()
    assert "tnff-here" in shown
    assert re.search(r"6/6 loss \d\.\d+, still likeliest \d+%, \d+(\.\d)? examples/s", shown)


def test_cross_entropy_learns_with_adam_and_warm_up(tmp_path):
    arrays = to_arrays(examples(), pad_id=0)
    arrays["weights"] = np.abs(arrays["weights"])
    settings = TrainSettings(
        objective="ce",
        optimizer="adam",
        learning_rate=3e-2,
        warmup_steps=2,
        steps=25,
        batch_size=4,
    )
    # Optax's Adam multiplies a float by an integer count.
    with jax.numpy_dtype_promotion("standard"):
        trained = train(tiny_model(), tiny_params(), arrays, settings, tmp_path / "run")
    assert trained.history["loss"][-1] < 0.5 * trained.history["loss"][0]
    # The rate of the first update is 0.
    assert trained.history["loss"][1] == pytest.approx(trained.history["loss"][0], rel=1e-5)


# Schedules and averages.


def test_the_rate_rises_stays_and_falls():
    def rates(**changes):
        rate = train_module._rate(TrainSettings(learning_rate=1.0, **changes))
        return [float(rate(step)) if callable(rate) else rate for step in range(6)]

    assert rates(warmup_steps=0) == [1] * 6
    assert rates(warmup_steps=2) == [0, 0.5, 1, 1, 1, 1]
    assert rates(schedule="linear", steps=8) == [1 - i / 8 for i in range(6)]
    falling = [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates(schedule="linear", steps=6, warmup_steps=2) == falling
    np.testing.assert_allclose(
        rates(schedule="cosine", steps=6, warmup_steps=2),
        [0, 0.5, *((1 + np.cos(np.pi * i / 4)) / 2 for i in range(4))],
        rtol=1e-6,
    )


FALLING = dataclasses.replace(SETTINGS, schedule="cosine", average=0.7)


def test_only_a_constant_rate_leaves_room_for_more_steps_and_shares_its_program():
    shared = train_module._compiled_with
    longer = [dataclasses.replace(x, steps=60) for x in (SETTINGS, FALLING)]
    assert "steps" in train_module.may_differ(SETTINGS)
    assert shared(SETTINGS) == shared(longer[0])
    assert "steps" not in train_module.may_differ(FALLING)
    assert shared(FALLING) != shared(longer[1])
    shares = [float(train_module._share_of_newest(0.7, step)) for step in range(3)]
    assert shares == pytest.approx([1, 1 / 1.7, 1 / (1 + 0.7 + 0.49)])


def scheduled(*arguments, **changes):
    # Optax's cosine takes the lesser of an integer count and a float.
    with jax.numpy_dtype_promotion("standard"):
        return again(*arguments, **changes)


def with_states(*arguments, **changes):
    """A run, and the parameters after each of its updates."""
    seen = []

    def kept(self, *arguments, real=train_module.Step.__call__):
        state, metrics = real(self, *arguments)
        seen.append(jax.tree.map(np.array, state.params))
        return state, metrics

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_module.Step, "__call__", kept)
        return scheduled(*arguments, **changes), seen


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("averaged") / "run"
    return directory, *with_states(directory, settings=FALLING)


@pytest.mark.slow
def test_the_average_is_of_the_updates_and_not_of_where_they_began(averaged):
    _, trained, states = averaged
    shares = 0.7 ** np.arange(5, -1, -1)
    want = jax.tree.map(lambda *x: np.tensordot(shares / shares.sum(), np.stack(x), 1), *states)
    jax.tree.map(close, trained.params, want)
    with pytest.raises(AssertionError):
        jax.tree.map(close, trained.params, states[-1])


def test_an_average_begins_behind_the_update_of_rate_0_that_a_warm_up_begins_with(tmp_path):
    warmed = dataclasses.replace(SETTINGS, steps=2, warmup_steps=1, objective="ul")
    plain = again(tmp_path / "plain", settings=warmed)
    average = again(tmp_path / "average", settings=dataclasses.replace(warmed, average=0.7))
    assert not equal(plain.params, tiny_params())
    jax.tree.map(close, average.params, plain.params)


@pytest.mark.slow
def test_the_rate_falls_over_the_steps_of_this_run_and_no_other(averaged, tmp_path):
    states = averaged[2]
    two = dataclasses.replace(FALLING, steps=2)
    _, short = with_states(tmp_path / "two", settings=two)
    jax.tree.map(close, short[0], states[0])

    def size(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(float(np.abs(x - y).sum()) for x, y in pairs)

    rates = [(1 + np.cos(np.pi / steps)) / 2 for steps in (2, 6)]
    sizes = [size(x[1], x[0]) for x in (short, states)]
    assert sizes[0] / sizes[1] == pytest.approx(rates[0] / rates[1], rel=0.02)
    # The average over one update is what that has made.
    one = scheduled(tmp_path / "one", settings=dataclasses.replace(FALLING, steps=1))
    jax.tree.map(close, one.params, states[0])


@pytest.mark.slow
def test_a_killed_run_with_an_average_ends_where_an_unbroken_one_does(
    averaged, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        real = Batches.at

        def killed(self, step):
            if step == 5:
                raise KeyboardInterrupt
            return real(self, step)

        patched.setattr(Batches, "at", killed)
        with pytest.raises(KeyboardInterrupt):
            scheduled(tmp_path / "run", settings=FALLING)
    assert finished_run(tmp_path / "run", tiny_params()) is None
    resumed = scheduled(tmp_path / "run", settings=FALLING)
    assert equal(resumed.params, averaged[1].params)
    assert resumed.history == averaged[1].history
    assert equal(finished_run(tmp_path / "run", tiny_params()).params, resumed.params)


@pytest.mark.slow
def test_the_length_of_a_schedule_is_a_fact_of_the_run(averaged):
    longer = dataclasses.replace(FALLING, steps=8)
    with pytest.raises(ValueError, match=r"differs in steps \(6 there, 8 asked for\)"):
        scheduled(averaged[0], settings=longer)
    for changes in ({"schedule": "linear"}, {"average": 0.5}, {"schedule": "constant"}):
        with pytest.raises(ValueError, match=rf"; {next(iter(changes))} \(|in schedule \("):
            scheduled(averaged[0], settings=dataclasses.replace(longer, **changes))


@pytest.mark.slow
def test_a_run_with_an_average_alone_gets_more_steps(tmp_path):
    constant = dataclasses.replace(FALLING, schedule="constant")
    scheduled(tmp_path / "run", settings=dataclasses.replace(constant, steps=4))
    more, whole = (
        scheduled(tmp_path / "run", settings=constant),
        scheduled(tmp_path / "b", settings=constant),
    )
    assert equal(more.params, whole.params)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_the_memory_of_an_average_is_planned(rank):
    lora = None if rank is None else Lora(rank)
    plain = dataclasses.replace(SETTINGS, lora=lora)
    arrays = to_arrays(examples(), pad_id=0)
    without, with_average = (
        plan_memory(Step(tiny_model(), settings, arrays), settings)
        for settings in (plain, dataclasses.replace(plain, average=0.9))
    )
    step = Step(tiny_model(), plain, arrays)
    trained = sum(4 * x.size for x in jax.tree.leaves(step.state.params))
    assert (without.copies, with_average.copies) == (0, trained)
    assert with_average.total - without.total == pytest.approx(trained, abs=0.1 * without.working)
    assert "copies" in with_average.text()
    assert "copies" not in without.text()


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_checkpoint(unbroken, tmp_path):
    arrays = to_arrays(examples(), pad_id=0)
    arrays["outputs"][:, 0] = -1  # no token: the loss is nan by its contract
    with pytest.raises(
        FloatingPointError, match="the loss is nan at step 0: lower learning_rate or alpha"
    ):
        again(tmp_path / "run", arrays=arrays)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "tn"}, "objective is 'tn': one of ('tnff', 'tnrr'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd': one of ('adafactor', 'adam')"),
        ({"steps": 0}, "steps is 0: at least 1 is needed"),
        ({"alpha": -1.0}, "alpha is -1.0: at least 0"),
        ({"alpha": float("nan")}, "alpha is nan: at least 0"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1 and the objective tnff: it is of ce"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: a number above 0 is needed"),
        ({"learning_rate": float("inf")}, "learning_rate is inf: a number above 0 is needed"),
        ({"learning_rate": 1e39}, "1e+39: a number above 0 is needed, as float32 has it"),
        ({"negatives": -1}, "negatives is -1: at least 0"),
        ({"seed": 2**31}, "seed is 2147483648: at most 2147483647 is possible"),
        ({"objective": "undial", "beta": float("inf")}, "beta is inf and the objective undial"),
        ({"schedule": "step"}, "schedule is 'step': one of ('constant', 'linear', 'cosine')"),
        (
            {"schedule": "cosine", "steps": 3, "warmup_steps": 3},
            "warmup_steps is 3 and steps 3: nothing is left for the cosine schedule",
        ),
        (
            {"steps": 1, "warmup_steps": 1},
            "warmup_steps is 1 and steps 1: the first update has a rate of 0",
        ),
        ({"average": 1.0}, "average is 1.0: a decay from 0 (none) to below 1"),
        ({"average": float("nan")}, "average is nan: a decay"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainSettings(**settings)


def test_objectives_that_push_down_one_token_refuse_sets():
    for objective in ("nl", "ce"):
        with pytest.raises(NotImplementedError, match=f"{objective} pushes down one token"):
            TrainSettings(objective=objective, negatives=3)


def test_arrays_must_fit_the_settings(tmp_path):
    with pytest.raises(ValueError, match="negatives is 4 and the arrays have sets of 0 ids"):
        again(tmp_path, settings=dataclasses.replace(SETTINGS, negatives=4))
    with pytest.raises(ValueError, match="negatives is 0 and the arrays have sets of 3 ids"):
        again(tmp_path, arrays=to_arrays(examples(), pad_id=0, negatives=3))
    with pytest.raises(ValueError, match="train on `corrected_examples`"):
        again(tmp_path, settings=dataclasses.replace(SETTINGS, objective="ce"))
    for odd in (np.nan, np.inf, -np.inf):
        arrays = to_arrays(examples(), pad_id=0)
        arrays["weights"][1, 2] = odd
        message = r"weights holds 1 that are not finite, the first at \[1, 2\]"
        with pytest.raises(ValueError, match=message):
            again(tmp_path, arrays=arrays)
    assert not any(tmp_path.iterdir())


def test_fingerprints_tell_values_shapes_types_and_names_apart():
    base = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": base["a"]},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
        {"a": base["a"] + np.float32(1e-7)},
    ]
    assert len({fingerprint(tree) for tree in (base, *others)}) == 5
    assert fingerprint(base) == fingerprint({"a": jnp.zeros((2, 3))})


def test_the_run_is_described_beside_its_checkpoints(unbroken):
    run = json.loads((unbroken[0] / "run.json").read_text())
    assert TrainSettings(**run["settings"]) == SETTINGS
    assert run["params"] == fingerprint(tiny_params())
    assert run["original"] == fingerprint(tiny_params(1))
