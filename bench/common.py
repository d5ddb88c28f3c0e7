"""What all benchmarks share: the baseline, the inputs, and how a figure is taken."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import t5patches_kernels as tk

RESULTS = pathlib.Path(__file__).parent / "results"

# Vocabulary sizes by the models that have them.
VOCABULARIES = {"T5": 32128, "Llama 3": 128256, "mT5": 250112}
OBJECTIVES = tk.TARGETED_NEGATIVE
# Those without a reference.
ALONE: Mapping[str, Callable[..., tk.TokenLoss]] = {
    "ul": tk.unlikelihood_loss,
    "nl": tk.negative_likelihood_loss,
    "ce": tk.cross_entropy_loss,
}
# Hidden states and kernels of a large head, for a TPU.
TPU_HEAD = {"tokens": 4096, "vocabulary": VOCABULARIES["mT5"], "width": 1024}
# T5 1.1's sizes and mT5's largest, as T5X's and our own `T5Config` take them.
_ALL_T5_1_1 = {
    "head_dim": 64,
    "mlp_activations": ("gelu", "linear"),
    "dropout_rate": 0.0,
}
T5_1_1: Mapping[str, Mapping[str, Any]] = {
    size: {
        **_ALL_T5_1_1,
        "vocab_size": VOCABULARIES["mT5" if size.startswith("mT5") else "T5"],
        "emb_dim": width,
        "mlp_dim": inner,
        "num_heads": heads,
        "num_encoder_layers": layers,
        "num_decoder_layers": layers,
    }
    for size, width, inner, heads, layers in (
        ("small", 512, 1024, 6, 8),
        ("base", 768, 2048, 12, 12),
        ("large", 1024, 2816, 16, 24),
        ("XL", 2048, 5120, 32, 24),
        ("XXL", 4096, 10240, 64, 24),
        ("mT5-XXL", 4096, 10240, 64, 24),
    )
}


# --- The baseline: T5Patches' formulas in plain jnp ----------------------------------------------


@jax.custom_vjp
def _cross_entropy(logits, targets):
    """``-sum targets log_softmax(logits)`` with T5X's stable gradient."""
    log_z = jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    return -jnp.sum(targets * (logits - log_z), axis=-1)


def _cross_entropy_forward(logits, targets):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    e = jnp.exp(shifted)
    total = e.sum(axis=-1, keepdims=True)
    log_p = shifted - jnp.log(total)
    return -jnp.sum(targets * log_p, axis=-1), (targets, e, total, log_p)


def _cross_entropy_backward(residuals, ct):
    targets, e, total, log_p = residuals
    return ct[..., None] * (e / total - targets), -ct[..., None] * log_p


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def dense(name: str, z, r, y, w, alpha: float = 1.0, smoothing: float = 1e-6):
    """The losses ``[...]`` as T5Patches computes them: whole arrays, in float32."""
    z, r = z.astype(jnp.float32), r.astype(jnp.float32)
    onehot = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)
    sign = w[..., None]
    kept, pushed = (w > 0).astype(z.dtype), (w < 0).astype(z.dtype)
    if name in ("tnff", "tnfll"):
        q = jax.nn.softmax(r)
        target = jnp.where(sign > 0, onehot if name == "tnfll" else q, q + onehot * sign * q)
        target = target / target.sum(axis=-1, keepdims=True)
        return _cross_entropy(z, target) * (pushed * alpha + kept)
    wanted = jnp.where(sign > 0, onehot * 1e9 if name == "tnrll" else r, r + onehot * sign * 1e9)
    s = jax.nn.softmax(wanted) + smoothing
    log_s = jnp.log(s / s.sum(axis=-1, keepdims=True))
    p = jax.nn.softmax(z)
    reverse = _cross_entropy(log_s, p) - _cross_entropy(z, p)
    if name == "tnrr":
        return reverse * (pushed * alpha + kept)
    return reverse * pushed * alpha + _cross_entropy(z, jax.nn.softmax(log_s)) * kept


def value_and_gradient(losses: Callable) -> Callable:
    """``(z, r, y, w) -> (sum of the losses, its gradient by z)``."""
    return lambda z, r, y, w: jax.value_and_grad(lambda z: losses(z, r, y, w).sum())(z)


def inputs(tokens: tuple[int, ...], vocabulary: int, dtype=jnp.float32, seed: int = 0):
    """Logits of a model near its original, targets, and one token in four pushed down.

    `tokens` are the leading dimensions: ``(batch, length)`` as a trainer has them.
    """
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    z = 3 * jax.random.normal(a, (*tokens, vocabulary), jnp.float32)
    r = z + jax.random.normal(b, z.shape, jnp.float32)
    y = jax.random.randint(c, tokens, 0, vocabulary)
    w = jnp.where(jnp.arange(math.prod(tokens)) % 4 == 0, -1.0, 1.0).reshape(tokens)
    return z.astype(dtype), r.astype(dtype), y, w


def head_scale(width: int) -> float:
    """Of a kernel's entries: logits of normal hidden states are of a few units then."""
    return 3.2 / math.sqrt(width)


def head_inputs(
    tokens: int, vocabulary: int, width: int, reference_width: int | None = None
) -> tuple[jax.Array, ...]:
    """Hidden states and kernels of two models in bfloat16, near each other where as wide."""
    k = jax.random.split(jax.random.key(0), 5)

    def model(keys: tuple[jax.Array, jax.Array], width: int) -> tuple[jax.Array, jax.Array]:
        h = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
        kernel = jax.random.normal(keys[1], (width, vocabulary), jnp.bfloat16)
        return h, kernel * jnp.bfloat16(head_scale(width))

    h, kernel = model((k[0], k[1]), width)
    y = jax.random.randint(k[4], (tokens,), 0, vocabulary)
    w = jnp.where(jnp.arange(tokens) % 4 == 0, -1.0, 1.0)
    if reference_width not in (None, width):
        return h, kernel, *model((k[2], k[3]), reference_width), y, w
    noise = [0.3 * jax.random.normal(i, x.shape, x.dtype) for i, x in ((k[2], h), (k[3], kernel))]
    return h, kernel, h + noise[0], kernel + 0.1 * noise[1], y, w


# --- What is compared -----------------------------------------------------------------------------


def total(what: str | tk.BlockSizes, objective: str, z, r, y, w) -> jax.Array:
    """The sum of an objective's losses.

    Args:
      what: an implementation of this library's; or ``"dense"``: T5Patches' formula and, for the
        objectives without a reference, ours on whole arrays.
      objective: any of `OBJECTIVES` and `ALONE`; the logits `r` are for the former.
      z: ``[..., V]``.
      r: ``[..., V]``.
      y: ``[...]``.
      w: ``[...]``.
    """
    if objective in ALONE:
        implementation = "reference" if what == "dense" else what
        return ALONE[objective](z, y, w, implementation=implementation).loss.sum()
    if what == "dense":
        return dense(objective, z, r, y, w).sum()
    loss = tk.targeted_negative_loss(z, r, y, w, objective=objective, implementation=what)
    return loss.loss.sum()


def head_total(
    what: str, objective: str, h, kernel, rh, rk, y, w, *, chunk_bytes: int | None = None
) -> jax.Array:
    """The same of hidden states, for `OBJECTIVES`: the logits whole, or made in chunks.

    They are float32 either way.
    """
    if what == "dense":
        z, r = (jnp.dot(*x, preferred_element_type=jnp.float32) for x in ((h, kernel), (rh, rk)))
        return total(what, objective, z, r, y, w)
    loss = tk.linear_targeted_negative_loss(
        h, kernel, rh, rk, y, w, objective=objective, implementation=what, chunk_bytes=chunk_bytes
    )
    return loss.loss.sum()


# --- How a figure is taken ------------------------------------------------------------------------


def t5patches(*words: object) -> tuple[dict, float, float]:
    """Runs a command: what it says as JSON, its seconds, and the GiB that it held at most."""
    command = [sys.executable, "-m", "t5patches.cli", *map(str, words), "--json"]
    path = os.pathsep.join([str(RESULTS.parent.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        child = subprocess.Popen(command, stdout=said, env=os.environ | {"PYTHONPATH": path})
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        if status:
            raise SystemExit(f"{' '.join(command)} failed: {os.waitstatus_to_exitcode(status)}")
        said.seek(0)
        return json.load(said), seconds, usage.ru_maxrss / 2**20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of several runs."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    @classmethod
    def of(cls, taken: list[float]) -> Timing:
        """What the runs took."""
        return cls(*np.percentile(taken, [50, 25, 75]))

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


def timed(calls: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, Timing]:
    """Times calls in turn, so that a drift of the machine meets all of them.

    Each round runs a call three times and counts the last two: giving back what the call before it
    held goes on after that one has returned, and would be charged to the wrong program.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())
            for _ in range(2):
                start = time.perf_counter()
                jax.block_until_ready(call())
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing.of(ms) for name, ms in taken.items()}


def profile(call: Callable[[], object], rounds: int) -> jax.profiler.ProfileData:
    """JAX's own profile of some calls, one after another."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(rounds):
                jax.block_until_ready(call())
        (found,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return jax.profiler.ProfileData.from_file(str(found))


def _by_module(found: jax.profiler.ProfileData, program: str) -> list[float]:
    """The executions that the cores of a device report, in nanoseconds."""
    cores = []
    for plane in found.planes:
        if plane.name.startswith("/device:"):
            events = [e for line in plane.lines if line.name == "XLA Modules" for e in line.events]
            cores.append([e.duration_ns for e in events if e.name.partition("(")[0] == program])
    return [max(together) for together in zip(*filter(None, cores), strict=True)]


def _by_run(found: jax.profiler.ProfileData, program: str) -> list[float]:
    """What the operations of a run span, in nanoseconds: all that a CPU reports."""
    runs: dict[int, list[tuple[float, float]]] = {}
    with warnings.catch_warnings():
        # By Python 3.12, of the type of an event's `stats`; as an error it would end the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in (e for plane in found.planes for line in plane.lines for e in line.events):
            of = dict(event.stats)
            if of.get("hlo_module") == program:
                runs.setdefault(of["run_id"], []).append((event.start_ns, event.end_ns))
    return [max(b for _, b in run) - min(a for a, _ in run) for run in runs.values()]


def device_times(found: jax.profiler.ProfileData, program: str) -> list[float]:
    """The milliseconds that each execution of a program took on the device.

    A TPU's profile has a plane for each core, ``/device:TPU:0`` and so on, whose line ``XLA
    Modules`` has an event for each execution, by the name of the module. Cores that run a program
    together count as the slowest of them.

    Args:
      found: a profile, as of `profile`.
      program: the module's name, ``jit_`` and that of the function.

    Raises:
      LookupError: the program is not in the profile.
    """
    took = _by_module(found, program) or _by_run(found, program)
    if not took:
        names = ", ".join(plane.name for plane in found.planes)
        raise LookupError(f"no execution of {program} in the profile, whose planes are {names}")
    return [nanoseconds / 1e6 for nanoseconds in took]


def temporaries(compiled, unit: float) -> float:
    """Bytes that a compiled program holds beyond inputs and outputs, over `unit`."""
    return compiled.memory_analysis().temp_size_in_bytes / unit


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def setting() -> dict[str, str]:
    """What a figure depends on besides the code."""
    device = jax.devices()[0]
    describe = ["git", "describe", "--always", "--dirty"]
    commit = ""
    if shutil.which("git"):  # a lent machine may have none
        commit = subprocess.run(
            describe, capture_output=True, text=True, check=False
        ).stdout.strip()
    on_host = device.platform == "cpu"
    return {
        "device": f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
        if on_host
        else device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def require_device(*platforms: str) -> None:
    """Ends a benchmark of devices that JAX does not run on here: its figures would be another's.

    Args:
        platforms: of devices, such as "gpu".
    """
    here = jax.default_backend()
    if here not in platforms:
        wanted = " or ".join(platform.upper() for platform in platforms)
        raise SystemExit(
            f"No {wanted} here (JAX runs on {here}): "
            "nothing is timed or stored. The compilers' static figures, on any machine: "
            "make bench-tpu-static, make bench-gpu-static"
        )


def save(name: str, rows: list[dict], **about: object) -> pathlib.Path:
    """Writes rows, with their setting and what else is to be known, to ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"setting": setting(), **about, "rows": rows}, indent=1) + "\n")
    return partial.replace(path)


def stored(name: str) -> list[dict]:
    """The rows in ``results/NAME.json``, none where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def add(name: str, rows: list[dict], key: Callable, **about: object) -> pathlib.Path:
    """Writes rows beside those that are stored, instead of those with the same key.

    Each says when and of which commit it is: those beside it may be older.
    """
    now = {k: v for k, v in setting().items() if k in ("date", "commit")}
    merged = {key(row): row for row in (*stored(name), *(row | now for row in rows))}
    return save(name, list(merged.values()), **about)
