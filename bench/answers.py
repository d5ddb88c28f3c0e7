r"""Corrections that answer, beside corrections that stop and marks alone, on the demo's task.

    python -m bench.answers                     # minutes; a killed run goes on with --keep DIR

The demo's tiny T5 names places that the news does not name. What it said is marked, and each marked
summary gets one of two corrections:

* one that **stops** in front of the place: "Fire closes bakery.";
* one that **answers**, as a counter-narrative does: it says what is wrong with naming a place, and
  goes on: "Fire closes bakery, where is not known, 20 people moved".

The model never says the second of itself: marks can take words away from it and no correction can
be learnt from them. Files of such corrections are what `t5patches edit` takes as `--data`.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import common
from t5patches.editing.data import Example, training_arrays, write_examples
from t5patches.editing.demo import DemoConfig, Repetition
from t5patches.editing.demo_task import ENTITY_FREE
from t5patches.editing.evaluate import evaluate, own_measures
from t5patches.editing.experiment import Edit
from t5patches.editing.train import TrainSettings, training_progress
from t5patches.model.tokenizer import Span

ANSWER = ", where is not known"
# What is marked: greedy and sampled outputs, without sets.
CONFIG = DemoConfig(edits=(Edit("tnrf"), Edit("ce", on_sampled=True)))


def answers(summary: str, spans: Sequence[Span]) -> str:
    """A summary that says of each place that it should not name, that it is not known.

    Example:
        >>> answers("Fire closes bakery in Quarley, 20 people moved", [(22, 29)])
        'Fire closes bakery, where is not known, 20 people moved'
    """
    for start, end in sorted(spans, reverse=True):
        summary = _before(summary, start) + ANSWER + summary[end:]
    return summary


def stops(summary: str, spans: Sequence[Span]) -> str:
    """A summary that ends where it would name a place that it should not.

    Example:
        >>> stops("Fire closes bakery in Quarley, 20 people moved", [(22, 29)])
        'Fire closes bakery.'
    """
    return _before(summary, min(start for start, _ in spans)) + "."


def _before(summary: str, start: int) -> str:
    return summary[:start].rstrip().removesuffix(" in")


class Way(NamedTuple):
    """A way to edit.

    Attributes:
        name: for people.
        objective: one of `t5patches.editing.train.OBJECTIVES`.
        corrects: makes the correction of a marked summary; None leaves the demo's.
        on_sampled: trains on sampled outputs and not on greedy ones.
    """

    name: str
    objective: str
    corrects: Callable[[str, Sequence[Span]], str] | None = None
    on_sampled: bool = False


WAYS = (
    Way("marks alone (TNRF, no sets)", "tnrf"),
    Way("stops, corrective, on sampled outputs", "ce", stops, on_sampled=True),
    Way("answers, corrective, on sampled outputs", "ce", answers, on_sampled=True),
    Way("answers, corrective", "ce", answers),
    Way("answers, DPO", "dpo", answers),
)
SHOWN = WAYS[2].name  # whose example stands beside the table


def corrected(examples: Sequence[Example], way: Way) -> list[Example]:
    """The data of a way: marked outputs with its corrections."""
    if way.corrects is None:
        return list(examples)
    return [
        dataclasses.replace(e, corrected=way.corrects(e.outputs, e.spans)) if e.spans else e
        for e in examples
    ]


def edited(repetition: Repetition, way: Way, learning_rate: float) -> Any:
    """The parameters that a way leads to."""
    (model, params, tokenizer), config = repetition.original, repetition.config
    examples = corrected(repetition.marked[way.on_sampled], way)
    name = f"{way.objective}-{getattr(way.corrects, '__name__', 'marks')}-{way.on_sampled:d}"
    write_examples(repetition.directory / f"{name}.jsonl", examples)
    settings = TrainSettings(
        objective=way.objective,
        alpha=1.0,
        steps=config.edit_steps,
        batch_size=config.edit_batch_size,
        learning_rate=learning_rate,
        optimizer="adam",
    )
    arrays = training_arrays(
        examples, tokenizer, way.objective, pad_id=model.config.pad_id, negatives=0
    )
    return repetition.train(name, model, params, arrays, settings).params


def said(outputs: Sequence[Example], before: Sequence[Example]) -> dict[str, float]:
    """What becomes of the original's outputs, in percent.

    How often it is answered and how often stopped where it named a place that it should not, and
    how often answered where it said "the area", or the place that the news names.
    """
    due = np.array([bool(example.spans) for example in before])
    vague = ~due & np.array([ENTITY_FREE in example.outputs for example in before])
    answered = np.array([ANSWER in example.outputs for example in outputs])
    stopped = np.array(["," not in example.outputs for example in outputs])
    shares = {
        "answered": answered[due],
        "stopped": stopped[due],
        "vague": answered[vague],
        "stated": answered[~due & ~vague],
    }
    return {name: 100 * float(x.mean()) if len(x) else 0.0 for name, x in shares.items()}


def measured(repetition: Repetition, ways: Sequence[Way], learning_rate: float) -> list[dict]:
    """A row for the original and one for each way."""
    model, _, tokenizer = repetition.original
    measuring = dataclasses.replace(repetition.measuring, references=None, well_formed=None)
    before = repetition.outputs
    rows: list[dict[str, Any]] = []

    def add(name: str, outputs: Sequence[Example], measures: dict) -> None:
        kept = ("kl", "prevalence", "prevalence_sampled", "exact_match_clean")
        of = {k: dataclasses.astuple(measures[k])[:2] for k in kept if k in measures}
        rows.append({"name": name, "measures": of, "said": said(outputs, before)})
        if outputs is not before:
            pairs = zip(before, outputs, strict=True)
            rows[-1]["example"] = next((a.outputs, b.outputs) for a, b in pairs if a.spans)
        print(rows[-1], flush=True)

    own = own_measures(repetition.said, measuring)
    add("before", before, own)
    for way in ways:
        params = edited(repetition, way, learning_rate)
        found = evaluate(model, params, repetition.before, tokenizer, measuring)
        add(way.name, found.outputs, found.measures)
    return rows


def main() -> None:
    """Edits, measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument(
        "--keep", metavar="DIR", help="where to work; default: where all is removed"
    )
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as passing,
        training_progress(Console(stderr=True)) as progress,
    ):
        directory = pathlib.Path(options.keep or passing)
        repetition = Repetition(directory, progress, 0, CONFIG)
        rows = measured(repetition, WAYS, options.learning_rate)
    settings = {"updates": CONFIG.edit_steps, "learning_rate": options.learning_rate}
    path = common.save("answers", rows, settings=settings, held_out=CONFIG.held_out)
    table = Table(title=f"percent of {CONFIG.held_out} held-out inputs; KL in nats")
    shown = [cells(row) for row in rows]
    for name in ("", *shown[0]):
        table.add_column(name, justify="right")
    for row, values in zip(rows, shown, strict=True):
        table.add_row(row["name"], *values.values())
    Console(width=160).print(table)
    print(f"stored in {path}")


def cells(row: dict) -> dict[str, str]:
    """A row of the table, by the heads of its columns."""
    of, told = row["measures"], row["said"]

    def with_error(name: str, digits: int) -> str:
        return "" if name not in of else f"{of[name][0]:.{digits}f} ± {of[name][1]:.{digits}f}"

    return {
        "unwanted, %": with_error("prevalence", 1),
        "sampled, %": with_error("prevalence_sampled", 1),
        "answered, %": f"{told['answered']:.1f}",
        "stopped, %": f"{told['stopped']:.1f}",
        "the area: answered, %": f"{told['vague']:.1f}",
        "stated: answered, %": f"{told['stated']:.1f}",
        "clean kept, %": with_error("exact_match_clean", 1),
        "KL": with_error("kl", 4),
    }


if __name__ == "__main__":
    main()
