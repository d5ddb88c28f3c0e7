"""A seqio task for the command-line tests: files, so that T5X can save where it was in the data."""

import os
import pathlib

import numpy as np
import seqio
import tensorflow as tf

NAME = "marked_sentences"
VOCABULARY = seqio.ByteVocabulary()
FEATURES = ("inputs", "negative_targets", "corrected_targets")
PLACES = ("oslo", "rome", "lima")


def write_data(folder: pathlib.Path, examples: int = 48) -> None:
    """Sentences that name a place, which the corrections do not."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        with tf.io.TFRecordWriter(os.fspath(folder / f"{split}.tfrecord")) as writer:
            for number in rng.integers(100, 1000, examples):
                place = rng.choice(PLACES)
                texts = (f"report {number}", f"{number} in {place}", f"{number} in town")
                features = {
                    name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
                    for name, text in zip(FEATURES, texts, strict=True)
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())


def same(targets, predictions):
    return {"same": float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


def mean_score(targets, scores):
    assert len(targets) == len(scores)
    return {"mean_score": float(np.mean(scores))}


seqio.TaskRegistry.add(
    NAME,
    source=seqio.TFExampleDataSource(
        {s: f"{os.environ['T5PATCHES_TEST_DATA']}/{s}.tfrecord" for s in ("train", "validation")},
        feature_description={name: tf.io.FixedLenFeature([], tf.string) for name in FEATURES},
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={name: seqio.Feature(vocabulary=VOCABULARY) for name in FEATURES},
    metric_fns=[same, mean_score],
)
