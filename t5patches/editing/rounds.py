"""A model folder and what edits made of it, measured on the same inputs, side by side."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from t5patches.editing.data import Example
from t5patches.editing.edit import read_rounds
from t5patches.editing.evaluate import Measuring, evaluate, own_measures, say
from t5patches.editing.model import Model, load_model
from t5patches.editing.report import Results, Row
from t5patches.editing.train import training_progress


def compare(
    before: str | os.PathLike[str],
    after: Sequence[str | os.PathLike[str]],
    inputs: Sequence[str],
    measuring: Measuring,
    console: Console | None = None,
) -> Results:
    """Measures an original model and edits of it.

    Args:
        before: the original's folder.
        after: folders of edits: rounds one after the other, or different edits.
        inputs: what to give to each.
        measuring: what to ask of each.
        console: where to tell what happens; default, the terminal's standard error.

    Returns:
        The original's own measures and a row for each of the edits, for the report.

    Raises:
        ValueError: a folder is not whole, or not of an edit of the original: sizes or tokenizer
            differ.
    """
    original, meter = _on_device(load_model(before)), measuring.meter
    with training_progress(console) as progress:
        config, params, tokenizer = original
        outputs = say(config, params, inputs, tokenizer, measuring, progress=progress)
        own = own_measures(config, params, outputs, tokenizer, measuring, progress=progress)
        rows = [_row(folder, original, outputs, measuring, progress) for folder in after]
    return Results(
        title=f"Edits of {before}",
        about=f"Each answered the same {len(outputs)} inputs, which no edit should have seen.",
        errors=f"over {len(outputs)} inputs",
        before=own,
        outputs=outputs,
        rows=rows,
        settings={
            "before": os.fspath(before),
            "after": [os.fspath(folder) for folder in after],
            "inputs": len(inputs),
            "max_length": measuring.max_length,
            "seed": measuring.seed,
            "meter": meter and {"samples": meter.samples, "threshold": meter.threshold},
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        },
    )


def _on_device(model: Model) -> Model:
    """Parameters that are not copied to the device for each measure again."""
    return model._replace(params=jax.tree.map(jnp.asarray, model.params))


def _row(
    folder: str | os.PathLike[str],
    original: Model,
    outputs: Sequence[Example],
    measuring: Measuring,
    progress: Progress,
) -> Row:
    edited = _on_device(load_model(folder))
    _check_alike(folder, edited, original, [example.inputs for example in outputs])
    config, params, tokenizer = edited
    found = evaluate(
        config, params, original.params, outputs, tokenizer, measuring, progress=progress
    )
    records = read_rounds(folder)
    note = os.fspath(folder)
    if not records:
        return Row(None, None, 0, found.measures, outputs=found.outputs, note=note)
    settings, history = records[-1]["settings"], records[-1]["history"]
    return Row(
        settings["objective"],
        None if settings["objective"] == "ce" else settings["alpha"],
        settings["negatives"],
        found.measures,
        history,
        found.outputs,
        note,
    )


def _check_alike(
    folder: str | os.PathLike[str], edited: Model, original: Model, inputs: Sequence[str]
) -> None:
    there = dataclasses.asdict(original.config) | {"dropout_rate": edited.config.dropout_rate}
    differing = [
        f"{name} is {value} and the original's {there[name]}"
        for name, value in dataclasses.asdict(edited.config).items()
        if value != there[name]
    ]
    if differing:
        raise ValueError(f"{folder} is no edit of the original: {'; '.join(differing)}")
    for number, text in enumerate(inputs, start=1):
        if edited.tokenizer.encode(text) != original.tokenizer.encode(text):
            raise ValueError(
                f"{folder} is no edit of the original: its tokenizer splits input {number} "
                "otherwise"
            )
