"""Results as a table in the terminal, as findings in words, and as one HTML file.

The HTML file (`report.html` beside this module is its template) loads nothing: plots are inside it.
It begins with what the numbers say, a plot and a table with a line for each method; all else folds
away. Whatever models, data and users wrote is text, and no markup, to the terminal, the plots and
the page.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from rich.console import Console
from rich.table import Table
from rich.text import Text

from t5patches.editing.curves import AT, LEFT, kl_at, listed, nearest, who_is_closest
from t5patches.editing.data import Example
from t5patches.editing.display import visible
from t5patches.editing.evaluate import Measure, differs, finite
from t5patches.editing.train import TARGETED, History
from t5patches.model.tokenizer import input_text
from t5patches.runs.files import write_file

Measures = Mapping[str, Measure]
_Part = tuple[str, bool]

COLUMNS = {
    "kl": ("KL", "mean KL(original, edited) on unmarked positions, nats a token"),
    "kl_elsewhere": ("KL elsewhere", "the same where nothing unwanted was likely to begin"),
    "kl_needed": ("KL needed", "the part of the KL that is the removal itself"),
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
    "kl_relearned": ("KL, relearned", "KL from the original after that fine-tuning"),
    "prevalence_stated": (
        "came back",
        "% of sampled outputs with something unwanted after fine-tuning on what does not show it",
    ),
    "kl_stated": ("KL, came back", "KL from the original after that fine-tuning"),
    "prevalence_int4": (
        "4 bits",
        "% of sampled outputs with something unwanted after rounding the weights to 4 bits",
    ),
    "kl_int4": ("KL, 4 bits", "KL from the original after that rounding"),
    "seconds": ("s", "seconds of training"),
    "score_mean": ("score", "mean score of sampled outputs"),
    "score_maximum": ("largest score", "mean of the largest score of several sampled outputs"),
    "score_probability": (
        "threshold, %",
        "% of inputs with a sampled output that reaches the threshold",
    ),
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
    """A line for each edit, with the few measures that a person reads first.

    Args:
        results: the edits.

    Returns:
        A table for `rich.console.Console.print`.
    """
    columns = _summary_columns(results)
    table = _table(results, "".join(f"\n{name}: {what}" for name, what in columns.values()))
    table.add_column("edit")
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


def _table(results: Results, legend: str = "") -> Table:
    caption = f"± standard error {results.errors}{legend}"
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

    Methods are compared where as much is left (`t5patches.editing.curves`), and every targeted edit
    with the best of the baselines that remove no less than it does, measure by measure; what has no
    such partner is compared with the original.
    Two numbers are called different as `t5patches.editing.evaluate.differs` has it: at 95%
    confidence, not corrected for the number of comparisons.

    Args:
        results: the edits.

    Returns:
        Sentences.
    """
    baselines, rows = _baselines(results), results.rows
    if baselines and any(row.is_targeted for row in rows):
        alone = [row for row in rows if row.objective is None]
        compared = [*_against_baselines(rows, baselines), *_against_before(alone, results.before)]
    else:
        compared = _against_before(rows, results.before)
    return [
        *_at_first(results.before),
        *_closest(results),
        *compared,
        *_effect_of_sets(rows),
        *_effect_of_alpha(rows),
        *(_when_sampled(results) if baselines and len(rows) > 1 else []),
    ]


def is_report(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of `write_html`.

    Args:
        path: of the file.

    Returns:
        Whether it says so at its beginning.
    """
    with open(path, "rb") as file:
        return b'<meta name="generator" content="t5patches">' in file.read(1000)


def write_html(path: str | os.PathLike[str], results: Results) -> None:
    """Writes the report.

    Args:
        path: where to; the file appears whole or not at all.
        results: the edits.
    """
    said = findings(results)
    first = len(_at_first(results.before)) + len(_closest(results))
    few = len(results.rows) <= _FEW
    page = _TEMPLATES.get_template("report.html").render(
        results=results,
        title=visible(results.title),
        # What a person should know of many edits, and all that is known of a few.
        headlines=said if few else said[:first],
        findings=[] if few else said[first:],
        few=few,
        summary=_summary(results),
        summary_columns=_summary_columns(results),
        columns=_columns(results),
        lines=list(_lines(results)),
        cell=_cell,
        trade_off=_trade_off(results),
        training=_training(results),
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
                "history": {k: [finite(x) for x in v] for k, v in row.history.items()},
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


def _summary(results: Results) -> list[tuple[str, Measures]]:
    """A line for each method; the closest first, where methods have several strengths.

    Then a line has what is read off the curve, and beside it the strength that leaves most nearly
    the least share that all are compared at.
    """
    before = list(_lines(dataclasses.replace(results, rows=())))
    at = _KL_AT if _strengths(results) else {}
    lines = []
    for name, curve in _curves(results.rows):
        points = [row.measures for row in curve]
        found = {key: kl_at(points, x) for key, x in at.items()}
        reached = {key: kl for key, kl in found.items() if kl is not None}
        lines.append((name, {**points[nearest(points) if len(points) > 1 else 0], **reached}))
    nowhere = Measure(math.inf, math.nan)
    lines.sort(key=lambda line: [line[1].get(key, nowhere).value for key in reversed(at)])
    return [*before, *lines]


_KL_AT = {f"kl_at_{x:g}": x for x in AT}


def _strengths(results: Results) -> bool:
    """Whether edits are the strengths of methods, which are compared where as much is left."""
    return any(row.curve for row in results.rows) and LEFT in results.before


def _summary_columns(results: Results) -> dict[str, tuple[str, str]]:
    """The few measures that a person reads; others where there are no rules or references."""
    measured = _columns(results)
    if _strengths(results):
        at = {
            key: (f"KL, {x:g}% left", f"the least with at most {x:g}% of sampled outputs unwanted")
            for key, x in _KL_AT.items()
        }
        left = {LEFT: ("left, %", f"unwanted when sampled, of the strength nearest to {AT[-1]:g}%")}
        return at | left | {"exact_match_clean": ("kept, %", "of it: clean outputs that stayed")}
    columns: dict[str, tuple[str, str]] = {}
    for alternatives in _FIRST:
        found = [key for key in alternatives if key in measured][:1]
        columns |= {key: alternatives[key] or measured[key] for key in found}
    return columns


_FIRST: tuple[dict[str, tuple[str, str] | None], ...] = (
    {"prevalence_sampled": ("left, %", "% of sampled outputs with something unwanted")},
    {"kl": ("KL", "from the original, mean over unmarked positions, nats a token")},
    {
        "exact_match_clean": ("kept, %", "% of outputs without anything unwanted that stayed"),
        "exact_match": ("kept, %", "% of outputs that stayed"),
    },
    {
        "reference_exact": ("good, %", "% of outputs that are a reference"),
        "reference_rouge_l": None,
        "bleu": None,
    },
    {"malformed": ("broken, %", "% of outputs that never end, are empty or break the form")},
)


def _cell(key: str, measure: Measure | None) -> str:
    if measure is None or math.isnan(measure.value):
        return "–"
    shape = f".{_DIGITS.get(key, 4 if key.startswith('kl') else 1)}f"
    if key.startswith("kl") and measure.value and not float(format(measure.value, shape)):
        shape = ".1e"  # an edit that changed something is not one of 0
    error = "" if math.isnan(measure.error) else f" ±{measure.error:{shape}}"
    return f"{measure.value:{shape}}{error}"


_DIGITS = {"kl_elsewhere": 5, "seconds": 0, "score_mean": 3, "score_maximum": 3}


def _percent(measure: Measure) -> str:
    return f"{measure.value:.1f}%"


def _numbers(measures: Measures) -> dict[str, dict[str, float | None]]:
    return {name: measure.numbers for name, measure in measures.items()}


def _gentle(rows: Sequence[Row]) -> list[Row]:
    """Of the rows that differ in nothing but alpha, the ones with the smallest."""
    best: dict[tuple[str | None, int, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.alpha or 0):
        best.setdefault((row.objective, row.negatives, row.note), row)
    return [row for row in rows if any(row is kept for kept in best.values())]


_COMPARED = {"kl": ("KL", -1), "bleu": ("BLEU", 1), "exact_match": ("exact match", 1)}
"""The measures that edits are compared in, and whether more (1) or less (-1) is closer."""
_VERDICTS = {1: "closer to the original", 0: "not told apart", -1: "further from the original"}


def _at_first(before: Measures) -> list[str]:
    if "prevalence" not in before:
        return []
    return [
        f"Before, {_percent(before['prevalence'])} of the outputs have something unwanted "
        f"({_percent(before['prevalence_sampled'])} of sampled ones)."
    ]


def _baselines(results: Results) -> list[Row]:
    return [
        row
        for row in results.rows
        # Where nothing is known to be unwanted, there is no telling which of them removes more.
        if row.objective is not None and not row.is_targeted and "prevalence" in results.before
    ]


def _closest(results: Results) -> list[str]:
    curves = _curves(results.rows)
    if len(curves) < 2 or not _baselines(results):
        return []
    targeted = [name for name, curve in curves if curve[0].is_targeted]
    return who_is_closest({n: [row.measures for row in curve] for n, curve in curves}, targeted)


def _curves(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Each method's name and strengths; two edits of the same name are two methods."""
    curves: dict[str | int, list[Row]] = {}
    for number, row in enumerate(rows):
        curves.setdefault(row.curve or number, []).append(row)
    return [(curve[0].curve or curve[0].name, curve) for curve in curves.values()]


_FROM_BEFORE = {
    "prevalence": "unwanted",
    "prevalence_sampled": "unwanted when sampled",
    "reference_rouge_l": "ROUGE-L with the references",
    "score_mean": "score",
    "score_maximum": "largest score",
    "score_probability": "inputs with an output that reaches the threshold",
}
"""What the original has of its own, so that an edit can be said to change it."""


def _against_before(rows: Sequence[Row], before: Mapping[str, Measure]) -> list[str]:
    sentences = []
    for row in rows:
        parts = [
            f"{label} {_cell(key, before[key])} to {_cell(key, row.measures[key])} "
            f"({_CHANGES[differs(row.measures[key], before[key])]})"
            for key, label in _FROM_BEFORE.items()
            if key in before
        ]
        parts.append(f"KL {_cell('kl', row.measures['kl'])}")
        same = row.measures.get("exact_match_clean", row.measures["exact_match"])
        which = "clean outputs" if "exact_match_clean" in row.measures else "outputs"
        if not math.isnan(same.value):  # no output is clean
            parts.append(f"{_percent(same)} of the {which} unchanged")
        sentences.append(f"{row.name}: {'; '.join(parts)}.")
    return sentences


def _against_baselines(rows: Sequence[Row], baselines: Sequence[Row]) -> list[str]:
    """A sentence for each outcome, with the targeted edits that it is true of."""
    alike: dict[str, list[str]] = {}
    for row in rows:
        if row.is_targeted:
            alike.setdefault(_outcome(row, baselines), []).append(_in_short(row))
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


def _in_short(row: Row) -> str:
    left = _percent(row.measures["prevalence"])
    return f"{row.name} (KL {row.measures['kl'].value:.4f}, {left} left)"


def _effect_of_sets(rows: Sequence[Row]) -> list[str]:
    single = {(row.objective, row.alpha, row.note): row for row in rows if not row.negatives}
    effects = []
    for row in rows:
        other = single.get((row.objective, row.alpha, row.note))
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


_CHANGES = {1: "more", 0: "not told apart", -1: "less"}


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


class _Plot(NamedTuple):
    """A picture, and what it shows in words and numbers."""

    image: str  # a `data:` address
    text: str
    numbers: Sequence[tuple[str, Sequence[str]]]


def _trade_off(results: Results) -> _Plot | None:
    """What is left against closeness, a curve a method, its name beside it."""
    if "prevalence" not in results.before or not results.rows:
        return None
    figure = Figure(figsize=(_WIDTH, 1.75 * _WIDTH), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="% of sampled outputs unwanted", ylabel="KL from the original")
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_yscale("log")
    named: list[_Named] = []
    numbers, beyond = [], []
    kls = [row.measures["kl"].value for row in results.rows]
    least = min((kl for kl in kls if 0 < kl < math.inf), default=1.0)
    axes.set_ylim(0.7 * least, 1.4 * _SHOWN * least)
    for i, (name, curve) in enumerate(_curves(results.rows)):
        left, kl = ([row.measures[key] for row in curve] for key in (LEFT, "kl"))
        points = [*zip(left, kl, strict=True)]
        numbers.append((name, [f"{_percent(x)}: {_cell('kl', y)}" for x, y in points]))
        shown = [
            (x.value, y.value)
            for x, y in points
            if math.isfinite(x.value) and 0 < y.value <= _SHOWN * least
        ]
        if len(shown) < len(points):
            beyond.append(name)
        axes.errorbar(
            [x.value for x, _ in points],
            [y.value for _, y in points],
            xerr=[x.error for x, _ in points],
            # A bar that reaches 0 has no end on this axis.
            yerr=[max(0.0, min(y.error, 0.9 * y.value)) for _, y in points],
            color=(color := f"C{i % 10}"),
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            elinewidth=0.4,
            linestyle="-" if curve[0].is_targeted else ":",
        )
        if shown:
            named.append((name, shown, color))
    axes.set_xlim(left=-0.1)
    right = axes.get_xlim()[1]
    axes.set_xticks([x for x in (0, 0.5, 1, 2, 5, 10, 20, 50, 100) if x <= right])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.2)
    _name_curves(figure, axes, named)
    text = (
        "Mean KL from the original at unmarked positions against the share of sampled outputs with "
        "something unwanted. Further left, less is left; further down, less else was changed."
    )
    if results.ceiling:
        remains = _percent(results.ceiling[LEFT])
        text += f" The original under the constraint would be at the bottom: {remains} left, KL 0."
    if beyond:
        text += f" Not in the plot are strengths of {listed(beyond)}: see the numbers."
    return _Plot(_embedded(figure), text, numbers)


_WIDTH = 3.6
"""Inches of a plot: those of a phone, on which its letters are then not made smaller."""
_MARKERS = "os^Dv<>Pp"
_SHOWN = 50.0
"""How many times the least KL the plot goes up to: a model beyond is another one."""
_Named = tuple[str, Sequence[tuple[float, float]], str]


def _name_curves(figure: Figure, axes: Axes, named: Sequence[_Named]) -> None:
    """Writes each curve's name beside one of its points, where little else is."""
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    letter = figure.dpi / 72
    taken: list[Bbox] = []
    for _, points, _ in named:
        path = axes.transData.transform(points)
        for a, b in itertools.pairwise([path[0], *path]):
            steps = np.linspace(0, 1, 2 + int(np.hypot(*(b - a)) / 8))[:, None]
            taken += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in a + steps * (b - a)]
    for name, points, color in named:
        text = axes.annotate("", points[0], (0, 0), color=color, fontsize=8, va="center",
                             textcoords="offset points", in_layout=False)  # fmt: skip
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        # As it is: matplotlib would read `$x$` as mathematics.
        text.set_parse_math(False)
        text.set_text(_in_lines(name))
        width, height = text.get_window_extent().size
        best = math.inf
        for at, beside in itertools.product(points, _BESIDE):
            x, y = axes.transData.transform(at) + letter * np.array(beside)
            x -= width * {"left": 0, "right": 1, "center": 0.5}[_aligned(beside)]
            box = Bbox.from_bounds(x, y - height / 2, width, height)
            covered = sum(_shared(box, other) for other in taken) - 2 * _shared(box, inside)
            cost = covered / (width * height) + abs(beside[1]) / 100
            if cost < best:
                best, place, where = cost, (at, beside), box
        text.xy = place[0]
        text.set_position(place[1])
        text.set_horizontalalignment(_aligned(place[1]))
        taken.append(where)


def _in_lines(name: str) -> str:
    """A name in short lines, its front left out where they are too many."""
    lines = textwrap.wrap(name, 24)
    return "\n".join(lines if len(lines) <= 3 else ["…" + lines[-3], *lines[-2:]])


_BESIDE = [
    *((dx, dy) for dy in (0, 8, -8, 16, -16, 24, -24) for dx in (6, -6)),
    *((0, dy) for dy in (9, -9, 16, -16, 24, -24)),
]
"""Where a name may stand beside a point, in points of a letter."""


def _aligned(beside: tuple[int, int]) -> Literal["left", "right", "center"]:
    """How a name stands at its place."""
    return "left" if beside[0] > 0 else "right" if beside[0] < 0 else "center"


def _shared(a: Bbox, b: Bbox) -> float:
    """The area that two boxes share."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def _training(results: Results) -> _Plot | None:
    """Losses, and how many of the marked tokens are still the likeliest."""
    rows = _gentle([row for row in results.rows if row.history])
    if not rows:
        return None
    figure = Figure(figsize=(_WIDTH, 2 * _WIDTH), layout="constrained")
    above, below = figure.subplots(2, 1)
    curves, numbers = [], []
    for i, row in enumerate(rows):
        style = {"color": f"C{i % 10}", "linestyle": "--" if row.negatives else "-"}
        losses = _means(row.history["loss"])
        curves += _curve(above, losses, **style)
        marked, said = _means(row.history["marked"]), _means(row.history["said"])
        shares = [100 * s / m if m else math.nan for s, m in zip(said, marked, strict=True)]
        ends = [f"loss {losses[0]:.3g} to {losses[-1]:.3g}"]
        if any(marked):
            _curve(below, shares, **style)
            ends.append(f"likeliest {shares[0]:.0f}% to {shares[-1]:.0f}%")
        numbers.append((row.name, ends))
    above.set(xlabel="update", title="loss a token")
    below.set(xlabel="update", title="% of marked tokens still the likeliest")
    _legend(figure, rows, curves)
    return _Plot(
        _embedded(figure),
        "The loss over the updates, not to be compared across objectives, and the share of marked "
        "tokens that are still the likeliest: "
        f"means of {_SMOOTHED} updates, of the smallest alpha where edits differ in nothing else.",
        numbers,
    )


def _curve(axes: Axes, values: Sequence[float], **style: Any) -> list[Any]:
    return axes.plot([_SMOOTHED * (i + 0.5) for i in range(len(values))], values, **style)


def _legend(figure: Figure, rows: Sequence[Row], marks: Sequence[Any]) -> None:
    """The rows' names below, beside their marks, as they are.

    Given as labels, matplotlib would read `$x$` as mathematics and leave `_x` out.
    """
    labels = [str(i) for i in range(len(rows))]
    legend = figure.legend(list(marks), labels, loc="outside lower center", fontsize=8)
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


_TEXTS = 5  # with an unwanted output, to show


def _texts(results: Results) -> list[tuple[str, list[tuple[str, list[_Part]]]]]:
    """A few inputs, those with an unwanted output first, and what each of the models said."""
    rows = [row for row in _gentle(results.rows) if row.outputs]
    if not rows:
        return []
    order = sorted(range(len(results.outputs)), key=lambda i: not any(results.outputs[i].marked))
    unwanted = sum(any(example.marked) for example in results.outputs)
    # One that should stay as it is, after the ones that should not.
    shown = [*order[: min(_TEXTS, unwanted)], *order[unwanted : unwanted + 1]]
    models = [("before", results.outputs), *((row.name, row.outputs) for row in rows)]
    return [
        (
            _seen(input_text(results.outputs[i].inputs)),
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
    return [(_seen(text), marked) for text, marked in [*parts, (example.outputs[at:], False)]]


def _seen(text: str) -> str:
    """A text of which all is seen, line by line."""
    return "\n".join(map(visible, text.split("\n")))
