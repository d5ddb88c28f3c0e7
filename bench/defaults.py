r"""What each option of training changes beside the defaults of `t5patches edit`.

    python -m bench.defaults                    # a killed run goes on with --keep DIR

The tutorial's commands on the demo's model, with one option changed at a time and then some of them
together, beside the closest rival of `make frontier`; each with several seeds of the order of the
data. All edits come from the same model and marked outputs and are measured on the same inputs, so
that the scatter over seeds is what two rows have to differ by.
"""

from __future__ import annotations

import argparse
import operator
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import common
from bench.frontier import where_stated
from t5patches.editing.demo import LATER
from t5patches.editing.demo_task import make_pairs
from t5patches.editing.evaluate import ratio

# What `t5patches edit` is given, by its name in the table; {kept} and {sampled} are files.
VARIATIONS: Mapping[str, str] = {
    "as it is": "",
    "learning rate 0.0003": "--learning-rate 3e-4",
    "learning rate 0.003": "--learning-rate 3e-3",
    "Adam, 0.0001": "--optimizer adam --learning-rate 1e-4",
    "30 updates": "--steps 30",
    "300 updates": "--steps 300",
    "warm-up of 10": "--warmup-steps 10",
    "cosine": "--schedule cosine",
    "linear": "--schedule linear",
    "average 0.95": "--average 0.95",
    "cosine, average 0.95": "--schedule cosine --average 0.95",
    "until 0.1": "--until 0.1",
    "kept text": "--keep {kept}",
    "sampled outputs": "--data {sampled}",
    "300 updates, kept text": "--steps 300 --keep {kept}",
    "300 updates, kept text, cosine": "--steps 300 --keep {kept} --schedule cosine",
    "UL": "--objective ul",
    "UL, sampled outputs": "--objective ul --data {sampled}",
    "UL, sampled outputs, 300 updates": "--objective ul --data {sampled} --steps 300",
}
RATE = ["--learning-rate", "1e-3"]  # the tutorial's; a variation's own comes after it and counts
MEASURES = ("kl", "prevalence", "prevalence_sampled", "exact_match_clean")
INPUTS = 2000  # of kept text, before those are left out to which the habit belongs


def kept_inputs(count: int) -> list[str]:
    """News of no other use that say where it happened."""
    return [pair.news for pair in where_stated(make_pairs(count, seed=LATER))]


def prepared(place: pathlib.Path) -> dict[str, str]:
    """The files that the edits are made of and measured with, by what they are."""
    files = {name: str(place / f"{name}.jsonl") for name in ("greedy", "sampled")}
    files |= {"kept": str(place / "kept.txt"), "rules": str(place / "demo" / "rules.toml")}
    files |= {"model": str(place / "demo" / "model"), "inputs": str(place / "demo" / "inputs.txt")}
    if not pathlib.Path(files["model"]).exists():
        common.t5patches("demo", "--prepare", "--output", place / "demo")
    pathlib.Path(files["kept"]).write_text("".join(f"{news}\n" for news in kept_inputs(INPUTS)))
    for name, how in (("greedy", ()), ("sampled", ("--temperature", "1"))):
        if not pathlib.Path(files[name]).exists():
            common.t5patches(
                "annotate", "--model", files["model"], "--inputs", files["inputs"],
                "--rules", files["rules"], "--expand", "32", "--output", files[name], *how,
            )  # fmt: skip
    return files


def measured(
    files: Mapping[str, str], place: pathlib.Path, variations: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """A row for each variation."""
    rows: list[dict[str, Any]] = []
    folders = []
    for name in variations:
        options = [word.format(**files) for word in VARIATIONS[name].split()]
        data = [] if "--data" in options else ["--data", files["greedy"]]
        folders.append(place / f"{name.replace(' ', '-')}-{seed}")
        if not folders[-1].exists():
            common.t5patches(
                "edit", "--model", files["model"], "--output", folders[-1], "--seed", seed,
                *data, *RATE, *options,
            )  # fmt: skip
        rows.append({"name": name, "seed": seed})
    found, _, _ = common.t5patches(
        "evaluate", "--before", files["model"], "--after", *folders,
        "--inputs", files["inputs"].replace("inputs.txt", "held-out.jsonl"),
        "--rules", files["rules"],
    )  # fmt: skip
    return [
        row | {k: edited["measures"][k]["value"] for k in MEASURES}
        for row, edited in zip(rows, found["rows"], strict=True)
    ]


def summary(rows: Sequence[dict], name: str) -> dict[str, tuple[float, float]]:
    """Means over the seeds of a variation, and their standard errors (nan of one seed)."""
    of = [row for row in rows if row["name"] == name]
    found = {key: ratio([row[key] for row in of]) for key in MEASURES}
    return {key: (mean.value, mean.error) for key, mean in found.items()}


def cells(of: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """A row of the table, by the heads of its columns."""

    def told(name: str, digits: int) -> str:
        mean, error = of[name]
        return f"{mean:.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")

    return {
        "KL": told("kl", 4),
        "unwanted, %": told("prevalence", 1),
        "sampled, %": told("prevalence_sampled", 1),
        "clean kept, %": told("exact_match_clean", 1),
    }


def main() -> None:
    """Edits, measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variations", nargs="+", choices=VARIATIONS, default=list(VARIATIONS))
    parser.add_argument(
        "--keep", metavar="DIR", help="where to work; default: where all is removed"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        place = pathlib.Path(options.keep or passing)
        place.mkdir(parents=True, exist_ok=True)
        files = prepared(place)
        for seed in range(options.seeds):
            rows = measured(files, place, options.variations, seed)
            path = common.add("defaults", rows, operator.itemgetter("name", "seed"))
    rows = common.stored("defaults")
    table = Table(title="one option changed at a time")
    names = list(dict.fromkeys(row["name"] for row in rows))
    shown = [cells(summary(rows, name)) for name in names]
    for head in ("", *shown[0]):
        table.add_column(head, justify="right")
    for name, values in zip(names, shown, strict=True):
        table.add_row(name, *values.values())
    Console(width=120).print(table)
    print(f"stored in {path}")


if __name__ == "__main__":
    main()
