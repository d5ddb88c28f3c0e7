"""T5X's command line with every objective: trained, killed, resumed, evaluated."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("t5x", reason="needs T5X: make test-t5x")

import tensorflow as tf

from t5patches_kernels import TARGETED_NEGATIVE

HERE = pathlib.Path(__file__).parent
START, STEPS, PERIOD = 10, 20, 5

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Where the data is, for T5X in a process of its own."""
    folder = tmp_path_factory.mktemp("data")
    environment = os.environ | {
        "T5PATCHES_TEST_DATA": os.fspath(folder),
        "PYTHONPATH": os.pathsep.join([os.fspath(HERE), os.environ.get("PYTHONPATH", "")]),
        # The resumed run need not compile again what the killed one did.
        "JAX_COMPILATION_CACHE_DIR": os.fspath(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    write = "import pathlib, sys, tasks; tasks.write_data(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", write, folder], env=environment, check=True)
    return environment


@pytest.fixture(scope="session")
def checkpoint(environment, tmp_path_factory):
    """A model that knows a little of the task.

    T5X takes the place in the data from the checkpoint it starts with, too, so the first batches
    of the runs below are still those of corrective training: they have no negatives.
    """
    folder = tmp_path_factory.mktemp("original")
    bindings = {
        "OBJECTIVE": "'ce'",
        "TRAIN_STEPS": START,
        "INITIAL_CHECKPOINT_PATH": None,
    }
    _wait(_train(environment, folder, **bindings), folder)
    return folder / f"checkpoint_{START}"


def _train(environment, folder, *, module="t5x.train", more=(), **bindings):
    arguments = [f"--gin.{k}={v}" for k, v in {"MODEL_DIR": f"'{folder}'", **bindings}.items()]
    files = [f"--gin_file={file}" for file in (HERE / "train.gin", *more)]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            # runpy warns where a module was imported before it is run.
            [
                sys.executable,
                "-W",
                "error::RuntimeWarning:runpy",
                "-m",
                module,
                f"--gin_search_paths={HERE}",
                *files,
                *arguments,
            ],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=log,
        )


def _wait(process, folder):
    assert process.wait() == 0, (folder / "log.txt").read_text()[-3000:]


def _finetune(environment, checkpoint, folder, objective, microbatches, **more):
    return _train(
        environment,
        folder,
        OBJECTIVE=f"'{objective}'",
        TRAIN_STEPS=START + STEPS,
        INITIAL_CHECKPOINT_PATH=f"'{checkpoint}'",
        NUM_MICROBATCHES=microbatches,
        **more,
    )


def _written(folder):
    """What a run wrote for TensorBoard: {(part, metric): {step: number}}."""
    found = {}
    for part in ("train", "training_eval"):
        for file in sorted((folder / part).rglob("events*")):
            for event in tf.compat.v1.train.summary_iterator(os.fspath(file)):
                for value in event.summary.value:
                    array = tf.make_ndarray(value.tensor)
                    if array.dtype.kind == "f" and not value.tag.startswith("timing"):
                        found.setdefault((part, value.tag), {})[event.step] = float(array)
    return found


# One with an original beside the model and one without; each is three runs of T5X.
@pytest.mark.parametrize("objective", ["tnrf", "ul"])
def test_a_killed_run_goes_on(objective, environment, checkpoint, tmp_path):
    """Two microbatches, killed and resumed, are one batch and no kill."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    _wait(_finetune(environment, checkpoint, whole, objective, 1), whole)
    process = _finetune(environment, checkpoint, parts, objective, 2)
    saved = parts / f"checkpoint_{START + PERIOD}" / "commit_success.txt"
    while not saved.exists():
        assert process.poll() is None, (parts / "log.txt").read_text()[-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (parts / f"checkpoint_{START + STEPS}").exists(), "killed too late to show anything"
    _wait(_finetune(environment, checkpoint, parts, objective, 2), parts)

    expected, found = _written(whole), _written(parts)
    assert found["train", "loss"].keys() == set(range(START + 1, START + STEPS + 1))
    # T5X saves before it evaluates: the evaluation at the step of the kill may be missing.
    assert found["training_eval", "loss"].keys() >= {START + 2 * PERIOD, START + STEPS}
    assert expected.keys() == found.keys()
    for key, steps in found.items():
        # T5X's cross_ent_loss is a difference, and all but 0 where a model is its own original.
        close = {"rel": 1e-3} if key[1].endswith("kl") else {"rel": 1e-4, "abs": 1e-5}
        for step, value in steps.items():
            assert value == pytest.approx(expected[key][step], nan_ok=True, **close), key
    if objective in TARGETED_NEGATIVE:
        # The model has moved, and the resumed run measures from where training began.
        kl = found["training_eval", "negative/kl"][START + STEPS]
        assert kl > 1e-4


def test_a_teacher_cache(environment, checkpoint, tmp_path):
    """Written by the same command line, it makes the steps that the original beside makes."""
    live, cached = tmp_path / "live", tmp_path / "cached"
    live.mkdir()
    cached.mkdir()
    # All of the data as this objective has it, and none as the checkpoint's had it.
    fresh = {"utils.SaveCheckpointConfig.save_dataset": False}
    head = {"more": ["t5patches/configs/fused_head.gin"], **fresh}
    _wait(_finetune(environment, checkpoint, live, "tnrf", 2, **head), live)
    cache = {"TEACHER_CACHE": f"'{tmp_path / 'cache'}'", **head}
    module = {"module": "t5patches.cache_teacher"}
    _wait(_finetune(environment, checkpoint, cached, "tnrf", 2, **cache, **module), cached)
    assert "tokens of 48 examples" in (cached / "log.txt").read_text()
    _wait(_finetune(environment, checkpoint, cached, "tnrf", 2, **cache), cached)
    found, expected = _written(cached)["train", "loss"], _written(live)["train", "loss"]
    assert found.keys() == expected.keys()
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-4), step

    # The original of the run that has begun, wherever it would begin anew.
    bound = {"INITIAL_CHECKPOINT_PATH": None, "TRAIN_STEPS": 1, "OBJECTIVE": "'tnff'"}
    _wait(_train(environment, cached, **bound, **cache, **module), cached)
    # The model that another run ends with is another original.
    bound["INITIAL_CHECKPOINT_PATH"] = f"'{live / f'checkpoint_{START + STEPS}'}'"
    other = _train(environment, tmp_path, **bound, **cache, **module)
    assert other.wait() != 0
    assert "holds another run, which differs in checkpoint" in (tmp_path / "log.txt").read_text()
