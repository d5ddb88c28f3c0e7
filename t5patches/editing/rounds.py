"""A model folder and what edits made of it, measured on the same inputs, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from t5patches.editing.annotate import Keep
from t5patches.editing.collect import asked
from t5patches.editing.evaluate import (
    Evaluation,
    Measuring,
    evaluate,
    own_measures,
    read_original,
    require_room_to_measure,
    say,
)
from t5patches.editing.outputs import ALIGN_RECORD, record_in
from t5patches.editing.plan import yet_to_place
from t5patches.editing.records import check_chat, read_rounds
from t5patches.editing.report import Results, Row
from t5patches.editing.train import training_progress
from t5patches.model.folder import LoadedModel, inspect_model, load_model
from t5patches.model.lora import is_adapter
from t5patches.model.protocol import LanguageModel, differing
from t5patches.model.tokenizer import Inputs, Tokenizer, same_vocabulary
from t5patches.runs.claims import Parts, claim, hold, make_part


def compare(
    before: str | os.PathLike[str],
    after: Sequence[str | os.PathLike[str]],
    inputs: Sequence[Inputs],
    measuring: Measuring,
    console: Console | None = None,
    work: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    *,
    chat: str = "auto",
    dtype: str = "float32",
) -> Results:
    """Measures an original model and edits of it.

    Args:
        before: the original's folder.
        after: folders of edits: rounds one after the other, or different edits.
        inputs: what to give to each.
        measuring: what to ask of each.
        console: where to tell what happens; default, the terminal's standard error.
        work: a directory for what the models say, so that a killed comparison goes on when it is
            repeated; it is the caller's to remove. None keeps nothing.
        base: the folder that adapters lie beside; None is `before`.
        chat: "on", "off" or "auto", see `t5patches.model.tokenizer_files.load_tokenizer`.
        dtype: of activations and of the cache, "float32" or "bfloat16".

    Returns:
        The original's own measures and a row for each of the edits, for the report.

    Raises:
        ValueError: a folder is not whole, or not of an edit of the original: sizes or tokenizer
            differ; `work` is of another comparison; or a batch does not fit into memory.
    """
    if base is not None and not any(map(is_adapter, (before, *after))):
        raise ValueError(f"base is {base}, and neither {before} nor any edit of it is an adapter")
    twice = [folder for i, folder in enumerate(after) if Path(folder) in map(Path, after[:i])]
    if twice:
        raise ValueError(f"{twice[0]} is given twice as an edit to measure: give it once")
    # The last of them is read after hours, and what is wrong with it is told now.
    inspected = _inspected(before, base, chat)
    for folder in after:
        _check_alike(folder, _inspected(folder, base or before, chat), inspected, inputs)
    how: Any = {"chat": chat, "dtype": dtype}
    original, meter = load_model(before, base, **how), measuring.meter
    require_room_to_measure(
        original.model,
        inputs,
        original.tokenizer,
        measuring,
        # Of the edits, one at a time.
        beside=yet_to_place(original.model.head_params(original.params))
        + sum(x.nbytes for x in jax.tree.leaves(original.params)),
    )
    if work is not None:
        hold(work)
        claim(work, {"settings": measuring.asks})
    keep = _keep(work, "before", original, inputs, measuring)
    original = _on_device(original)
    with training_progress(console) as progress:
        more: Any = {"measuring": measuring, "progress": progress}
        said = say(*original[:2], inputs, original.tokenizer, keep=keep, **more)
        own = own_measures(said, measuring)
        read = read_original(*original[:2], said.greedy, batch_size=measuring.batch_size)
        # No more of it is needed beside an edit.
        original = original._replace(params=read.head)
        rows = []
        for number, folder in enumerate(after, start=1):
            edited = load_model(folder, base or before, **how)
            keep = _keep(work, f"after-{number}", edited, inputs, measuring)
            edited = _on_device(edited)
            found = evaluate(*edited[:2], read, edited.tokenizer, keep=keep, **more)
            rows.append(_row(folder, found))
    return Results(
        title=f"Edits of {before}",
        about=f"Each answered the same {len(inputs)} inputs, which no edit should have seen.",
        errors=f"over {len({*inputs})} inputs",
        before=own,
        outputs=said.greedy,
        rows=rows,
        settings={
            "before": os.fspath(before),
            "after": [os.fspath(folder) for folder in after],
            "inputs": len(inputs),
            "max_length": measuring.max_length,
            "seed": measuring.seed,
            "samples": measuring.samples,
            "chat": original.tokenizer.chat,
            "dtype": dtype,
            "meter": meter and {"samples": meter.samples, "threshold": meter.threshold},
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        },
    )


def _on_device(model: LoadedModel) -> LoadedModel:
    """Parameters that are not copied to the device for each measure again."""
    return model._replace(params=jax.tree.map(jnp.asarray, model.params))


def _keep(
    work: str | os.PathLike[str] | None,
    name: str,
    model: LoadedModel,
    inputs: Sequence[Inputs],
    measuring: Measuring,
) -> Keep:
    """Keeps what a model says; asked before its parameters are on a device, as it reads them."""
    if work is None:
        return make_part
    return Parts(Path(work) / name, asked(model, inputs) | {"settings": measuring.asks}).get


def _row(folder: str | os.PathLike[str], found: Evaluation) -> Row:
    records = read_rounds(folder)
    note = os.fspath(folder)
    aligned = record_in(ALIGN_RECORD)(Path(folder))
    # What `align` has trained since the last edit is not what that edit made.
    if not records or (aligned is not None and aligned.get("edits") == len(records)):
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


def _inspected(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None, chat: str
) -> tuple[LanguageModel, Tokenizer]:
    """Refuses a folder that is not whole; a whole model's weights are not read."""
    model, tokenizer = inspect_model(folder, base, chat=chat)
    read_rounds(folder)
    check_chat(folder, chat, base)
    return model.replace(dropout_rate=0.0), tokenizer


def _check_alike(
    folder: str | os.PathLike[str],
    edited: tuple[LanguageModel, Tokenizer],
    before: tuple[LanguageModel, Tokenizer],
    inputs: Sequence[Inputs],
) -> None:
    """Refuses what is not of an edit of the original.

    Args:
        folder: of the edit.
        edited: what `_inspected` found there.
        before: the same of the original.
        inputs: what is given to both.
    """
    (model, tokenizer), (original, of_original) = edited, before
    if model != original:
        found = differing(model.config, original.config) or ["family"]
        raise ValueError(f"{folder} is no edit of the original: they differ in {', '.join(found)}")
    for number, text in enumerate(inputs, start=1):
        if tokenizer.encode_prompt(text) != of_original.encode_prompt(text):
            raise ValueError(
                f"{folder} is no edit of the original: its tokenizer splits input {number} "
                "otherwise"
            )
    if not same_vocabulary(tokenizer, of_original):
        raise ValueError(
            f"{folder} is no edit of the original: its tokenizer writes some token otherwise"
        )
