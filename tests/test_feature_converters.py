"""The converters: T5Patches' results, padding, packing, alignment, decoder-only twins, sets."""

import itertools
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TensorFlow's own, while it is imported
    seqio = pytest.importorskip("seqio", reason="needs seqio: make test-t5x")
    import gin
    import tensorflow as tf

    from t5patches import feature_converters as fc
    from t5patches import feature_converters_utils as utils

pytestmark = pytest.mark.filterwarnings("default")

FAMILIES = ("NegativeTraining", "CorrectiveTraining", "NegativeAndPositiveTraining")
TEN = [f"{family}{rule}" for family in FAMILIES for rule in ("First", "Diff", "Full")]
ALL = [*TEN, "NegativeSpans", "NegativeSets"]
LENGTHS = {"inputs": 6, "negative_targets": 8, "corrected_targets": 8}


def converter(name, **options):
    if name.endswith("NegativeSets"):
        options = {"num_negatives": 2, "with_factors": True} | options
    return getattr(fc, f"{name}FeatureConverter")(**options)


def lengths(name):
    if name.endswith("NegativeSpans"):
        return {"inputs": 6, "negative_targets": 8, "negative_spans": 4}
    if name.endswith("NegativeSets"):
        return {"inputs": 6, "negative_targets": 8, "negative_ids": 8, "negative_factors": 8}
    return LENGTHS


def dataset(examples):
    """A dataset of ragged examples; an empty list of pairs needs its second dimension."""
    two = ("negative_spans", "negative_ids", "negative_factors")

    def rows():
        for example in examples:
            yield {
                name: np.reshape(
                    np.asarray(value, np.float32 if name == "negative_factors" else np.int32),
                    (-1, 2) if name in two else (-1,),
                )
                for name, value in example.items()
            }

    spec = {
        name: tf.TensorSpec(
            [None, 2] if name in two else [None],
            tf.float32 if name == "negative_factors" else tf.int32,
        )
        for name in examples[0]
    }
    return tf.data.Dataset.from_generator(rows, output_signature=spec)


def convert(name, examples, feature_lengths=None, **options):
    made = converter(name, **options)(dataset(examples), feature_lengths or lengths(name))
    return list(made.as_numpy_iterator())


def pair(negative, corrected, inputs=(7, 1)):
    return {"inputs": inputs, "negative_targets": negative, "corrected_targets": corrected}


def weights_of(name, negative, corrected, **options):
    (row,) = convert(name, [pair(negative, corrected)], pack=False, **options)
    return row["decoder_loss_weights"].tolist()


def random_examples(count, seed=0):
    """What every converter takes, with texts of length 0, inner zeros and full rows among it."""
    rng = np.random.default_rng(seed)

    def text(size):
        return rng.integers(0, 5, rng.integers(0, size + 1)).tolist()

    examples = []
    for number in range(count):
        negative, corrected = text(8), text(8)
        if number % 2 and negative:  # most corrections repeat almost everything
            corrected = negative.copy()
            corrected[rng.integers(len(negative))] = 9
        ends = np.sort(rng.integers(0, 1 + len(np.trim_zeros(negative, "b")), (3, 2)), axis=1)
        examples.append(
            pair(negative, corrected, text(6))
            | {
                "negative_spans": ends.tolist(),
                "negative_ids": rng.integers(-1, 4, (len(negative), 2)).tolist(),
                "negative_factors": rng.choice([0, 0.5, 3], (len(negative), 2)).tolist(),
            }
        )
    return examples


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NegativeTrainingFirst", [1, -1, 1, 1, 0, 0, 0, 0]),
        ("NegativeTrainingDiff", [1, -1, -1, 1, 0, 0, 0, 0]),
        ("NegativeTrainingFull", [-1, -1, -1, -1, 0, 0, 0, 0]),
        ("CorrectiveTrainingFirst", [0, 1, 0, 0, 0, 0, 0, 0]),
        ("CorrectiveTrainingDiff", [0, 1, 1, 0, 0, 0, 0, 0]),
        ("CorrectiveTrainingFull", [1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
def test_one_text(name, expected):
    (row,) = convert(name, [pair([3, 9, 4, 1], [3, 8, 2, 1])], pack=False)
    text = [3, 9, 4, 1] if name.startswith("Negative") else [3, 8, 2, 1]
    assert row["encoder_input_tokens"].tolist() == [7, 1, 0, 0, 0, 0]
    assert row["decoder_target_tokens"].tolist() == [*text, 0, 0, 0, 0]
    assert row["decoder_input_tokens"].tolist() == [0, *text, 0, 0, 0]
    assert row["decoder_loss_weights"].tolist() == expected


@pytest.mark.parametrize(
    ("rule", "negative"),
    [("First", [1, -1, 1, 1]), ("Diff", [1, -1, -1, -1]), ("Full", [-1, -1, -1, -1])],
)
def test_the_longer_text_counts(rule, negative):
    name = f"NegativeAndPositiveTraining{rule}"
    assert weights_of(name, [3, 9, 4, 1], [3]) == [*negative, 0, 0, 0, 0]
    assert weights_of(name, [0], [5, 2, 3, 4]) == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["NegativeTrainingFirst", "CorrectiveTrainingFirst"])
def test_first_difference_is_never_padding(name):
    """T5Patches gives the position after the shorter text weight -2, and its twin 1."""
    short, long = [3, 9], [3, 9, 4, 1]
    texts = (short, long) if name.startswith("Negative") else (long, short)
    kept = 1 if name.startswith("Negative") else 0
    assert weights_of(name, *texts) == [kept, kept, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", [prefix + name for prefix in ("", "DecoderOnly") for name in ALL])
def test_packing_changes_no_example(name):
    """Every example, cut out of its packed row, is what it is without packing."""
    examples = random_examples(13)
    examples = [{feature: e[feature] for feature in lengths(name)} for e in examples]
    alone = convert(name, examples, pack=False)
    # Rows for about three examples.
    wide = {feature: 3 * length for feature, length in lengths(name).items()}
    rows = convert(name, examples, wide, pack=True)
    assert len(rows) < len(alone)
    found = []
    for row in rows:
        for segment in range(1, row["decoder_segment_ids"].max() + 1):
            found.append(_cut_out(row, segment))
    assert len(found) == len(alone)
    for one, packed in zip(alone, found, strict=True):
        for feature, values in packed.items():
            if feature.endswith("positions"):
                np.testing.assert_array_equal(values, np.arange(len(values)))
            else:
                np.testing.assert_array_equal(values, one[feature][: len(values)], feature)
        # Nothing was lost.
        kept = len(packed["decoder_target_tokens"])
        assert not one["decoder_target_tokens"][kept:].any()
        assert not one["decoder_loss_weights"][kept:].any()


def _cut_out(row, segment):
    return {
        feature: values[row[f"{side}_segment_ids"] == segment]
        for feature, values in row.items()
        for side in ["encoder" if feature.startswith("encoder") else "decoder"]
        if not feature.endswith("segment_ids")
    }


@pytest.mark.parametrize("name", [prefix + name for prefix in ("", "DecoderOnly") for name in ALL])
def test_padding_has_no_weight(name):
    for example, row in zip(
        random_examples(9), convert(name, _of(name, random_examples(9)), pack=False), strict=True
    ):
        tokens, weights = row["decoder_target_tokens"], row["decoder_loss_weights"]
        assert not weights[tokens == 0].any(), example
        assert set(weights) <= {-1, 0, 1}


def _of(name, examples):
    return [{feature: e[feature] for feature in lengths(name)} for e in examples]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("on_targets_only", [False, True])
def test_decoder_only_is_seqios_prefix_lm(pack, on_targets_only):
    """Apart from the weights of the text, which are the point."""
    # Without inner zeros and empty texts, which seqio's packing does not carry.
    examples = [pair([3, 9, 4, 1], [2], (7, 8)), pair([4, 1], [2], (9, 9, 1)), pair([5], [2], (6,))]
    ours = convert(
        "DecoderOnlyNegativeTrainingFull",
        examples,
        pack=pack,
        loss_on_targets_only=on_targets_only,
    )
    reference = seqio.PrefixLMFeatureConverter(pack=pack, loss_on_targets_only=on_targets_only)
    plain = [{"inputs": e["inputs"], "targets": e["negative_targets"]} for e in examples]
    theirs = list(reference(dataset(plain), {"inputs": 6, "targets": 8}).as_numpy_iterator())
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for feature in row.keys() - {"decoder_loss_weights"}:
            np.testing.assert_array_equal(row[feature], expected[feature], feature)
        weights = np.abs(row["decoder_loss_weights"])
        np.testing.assert_array_equal(weights, expected["decoder_loss_weights"])


@pytest.mark.parametrize(
    ("negative", "corrected", "expected"),
    [
        ([5, 6, 9, 7, 1], [5, 6, 7, 1], [0, 0, 1, 0, 0]),  # one token more
        ([5, 6, 7, 1], [5, 6, 9, 7, 1], [0, 0, 0, 0]),  # one token less
        ([5, 9, 9, 7, 1], [5, 8, 7, 1], [0, 1, 1, 0, 0]),  # two tokens for another
        ([5, 5, 7], [5, 7], [0, 1, 0]),  # said twice
        ([5, 6], [5, 6], [0, 0]),
        ([5, 6], [], [1, 1]),
        ([], [5, 6], []),
        ([5, 6, 0, 0], [6, 0], [1, 0, 0, 0]),  # padded
    ],
)
def test_alignment_by_tokens(negative, corrected, expected):
    assert utils.get_diff_mask(negative, corrected, "tokens").numpy().tolist() == expected


def test_alignment_is_a_longest_common_subsequence():
    rng = np.random.default_rng(0)
    mask = tf.function(
        lambda a, b: utils.get_diff_mask(a, b, "tokens"),
        input_signature=[tf.TensorSpec([None], tf.int32)] * 2,
    )
    for _ in range(200):
        first, second = (rng.integers(1, 4, rng.integers(0, 9)) for _ in range(2))
        kept = first[mask(first.astype(np.int32), second.astype(np.int32)).numpy() == 0].tolist()
        rest = iter(second.tolist())
        assert all(token in rest for token in kept), (first, second, kept)
        assert len(kept) == _longest_common(first.tolist(), second.tolist()), (first, second, kept)


def _longest_common(first, second):
    def subsequences(tokens):
        sizes = range(len(tokens) + 1)
        return {chosen for k in sizes for chosen in itertools.combinations(tokens, k)}

    return max(len(c) for c in subsequences(first) & subsequences(second))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NegativeTrainingFirst", [1, 1, -1, 1, 1, 0, 0, 0]),
        ("NegativeTrainingDiff", [1, 1, -1, 1, 1, 0, 0, 0]),
        ("NegativeAndPositiveTrainingFirst", [1, 1, -1, 1, 1, 0, 0, 0]),
        ("NegativeAndPositiveTrainingDiff", [1, 1, -1, 1, 1, 0, 0, 0]),
        ("CorrectiveTrainingFirst", [0, 0, 0, 0, 0, 0, 0, 0]),
        ("CorrectiveTrainingDiff", [0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_converters_take_the_alignment(name, expected):
    assert weights_of(name, [5, 6, 9, 7, 1], [5, 6, 7, 1], alignment="tokens") == expected


REST = [13, 14, 15, 16, 17, 18, 19, 1]


@pytest.mark.parametrize(
    ("name", "negative", "corrected", "selected"),
    [
        ("NegativeTrainingDiff", [11, 9, *REST], [11, 21, 22, 23, *REST], [1]),
        ("NegativeTrainingFirst", [11, *REST], [11, 21, 22, 23, *REST], []),
        ("NegativeAndPositiveTrainingDiff", [11, 9, *REST], [11, 21, 22, 23, *REST], [1]),
        ("CorrectiveTrainingDiff", [11, 21, 22, 23, *REST], [11, 9, *REST], [1]),
        ("CorrectiveTrainingFirst", [11, 21, *REST], [11, *REST], []),
    ],
)
def test_what_was_cut_off_does_not_differ(name, negative, corrected, selected):
    kept, other = (1, -1) if name.startswith("Negative") else (0, 1)
    expected = [other if place in selected else kept for place in range(8)]
    # The converter cuts what is longer than its feature, as seqio's Task does beforehand.
    options = {"alignment": "tokens", "apply_length_check": False}
    assert weights_of(name, negative, corrected, **options) == expected


@pytest.mark.parametrize("end", [[], [1]], ids=["cut", "ended after the cut"])
@pytest.mark.parametrize(
    ("name", "long", "short", "expected"),
    [
        ("NegativeTrainingDiff", [11, 9, *REST[1:]], [11, 12, *REST[1:]], [1, -1, *[1] * 6]),
        ("NegativeTrainingFirst", [11, 12, *REST[1:]], [11, 12, *REST[1:]], [1] * 8),
        ("CorrectiveTrainingDiff", [11, 9, *REST[1:]], [11, 12, *REST[1:]], [0, 1, *[0] * 6]),
    ],
)
def test_what_was_cut_off_by_a_shorter_feature_does_not_differ(name, long, short, expected, end):
    """By positions: where the other text's feature is the longer one it does not end so early."""
    text, other = "negative_targets", "corrected_targets"
    if name.startswith("Corrective"):
        text, other = other, text
    example = {"inputs": [7], text: long[:8], other: [*short[: 5 - len(end)], *end]}
    sizes = {"inputs": 6, text: 8, other: 5}
    (row,) = convert(name, [example], sizes, pack=False)
    assert row["decoder_loss_weights"].tolist() == expected
    (row,) = convert(name, [example], sizes | {other: 6}, pack=False)
    assert row["decoder_loss_weights"].tolist() != expected


def test_a_text_that_ends_in_padding_was_not_cut():
    negative, corrected = [11, 9, *REST], [11, *REST[:3], 1]
    options = {"alignment": "tokens", "apply_length_check": False}
    weights = weights_of("NegativeTrainingDiff", negative, corrected, **options)
    assert weights == [1, -1, 1, 1, 1, -1, -1, -1]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # The first 6 is the common one: the others may have been cut off.
        ([5, 9, 6, 7, 8, 6, 2, 6], [5, 3, 3, 3, 3, 3, 6, 4], [0, 1, 0, 0, 0, 0, 0, 0]),
        # So it is where the two texts end in the same tokens.
        ([5, 9, 6, 7, 6, 6], [5, 3, 3, 3, 6, 6], [0, 1, 0, 0, 0, 0]),
        # The last 1 was put behind the cut.
        ([5, 9, 6, 7, 8, 1], [5, 3, 3, 3, 6, 1], [0, 1, 0, 0, 0, 0]),
        ([5, 6, 7, 8], [5, 6, 7, 8], [0, 0, 0, 0]),
        ([5, 6], [7], [0, 0]),
        ([5, 6], [], [0, 0]),
        ([], [5, 6], []),
    ],
)
def test_alignment_with_a_text_that_was_cut(first, second, expected):
    assert utils.get_diff_mask(first, second, "tokens", cut=True).numpy().tolist() == expected


def test_a_cut_adds_no_difference():
    """Texts of tokens that are all different: what differs in the cut ones does in the whole."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        first = list(range(1, 21))
        at, size, new = rng.integers(0, 12), rng.integers(0, 4), rng.integers(0, 6)
        second = [*first[:at], *range(30, 30 + new), *first[at + size :]]
        whole = utils.get_diff_mask(first, second, "tokens").numpy()[:12]
        cut = utils.get_diff_mask(first[:12], second[:12], "tokens", cut=True).numpy()
        assert (cut <= whole).all(), (first, second, cut, whole)
        found += cut.sum()
    assert found > 50


def test_spans():
    example = {"inputs": [7], "negative_targets": [3, 9, 4, 1], "negative_spans": [[1, 2], [3, 4]]}
    (row,) = convert("NegativeSpans", [example], pack=False)
    assert row["decoder_loss_weights"].tolist() == [1, -1, 1, -1, 0, 0, 0, 0]


@pytest.mark.parametrize("span", [[-1, 2], [3, 2], [1, 5]])
def test_a_span_outside_the_text(span):
    example = {"inputs": [7], "negative_targets": [3, 9, 4, 1], "negative_spans": [span]}
    with pytest.raises(tf.errors.InvalidArgumentError, match="negative_spans must be"):
        convert("NegativeSpans", [example], pack=False)


def test_spans_that_may_have_been_cut():
    """As seqio's Task hands them over: it cuts them to their feature like tokens."""
    example = {"inputs": [7], "negative_targets": [3] * 5, "negative_spans": [[0, 1], [4, 5]]}
    too_few = lengths("NegativeSpans") | {"negative_spans": 2}
    with pytest.raises(tf.errors.InvalidArgumentError, match="at least one more than the most"):
        convert("NegativeSpans", [example], too_few, pack=False)
    (row,) = convert("NegativeSpans", [example], too_few | {"negative_spans": 3}, pack=False)
    assert row["decoder_loss_weights"].tolist() == [-1, 1, 1, 1, -1, 0, 0, 0]


def test_a_span_of_a_text_that_was_cut():
    example = {"inputs": [7], "negative_targets": [3] * 8, "negative_spans": [[6, 12]]}
    (row,) = convert("NegativeSpans", [example], pack=False)
    assert row["decoder_loss_weights"].tolist() == [1] * 6 + [-1] * 2


def test_sets():
    example = {
        "inputs": [7],
        "negative_targets": [3, 9, 4],
        "negative_ids": [[-1, -1], [9, 0]],  # the last row is missing
        "negative_factors": [[0, 0], [0.5, 2.0]],
    }
    (row,) = convert("NegativeSets", [example], pack=False, num_negatives=3)
    assert row["decoder_loss_weights"].tolist() == [1, -1, 1, 0, 0, 0, 0, 0]
    assert row["negative_ids"].shape == row["negative_factors"].shape == (8, 3)
    assert row["negative_ids"].dtype == np.int32
    assert row["negative_ids"][:3].tolist() == [[-1, -1, -1], [9, 0, -1], [-1, -1, -1]]
    assert row["negative_factors"][1].tolist() == [0.5, 2.0, 0.0]
    (first,) = convert("NegativeSets", [example], pack=False, num_negatives=1)
    assert first["negative_ids"][:3].tolist() == [[-1], [9], [-1]]


def test_sets_without_factors_remove():
    example = {"inputs": [7], "negative_targets": [3, 9], "negative_ids": [[5, -1], [-1, -1]]}
    feature_lengths = {"inputs": 2, "negative_targets": 3, "negative_ids": 3}
    (row,) = convert("NegativeSets", [example], feature_lengths, pack=False, with_factors=False)
    assert row["decoder_loss_weights"].tolist() == [-1, 1, 0]
    assert not row["negative_factors"].any()
    # Also those of a task that has factors, for another converter.
    example["negative_factors"] = [[0.5, 0.5]]
    (row,) = convert("NegativeSets", [example], feature_lengths, pack=False, with_factors=False)
    assert not row["negative_factors"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative_ids": [[-2, 0]]}, "negative_ids must be"),
        *[
            ({"negative_factors": [[0, bad]]}, "negative_factors must be")
            for bad in (-1.0, np.nan, np.inf)
        ],
        # A factor that is padded would be 0, and remove.
        ({"negative_ids": [[1, 2], [3, 4]]}, "negative_factors and negative_ids differ in shape"),
    ],
)
def test_bad_sets(change, message):
    example = {
        "inputs": [7],
        "negative_targets": [3],
        "negative_ids": [[1, 2]],
        "negative_factors": [[0, 0]],
    }
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        convert("NegativeSets", [example | change], pack=False)


def test_bad_options():
    with pytest.raises(ValueError, match="alignment must be one of"):
        fc.NegativeTrainingDiffFeatureConverter(alignment="words")
    with pytest.raises(ValueError, match="num_negatives must be 1 or more"):
        fc.NegativeSetsFeatureConverter(num_negatives=0)
    with pytest.raises(ValueError, match="assigned the same lengths"):
        convert(
            "NegativeAndPositiveTrainingDiff", [pair([3], [3])], LENGTHS | {"corrected_targets": 7}
        )
    for name in ("negative_ids", "negative_factors"):
        feature_lengths = lengths("NegativeSets") | {name: 7}
        for variant in ("NegativeSets", "DecoderOnlyNegativeSets"):
            made = converter(variant, pack=False)
            with pytest.raises(ValueError, match=f"{name} has a row for each token"):
                made.get_model_feature_lengths(feature_lengths)
        with pytest.raises(ValueError, match=f"{name} has a row for each token"):
            convert("NegativeSets", _of("NegativeSets", random_examples(1)), feature_lengths)


def test_weights_must_be_whole_numbers():
    class Half(fc.NegativeTrainingFullFeatureConverter):
        def get_decoder_weights(self, features):
            return tf.cast(features["negative_targets"], tf.float32) / 2

    with pytest.raises(TypeError, match="must return int32"):
        Half(pack=True)(dataset([pair([3], [3])]), LENGTHS)


def test_beginning_of_sequence_and_passthrough():
    made = fc.NegativeTrainingFullFeatureConverter(
        pack=False,
        bos_id=4,
        passthrough_features={"source": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)},
    )
    example = pair([3, 9], [3]) | {"source": [11, 12]}
    (row,) = made(dataset([example]), LENGTHS | {"source": 3}).as_numpy_iterator()
    assert row["decoder_input_tokens"].tolist() == [4, 3, 9, 0, 0, 0, 0, 0]
    assert row["source"].tolist() == [11, 12, 0]


def test_gin_binds_options():
    name = "feature_converters.DecoderOnlyNegativeTrainingDiffFeatureConverter"
    gin.parse_config(f"{name}.alignment = 'tokens'")
    try:
        made = gin.get_configurable(name)(pack=False)
        example = pair([5, 6, 9, 7, 1], [5, 6, 7, 1])
        (row,) = made(dataset([example]), LENGTHS).as_numpy_iterator()
        assert row["decoder_loss_weights"][:7].tolist() == [0, 0, 1, 1, -1, 1, 1]
    finally:
        gin.clear_config()
