r"""Whether kernels are right on a card, and in a process of its own what may hang there.

    python -m bench.checks '[["tnrf", "float32", 8, 32128, 16]]'   # a row of JSON for each program

A kernel that waits for a copy or for another block that never comes ends by no error, and takes
the process that waits for it along. `Apart` runs such checks in other processes, one for each
number of blocks that share a row, all at once, and ends those that say nothing any more.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import common, gpu
from t5patches_kernels import BlockSizes
from t5patches_kernels.backends.pallas_gpu import plan as plans
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Operation, Stage

THREADS = 8  # that compile
# Without a word after which a process hangs, by what it does: a card runs a check in milliseconds.
SECONDS = {"compiles": 150, "runs": 30}
COMMAND = (sys.executable, "-m", "bench.checks")

Row = dict[str, Any]


class Program(NamedTuple):
    """Value and gradient of logits, or of hidden states in bfloat16."""

    objective: str
    dtype: str
    tokens: int
    vocabulary: int
    what: str | int  # an implementation by name; "cluster", by its best plan; or blocks a row
    width: int = 0  # of the hidden states; 0: of logits

    @property
    def of(self) -> Row:
        """What a row says of it beside its implementation."""
        row: Row = {"tokens": self.tokens, "vocabulary": self.vocabulary, "dtype": self.dtype}
        row |= {"width": self.width} if self.width else {}
        return row | {"objective": self.objective}

    @property
    def implementation(self) -> Any:
        """As functions take it, or ``"dense"``."""
        if self.what == "cluster":
            return BlockSizes()
        return BlockSizes(self.what) if isinstance(self.what, int) else self.what

    @property
    def plan(self) -> plans.Plan | None:
        """How the GPU kernel cuts a row up; None where it is another program."""
        sizes = plans.ONE_BLOCK if self.what == "pallas_gpu" else self.implementation
        if not isinstance(sizes, BlockSizes):
            return None
        # The head's logits are float32, and their gradient is what its products take.
        itemsize = 4 if self.width else jnp.dtype(self.dtype).itemsize
        itemsizes = (itemsize,) * (1 + (self.objective in common.OBJECTIVES))
        settings = Settings(self.objective, self.vocabulary, smoothing=1e-6)
        op = Operation(settings, gradient_dtype=self.dtype)
        size = (self.vocabulary, itemsizes, 1, sizes)
        return plans.call_of(op, Stage.VALUE_AND_GRAD, *size).plan

    @property
    def blocks(self) -> int:
        """How many share a row; 0 where it is not the GPU kernel."""
        return self.plan.cluster if self.plan else 0

    def jitted(self) -> Any:
        """It, to be called or compiled."""
        of = common.head_total if self.width else common.total
        total = functools.partial(of, self.implementation, self.objective)
        return jax.jit(jax.value_and_grad(total, (0, 1) if self.width else 0))

    def operands(self) -> tuple[jax.Array, ...]:
        """What it takes: arrays of two models, targets and weights."""
        if self.width:
            return common.head_inputs(self.tokens, self.vocabulary, self.width)
        return gpu.operands(self.tokens, self.vocabulary, self.dtype)

    def compiled(self) -> Any:
        """It, compiled for its operands."""
        return self.jitted().lower(*jax.eval_shape(self.operands)).compile()


# --- Right ----------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """What there is of a check before the program runs."""

    program: Any
    operands: tuple[jax.Array, ...]
    exact: list[np.ndarray]  # loss and gradients by the dense formula in float64
    dense: list[np.ndarray]  # in float32


def ready(of: Program) -> Ready:
    """Compiles a program and works out what is right."""
    *arrays, y, w = of.operands()
    args = (*arrays, y.at[0].set(0).at[1].set(of.vocabulary - 1), w)
    *arrays, y, w = jax.device_get(args)

    def by_dense(precision: Any) -> list[np.ndarray]:
        with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(precision == np.float64):
            rows = (*(x.astype(precision) for x in arrays), y, w.astype(precision))
            found = of._replace(what="reference").jitted()(*rows)
            return jax.tree.leaves(jax.device_get(found))

    return Ready(of.compiled(), args, by_dense(np.float64), by_dense(np.float32))


def error(of: Program, known: Ready) -> Row:
    """How far a program's loss and gradients are from float64, and how far they may be."""
    ours = jax.tree.leaves(jax.device_get(known.program(*known.operands)))
    rounding = {"float32": 1e-5, "bfloat16": 2.0**-8}[of.dtype]
    if of.width:  # both the gradient to the logits and what is made of it are rounded
        parts = {"loss": 1e-5, "hidden_gradient": 2 * rounding, "kernel_gradient": 2 * rounding}
    else:
        parts = {"loss": 1e-5, "gradient": rounding}
    row: Row = {"right": True}
    every = zip(parts.items(), known.exact, known.dense, ours, strict=True)
    for (name, rounding), x, base, got in every:
        far, base_far = (np.abs(np.asarray(of, np.float64) - x).max() for of in (got, base))
        allowed = base_far + rounding * np.abs(x).max()
        row |= {f"{name}_error": float(far), f"{name}_allowed": float(allowed)}
        row["right"] &= bool(far <= allowed)  # not where it is NaN
    return row


def errors(
    programs: Sequence[Program], runs: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], Row]]:
    """What checks each of some programs, while the next are made ready; it says when one runs."""

    def check(of: Program, known: concurrent.futures.Future[Ready]) -> Row:
        found = known.result()
        runs()
        return error(of, found)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        pending = [pool.submit(ready, of) for of in programs]
        try:
            for of, known in zip(programs, pending, strict=True):
                yield functools.partial(check, of, known)
        finally:
            pool.shutdown(cancel_futures=True)


def differing(program: Callable[..., Any], args: tuple[jax.Array, ...], repeats: int) -> Row:
    """How often a program gives other bits than the first time."""
    first, same = program(*args), jax.jit(_equal)
    differ = sum(not same(first, program(*args)) for _ in range(repeats))
    return {"repeats": repeats, "differ": differ, "right": differ == 0}


def _equal(a: Any, b: Any) -> jax.Array:
    return jnp.logical_and(*(jnp.all(x == y) for x, y in zip(a, b, strict=True)))


# --- In processes of their own --------------------------------------------------------------------


class _Process:
    """Checks in another process, whose rows are read while it goes on."""

    def __init__(self, programs: Sequence[Program]):
        self.child = subprocess.Popen(
            [*COMMAND, json.dumps(programs)],
            cwd=pathlib.Path(__file__).parent.parent,
            # Whoever waits may hold nearly all of the card's memory.
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self.heard, self.does, self.said = time.monotonic(), "compiles", ""
        self.fault: str | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.child.stdout is not None
        with self.child.stdout as lines:
            for line in lines:
                if line == "runs\n":
                    self.heard, self.does = time.monotonic(), "runs"
                elif line.startswith("{"):
                    self.heard, self.does = time.monotonic(), "compiles"
                    self.rows.put(json.loads(line))
                else:
                    self.said = line.strip() or self.said
        self.rows.put(None)

    def row(self) -> Row:
        """The next one."""
        while self.rows.empty():
            limit = SECONDS[self.does]
            if time.monotonic() > self.heard + limit:
                self.fault = "hang"
                self.end()
                raise TimeoutError(f"hangs: {self.does} for {limit} s")
            time.sleep(0.05)
        row = self.rows.get()
        if row is None:  # it has ended, which later rows are to be told too
            self.rows.put(None)
            if self.child.wait() < 0:
                self.fault = "crash"
            raise RuntimeError(f"the process of this check has ended: {self.said[-150:]}")
        if row.get("error", "").startswith("JaxRuntimeError: INTERNAL"):  # not of memory
            self.fault = "fail on the card"
        return row

    def end(self) -> None:
        """Ends it; what hangs on a card may not end at once, and is not waited for."""
        self.child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(timeout=5)


class Apart:
    """Checks in a process for each number of blocks that share a row, all at once from the first.

    Args:
      programs: by that number.
    """

    def __init__(self, programs: Mapping[int, Sequence[Program]]):
        self._programs = programs
        self._processes: dict[int, _Process] = {}

    def row(self, blocks: int) -> Row:
        """The next row of the process of this number of blocks.

        Raises:
          TimeoutError: it hangs, and has been ended.
          RuntimeError: it has ended, or it hung before.
        """
        if not self._processes:
            self._processes = {n: _Process(of) for n, of in self._programs.items()}
        if self._processes[blocks].fault == "hang":
            self.refuse(blocks)
        return self._processes[blocks].row()

    def close(self) -> None:
        """Ends all of them."""
        for process in self._processes.values():
            process.end()

    def refuse(self, blocks: int) -> None:
        """Raises a RuntimeError where such rows hang, crash, or fail on the card."""
        process = self._processes.get(blocks)
        if process and process.fault:
            raise RuntimeError(f"not run: rows over {blocks} blocks {process.fault}")


def main() -> None:
    """Checks the programs that it is given, in order."""
    programs = [Program(*x) for x in json.loads(sys.argv[1])]
    for check in errors(programs, lambda: print("runs", flush=True)):
        print(json.dumps(gpu.guarded(check)), flush=True)


if __name__ == "__main__":
    main()
