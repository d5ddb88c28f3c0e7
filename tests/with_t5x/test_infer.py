"""T5X's infer and eval with every model: predictions, scores, the error without originals."""

import json
import pathlib
import sys
import warnings

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X's and TensorFlow's own, while they are imported
    pytest.importorskip("t5x", reason="needs T5X: make test-t5x")
    import gin
    import seqio
    import t5x.eval
    import t5x.infer

    from t5patches import configs
    from t5patches_kernels import TARGETED_NEGATIVE, TRAINING_OBJECTIVES

HERE = pathlib.Path(__file__).parent
PARENT = pathlib.Path(t5x.infer.__file__).parent / "examples" / "decoder_only" / "models"
KINDS = {
    "encoder_decoder": ("t5x/examples/t5/t5_1_1/tiny.gin", []),
    "decoder_only": (
        PARENT / "base.gin",
        ["t5patches/configs/decoder_only.gin", HERE / "tiny_decoder.gin"],
    ),
}
MAINS = {"infer": t5x.infer, "eval": t5x.eval}
BATCH, EXAMPLES = 8, 16

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # T5X's own
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _strict_jax():
    """T5X promotes as it likes."""


@pytest.fixture(scope="module", autouse=True)
def tasks(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        patch.setenv("T5PATCHES_TEST_DATA", str(folder))
        import tasks

        tasks.write_data(folder, EXAMPLES)
        # A prediction is the same program with every objective.
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
        yield tasks
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def configure(monkeypatch):
    def parse(run, kind, objective, **bindings):
        monkeypatch.setitem(sys.modules, "__main__", MAINS[run])
        size, more = KINDS[kind]
        files = (size, f"t5x/configs/runs/{run}.gin", f"t5patches/configs/{run}.gin", *more)
        bindings = {
            "OBJECTIVE": objective,
            "utils.DatasetConfig.split": "validation",
            "utils.DatasetConfig.batch_size": BATCH,
            "utils.RestoreCheckpointConfig.dtype": "float32",
            **bindings,
        }
        gin.parse_config(
            [
                "from __gin__ import dynamic_registration",
                "from t5x import utils",
                *(f"include '{file}'" for file in (*files, HERE / "tiny.gin")),
                *(f"{name} = {value!r}" for name, value in bindings.items()),
            ]
        )

    # test_configs has stand-ins of the same names.
    with gin.config.interactive_mode():
        yield parse
    gin.clear_config()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Parameters of a model of a kind, and where they are stored as T5X reads them."""
    made = {}

    def store(kind, model):
        if kind not in made:
            names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
            shapes = dict.fromkeys(names, (1, 4))
            params = model.get_initial_variables(jax.random.key(0), shapes)["params"]
            folder = tmp_path_factory.mktemp(kind) / "checkpoint_0"
            with ocp.PyTreeCheckpointer() as checkpointer:
                state = {"target": params, "state": {"step": np.int32(0)}}
                checkpointer.save(folder / "state", flax.core.unfreeze(state))
            made[kind] = params, str(folder)
        return made[kind]

    return store


@pytest.fixture
def inferred(configure, stored, tmp_path):
    """Runs T5X's infer with a model that is its own original; returns it and what was written."""

    def run(mode, kind, objective, with_original=True):
        configure("infer", kind, "ce")
        params, path = stored(kind, gin.get_configurable(configs.make_model)())
        gin.clear_config()
        configure(
            "infer",
            kind,
            objective,
            CHECKPOINT_PATH=path,
            ORIGINAL_PATH=path if with_original and objective in TARGETED_NEGATIVE else None,
            INFER_OUTPUT_DIR=str(tmp_path),
        )
        gin.get_configurable(t5x.infer.infer)(mode=mode)
        (file,) = tmp_path.glob(f"*-{mode}.jsonl-00000-of-00001")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return gin.get_configurable(configs.make_model)(), params, lines

    return run


@each_kind
@pytest.mark.parametrize("objective", TRAINING_OBJECTIVES)
def test_scores(kind, objective, inferred, tasks):
    model, params, lines = inferred("score", kind, objective)
    targeted = objective in TARGETED_NEGATIVE
    lengths = gin.query_parameter("TASK_FEATURE_LENGTHS/macro.value")
    examples = seqio.get_mixture_or_task(tasks.NAME).get_dataset(
        lengths, split="validation", shuffle=False
    )
    batch = next(
        model.FEATURE_CONVERTER_CLS(pack=False)(examples, lengths)
        .batch(EXAMPLES)
        .as_numpy_iterator()
    )
    expected = model.score_batch(params, batch, **({"orig_params": params} if targeted else {}))
    assert len(lines) == EXAMPLES
    np.testing.assert_allclose([line["score"] for line in lines], expected, rtol=2e-5, atol=1e-5)


@each_kind
@pytest.mark.parametrize("objective", TRAINING_OBJECTIVES)
def test_predictions(kind, objective, inferred):
    _, _, lines = inferred("predict", kind, objective, with_original=False)
    assert len(lines) == EXAMPLES
    assert all(isinstance(line["prediction"], str) for line in lines)


@each_kind
def test_scores_without_originals(kind, inferred):
    with pytest.raises(ValueError, match=r"original_path to the original_params"):
        inferred("score", kind, "tnff", with_original=False)


@each_kind
@pytest.mark.parametrize("objective", ["tnrr", "ul", "ce"])
def test_evaluators(kind, objective, configure, stored, tmp_path):
    configure("eval", kind, objective)
    _, path = stored(kind, gin.get_configurable(configs.make_model)())
    places = {"CHECKPOINT_PATH": path, "EVAL_OUTPUT_DIR": str(tmp_path)}
    if objective == "tnrr":
        places["ORIGINAL_PATH"] = path
    gin.parse_config([f"{name} = {place!r}" for name, place in places.items()])
    gin.get_configurable(t5x.eval.evaluate)()
    (file,) = tmp_path.glob("inference_eval/*-metrics.jsonl")
    metrics = json.loads(file.read_text().splitlines()[-1])
    assert np.isfinite(metrics["mean_score"])
    assert 0 <= metrics["same"] <= 1
