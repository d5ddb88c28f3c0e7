"""The gin files, with every size of T5 1.1 and mT5, every objective and every run of T5X."""

import pathlib
import re
import sys
import types
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X's and TensorFlow's own, while they are imported
    pytest.importorskip("t5x", reason="needs T5X: make test-t5x")
    import gin
    from t5x import trainer as t5x_trainer
    from t5x.examples.t5 import network as t5x_network

    from t5patches import configs, feature_converters, models, network, trainer
    from t5patches_kernels import TRAINING_OBJECTIVES

pytestmark = pytest.mark.filterwarnings("ignore")  # T5X's own

WIDTHS = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}
SIZES = [
    (f"t5x/examples/t5/{family}/{size}.gin", width, 250112 if family == "mt5" else 32128)
    for family in ("t5_1_1", "mt5")
    for size, width in WIDTHS.items()
]
RUNS = {"finetune": "train", "eval": "evaluate", "infer": "infer"}
BASE = SIZES[1][0]
EXAMPLES = pathlib.Path(t5x_network.__file__).parent.parent
README = pathlib.Path(__file__).parent.parent.parent / "README.md"
PLACES = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "CHECKPOINT_PATH", "EVAL_OUTPUT_DIR")


def train(**bound):
    return bound


def evaluate(**bound):
    return bound


def infer(**bound):
    return bound


MAIN = types.ModuleType("__main__")
MAIN.train, MAIN.evaluate, MAIN.infer = train, evaluate, infer


@pytest.fixture
def bound(monkeypatch):
    """What T5X's train, evaluate or infer would be called with."""
    monkeypatch.setitem(sys.modules, "__main__", MAIN)

    def parse(run, size, *more, objective="tnff", bindings=()):
        own = f"t5patches/configs/{run}.gin"
        included = (size, f"t5x/configs/runs/{run}.gin", own, *more)
        gin.parse_config(
            [
                "from __gin__ import dynamic_registration",
                "from t5patches import feature_converters as t5patches_converters",
                *(f"include '{file}'" for file in included),
                *(f'{place} = "/any"' for place in (*PLACES, "INFER_OUTPUT_DIR")),
                'MIXTURE_OR_TASK_NAME = "any"',
                "TASK_FEATURE_LENGTHS = {'inputs': 8}",
                "TRAIN_STEPS = 1",
                f"OBJECTIVE = '{objective}'",
                *bindings,
            ]
        )
        gin.finalize()
        return gin.get_configurable(getattr(MAIN, RUNS[run]))()

    # The stand-ins have the names of T5X's own, which other tests use.
    with gin.config.interactive_mode():
        yield parse
    gin.clear_config()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("size", "width", "vocabulary"), SIZES)
def test_sizes(run, size, width, vocabulary, bound):
    model = bound(run, size)["model"]
    assert type(model) is models.EncoderDecoderModelTNFF
    assert type(model.module) is t5x_network.Transformer
    assert model.module.config.emb_dim == width
    assert model.module.config.vocab_size == vocabulary
    assert model._z_loss == 1e-4


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("objective", TRAINING_OBJECTIVES)
def test_objectives(run, objective, bound):
    model = bound(run, BASE, objective=objective)["model"]
    suffix = "" if objective == "ce" else objective.upper()
    assert type(model).__name__ == f"EncoderDecoderModel{suffix}"
    rule = "CorrectiveTrainingFull" if objective == "ce" else "NegativeTrainingDiff"
    assert model.FEATURE_CONVERTER_CLS.__name__ == f"{rule}FeatureConverter"
    assert getattr(model, "alpha", 1.0) == 1.0


@pytest.mark.parametrize("objective", TRAINING_OBJECTIVES)
def test_decoder_only(objective, bound):
    # By its whole path: gin finds an include in a package, and T5X has no __init__.py there.
    size = str(EXAMPLES / "decoder_only" / "models" / "base.gin")
    model = bound("finetune", size, "t5patches/configs/decoder_only.gin", objective=objective)
    suffix = "" if objective == "ce" else objective.upper()
    assert type(model["model"]).__name__ == f"DecoderOnlyModel{suffix}"
    converter = model["model"].FEATURE_CONVERTER_CLS
    assert "decoder_causal_attention" in converter.MODEL_FEATURES


def test_fused_head(bound):
    model = bound("finetune", SIZES[0][0], "t5patches/configs/fused_head.gin")["model"]
    assert model.fused_head
    assert type(model.module) is network.Transformer
    assert model.module.config.emb_dim == 512


def test_macros(bound):
    converter = "@t5patches_converters.NegativeTrainingFirstFeatureConverter"
    model = bound(
        "infer",
        BASE,
        bindings=[
            "ALPHA = 100.0",
            "IMPLEMENTATION = 'xla'",
            "ORIGINAL_PATH = '/run/original_params'",
            f"FEATURE_CONVERTER = {converter}",
        ],
    )["model"]
    assert (model.alpha, model.implementation) == (100.0, "xla")
    assert model.original_path == "/run/original_params"
    assert model.FEATURE_CONVERTER_CLS is feature_converters.NegativeTrainingFirstFeatureConverter


def test_each_objective_has_its_trainer(bound, monkeypatch):
    made = bound("finetune", BASE, bindings=["ORIGINAL_PATH = '/run/original_params'"])
    made_with = []
    for kind in (trainer.SelfDistillationTrainer, t5x_trainer.Trainer):
        monkeypatch.setattr(kind, "__init__", lambda self, **kwargs: made_with.append(kwargs))
    assert type(made["trainer_cls"](model=made["model"])) is trainer.SelfDistillationTrainer
    assert made_with[0]["original_path"] == "/run/original_params"
    with gin.unlock_config():
        gin.parse_config("OBJECTIVE = 'ul'\nORIGINAL_PATH = None")
    plain = gin.get_configurable(configs.make_model)()
    assert type(made["trainer_cls"](model=plain)) is t5x_trainer.Trainer
    with pytest.raises(ValueError, match="no original model"):
        made["trainer_cls"](model=plain, teacher_cache="/any")
    for kwargs in made_with:
        assert callable(kwargs["learning_rate_fn"])
        assert kwargs["num_microbatches"] is None


def test_predictions_are_compared_with_negative_targets(bound):
    assert bound("infer", BASE)["output_vocab_feature_name"] == "negative_targets"
    for run in ("finetune", "eval"):
        gin.clear_config()
        bound(run, BASE)
        assert gin.query_parameter("seqio.Evaluator.target_field_name") == "negative_targets"


def test_readme(bound, monkeypatch):
    """The changed config in README.md, but for the task's module, which is the user's."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README.read_text(), re.DOTALL)
    after = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    assert "import my_tasks" in after
    monkeypatch.setitem(sys.modules, "my_tasks", types.ModuleType("my_tasks"))
    monkeypatch.setitem(sys.modules, "__main__", MAIN)
    gin.parse_config([*after, 'MODEL_DIR = "/any"'])
    gin.finalize()
    called = gin.get_configurable(MAIN.train)()
    assert type(called["model"]) is models.EncoderDecoderModelTNFF
    assert called["train_dataset_cfg"].pack
    assert called["total_steps"] == 1_000_100


def test_no_such_objective(bound):
    with pytest.raises(ValueError, match="objective must be one of"):
        bound("finetune", BASE, objective="kl")


def test_no_original_for_an_objective_without_one(bound):
    with pytest.raises(ValueError, match="ul, which has no original model"):
        bound("infer", BASE, objective="ul", bindings=["ORIGINAL_PATH = '/any'"])
