"""T5X reads what `t5patches convert` writes, and the other way round, in both of its formats."""

import warnings

import jax
import numpy as np
import pytest
import t5_folders

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X's and TensorFlow's own, while they are imported
    pytest.importorskip("t5x", reason="needs T5X: make test-t5x T5X=CHECKOUT")
    from t5x import adafactor, checkpoints, partitioning, train_state

from t5patches.model.t5x_format import load_t5x, save_t5x
from t5patches.network import Transformer

pytestmark = pytest.mark.filterwarnings("ignore")  # T5X's and Orbax's own


def state_of(name, fill=None):
    """T5X's train state of a small model; its parameters, or one number in place of all."""
    model, params, _ = t5_folders.load(name)
    ids = np.ones((1, 2), np.int32)
    with jax.numpy_dtype_promotion("standard"):
        shapes = Transformer(model.config).init(
            jax.random.key(0), ids, ids, ids, enable_dropout=False
        )
        if fill is not None:
            params = jax.tree.map(lambda x: np.full_like(x, fill), params)
        rules = adafactor.standard_logical_factor_rules()
        return train_state.FlaxOptimTrainState.create(
            adafactor.Adafactor(0.001, logical_factor_rules=rules),
            {"params": params, "params_axes": shapes["params_axes"]},
        )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_t5x_trains_on_from_what_is_written(name, tmp_path):
    want = state_of(name)
    path = save_t5x(tmp_path, t5_folders.load(name)[1], step=1000)
    manager = checkpoints.OrbaxCheckpointManagerInterface(
        str(tmp_path),
        state_of(name, fill=7.0),
        partitioning.PjitPartitioner(model_parallel_submesh=(1, 1)),
    )
    got = manager.restore(path=str(path))
    manager.close()
    assert int(got.step) == 1000
    equal(got.params, want.params)
    equal(got.param_states, want.param_states)


@pytest.mark.parametrize(
    ("writer", "save_dtype"),
    [
        (checkpoints.OrbaxCheckpointManagerInterface, np.float32),
        (checkpoints.Checkpointer, np.float32),
        (checkpoints.Checkpointer, jax.numpy.bfloat16),
    ],
)
def test_what_t5x_writes_is_read(writer, save_dtype, tmp_path):
    state, directory = state_of("t5_1_0"), str(tmp_path)
    partitioner = partitioning.PjitPartitioner(model_parallel_submesh=(1, 1))
    manager = writer(
        train_state=state,
        partitioner=partitioner,
        save_dtype=save_dtype,
        **{"directory" if hasattr(writer, "wait_until_finished") else "checkpoints_dir": directory},
    )
    manager.save(state)
    if hasattr(manager, "close"):
        manager.wait_until_finished()
        manager.close()
    got = load_t5x(tmp_path)
    assert got.step == 0
    rounded = jax.tree.map(lambda x: np.asarray(x, save_dtype).astype(np.float32), state.params)
    equal(got.params, rounded)
