"""What the tests of the T5X models and trainer share: small networks, batches, and upstream's code.

A test that takes `library` runs on our package and, where `T5PATCHES_UPSTREAM` names a checkout of
google/t5patches, on upstream's, on which it must *fail*: each such test is one of its defects.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import sys
import types
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X's and TensorFlow's own, while they are imported
    pytest.importorskip("t5x", reason="needs T5X: make test-t5x T5X=CHECKOUT")
    import gin
    import seqio
    import t5x.models
    from t5x import adafactor, checkpoints, optimizers, partitioning, utils  # noqa: F401
    from t5x import trainer as t5x_trainer  # noqa: F401
    from t5x.examples.decoder_only import network as decoder_only_network

    import t5patches.models
    import t5patches.network
    import t5patches.trainer
    import t5patches_kernels

UPSTREAM = os.environ.get("T5PATCHES_UPSTREAM")
NO_UPSTREAM = "needs upstream's checkout: T5PATCHES_UPSTREAM=CHECKOUT of google/t5patches"

# The suffixes of the classes' names; "ce" has none.
TARGETED = tuple(name.upper() for name in t5patches_kernels.TARGETED_NEGATIVE)
NAMES = tuple(name.upper() for name in t5patches_kernels.TRAINING_OBJECTIVES if name != "ce")


@functools.cache
def upstream():
    """Upstream's models and trainer, under names of their own."""
    loaded = {}
    with gin.config.interactive_mode(), warnings.catch_warnings():  # it registers our names again
        warnings.simplefilter("ignore")
        for name in ("models", "trainer"):
            path = pathlib.Path(UPSTREAM) / "t5patches" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"upstream_{name}", path)
            loaded[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
    return types.SimpleNamespace(**loaded)


T5X = types.SimpleNamespace(models=t5x.models)
OURS = types.SimpleNamespace(models=t5patches.models, trainer=t5patches.trainer)

needs_upstream = pytest.mark.skipif(not UPSTREAM, reason=NO_UPSTREAM)

# To be indirect in nothing: a test asks for `library` by this mark.
on_both = pytest.mark.parametrize(
    "library",
    [
        pytest.param(lambda: OURS, id="ours"),
        pytest.param(
            upstream,
            id="upstream",
            marks=[needs_upstream, pytest.mark.xfail(strict=True, reason="upstream's defect")],
        ),
    ],
)


# --- Models --------------------------------------------------------------------------------------


class GivenLogits:
    """A network whose parameters are its logits; it remembers how it was called."""

    def __init__(self):
        self.calls = []

    def apply(self, variables, *args, mutable=False, **kwargs):
        self.calls.append(kwargs)
        logits = variables["params"]["logits"]
        return logits if mutable is False else (logits, {"intermediates": {}})

    def __call__(self):
        raise AssertionError("only applied")


def model(library, name, module=None, optimizer=None, **options):
    """A model on given logits, or on `module`; with Adafactor, or with `optimizer`."""
    vocabulary = seqio.PassThroughVocabulary(64)
    return getattr(library.models, f"EncoderDecoderModel{name}")(
        module=module or GivenLogits(),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=optimizer
        or adafactor.Adafactor(
            decay_rate=0.8,
            step_offset=0,
            logical_factor_rules=adafactor.standard_logical_factor_rules(),
        ),
        **options,
    )


def tiny_network(**options):
    """A T5 1.1 in float32 that trains in no time."""
    sizes = {
        "vocab_size": 64,
        "emb_dim": 16,
        "num_heads": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "head_dim": 8,
        "mlp_dim": 16,
        "mlp_activations": ("gelu", "linear"),
        "dropout_rate": 0.0,
    }
    return t5patches.network.Transformer(t5patches.network.T5Config(**sizes | options))


def batch(rows=8, length=6, seed=0, vocabulary=64):
    """Tokens, with kept, pushed-down and ignored ones among them."""
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(1, vocabulary, (rows, length)).astype(np.int32)

    targets = ids()
    return {
        "encoder_input_tokens": ids(),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": rng.choice([-1, 0, 1, 1], (rows, length)).astype(np.int32),
    }


def one_row(logits, targets, weights):
    """A batch of one sequence for `GivenLogits`, and its parameters."""
    targets, weights = jnp.asarray([targets], jnp.int32), jnp.asarray([weights], jnp.int32)
    tokens = {
        "encoder_input_tokens": targets,
        "decoder_input_tokens": targets,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": weights,
    }
    return tokens, {"logits": jnp.asarray([logits], jnp.float32)}


def decoder_only(library, name):
    """A twin on T5X's own decoder-only network."""
    config = decoder_only_network.TransformerConfig(
        vocab_size=64, emb_dim=16, num_heads=2, num_layers=1, head_dim=8, mlp_dim=16
    )
    return getattr(library.models, f"DecoderOnlyModel{name}")(
        module=decoder_only_network.DecoderWrapper(config),
        vocabulary=seqio.PassThroughVocabulary(64),
        optimizer_def=None,
    )


def decoder_only_batch(rows=2, length=6):
    """Three tokens of input before those of the target."""
    tokens = batch(rows, length)
    del tokens["encoder_input_tokens"]
    is_input = np.arange(length) < 3
    tokens["decoder_loss_weights"] = np.where(is_input, 0, tokens["decoder_loss_weights"])
    tokens["decoder_causal_attention"] = np.tile(is_input.astype(np.int32), (rows, 1))
    return tokens


class State(NamedTuple):
    """As much of a train state as a gradient needs."""

    params: object
    flax_mutables: object


# --- Training ------------------------------------------------------------------------------------


def partitioner(model_axis=1):
    """All 8 devices, as data x model. (T5X makes 1 x 8 of any `num_partitions` on a CPU.)"""
    return partitioning.PjitPartitioner(model_parallel_submesh=(1, model_axis))


def initial_state(trained, parts, rows=8, length=6, seed=0):
    """A train state from scratch and its axes."""
    shapes = {name: x.shape for name, x in batch(rows, length).items()}
    initializer = utils.TrainStateInitializer(
        optimizer_def=trained.optimizer_def,
        init_fn=trained.get_initial_variables,
        input_shapes=shapes,
        partitioner=parts,
        input_types=dict.fromkeys(shapes, jnp.int32),
    )
    return initializer.from_scratch(jax.random.PRNGKey(seed)), initializer.train_state_axes


@contextlib.contextmanager
def trainer(
    library, trained, *, state=None, model_axis=1, directory=None, seed=0, kind=None, **options
):
    """A trainer of a model from scratch, or from a state."""
    parts = partitioner(model_axis)
    fresh, axes = initial_state(trained, parts, seed=seed)
    kind = kind or library.trainer.SelfDistillationTrainer
    options = {"num_microbatches": None} | options
    made = kind(
        trained,
        train_state=fresh if state is None else state(fresh),
        partitioner=parts,
        eval_names=["eval"],
        summary_dir=None if directory is None else str(directory),
        train_state_axes=axes,
        rng=jax.random.PRNGKey(1),
        learning_rate_fn=lambda step: 1e-3,
        **options,
    )
    with made:
        yield made


def steps(made, count, first=0, **shape):
    """Trains and returns the loss of every step."""
    losses = []
    for i in range(first, first + count):
        metrics = made.train(iter([batch(seed=i, **shape)]), 1).result()
        losses.append(float(metrics["loss"].value))
    return losses
