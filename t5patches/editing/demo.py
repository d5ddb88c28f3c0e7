"""The whole loop on a built-in task: train a model, find what it invents, edit it away, measure.

A killed demo goes on where it was: everything that took long is kept under the output directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from t5patches.editing.annotate import expand_negatives, find_spans, speak
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
from t5patches.editing.demo_task import correct, make_pairs, places_not_in_source, well_formed
from t5patches.editing.evaluate import Measure, Measuring, evaluate, over_seeds, own_measures, say
from t5patches.editing.report import Results, Row, to_json, write_html
from t5patches.editing.train import (
    History,
    Params,
    Trained,
    TrainSettings,
    finished_run,
    train,
    training_progress,
)
from t5patches.model.folder import LoadedModel
from t5patches.model.huggingface import save_checkpoint
from t5patches.model.protocol import LanguageModel
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
    _claim(output, config)
    repetitions = []
    for seed in range(config.seeds):
        with training_progress(console) as progress:
            stage = _Stage(config, seed, output / "work" / f"seed-{seed}", progress)
            original = _original(stage)
            if not seed:
                _write_task(output, stage, original)
            repetitions.append(_repetition(stage, original))
    results = _merged(config, repetitions, time.monotonic() - began)
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
    _claim(output, config)
    with training_progress(console or Console(stderr=True)) as progress:
        stage = _Stage(config, 0, output / "work" / "seed-0", progress)
        _write_task(output, stage, _original(stage))


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What every step of one repetition needs."""

    config: DemoConfig
    seed: int
    directory: Path
    progress: Progress

    def news(self, count: int, use: int) -> list[str]:
        """Inputs that no other use and no other repetition sees."""
        return [pair.news for pair in make_pairs(count, seed=100 * self.seed + use)]

    def tell(self, name: str, measures: Mapping[str, Measure]) -> None:
        """Replaces the bars of what is done by a line."""
        for task in self.progress.tasks:
            self.progress.update(task.id, visible=not task.finished)
        kl = f", KL {measures['kl'].value:.4f}" if "kl" in measures else ""
        self.progress.console.print(
            f"seed {self.seed}, {name}: {measures['prevalence'].value:.1f}% unwanted{kl}",
            highlight=False,
        )


_BASE, _EDIT, _HELD_OUT = range(3)


@dataclasses.dataclass(frozen=True)
class _Repetition:
    before: dict[str, Measure]
    outputs: list[Example]
    rows: list[Row]


def _claim(output: Path, config: DemoConfig) -> None:
    if (output / "results.json").exists():
        raise ValueError(
            f"{output} holds a finished demo: see {output / 'report.html'}, or give "
            "another --output"
        )
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


def _original(stage: _Stage) -> LoadedModel:
    stage.directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _vocabulary(stage)
    config = stage.config
    model = small_t5(vocab_size=tokenizer.vocab_size, width=config.width, layers=config.layers)
    return LoadedModel(model, _base_model(stage, model, tokenizer).params, tokenizer)


def _write_task(output: Path, stage: _Stage, original: LoadedModel) -> None:
    """The model, inputs and rules as files, which `t5patches annotate` and `evaluate` take."""
    write_file(output / "rules.toml", _RULES)
    news = stage.news(stage.config.edit_inputs, _EDIT)
    write_file(output / "inputs.txt", "".join(f"{text}\n" for text in news))
    rule = places_not_in_source()
    held_out = [
        {"inputs": pair.news, "references": [correct(pair.summary, find_spans(rule, *pair))]}
        for pair in make_pairs(stage.config.held_out, seed=100 * stage.seed + _HELD_OUT)
    ]
    write_file(output / "held-out.jsonl", "".join(f"{json.dumps(source)}\n" for source in held_out))
    if not (output / "model").exists():
        vocabulary = {"spiece.model": (stage.directory / "spiece.model").read_bytes()}
        save_checkpoint(output / "model", original.model, original.params, files=vocabulary)


_RULES = """\
# A name in the summary that the news does not hold.
[[rule]]
name = "invented names"
names = "capitalized"
absent_from_source = true
"""


def _repetition(stage: _Stage, base: LoadedModel) -> _Repetition:
    model, original, tokenizer = base
    marked = {
        on_sampled: _marked_outputs(stage, model, original, tokenizer, on_sampled)
        for on_sampled in sorted({edit.on_sampled for edit in stage.config.edits})
    }
    held_out, before = _before(stage, model, original, tokenizer)
    stage.tell("before", before)
    rows: list[Row] = []
    for edit in stage.config.edits:
        data = marked[edit.on_sampled]
        row = _edited(stage, edit, model, original, data, held_out, tokenizer)
        stage.tell(f"{len(rows) + 1}/{len(stage.config.edits)} {row.name}", row.measures)
        rows.append(row)
    return _Repetition(before, held_out, rows)


def _vocabulary(stage: _Stage) -> Tokenizer:
    path = stage.directory / "spiece.model"
    if not path.exists():
        texts = [text for pair in _training_pairs(stage)[:5000] for text in pair]
        write_file(path, train_sentencepiece(texts, stage.config.vocab_size))
    return SentencePieceTokenizer(path)


def _training_pairs(stage: _Stage) -> Any:
    return make_pairs(stage.config.texts, seed=100 * stage.seed + _BASE)


def _base_model(stage: _Stage, model: LanguageModel, tokenizer: Tokenizer) -> Trained:
    params = model.init(jax.random.key(stage.seed))
    settings = TrainSettings(
        objective="ce",
        steps=stage.config.base_steps,
        batch_size=stage.config.base_batch_size,
        learning_rate=1e-3,
        warmup_steps=50,
        optimizer="adam",
        seed=stage.seed,
    )
    examples = [
        make_example(news, with_end(tokenizer.encode(summary), tokenizer), [], tokenizer)
        for news, summary in _training_pairs(stage)
    ]
    arrays = to_arrays(examples, pad_id=model.config.pad_id)
    return _run(stage, "base", model, params, arrays, settings)


def _before(
    stage: _Stage, model: LanguageModel, params: Params, tokenizer: Tokenizer
) -> tuple[list[Example], dict[str, Measure]]:
    """What the base model says to the held-out news, and how much of it is unwanted."""
    measuring = _measuring(stage.config)
    news = stage.news(stage.config.held_out, _HELD_OUT)
    greedy = say(model, params, news, tokenizer, measuring)
    return greedy, own_measures(model, params, greedy, tokenizer, measuring)


def _measuring(config: DemoConfig) -> Measuring:
    return Measuring(places_not_in_source(), config.max_length, well_formed)


def _marked_outputs(
    stage: _Stage,
    model: LanguageModel,
    params: Params,
    tokenizer: Tokenizer,
    on_sampled: bool,
) -> list[Example]:
    """The base model's own outputs, marked, with corrections and, where an edit asks, with sets."""
    config, rule = stage.config, places_not_in_source()
    path = stage.directory / ("sampled.jsonl" if on_sampled else "edits.jsonl")
    if path.exists():
        return read_examples(path, tokenizer)
    spoken = speak(
        model,
        params,
        stage.news(config.edit_inputs, _EDIT),
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
            progress=stage.progress,
        )
    write_examples(path, outputs)
    return outputs


def _edited(
    stage: _Stage,
    edit: Edit,
    model: LanguageModel,
    original: Params,
    marked: Sequence[Example],
    held_out: Sequence[Example],
    tokenizer: Tokenizer,
) -> Row:
    config = stage.config
    negatives = config.negatives if edit.with_sets else 0
    settings = TrainSettings(
        objective=edit.objective,
        alpha=edit.alpha,
        negatives=negatives,
        steps=edit.steps or config.edit_steps,
        batch_size=config.edit_batch_size,
        learning_rate=1e-4,
        optimizer="adam",
        seed=stage.seed,
    )
    notes = ["on sampled outputs"] * edit.on_sampled
    notes += [f"{edit.steps} updates"] if edit.steps else []
    name = f"{edit.objective}-{edit.alpha:g}" + "-sets" * edit.with_sets
    name += "-sampled" * edit.on_sampled + (f"-{edit.steps}" if edit.steps else "")
    arrays = training_arrays(
        marked, tokenizer, edit.objective, pad_id=model.config.pad_id, negatives=negatives
    )
    trained = _run(stage, name, model, original, arrays, settings)
    found = evaluate(model, trained.params, original, held_out, tokenizer, _measuring(config))
    return Row(
        edit.objective,
        None if edit.objective == "ce" else edit.alpha,
        negatives,
        found.measures,
        trained.history,
        found.outputs,
        ", ".join(notes),
    )


def _run(
    stage: _Stage,
    name: str,
    model: LanguageModel,
    params: Params,
    arrays: Batch,
    settings: TrainSettings,
) -> Trained:
    """Trains, unless an earlier, killed demo did it already."""
    directory = stage.directory / name
    return finished_run(directory, params) or train(
        model,
        params,
        arrays,
        settings,
        directory,
        progress=stage.progress,
    )


def _merged(config: DemoConfig, repetitions: Sequence[_Repetition], seconds: float) -> Results:
    """Means over the repetitions; texts and curves are those of the first."""
    first = repetitions[0]
    rows = [
        dataclasses.replace(row, measures=_mean([r.rows[i].measures for r in repetitions]))
        for i, row in enumerate(first.rows)
    ]
    over = f"{config.held_out} held-out inputs" if config.seeds == 1 else f"{config.seeds} seeds"
    settings: dict[str, Any] = dataclasses.asdict(config)
    settings["seconds"] = round(seconds)
    settings["jax"] = jax.__version__
    settings["device"] = jax.devices()[0].device_kind
    return Results(
        title="Editing away places that the news does not name",
        about=_ABOUT.format(**settings),
        errors=f"over {over}",
        before=_mean([r.before for r in repetitions]),
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


__all__ = ["EDITS", "DemoConfig", "Edit", "History", "prepare_demo", "run_demo"]
