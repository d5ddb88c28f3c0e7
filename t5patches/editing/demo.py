"""The whole loop on a built-in task: train a model, find what it invents, edit it away, measure.

A killed demo goes on where it was: everything that took long is kept under the output directory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from t5patches.editing.annotate import Rule, find_spans
from t5patches.editing.data import Example, make_example, to_arrays, with_end
from t5patches.editing.demo_task import (
    Pair,
    correct,
    make_pairs,
    places_not_in_source,
    well_formed,
    wordings,
)
from t5patches.editing.evaluate import Measuring
from t5patches.editing.experiment import Edit, Experiment, merged
from t5patches.editing.report import Results, to_json, write_html
from t5patches.editing.train import TrainSettings, training_progress
from t5patches.model.folder import LoadedModel, small_model
from t5patches.model.huggingface import save_checkpoint
from t5patches.model.tokenizer import SentencePieceTokenizer, Tokenizer, train_sentencepiece
from t5patches.runs.claims import claim, hold
from t5patches.runs.files import write_file

# One or two of each family of methods, as they do best in `bench.frontier`: the objective that
# `t5patches edit` takes unless told otherwise, its neighbour, and UNDIAL, which keep to the
# original; those that learn from kept text, on sampled outputs, which bring them closest; and those
# that compare outputs or tokens, which are gone astray after more than a few updates.
EDITS = (
    *(Edit(objective, with_sets=True) for objective in ("tnrf", "tnff", "undial")),
    Edit("ul", with_sets=True, on_sampled=True),
    Edit("nl", 0.3, on_sampled=True),
    Edit("ce", on_sampled=True),
    Edit("dpo", steps=10),
    Edit("ftpo", with_sets=True, steps=10),
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
    _require_unfinished(output)
    claim_demo(output, config)
    found = []
    for seed in range(config.seeds):
        with training_progress(console) as progress:
            repetition = Repetition(output / "work" / f"seed-{seed}", progress, seed, config)
            if not seed:
                _write_task(output, repetition)
            found.append(repetition.measured())
    results = merged(repetition, found)
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
        _write_task(output, Repetition(output / "work" / "seed-0", progress, 0, config))


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
    claim(output / "work", dataclasses.asdict(config))


BASE, EDIT, HELD_OUT, LATER, KEPT = range(5)
"""What news are for: training the model, editing it, measuring, training it on afterwards, and
text that is to stay as it is."""


@dataclasses.dataclass(frozen=True)
class Repetition(Experiment):
    """The demo's experiment with one seed: its model, its data, its edits.

    Attributes:
        config: the demo's sizes.
    """

    config: DemoConfig

    @property
    def title(self) -> str:
        """What is done."""
        return "Editing away places that the news does not name"

    @property
    def about(self) -> str:
        """How."""
        return _ABOUT.format(**self.settings)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The sizes."""
        return dataclasses.asdict(self.config)

    @property
    def edits(self) -> Sequence[Edit]:
        """The objectives to compare."""
        return self.config.edits

    @property
    def negatives(self) -> int:
        """The size of the sets."""
        return self.config.negatives

    @property
    def training(self) -> TrainSettings:
        """How edits train."""
        return TrainSettings(
            steps=self.config.edit_steps,
            batch_size=self.config.edit_batch_size,
            learning_rate=1e-4,
            optimizer="adam",
            seed=self.seed,
        )

    def pairs(self, count: int, use: int) -> list[Pair]:
        """News and summaries that no other use and no other repetition sees."""
        return make_pairs(count, seed=100 * self.seed + use)

    def news(self, count: int, use: int) -> list[str]:
        """The news alone."""
        return [pair.news for pair in self.pairs(count, use)]

    @property
    def to_mark(self) -> list[str]:
        """News whose summaries the edits train on."""
        return self.news(self.config.edit_inputs, EDIT)

    @property
    def held_out(self) -> list[str]:
        """News to measure on."""
        return self.news(self.config.held_out, HELD_OUT)

    @functools.cached_property
    def original(self) -> LoadedModel:
        """The model that names places which the news do not name."""
        config, path = self.config, self.directory / "spiece.model"
        pairs = self.pairs(config.texts, BASE)
        if not path.exists():
            texts = [text for pair in pairs[:5000] for text in pair]
            write_file(path, train_sentencepiece(texts, config.vocab_size))
        tokenizer = SentencePieceTokenizer(path)
        model = small_model(
            vocab_size=tokenizer.vocab_size, width=config.width, layers=config.layers
        )
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

    @property
    def rule(self) -> Rule:
        """Finds places that the news does not name."""
        return places_not_in_source()

    @functools.cached_property
    def measuring(self) -> Measuring:
        """What is asked of every model. Any wording of a summary without inventions is good."""
        rule = self.rule
        good = [
            [correct(text, find_spans(rule, pair.news, text)) for text in wordings(pair.summary)]
            for pair in self.pairs(self.config.held_out, HELD_OUT)
        ]
        return Measuring(rule, self.config.max_length, well_formed, good)

    def corrected(self, outputs: Sequence[Example]) -> list[Example]:
        """Without the places."""
        return [
            dataclasses.replace(e, corrected=correct(e.outputs, e.spans)) if e.spans else e
            for e in outputs
        ]


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


_ABOUT = (
    "A tiny T5 was trained on {texts} pieces of news with summaries that name places which the "
    "news does not. Each edit makes {edit_steps} updates, where it does not say how many, on "
    "{edit_inputs} summaries by that model (greedy ones, where it does not say sampled), in which "
    "such places are marked; sets of {negatives} also hold what else the model would name there. "
    "All is measured on {held_out} other pieces of news."
)
