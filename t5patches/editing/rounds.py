"""A model folder and what edits made of it, measured on the same inputs, side by side."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress

from t5patches.editing.annotate import Rule, speak
from t5patches.editing.data import Example, Source
from t5patches.editing.edit import read_rounds
from t5patches.editing.evaluate import Meter, evaluate, own_measures, unmarked
from t5patches.editing.model import Model, load_model
from t5patches.editing.report import Results, Row
from t5patches.editing.train import training_progress


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What to ask of every model.

    Attributes:
        sources: what to give to it.
        rule: says what is unwanted; None where nothing is known to be.
        references: compare outputs with the references of `sources`.
        meter: for a score of sampled outputs; None for none.
        max_length: tokens that an output may have.
        batch_size: outputs made at a time.
    """

    sources: Sequence[Source]
    rule: Rule | None = None
    references: bool = False
    meter: Meter | None = None
    max_length: int = 64
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuses to compare with references that are not there."""
        absent = [i for i, source in enumerate(self.sources, start=1) if not source.references]
        if self.references and absent:
            raise ValueError(
                f"{len(absent)} of {len(self.sources)} inputs have no references (the first is "
                f'number {absent[0]}): give a .jsonl file with {{"inputs": "...", "references": '
                '["..."]} a line'
            )

    def options(self, progress: Progress) -> dict[str, Any]:
        """Arguments that `own_measures` and `evaluate` have in common."""
        return {
            "max_length": self.max_length,
            "batch_size": self.batch_size,
            "references": [s.references for s in self.sources] if self.references else None,
            "meter": self.meter,
            "progress": progress,
        }


def compare(
    before: str | os.PathLike[str],
    after: Sequence[str | os.PathLike[str]],
    measuring: Measuring,
    console: Console | None = None,
) -> Results:
    """Measures an original model and edits of it.

    Args:
        before: the original's folder.
        after: folders of edits: rounds one after the other, or different edits.
        measuring: what to ask of each.
        console: where to tell what happens; default, the terminal's standard error.

    Returns:
        The original's own measures and a row for each of the edits, for the report.

    Raises:
        ValueError: a folder is not whole, or not of an edit of the original: sizes or tokenizer
            differ.
    """
    original = _on_device(load_model(before))
    with training_progress(console) as progress:
        outputs = _greedy(original, measuring, progress)
        own = own_measures(
            original.config,
            original.params,
            outputs,
            measuring.rule,
            original.tokenizer,
            **measuring.options(progress),
        )
        rows = [_row(folder, original, outputs, measuring, progress) for folder in after]
    return Results(
        title=f"Edits of {before}",
        about=f"Each answered the same {len(outputs)} inputs, which no edit should have seen.",
        errors=f"over {len(outputs)} inputs",
        before=own,
        outputs=outputs,
        rows=rows,
        settings=_settings(before, after, measuring),
    )


def _on_device(model: Model) -> Model:
    """Parameters that are not copied to the device for each measure again."""
    return model._replace(params=jax.tree.map(jnp.asarray, model.params))


def _greedy(model: Model, measuring: Measuring, progress: Progress) -> list[Example]:
    return speak(
        model.config,
        model.params,
        [source.inputs for source in measuring.sources],
        measuring.rule or unmarked,
        model.tokenizer,
        max_length=measuring.max_length,
        batch_size=measuring.batch_size,
        progress=progress,
    )


def _row(
    folder: str | os.PathLike[str],
    original: Model,
    outputs: Sequence[Example],
    measuring: Measuring,
    progress: Progress,
) -> Row:
    edited = _on_device(load_model(folder))
    _check_alike(folder, edited, original, measuring.sources)
    found = evaluate(
        edited.config,
        edited.params,
        original.params,
        outputs,
        measuring.rule,
        edited.tokenizer,
        **measuring.options(progress),
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
    folder: str | os.PathLike[str], edited: Model, original: Model, sources: Sequence[Source]
) -> None:
    there = dataclasses.asdict(original.config) | {"dropout_rate": edited.config.dropout_rate}
    differing = [
        f"{name} is {value} and the original's {there[name]}"
        for name, value in dataclasses.asdict(edited.config).items()
        if value != there[name]
    ]
    if differing:
        raise ValueError(f"{folder} is no edit of the original: {'; '.join(differing)}")
    for number, source in enumerate(sources, start=1):
        if edited.tokenizer.encode(source.inputs) != original.tokenizer.encode(source.inputs):
            raise ValueError(
                f"{folder} is no edit of the original: its tokenizer splits input {number} "
                "otherwise"
            )


def _settings(
    before: str | os.PathLike[str], after: Sequence[str | os.PathLike[str]], measuring: Measuring
) -> dict[str, Any]:
    meter = measuring.meter
    return {
        "before": os.fspath(before),
        "after": [os.fspath(folder) for folder in after],
        "inputs": len(measuring.sources),
        "max_length": measuring.max_length,
        "meter": meter and {"samples": meter.samples, "threshold": meter.threshold},
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
