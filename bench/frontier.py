r"""What is left of the unwanted against closeness: every method over its own strengths.

    python -m bench.frontier                    # one seed; a killed run goes on with --keep DIR
    python -m bench.frontier --seeds 3          # three models, trained and edited anew

On the task of `make demo`. A method's strengths are values of alpha, or numbers of updates where
alpha is only a factor on all of its loss, which Adam does not see. Read off its curve is the least
KL with which no more than a share of the outputs is unwanted, log KL by prevalence between two
strengths; no number stands where the curve does not come so low. Curves on sampled outputs say so,
others are on greedy ones.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import common
from t5patches.editing.demo import DemoConfig, Edit, run_demo
from t5patches.editing.report import Row

AT = (10.0, 5.0, 2.0)  # % of sampled outputs with something unwanted
UPDATES = (10, 30, 100)


def by_alpha(objective: str, *alphas: float, **options: bool) -> tuple[Edit, ...]:
    """A curve by alpha."""
    return tuple(Edit(objective, alpha, **options) for alpha in alphas)


def by_updates(objective: str, **options: bool) -> tuple[Edit, ...]:
    """A curve by the number of updates."""
    return tuple(Edit(objective, steps=steps, **options) for steps in UPDATES)


CURVES: Mapping[str, Sequence[Edit]] = {
    "TNRF, sets": by_alpha("tnrf", 0.1, 0.3, 1.0, with_sets=True),
    "TNFF, sets": by_alpha("tnff", 1.0, 3.0, 10.0, with_sets=True),
    "TNRR, sets": by_alpha("tnrr", 0.1, 0.3, 1.0, with_sets=True),
    "UL, sets": by_alpha("ul", 0.1, 0.3, 1.0, with_sets=True),
    "UL, sets, sampled": by_alpha("ul", 0.1, 0.3, 1.0, with_sets=True, on_sampled=True),
    "NL, sampled": by_alpha("nl", 0.03, 0.1, 0.3, on_sampled=True),
    "corrective, sampled": by_updates("ce", on_sampled=True),
    "UNDIAL, sets": by_alpha("undial", 0.3, 1.0, 3.0, with_sets=True),
    "CE-U, sets": by_updates("ceu", with_sets=True),
    "Unilogit": by_updates("unilogit"),
    "NPO": by_alpha("npo", 0.1, 0.3, 1.0),
    "DPO": by_updates("dpo"),
    "FTPO, sets": by_updates("ftpo", with_sets=True),
}


def kl_at(curve: Sequence[Row], prevalence: float) -> float | None:
    """The least KL of a curve where its sampled prevalence is no more than this."""
    points = [(r.measures["prevalence_sampled"].value, r.measures["kl"].value) for r in curve]
    found = [y for x, y in points if x <= prevalence]
    for (x, y), (u, v) in itertools.pairwise(points):
        if min(x, u) < prevalence < max(x, u):
            share = (prevalence - x) / (u - x)
            found.append(math.exp((1 - share) * math.log(y) + share * math.log(v)))
    return min(found, default=None)


def rows_of(results: Any) -> list[dict]:
    """Each curve with its points and what is read off it."""
    by_edit = dict(zip((e for c in CURVES.values() for e in c), results.rows, strict=True))
    names = ("kl", "prevalence_sampled", "prevalence", "exact_match_clean", "bleu", "malformed")
    rows = []
    for name, edits in CURVES.items():
        curve = [by_edit[edit] for edit in edits]
        rows.append({
            "method": name,
            "at": {f"{x:g}": kl_at(curve, x) for x in AT},
            "points": [
                {"alpha": e.alpha, "updates": e.steps}
                | {k: [r.measures[k].value, r.measures[k].error] for k in names}
                for e, r in zip(edits, curve, strict=True)
            ],
        })  # fmt: skip
    return rows


def show(rows: Sequence[dict]) -> None:
    """The curves for people."""
    table = Table(title="KL at unmarked positions, by % of sampled outputs with something unwanted")
    table.add_column("method")
    for x in AT:
        table.add_column(f"{x:g}%", justify="right")
    table.add_column("points: % sampled, KL, % clean outputs unchanged")
    for row in rows:
        cells = ["" if x is None else f"{x:.4f}" for x in row["at"].values()]
        points = "; ".join(
            f"{p['prevalence_sampled'][0]:.1f} {p['kl'][0]:.4f} {p['exact_match_clean'][0]:.0f}"
            for p in row["points"]
        )
        table.add_row(row["method"], *cells, points)
    Console().print(table)


def main() -> None:
    """Edits, measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--keep", metavar="DIR", help="where to work; default: where all is removed"
    )
    options = parser.parse_args()
    config = DemoConfig(edits=tuple(e for c in CURVES.values() for e in c), seeds=options.seeds)
    with tempfile.TemporaryDirectory() as passing:
        results = run_demo(config, pathlib.Path(options.keep or passing) / "frontier")
    rows = rows_of(results)
    show(rows)
    settings = {k: v for k, v in results.settings.items() if k != "edits"}
    print(f"stored in {common.save('frontier', rows, errors=results.errors, settings=settings)}")


if __name__ == "__main__":
    main()
