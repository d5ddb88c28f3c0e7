"""One model, one habit, many edits: all from the same marked outputs, and all measured alike.

Everything that takes long is kept in the experiment's directory, so that a killed one goes on
where it was.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import Progress

from t5patches.editing.annotate import Keep, Rule, expand_negatives, mark_nothing, speak
from t5patches.editing.constrained import evaluate_constrained
from t5patches.editing.data import (
    Batch,
    Example,
    only_where_marked,
    read_examples,
    training_arrays,
    write_examples,
)
from t5patches.editing.evaluate import (
    Measure,
    Measuring,
    Original,
    Said,
    evaluate,
    over_seeds,
    own_measures,
    read_original,
    say,
)
from t5patches.editing.mixing import mixture_order
from t5patches.editing.report import Results, Row
from t5patches.editing.train import Trained, TrainSettings, train
from t5patches.model import lora
from t5patches.model.folder import LoadedModel
from t5patches.model.protocol import LanguageModel, Params
from t5patches.model.tokenizer import Inputs
from t5patches.runs.claims import Parts
from t5patches.runs.fingerprints import json_fingerprint


@dataclasses.dataclass(frozen=True)
class Edit:
    """An objective to edit with.

    Attributes:
        objective: one of `t5patches.editing.train.OBJECTIVES`.
        alpha: factor on the loss of pushed-down tokens.
        with_sets: push down sets of negatives and not the emitted token only.
        on_sampled: train on sampled outputs and not on greedy ones. These show the model's own
            distribution to objectives that know it from nowhere else.
        everywhere: sets also where nothing is marked, see
            `t5patches.editing.annotate.expand_negatives`.
        with_kept: half of what is drawn is `Experiment.kept`.
        steps: updates; None makes as many as `Experiment.training` says.
        rank: of an adapter that is trained and then merged; None trains all parameters.
        learning_rate: None takes that of `Experiment.training`.
    """

    objective: str
    alpha: float = 1.0
    with_sets: bool = False
    on_sampled: bool = False
    everywhere: bool = False
    with_kept: bool = False
    steps: int | None = None
    rank: int | None = None
    learning_rate: float | None = None

    @property
    def folder(self) -> str:
        """The name of its run's folder: no two edits have the same."""
        name = f"{self.objective}-{self.alpha:g}" + "-sets" * self.with_sets
        name += "-sampled" * self.on_sampled + "-everywhere" * self.everywhere
        name += "-kept" * self.with_kept + (f"-{self.steps}" if self.steps else "")
        name += f"-lora-{self.rank}" if self.rank else ""
        return name + (f"-rate-{self.learning_rate:g}" if self.learning_rate else "")


class Measured(NamedTuple):
    """What came of one experiment.

    Attributes:
        before: the original's own measures.
        ceiling: of the original under the constraint, see `t5patches.editing.constrained`; empty
            where it was not asked for.
        outputs: what the original says to the held-out inputs, marked.
        rows: the edits.
    """

    before: Mapping[str, Measure]
    ceiling: Mapping[str, Measure]
    outputs: Sequence[Example]
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class Experiment(abc.ABC):
    """What a habit's edits have in common; each is made and measured when it is asked for.

    Attributes:
        directory: for what takes long, which is not done again where it is there; made if absent,
            and of this experiment alone.
        progress: shows how far it is.
        seed: of whatever is drawn.
    """

    directory: Path
    progress: Progress
    seed: int

    def __post_init__(self) -> None:
        """Takes the directory, and refuses one of another experiment or process."""
        _ = self.parts

    # What a kind of experiment has to say.

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What is done, for the report."""

    @property
    @abc.abstractmethod
    def about(self) -> str:
        """How, in a few sentences."""

    @property
    @abc.abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What to tell about it besides."""

    @property
    @abc.abstractmethod
    def original(self) -> LoadedModel:
        """The model that has the habit."""

    @property
    @abc.abstractmethod
    def to_mark(self) -> Sequence[Inputs]:
        """The inputs whose outputs the edits train on."""

    @property
    def to_keep(self) -> Sequence[Inputs]:
        """Inputs to which nothing unwanted is said, for the edits that ask for them."""
        raise NotImplementedError(f"{type(self).__name__} has no text to keep for an edit")

    @property
    @abc.abstractmethod
    def held_out(self) -> Sequence[Inputs]:
        """Others, to measure on."""

    @property
    @abc.abstractmethod
    def rule(self) -> Rule:
        """Says what is unwanted."""

    @property
    @abc.abstractmethod
    def measuring(self) -> Measuring:
        """What is asked of every model, with this rule."""

    @property
    @abc.abstractmethod
    def edits(self) -> Sequence[Edit]:
        """The edits to compare."""

    @property
    @abc.abstractmethod
    def training(self) -> TrainSettings:
        """How all of them train, but for what an `Edit` names."""

    @property
    @abc.abstractmethod
    def negatives(self) -> int:
        """K, alternatives that are tried at each marked position, and the size of the sets."""

    @property
    def rollout_length(self) -> int | None:
        """Tokens behind an alternative that the rule has to see; None for all of them."""
        return None

    @abc.abstractmethod
    def corrected(self, outputs: Sequence[Example]) -> list[Example]:
        """Outputs with corrections of what is marked."""

    def besides(self, params: Params) -> dict[str, Measure]:
        """What is measured of an edited model besides."""
        del params
        return {}

    @property
    def identity(self) -> Mapping[str, Any]:
        """What everything in the directory comes from, but for an `Edit`."""
        return {
            "seed": self.seed,
            "to_mark": json_fingerprint(self.to_mark),
            "held_out": json_fingerprint(self.held_out),
            "asks": self.measuring.asks,
            "samples": self.measuring.samples,
            "training": dataclasses.asdict(self.training),
            "negatives": self.negatives,
            "everywhere": any(edit.everywhere for edit in self.edits),
            "rollout_length": self.rollout_length,
        }

    # What follows.

    @functools.cached_property
    def parts(self) -> Parts:
        """What was said and measured, so that a killed experiment does none of it again."""
        return Parts(self.directory, self.identity)

    def keep(self, name: str) -> Keep:
        """Keeps what a model of this name says."""
        return lambda part, make: self.parts.get(f"{name}-{part}", make)

    def once(self, name: str, measure: Callable[[], Mapping[str, Measure]]) -> dict[str, Measure]:
        """Measures, or what an earlier, killed experiment measured."""

        def numbers() -> dict[str, list[Any]]:
            return {
                key: [m.value, m.error, None if m.samples is None else m.samples.tolist()]
                for key, m in measure().items()
            }

        return {
            key: Measure(value, error, None if samples is None else np.array(samples))
            for key, (value, error, samples) in self.parts.get(name, numbers).items()
        }

    @functools.cached_property
    def said(self) -> Said:
        """What the original says to the held-out inputs."""
        model, params, tokenizer = self.original
        keep = self.keep("original")
        return say(model, params, self.held_out, tokenizer, self.measuring, keep=keep)

    @property
    def outputs(self) -> list[Example]:
        """Its greedy outputs, marked."""
        return self.said.greedy

    @functools.cached_property
    def before(self) -> Original:
        """These, read by the original once for all edits."""
        batch_size = self.measuring.batch_size
        return read_original(*self.original[:2], self.outputs, batch_size=batch_size)

    @functools.cached_property
    def marked(self) -> dict[bool, list[Example]]:
        """The original's own outputs to edit on: False for greedy, True for sampled ones."""
        return {
            on_sampled: self._marked(on_sampled)
            for on_sampled in sorted({edit.on_sampled for edit in self.edits})
        }

    def _marked(self, on_sampled: bool) -> list[Example]:
        """With corrections and, where an edit asks, with sets, everywhere."""
        model, params, tokenizer = self.original
        path = self.directory / ("sampled.jsonl" if on_sampled else "edits.jsonl")
        if path.exists():
            return read_examples(path, tokenizer)
        asks: Mapping[str, Any] = self.measuring.asks
        temperature = 1.0 if on_sampled else 0.0
        spoken = speak(
            model, params, self.to_mark, self.rule, tokenizer, temperature=temperature, **asks
        )
        outputs = self.corrected(spoken)
        edits = [edit for edit in self.edits if edit.on_sampled == on_sampled and edit.with_sets]
        if edits:
            outputs = self.expanded(outputs, everywhere=any(edit.everywhere for edit in edits))
        write_examples(path, outputs)
        return outputs

    @functools.cached_property
    def kept(self) -> list[Example]:
        """What the original says to `to_keep`: nothing is pushed down."""
        model, params, tokenizer = self.original
        path = self.directory / "kept.jsonl"
        if not path.exists():
            asks: Mapping[str, Any] = self.measuring.asks
            said = speak(
                model, params, self.to_keep, mark_nothing, tokenizer, temperature=1.0, **asks
            )
            write_examples(path, said)
        return read_examples(path, tokenizer)

    def expanded(self, outputs: Sequence[Example], *, everywhere: bool = False) -> list[Example]:
        """With what else would be unwanted at each marked position, or everywhere."""
        model, params, tokenizer = self.original
        return expand_negatives(
            outputs,
            self.rule,
            tokenizer,
            model,
            params,
            count=self.negatives,
            max_length=self.measuring.max_length,
            everywhere=everywhere,
            rollout_length=self.rollout_length,
            progress=self.progress,
        )

    def edited(self, edit: Edit) -> Trained:
        """Makes an edit."""
        model, params, tokenizer = self.original
        settings = dataclasses.replace(
            self.training,
            objective=edit.objective,
            alpha=edit.alpha,
            negatives=self.negatives if edit.with_sets else 0,
            steps=edit.steps or self.training.steps,
            learning_rate=edit.learning_rate or self.training.learning_rate,
            lora=lora.Lora(edit.rank) if edit.rank else None,
        )
        marked, kept = self.marked[edit.on_sampled], self.kept if edit.with_kept else []
        if not edit.everywhere:
            marked = [only_where_marked(example) for example in marked]
        arrays = training_arrays(
            [*marked, *kept],
            tokenizer,
            edit.objective,
            pad_id=model.config.pad_id,
            negatives=settings.negatives,
        )
        order = None
        if kept:
            places = settings.steps * settings.batch_size
            order = mixture_order((len(marked), len(kept)), (0.5, 0.5), places, settings.seed)
        trained = self.train(edit.folder, model, params, arrays, settings, order)
        if settings.lora is None:
            return trained
        return trained._replace(params=lora.merged(params, trained.params, settings.lora))

    def train(
        self,
        name: str,
        model: LanguageModel,
        params: Params,
        arrays: Batch,
        settings: TrainSettings,
        order: np.ndarray | None = None,
    ) -> Trained:
        """Trains, unless an earlier, killed experiment did it already, and keeps its seconds.

        Nobody knows them of one that such an experiment had begun.
        """
        folder = self.directory / name
        fresh, began = not folder.exists(), time.monotonic()
        trained = train(
            model, params, arrays, settings, folder, order=order, progress=self.progress
        )
        seconds = time.monotonic() - began if fresh else math.nan
        self.once(f"{name}-seconds", lambda: {"seconds": Measure(seconds, math.nan)})
        return trained

    def row(self, edit: Edit) -> Row:
        """An edit, measured."""
        model, _, tokenizer = self.original
        trained, keep = self.edited(edit), self.keep(edit.folder)
        asked = (tokenizer, self.measuring)

        def measure() -> dict[str, Measure]:
            found = evaluate(model, trained.params, self.before, *asked, keep=keep)
            return {**found.measures, **self.besides(trained.params)}

        measures = self.once(f"{edit.folder}-measures", measure)
        measures |= self.once(f"{edit.folder}-seconds", dict)
        # Read where `evaluate` kept it.
        outputs = say(model, trained.params, self.held_out, *asked, keep=keep).greedy
        notes = ["on sampled outputs"] * edit.on_sampled + ["everywhere"] * edit.everywhere
        notes += ["kept text"] * edit.with_kept
        notes += [f"{edit.steps} updates"] if edit.steps else []
        notes += [f"an adapter of rank {edit.rank}"] if edit.rank else []
        notes += [f"rate {edit.learning_rate:g}"] if edit.learning_rate else []
        return Row(
            edit.objective,
            None if edit.objective == "ce" else edit.alpha,
            self.negatives if edit.with_sets else 0,
            measures,
            trained.history,
            outputs,
            ", ".join(notes),
        )

    def measured(self, *, ceiling: bool = False) -> Measured:
        """All of it: the original, the edits and, which takes minutes, the ceiling."""
        model, params, tokenizer = self.original
        before = own_measures(self.said, self.measuring)
        self._tell("before", before)
        bound: Mapping[str, Measure] = {}
        if ceiling:
            asked = (self.outputs, tokenizer, self.measuring)
            bound = self.once(
                "ceiling", lambda: evaluate_constrained(model, params, *asked).measures
            )
            self._tell("the original under the constraint", bound)
        rows: list[Row] = []
        for edit in self.edits:
            rows.append(self.row(edit))
            number = f"{len(rows)}/{len(self.edits)}"
            self._tell(f"{number} {rows[-1].name}", rows[-1].measures)
        return Measured(before, bound, self.outputs, rows)

    def _tell(self, name: str, measures: Mapping[str, Measure]) -> None:
        """Replaces the bars of what is done by a line."""
        for task in self.progress.tasks:
            self.progress.update(task.id, visible=not task.finished)
        kl = f", KL {measures['kl'].value:.4f}" if "kl" in measures else ""
        self.progress.console.print(
            f"seed {self.seed}, {name}: {measures['prevalence'].value:.1f}% unwanted{kl}",
            highlight=False,
        )


def merged(experiment: Experiment, found: Sequence[Measured]) -> Results:
    """Means over seeds; texts and curves are those of the first.

    Args:
        experiment: one of them, which tells what they are.
        found: what came of each.

    Returns:
        The results. The errors are over the held-out inputs of a single experiment, or over
        several seeds.
    """
    first = found[0]
    rows = [
        dataclasses.replace(row, measures=_mean([each.rows[i].measures for each in found]))
        for i, row in enumerate(first.rows)
    ]
    seeds = len(found)
    inputs = {example.inputs for example in first.outputs}
    over = f"{len(inputs)} held-out inputs" if seeds == 1 else f"{seeds} seeds"
    # No time of all of it: one that was killed and went on would tell that of its last run.
    settings = {**experiment.settings, "seeds": seeds}
    settings["jax"] = jax.__version__
    settings["device"] = jax.devices()[0].device_kind
    return Results(
        title=experiment.title,
        about=experiment.about,
        errors=f"over {over}",
        before=_mean([each.before for each in found]),
        ceiling=_mean([each.ceiling for each in found]),
        outputs=first.outputs,
        rows=rows,
        settings=settings,
    )


def _mean(measures: Sequence[Mapping[str, Measure]]) -> dict[str, Measure]:
    return {name: over_seeds([m[name] for m in measures]) for name in measures[0]}
