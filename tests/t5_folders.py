"""The small Hugging Face folders under `data/`, and the oracle that the network tests share."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from t5patches.model.huggingface import load_checkpoint
from t5patches.model.t5.network import Transformer

DATA = pathlib.Path(__file__).parent / "data"
NAMES = ("t5_1_1", "t5_1_0", "mt5")


@functools.cache
def load(name):
    """Model, parameters, and what the original library computed."""
    model, params = load_checkpoint(DATA / name)
    with np.load(DATA / name / "expected.npz") as expected:
        return model, params, dict(expected)


def shift_right(targets):
    """The decoder's inputs."""
    return np.pad(targets, ((0, 0), (1, 0)))[:, :-1]


def apply(config, params, inputs, targets, *, enable_dropout=False, **kwargs):
    """One pass over everything, nothing cached."""
    kwargs["enable_dropout"] = enable_dropout
    tokens = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return Transformer(config).apply({"params": params}, inputs, tokens, targets, **kwargs)


logits = jax.jit(apply, static_argnums=0, static_argnames=("enable_dropout", "return_hidden"))
