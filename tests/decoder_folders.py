"""The small Hugging Face folders of decoder-only models under `data/decoders/`."""

import functools
import pathlib

import numpy as np

from t5patches.model.huggingface import load_checkpoint

DATA = pathlib.Path(__file__).parent / "data" / "decoders"
NAMES = sorted(path.name for path in DATA.iterdir())


@functools.cache
def load(name):
    """Model, parameters, and what the original library computed."""
    model, params = load_checkpoint(DATA / name)
    with np.load(DATA / name / "expected.npz") as expected:
        return model, params, dict(expected)
