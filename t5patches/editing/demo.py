"""The whole loop on a built-in task: train a model, find what it invents, edit it away, measure.

A killed demo goes on where it was: everything that took long is kept under the output directory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import Progress

from t5patches.editing.annotate import expand_negatives, find_spans, speak
from t5patches.editing.constrained import evaluate_constrained
from t5patches.editing.data import (
    Batch,
    Example,
    make_example,
    read_examples,
    to_arrays,
    training_arrays,
    with_end,
    write_examples,
)
from t5patches.editing.demo_task import (
    Pair,
    correct,
    make_pairs,
    places_not_in_source,
    well_formed,
    wordings,
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
from t5patches.editing.report import Results, Row, to_json, write_html
from t5patches.editing.train import (
    Trained,
    TrainSettings,
    finished_run,
    train,
    training_progress,
)
from t5patches.model.folder import LoadedModel
from t5patches.model.huggingface import save_checkpoint
from t5patches.model.protocol import LanguageModel, Params
from t5patches.model.t5.model import small_t5
from t5patches.model.tokenizer import SentencePieceTokenizer, Tokenizer, train_sentencepiece
from t5patches.runs.claims import hold
from t5patches.runs.files import write_file


@dataclasses.dataclass(frozen=True)
class Edit:
    """An objective to edit with.

    Attributes:
        objective: one of `t5patches.editing.train.OBJECTIVES`.
        alpha: factor on the loss of pushed-down tokens.
        with_sets: push down sets of negatives and not the emitted token only.
        on_sampled: train on sampled outputs and not on greedy ones. These show the model's own
            distribution to objectives that know it from nowhere else.
        steps: updates; None makes as many as `DemoConfig.edit_steps`.
    """

    objective: str
    alpha: float = 1.0
    with_sets: bool = False
    on_sampled: bool = False
    steps: int | None = None

    @property
    def folder(self) -> str:
        """The name of its run's folder: no two edits have the same."""
        name = f"{self.objective}-{self.alpha:g}" + "-sets" * self.with_sets
        return name + "-sampled" * self.on_sampled + (f"-{self.steps}" if self.steps else "")


# What `t5patches edit` does unless told otherwise, its two neighbours, and the objectives that have
# no original; of these the last on sampled outputs too, which bring it closest.
EDITS = (
    *(Edit(objective, with_sets=True) for objective in ("tnrf", "tnff", "tnrr", "ul")),
    Edit("nl", 0.3),
    Edit("ce"),
    Edit("ce", on_sampled=True),
)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo.

    Attributes:
        texts: news and summaries that the base model learns from.
        vocab_size: pieces of the vocabulary.
        width: of the model.
        layers: of the encoder, and of the decoder.
        base_steps: updates of the base model.
        base_batch_size: examples in each.
        edit_inputs: news whose summaries, by the base model, are what the edits train on.
        edit_steps: updates of an edit.
        edit_batch_size: examples in each.
        held_out: news to evaluate on.
        max_length: tokens of a summary.
        negatives: K, alternatives tried at each marked position, and the size of the sets.
        seeds: how often to repeat all of it.
        edits: the objectives to compare.
    """

    texts: int = 30_000
    vocab_size: int = 1000
    width: int = 128
    layers: int = 2
    base_steps: int = 500
    base_batch_size: int = 64
    edit_inputs: int = 3000
    edit_steps: int = 100
    edit_batch_size: int = 32
    held_out: int = 600
    max_length: int = 20
    negatives: int = 32
    seeds: int = 1
    edits: tuple[Edit, ...] = EDITS

    def __post_init__(self) -> None:
        """Refuses sizes that make no demo."""
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}: at least 1 is needed")
        if self.negatives > self.vocab_size - 3:
            raise ValueError(
                f"negatives is {self.negatives}: a vocabulary of {self.vocab_size} leaves at most "
                f"{self.vocab_size - 3} to try"
            )


def run_demo(
    config: DemoConfig, output: str | os.PathLike[str], console: Console | None = None
) -> Results:
    """Runs the demo and writes `report.html` and `results.json`.

    Args:
        config: its sizes.
        output: a directory for the report and, under `work`, for what a killed demo goes on from.
        console: where to tell what happens; default, the terminal's standard error.

    Returns:
        The results.

    Raises:
        ValueError: `output` holds a finished demo, or an unfinished one of other sizes.
    """
    output = Path(output)
    console = console or Console(stderr=True)
    began = time.monotonic()
    _require_unfinished(output)
    claim_demo(output, config)
    found = []
    for seed in range(config.seeds):
        with training_progress(console) as progress:
            repetition = Repetition(config, seed, output / "work" / f"seed-{seed}", progress)
            if not seed:
                _write_task(output, repetition)
            found.append(repetition.measured())
    results = merged(config, found, time.monotonic() - began)
    write_html(output / "report.html", results)
    # Last, as its presence says that the demo is finished.
    write_file(output / "results.json", to_json(results))
    return results


def prepare_demo(
    config: DemoConfig, output: str | os.PathLike[str], console: Console | None = None
) -> None:
    """Trains the demo's model and writes what the other commands need to edit it by hand.

    Args:
        config: its sizes.
        output: a directory for `model/` (a Hugging Face folder), `inputs.txt` (news to edit on),
            `held-out.jsonl` (other news, with what a good summary would be) and `rules.toml`. The
            demo itself, run there later, begins with this model.
        console: where to tell what happens; default, the terminal's standard error.

    Raises:
        ValueError: `output` holds a finished demo, or an unfinished one of other sizes.
    """
    output = Path(output)
    _require_unfinished(output)
    claim_demo(output, config)
    with training_progress(console or Console(stderr=True)) as progress:
        _write_task(output, Repetition(config, 0, output / "work" / "seed-0", progress))


def _require_unfinished(output: Path) -> None:
    if (output / "results.json").exists():
        raise ValueError(
            f"{output} holds a finished demo: see {output / 'report.html'}, or give "
            "another --output"
        )


def claim_demo(output: Path, config: DemoConfig) -> None:
    """Takes a directory for this process, and for demos of one size.

    Args:
        output: the directory.
        config: the sizes.

    Raises:
        ValueError: it is of other sizes, or another process works there.
    """
    hold(output / "work")
    path = output / "work" / "config.json"
    asked = json.dumps(dataclasses.asdict(config), indent=1)
    if not path.exists():
        write_file(path, asked)
    elif path.read_text() != asked:
        raise ValueError(
            f"{output} holds an unfinished demo of other sizes ({path}): repeat that one to finish "
            "it, or give another --output"
        )


class Measured(NamedTuple):
    """What came of one repetition.

    Attributes:
        before: the original's own measures.
        ceiling: of the original under the constraint, see `t5patches.editing.constrained`; empty
            where it was not asked for.
        outputs: what the original says to the held-out news, marked.
        rows: the edits.
    """

    before: Mapping[str, Measure]
    ceiling: Mapping[str, Measure]
    outputs: Sequence[Example]
    rows: Sequence[Row]


BASE, EDIT, HELD_OUT, LATER = range(4)
"""What news are for: training the model, editing it, measuring, and training it on afterwards."""


@dataclasses.dataclass(frozen=True)
class Repetition:
    """The demo's experiment with one seed: its model, its data, its edits, each when asked for.

    Attributes:
        config: the demo's sizes.
        seed: of the model, and of news that no other repetition sees.
        directory: for what takes long, which is not done again where it is there.
        progress: shows how far it is.
    """

    config: DemoConfig
    seed: int
    directory: Path
    progress: Progress

    def pairs(self, count: int, use: int) -> list[Pair]:
        """News and summaries that no other use and no other repetition sees."""
        return make_pairs(count, seed=100 * self.seed + use)

    def news(self, count: int, use: int) -> list[str]:
        """The news alone."""
        return [pair.news for pair in self.pairs(count, use)]

    @functools.cached_property
    def original(self) -> LoadedModel:
        """The model that names places which the news do not name."""
        self.directory.mkdir(parents=True, exist_ok=True)
        config, path = self.config, self.directory / "spiece.model"
        pairs = self.pairs(config.texts, BASE)
        if not path.exists():
            texts = [text for pair in pairs[:5000] for text in pair]
            write_file(path, train_sentencepiece(texts, config.vocab_size))
        tokenizer = SentencePieceTokenizer(path)
        model = small_t5(vocab_size=tokenizer.vocab_size, width=config.width, layers=config.layers)
        settings = TrainSettings(
            objective="ce",
            steps=config.base_steps,
            batch_size=config.base_batch_size,
            learning_rate=1e-3,
            warmup_steps=50,
            optimizer="adam",
            seed=self.seed,
        )
        params = model.init(jax.random.key(self.seed))
        arrays = to_arrays(unmarked(pairs, tokenizer), pad_id=model.config.pad_id)
        trained = self.train("base", model, params, arrays, settings)
        return LoadedModel(model, trained.params, tokenizer)

    @functools.cached_property
    def measuring(self) -> Measuring:
        """What is asked of every model. Any wording of a summary without inventions is good."""
        rule = places_not_in_source()
        good = [
            [correct(text, find_spans(rule, pair.news, text)) for text in wordings(pair.summary)]
            for pair in self.pairs(self.config.held_out, HELD_OUT)
        ]
        return Measuring(rule, self.config.max_length, well_formed, good)

    @functools.cached_property
    def said(self) -> Said:
        """What the original says to the held-out news."""
        news = self.news(self.config.held_out, HELD_OUT)
        model, params, tokenizer = self.original
        return say(model, params, news, tokenizer, self.measuring)

    @property
    def outputs(self) -> list[Example]:
        """Its greedy outputs, marked."""
        return self.said.greedy

    @functools.cached_property
    def before(self) -> Original:
        """These, read by the original once for all edits."""
        return read_original(*self.original[:2], self.outputs)

    @functools.cached_property
    def marked(self) -> dict[bool, list[Example]]:
        """The original's own outputs to edit on: False for greedy, True for sampled ones."""
        return {
            on_sampled: self._marked(on_sampled)
            for on_sampled in sorted({edit.on_sampled for edit in self.config.edits})
        }

    def _marked(self, on_sampled: bool) -> list[Example]:
        """With corrections and, where an edit asks, with sets."""
        config, rule = self.config, places_not_in_source()
        model, params, tokenizer = self.original
        path = self.directory / ("sampled.jsonl" if on_sampled else "edits.jsonl")
        if path.exists():
            return read_examples(path, tokenizer)
        spoken = speak(
            model,
            params,
            self.news(config.edit_inputs, EDIT),
            rule,
            tokenizer,
            max_length=config.max_length,
            temperature=1.0 if on_sampled else 0.0,
        )
        outputs = [
            dataclasses.replace(e, corrected=correct(e.outputs, e.spans) if e.spans else None)
            for e in spoken
        ]
        if any(edit.with_sets and edit.on_sampled == on_sampled for edit in config.edits):
            outputs = expand_negatives(
                outputs,
                rule,
                tokenizer,
                model,
                params,
                count=config.negatives,
                max_length=config.max_length,
                progress=self.progress,
            )
        write_examples(path, outputs)
        return outputs

    def edited(self, edit: Edit) -> Trained:
        """Makes an edit."""
        config = self.config
        model, params, tokenizer = self.original
        settings = TrainSettings(
            objective=edit.objective,
            alpha=edit.alpha,
            negatives=config.negatives if edit.with_sets else 0,
            steps=edit.steps or config.edit_steps,
            batch_size=config.edit_batch_size,
            learning_rate=1e-4,
            optimizer="adam",
            seed=self.seed,
        )
        arrays = training_arrays(
            self.marked[edit.on_sampled],
            tokenizer,
            edit.objective,
            pad_id=model.config.pad_id,
            negatives=settings.negatives,
        )
        return self.train(edit.folder, model, params, arrays, settings)

    def train(
        self,
        name: str,
        model: LanguageModel,
        params: Params,
        arrays: Batch,
        settings: TrainSettings,
    ) -> Trained:
        """Trains, unless an earlier, killed demo did it already."""
        directory = self.directory / name
        return finished_run(directory, params) or train(
            model,
            params,
            arrays,
            settings,
            directory,
            progress=self.progress,
        )

    def row(self, edit: Edit) -> Row:
        """An edit, measured."""
        model, _, tokenizer = self.original
        trained = self.edited(edit)
        found = evaluate(model, trained.params, self.before, tokenizer, self.measuring)
        notes = ["on sampled outputs"] * edit.on_sampled
        notes += [f"{edit.steps} updates"] if edit.steps else []
        return Row(
            edit.objective,
            None if edit.objective == "ce" else edit.alpha,
            self.config.negatives if edit.with_sets else 0,
            found.measures,
            trained.history,
            found.outputs,
            ", ".join(notes),
        )

    def measured(self, *, ceiling: bool = False) -> Measured:
        """All of it: the original, the edits and, which takes minutes, the ceiling."""
        model, params, tokenizer = self.original
        before = own_measures(self.said, self.measuring)
        self._tell("before", before)
        bound: Mapping[str, Measure] = {}
        if ceiling:
            bound = evaluate_constrained(
                model, params, self.outputs, tokenizer, self.measuring
            ).measures
            self._tell("the original under the constraint", bound)
        rows: list[Row] = []
        for edit in self.config.edits:
            rows.append(self.row(edit))
            number = f"{len(rows)}/{len(self.config.edits)}"
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


def unmarked(pairs: Sequence[Pair], tokenizer: Tokenizer) -> list[Example]:
    """News and summaries to train on as they are.

    Args:
        pairs: the texts.
        tokenizer: the model's.

    Returns:
        Examples with nothing marked.
    """
    return [
        make_example(news, with_end(tokenizer.encode(summary), tokenizer), [], tokenizer)
        for news, summary in pairs
    ]


def _write_task(output: Path, repetition: Repetition) -> None:
    """The model, inputs and rules as files, which `t5patches annotate` and `evaluate` take."""
    config, original = repetition.config, repetition.original
    write_file(output / "rules.toml", _RULES)
    news = repetition.news(config.edit_inputs, EDIT)
    write_file(output / "inputs.txt", "".join(f"{text}\n" for text in news))
    rule = places_not_in_source()
    held_out = [
        {"inputs": pair.news, "references": [correct(pair.summary, find_spans(rule, *pair))]}
        for pair in repetition.pairs(config.held_out, HELD_OUT)
    ]
    write_file(output / "held-out.jsonl", "".join(f"{json.dumps(source)}\n" for source in held_out))
    if not (output / "model").exists():
        vocabulary = {"spiece.model": (repetition.directory / "spiece.model").read_bytes()}
        save_checkpoint(output / "model", original.model, original.params, files=vocabulary)


_RULES = """\
# A name in the summary that the news does not hold.
[[rule]]
name = "invented names"
names = "capitalized"
absent_from_source = true
"""


def merged(config: DemoConfig, repetitions: Sequence[Measured], seconds: float) -> Results:
    """Means over repetitions; texts and curves are those of the first.

    Args:
        config: their sizes.
        repetitions: what came of each.
        seconds: that all of it took.

    Returns:
        The results. The errors are over the held-out inputs of a single repetition, or over
        several repetitions.
    """
    first = repetitions[0]
    rows = [
        dataclasses.replace(row, measures=_mean([r.rows[i].measures for r in repetitions]))
        for i, row in enumerate(first.rows)
    ]
    seeds = len(repetitions)
    over = f"{config.held_out} held-out inputs" if seeds == 1 else f"{seeds} seeds"
    settings: dict[str, Any] = dataclasses.asdict(config) | {"seeds": seeds}
    settings["seconds"] = round(seconds)
    settings["jax"] = jax.__version__
    settings["device"] = jax.devices()[0].device_kind
    return Results(
        title="Editing away places that the news does not name",
        about=_ABOUT.format(**settings),
        errors=f"over {over}",
        before=_mean([r.before for r in repetitions]),
        ceiling=_mean([r.ceiling for r in repetitions]),
        outputs=first.outputs,
        rows=rows,
        settings=settings,
    )


_ABOUT = (
    "A tiny T5 was trained on {texts} pieces of news with summaries that name places which the "
    "news does not. Each edit makes {edit_steps} updates on {edit_inputs} summaries by that model "
    "(greedy ones, where it does not say sampled), in which such places are marked; sets of "
    "{negatives} also hold what else the model would name there. All is measured on {held_out} "
    "other pieces of news."
)


def _mean(measures: Sequence[Mapping[str, Measure]]) -> dict[str, Measure]:
    return {name: over_seeds([m[name] for m in measures]) for name in measures[0]}
