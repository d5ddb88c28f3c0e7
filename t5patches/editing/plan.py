"""What will be held in memory, known before any of it is made.

Parameters, optimizer and original are counted from their shapes; what an update or a batch of
outputs holds beside them is what the compiler has planned for the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from t5patches.editing.train import Step, TrainSettings
from t5patches.model import memory, placement
from t5patches.runs import hosts


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device.

    Attributes:
        device: its name.
        count: how many of them are used.
        parameters: of the model being edited, and of its adapter.
        optimizer: what it keeps for each parameter that is trained.
        original: the original model; without its adapter the edited one is the original, held once.
        working: gradients and activations of one update, and its batch.
        available: what a device has left; None where it does not say. CPU devices share the
            machine's memory, and this is one's share.
        copies: of what is trained: its average, and the best state so far where that lies in the
            same memory.
        saved: what training all parameters would take beyond this, of parameters, gradients,
            optimizer and original; 0 where all are trained.
        chunk_tokens: of how many tokens an update makes logits at a time; 0 where it makes none.
        chunk_bytes: one model's float32 logits of them, which are a part of `working`.
    """

    device: str
    count: int
    parameters: int
    optimizer: int
    original: int
    working: int
    available: int | None
    copies: int = 0
    saved: int = 0
    chunk_tokens: int = 0
    chunk_bytes: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.copies + self.optimizer + self.original + self.working

    def text(self) -> str:
        """The plan in a line."""
        copies = ("copies",) if self.copies else ()
        parts = ("parameters", *copies, "optimizer", "original", "working")
        listed = ", ".join(f"{name} {_size(getattr(self, name))}" for name in parts)
        of = "" if self.available is None else f" of {_size(self.available)}"
        chunks = ""
        if self.chunk_tokens:
            chunks = f"; logits of {self.chunk_tokens} tokens at a time, {_size(self.chunk_bytes)}"
        saved = f"; training all parameters would take {_size(self.saved)} more" * (self.saved > 0)
        return (
            f"memory on each of {self.count} x {self.device}: {listed}; "
            f"{_size(self.total)}{of}{chunks}{saved}"
        )


def show_plan(console: Console, notes: Sequence[str], plan: MemoryPlan) -> None:
    """Says what a run is about to do.

    Args:
        console: where to.
        notes: of its data and steps.
        plan: its memory.
    """
    for line in (*notes, plan.text()):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def plan_memory(step: Step, settings: TrainSettings, mesh: Mesh | None = None) -> MemoryPlan:
    """Says what training will hold.

    Args:
        step: the compiled update.
        settings: how to train.
        mesh: see `t5patches.editing.train.train`.

    Returns:
        The plan.
    """
    used, here = _devices(mesh)
    trained, base, original = map(memory.held, (step.state.params, *step.frozen))
    working = memory.beside((step.state, step.frozen), step.compiled)
    on_cpu = used[0].platform == "cpu"
    copies = memory.held(step.state.average)
    if settings.until is not None and on_cpu:
        copies += trained
    saved = 0
    if settings.lora is not None:
        full = step.of_all()
        # The gradients are as large as what is trained.
        saved = memory.held((full.state, full.state.params, full.frozen))
        saved -= memory.held((step.state, step.state.params, step.frozen))
    if on_cpu and (settings.lora is None or step.head_only or jax.process_count() > 1):
        # What was read stays on the host, however little of it the step needs, and in float32.
        read = base + trained
        original = max(original, read) if settings.param_dtype == "float32" else original + read
    chunk_tokens, chunk_bytes = step.logits_at_a_time(settings.chunk_bytes)
    return MemoryPlan(
        device=used[0].device_kind,
        count=len(used),
        parameters=base + trained,
        copies=copies,
        optimizer=memory.held(step.state.optimizer),
        original=original,
        working=working,
        available=_available(here[0], len(here)),
        saved=saved,
        chunk_tokens=chunk_tokens,
        chunk_bytes=chunk_bytes,
    )


# Twice and four times what the losses take by themselves.
_LARGER_CHUNKS = {"gpu": (1 << 30, 2 << 30), "tpu": (474 << 20, 948 << 20)}
# What an update holds of a chunk: two models' logits, a gradient, and with a softcap one more.
_ARRAYS_OF_A_CHUNK = 4


def with_larger_chunks(
    step: Step, settings: TrainSettings, mesh: Mesh | None = None
) -> TrainSettings:
    """Chooses how much of the logits an update makes at a time, by what a device has left.

    Each chunk adds a whole gradient of the head's kernel to that of the chunks before it, so that
    larger ones are faster where there is room. How much room is known exactly only of a compiled
    update, and to compile one for each size takes longer than most edits gain: the size is chosen
    before, the largest that takes no more than a quarter of what parameters, gradients, optimizer
    and original leave. The update is then compiled once, as without a choice; only where that
    shows that it does not fit, it is compiled again, with the losses' own size.

    Args:
        step: the update, not compiled yet.
        settings: how to train. A size that they name stays.
        mesh: see `t5patches.editing.train.train`.

    Returns:
        The settings with that size; themselves on a CPU, which has its caches to think of, where
        a device does not say what it has, and where no size has more tokens than the losses' own.
    """
    _, here = _devices(mesh)
    sizes = _LARGER_CHUNKS.get(here[0].platform, ())
    if settings.chunk_bytes is not None or not sizes:
        return settings

    def largest() -> int:
        held = memory.held((step.state, step.state.params, step.frozen))  # gradients are like these
        left = (_available(here[0], len(here)) or 0) - held
        own, _ = step.logits_at_a_time(None)
        chosen = 0
        for size in sizes:
            tokens, chunk_bytes = step.logits_at_a_time(size)
            if tokens > own and _ARRAYS_OF_A_CHUNK * chunk_bytes <= left // 4:
                chosen = size
        return chosen

    # Devices of several processes run one program, however much each of them has left.
    size = hosts.first_says(largest)
    if not size:
        return settings
    larger = dataclasses.replace(settings, chunk_bytes=size)
    try:
        plan = plan_memory(step.with_settings(larger), larger, mesh)
        fits = plan.available is not None and plan.total <= plan.available
    except jax.errors.JaxRuntimeError:  # a TPU's compiler refuses what does not fit
        fits = False
    return larger if hosts.first_says(lambda: fits) else settings


def require_memory(
    plan: MemoryPlan,
    settings: TrainSettings,
    mesh: Mesh | None = None,
    *,
    bfloat16: bool = False,
    remat: bool = False,
) -> None:
    """Refuses a plan that does not fit, and says what would.

    Args:
        plan: of `plan_memory`.
        settings: how to train.
        mesh: see `t5patches.editing.train.train`.
        bfloat16: whether activations are already that small.
        remat: whether layers are already run again instead of being held.

    Raises:
        ValueError: naming what to change.
    """
    if plan.available is None or plan.total <= plan.available:
        return
    advice = "; ".join(_advice(plan, settings, mesh, bfloat16, remat))
    raise ValueError(f"{plan.text()}: that does not fit. {advice}")


def require_room(
    what: str,
    working: int,
    beside: int,
    batch_size: int,
    *,
    least: int = 1,
    less: Sequence[str] = ("--truncate-inputs", "--skip-longer", "--max-length"),
) -> None:
    """Refuses to let a model speak where a batch does not fit, and says what would.

    Args:
        what: is made at a time.
        working: bytes for it, beside what is held now.
        beside: bytes that are yet to be read.
        batch_size: outputs at a time.
        least: outputs that are made at a time whatever the batch size is.
        less: options that make them shorter or fewer.

    Raises:
        ValueError: naming what to change.
    """
    available = _available(jax.devices()[0], 1)
    if available is None or working + beside <= available:
        return
    fitting = min(batch_size - 1, math.floor((available - beside) * batch_size / max(1, working)))
    smaller = f"a batch size of {fitting} should fit (--batch-size); " if fitting >= least else ""
    yet = f" and {_size(beside)} of parameters" if beside else ""
    raise ValueError(
        f"{what} take {_size(working)}{yet}, of {_size(available)}: that does not fit. {smaller}"
        f"shorter inputs and outputs take less ({', '.join(less)})"
    )


def yet_to_place(params: Any) -> int:
    """Bytes that a device must yet take of what lies in the host's memory.

    Args:
        params: as they were read.

    Returns:
        Bytes; 0 on a CPU, which has them.
    """
    if jax.devices()[0].platform == "cpu":
        return 0
    return sum(x.nbytes for x in jax.tree.leaves(params) if not isinstance(x, jax.Array))


def bfloat16_is_smaller() -> bool:
    """Whether to advise bfloat16 where memory is short.

    XLA for a CPU makes float32 copies of much that is bfloat16: at SmolLM2's sizes an update with
    frozen parameters in bfloat16, or with activations, takes 6 to 20% more there than in float32.
    Only beside an adapter, with both in bfloat16, it takes less.

    Returns:
        False on a CPU.
    """
    return jax.devices()[0].platform != "cpu"


def _advice(
    plan: MemoryPlan, settings: TrainSettings, mesh: Mesh | None, bfloat16: bool, remat: bool
) -> list[str]:
    rows = 1 if mesh is None else mesh.shape[placement.DATA]
    local = settings.batch_size // rows
    # The gradients are as large as what is trained; the rest grows with the batch.
    gradients = plan.parameters if settings.lora is None else 0
    each = max(1, plan.working - gradients) / local
    left = (plan.available or 0) - (plan.total - local * each)
    fitting = min(local - 1, math.floor(left / each))
    out = []
    if fitting >= 1:
        out.append(f"a batch size of {fitting * rows} should fit (--batch-size)")
    if not remat:
        out.append("an update need not hold what is inside the layers (--remat)")
    if settings.lora is None:
        out.append("an adapter has no gradients of the model and no second copy of it (--lora 8)")
    elif settings.param_dtype == "float32" and bfloat16_is_smaller():
        out.append("the frozen parameters in bfloat16 are half as large (--param-dtype bfloat16)")
    if settings.optimizer == "adam" and settings.lora is None:
        out.append(f"Adafactor keeps {_size(plan.optimizer)} less (--optimizer adafactor)")
    if settings.average:
        out.append("without an average there is a copy less of what is trained (--average 0)")
    if not bfloat16 and bfloat16_is_smaller():
        out.append("activations in bfloat16 are half as large (--dtype bfloat16)")
    out.append(
        "shorter inputs and outputs cost less (--max-input-length names the long ones, "
        "--truncate-inputs and --skip-longer do without them)"
    )
    if plan.count > 1 and plan.device != "cpu":
        out.append("a model split over more devices leaves more on each (--model-parallel)")
    return out


def _devices(mesh: Mesh | None) -> tuple[list[jax.Device], list[jax.Device]]:
    """All that are used, and those of this process."""
    used = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    return used, [device for device in used if device.process_index == jax.process_index()]


def _available(device: jax.Device, sharing: int) -> int | None:
    if device.platform == "cpu":
        free = _host_memory()
        return None if free is None else free // sharing
    found = device.memory_stats() or {}
    return found["bytes_limit"] - found.get("bytes_in_use", 0) if "bytes_limit" in found else None


def _host_memory() -> int | None:
    """What the machine, or the container around this process, has left."""
    left = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        left.append(1024 * int(lines["MemAvailable"].split()[0]))
    elif hasattr(os, "sysconf"):
        left.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        left.append(int(limit.read_text()) - int(used.read_text()))
    return min(left, default=None)


def _size(count: int) -> str:
    """Bytes in words."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
