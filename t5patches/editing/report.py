"""Results as a table in the terminal, as findings in words, and as one HTML file.

The HTML file (`report.html` beside this module is its template) loads nothing: plots are inside it.
Whatever models, data and users wrote is text, and no markup, to the terminal, the plots and the
page.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from t5patches.editing.curves import listed
from t5patches.editing.data import Example
from t5patches.editing.display import visible
from t5patches.editing.evaluate import Measure, differs
from t5patches.editing.train import OBJECTIVES, TARGETED, History
from t5patches.model.tokenizer import input_text
from t5patches.runs.files import write_file

Measures = Mapping[str, Measure]
_Part = tuple[str, bool]

COLUMNS = {
    "kl": ("KL", "mean KL(original, edited) on unmarked positions, nats a token"),
    "prevalence": ("prevalence", "% of greedy outputs with something unwanted"),
    "prevalence_sampled": ("sampled", "the same when outputs are drawn at temperature 1"),
    "bleu": ("BLEU", "of the new outputs with the original's"),
    "rouge_l": ("ROUGE-L", "of the new outputs with the original's, F-measure in %"),
    "exact_match": ("exact", "% of outputs that are the original's"),
    "exact_match_clean": ("exact, clean", "the same where the original had nothing unwanted"),
    "malformed": ("malformed", "% of outputs that never end, are empty or break the form"),
    "reference_bleu": ("BLEU, ref.", "of the outputs with the references"),
    "reference_rouge_l": ("ROUGE-L, ref.", "of the outputs with the references, F-measure in %"),
    "reference_exact": ("exact, ref.", "% of outputs that are a reference"),
    "distinct_1": ("words", "different words among all words of sampled outputs, %"),
    "distinct_2": ("pairs", "different pairs of words among all pairs of sampled outputs, %"),
    "repetition": ("repeated", "pairs of words that stood in the same output before, %"),
    "prevalence_relearned": (
        "relearned",
        "% of sampled outputs with something unwanted after fine-tuning on what has the habit",
    ),
    "prevalence_stated": ("came back", "the same after fine-tuning on what does not show it"),
    "prevalence_int4": ("4 bits", "the same after rounding the weights to 4 bits"),
    "score_maximum": ("worst score", "mean of the largest score of several sampled outputs"),
    "score_probability": ("bad, %", "% of inputs with a sampled output that reaches the threshold"),
}


def _named(objective: str | None) -> str:
    return "corrective" if objective == "ce" else str(objective).upper()


@dataclasses.dataclass(frozen=True)
class Row:
    """One edit and what came of it.

    Attributes:
        objective: one of `t5patches.editing.train.OBJECTIVES`; None where nobody said.
        alpha: factor on the loss of pushed-down tokens; None where there is none.
        negatives: size of the sets of negatives; 0 for the emitted token only.
        measures: see `t5patches.editing.evaluate.Evaluation`.
        history: of the training.
        outputs: what the edited model says to the held-out inputs.
        note: what else sets this edit apart; part of its name.
        curve: the method of which this is one strength; default, a method of its own.
    """

    objective: str | None
    alpha: float | None
    negatives: int
    measures: Measures
    history: History = dataclasses.field(default_factory=dict)
    outputs: Sequence[Example] = ()
    note: str = ""
    curve: str = ""

    @property
    def name(self) -> str:
        """The row's name in tables, plots and sentences."""
        parts = [_named(self.objective)] if self.objective else []
        if self.negatives:
            parts.append(f"sets of {self.negatives}")
        if self.alpha is not None:
            parts.append(f"alpha {self.alpha:g}")
        return ", ".join([*parts, visible(self.note)] if self.note else parts)

    @property
    def is_targeted(self) -> bool:
        """Whether the objective keeps the original's distribution."""
        return self.objective in TARGETED


@dataclasses.dataclass(frozen=True)
class Results:
    """All edits of one model: different ones, or one after the other.

    Attributes:
        title: what was done.
        about: how, in a few sentences.
        errors: what the standard errors are over.
        before: the original model's own measures.
        outputs: what the original says to the held-out inputs, marked.
        rows: the edits.
        settings: what to tell about the run.
        ceiling: measures of the original under the constraint, see
            `t5patches.editing.constrained`; empty where nobody asked.
    """

    title: str
    about: str
    errors: str
    before: Measures
    outputs: Sequence[Example]
    rows: Sequence[Row]
    settings: Mapping[str, Any]
    ceiling: Measures = dataclasses.field(default_factory=dict)


def terminal_table(results: Results) -> Table:
    """The measures of all edits.

    Args:
        results: the edits.

    Returns:
        A table for `rich.console.Console.print`.
    """
    table = _table(results)
    table.add_column("edit")
    columns = _columns(results)
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for name, measures in _lines(results):
        table.add_row(Text(name), *(_cell(key, measures.get(key)) for key in columns))
    return table


def side_by_side(results: Results) -> Table:
    """The measures of a few edits, one column each.

    Args:
        results: the edits.

    Returns:
        A table for `rich.console.Console.print`.
    """
    table = _table(results)
    table.add_column("")
    models = list(_lines(results))
    for name, _ in models:
        table.add_column(Text(name), justify="right")
    for key, (heading, _) in _columns(results).items():
        table.add_row(heading, *(_cell(key, measures.get(key)) for _, measures in models))
    return table


def _table(results: Results) -> Table:
    caption = f"± standard error {results.errors}"
    return Table(title=Text(visible(results.title)), caption=Text(caption))


def show(results: Results, console: Console) -> None:
    """Prints a table and what it says.

    Args:
        results: the edits.
        console: where to.
    """
    few = len(results.rows) <= _FEW
    console.print(side_by_side(results) if few else terminal_table(results))
    for sentence in findings(results):
        console.print(Text(f"• {sentence}"))


_FEW = 4


def findings(results: Results) -> list[str]:
    """What the numbers say, in words; nothing here knows what should come out.

    Every targeted edit is compared, measure by measure, with the best of the baselines that remove
    no less than it does; where there are no baselines, each edit is compared with the original.
    Two numbers are called different as `t5patches.editing.evaluate.differs` has it: at 95%
    confidence, not corrected for the number of comparisons.

    Args:
        results: the edits.

    Returns:
        Sentences.
    """
    baselines = [
        row
        for row in results.rows
        # Where nothing is known to be unwanted, there is no telling which of them removes more.
        if row.objective is not None and not row.is_targeted and "prevalence" in results.before
    ]
    return [
        *_at_first(results.before),
        *(_against_baselines(results.rows, baselines) if baselines else _against_before(results)),
        *_effect_of_sets(results.rows),
        *_effect_of_alpha(results.rows),
        *(_when_sampled(results) if baselines else []),
    ]


def write_html(path: str | os.PathLike[str], results: Results) -> None:
    """Writes the report.

    Args:
        path: where to; the file appears whole or not at all.
        results: the edits.
    """
    plots = {}
    if "prevalence" in results.before:
        plots["Prevalence against closeness"] = _trade_off_plot(results)
    if any(row.history for row in results.rows):
        plots["Training"] = _training_plot(results)
    page = _TEMPLATES.get_template("report.html").render(
        results=results,
        title=visible(results.title),
        findings=findings(results),
        columns=_columns(results),
        lines=list(_lines(results)),
        cell=_cell,
        plots=plots,
        texts=_texts(results),
        settings=json.dumps(results.settings, indent=1),
    )
    write_file(path, page)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)


def to_json(results: Results) -> str:
    """The numbers, for programs.

    Args:
        results: the edits.

    Returns:
        A JSON object with `before`, `ceiling`, `rows`, `findings`, `settings`, and `texts`, the
        outputs that the report shows; a number that does not exist is null.
    """
    content = {
        "title": results.title,
        "errors": results.errors,
        "settings": results.settings,
        "before": _numbers(results.before),
        "ceiling": _numbers(results.ceiling),
        "rows": [
            {
                "name": row.name,
                "objective": row.objective,
                "alpha": row.alpha,
                "negatives": row.negatives,
                "measures": _numbers(row.measures),
                "history": {k: [_finite(x) for x in v] for k, v in row.history.items()},
            }
            for row in results.rows
        ],
        "findings": findings(results),
        "texts": [
            {
                "inputs": inputs,
                "outputs": {name: "".join(text for text, _ in parts) for name, parts in said},
            }
            for inputs, said in _texts(results)
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _columns(results: Results) -> dict[str, tuple[str, str]]:
    """Those in which some model has a number."""
    measured = {key for _, measures in _lines(results) for key in measures}
    return {key: column for key, column in COLUMNS.items() if key in measured}


def _lines(results: Results) -> Iterable[tuple[str, Measures]]:
    yield "before", results.before
    if results.ceiling:
        yield "before, constrained", results.ceiling
    for row in results.rows:
        yield row.name, row.measures


def _cell(key: str, measure: Measure | None) -> str:
    if measure is None or math.isnan(measure.value):
        return "–"
    digits = _DIGITS.get(key, 1)
    error = "" if math.isnan(measure.error) else f" ±{measure.error:.{digits}f}"
    return f"{measure.value:.{digits}f}{error}"


_DIGITS = {"kl": 4, "score_maximum": 3}


def _percent(measure: Measure) -> str:
    return f"{measure.value:.1f}%"


def _numbers(measures: Measures) -> dict[str, dict[str, float | None]]:
    return {
        name: {"value": _finite(measure.value), "error": _finite(measure.error)}
        for name, measure in measures.items()
    }


def _finite(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


def _gentle(rows: Sequence[Row]) -> list[Row]:
    """Of the rows that differ in nothing but alpha, the ones with the smallest."""
    best: dict[tuple[str | None, int, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.alpha or 0):
        best.setdefault((row.objective, row.negatives, row.note), row)
    return [row for row in rows if any(row is kept for kept in best.values())]


_COMPARED = {"kl": ("KL", -1), "bleu": ("BLEU", 1), "exact_match": ("exact match", 1)}
"""The measures that edits are compared in, and whether more (1) or less (-1) is closer."""
_VERDICTS = {1: "closer to the original", 0: "no different", -1: "further from the original"}


def _at_first(before: Measures) -> list[str]:
    if "prevalence" not in before:
        return []
    return [
        f"Before, {_percent(before['prevalence'])} of the outputs have something unwanted "
        f"({_percent(before['prevalence_sampled'])} of sampled ones)."
    ]


_FROM_BEFORE = {
    "prevalence": "unwanted",
    "prevalence_sampled": "unwanted when sampled",
    "reference_rouge_l": "ROUGE-L with the references",
    "score_maximum": "worst score",
    "score_probability": "inputs with a bad output",
}
"""What the original has of its own, so that an edit can be said to change it."""


def _against_before(results: Results) -> list[str]:
    sentences = []
    for row in results.rows:
        parts = [
            f"{label} {_cell(key, results.before[key])} to {_cell(key, row.measures[key])} "
            f"({_CHANGES[differs(row.measures[key], results.before[key])]})"
            for key, label in _FROM_BEFORE.items()
            if key in results.before
        ]
        parts.append(f"KL {_cell('kl', row.measures['kl'])}")
        same = row.measures.get("exact_match_clean", row.measures["exact_match"])
        which = "clean outputs" if "exact_match_clean" in row.measures else "outputs"
        parts.append(f"{_percent(same)} of the {which} unchanged")
        sentences.append(f"{row.name}: {'; '.join(parts)}.")
    return sentences


def _against_baselines(rows: Sequence[Row], baselines: Sequence[Row]) -> list[str]:
    """A sentence for each outcome, with the targeted edits that it is true of."""
    alike: dict[str, list[str]] = {}
    for row in rows:
        if row.is_targeted:
            alike.setdefault(_outcome(row, baselines), []).append(_summary(row))
    return [f"{outcome}: {listed(names)}." for outcome, names in alike.items()]


def _outcome(row: Row, baselines: Sequence[Row]) -> str:
    """How a targeted edit compares with the best baseline in each measure."""
    rivals = [
        r for r in baselines if differs(r.measures["prevalence"], row.measures["prevalence"]) <= 0
    ]
    if not rivals:
        return "They remove more than every baseline"
    found: dict[str, list[str]] = {}
    for key, (label, sign) in _COMPARED.items():
        rival = max((r.measures[key] for r in rivals), key=lambda measure: sign * measure.value)
        verdict = _VERDICTS[sign * differs(row.measures[key], rival)]
        found.setdefault(verdict, []).append(label)
    verdicts = "; ".join(f"{verdict} in {listed(labels)}" for verdict, labels in found.items())
    return f"Beside the best baseline in each measure that removes no less, {verdicts}"


def _summary(row: Row) -> str:
    left = _percent(row.measures["prevalence"])
    return f"{row.name} (KL {row.measures['kl'].value:.4f}, {left} left)"


def _effect_of_sets(rows: Sequence[Row]) -> list[str]:
    single = {(row.objective, row.alpha): row for row in rows if not row.negatives and not row.note}
    effects = []
    for row in rows:
        other = single.get((row.objective, row.alpha))
        if not row.negatives or other is None:
            continue
        before, after = other.measures, row.measures
        change = differs(after["prevalence"], before["prevalence"])
        effects.append(
            f"{_named(row.objective)} {_CHANGES[change]} ({_percent(before['prevalence'])} to "
            f"{_percent(after['prevalence'])}, KL {before['kl'].value:.4f} to "
            f"{after['kl'].value:.4f})"
        )
    what = "What is left when sets are pushed down instead of the emitted token only"
    return [f"{what}: {'; '.join(effects)}."] if effects else []


_CHANGES = {1: "more", 0: "no different", -1: "less"}


def _effect_of_alpha(rows: Sequence[Row]) -> list[str]:
    effects = []
    for objective in dict.fromkeys(row.objective for row in rows if row.alpha is not None):
        several = sorted(
            (r for r in rows if r.objective == objective and not r.negatives and not r.note),
            key=lambda row: row.alpha or 0,
        )
        if len(several) < 2:
            continue
        low, high = several[0].measures, several[-1].measures
        effects.append(
            f"{_named(objective)} from {several[0].alpha:g} to {several[-1].alpha:g}: KL "
            f"{low['kl'].value:.4f} to {high['kl'].value:.4f}, BLEU {low['bleu'].value:.1f} to "
            f"{high['bleu'].value:.1f}, malformed {_percent(low['malformed'])} to "
            f"{_percent(high['malformed'])}"
        )
    return [f"What a larger alpha does: {'; '.join(effects)}."] if effects else []


def _when_sampled(results: Results) -> list[str]:
    ranked = sorted(results.rows, key=lambda row: row.measures["prevalence_sampled"].value)
    left = [_percent(row.measures["prevalence_sampled"]) for row in (ranked[0], ranked[-1])]
    return [
        f"When outputs are sampled, {ranked[0].name} leaves the least ({left[0]}) and "
        f"{ranked[-1].name} the most ({left[1]}), from "
        f"{_percent(results.before['prevalence_sampled'])}."
    ]


def _colors(rows: Sequence[Row]) -> list[str]:
    """Of matplotlib's cycle: one for each objective, or for each edit where they share theirs."""
    named = {row.objective for row in rows}
    if len(named) < 2:
        return [f"C{i % 10}" for i in range(len(rows))]
    return [f"C{OBJECTIVES.index(r.objective)}" if r.objective else "k" for r in rows]


def _trade_off_plot(results: Results) -> str:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((right, "bleu", "BLEU"), (left, "kl", "KL on unmarked positions")):
        marks = []
        for row, color in zip(results.rows, _colors(results.rows), strict=True):
            x, y = row.measures["prevalence"], row.measures[key]
            mark = axes.errorbar(
                x.value,
                y.value,
                xerr=x.error,
                yerr=y.error,
                color=color,
                marker="s" if row.negatives else "^" if row.note else "o",
                # The smallest symbol for the smallest alpha.
                markersize=5 + 2 * math.log10(max(1.0, row.alpha or 1.0)),
                alpha=0.8,
                linestyle="none",
            )
            marks.append(mark)
        axes.set(xlabel="prevalence, % of outputs", ylabel=label)
    left.set_yscale("log")
    _legend(figure, results.rows, marks)
    return _embedded(figure)


def _training_plot(results: Results) -> str:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = _gentle([row for row in results.rows if row.history])
    curves = []
    for row, color in zip(rows, _colors(rows), strict=True):
        style = {"color": color, "linestyle": "--" if row.negatives else "-"}
        curves += _curve(left, _means(row.history["loss"]), **style)
        marked, said = _means(row.history["marked"]), _means(row.history["said"])
        if any(marked):
            _curve(
                right,
                [100 * s / m if m else math.nan for s, m in zip(said, marked, strict=True)],
                **style,
            )
    left.set(xlabel="step", ylabel="loss a token (not comparable across objectives)")
    right.set(xlabel="step", ylabel="% of marked tokens that are still the likeliest")
    _legend(figure, rows, curves)
    return _embedded(figure)


def _curve(axes: Axes, values: Sequence[float], **style: Any) -> list[Any]:
    return axes.plot([_SMOOTHED * (i + 0.5) for i in range(len(values))], values, **style)


def _legend(figure: Figure, rows: Sequence[Row], marks: Sequence[Any]) -> None:
    """The rows' names beside their marks, as they are.

    Given as labels, matplotlib would read `$x$` as mathematics and leave `_x` out.
    """
    labels = [str(i) for i in range(len(rows))]
    legend = figure.legend(list(marks), labels, loc="outside right upper", fontsize=7)
    for text, row in zip(legend.get_texts(), rows, strict=True):
        text.set_parse_math(False)
        text.set_text(row.name)


_SMOOTHED = 5


def _means(values: Sequence[float]) -> list[float]:
    """Means of a few steps each, as single batches are noisy."""
    parts = [values[i : i + _SMOOTHED] for i in range(0, len(values), _SMOOTHED)]
    return [sum(part) / len(part) for part in parts]


def _embedded(figure: Figure) -> str:
    """The figure as a `data:` address."""
    content = io.BytesIO()
    # The same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "t5patches"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def _texts(results: Results, count: int = 5) -> list[tuple[str, list[tuple[str, list[_Part]]]]]:
    """A few inputs, those with an unwanted output first, and what each of the models said."""
    rows = [row for row in _gentle(results.rows) if row.outputs]
    if not rows:
        return []
    order = sorted(range(len(results.outputs)), key=lambda i: not any(results.outputs[i].marked))
    unwanted = sum(any(example.marked) for example in results.outputs)
    # One that should stay as it is, after the ones that should not.
    shown = [*order[: min(count, unwanted)], *order[unwanted : unwanted + 1]]
    models = [("before", results.outputs), *((row.name, row.outputs) for row in rows)]
    return [
        (
            input_text(results.outputs[i].inputs),
            [(name, _parts(outputs[i])) for name, outputs in models],
        )
        for i in shown
    ]


def _parts(example: Example) -> list[_Part]:
    """An output in pieces, each with whether it is marked, and no text twice."""
    parts, at = [], 0
    for start, end in sorted(example.spans):
        start = max(start, at)
        if start < end:
            parts += [(example.outputs[at:start], False), (example.outputs[start:end], True)]
            at = end
    return [*parts, (example.outputs[at:], False)]
