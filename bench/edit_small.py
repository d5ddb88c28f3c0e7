"""`t5patches edit` on a model of real size, with the fused losses and with the dense ones.

A T5 1.1 small (77 million parameters) with random weights: nothing is downloaded, and neither time
nor memory depends on what the weights are. 20 updates of 8 examples of 128 and 64 tokens, TNRF,
Adafactor; each edit is a process of its own, from reading the folder to the edited one, and the two
take turns.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile

import numpy as np
from flax import traverse_util
from rich.console import Console
from rich.table import Table

from bench import common
from t5patches.editing.data import make_example, with_end, write_examples
from t5patches.editing.demo_task import make_pairs, places_not_in_source
from t5patches.model.huggingface import save_checkpoint
from t5patches.model.t5.model import T5
from t5patches.model.t5.network import T5Config
from t5patches.model.tokenizer import SentencePieceTokenizer, train_sentencepiece

SMALL = T5(T5Config(**common.T5_1_1["small"]))
STEPS, BATCH, INPUT_LENGTH, OUTPUT_LENGTH = 20, 8, 128, 64
# What the table calls them, and what `--implementation` does.
LOSSES = {"fused": "xla", "dense": "reference"}


def write_model(folder: pathlib.Path) -> SentencePieceTokenizer:
    """A folder of the size of T5 1.1 small, as T5 begins to train."""
    random = np.random.default_rng(0)

    def initial(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] == "scale":
            return np.ones(shape, np.float32)
        spread = 1.0 if path[-1] == "embedding" else shape[0] ** -0.5
        return spread * random.standard_normal(shape, np.float32)

    shapes = traverse_util.flatten_dict(SMALL.param_shapes())
    params = {path: initial(path, x.shape) for path, x in shapes.items()}
    texts = [text for pair in make_pairs(2000, seed=0) for text in pair]
    save_checkpoint(
        folder,
        SMALL,
        traverse_util.unflatten_dict(params),
        files={"spiece.model": train_sentencepiece(texts, 1000)},
    )
    return SentencePieceTokenizer(folder / "spiece.model")


def write_data(path: pathlib.Path, tokenizer: SentencePieceTokenizer) -> None:
    """Several news and summaries together, for inputs and outputs of a usual length."""
    pairs, rule, examples = iter(make_pairs(4000, seed=1)), places_not_in_source(), []
    while len(examples) < STEPS * BATCH:
        news, summaries = "", ""
        for pair in pairs:
            longer = f"{news} {pair.news}".strip(), f"{summaries}, {pair.summary}".strip(", ")
            lengths = [len(tokenizer.encode(text).ids) for text in longer]
            if lengths[0] >= INPUT_LENGTH or lengths[1] >= OUTPUT_LENGTH:
                break
            news, summaries = longer
        spans = list(rule(news, summaries))
        tokenized = with_end(tokenizer.encode(summaries), tokenizer)
        examples.append(make_example(news, tokenized, spans, tokenizer))
    write_examples(path, examples)


def edit(place: pathlib.Path, losses: str, turn: int) -> dict:
    """Runs the command; seconds and the most memory that the process held."""
    files = ("--model", place / "model", "--data", place / "edits.jsonl")
    output = ("--output", place / f"{losses}-{turn}", "--steps", STEPS, "--batch-size", BATCH)
    record, seconds, peak = common.t5patches(
        "edit", "--quiet", *files, *output, "--implementation", LOSSES[losses]
    )
    memory = record["memory"]
    return {
        "losses": losses,
        "edit s": seconds,
        "training s": record["seconds"],
        "peak GiB": peak,
        "working GiB": memory["working"] / 2**30,
        "last loss": record["history"]["loss"][-1],
    }


def main() -> None:
    """Prints the table and stores it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="edits with each of the two")
    turns = parser.parse_args().turns
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        write_data(place / "edits.jsonl", write_model(place / "model"))
        runs = [edit(place, losses, turn) for turn in range(turns) for losses in LOSSES]
    load.append(os.getloadavg()[0])
    rows = []
    for losses in LOSSES:
        of = [run for run in runs if run["losses"] == losses]
        numbers = {k: statistics.median(run[k] for run in of) for k in of[0] if k != "losses"}
        rows.append({"losses": losses, **numbers})
    table = Table(title=f"{STEPS} updates of {BATCH} examples, medians of {turns}")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "losses" else "right")
    for row in rows:
        table.add_row(*(x if isinstance(x, str) else f"{x:.3g}" for x in row.values()))
    console = Console(width=120)
    console.print(table)
    console.print(f"load before and after: {load}")
    console.print(f"stored in {common.save('edit-small', rows, runs=runs, turns=turns, load=load)}")


if __name__ == "__main__":
    main()
