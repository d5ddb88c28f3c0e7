"""The T5X trainer: what the original model is, in every turn that a run can take."""

import json
import re

import jax
import numpy as np
import pytest
import t5x_stack as stack
import two_processes
from t5x_stack import on_both, trainer

from t5patches.model.teacher_cache import states_of, write_cache
from t5patches.runs.fingerprints import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")  # T5X's own


@pytest.fixture(autouse=True)
def _strict_jax():
    """T5X promotes as it likes."""


def host(tree):
    return jax.tree.map(np.asarray, tree)


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), host(a), host(b))


@on_both
def test_two_microbatches_make_the_same_step(library):
    """Upstream does not pass the original parameters to a microbatch."""
    library, losses, states = library(), [], []
    for parts in (1, 2):
        trained = stack.model(library, "TNFF", stack.tiny_network())
        with trainer(library, trained, num_microbatches=parts) as made:
            losses.append(stack.steps(made, 2))
            states.append(host(made.train_state.params))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    same(*states, rtol=1e-4, atol=1e-6)


def largest_constant(text):
    """The number of elements of the largest float constant in a program."""
    shapes = re.findall(r"f32\[([\d,]+)\]\S* constant\(", text)
    return max((np.prod([int(n) for n in s.split(",")]) for s in shapes), default=1)


@on_both
def test_the_compiled_step_holds_no_parameters(library):
    library = library()
    trained = stack.model(library, "TNFF", stack.tiny_network())
    with trainer(library, trained) as made:
        state, tokens = made.train_state, stack.batch()
        for step in (made._partitioned_train_step, made._partitioned_eval_step):
            assert largest_constant(step.lower(state, tokens).compile().as_text()) <= 64


@on_both
def test_train_eval_after_training(library):
    """Upstream's original parameters are the train state, which the first step has donated."""
    library = library()
    trained = stack.model(library, "TNRR", stack.tiny_network())
    with trainer(library, trained) as made:
        stack.steps(made, 1)
        metrics = made.eval({"eval": iter([stack.batch()])})["eval"]
    assert np.isfinite(metrics["loss"].value)
    assert metrics["positive/kl"].value > 0


@on_both
def test_a_resumed_run_keeps_the_original(library, tmp_path):
    """Killed after two steps and resumed: the steps after it are those of an unbroken run."""
    library, unbroken = library(), []
    trained = stack.model(library, "TNFF", stack.tiny_network())
    with trainer(library, trained, directory=tmp_path / "run") as made:
        unbroken = stack.steps(made, 2)
        saved = host(made.train_state)
        (tmp_path / "run" / "checkpoint_2").mkdir()  # as T5X does
        unbroken += stack.steps(made, 2, first=2)

    def resumed(fresh):
        return jax.tree.map(lambda x, there: jax.device_put(x, there.sharding), saved, fresh)

    trained = stack.model(library, "TNFF", stack.tiny_network())
    with trainer(library, trained, directory=tmp_path / "run", state=resumed) as made:
        again = stack.steps(made, 2, first=2)
    np.testing.assert_allclose(unbroken[2:], again, rtol=1e-6)


def test_a_resumed_run_without_its_original_raises(tmp_path):
    (tmp_path / "checkpoint_2").mkdir()
    trained = stack.model(stack.OURS, "TNFF", stack.tiny_network())
    with (
        pytest.raises(ValueError, match="original_path to the checkpoint that training began from"),
        trainer(stack.OURS, trained, directory=tmp_path),
    ):
        pass


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    """Its original parameters are those that it begins with now, not those that were left."""
    trained = stack.model(stack.OURS, "TNFF", stack.tiny_network())
    for seed in (0, 1):
        with trainer(stack.OURS, trained, directory=tmp_path, seed=seed) as made:
            same(made.orig_train_state.params, made.train_state.params)
            began = host(made.train_state.params)
        # What such a run leaves is no checkpoint.
        for name in ("checkpoint_0.tmp-1700000000", "checkpoint_0.orbax-checkpoint-tmp-1"):
            (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "checkpoint_0").mkdir()
    with trainer(stack.OURS, trained, directory=tmp_path, seed=5) as made:
        same(made.orig_train_state.params, began)


def test_another_models_original_raises(tmp_path):
    trained = stack.model(stack.OURS, "TNFF", stack.tiny_network())
    with trainer(stack.OURS, trained, directory=tmp_path):
        pass
    (tmp_path / "checkpoint_0").mkdir()
    wider = stack.model(stack.OURS, "TNFF", stack.tiny_network(mlp_dim=24))
    with (
        pytest.raises(ValueError, match=r"of another model: .*mlp.* is \(16, 16\) in it and"),
        trainer(stack.OURS, wider, directory=tmp_path),
    ):
        pass


def test_the_original_by_its_path(tmp_path):
    """As T5X's eval has it: no train state when the trainer is made."""
    trained = stack.model(stack.OURS, "TNFF", stack.tiny_network())
    with trainer(stack.OURS, trained, directory=tmp_path) as made:
        began = host(made.train_state.params)
        later = made.train_state
    path = str(tmp_path / "original_params")

    def none(fresh):
        return None

    with trainer(stack.OURS, trained, state=none, original_path=path) as made:
        made.train_state = later
        same(made.orig_train_state.params, began)
        metrics = made.eval({"eval": iter([stack.batch()])})["eval"]
        assert abs(metrics["positive/kl"].value) < 1e-6
    with trainer(stack.OURS, trained, state=none) as made:
        made.train_state = later
        with pytest.raises(ValueError, match=r"Set SelfDistillationTrainer\.original_path"):
            made.eval({"eval": iter([stack.batch()])})


def test_the_original_of_a_training_by_its_path(tmp_path):
    """Training begins from other parameters; evaluators have the path's before the first step."""
    trained = stack.model(stack.OURS, "TNFF", stack.tiny_network())
    with trainer(stack.OURS, trained, directory=tmp_path) as made:
        wanted = host(made.train_state.params)
    path = str(tmp_path / "original_params")
    with trainer(stack.OURS, trained, seed=1, original_path=path) as made:
        same(trained.original_params, wanted)
        same(made.orig_train_state.params, wanted)
        begun, there = jax.tree.leaves(host(made.train_state.params)), jax.tree.leaves(wanted)
        assert not all(map(np.array_equal, begun, there))
    with trainer(stack.OURS, trained, state=lambda _: None):
        assert trained.original_params is None  # and not those of an earlier trainer


def test_a_path_with_nothing_there(tmp_path):
    trained = stack.model(stack.OURS, "TNFF", stack.tiny_network())
    with (
        pytest.raises(ValueError, match="holds no parameters"),
        trainer(stack.OURS, trained, original_path=str(tmp_path)),
    ):
        pass


def test_another_batch_shape():
    trained = stack.model(stack.OURS, "TNRF", stack.tiny_network())
    with trainer(stack.OURS, trained) as made:
        began = host(made.train_state.params)
        stack.steps(made, 1)
        stack.steps(made, 1, first=1, rows=16, length=4)
        same(made.orig_train_state.params, began)


def fused():
    return stack.model(stack.OURS, "TNFF", stack.tiny_network(), fused_head=True)


def live_and_cached(directory):
    """The losses of two steps beside the original, whose states on both batches are written."""
    trained, batches = fused(), [stack.batch(seed=i) for i in range(2)]
    with trainer(stack.OURS, trained) as made:
        losses = stack.steps(made, 2)
        frozen = host(made.orig_train_state.params)
    hidden_of = jax.jit(lambda batch: trained.hidden_states(frozen, batch))
    about = states_of(fingerprint(frozen), trained.module.config)
    write_cache(directory, lambda: batches, hidden_of, about, width=16, dtype="float32")
    return losses


def test_a_teacher_cache(tmp_path):
    """The same steps as with the original run beside the model, which the cache must be of."""
    losses = [live_and_cached(tmp_path)]
    with trainer(stack.OURS, fused(), teacher_cache=tmp_path) as made:
        made.compile_train(stack.batch())
        losses.append(stack.steps(made, 2))
    np.testing.assert_allclose(*losses, rtol=1e-6)
    with (
        pytest.raises(ValueError, match="holds another run, which differs in checkpoint"),
        trainer(stack.OURS, fused(), teacher_cache=tmp_path, seed=3),
    ):
        pass
    other = stack.tiny_network(relative_attention_max_distance=4)  # of the same parameters
    other = stack.model(stack.OURS, "TNFF", other, fused_head=True)
    with (
        pytest.raises(ValueError, match=r"differs in relative_attention_max_distance \(128"),
        trainer(stack.OURS, other, teacher_cache=tmp_path),
    ):
        pass


def test_hidden_states_need_the_fused_head():
    with pytest.raises(ValueError, match=r"include t5patches/configs/fused_head\.gin"):
        stack.model(stack.OURS, "TNFF", stack.tiny_network()).hidden_states({}, stack.batch())


TWO_HOSTS = """
import json, warnings
warnings.simplefilter("ignore")
import t5x_stack as stack
from test_trainer import fused

cache, expected = sys.argv[3], json.loads(sys.argv[4])
with stack.trainer(stack.OURS, fused(), model_axis=2, teacher_cache=cache) as made:
    split = jax.NamedSharding(made._partitioner.mesh, made._batch_axes)

    def put(x):  # as T5X does: each host has its own rows
        return jax.make_array_from_callback(x.shape, split, lambda index: x[index])

    batches = [jax.tree.map(put, stack.batch(seed=i)) for i in range(2)]
    made.compile_train(batches[0])
    for batch, loss in zip(batches, expected, strict=True):
        found = float(made.train(iter([batch]), 1).result()["loss"].value)
        assert abs(found - loss) < 1e-5 * abs(loss), (found, loss)
print("same", jax.process_count())
"""


def test_two_hosts_read_a_teacher_cache(tmp_path):
    losses = live_and_cached(tmp_path / "cache")
    for out in two_processes.run(TWO_HOSTS, tmp_path, str(tmp_path / "cache"), json.dumps(losses)):
        assert "same 2" in out


@pytest.mark.parametrize("name", ["TNFF", "TNRR", "UL"])
def test_a_mesh_with_a_model_axis(name):
    """Data x model over 8 devices: the losses of one device, and a sharded original."""
    library, losses = stack.OURS, []
    kind = None if name in stack.TARGETED else stack.t5x_trainer.Trainer
    for model_axis in (1, 2):
        trained = stack.model(library, name, stack.tiny_network())
        with trainer(library, trained, model_axis=model_axis, kind=kind) as made:
            losses.append(stack.steps(made, 3))
            if model_axis == 2 and name in stack.TARGETED:
                mine = jax.tree.map(lambda x: x.sharding, made.train_state.params)
                its = jax.tree.map(lambda x: x.sharding, made.orig_train_state.params)
                assert jax.tree.all(jax.tree.map(lambda a, b: a.is_equivalent_to(b, 2), mine, its))
                assert any(
                    not x.sharding.is_fully_replicated
                    for x in jax.tree.leaves(made.orig_train_state.params)
                )
    np.testing.assert_allclose(*losses, rtol=2e-5)


@stack.needs_upstream
@pytest.mark.parametrize("name", stack.NAMES)
def test_five_steps_are_upstreams(name):
    """Where upstream is right: weights in {-1, 0, 1}, alpha 1e4, no dropout.

    Plain gradient descent: Adafactor divides a gradient by its size, and so lifts the rounding
    errors of one that is nearly 0 to the size of any other's.
    """
    losses, params = [], []
    kind = None if name in stack.TARGETED else stack.t5x_trainer.Trainer
    for library in (stack.OURS, stack.upstream()):
        sgd = stack.optimizers.sgd(1e-6)  # alpha makes the gradients large
        trained = stack.model(library, name, stack.tiny_network(), sgd)
        with trainer(library, trained, kind=kind) as made:
            params.append(flat(made))
            losses.append(stack.steps(made, 5))
            params.append(flat(made))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    start, ours, _, upstreams = params
    np.testing.assert_allclose(ours, upstreams, rtol=1e-5, atol=1e-5)
    moved = np.linalg.norm(upstreams - start)
    assert np.linalg.norm(ours - upstreams) < 1e-3 * moved


def flat(made):
    """All parameters of a trainer in one array."""
    leaves = jax.tree.leaves(host(made.train_state.params))
    return np.concatenate([x.ravel() for x in leaves])
