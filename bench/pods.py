r"""T5X's training step on slices of a TPU v4 pod: `make bench-pods T5X=FOLDER`.

    python -m bench.pods                                        # what is not stored yet
    python -m bench.pods --sizes base --chips 8 --variants ours
    python -m bench.pods --sizes XXL --chips 64 --layers 24     # all of a model
    python -m bench.pods --sizes                                # none: the table of what is stored

**Static: the TPU compiler's own figures, ahead of time. Nothing ran on a TPU**, and no parameter is
ever made: the step is compiled for shapes. It is the step of our trainer for TNRF, on the mesh and
by the standard rules of T5X's partitioner: parameters in float32, split over ``model`` and whole
along ``data``; activations in bfloat16, none computed twice; Adafactor; no dropout; inputs of 512
tokens, targets of 128. The variants differ in model and loss: T5Patches' model; ours in its place,
on the same network, with the kernels for TPUs; ours with `t5patches.network` and
``fused_head=True``.

T5Patches' own trainer makes the original parameters a constant of the program, whole on each
device, and raises where they are split over several hosts, as on all of these slices. Here its
model gets them as ours does: an argument, split like the parameters being trained.

A row is one compiled program, stored as soon as it is there: a run that was stopped goes on with
what is missing. Where no row has all of a model's layers, the table's figures follow from two
depths by a straight line and are marked; the largest batch follows from two batches by another: at
that batch arguments, temporaries, program and what is returned fill what a program gets of a chip.
On a larger slice a chip does what it does on the smallest, so that there one program is enough: its
distance from the same program on 8 chips is added to what is known of those.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import operator
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from bench import common, t5x_step
from bench.collectives import Collective, moved

NAME = "pods"  # of the file in bench/results/
OBJECTIVE = "TNRF"
INPUTS, TARGETS = 512, 128
SLICES = {8: "2x2x2", 64: "4x4x4", 512: "8x8x8"}  # of v4, by the number of chips
# Over how many chips each model's parameters are split.
MODEL_AXIS = {"base": 4, "large": 4, "XL": 4, "XXL": 8, "mT5-XXL": 8}
# Two batches, as sequences for each part of the data axis; the second nearer to what fits.
ROWS = {"base": (64, 192), "large": (16, 64), "XL": (8, 32), "XXL": (4, 24), "mT5-XXL": (4, 8)}
DEPTHS = (1, 3)  # layers of encoder and decoder, where not all are asked for
HBM_GIB = 30.75  # what the compiler lets a program have of a v4 chip's 32 GiB


class Program(NamedTuple):
    """What identifies a row."""

    size: str
    chips: int
    variant: str
    layers: int  # of the encoder, and as many of the decoder
    rows: int


KEY = operator.itemgetter(*Program._fields)


# --- One program ----------------------------------------------------------------------------------


@functools.cache
def partitioner(chips: int, split: int) -> Any:
    """T5X's, on a slice with the parameters split over so many chips."""
    from t5x import partitioning
    from tpu_topology import topology

    devices = topology("v4", SLICES[chips]).devices
    local = [d for d in devices if d.process_index == 0]
    # T5X chooses which neighbours share a model, but for all chips of the smallest slice.
    tile = {"model_parallel_submesh": (2, 2, 2, 1)} if split == chips else {"num_partitions": split}
    made = partitioning.PjitPartitioner(**tile)
    with (
        mock.patch.object(jax, "devices", return_value=devices),
        mock.patch.object(jax, "local_devices", return_value=local),
    ):
        made.mesh  # noqa: B018  # T5X asks JAX what there is, and keeps the answer
    return made


def batch_of(rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch."""
    names = ("decoder_target_tokens", "decoder_input_tokens", "decoder_loss_weights")
    lengths = {"encoder_input_tokens": INPUTS, **dict.fromkeys(names, TARGETS)}
    return {
        name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name, length in lengths.items()
    }


def compiled(step: t5x_step.Step, batch: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """The step of our trainer, whatever its model, for shapes."""
    import t5x_stack

    with step.trainer(t5x_stack.OURS, None) as trainer:
        trainer._keep(step.state.params)
        return trainer._partitioned_train_step.lower(step.state, batch).compile()._step


def numbers_a_token(
    found: Sequence[Collective], tokens: tuple[int, int], width: int
) -> list[list[int]]:
    """How many numbers a token each collective of the loss moves, array by array.

    The loss is what is differentiated and lies outside the network's modules. A fused head lies
    there too: its gradients, to hidden states and matrix, are summed for every head that is split,
    and are left out here as they are where the network makes the logits. So are single numbers, as
    metrics are.

    Args:
      found: of a program; XLA may have merged the loss's with those of the network.
      tokens: a device's, batch and length.
      width: of the model.

    Raises:
      ValueError: the loss moves another array.
    """
    leads, moves = (tokens, (math.prod(tokens),)), []
    for c in found:
        if "jvp()" not in c.of:
            continue
        numbers = []
        for _, shape in c.arrays:
            lead = next((lead for lead in leads if shape[: len(lead)] == lead), None)
            if lead and shape[len(lead) :] != (width,):
                numbers.append(math.prod(shape[len(lead) :]))
            elif shape and width not in shape and "Transformer" not in c.of:
                raise ValueError(f"{c.kind} of {c.of} moves {shape}, which is nothing by token")
        if numbers:
            moves.append(numbers)
    return moves


def measure(program: Program) -> dict[str, Any]:
    """The row of a program."""
    of = common.T5_1_1[program.size]
    depth = dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), program.layers)
    parts = partitioner(program.chips, MODEL_AXIS[program.size])
    batch = batch_of(program.rows * parts.data_mesh_size)
    step = t5x_step.prepare(
        program.variant, OBJECTIVE, {**of, **depth}, batch, "bfloat16", "pallas_tpu", parts
    )
    start = time.perf_counter()
    try:
        made = compiled(step, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found: dict[str, Any] = {"too large": str(error).strip().splitlines()[0]}
    else:
        text = made.as_text()
        moves = numbers_a_token(moved(text), (program.rows, TARGETS), of["emb_dim"])
        found = t5x_step.memory(made) | {"loss moves": moves}
    seconds = time.perf_counter() - start
    jax.clear_caches()  # of what was traced: the next program has no use for it
    return {**program._asdict(), "compile s": seconds, **found, "setting": common.setting()}


# --- What follows from several --------------------------------------------------------------------

Rows = Sequence[Mapping[str, Any]]


def line(points: Mapping[int, float], x: int) -> float | None:
    """What is known at `x`, or where the line through the two points nearest to it goes."""
    if x in points:
        return points[x]
    if len(points) < 2:
        return None
    (a, fa), (b, fb) = sorted(points.items(), key=lambda point: abs(point[0] - x))[:2]
    return fa + (fb - fa) * (x - a) / (b - a)


def figure(name: str, found: Rows, layers: int, rows: int, like: Rows = ()) -> float | None:
    """A figure of the step with so many layers and rows, from rows of one size, slice and variant.

    Args:
      name: in a row.
      found: the rows.
      layers: compiled, or by a line through two other depths.
      rows: compiled, or by a line through two other batches.
      like: rows of a smaller slice, whose chips do as much each. What is not compiled follows from
        there, and from how far a program is from the same one there.

    Returns:
      None where too little is compiled.
    """
    depths: dict[int, dict[int, float]] = {}
    for row in found:
        if name in row:
            depths.setdefault(row["rows"], {})[row["layers"]] = row[name]
    whole = {batch: line(by_layers, layers) for batch, by_layers in depths.items()}
    value = line({batch: value for batch, value in whole.items() if value is not None}, rows)
    there = figure(name, like, layers, rows) if value is None and like else None
    if there is None:
        return value
    same = operator.itemgetter("layers", "rows")
    apart = [
        a[name] - b[name]
        for a in found
        for b in like
        if same(a) == same(b) and name in a and name in b
    ]
    return there + apart[0] if apart else None


def largest_batch(found: Rows, layers: int, like: Rows = ()) -> int | None:
    """Rows for each part of the data axis with which the step takes all of a chip's memory."""
    none, one = (figure("all GiB", found, layers, rows, like) for rows in (0, 1))
    if none is None or one is None:
        return None
    return max(0, math.floor((HBM_GIB - none) / (one - none)))


# --- The table ------------------------------------------------------------------------------------

HEADER = (
    "T5 1.1",
    "chips, data × model",
    "batch",
    "arguments",
    "temporaries",
    "peak",
    "numbers a token",
    "largest batch",
)


def cell(name: str, found: Rows, layers: int, rows: int, like: Rows) -> str:
    """A figure, with a mark where it is not of a compiled program."""
    value = figure(name, found, layers, rows, like)
    if value is None:
        return "-"
    compiled = any((row["layers"], row["rows"]) == (layers, rows) for row in found)
    return f"{'' if compiled else '≈'}{value:.2f}"


def moves(found: Rows) -> str:
    """Numbers a token, and in how many collectives, as in every row of one variant."""
    lists = [row["loss moves"] for row in found if "loss moves" in row]
    said = {f"{sum(map(sum, moved))} in {len(moved)}" for moved in lists}
    return " or ".join(sorted(said)) or "-"


def table(rows: Rows) -> list[list[str]]:
    """A line for each size and slice that has rows; in a cell the variants, in their order."""
    lines, is_of = [], operator.itemgetter("size", "chips", "variant")
    for size, chips in itertools.product(MODEL_AXIS, SLICES):
        of, like = (
            [
                [row for row in rows if row["rows"] in ROWS[size] and is_of(row) == (size, n, kind)]
                for kind in t5x_step.VARIANTS
            ]
            for n in (chips, min(SLICES))
        )
        if not any(of):
            continue
        layers, batch = common.T5_1_1[size]["num_encoder_layers"], ROWS[size][0]
        pairs = [*zip(of, like, strict=True)]
        data = chips // MODEL_AXIS[size]
        memory = (
            [cell(f"{name} GiB", found, layers, batch, there) for found, there in pairs]
            for name in HEADER[3:6]
        )
        largest = [largest_batch(found, layers, there) for found, there in pairs]
        figures = (*memory, map(moves, of), ["-" if n is None else f"{n * data}" for n in largest])
        chosen = [size, f"{chips} = {data} × {MODEL_AXIS[size]}", str(batch * data)]
        lines.append(chosen + [" / ".join(cells) for cells in figures])
    return lines


def lines_held(rows: Rows) -> list[tuple[Mapping[str, Any], float]]:
    """Rows of a third depth, and what the line through the others says of their temporaries."""
    groups: dict[tuple, dict[int, Any]] = {}
    for row in rows:
        if "too large" not in row:
            program = Program(*KEY(row))
            groups.setdefault(program._replace(layers=0), {})[program.layers] = row
    held = []
    for found in groups.values():
        deepest = found.pop(max(found))
        others = {layers: row["temporaries GiB"] for layers, row in found.items()}
        expected = line(others, deepest["layers"])
        if expected is not None:
            held.append((deepest, expected))
    return held


def main() -> None:
    """Compiles what is asked for and not stored yet, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    choice = functools.partial(parser.add_argument, nargs="*")
    choice("--sizes", default=[*MODEL_AXIS], choices=MODEL_AXIS)
    choice("--chips", type=int, default=[*SLICES], choices=SLICES)
    choice("--variants", default=t5x_step.VARIANTS, choices=t5x_step.VARIANTS)
    choice("--layers", type=int, help="of the encoder, and of the decoder (default: by slice)")
    choice(
        "--rows",
        type=int,
        help="sequences for each part of the data axis (default: by size and slice)",
    )
    options = parser.parse_args()
    stored = set(map(KEY, common.stored(NAME)))
    for size, chips, variant in itertools.product(options.sizes, options.chips, options.variants):
        some = slice(None if chips == min(SLICES) else 1)  # of which the others follow
        of_slice = options.rows or ROWS[size][some], options.layers or DEPTHS[some]
        for rows, layers in itertools.product(*of_slice):
            program = Program(size, chips, variant, layers, rows)
            if program not in stored:
                row = measure(program)
                print(row, flush=True)
                print(common.add(NAME, [row], KEY), flush=True)
    shown = Table(*HEADER, title="GiB of a device, by T5Patches / ours / ours with a fused head")
    for cells in table(common.stored(NAME)):
        shown.add_row(*cells)
    Console(width=150).print(shown)


if __name__ == "__main__":
    main()
