"""Our feature converters beside T5Patches' own on the same random data."""

import importlib.util
import os
import pathlib
import sys
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TensorFlow's own, while it is imported
    pytest.importorskip("seqio", reason="needs seqio: make test-t5x")
    import gin

    import t5patches
    from t5patches import feature_converters, feature_converters_utils

UPSTREAM = os.environ.get("T5PATCHES_UPSTREAM")
NAMES = [
    f"{family}Training{rule}FeatureConverter"
    for family in ("Negative", "Corrective", "NegativeAndPositive")
    for rule in ("First", "Diff", "Full")
]
NAMES.append("NegativeAndPositiveTrainingFeatureConverterBase")
LENGTHS = {"inputs": 6, "negative_targets": 8, "corrected_targets": 8}

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not UPSTREAM, reason="needs T5PATCHES_UPSTREAM: make test-t5x"),
]


@pytest.fixture(scope="module")
def upstream():
    """T5Patches' converters under a name of their own, with their own utils."""

    def load(name):
        path = pathlib.Path(UPSTREAM, "t5patches", f"{name}.py")
        spec = importlib.util.spec_from_file_location(f"upstream_{name}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with gin.config.interactive_mode(), pytest.MonkeyPatch.context() as patch:
        theirs = load("feature_converters_utils")
        assert t5patches.feature_converters_utils is feature_converters_utils
        patch.setattr(t5patches, "feature_converters_utils", theirs)
        return load("feature_converters")


def converted(module, name, examples, pack=False):
    import tensorflow as tf

    spec = {feature: tf.TensorSpec([None], tf.int32) for feature in LENGTHS}
    ds = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)
    return list(getattr(module, name)(pack=pack)(ds, LENGTHS).as_numpy_iterator())


def valid(rng, name):
    """A text and its correction, both ended; or one of the two with a shorter dummy."""

    def text(longest):
        return [*rng.integers(2, 5, rng.integers(0, longest)), 1]

    negative, corrected = text(8), text(8)
    if rng.random() < 0.5:
        corrected = [*negative]
        corrected[rng.integers(len(negative))] = 9
    if name.startswith("NegativeAndPositive"):
        texts = [negative, negative[: rng.integers(len(negative))]]
        negative, corrected = texts if rng.random() < 0.5 else texts[::-1]
    return {"inputs": text(6), "negative_targets": negative, "corrected_targets": corrected}


@pytest.mark.parametrize("name", NAMES)
def test_valid_data(name, upstream):
    rng = np.random.default_rng(0)
    examples = [valid(rng, name) for _ in range(50)]
    ours = converted(feature_converters, name, examples)
    theirs = converted(upstream, name, examples)
    for example, row, expected in zip(examples, ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for feature, values in expected.items():
            np.testing.assert_array_equal(row[feature], values, f"{feature} of {example}")
            assert row[feature].dtype == values.dtype


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("NegativeTrainingFirstFeatureConverter", [1, 1, -2, 0, 0, 0, 0, 0]),
        ("CorrectiveTrainingFirstFeatureConverter", [0, 0, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_13_padding_has_no_weight(name, theirs, upstream):
    short, long = [3, 9], [3, 9, 4, 1]
    texts = (short, long) if name.startswith("Negative") else (long, short)
    example = dict(zip(LENGTHS, ([7], *texts), strict=True))
    (row,) = converted(upstream, name, [example])
    assert row["decoder_loss_weights"].tolist() == theirs
    (row,) = converted(feature_converters, name, [example])
    assert not row["decoder_loss_weights"][2:].any()


@pytest.mark.parametrize("name", NAMES)
def test_8_packing(name, upstream):
    examples = [{"inputs": [7], "negative_targets": [3, 9], "corrected_targets": [3]}] * 2
    with pytest.raises(NotImplementedError, match="not supported"):
        converted(upstream, name, examples, pack=True)
    assert len(converted(feature_converters, name, examples, pack=True)) == 1
